-- SPDX-License-Identifier: Apache-2.0
--
-- A small reader of uncompressed EROFS images, written from the kernel's
-- fs/erofs/erofs_fs.h for specs: erofs-utils 1.5 judges the structure, this
-- tells what is in it (hard links, xattrs and times that its extraction drops).
--
--   erofs.read(path) -> { ["etc/passwd"] = { type="f", mode=, uid=, gid=, size=,
--       mtime=, mtime_ns=, nlink=, nid=, target=, major=, minor=, xattrs={},
--       data=function() }, [""] = the root, … }

local M = {}

local BLOCK = 4096
local TYPES = { [0x8] = "f", [0x4] = "d", [0xa] = "l", [0x2] = "c", [0x6] = "b", [0x1] = "p",
    [0xc] = "s" }
local PREFIX = { "user.", "system.posix_acl_access", "system.posix_acl_default", "trusted.", nil,
    "security." }

local function open(path)
    local file = assert(io.open(path, "rb"))
    local function at(offset, n)
        if n == 0 then
            return ""
        end
        file:seek("set", offset)
        local s = file:read(n)
        assert(s and #s == n, "the image is shorter than it says")
        return s
    end
    return at, file
end

local function read_xattrs(at, offset, count)
    local out = {}
    if count == 0 then
        return out, 0
    end
    local size = 12 + 4 * (count - 1)
    local raw, pos = at(offset, size), 13
    assert(raw:byte(5) == 0, "shared xattrs")
    while pos <= #raw do
        local name_len, index, value_len, p = ("<BBI2"):unpack(raw, pos)
        local name = assert(PREFIX[index], "xattr index") .. raw:sub(p, p + name_len - 1)
        assert(out[name] == nil, "xattr twice")
        out[name] = raw:sub(p + name_len, p + name_len + value_len - 1)
        pos = p + (name_len + value_len + 3) // 4 * 4
    end
    return out, size
end

local function read_inode(at, nid)
    local offset = nid * 32
    local format, icount, mode, _, size, u, ino, uid, gid, mtime, ns, nlink =
        ("<I2I2I2I2I8I4I4I4I4i8I4I4"):unpack(at(offset, 64))
    assert(format & 1 == 1, "not an extended inode")
    local layout = format >> 1 & 7
    local e = { nid = nid, ino = ino, mode = mode & 0xfff, type = assert(TYPES[mode >> 12]),
        size = size, uid = uid, gid = gid, mtime = mtime, mtime_ns = ns, nlink = nlink }
    local xattr_bytes
    e.xattrs, xattr_bytes = read_xattrs(at, offset + 64, icount)
    if e.type == "c" or e.type == "b" then
        e.major, e.minor = u >> 8 & 0xfff, u & 0xff | u >> 12 & 0xfff00
        return e
    end
    function e.data()
        if layout == 0 then
            return at(u * BLOCK, size)
        end
        assert(layout == 2, "layout")
        local tail = size % BLOCK
        local from = offset + 64 + xattr_bytes
        assert(from // BLOCK == (from + tail - 1) // BLOCK, "inline data crosses a block")
        return at(u * BLOCK, size - tail) .. at(from, tail)
    end
    if e.type == "l" then
        e.target = e.data()
    end
    return e
end

local function read_dir(data)
    local names, last = {}, nil
    for from = 1, #data, BLOCK do
        local block = data:sub(from, from + BLOCK - 1)
        local _, first = ("<I8I2"):unpack(block)
        local n = first // 12
        for i = 0, n - 1 do
            local nid, name_at, kind = ("<I8I2B"):unpack(block, i * 12 + 1)
            local stop = i + 1 < n and ("<I2"):unpack(block, (i + 1) * 12 + 9) or #block
            local name = block:sub(name_at + 1, stop):gsub("%z+$", "")
            assert(not last or last < name, "names are not sorted")
            last = name
            names[#names + 1] = { name = name, nid = nid, kind = kind }
        end
    end
    return names
end

local KINDS = { "f", "d", "c", "b", "p", "s", "l" }

--- Read the whole tree of an image (metadata and data in one file).
function M.read(path)
    local at, file = open(path)
    local magic, _, _, bits, _, root = ("<I4I4I4BBI2"):unpack(at(1024, 128))
    assert(magic == 0xe0f5e1e2 and bits == 12, "not an EROFS image")
    local tree, by_nid = {}, {}
    local function visit(name, nid, parent)
        local e = by_nid[nid] or read_inode(at, nid)
        assert(not by_nid[nid] or e.type ~= "d", "a directory with two names")
        by_nid[nid] = e
        e.names = (e.names or 0) + 1
        tree[name] = e
        if e.type ~= "d" then
            return e
        end
        local subdirs, dots = 0, {}
        for _, d in ipairs(read_dir(e.data())) do
            if d.name == "." or d.name == ".." then
                dots[d.name] = d.nid
            else
                local child = visit(name == "" and d.name or name .. "/" .. d.name, d.nid, nid)
                assert(KINDS[d.kind] == child.type, "type in the directory entry")
                subdirs = subdirs + (child.type == "d" and 1 or 0)
            end
        end
        assert(dots["."] == nid and dots[".."] == parent, "dots of " .. name)
        assert(e.nlink == subdirs + 2, "links of the directory " .. name)
        return e
    end
    visit("", root, root)
    for _, e in pairs(by_nid) do
        assert(e.type == "d" or e.nlink == e.names, "link count")
    end
    return tree, function()
        file:close()
    end
end

return M
