-- SPDX-License-Identifier: Apache-2.0
--
-- What a copy's programs see of the time that has passed: nothing of it on the
-- monotonic clock, all of it on the wall clock, and from their first instruction on.

local sm = require "sm"
local shell = require "support.shell"
local spec = require "support.vm"
local uv = require "luv"

local loop = sm.loop
local HOUR = 3600
local STALL = 8

describe("a copy, an hour later", function()
    local vm, dir, moved

    local function sh(where, script)
        local r = assert(where:exec { argv = { "/bin/sh", "-c", script } })
        assert.equal(0, r.status, r.stderr)
        return r.stdout
    end

    local function host_seconds()
        return (uv.gettimeofday())
    end

    -- The host's clock in the lab, whose machine is ours.
    local function move_host(seconds)
        shell.run(("date -s @%d"):format(host_seconds() + seconds))
        moved = moved + seconds
    end

    -- Every turn of the loop in the guest: its uptime and wall clock, in seconds.
    local function turns(where)
        local list = {}
        for up, wall in sh(where, "cat /dev/shm/turns"):gmatch "([%d.]+) (%d+)\n" do
            list[#list + 1] = { up = tonumber(up), wall = tonumber(wall) }
        end
        return list
    end

    -- A copy whose agent hears of nothing for a while after it runs.
    local function late_restore(path)
        local machine = require "sm.machine"
        local start = machine.restore
        machine.restore = function(...)
            local parts, err = start(...)
            if parts then
                assert(parts.worker:vsock_fault "stall")
                loop.spawn(function()
                    loop.sleep(STALL)
                    parts.worker:vsock_fault "go"
                end)
            end
            return parts, err
        end
        local copy, err = sm.restore(path)
        machine.restore = start
        return copy, err
    end

    -- How long the loop ran on in its source's time, by its own monotonic clock: from
    -- shortly before the machine was saved to its last turn with the old wall clock.
    local function restored(frozen)
        local path = ("%s/%s.sms"):format(dir, frozen and "frozen" or "running")
        if not frozen then
            vm.parts.agent.hello.version = 1 -- an agent that cannot
        end
        local ours = os.getenv "SM_LAB_DISK" -- this kernel is the lab's, its clock ours to move
        if not ours then
            vm.parts.agent:set_clock((host_seconds() - HOUR) * 1000000000)
        end
        local then_up = tonumber(sh(vm, "cut -d' ' -f1 /proc/uptime"))
        local made = assert(vm:snapshot { path = path })
        assert.equal(frozen, made.frozen)
        if ours then
            move_host(HOUR)
        end
        local copy = assert(late_restore(path))
        sh(copy, "n=$(wc -l < /dev/shm/turns); while [ $(wc -l < /dev/shm/turns) -lt $((n+20)) ]; do sleep 0.05; done")
        local list, last, jumps = turns(copy), nil, 0
        for i = 2, #list do
            if list[i].wall - list[i - 1].wall > HOUR / 2 then
                last, jumps = list[i - 1].up, jumps + 1
            end
        end
        assert.equal(1, jumps, "how often an hour passed")
        return copy, last - then_up
    end

    setup(function()
        moved, dir = 0, shell.tmpdir()
        vm = assert(sm.start(assert(sm.image(spec.image "one")), { memory = "128M" }))
        sh(vm, [[
            (while :; do read up _ < /proc/uptime; echo "$up $(date +%s)" >> /dev/shm/turns; done) >/dev/null 2>&1 </dev/null &
            (while :; do sleep 0.2; echo >> /dev/shm/ticks; done) >/dev/null 2>&1 </dev/null &
            while ! test -s /dev/shm/ticks; do sleep 0.1; done
        ]])
    end)

    teardown(function()
        if vm then
            vm:close()
        end
        if moved ~= 0 then
            move_host(-moved)
        end
        shell.remove(dir)
        assert.same({}, spec.settled_leftovers())
    end)

    it("shows its programs the right time from their first instruction on", function()
        local copy, late = restored(true)
        local _ <close> = copy
        assert.is_true(late < STALL / 2, ("ran on for %.2f s"):format(late))
        -- A certificate that has been valid for half an hour.
        assert.equal("valid\n", sh(copy, ("test $(date +%%s) -ge %d && echo valid"):format(host_seconds() - HOUR // 2)))
        -- Timers come due at their pace, none of them an hour's worth at once.
        local a, n, b, m = sh(copy, "cut -d' ' -f1 /proc/uptime; wc -l < /dev/shm/ticks; sleep 3; "
            .. "cut -d' ' -f1 /proc/uptime; wc -l < /dev/shm/ticks"):match "([%d.]+)%s+(%d+)%s+([%d.]+)%s+(%d+)"
        local ticks = tonumber(m) - tonumber(n)
        assert.is_true(ticks >= 1 and ticks <= (tonumber(b) - tonumber(a)) / 0.2 + 2, ticks)
        assert.is_true(tonumber(b) < HOUR / 2) -- the monotonic clock stood still
    end)

    it("lets the source go on at once", function()
        local list = turns(vm)
        sh(vm, ("while [ $(wc -l < /dev/shm/turns) -lt %d ]; do sleep 0.05; done"):format(#list + 20))
    end)

    it("tells how it would be without: programs that run in the past", function()
        local copy, late = restored(false)
        local _ <close> = copy
        assert.is_true(late > STALL / 2, ("ran on for %.2f s"):format(late))
    end)
end)
