-- SPDX-License-Identifier: Apache-2.0
-- A bare-metal guest in twenty lines: sixteen-bit code that writes to a port,
-- a port that belongs to Lua, and nothing else. Needs no kernel and no image.
--
--   sm scripts/examples/bare-metal.lua

local core = require "sm.core"

local code = { "\xba\x00\x07" } -- mov dx, 0x700
for byte in ("hello from ring 0\n"):gmatch "." do
    code[#code + 1] = "\xb0" .. byte .. "\xee" -- mov al, byte; out dx, al
end
code[#code + 1] = "\xba\x02\x06\xb0\x01\xee\xf4" -- out 0x602, 1: reset; hlt

local vm <close> = assert(core.vm { memory = "64K" })
assert(vm:write(0x1000, table.concat(code)))
assert(vm:enter(0, "real16", 0x1000))
assert(vm:device {
    space = "pio", base = 0x700, size = 1,
    write = function(_, value) io.write(string.char(value)) end,
})
assert(vm:start())
local event
repeat
    event = assert(vm:next_event(60))
until event.state == "stopped"
print("the guest ended: " .. event.reason)
