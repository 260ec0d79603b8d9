-- SPDX-License-Identifier: Apache-2.0
--
-- For the host programs: product VMs, booted and used, with a driver's table.
--     (number, reference, seconds?, vms?) → { pollfd, timeout, step, done }
-- With `seconds` each VM is used for so long, again and again.

local reference, seconds, vms = select(2, ...)
local sm = require "sm"
local loop = sm.loop

local finished = 0
local wanted = tonumber(vms or 1)

local function use(vm, round)
    local text = ("inside %d"):format(round)
    local r = assert(vm:exec { argv = { "cat" }, stdin = text })
    assert(r.status == 0 and r.stdout == text, r.stdout)
    assert(vm:write_file("/tmp/f", text))
    assert(vm:read_file "/tmp/f" == text)
end

for _ = 1, wanted do
    loop.spawn(function()
        local vm <close> = assert(sm.start(reference, { boot_timeout = 300, memory = "128M" }))
        local ends, round = loop.now() + tonumber(seconds or 0), 0
        repeat
            round = round + 1
            use(vm, round)
        until loop.now() >= ends
        vm:close()
        finished = finished + 1
    end)
end

return { pollfd = loop.pollfd, timeout = loop.timeout, step = loop.step, done = function()
    return finished == wanted
end }
