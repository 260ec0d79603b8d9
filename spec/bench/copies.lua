-- SPDX-License-Identifier: Apache-2.0
--
-- What a user waits for: from the start of `sm restore` to the first output of a
-- command in the copy, with the page cache full and empty; the same from a pool that
-- has one ready; a hundred forks of one machine, all of which answer; and what a copy
-- that does nothing has in memory of its own. 128 MiB guests, medians.
--
--   sm spec/bench/copies.lua IMAGE [RUNS]

local uv = require "luv"
local sm = require "sm"
local loop = sm.loop

if arg[1] == "--again" then -- with its working set or not, what `sm restore` cannot be asked
    local vm <close> = assert(sm.restore(arg[2], { working_set = arg[3] == "with" }))
    print(assert(vm:exec { argv = { "echo", "x" } }).stdout)
    return
end

local image, runs = arg[1], tonumber(arg[2] or 5)
local dir = os.getenv "SM_LAB_DISK" or os.getenv "XDG_DATA_HOME" -- a disk of this kernel
local path = dir .. "/copies.sms"

local function median(list)
    table.sort(list)
    return list[(#list + 1) // 2]
end

local function row(what, list)
    local n = #list
    print(("%-52s %9.1f ms  (%d runs, %.1f to %.1f)"):format(what, median(list) * 1000, n, list[1] * 1000, list[n] * 1000))
end

-- Seconds from the start of ./sm to its first output. Yields.
local function first_word(args)
    local out, began, first = uv.new_pipe(), loop.now(), nil
    local gone
    local waiting
    local function wake()
        if waiting then
            waiting(true)
        end
    end
    local handle
    handle = assert(uv.spawn("./sm", { args = args, stdio = { nil, out, 2 } }, loop.guard(function()
        handle:close()
        gone = true
        wake()
    end)))
    out:read_start(loop.guard(function(_, chunk)
        if chunk then
            first = first or loop.now()
        else
            out:close()
        end
    end))
    while not gone do
        loop.await(function(settle)
            waiting = settle
        end)
        waiting = nil
    end
    return assert(first, "it said nothing") - began
end

-- KiB that a process has written itself: over a snapshot's file, and elsewhere.
local function private(pid)
    local guest, rest, over = 0, 0, false
    for line in io.lines(("/proc/%d/smaps"):format(pid)) do
        local kib = line:match "^Private_Dirty: +(%d+)"
        if line:find "^%x+%-%x+ " then
            over = line:find("%.sms") ~= nil
        elseif kib and over then
            guest = guest + kib
        elseif kib then
            rest = rest + kib
        end
    end
    return guest, rest
end

local function drop_caches()
    local f = io.open("/proc/sys/vm/drop_caches", "w")
    return f and f:write "3\n" and f:close()
end

do
    local vm <close> = assert(sm.start(image, { memory = "128M" }))
    assert(vm:exec { argv = { "true" } })
    assert(vm:snapshot { path = path })
end
local hot, cold, without = {}, {}, {}
first_word { "restore", path, "echo", "x" }
for i = 1, runs do
    hot[i] = first_word { "restore", path, "echo", "x" }
end
row("exec() of sm restore to the command's word, cache hot", hot)
for i = 1, runs do
    if not drop_caches() then
        print "the page cache cannot be dropped here"
        break
    end
    cold[i] = first_word { "spec/bench/copies.lua", "--again", path, "with" }
    drop_caches()
    without[i] = first_word { "spec/bench/copies.lua", "--again", path, "without" }
end
if cold[1] then
    row("a script's restore to the command's word, cache cold", cold)
    row("… without the working set", without)
end

local taken = {}
do
    local pool <close> = assert(sm.pool { snapshot = path, min = 1, max = 2 })
    for i = 1, runs do
        while pool:stats().ready == 0 do
            loop.sleep(0.05)
        end
        local began = loop.now()
        local vm <close> = assert(pool:acquire(60))
        assert(vm:exec { argv = { "echo", "x" } })
        taken[i] = loop.now() - began
    end
end
row("a pool's acquire to the command's word", taken)

do
    local copy <close> = assert(sm.restore(path))
    loop.sleep(5)
    local guest, worker = private(copy.parts.worker:pid())
    print(("an idle copy, after 5 s: %.2f MiB of guest memory of its own, its worker %.2f MiB more"):format(
        guest / 1024, worker / 1024))
end

do
    local vm <close> = assert(sm.restore(path))
    local began = loop.now()
    local kids = assert(vm:fork(100))
    local made = loop.now() - began
    for _, kid in ipairs(kids) do
        assert(kid.parts.agent:ping(60))
    end
    print(("%-52s %9.1f ms, %.1f ms each"):format("a hundred forks, all of them told who they are", made * 1000, made * 10))
    for _, kid in ipairs(kids) do
        kid:close()
    end
end
os.remove(path)
os.remove((path:gsub("%.sms$", ".sms.set")))
