-- SPDX-License-Identifier: Apache-2.0
--
-- The writable disk of a VM: an empty ext4 that every VM sees as its own.
--
-- Formatting costs more than booting, so it is done once per size: mke2fs
-- makes a template, its data is kept in the cache, and a VM's disk is that
-- below a copy-on-write overlay (core/dev/disk.c). The overlay is a sparse
-- file without a name once the worker has it open, so whatever ends the
-- worker, nothing is left.

local child = require "sm.child"
local uv = require "luv"
local files = require "sm.files"
local json = require "sm.json"
local loop = require "sm.loop"
local paths = require "sm.paths"

local M = {}

--- Bytes of the disk when nobody says; sparse on the host.
M.DEFAULT_BYTES = 8 << 30
M.MIN_BYTES = 16 << 20

local GAP_BYTES = 1 << 20

local core -- sm.core, loaded when a template is made

-- No journal: nothing of it outlives the VM. Inode tables are left to be
-- zeroed lazily, and the zeroing is switched off, because the template reads
-- as zeroes wherever nothing was written.
local MKE2FS = {
    "-q", "-F", "-t", "ext4", "-m", "0", "-b", "4096", "-I", "256", "-L", "scratch",
    "-O", "^has_journal,^resize_inode,sparse_super2,uninit_bg",
    "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0,hash_seed=00000000-0000-4000-8000-000000000000",
    "-U", "00000000-0000-4000-8000-000000000001",
}

