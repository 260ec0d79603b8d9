-- SPDX-License-Identifier: Apache-2.0
--
-- Faults on demand, on a guest that is at work.

local loop = require "sm.loop"
local machine = require "sm.machine"
local sm = require "sm"
local spec = require "support.vm"

local function start()
    return assert(sm.start(assert(sm.image(spec.image "one")), { memory = "160M", boot_timeout = 600 }))
end

local function sh(vm, script)
    local r = assert(vm:exec { argv = { "/bin/sh", "-c", script }, timeout = 300 })
    assert.equal(0, r.status, r.stderr)
    return r.stdout
end

describe("a fault of vsock, on a live stream:", function()
    it("a stall holds it, and lets it go on whole", function()
        local vm <close> = start()
        local bytes = 8 << 20
        local p = assert(vm:spawn { argv = { "/bin/sh", "-c",
            ("dd if=/dev/zero bs=64k count=%d 2>/dev/null | tr '\\0' x"):format(bytes >> 16) } })
        local got = #assert(p:read())
        assert(vm:machine():vsock_fault "stall")
        -- What was on its way arrives; then nothing does, for as long as we look.
        local reader = loop.spawn(function()
            for chunk in function() return p:read() end do
                assert(not chunk:find "[^x]")
                got = got + #chunk
            end
        end)
        local before
        repeat
            before = got
            loop.sleep(1)
        until got == before
        loop.sleep(1)
        assert.equal(before, got)
        assert.is_true(got < bytes)
        assert(vm:machine():vsock_fault "go")
        reader:join()
        assert.equal(bytes, got)
        assert.equal(0, p:wait(60).status)
    end)

    it("a reset ends it at once on both sides, and the agent dials anew", function()
        local vm <close> = start()
        -- The VM must not take the loss for its end: it is ours.
        local before = vm.parts.agent
        before.on_error = nil
        local p = assert(vm:spawn { argv = { "/bin/sh", "-c", "while ! test -e /tmp/go; do sleep 0.1; done; echo on > /tmp/told" } })
        assert.is_true(vm:machine():vsock_fault "reset" >= 1)
        local ended, why = p:wait(60)
        assert.is_nil(ended)
        assert.matches("connection lost", why)
        local again = assert(machine.await_agent(vm.parts, 120))
        assert.equal(before.hello.generation + 1, again.hello.generation)
        vm.parts.agent = again
        sh(vm, "touch /tmp/go; while test -e /proc/" .. p.pid .. "; do sleep 0.1; done")
        assert.equal("on\n", sh(vm, "cat /tmp/told"))
    end)
end)

describe("a fault of the clock", function()
    it("makes the guest's time stand still, and go on from there", function()
        local vm <close> = start()
        local function uptime()
            return tonumber(sh(vm, "cut -d' ' -f1 /proc/uptime"))
        end
        sh(vm, "test $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource) = kvm-clock")
        local function span(seconds) -- guest seconds while so many go by here
            local host, guest = loop.now(), uptime()
            while loop.now() - host < seconds do
                loop.sleep(0.1)
            end
            return uptime() - guest, loop.now() - host
        end
        local before = uptime()
        assert(vm:machine():clock_fault "stop")
        local guest, host = span(6)
        assert.is_true(guest < host / 3, ("%g s of %g s"):format(guest, host))
        -- It goes to and fro, so a reading can be behind an earlier one, but never behind the stop.
        local now = uptime()
        assert.is_true(now >= before, ("%g s, stopped after %g s"):format(now, before))
        assert(vm:machine():clock_fault "go")
        guest, host = span(3)
        assert.is_true(guest > host / 2, ("%g s of %g s"):format(guest, host))
    end)
end)

describe("a fault by a seed", function()
    -- What becomes of a guest's reads of a disk, one request at a time, where its file
    -- system has nothing; elsewhere ext4 reads when it likes, long after the mount.
    local FIRST = (1 << 30) // 512
    local LAST = FIRST + 255
    local function trace(seed)
        local vm <close> = start()
        assert(vm:machine():add_fault { disk = 1, action = "fail", operation = "read", first = FIRST, last = LAST,
            probability = 0.4, seed = seed })
        local records = {}
        vm:on_event(function(event)
            if event.type == "trace" and event.device == "blk1" and event.sector >= FIRST
                and event.sector <= LAST then
                records[#records + 1] = ("%s %d+%d%s"):format(event.what, event.sector, event.size, event.fault and " failed" or "")
            end
        end)
        assert(vm:machine():trace { requests = true })
        local out = sh(vm, [[
            for at in 3 1 4 1 5 9 2 6 5 3 5 8 9 7 9 3 2 3 8 4 6; do
                dd if=/dev/vdb iflag=direct bs=4k skip=$((262144 + at)) count=1 of=/dev/null 2>/dev/null && echo $at || echo $at failed
            done]])
        assert(vm:machine():trace {})
        vm:on_event(nil)
        assert.matches("failed", out)
        assert.matches("%d\n", out)
        return out, table.concat(records, "\n")
    end

    it("is the same twice, and another with another seed", function()
        local out, records = trace(7)
        local out2, records2 = trace(7)
        assert.equal(records, records2)
        assert.equal(out, out2)
        assert.matches(" failed", records)
        assert.not_equal(out, (trace(8)))
    end)
end)
