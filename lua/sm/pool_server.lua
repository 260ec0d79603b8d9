-- SPDX-License-Identifier: Apache-2.0
--
-- A pool that other processes take VMs from (`sm pool`): the owner's side.
--
--   <runtime>/<name>/control.sock   acquire, stats, stop
--   <runtime>/<name>/pool.json      what `sm pool ls` reads without asking anybody
--
-- A VM is lent for as long as the request that took it is open: a client that ends,
-- however it ends, has given it back.
--
-- Threads: the loop's.

local endpoint = require "sm.endpoint"
local files = require "sm.files"
local json = require "sm.json"
local loop = require "sm.loop"

local M = {}

M.META = "pool.json"

---@class sm.PoolServer
local Server = {}
Server.__index = Server

local verbs = {}

-- What `sm exec` takes from the VM's own command comes from its image here.
local function introduce(vm)
    local image = (vm.image.config or {}).config or {}
    vm.server:update { env = image.Env, cwd = image.WorkingDir, user = image.User, pool = true }
end

function verbs.acquire(self, chan, args)
    local timeout = args.timeout and endpoint.need(args, "timeout", "number") or nil
    local vm <close>, err = self.pool:acquire(timeout)
    if not vm then
        return nil, err
    end
    introduce(vm)
    chan:tell("vm", vm.id)
    return vm:wait() -- until it ends, or the client lets go and this task is cancelled
end

function verbs.stats(self)
    return self.pool:stats()
end

--- Let who waits for it go on.
function Server:stop()
    self.stopping = true
    if self.waiting then
        self.waiting(true)
    end
end

function verbs.stop(self)
    self:stop()
    return true
end

--- Wait until somebody asks it to stop. Yields.
---@async
function Server:wait()
    if not self.stopping then
        loop.await(function(settle)
            self.waiting = settle
        end)
    end
end

--- Stop answering; the pool is not its own. Yields.
---@async
function Server:close()
    self.endpoint:close "the pool has ended"
end
Server.__close = Server.close

--- Answer for a pool in its folder.
---@param pool sm.Pool
---@param dir string
---@param meta table
---@return sm.PoolServer?
---@return string? err
function M.new(pool, dir, meta)
    local self = setmetatable({ pool = pool }, Server)
    local err
    self.endpoint, err = endpoint.listen(dir .. "/control.sock", self, verbs)
    if not self.endpoint then
        return nil, err
    end
    local ok
    ok, err = files.replace(dir .. "/" .. M.META, json.encode(meta))
    if not ok then
        self:close()
        return nil, err
    end
    return self
end

return M
