-- SPDX-License-Identifier: Apache-2.0
--
-- The writable disk of a VM: an empty ext4 that every VM sees as its own.
--
-- Formatting costs more than booting, so it is done once per size: mke2fs
-- makes a sparse template in the cache, and a VM's disk is that template
-- below a copy-on-write overlay (core/dev/disk.c). The overlay is a sparse
-- file without a name once the worker has it open, so whatever ends the
-- worker, nothing is left.

local child = require "sm.child"
local uv = require "luv"
local loop = require "sm.loop"
local paths = require "sm.paths"

local M = {}

--- Bytes of the disk when nobody says; sparse on the host.
M.DEFAULT_BYTES = 8 << 30
M.MIN_BYTES = 16 << 20

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

--- The template of a size, made when it is not there. Yields.
---@async
---@param bytes integer
---@return string? path
---@return string? err
function M.template(bytes)
    bytes = (bytes + 4095) // 4096 * 4096
    local dir = paths.cache() .. "/scratch"
    local path = ("%s/ext4-v1-%d.img"):format(dir, bytes)
    if uv.fs_stat(path) then
        return path
    end
    local ok, err = paths.make(dir)
    if not ok then
        return nil, err
    end
    -- Two makers at once each have a file of their own; the last rename wins
    -- and both are the same.
    local fd, tmp = uv.fs_mkstemp(dir .. "/.new-XXXXXX")
    if not fd then
        return nil, tmp
    end
    ok, err = uv.fs_ftruncate(fd, bytes)
    if ok then
        local argv = table.move(MKE2FS, 1, #MKE2FS, 1, {})
        argv[#argv + 1] = tmp
        local file = uv.fs_stat("/sbin/mke2fs") and "/sbin/mke2fs" or "mke2fs"
        ok, err = run(file, argv)
    end
    if ok then
        ok, err = uv.fs_fsync(fd)
    end
    uv.fs_close(fd)
    if ok then
        ok, err = uv.fs_rename(tmp, path)
    end
    if not ok then
        uv.fs_unlink(tmp)
        return nil, err
    end
    return path
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