-- Run a program to its end; its stderr is the error. Yields.
local function run(file, argv)
    local err = assert(uv.new_pipe(false))
    local text, code, ended = {}, nil, false
    return loop.await(function(settle)
        local handle, why
        local function both()
            if code ~= nil and ended then
                handle:close()
                err:close()
                if code == 0 then
                    settle(true)
                else
                    settle(nil, ("%s: %s"):format(file, table.concat(text):gsub("%s+$", "")))
                end
            end
        end
        handle, why = child.spawn(file, { args = argv, stdio = { nil, nil, err } }, loop.guard(function(c)
            code = c
            both()
        end))
        if not handle then
            err:close()
            settle(nil, ("%s: %s; install e2fsprogs"):format(file, why))
            return
        end
        err:read_start(loop.guard(function(_, chunk)
            if chunk then
                text[#text + 1] = chunk
            else
                ended = true
                both()
            end
        end))
    end)
end

-- A template is kept as its data alone, one piece after the other, with a list
-- of where they belong behind it, and how long that list is at the very end. So
-- nobody needs to ask a file system for holes again; some cannot tell.
local TRAILER = "<I8c8"
local MAGIC = "smext4-2"

local function read_template(path)
    local stat = uv.fs_stat(path)
    local fd = stat and uv.fs_open(path, "r", 0)
    if not fd then
        return nil
    end
    local trailer = uv.fs_read(fd, string.packsize(TRAILER), stat.size - string.packsize(TRAILER))
    local pieces
    if trailer and #trailer == string.packsize(TRAILER) then
        local len, magic = string.unpack(TRAILER, trailer)
        if magic == MAGIC and len < stat.size then
            pieces = json.decode(uv.fs_read(fd, len, stat.size - #trailer - len) or "")
        end
    end
    uv.fs_close(fd)
    return pieces
end

-- The root device of a piece list: data, and zeros between.
local function as_extents(path, pieces, bytes)
    local extents, at, inside = {}, 0, 0
    for _, piece in ipairs(pieces) do
        if piece.offset > at then
            extents[#extents + 1] = { length = piece.offset - at }
        end
        extents[#extents + 1] = { path = path, offset = inside, length = piece.length }
        inside, at = inside + piece.length, piece.offset + piece.length
    end
    if at < bytes then
        extents[#extents + 1] = { length = bytes - at }
    end
    return extents
end

-- Pieces with small gaps are one: a disk has a bounded number of extents.
local function merge(pieces, gap)
    local out = {}
    for _, piece in ipairs(pieces) do
        local last = out[#out]
        if last and piece.offset - (last.offset + last.length) <= gap then
            last.length = piece.offset + piece.length - last.offset
        else
            out[#out + 1] = { offset = piece.offset, length = piece.length }
        end
    end
    return out
end

-- Format a sparse file in `dir`; where it has data. Yields.
local function format(dir, bytes)
    local fd, image = uv.fs_mkstemp(dir .. "/.ext4-XXXXXX")
    if not fd then
        return nil, image
    end
    local ok, err = uv.fs_ftruncate(fd, bytes)
    uv.fs_close(fd)
    if ok then
        local argv = table.move(MKE2FS, 1, #MKE2FS, 1, {})
        argv[#argv + 1] = image
        ok, err = run(uv.fs_stat("/sbin/mke2fs") and "/sbin/mke2fs" or "mke2fs", argv)
    end
    local pieces
    if ok then
        core = core or require "sm.core"
        pieces, err = core.data_extents(image)
    end
    if not pieces then
        uv.fs_unlink(image)
        return nil, err
    end
    return image, merge(pieces, GAP_BYTES)
end

-- Where a file's holes can be told, or the last resort. Yields.
local function format_somewhere(bytes, last)
    for _, dir in ipairs { "/dev/shm", uv.os_tmpdir(), last } do
        local image, pieces = format(dir, bytes)
        local data = 0
        for _, piece in ipairs(image and pieces or {}) do
            data = data + piece.length
        end
        if image and (data <= bytes // 2 or dir == last) then
            return image, pieces
        elseif image then
            uv.fs_unlink(image)
        elseif dir == last then
            return nil, pieces
        end
    end
end

-- Copy the pieces and the list behind them into a new file. Yields.
local function pack(image, pieces, path)
    local from, err = uv.fs_open(image, "r", 0)
    local to = from and uv.fs_open(path, "w", tonumber("600", 8))
    local ok = to ~= nil
    for _, piece in ipairs(pieces) do
        local left, at = piece.length, piece.offset
        while ok and left > 0 do
            local bytes = uv.fs_read(from, math.min(left, 1 << 20), at)
            ok = bytes and #bytes > 0
            if ok then
                ok, err = uv.fs_write(to, bytes, -1)
                left, at = left - #bytes, at + #bytes
            end
        end
    end
    if ok then
        local list = json.encode(pieces)
        ok, err = uv.fs_write(to, list .. string.pack(TRAILER, #list, MAGIC), -1)
    end
    if to then
        uv.fs_close(to)
    end
    if from then
        uv.fs_close(from)
    end
    return ok and true or nil, err
end

--- The template of a size, made when it is not there: the extents of a disk.
--- Yields.
---@async
---@param bytes integer
---@return table[]? extents
---@return string? err
function M.template(bytes)
    bytes = (bytes + 4095) // 4096 * 4096
    local dir = paths.cache() .. "/scratch"
    local path = ("%s/ext4-v2-%d.img"):format(dir, bytes)
    local pieces = read_template(path)
    if pieces then
        return as_extents(path, pieces, bytes)
    end
    local ok, err = paths.make(dir)
    if not ok then
        return nil, err
    end
    local image
    image, pieces = format_somewhere(bytes, dir)
    if not image then
        return nil, pieces
    end
    -- Of two makers at once the first wins: what is there is never replaced, for
    -- its list and its data belong together.
    local fd, tmp = uv.fs_mkstemp(dir .. "/.new-XXXXXX")
    if fd then
        uv.fs_close(fd)
        ok, err = pack(image, pieces, tmp)
        if ok then
            ok, err = files.sync(tmp)
        end
        local code
        if ok then
            ok, err, code = uv.fs_link(tmp, path)
        end
        uv.fs_unlink(tmp)
        if code == "EEXIST" then
            pieces = read_template(path)
            ok, err = pieces ~= nil, path .. ": damaged; remove it"
        end
    else
        ok, err = nil, tmp
    end
    uv.fs_unlink(image)
    if not ok then
        return nil, err
    end
    return as_extents(path, pieces, bytes)
end

--- Where the overlay of a VM goes. The worker makes the file and removes its
--- name at once (an ephemeral overlay, core/dev/disk.h).
---@param id string
---@return string? path
---@return string? err
function M.overlay(id)
    local dir = paths.data() .. "/scratch"
    local ok, err = paths.make(dir)
    if not ok then
        return nil, err
    end
    return ("%s/%s-%d"):format(dir, id, uv.os_getpid())
end

return M
