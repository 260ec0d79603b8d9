-- SPDX-License-Identifier: Apache-2.0
--
-- The initramfs of a guest: a cpio archive ("newc", Linux
-- Documentation/driver-api/early-userspace/buffer-format.rst) with /init, the
-- kernel modules a stock kernel needs, and what else a caller adds.
--
-- It is a function of its contents alone: no times, owners or host inode
-- numbers, entries in one fixed order. So it is built once and kept in the
-- cache under the hash of its contents; two builders at once write the same
-- bytes to files of their own, and a rename publishes one. Big files are
-- streamed, never held.
--
-- It is not compressed: the guest unpacks it before its first process runs,
-- and inflating costs it more than the host's page cache costs us.

local uv = require "luv"
local paths = require "sm.paths"

local M = {}

-- Goes into the hash: raise it when the same contents make other bytes.
local FORMAT = "initramfs 1"
local CHUNK_BYTES = 256 << 10
-- A file's length is 8 hex digits in the archive.
local MAX_FILE_BYTES = 0xffffffff
local S_IFDIR, S_IFREG, S_IFLNK, S_IFCHR = 0x4000, 0x8000, 0xa000, 0x2000

-- The kernel opens /dev/console for /init before anything is mounted.
local SKELETON = {
    { path = "dev", mode = S_IFDIR | tonumber("755", 8) },
    { path = "dev/console", mode = S_IFCHR | tonumber("600", 8), major = 5, minor = 1 },
    { path = "proc", mode = S_IFDIR | tonumber("755", 8) },
    { path = "sys", mode = S_IFDIR | tonumber("755", 8) },
}

---@class sm.InitramfsFile
---@field path string where, in the guest; parents are made
---@field data string? the contents, or
---@field source string? the host's file with the contents, or
---@field link string? a symbolic link's target, or
---@field dir boolean? a folder
---@field mode integer? permission bits; 0755 for folders, 0644 for files

---@class sm.InitramfsSpec
---@field init string the host's file that becomes /init
---@field modules {name: string, path: string}[]? go to /modules, in /modules/order
---@field files sm.InitramfsFile[]?

local KEYS = { init = true, modules = true, files = true }
local FILE_KEYS = { path = true, data = true, source = true, link = true, dir = true, mode = true }

local function check_keys(where, t, known)
    for key in pairs(t) do
        if not known[key] then
            error(("%s: unknown key %q"):format(where, tostring(key)), 4)
        end
    end
end

