-- SPDX-License-Identifier: Apache-2.0
--
-- kill -9 of a process that keeps a pool, at random points of its life: while it makes
-- its template, copies, hands them out. No worker outlives it, what it leaves is swept
-- by whoever saves next, and the snapshot it was made from stays whole.
--
--   sm spec/soak/pool_kills.lua IMAGE ROUNDS

local uv = require "luv"
local sm = require "sm"
local spec = require "support.vm"
local loop = sm.loop
local image, rounds, role = arg[1], tonumber(arg[2]), arg[3]
local NAME = "pool-kills"

if role then
    local pool = assert(sm.pool { image = role == "boot" and image or nil, snapshot = role ~= "boot" and NAME or nil,
        config = role == "boot" and { memory = "64M" } or nil, min = 2, max = 4 })
    print "ready"
    io.stdout:flush()
    while true do
        local vm <close> = assert(pool:acquire(300))
        assert(vm:exec { argv = { "true" } })
    end
end

local snapshots = require "sm.snapshot"
snapshots.remove(NAME)
do
    local vm <close> = assert(sm.start(image, { memory = "64M" }))
    assert(vm:snapshot { name = NAME })
end

local full = {} -- seconds until it was ready, by role
local killed = { early = 0, late = 0 }

-- Start one; kill it after so many seconds, or once it is ready. Yields.
local function round(how, seconds)
    local out, gone, ready, waiting = uv.new_pipe(), false, false, nil
    local function wake()
        if waiting then
            waiting(true)
        end
    end
    local handle, pid = uv.spawn("./sm", { args = { "spec/soak/pool_kills.lua", image, "1", how }, stdio = { nil, out, 2 } },
        loop.guard(function()
            gone = true
            wake()
        end))
    assert(handle, pid)
    out:read_start(loop.guard(function(_, chunk)
        ready = ready or chunk ~= nil
        wake()
    end))
    local began = loop.now()
    while not gone and not ready and (not seconds or loop.now() - began < seconds) do
        loop.await(function(settle)
            waiting = settle
        end, seconds and math.max(0, seconds - (loop.now() - began)) or 300)
        waiting = nil
    end
    full[how] = full[how] or loop.now() - began
    killed[ready and "late" or "early"] = killed[ready and "late" or "early"] + 1
    if ready then
        loop.sleep(math.random() * full[how] / 2) -- somewhere in its handing out
    end
    uv.kill(pid, "sigkill")
    while not gone do
        loop.await(function(settle)
            waiting = settle
        end, 60)
        waiting = nil
    end
    handle:close()
    out:close()
end

local own = uv.os_getpid()
local function others()
    local found = {}
    for _, line in ipairs(spec.leftovers()) do
        if line:match "sm%-worker" then
            found[#found + 1] = line
        end
    end
    return found
end

math.randomseed(own)
for n = 1, rounds do
    local how = n % 5 == 0 and "boot" or "copy"
    round(how, full[how] and math.random() < 0.8 and math.random() * full[how] or nil)
    local deadline = loop.now() + 60
    while #others() > 0 do
        assert(loop.now() < deadline, "workers that outlive their pool: " .. table.concat(others(), ", "))
        loop.sleep(0.05)
    end
    assert(snapshots.verify(NAME))
    local list, damaged = snapshots.list()
    assert(#damaged == 0 and #list == 1)
end
-- Whoever saves next sweeps what the dead left.
snapshots.sweep(snapshots.dir())
for name in uv.fs_scandir_next, assert(uv.fs_scandir(snapshots.dir())) do
    assert(name == NAME .. ".sms" or name == NAME .. ".sms.set", "left behind: " .. name)
end
assert(snapshots.remove(NAME))
print(("%d pools killed, %d before they were ready; no worker outlived one"):format(rounds, killed.early))
