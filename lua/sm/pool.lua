-- SPDX-License-Identifier: Apache-2.0
--
-- A pool: copies of one machine, running and ready to be taken.
--
--   local pool <close> = assert(sm.pool { image = "python:3.12", min = 2, max = 8,
--       warmup = function(vm) vm:exec { argv = { "python3", "-c", "import numpy" } } end })
--   local vm <close> = assert(pool:acquire())
--
-- The machine is booted once, `warmup` is run in it, and it is saved: the
-- template. Every VM that is handed out is a fresh copy of that, in a worker of
-- its own, and nobody else has touched it. Giving one back (pool:release, or
-- closing it) ends it; a new copy takes its place. Nothing is ever reused, so
-- there is nothing to clean and nothing to leak from one user to the next.
--
--   ready ── acquire ──▶ taken ── release, close, death ──▶ gone
--     ▲                                                      │
--     └────────────── a copy of the template ◀───────────────┘
--
-- `min` copies are kept ready, at most `max` exist at once, ready and taken; an
-- acquire beyond that waits its turn, first come first served, for at most
-- `acquire_timeout`. Copies beyond `min` that nobody takes for `idle_timeout`
-- are ended. A ready copy that dies is replaced. With `restore_on_release = false`
-- what is taken is not replaced: a copy is made when somebody asks for one. At most `burst` copies are
-- being made at the same time, so that a burst of acquires does not make all of
-- them slow.
--
-- Threads: the loop's.

local loop = require "sm.loop"
local paths = require "sm.paths"
local snapshots = require "sm.snapshot"

local M = {}

local LATENCIES = 1000 -- remembered, for stats
local RETRY_SECONDS = { 0.1, 0.5, 2, 5 } -- between copies that cannot be made

---@class sm.Pool
local Pool = {}
Pool.__index = Pool
Pool.__name = "sm.Pool"

-- ------------------------------------------------------------ configuration

local function count(low)
    return function(v)
        return math.type(v) == "integer" and v >= low, ("a whole number, at least %d"):format(low)
    end
end

local function seconds(v)
    return type(v) == "number" and v > 0, "seconds, more than 0"
end

local function of(kind)
    return function(v)
        return type(v) == kind, "a " .. kind
    end
end

local KEYS = {
    image = function(v)
        return type(v) == "string" or type(v) == "table", "a reference, or what sm.image gives"
    end,
    snapshot = function(v)
        return type(v) == "string" or type(v) == "table", "a snapshot, its name or path"
    end,
    config = of "table",
    restore = of "table",
    min = count(0),
    max = count(1),
    burst = count(1),
    idle_timeout = seconds,
    acquire_timeout = seconds,
    restore_on_release = of "boolean",
    warmup = of "function",
}

local function check(cfg)
    local out = {}
    for key, value in pairs(cfg) do
        local test = KEYS[key]
        if not test then
            return nil, ("pool: unknown key '%s'"):format(tostring(key))
        end
        local ok, wanted = test(value)
        if not ok then
            return nil, ("pool: %s: expected %s"):format(key, wanted)
        end
        out[key] = value
    end
    if (out.image == nil) == (out.snapshot == nil) then
        return nil, "pool: needs an image, or a snapshot"
    elseif out.snapshot and (out.warmup or out.config) then
        return nil, "pool: a snapshot is taken as it is: no warmup, no config"
    end
    out.min = out.min or 1
    out.max = out.max or math.max(out.min, 4)
    out.burst = out.burst or 2
    if out.restore_on_release == nil then
        out.restore_on_release = true
    end
    if out.max < out.min then
        return nil, ("pool: max: expected at least min (%d)"):format(out.min)
    end
    return out
end

-- ---------------------------------------------------------------- filling

local function total(self)
    return #self.ready + self.taken + self.making
end

