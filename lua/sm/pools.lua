-- SPDX-License-Identifier: Apache-2.0
--
-- Pools of other processes: the list of them, and a handle to one, from which VMs can
-- be taken. A handle is a connection; closing it gives back what was taken through it.

local attached = require "sm.attached"
local check = require "sm.check"
local control = require "sm.control"
local rundir = require "sm.rundir"
local server = require "sm.pool_server"

local M = {}

---@class sm.AttachedPool
---@field name string
---@field info table what `sm.pools` says of it
local Pool = {}
Pool.__index = Pool
Pool.__name = "sm.AttachedPool"

function Pool:__tostring()
    return ("pool %s (%s)"):format(self.name, self.conn.dead and "let go" or "attached")
end

--- The pools of this user, the newest first: { id, image, created, owner, min, max, dir }.
--- Yields.
---@async
---@return table[]?
---@return string? err
function M.list()
    return rundir.list(server.META)
end

--- Connect to a pool of another process. Yields.
---@async
---@param name string
---@return sm.AttachedPool?
---@return string? err
function M.attach(name)
    local list, err = M.list()
    for _, info in ipairs(list or {}) do
        if info.id == name then
            local stream
            stream, err = attached.connect(info.dir .. "/control.sock")
            if not stream then
                return nil, ("the pool '%s' does not answer: %s"):format(name, err)
            end
            return setmetatable({ name = name, info = info, conn = control.new(stream) }, Pool)
        end
    end
    return nil, err or ("no pool named '%s'"):format(name)
end

--- A VM that nobody has touched; closing it (or `<close>`) gives it back, which ends
--- it. nil, "timeout" after `timeout` seconds. Yields.
---@async
---@param timeout number?
---@return sm.AttachedVM?
---@return string? err
function Pool:acquire(timeout)
    check("pool:acquire", 1, timeout, "timeout", "number?")
    local chan, err = self.conn:open("acquire", { timeout = timeout })
    if not chan then
        return nil, err
    end
    local id
    chan.on_tell = function(what, value)
        if what == "vm" and type(value) == "string" then
            id = value
        end
    end
    local vm
    local _ <close> = setmetatable({}, { __close = function()
        if not vm then
            chan:close()
        end
    end })
    chan:wait_for(function()
        return id or chan.result or chan.failure
    end)
    if not id then
        local _, why = chan:answer()
        return nil, why or "the pool has ended"
    end
    vm, err = attached.attach(id)
    if not vm then
        return nil, err
    end
    vm.lease = chan
    return vm
end

--- Its counters, as Pool:stats. Yields.
---@async
---@return table?
---@return string? err
function Pool:stats()
    return self.conn:call("stats", {})
end

--- End it, and every VM of it. Yields.
---@async
---@return true?
---@return string? err
function Pool:stop()
    return self.conn:call("stop", {})
end

--- Let go of it. Idempotent.
function Pool:close()
    self.conn:close()
end
Pool.__close = Pool.close

return M
