-- SPDX-License-Identifier: Apache-2.0
--
-- Restores that other VMMs got wrong. What the catalogue of their bugs comes to here:
--
--   deadline timers lost or early (MSR order, a deadline of 0), stale CPUID in the second
--   generation, a TSC that KVM ignores or that vCPUs do not share, large XSAVE areas,
--   another frequency, what reading the MP state changes
--                                                   spec/unit/kvm_state_test.c
--   the same, paravirtual MSRs and clocks, lost kicks, disk requests in flight, I/O
--   that never completes, vsock streams that hang   the cycles below, under load; also
--                                                   with 1 to 8 vCPUs in the soak
--   a save before the guest has set its interrupts up   "in the middle of its boot"
--   the second snapshot of a lazily restored VM loses pages, or is written onto the
--   file it runs from                                spec/unit/snap_test.c, snap_chain_test.c
--   clocks that jump, or stay behind                 snapshot_clock_spec.lua
--   twins (generation id, randomness, identity)      snapshot_spec.lua
--   TCP connections of the source that a copy waits on   net_restore_spec.lua
--
-- Asynchronous page faults are not offered to guests, tap networks are not copied and
-- memory is not restored by userfaultfd, so that their bugs cannot be had.

local machine = require "sm.machine"
local config = require "sm.config"
local sm = require "sm"
local shell = require "support.shell"
local spec = require "support.vm"
local uv = require "luv"

local GENERATION_ID = 0xff000 -- its address, core/boot.h

describe("a restored VM", function()
    local dir

    setup(function()
        dir = shell.tmpdir()
    end)

    teardown(function()
        shell.run("rm -rf " .. dir)
        assert.same({}, spec.settled_leftovers())
    end)

    it("goes on wherever in the middle of its boot it was saved", function()
        local image <close> = assert(sm.image(spec.image "one"))
        local cfg = assert(config.check { memory = "64M", disk = "64M", net = "none" })
        for i, seconds in ipairs { 0, 0.3, 1 } do
            local path, saved = ("%s/boot%d.sms"):format(dir, i), nil
            do
                local parts = assert(machine.start(image, cfg, {}))
                local _ <close> = setmetatable({}, { __close = function() machine.stop(parts) end })
                sm.loop.sleep(seconds)
                assert(parts.worker:call("vm.pause", {}))
                assert(parts.worker:call("snapshot.save", { path = path, sync = false }))
                saved = { cpus = cfg.cpus, devices = parts.devices, cfg = cfg }
            end
            local parts = assert(machine.restore({ path }, saved, image,
                setmetatable(assert(config.check_restore {}), { __index = cfg }), {}))
            local _ <close> = setmetatable({}, { __close = function() machine.stop(parts) end })
            local agent <close> = assert(machine.await_agent(parts, 120))
            assert(agent:boot { root = "scratch", hostname = "late", hosts = "" }, seconds)
            assert.equal("late\n", assert(agent:exec { argv = { "hostname" } }).stdout)
        end
    end)

    -- What must differ between two copies of one file, by name.
    local function traits(copy)
        local r = assert(copy:exec { argv = { "sh", "-c",
            "head -c 32 /dev/urandom | od -An -tx1; sha256sum < /dev/shm/seed; cat /etc/machine-id; hostname" } })
        local random, csprng, id, host = r.stdout:match "^(.-)\n(%x+)  %-\n(%x+)\n(%g+)\n$"
        return {
            ["generation id"] = assert(copy:machine():read(GENERATION_ID, 16)), getrandom = random,
            ["generator seeded by a hook"] = csprng, ["machine-id"] = id, hostname = host,
        }
    end

    for _, kernel in ipairs { "own", "stock" } do -- Debian's has no driver for generation ids
        it("is no twin, with the " .. kernel .. " kernel", function()
            local path = ("%s/%s.sms"):format(dir, kernel)
            local before
            do
                local vm <close> = assert(sm.start(spec.image "one", { memory = "192M", disk = "64M", kernel = kernel }))
                assert(vm:exec { argv = { "sh", "-c", "echo 0123456789abcdef0123456789abcdef > /etc/machine-id; echo 1 > /dev/shm/seed" } })
                before = traits(vm)
                assert(vm:snapshot { path = path })
            end
            local seed = { after = { "sh", "-c", "head -c 16 /dev/urandom > /dev/shm/seed" } }
            local a <close> = assert(sm.restore(path, seed))
            local b <close> = assert(sm.restore(path, seed))
            local ta, tb = traits(a), traits(b)
            for name, value in pairs(before) do
                assert.is_string(ta[name], name)
                assert.not_equal(value, ta[name], name)
                assert.not_equal(value, tb[name], name)
                assert.not_equal(ta[name], tb[name], name)
            end
        end)
    end

    it("has its disk's blocks in common with its source, where the file system can", function()
        local disk = os.getenv "SM_LAB_DISK"
        if not disk then
            return pending "only where there is a file system that can: the lab's xfs"
        end
        local home = os.getenv "XDG_DATA_HOME"
        uv.os_setenv("XDG_DATA_HOME", dir .. "/home")
        local _ <close> = setmetatable({}, { __close = function()
            uv.os_setenv("XDG_DATA_HOME", home)
        end })
        local path, sum = dir .. "/shared.sms", nil
        do
            local vm <close> = assert(sm.start(spec.image "one", { memory = "96M", disk = "64M" }))
            sum = assert(vm:exec { argv = { "sh", "-c",
                "dd if=/dev/urandom of=/root/x bs=1M count=8 2>/dev/null; sync; sha256sum < /root/x" } }).stdout
            assert(vm:snapshot { path = path })
            assert.matches("shared", shell.run("filefrag -v " .. path))
            assert(vm:exec { argv = { "sh", "-c", "dd if=/dev/zero of=/root/x bs=1M count=8 conv=notrunc 2>/dev/null; sync" } })
        end
        assert.is_true(sm.snapshot.verify(path))
        local copy <close> = assert(sm.restore(path))
        local r = assert(copy:exec { argv = { "sh", "-c", "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /root/x" } })
        assert.equal(sum, r.stdout)
    end)

    it("goes on under load, cycle after cycle, each a copy of the last", function()
        local code, out, err = spec.sm(("spec/soak/snapshot.lua %s 2 5"):format(spec.image "one"))
        assert.equal(0, code, out .. err)
        assert.matches("cycle 5 of 5", out)
    end)
end)
