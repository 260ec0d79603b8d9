-- SPDX-License-Identifier: Apache-2.0
--
-- Many VMs made, run and closed, in process: memory, descriptors and threads
-- stay flat.
--
--   sm spec/soak/lives.lua COUNT

local core = require "sm.core"
local uv = require "luv"

local count = assert(math.tointeger(tonumber((...))))

local function entries(path)
    local n, scan = 0, uv.fs_scandir(path)
    while uv.fs_scandir_next(scan) do
        n = n + 1
    end
    return n
end

local function life()
    local vm <close> = assert(core.vm { memory = "1M", cpus = 2 })
    assert(vm:write(0x1000, "\xba\x00\x07\xec\xeb\xfd")) -- in al, dx for ever
    assert(vm:enter(0, "real16", 0x1000))
    assert(vm:device { space = "pio", base = 0x700, size = 1 })
    assert(vm:add_device { type = "rng" })
    assert(vm:start())
    vm:next_event(10)
    assert(vm:vcpu(0):get { "rip" })
end

for _ = 1, 20 do
    life()
end
collectgarbage()
collectgarbage()
local memory, fds, threads = uv.resident_set_memory(), entries "/proc/self/fd", entries "/proc/self/task"
for _ = 1, count do
    life()
end
collectgarbage()
collectgarbage()
local grown = uv.resident_set_memory() - memory
print(("%d lives: memory %+d KiB, descriptors %+d, threads %+d"):format(count, grown >> 10,
    entries "/proc/self/fd" - fds, entries "/proc/self/task" - threads))
assert(grown < 4 << 20 and entries "/proc/self/fd" == fds and entries "/proc/self/task" == threads)
