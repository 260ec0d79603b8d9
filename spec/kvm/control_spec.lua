-- SPDX-License-Identifier: Apache-2.0
-- Run control and devices in Lua on KVM. What debugging a machine's KVM has is
-- found out first and said: under nested emulation INT3 and debug registers
-- never leave the guest, single steps do.

local asm = require "support.real16"
local contract = require "support.control_contract"

local core = contract.core

-- The program comes to 0x1004 and writes 0x2000 again and again; whether that
-- is told within a moment. A guest that runs at all is there in microseconds.
local function try(kind)
    local vm <close> = assert(core.vm { memory = "64K" })
    assert(vm:write(0x1000, asm.ax(0) .. asm.count(0x2000)))
    assert(vm:enter(0, "real16", 0x1000))
    assert(vm:add_breakpoint { address = kind == "watch" and 0x2000 or 0x1004, kind = kind })
    assert(vm:start())
    local seen = 0
    while seen < 20000 do -- of the guest's own loops, so that a slow machine has its time
        local event = vm:next_event(0.1)
        if event and event.type == "exit" then
            return true
        elseif event and event.state == "stopped" then
            return false
        end
        seen = string.unpack("<I2", assert(vm:read(0x2000, 2)))
    end
    return false
end

local works = {}
for _, kind in ipairs { "hardware", "software", "watch" } do
    works[kind] = try(kind)
end

describe("this machine's KVM", function()
    it("has said what debugging it can do", function()
        for _, kind in ipairs { "hardware", "software", "watch" } do
            print(("    %s breakpoints: %s"):format(kind, works[kind] and "yes" or "not here"))
        end
        assert.equal("kvm", assert(core.probe()).backend)
    end)
end)

for _, target in ipairs(contract.targets) do
    target.cycles, target.loses_steps = 10, true
    contract.describe(target, _ENV, function(_, kind)
        return works[kind]
    end)
end
