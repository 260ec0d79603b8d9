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
local counts = { acquired = 0, hunts = 0, killed_taken = 0, killed_ready = 0, taken_dying = 0 }
local killed = {}
local warmed
local names = {}

local function sh(vm, script)
    return vm:exec { argv = { "sh", "-c", script }, timeout = 120 }
end

local function kill(vm)
    local pid = vm.parts.worker and vm.parts.worker:pid()
    killed[vm] = true
    return pid and uv.kill(pid, "sigkill")
end

-- Shell that ends in failure where an earlier user's file is; its output is the warm-up's.
local LOOK = [[
    read -r warm < /dev/shm/warm
    for f in /root/marker /dev/shm/marker; do [ ! -e $f ] || { echo "an earlier user's $f" >&2; exit 1; }; done
    echo "$warm"
]]
local LEAVE = [[
    a=%s; b=%s
    for i in $(seq 100); do echo $a${b}%d; done > /dev/shm/marker
    while read -r line; do echo "$line"; done < /dev/shm/marker > /root/marker
    sync
]]

local function found(vm, text)
    return #assert(vm:machine():call("memory.search", { pattern = text, max = 1 }))
end

local function use(vm, n)
    assert(not names[vm.id], "a VM was handed out twice")
    names[vm.id] = true
    local leave = LEAVE:format(HALF, OTHER_HALF, n)
    local r
    if n % HUNT_EVERY == 0 then
        r = assert(sh(vm, LOOK))
        assert(found(vm, HALF .. OTHER_HALF) == 0, "an earlier user's bytes in memory")
        assert(assert(sh(vm, leave)).status == 0)
        assert(found(vm, HALF .. OTHER_HALF .. n) == 1, "the hunt found nothing where there is something")
        counts.hunts = counts.hunts + 1
    else
        r = sh(vm, LOOK .. leave)
    end
    assert(r and r.status == 0, r and r.stderr or "a command did not end")
    warmed = warmed or r.stdout
    assert(r.stdout == warmed, "another warm-up: " .. r.stdout)
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
                local ok, why = pcall(use, vm, n)
                if not ok then -- it may have been taken before the pool could know of its death
                    assert(killed[vm], why)
                    counts.taken_dying = counts.taken_dying + 1
                end
            end
            if n % KILL_EVERY == KILL_EVERY // 2 then
                while not pool.ready[1] do
                    loop.sleep(0.05)
                end
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
print(("%d acquired, %d hunts through memory, %d taken and %d ready ones killed, %d died ready, %d as they were taken"):format(
    stats.acquired, counts.hunts, counts.killed_taken, counts.killed_ready, stats.died, counts.taken_dying))
for _, what in ipairs { "acquire", "make" } do
    local q = stats[what]
    print(("%-8s p50 %.0f ms, p99 %.0f ms, max %.0f ms (of %d)"):format(what, q.p50 * 1000, q.p99 * 1000, q.max * 1000, q.n))
end