-- "a/b" for "/a//b/"; an error for what does not name a place in the archive.
local function clean(path)
    local parts = {}
    for part in tostring(path):gmatch("[^/]+") do
        if part == "." or part == ".." or part:find("\0", 1, true) then
            error(("initramfs: bad path %q"):format(path), 4)
        end
        parts[#parts + 1] = part
    end
    if #parts == 0 then
        error(("initramfs: bad path %q"):format(path), 4)
    end
    return table.concat(parts, "/")
end

-- All entries by their path, with the parents they need.
local function collect(spec)
    local entries = {}
    local function add(entry)
        local old = entries[entry.path]
        if old and not (old.mode & 0xf000 == S_IFDIR and entry.mode & 0xf000 == S_IFDIR) then
            error(("initramfs: %q is there twice"):format(entry.path), 4)
        end
        entries[entry.path] = entry
        local parent = entry.path:match("^(.*)/[^/]+$")
        if not parent then
            return
        elseif not entries[parent] then
            add { path = parent, mode = S_IFDIR | tonumber("755", 8) }
        elseif entries[parent].mode & 0xf000 ~= S_IFDIR then
            error(("initramfs: %q is below %q, which is no folder"):format(entry.path, parent), 4)
        end
    end
    for _, entry in ipairs(SKELETON) do
        add(entry)
    end
    add { path = "init", mode = S_IFREG | tonumber("755", 8), source = spec.init }
    if spec.modules and #spec.modules > 0 then
        local order = {}
        for i, module in ipairs(spec.modules) do
            local path = clean("modules/" .. module.name)
            add { path = path, mode = S_IFREG | tonumber("644", 8), source = module.path }
            order[i] = "/" .. path .. "\n"
        end
        add { path = "modules/order", mode = S_IFREG | tonumber("644", 8), data = table.concat(order) }
    end
    for _, file in ipairs(spec.files or {}) do
        check_keys("initramfs: files", file, FILE_KEYS)
        local kind = file.dir and S_IFDIR or file.link and S_IFLNK or S_IFREG
        if kind == S_IFREG and not (file.data or file.source) then
            error(("initramfs: %q has no contents (data, source, link or dir)"):format(file.path), 3)
        end
        local mode = kind == S_IFLNK and 511 or file.mode
            or tonumber(kind == S_IFDIR and "755" or "644", 8)
        add { path = clean(file.path), mode = kind | mode & 4095, source = file.source,
            data = file.link or file.data }
    end
    local list = {}
    for _, entry in pairs(entries) do
        list[#list + 1] = entry
    end
    -- Byte order puts a folder before what is in it: it is a prefix.
    table.sort(list, function(a, b)
        return a.path < b.path
    end)
    return list
end

-- The archive's name in the cache; fills in the entries' lengths.
local function hash(entries)
    local core = require "sm.image_core"
    local lines = { FORMAT }
    for i, entry in ipairs(entries) do
        local digest
        if entry.source then
            local stat, err = uv.fs_stat(entry.source)
            if not stat then
                return nil, ("initramfs: %s"):format(err)
            elseif stat.type ~= "file" or stat.size > MAX_FILE_BYTES then
                return nil, ("initramfs: %s: not a regular file below 4 GiB"):format(entry.source)
            end
            digest, err = core.sha256 { file = entry.source }
            if not digest then
                return nil, ("initramfs: %s"):format(err)
            end
            entry.stat = stat
        elseif entry.data then
            digest = core.sha256(entry.data)
        end
        lines[i + 1] = ("%q %o %d,%d %s"):format(entry.path, entry.mode, entry.major or 0,
            entry.minor or 0, digest or "-")
    end
    return core.sha256(table.concat(lines, "\n")):match("%x+$")
end

local function pad(length)
    return ("\0"):rep(-length & 3)
end

local function header(ino, entry, size)
    local name = entry.path .. "\0"
    local links = entry.mode & 0xf000 == S_IFDIR and 2 or 1
    local head = ("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X"):format(ino,
        entry.mode, 0, 0, links, 0, size, 0, 0, entry.major or 0, entry.minor or 0, #name, 0)
    return head .. name .. pad(#head + #name)
end

-- Copy a source file; it must be the file that was hashed, to the last byte.
local function copy(write, entry)
    local fd, err = uv.fs_open(entry.source, "r", 0)
    if not fd then
        return nil, err
    end
    local left, ok = entry.stat.size, true
    while ok and left > 0 do
        local data
        data, err = uv.fs_read(fd, math.min(left, CHUNK_BYTES))
        if not data or #data == 0 then
            ok, err = nil, err or "it shrank while it was read"
        else
            left = left - #data
            ok, err = write(data)
        end
    end
    local now, was = uv.fs_fstat(fd), entry.stat
    uv.fs_close(fd)
    if ok and (now.size ~= was.size or now.ino ~= was.ino or now.mtime.sec ~= was.mtime.sec
        or now.mtime.nsec ~= was.mtime.nsec) then
        ok, err = nil, "it changed while it was read"
    end
    if not ok then
        return nil, ("%s: %s"):format(entry.source, err)
    end
    return true
end

local function write_archive(fd, entries)
    local function write(data)
        local done = 0
        while done < #data do
            local n, err = uv.fs_write(fd, done == 0 and data or data:sub(done + 1))
            if not n then
                return nil, err
            end
            done = done + n
        end
        return true
    end
    local total = 0
    for ino, entry in ipairs(entries) do
        local size = entry.stat and entry.stat.size or entry.data and #entry.data or 0
        local head = header(ino, entry, size)
        local ok, err = write(entry.data and head .. entry.data or head)
        if ok and entry.source then
            ok, err = copy(write, entry)
        end
        if ok and size & 3 ~= 0 then
            ok, err = write(pad(size))
        end
        if not ok then
            return nil, err
        end
        total = total + #head + size + (-size & 3)
    end
    local trailer = header(0, { path = "TRAILER!!!", mode = 0 }, 0)
    return write(trailer .. ("\0"):rep(-(total + #trailer) % 512))
end

--- The path of an initramfs with these contents, built unless it is cached.
---@param spec sm.InitramfsSpec
---@return string? path
---@return string? err
function M.build(spec)
    if type(spec) ~= "table" then
        error("initramfs.build: a table expected", 2)
    end
    check_keys("initramfs.build", spec, KEYS)
    if type(spec.init) ~= "string" then
        error("initramfs.build: init: the path of a file expected", 2)
    end
    local entries = collect(spec)
    local name, err = hash(entries)
    if not name then
        return nil, err
    end
    local dir = paths.cache() .. "/initramfs"
    local path = ("%s/%s.cpio"):format(dir, name)
    if uv.fs_stat(path) then
        return path
    end
    local ok
    ok, err = paths.make(dir)
    if not ok then
        return nil, err
    end
    local fd, tmp = uv.fs_mkstemp(dir .. "/.new-XXXXXX")
    if not fd then
        return nil, ("initramfs: %s"):format(tmp)
    end
    ok, err = write_archive(fd, entries)
    uv.fs_close(fd)
    if ok then
        ok, err = uv.fs_rename(tmp, path)
    end
    if not ok then
        uv.fs_unlink(tmp)
        return nil, ("initramfs: %s"):format(err)
    end
    return path
end

return M
