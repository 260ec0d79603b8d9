-- SPDX-License-Identifier: Apache-2.0
--
-- Locks between processes that a task can wait for. The lock itself is
-- flock(2), in C (core/lua_lock.c), and dies with its holder.

local loop = require "sm.loop"

local M = {}

local EWOULDBLOCK = 11
-- flock has no event to wait for short of a thread; a lock that is contended
-- stands for a download or a conversion, so a look now and then is enough.
local first_wait_s, max_wait_s = 0.005, 0.1

local take

-- A function of its own in the library of sm.core: taking a lock needs none of
-- the machine, and a test may run where the machine's half is not built.
local function load_take()
    local path = assert(package.searchpath("sm.core", package.cpath))
    return assert(package.loadlib(path, "luaopen_sm_core_lock"))()
end

--- Take a lock if nobody is in the way: the lock; false if it is held by
--- another; nil and why if it cannot be had at all. `lock:close()` lets go,
--- `lock:remove()` deletes its file as well.
---@param path string
---@param opts? {shared: boolean}
---@return userdata|false|nil
---@return string? error
function M.try(path, opts)
    take = take or load_take()
    local lock, why, errno = take(path, opts)
    if lock then
        return lock
    elseif errno == EWOULDBLOCK then
        return false
    end
    return nil, why
end

--- Take a lock, waiting for it; `waiting()` is called once if there is a
--- wait. Yields.
---@async
---@param path string
---@param opts? {shared: boolean}
---@param waiting? fun()
---@return userdata?
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
