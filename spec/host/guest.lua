-- SPDX-License-Identifier: Apache-2.0
--
-- For the host programs: a product VM, booted and used, with a driver's table.
--     (number, reference) → { pollfd, timeout, step, done }

local reference = select(2, ...)
local sm = require "sm"
local loop = sm.loop

local finished
loop.spawn(function()
    local vm <close> = assert(sm.start(reference, { boot_timeout = 300 }))
    local r = assert(vm:exec { argv = { "cat" }, stdin = "inside" })
    assert(r.status == 0 and r.stdout == "inside", r.stdout)
    assert(vm:write_file("/tmp/f", "data"))
    assert(vm:read_file "/tmp/f" == "data")
    vm:close()
    finished = true
end)

return { pollfd = loop.pollfd, timeout = loop.timeout, step = loop.step, done = function()
    return finished
end }
