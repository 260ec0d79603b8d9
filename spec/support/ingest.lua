-- SPDX-License-Identifier: Apache-2.0
--
-- Ingest and merge for specs: each helper works in one temporary folder, and
-- every image is judged by fsck.erofs before its tree is looked at.

local core = require "sm.image_core"
local erofs = require "support.erofs"
local shell = require "support.shell"
local tar = require "support.tar"

local M = {}
M.__index = M

function M.new()
    return setmetatable({ dir = shell.tmpdir(), n = 0 }, M)
end

function M:close()
    shell.remove(self.dir)
end

--- A fresh path in the folder.
function M:path(name)
    self.n = self.n + 1
    return ("%s/%d-%s"):format(self.dir, self.n, name or "x")
end

--- Write bytes to a fresh file.
function M:file(bytes, name)
    local path = self:path(name)
    shell.write(path, bytes)
    return path
end

--- Ingest a blob: a path, or the entries of a tar. Returns result or nil, err;
--- and the layer's folder, which is empty after an error.
function M:ingest(blob, options)
    if type(blob) == "table" then
        blob = self:file(tar.make(blob), "layer.tar")
    end
    local out = self:path("layer")
    shell.run { "mkdir", out }
    local cfg = { blob = blob, out = out }
    for k, v in pairs(options or {}) do
        cfg[k] = v
    end
    local job <close> = assert(core.ingest(cfg))
    local result, err = job:result()
    return result, err, out
end

--- A layer that must be fine; returns its folder and the result.
function M:layer(blob, options)
    local result, err, out = self:ingest(blob, options)
    assert(result, err)
    return out, result
end

--- Merge layer folders into an image whose tree is returned, with the path of
--- the whole device as one file.
function M:image(layers)
    local meta = self:path("meta")
    local result, err = core.merge { layers = layers, out = meta }
    assert(result, err)
    local device = self:path("device")
    for i, x in ipairs(result.extents) do
        assert(x.offset == 0)
        assert(shell.run { "stat", "-c", "%s", x.path } == x.length .. "\n")
        shell.run(("cat %s >> %s"):format(shell.quote(x.path), shell.quote(device)))
        assert(x.length % (2 << 20) == 0 and (i > 1 or x.length == result.bytes))
    end
    assert(shell.run { "stat", "-c", "%s", device } == result.size .. "\n")
    shell.run { "fsck.erofs", device }
    local tree, close = erofs.read(device)
    self.closers = self.closers or {}
    table.insert(self.closers, close)
    return tree, device, result
end

--- The sorted paths of a tree, folders with a slash, links with their target.
function M.names(tree)
    local out = {}
    for name, e in pairs(tree) do
        if name ~= "" then
            out[#out + 1] = name .. (e.type == "d" and "/" or e.type == "l" and "@" .. e.target or "")
        end
    end
    table.sort(out)
    return out
end

local FIELDS = { "type", "mode", "uid", "gid", "mtime", "mtime_ns", "major", "minor", "target" }

local function compare(name, want, have, out)
    local function note(what, a, b)
        out[#out + 1] = ("%s: %s is %s, not %s"):format(name, what, tostring(b), tostring(a))
    end
    for _, f in ipairs(FIELDS) do
        if want[f] ~= have[f] and not (f == "target" and want.type ~= "l") then
            note(f, want[f], have[f])
        end
    end
    if want.type == "f" then
        local sum = core.sha256(have.data())
        if want.size ~= have.size or want.sha256 ~= sum then
            note("content", want.sha256, sum)
        end
    end
    for k in pairs(want.xattrs) do
        if want.xattrs[k] ~= have.xattrs[k] then
            note(k, want.xattrs[k], have.xattrs[k])
        end
    end
    for k in pairs(have.xattrs) do
        if want.xattrs[k] == nil then
            note(k, nil, have.xattrs[k])
        end
    end
end

--- Differences between a folder (support/folder.lua) and an image, as text.
--- `skip(name, field)` leaves out what a tool is known not to restore.
function M.differences(want, have)
    local out, inode = {}, {}
    for name, e in pairs(want) do
        if not have[name] then
            out[#out + 1] = name .. ": missing"
        else
            compare(name, e, have[name], out)
            if e.type ~= "d" then
                inode[e.nid] = inode[e.nid] or have[name].nid
                if inode[e.nid] ~= have[name].nid then
                    out[#out + 1] = name .. ": another inode than its hard links"
                end
                if e.nlink ~= have[name].nlink then
                    out[#out + 1] = ("%s: %d links, not %d"):format(name, have[name].nlink, e.nlink)
                end
            end
        end
    end
    for name in pairs(have) do
        if not want[name] then
            out[#out + 1] = name .. ": too much"
        end
    end
    table.sort(out)
    return out
end

return M
