-- SPDX-License-Identifier: Apache-2.0
--
-- Locks between processes that a task can wait for: flock(2) on a file of its
-- own. It belongs to the open descriptor, so two holders in one process exclude
-- each other as well, and the kernel lets go of it when the process dies,
-- however it dies.
--
-- A holder may remove the file. Whoever opened it just before would then lock a
-- name that is gone, so a lock counts only while its path leads to the locked
-- inode.

local uv = require "luv"
local files = require "sm.files"
local loop = require "sm.loop"

local M = {}

local EWOULDBLOCK = 11
local max_races = 100
-- flock has no event to wait for short of a thread; a lock that is contended
-- stands for a download or a conversion, so a look now and then is enough.
local first_wait_s, max_wait_s = 0.005, 0.1
local mode_file = tonumber("600", 8)
local flags = uv.constants.O_RDWR | uv.constants.O_CREAT

local core -- sm.core, loaded at the first lock

---@class sm.Lock
local Lock = {}
Lock.__index = Lock
Lock.__name = "sm.Lock"

--- Let go. Idempotent; also done when closed or collected.
function Lock:close()
    if self.fd then
        uv.fs_close(self.fd)
        self.fd = nil
    end
end
Lock.__close = Lock.close
Lock.__gc = Lock.close

--- Delete the file, then let go.
function Lock:remove()
    if not self.fd then
        error("attempt to use a closed lock", 2)
    end
    uv.fs_unlink(self.path)
    self:close()
end

function Lock:__tostring()
    return ("lock (%s)"):format(self.fd and self.path or "closed")
end

-- The lock, false if another has it, nil and why; "again" if the file went
-- away under us.
local function attempt(path, mode)
    local fd, why = uv.fs_open(path, flags, mode_file)
    if not fd then
        return nil, files.error(path, why)
    end
    local lock = setmetatable({ fd = fd, path = path }, Lock)
    local ok, what, errno = core.flock(fd, mode)
    if not ok then
        lock:close()
        if errno == EWOULDBLOCK then
            return false
        end
        return nil, files.error(path, what)
    end
    local held, named = uv.fs_fstat(fd), uv.fs_stat(path)
    if named and held.ino == named.ino and held.dev == named.dev then
        return lock
    end
    lock:close()
    return nil, "again"
end

--- Take a lock if nobody is in the way: the lock; false if it is held by
--- another; nil and why if it cannot be had at all. `lock:close()` lets go,
--- `lock:remove()` deletes its file as well.
---@param path string
---@param opts? {shared: boolean}
---@return sm.Lock|false|nil
---@return string? error
function M.try(path, opts)
    core = core or require "sm.core"
    local mode = opts and opts.shared and "shared" or "exclusive"
    for _ = 1, max_races do
        local lock, why = attempt(path, mode)
        if why ~= "again" then
            return lock, why
        end
    end
    return false
end

--- Take a lock, waiting for it; `waiting()` is called once if there is a
--- wait. Yields.
---@async
---@param path string
---@param opts? {shared: boolean}
---@param waiting? fun()
---@return sm.Lock?
---@return string? error
function M.wait(path, opts, waiting)
    local delay = first_wait_s
    while true do
        local lock, why = M.try(path, opts)
        if lock or lock == nil then
            return lock, why
        end
        if waiting then
            waiting()
            waiting = nil
        end
        loop.sleep(delay)
        delay = math.min(delay * 2, max_wait_s)
    end
end

return M
