-- SPDX-License-Identifier: Apache-2.0
--
-- What one access of a guest costs: to a port that C answers (the serial port's
-- scratch register), and to one that a Lua handler answers, in process. The
-- guest reads the port N times and resets; nanoseconds are instructions in the
-- counting lab, where the fixed cost of a VM is taken off by measuring a guest
-- that reads hardly at all.
--
--   sm spec/bench/access.lua [N]

local core = require "sm.core"
local uv = require "luv"

local N = math.tointeger(tonumber((...) or 2000))

-- mov dx, port; mov cx, n; again: in al, dx; loop again; reset
local function program(port, n)
    return "\xba" .. string.pack("<I2", port) .. "\xb9" .. string.pack("<I2", n) .. "\xec\xe2\xfd"
        .. "\xba\x02\x06\xb0\x01\xee\xf4"
end

-- Nanoseconds from start to the guest's end, and the exits it took.
local function run(n, lua)
    local vm <close> = assert(core.vm { memory = "64K" })
    assert(vm:add_device { type = "serial" })
    assert(vm:write(0x1000, program(lua and 0x700 or 0x3ff, n)))
    assert(vm:enter(0, "real16", 0x1000))
    if lua then
        assert(vm:device { space = "pio", base = 0x700, size = 1, read = function() return 1 end })
    end
    local begun = uv.hrtime()
    assert(vm:start())
    local event
    repeat
        event = assert(vm:next_event(600))
    until event.state == "stopped"
    return uv.hrtime() - begun, vm:stats().vcpus[1].exits
end

local function cost(lua)
    run(10, lua) -- warm up
    local base, few = run(10, lua)
    local all, many = run(N, lua)
    return (all - base) / (many - few)
end

local by_c, by_lua = cost(false), cost(true)
print(("%-34s %12s %12s"):format("one access of a guest", "ns", "a second"))
print(("%-34s %12.0f %12.0f"):format("answered in C", by_c, 1e9 / by_c))
print(("%-34s %12.0f %12.0f"):format("answered by a Lua handler", by_lua, 1e9 / by_lua))
print(("%-34s %12.0f %12.1f"):format("the handler's part, and ratio", by_lua - by_c, by_lua / by_c))
