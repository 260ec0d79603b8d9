-- SPDX-License-Identifier: Apache-2.0
--
-- Who gets a VM of a pool, and when: with stand-ins for the VMs. spec/kvm/pool_spec.lua
-- has real ones.

local loop = require "sm.loop"
local pools = require "sm.pool"

describe("a pool", function()
    local real, alive, most, on_made

    -- What a copy of the template is here; `on_made` is called before the pool has it.
    local function stand_in()
        loop.sleep(0.002)
        local vm = { waiters = {} }
        function vm:wait()
            if not self.ending then
                loop.wait_in(self.waiters)
            end
        end
        function vm:close()
            if not self.ending then
                self.ending = true
                alive = alive - 1
                loop.wake(self.waiters)
            end
        end
        alive = alive + 1
        most = math.max(most, alive)
        if on_made then
            on_made()
        end
        return vm
    end

    before_each(function()
        real, alive, most, on_made = package.loaded["sm.clone"], 0, 0, nil
        package.loaded["sm.clone"] = { restore = stand_in }
    end)

    after_each(function()
        package.loaded["sm.clone"] = real
        assert.equal(0, alive)
    end)

    -- A pool whose only place is taken.
    local function full()
        local pool = assert(pools.new { snapshot = { path = "none" }, min = 1, max = 1 })
        return pool, assert(pool:acquire(1))
    end

    -- A task that waits for that place, and gets the next copy; `meanwhile` runs when it
    -- has been handed over and the task has not gone on.
    local function handed_over(meanwhile)
        local pool, first = full()
        local task = loop.spawn(pool.acquire, pool, 10)
        loop.sleep(0.005)
        on_made = function()
            on_made = nil
            loop.spawn(meanwhile, pool, task)
        end
        first:close()
        return pool, task
    end

    it("serves those who wait in their order, and never has more than its most", function()
        loop.run(function()
            local pool, first = full()
            local order, tasks = {}, {}
            for i = 1, 3 do
                tasks[i] = loop.spawn(function()
                    local vm = assert(pool:acquire(10))
                    order[#order + 1] = i
                    loop.sleep(0.01)
                    vm:close()
                end)
            end
            loop.sleep(0.005)
            assert.equal(3, pool:stats().waiting)
            first:close()
            for _, task in ipairs(tasks) do
                task:join()
            end
            assert.same({ 1, 2, 3 }, order)
            assert.equal(1, most) -- its `max`
            pool:close()
        end)
    end)

    it("keeps what was handed to a task that is cancelled before it goes on", function()
        loop.run(function()
            local pool, task = handed_over(function(_, task)
                task:cancel()
            end)
            loop.sleep(0.02)
            assert.is_true(task:finished())
            local stats = pool:stats()
            assert.same({ 1, 0, 0 }, { stats.ready, stats.taken, stats.waiting })
            assert(pool:acquire(1)):close()
            pool:close()
        end)
    end)

    it("ends what was handed to a task when the pool is closed before that goes on", function()
        loop.run(function()
            local _, task = handed_over(function(pool)
                pool:close()
            end)
            local vm, err = task:join()
            assert.is_nil(vm)
            assert.equal("pool: closed", err)
        end)
    end)
end)
