-- SPDX-License-Identifier: Apache-2.0
-- The contract of sm.core's VMs on KVM: the same programs as on the fake
-- backend (spec/lua/core_spec.lua), and Linux booted with primitives alone.

local contract = require "support.core_contract"
local core = require "sm.core"
local kernel = require "sm.kernel"
local loop = require "sm.loop"
local worker = require "sm.worker"

describe("the build under test", function()
    it("runs on KVM", function()
        assert.equal("kvm", assert(core.probe()).backend)
    end)
end)

for _, target in ipairs(contract.targets) do
    contract.describe(target, _ENV)
end

describe("Linux, from Lua with primitives alone", function()
    -- With no root to mount the kernel panics, and says so through pvpanic.
    it("boots until it finds no root, in a confined worker", function()
        local found = assert(kernel.find())
        local vm <close> = assert(worker.vm { memory = "128M", name = "boot" })
        assert(vm:add_device { type = "serial" })
        assert(vm:load_kernel { kernel = found.path, cmdline = "console=ttyS0 panic=-1" })
        assert(vm:start())
        local text, ending = "", nil
        local deadline = loop.now() + 120
        while not ending do
            local event = assert(vm:next_event(deadline - loop.now()))
            if event.type == "console" then
                text = text .. vm:read_console()
            elseif event.state == "stopped" then
                ending = event.reason
            end
        end
        text = text .. vm:read_console()
        assert.matches("Linux version", text)
        assert.matches("Unable to mount root fs", text)
        -- the stock kernel has pvpanic as a module, which nobody loaded here
        assert.equal(found.source == "own" and "panic" or "reboot", ending)
        local how = vm:stats().confinement
        assert.is_true(how.no_new_privs)
        -- what a sanitizer's runtime does is not on our list of system calls
        local san = os.getenv "SM_SPEC_SANITIZER"
        assert.equal(san ~= "asan" and san ~= "tsan", how.seccomp)
    end)
end)
