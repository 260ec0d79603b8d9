-- SPDX-License-Identifier: Apache-2.0
--
-- Why a VM ended: told, not guessed.

local sm = require "sm"
local spec = require "support.vm"

local function ending_of(script, cfg)
    local vm <close> = assert(sm.start(spec.image "one", cfg))
    local p = assert(vm:spawn { argv = { "/bin/sh", "-c", script }, main = true })
    sm.loop.spawn(function()
        while p:read "stdout" do
        end
    end)
    return assert(vm:wait(120))
end

describe("vm:wait", function()
    after_each(function()
        assert.same({}, spec.leftovers())
    end)

    it("says exited with the main command's code", function()
        local e = ending_of "exit 42"
        assert.equal("exited", e.reason)
        assert.equal(42, e.code)
    end)

    it("says panic when the kernel panics", function()
        assert.equal("panic", ending_of("echo c > /proc/sysrq-trigger; sleep 100").reason)
    end)

    it("says reboot when the guest reboots", function()
        assert.equal("reboot", ending_of("echo b > /proc/sysrq-trigger; sleep 100").reason)
    end)

    it("says poweroff when the guest powers off", function()
        assert.equal("poweroff", ending_of("echo o > /proc/sysrq-trigger; sleep 100").reason)
    end)

    it("says killed when we pull the plug, whatever the guest does", function()
        local vm <close> = assert(sm.start(spec.image "one"))
        assert.equal("killed", vm:kill().reason)
    end)

    it("says crash when the worker dies", function()
        local vm <close> = assert(sm.start(spec.image "one"))
        os.execute("kill -9 " .. vm.parts.worker:pid())
        assert.equal("crash", assert(vm:wait(30)).reason)
    end)
end)
