-- SPDX-License-Identifier: Apache-2.0
--
-- For host.c: VMs of the fake backend, two in this process and two in workers,
-- made, used and closed again and again; workers are killed in mid-sentence.

local rounds = tonumber((select(2, ...)) or 3)
local core = require "sm.core"
local loop = require "sm.loop"
local uv = require "luv"
local worker = require "sm.worker"

local PAGE = 4096

local function use(vm, tag)
    local text = (tag):rep(64)
    assert(vm:write(PAGE, text))
    assert(vm:read(PAGE, #text) == text)
    assert(vm:state().state == "created")
    assert(vm:regs(0).rip)
end

local function in_process(tag)
    local vm <close> = assert(core.vm { cpus = 2, memory = "2M" })
    use(vm, tag)
end

local function in_worker(tag)
    local vm <close> = assert(worker.vm { cpus = 1, memory = "16M" })
    use(vm, tag)
    -- Two megabytes at a time, more than a socket holds, then the plug.
    local big = ("x"):rep(2 << 20)
    assert(vm:write(PAGE, big))
    uv.kill(vm:pid(), "sigkill")
    local ok, err
    repeat
        ok, err = vm:write(PAGE, big)
    until not ok
    assert(err:find("killed by signal 9", 1, true), err)
end

local finished
loop.spawn(function()
    for _ = 1, rounds do
        local tasks = {}
        for i, fn in ipairs { in_process, in_process, in_worker, in_worker } do
            tasks[i] = loop.spawn(fn, tostring(i))
        end
        for _, task in ipairs(tasks) do
            task:join()
        end
    end
    finished = true
end)

return {
    pollfd = loop.pollfd,
    timeout = loop.timeout,
    step = loop.step,
    done = function()
        return finished
    end,
}
