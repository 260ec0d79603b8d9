-- SPDX-License-Identifier: Apache-2.0
-- A fault campaign against a file system: a VM writes files to its disk while
-- some of the disk's writes fail, by a seed; then what the guest's kernel made
-- of it. The same seed draws the same faults for the same requests.
--
--   sm scripts/examples/faults.lua IMAGE [SEED…]

local sm = require "sm"

local image = ...
local seeds = { select(2, ...) }
if #seeds == 0 then
    seeds = { "1", "2", "3" }
end

-- blk0 is the image, read only; blk1 the disk that is written.
local SCRATCH = 1

local WORK = [[
for i in 1 2 3 4 5 6 7 8; do
    dd if=/dev/zero of=/fault$i bs=64k count=4 conv=fsync 2>/dev/null || echo "file $i: failed"
done
touch /after 2>/dev/null && echo "still writable" || echo "read-only now"
]]

local function campaign(seed)
    local vm <close> = assert(sm.start(image, { memory = "128M", boot_timeout = 600 }))
    local machine = vm:machine()
    local rule = assert(machine:add_fault {
        disk = SCRATCH, action = "fail", operation = "write",
        skip = 8, probability = 0.3, seed = math.tointeger(seed),
    })
    local failed = {}
    vm:on_event(function(event)
        if event.type == "trace" and event.fault then
            failed[#failed + 1] = ("%d+%d"):format(event.sector, event.size)
        end
    end)
    assert(machine:trace { requests = true })
    local result = assert(vm:exec { argv = { "sh", "-c", WORK }, timeout = 300 })
    assert(machine:trace {})
    local hits, matched = 0, 0
    for _, fault in ipairs(assert(machine:faults())) do
        if fault.disk == SCRATCH and fault.fault == rule then
            hits, matched = fault.hits, fault.matched
        end
    end
    print(("seed %s: %d of %d writes failed (sectors %s)"):format(seed, hits, matched, table.concat(failed, " ")))
    for line in result.stdout:gmatch "[^\n]+" do
        print("  the guest: " .. line)
    end
end

for _, seed in ipairs(seeds) do
    campaign(seed)
end
