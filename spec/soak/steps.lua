-- SPDX-License-Identifier: Apache-2.0
--
-- Many single steps: two instructions over and over, one at a time. Every step
-- must come back, at one of the two; how many traps the hardware lost (two
-- instructions at once) is told.
--
--   sm spec/soak/steps.lua COUNT

local core = require "sm.core"

local count = assert(math.tointeger(tonumber((...))))
local vm <close> = assert(core.vm { memory = "64K" })
assert(vm:write(0x1000, "\x40\xeb\xfd")) -- inc ax; jmp back
assert(vm:enter(0, "real16", 0x1000))
local cpu = vm:vcpu(0)
assert(cpu:hold())
assert(vm:start())
local pc, lost = 0x1000, 0
for n = 1, count do
    assert(cpu:step())
    local event
    repeat
        event = assert(vm:next_event(60))
    until event.type == "exit"
    assert(event.reason == "step" and (event.pc == 0x1000 or event.pc == 0x1001), ("step %d"):format(n))
    lost = lost + (event.pc == pc and 1 or 0)
    pc = event.pc
end
print(("%d steps, %d traps lost by the hardware"):format(count, lost))
assert(lost * 100 <= count, "more than one trap of a hundred was lost")
