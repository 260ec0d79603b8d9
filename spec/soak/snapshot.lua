-- SPDX-License-Identifier: Apache-2.0
--
-- A machine under load is saved and goes on as a copy of itself, again and
-- again: each cycle the copy takes the place of its source. After each, every
-- worker in the guest must still make progress (CPU, disk, timers and signals at
-- 1 kHz, vector registers: load.c), files that were written must read back as they
-- were summed, and the nonce of the first boot, which lives in a process's memory
-- alone, must still be told.
--
--   sm spec/soak/snapshot.lua IMAGE CPUS CYCLES

local sm = require "sm"
local image, cpus, cycles = arg[1], tonumber(arg[2]), tonumber(arg[3])
local dir = os.getenv "TMPDIR" or "/tmp" -- a disk of this kernel, and emptied (support/on_lab_disk)
local path = ("%s/soak-%d-%d.sms"):format(dir, cpus, require("luv").os_getpid())

local function sh(vm, script)
    local r = assert(vm:exec { argv = { "/bin/sh", "-c", script }, timeout = 300 })
    assert(r.status == 0, ("status %d: %s"):format(r.status, r.stderr))
    return r.stdout
end

local LOAD = [[
    busybox renice -n 15 -p $$ # all of it: behind whoever checks
    nonce=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
    echo $nonce > /dev/shm/nonce
    say() { echo $nonce $i > /dev/shm/.$1 && mv /dev/shm/.$1 /dev/shm/spin.$1; } # whole, whenever it is read
    for k in $(seq %d); do # the first never rests; vCPUs are caught running and halted
        (i=0; while :; do
            i=$((i+1))
            [ $((i %% 200)) = 0 ] && { say $k; [ $k = 1 ] || sleep 0.05; }
        done) >/dev/null 2>&1 </dev/null &
    done
    (i=0; while :; do
        head -c 30000 /dev/urandom > /blob && sha256sum /blob > /sum && sync
        sha256sum -c /sum >/dev/null 2>&1 || echo "a file did not read back" >> /dev/shm/bad
        i=$((i+1)); say disk
    done) >/dev/null 2>&1 </dev/null &
    /root/load $nonce </dev/null >/dev/null 2>&1
]]

local CHECK = [[
    set -e
    nonce=$(cat /dev/shm/nonce)
    for f in /dev/shm/spin.*; do
        rm -f $f
        n=0
        while ! [ -s $f ]; do sleep 0.05; n=$((n+1)); [ $n -lt 4000 ] || { echo "$f stands still" >&2; exit 1; }; done
        [ "$(cut -d' ' -f1 $f)" = $nonce ] || { echo "$f has another nonce" >&2; exit 1; }
    done
    [ ! -e /dev/shm/bad ] || { cat /dev/shm/bad >&2; exit 1; }
    ! dmesg | grep -E 'BUG:|Oops|general protection|I/O error' >&2
    echo $nonce
]]

local vm = assert(sm.start(image, { cpus = cpus, memory = "64M", disk = "256M" }))
do
    local f <close> = assert(io.open("build/guest/load", "rb"))
    assert(vm:write_file("/root/load", f:read "a", { mode = tonumber("755", 8) }))
end
sh(vm, LOAD:format(cpus) .. "for f in disk vectors khz signals; do while ! [ -s /dev/shm/spin.$f ]; do sleep 0.1; done; done")
local nonce = sh(vm, "cat /dev/shm/nonce")
for cycle = 1, cycles do
    local began = sm.loop.now()
    local snapshot = assert(vm:snapshot { path = path })
    local saved = sm.loop.now()
    vm:close() -- it has gone on since; a copy beside its source is restore_spec's
    vm = assert(sm.restore(snapshot))
    local restored = sm.loop.now()
    assert(sm.snapshot.remove(snapshot))
    local told = sh(vm, CHECK)
    assert(told == nonce, ("cycle %d: another nonce"):format(cycle))
    print(("cycle %d of %d: stood still for %.0f ms; saved in %.1f s, restored in %.1f s, checked in %.1f s"):format(cycle,
        cycles, snapshot.pause * 1000, saved - began, restored - saved, sm.loop.now() - restored))
end
vm:close()