-- How many ready copies there should be: `min`, and one for each who waits.
local function wanted(self)
    return math.min(self.floor + #self.waiting, self.max - self.taken) - #self.ready - self.making
end

local fill

local function forget_ready(self, vm)
    for i, other in ipairs(self.ready) do
        if other == vm then
            table.remove(self.ready, i)
            return true
        end
    end
    return false
end

-- Tell when a VM ends, taken or ready.
local function watch(self, vm)
    loop.spawn(function()
        vm:wait()
        if forget_ready(self, vm) then
            self.counts.died = self.counts.died + 1
            vm:close()
        elseif self.users[vm] then
            self.users[vm] = nil
            self.taken = self.taken - 1
            self.counts.released = self.counts.released + 1
        end
        if not self.closed then
            fill(self)
        end
    end)
end

-- The oldest ready copy, which is its user's from now on: closing it gives it back.
local function lend(self)
    local vm = table.remove(self.ready, 1)
    if vm then
        self.taken = self.taken + 1
        self.users[vm] = true
    end
    return vm
end

-- Hand ready copies to those who wait the longest.
local function serve(self)
    while self.waiting[1] and self.ready[1] do
        table.remove(self.waiting, 1)(lend(self))
    end
end

-- What was lent to somebody who gave up before hearing of it.
local function put_back(self, vm)
    if vm and self.users[vm] and not self.closed then
        self.users[vm] = nil
        self.taken = self.taken - 1
        table.insert(self.ready, 1, vm)
        serve(self)
    end
end

local function trim_idle(self, vm)
    if not self.idle_timeout then
        return
    end
    loop.spawn(function()
        loop.sleep(self.idle_timeout)
        if not self.closed and #self.ready > self.min and forget_ready(self, vm) then
            self.counts.idled = self.counts.idled + 1
            vm:close()
        end
    end)
end

-- The n-th of a measure, in place of the oldest.
local function remember(list, n, value)
    list[(n - 1) % LATENCIES + 1] = value
end

local function make(self)
    local began = loop.now()
    local own = {}
    for key, value in pairs(self.restore or {}) do
        own[key] = value
    end
    local vm, err = require("sm.clone").restore(self.template, own)
    if self.closed and vm then
        vm:close()
    end
    self.making = self.making - 1 -- whoever closes the pool waits for it
    loop.wake(self.makers) -- in their turn, after this one
    if self.closed then
        return
    elseif not vm then
        self.counts.failed = self.counts.failed + 1
        self.failures = self.failures + 1
        self.last_error = err
        -- Whoever waits hears why, rather than waiting for what cannot be.
        if #self.waiting > 0 then
            table.remove(self.waiting, 1)(nil, err)
        end
        loop.sleep(RETRY_SECONDS[math.min(self.failures, #RETRY_SECONDS)])
        if not self.closed then
            fill(self)
        end
        return
    end
    self.failures = 0
    self.counts.made = self.counts.made + 1
    remember(self.make_seconds, self.counts.made, loop.now() - began)
    self.ready[#self.ready + 1] = vm
    watch(self, vm)
    serve(self)
    trim_idle(self, vm)
    fill(self)
end

function fill(self)
    while self.making < self.burst and wanted(self) > 0 and not self.closed do
        self.making = self.making + 1
        loop.spawn(make, self)
    end
end

-- ---------------------------------------------------------------- the API

-- Boot the image, warm it up, save it. Yields.
local function make_template(cfg)
    local sm = require "sm"
    local vm <close>, err = sm.start(cfg.image, cfg.config)
    if not vm then
        return nil, err
    end
    if cfg.warmup then
        local ok, why = cfg.warmup(vm)
        if ok == false or (ok == nil and why) then
            return nil, "pool: warmup: " .. tostring(why or "refused")
        end
    end
    local dir = snapshots.dir()
    local ok
    ok, err = paths.make(dir)
    if not ok then
        return nil, err
    end
    return require("sm.capture").create(vm, {
        path = snapshots.temporary_path(), temporary = true,
    })
end

--- See sm.pool. Returns when `min` copies are ready. Yields.
---@async
---@param cfg table image|snapshot, config, restore, min, max, burst, idle_timeout, acquire_timeout, restore_on_release, warmup
---@return sm.Pool?
---@return string? err
function M.new(cfg)
    local self, err = check(cfg)
    if not self then
        return nil, err
    end
    local template = self.snapshot
    if self.image then
        template, err = make_template(self)
    elseif type(template) == "string" then
        template, err = snapshots.open(template)
    end
    if not template then
        return nil, err
    end
    self.template, self.own_template = template, self.image ~= nil
    self.ready, self.waiting, self.users = {}, {}, {}
    self.makers = {} -- those who wait for a copy to be made, or not to be
    self.taken, self.making, self.failures, self.floor = 0, 0, 0, self.min
    self.make_seconds, self.acquire_seconds = {}, {}
    self.counts = { made = 0, acquired = 0, released = 0, died = 0, failed = 0, idled = 0, timeouts = 0 }
    if self.own_template then
        -- Held for as long as the pool lives, so that nobody tidies it away.
        self.hold = require("sm.lock").try(template.path, { shared = true })
    end
    setmetatable(self, Pool)
    fill(self)
    while #self.ready < self.min do
        if self.failures > 0 then
            err = self.last_error
            self:close()
            return nil, err
        end
        loop.wait_in(self.makers)
    end
    if not self.restore_on_release then
        self.floor = 0
    end
    return self
end

--- A VM that nobody has touched; `vm:close()` (or `<close>`) gives it back.
--- nil, "timeout" after `timeout` seconds (the pool's `acquire_timeout` when
--- absent). Yields.
---@async
---@param timeout number?
---@return sm.VM?
---@return string? err
function Pool:acquire(timeout)
    if self.closed then
        return nil, "pool: closed"
    end
    local began = loop.now()
    local vm, err = lend(self), nil
    if not vm then
        loop.spawn(fill, self) -- once we wait
        vm, err = loop.wait_in(self.waiting, timeout or self.acquire_timeout, function(unclaimed)
            put_back(self, unclaimed)
        end)
        if vm and self.closed then -- and what it had lent is ended
            vm, err = nil, "closed"
        end
    end
    if not vm then
        if err == "timeout" then
            self.counts.timeouts = self.counts.timeouts + 1
        end
        return nil, err == "timeout" and err or "pool: " .. tostring(err)
    end
    self.counts.acquired = self.counts.acquired + 1
    remember(self.acquire_seconds, self.counts.acquired, loop.now() - began)
    fill(self)
    return vm
end

--- Give a VM back before its scope ends; the same as closing it. Yields.
---@async
---@param vm sm.VM
function Pool:release(vm)
    if self.users[vm] then
        vm:close()
    end
end

local function quantiles(list)
    local sorted = table.move(list, 1, #list, 1, {})
    table.sort(sorted)
    local function at(q)
        return sorted[math.max(1, math.ceil(#sorted * q))]
    end
    return { n = #sorted, p50 = at(0.5), p99 = at(0.99), max = sorted[#sorted] }
end

--- Counters: ready, taken, making, waiting; made, acquired, released, died,
--- failed, idled, timeouts; and the seconds of `acquire` and of making a copy as
--- { n, p50, p99, max }.
---@return table
function Pool:stats()
    local out = {
        ready = #self.ready, taken = self.taken, making = self.making, waiting = #self.waiting,
        total = total(self), acquire = quantiles(self.acquire_seconds), make = quantiles(self.make_seconds),
    }
    for key, value in pairs(self.counts) do
        out[key] = value
    end
    return out
end

--- End every copy, those that are taken too. Idempotent. Yields.
---@async
function Pool:close()
    if self.closed then
        return
    end
    self.closed = true
    local all = self.ready
    self.ready = {}
    for vm in pairs(self.users) do
        all[#all + 1] = vm
    end
    for _, settle in ipairs(self.waiting) do
        settle(nil, "closed")
    end
    self.waiting = {}
    for _, vm in ipairs(all) do
        vm:close()
    end
    while self.making > 0 do
        loop.wait_in(self.makers)
    end
    if self.own_template then
        if self.hold then
            self.hold:close()
        end
        snapshots.remove(self.template)
    end
end

Pool.__close = Pool.close

function Pool:__tostring()
    return ("pool (%s)"):format(self.closed and "closed"
        or ("%d ready, %d taken"):format(#self.ready, self.taken))
end

return M
