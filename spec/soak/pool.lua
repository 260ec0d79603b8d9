-- SPDX-License-Identifier: Apache-2.0
--
-- A pool under load: several users at once take a VM, hunt in it for what earlier
-- users left (a file, and bytes anywhere in its memory), leave the same themselves,
-- run a command and give it back; now and then the worker of a VM is killed, taken
-- or ready. Prints the latency table.
--
--   sm spec/soak/pool.lua IMAGE ACQUIRES

local uv = require "luv"
local sm = require "sm"
local loop = sm.loop
local image, total = arg[1], tonumber(arg[2])
local USERS = 2
local HUNT_EVERY = 5  -- through all of memory, which takes its time
local KILL_EVERY = 20 -- a taken VM, or one that is ready

-- In two halves, so that no command of ours that looks for it holds it.
local HALF, OTHER_HALF = "left-by-", "an-earlier-user-"

local pool = assert(sm.pool {
    image = image, config = { memory = "64M" }, min = USERS, max = 2 * USERS,
    warmup = function(vm)
        return vm:exec { argv = { "sh", "-c", "head -c 16 /dev/urandom | od -An -tx1 > /dev/shm/warm" } }
    end,
})
local counts = { acquired = 0, hunts = 0, killed_taken = 0, killed_ready = 0 }
local warmed
local names = {}

local function sh(vm, script)
    return vm:exec { argv = { "sh", "-c", script }, timeout = 120 }
end

local function kill(vm)
    local pid = vm.parts.worker and vm.parts.worker:pid()
    return pid and uv.kill(pid, "sigkill")
end

local function use(vm, n)
    assert(not names[vm.id], "a VM was handed out twice")
    names[vm.id] = true
    local r = assert(sh(vm, "cat /dev/shm/warm; ls /root /dev/shm | grep marker || true"))
    warmed = warmed or r.stdout
    assert(r.stdout == warmed, "an earlier user's file: " .. r.stdout)
    if n % HUNT_EVERY == 0 then
        counts.hunts = counts.hunts + 1
        local found = assert(vm:machine():call("memory.search", { pattern = HALF .. OTHER_HALF, max = 1 }))
        assert(#found == 0, "an earlier user's bytes in memory")
    end
    r = assert(sh(vm, ("a=%s; b=%s; for i in $(seq 100); do echo $a$b%d >> /dev/shm/marker; done; "
        .. "cp /dev/shm/marker /root/marker; sync; tail -n 1 /root/marker"):format(HALF, OTHER_HALF, n)))
    assert(r.stdout == HALF .. OTHER_HALF .. n .. "\n")
    if n % HUNT_EVERY == 0 then -- the hunt can find what is there
        local found = assert(vm:machine():call("memory.search", { pattern = HALF .. OTHER_HALF .. n, max = 1 }))
        assert(#found == 1, "the hunt found nothing where there is something")
    end
end

local users = {}
for u = 1, USERS do
    users[u] = loop.spawn(function()
        while counts.acquired < total do
            counts.acquired = counts.acquired + 1
            local n = counts.acquired
            local vm <close> = assert(pool:acquire(300))
            if n % KILL_EVERY == 0 then
                counts.killed_taken = counts.killed_taken + 1
                kill(vm)
                local r = sh(vm, "true")
                assert(not r, "a command in a VM whose worker was killed")
            else
                use(vm, n)
            end
            if n % KILL_EVERY == KILL_EVERY // 2 and pool.ready[1] then
                counts.killed_ready = counts.killed_ready + 1
                kill(pool.ready[1])
            end
        end
    end)
end
for _, user in ipairs(users) do
    user:join()
end
local stats = pool:stats()
pool:close()
assert(stats.acquired >= total and stats.failed == 0, "copies could not be made")
print(("%d acquired, %d hunts through memory, %d taken and %d ready ones killed, %d died ready"):format(stats.acquired,
    counts.hunts, counts.killed_taken, counts.killed_ready, stats.died))
for _, what in ipairs { "acquire", "make" } do
    local q = stats[what]
    print(("%-8s p50 %.0f ms, p99 %.0f ms, max %.0f ms (of %d)"):format(what, q.p50 * 1000, q.p99 * 1000, q.max * 1000, q.n))
end
