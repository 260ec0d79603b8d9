-- SPDX-License-Identifier: Apache-2.0
--
-- How long a 512 MiB machine stands still while it is saved, whole, copied while it
-- runs, and as a diff, with 128 MiB of its memory full of random bytes and a program
-- that goes on writing; then what ten forks take.
--
--   sm spec/bench/pause.lua IMAGE

local sm = require "sm"

local dir = os.getenv "SM_LAB_DISK" or os.getenv "XDG_DATA_HOME" -- a disk of this kernel
local MEMORY = 512 << 20
local vm <close> = assert(sm.start(..., { memory = MEMORY }))

local function sh(script)
    return assert(vm:exec { argv = { "sh", "-c", script } })
end

sh [[dd if=/dev/urandom of=/dev/shm/ballast bs=1M count=128
    (while :; do dd if=/dev/urandom of=/dev/shm/scratch bs=4k count=64; done) >/dev/null 2>&1 </dev/null &]]

local made = {}
local function save(what, opts)
    opts.path = ("%s/pause-%d.sms"):format(dir, #made + 1)
    local began = sm.loop.now()
    local s = assert(vm:snapshot(opts))
    made[#made + 1] = s
    print(("%-44s %9.1f ms  of %9.1f ms, %7.1f MiB"):format(what, s.pause * 1000, (sm.loop.now() - began) * 1000,
        s.stored / (1 << 20)))
    return s.pause
end

print(("%-44s %12s"):format("a 512 MiB machine saved", "stands still"))
local whole = save("whole", {})
local live = save("copied while it runs", { live = true })
save("the first of a chain: whole", { diff = true })
sm.loop.sleep(1)
local diff = save("a diff, a second later", { diff = true })
save("a diff, at once, copied while it runs", { diff = true, live = true })
print(("live / whole %.3f, diff / whole %.3f"):format(live / whole, diff / whole))

local began = sm.loop.now()
local kids = assert(vm:fork(10))
print(("%-44s %9.1f ms"):format("ten forks, each of them answers", (sm.loop.now() - began) * 1000))
for _, kid in ipairs(kids) do
    kid:close()
end
for i = #made, 1, -1 do
    assert(sm.snapshot.remove(made[i]))
end
