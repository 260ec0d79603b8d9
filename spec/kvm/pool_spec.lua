-- SPDX-License-Identifier: Apache-2.0
--
-- A pool of real VMs: one template, every user gets a copy nobody has touched.

local sm = require "sm"
local spec = require "support.vm"
local uv = require "luv"

local loop = sm.loop

describe("a pool", function()
    local pool, warmed

    local function sh(vm, script)
        local r = assert(vm:exec { argv = { "/bin/sh", "-c", script } })
        assert.equal(0, r.status, r.stderr)
        return r.stdout
    end

    local function settled(what)
        local deadline = loop.now() + 120
        while not what() do
            assert(loop.now() < deadline, "not settled: " .. require("sm.json").encode(pool:stats()))
            loop.sleep(0.02)
        end
    end

    setup(function()
        pool = assert(sm.pool {
            image = spec.image "one", config = { memory = "128M" }, min = 1, max = 2,
            warmup = function(vm)
                warmed = sh(vm, "head -c 16 /dev/urandom | od -An -tx1 > /dev/shm/warm; cat /dev/shm/warm")
            end,
        })
    end)

    teardown(function()
        pool:close()
        assert.same({}, spec.settled_leftovers())
    end)

    it("hands out copies of the warm template that nobody has touched", function()
        local names = {}
        for _ = 1, 3 do
            local vm <close> = assert(pool:acquire(120))
            assert.equal(warmed, sh(vm, "cat /dev/shm/warm"))
            assert.equal("", sh(vm, "ls /dev/shm /root | grep mark || true"))
            sh(vm, "touch /dev/shm/mark /root/mark")
            assert.is_nil(names[vm.id])
            names[vm.id] = true
        end
        settled(function() return pool:stats().released == 3 end)
        assert.equal(3, pool:stats().acquired)
    end)

    it("lets one wait its turn, and says when the time is over", function()
        local a, b = assert(pool:acquire(120)), assert(pool:acquire(120))
        local none, err = pool:acquire(0.05)
        assert.is_nil(none)
        assert.equal("timeout", err)
        local waiting = loop.spawn(function() return pool:acquire(120) end)
        a:close()
        local c = assert(waiting:join())
        assert.equal(warmed, sh(c, "cat /dev/shm/warm"))
        b:close()
        pool:release(c)
        settled(function() return pool:stats().taken == 0 end)
    end)

    it("is kept by a process of its own for the command line", function()
        local name = ("pool%d"):format(uv.os_getpid())
        local function ok(tail, stdin)
            local code, out, err = spec.sm(tail, stdin)
            assert(code == 0, ("sm %s: %d\n%s%s"):format(tail, code, out, err))
            return out
        end
        assert.equal(name .. "\n", ok(("pool start -m 128M --max 2 --warmup 'echo warm > /dev/shm/w' %s %s"):format(name,
            spec.image "one")))
        local _ <close> = setmetatable({}, { __close = function()
            spec.sm("pool stop " .. name)
        end })
        assert.matches(name .. " .* 2 ", ok "pool ls")
        assert.equal("warm\n", ok(("pool run %s cat /dev/shm/w"):format(name)))
        local code, out = spec.sm(("pool run -e A=b %s sh -c 'echo $A; test -e /root/mark && echo seen; touch /root/mark; exit 3'")
            :format(name))
        assert.equal(3, code)
        assert.equal("b\n", out)
        assert.equal("", ok(("pool run %s sh -c 'ls /root | grep mark || true'"):format(name)))
        assert.matches("acquired +3\n", ok("pool stats " .. name))
        local failed, err
        failed, out, err = spec.sm(("pool start %s %s"):format(name, spec.image "one"))
        assert.equal(125, failed)
        assert.matches("is running already", err)
        -- From Lua, by a client that ends without giving back.
        do
            local taken <close> = assert(sm.attach_pool(name))
            assert(assert(taken:acquire(120)):exec { argv = { "true" } })
        end
        settled(function()
            local other <close> = assert(sm.attach_pool(name))
            return other:stats().taken == 0
        end)
        assert.equal(name .. "\n", ok("pool stop " .. name))
        code, out, err = spec.sm(("pool run %s true"):format(name))
        assert.equal(125, code)
        assert.matches("no pool named", err)
        code, out, err = spec.sm(("pool start --warmup 'exit 9' %s %s"):format(name, spec.image "one"))
        assert.equal(125, code)
        assert.matches("ended with 9", err)
    end)

    it("replaces a ready copy whose worker dies", function()
        settled(function() return pool:stats().ready == 1 end)
        local doomed = pool.ready[1]
        uv.kill(doomed.parts.worker:pid(), "sigkill")
        settled(function() return pool:stats().died == 1 and pool:stats().ready == 1 end)
        local vm <close> = assert(pool:acquire(120))
        assert.not_equal(doomed.id, vm.id)
        assert.equal(warmed, sh(vm, "cat /dev/shm/warm"))
    end)
end)
