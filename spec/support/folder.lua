-- SPDX-License-Identifier: Apache-2.0
--
-- What is in a folder, with all metadata, told by find, stat, getfattr and
-- sha256sum; in the same shape as support/erofs.lua gives an image.

local shell = require "support.shell"

local M = {}

local function unescape(s)
    return (s:gsub("\\(%d%d%d)", function(o)
        return string.char(tonumber(o, 8))
    end))
end

local function unhex(s)
    return (s:gsub("%x%x", function(h)
        return string.char(tonumber(h, 16))
    end))
end

local function add_xattrs(path, tree)
    local out = shell.run(("cd %s; getfattr -R -h -d -m - -e hex . 2>/dev/null || :"):format(
        shell.quote(path)))
    local e
    for line in out:gmatch("[^\n]+") do
        local file = line:match("^# file: (.*)$")
        if file then
            file = unescape(file):gsub("^%./", "")
            e = assert(tree[file == "." and "" or file], file)
        else
            local name, value = line:match("^([^=]+)=0x(%x*)$")
            e.xattrs[name or line:match("^[^=]+")] = value and unhex(value) or ""
        end
    end
end

local function add_sums(path, tree)
    local out = shell.run(("cd %s; find . -type f -print0 | xargs -0 -r sha256sum -z"):format(
        shell.quote(path)))
    for sum, name in out:gmatch("(%x+)  %./(%Z+)%z") do
        tree[name].sha256 = "sha256:" .. sum
    end
end

--- Read a folder. `nid` is the inode's number, for hard links.
function M.read(path)
    local tree = {}
    local out = shell.run(("cd %s; find . -printf '%%P\\0%%y\\0%%m\\0%%U\\0%%G\\0%%s\\0%%T@\\0%%n\\0%%i\\0%%l\\0'")
        :format(shell.quote(path)))
    local fields = {}
    for f in out:gmatch("(%Z*)%z") do
        fields[#fields + 1] = f
    end
    for i = 1, #fields, 10 do
        local sec, frac = fields[i + 6]:match("^(-?%d+)%.(%d+)")
        tree[fields[i]] = { type = fields[i + 1], mode = tonumber(fields[i + 2], 8),
            uid = tonumber(fields[i + 3]), gid = tonumber(fields[i + 4]),
            size = tonumber(fields[i + 5]), mtime = tonumber(sec),
            mtime_ns = tonumber(frac:sub(1, 9)), nlink = tonumber(fields[i + 7]),
            nid = tonumber(fields[i + 8]), target = fields[i + 9], xattrs = {} }
    end
    for name, e in pairs(tree) do
        if e.type == "c" or e.type == "b" then
            local numbers = shell.run { "stat", "-c", "%t %T", path .. "/" .. name }
            local major, minor = numbers:match("(%x+) (%x+)")
            e.major, e.minor = tonumber(major, 16), tonumber(minor, 16)
        end
    end
    add_xattrs(path, tree)
    add_sums(path, tree)
    return tree
end

return M
