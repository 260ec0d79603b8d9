-- SPDX-License-Identifier: Apache-2.0
--
-- A machine under load is saved and goes on as a copy of itself, again and
-- again: each cycle the copy takes the place of its source. After each, every
-- worker in the guest must still make progress and find nothing wrong (CPU, disk,
-- timers and signals at 1 kHz, vector registers: load.c), and the nonce of the first
-- boot, which lives in the memory of those processes alone, must still be told.
--
--   sm spec/soak/snapshot.lua IMAGE CPUS CYCLES

local uv = require "luv"
local sm = require "sm"
local image, cpus, cycles = arg[1], tonumber(arg[2]), tonumber(arg[3])
local dir = os.getenv "TMPDIR" or "/tmp" -- a disk of this kernel, and emptied (support/on_lab_disk)
local path = ("%s/soak-%d-%d.sms"):format(dir, cpus, uv.os_getpid())

local function sh(vm, script)
    local r = assert(vm:exec { argv = { "/bin/sh", "-c", script }, timeout = 300 })
    assert(r.status == 0, ("status %d: %s"):format(r.status, r.stderr))
    return r.stdout
end

local CHECK = [[
    /root/load check && ! dmesg | grep -E 'BUG:|Oops|general protection|I/O error' >&2
]]

-- Whoever saves goes before the vCPUs, which would keep every CPU of a small host busy.
local function behind(vm)
    local tasks = ("/proc/%d/task/"):format(vm.parts.worker:pid())
    for tid in uv.fs_scandir_next, assert(uv.fs_scandir(tasks)) do
        local f <close> = assert(io.open(tasks .. tid .. "/comm"))
        if f:read "a":match "vcpu" then
            assert(uv.os_setpriority(math.tointeger(tid), 10))
        end
    end
end

local vm = assert(sm.start(image, { cpus = cpus, memory = "64M", disk = "256M" }))
do
    local f <close> = assert(io.open("build/guest/load", "rb"))
    assert(vm:write_file("/root/load", f:read "a", { mode = tonumber("755", 8) }))
end
behind(vm)
local nonce = sh(vm, ("/root/load start %d </dev/null"):format(cpus))
for cycle = 1, cycles do
    local began = sm.loop.now()
    local snapshot = assert(vm:snapshot { path = path })
    local saved = sm.loop.now()
    vm:close() -- it has gone on since; a copy beside its source is restore_spec's
    vm = assert(sm.restore(snapshot))
    local restored = sm.loop.now()
    behind(vm)
    assert(sm.snapshot.remove(snapshot))
    local told = sh(vm, CHECK)
    assert(told == nonce, ("cycle %d: another nonce"):format(cycle))
    print(("cycle %d of %d: stood still for %.0f ms; saved in %.1f s, restored in %.1f s, checked in %.1f s"):format(cycle,
        cycles, snapshot.pause * 1000, saved - began, restored - saved, sm.loop.now() - restored))
end
vm:close()
