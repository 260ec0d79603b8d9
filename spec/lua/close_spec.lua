-- SPDX-License-Identifier: Apache-2.0
-- The end of a Lua state with machines in every condition: in a process of its
-- own each, which must end well, in time, and leave nothing running.

local shell = require "support.shell"
local uv = require "luv"

local here = assert(uv.cwd())

local HEAD = [[
local core, loop, worker = require "sm.core", require "sm.loop", require "sm.worker"
local function boot(new)
    local vm = assert(new { memory = "1M", cpus = 2 })
    assert(vm:write(0x1000, "\xba\x00\x07\xec\xeb\xfd")) -- in al, dx for ever
    assert(vm:enter(0, "real16", 0x1000))
    return vm
end
]]

local cases = {
    { "running", "kept = boot(NEW) kept:start()" },
    { "never started", "kept = boot(NEW)" },
    { "paused", "kept = boot(NEW) kept:start() kept:pause()" },
    { "with a vCPU that waits for an answer", [[
        kept = boot(NEW)
        kept:claim { space = "pio", base = 0x700, size = 1 }
        kept:start()
        local event
        repeat event = assert(kept:next_event(60)) until event.type == "exit"
    ]] },
    { "with a device, a held vCPU and a breakpoint", [[
        kept = boot(NEW)
        device = kept:device { space = "pio", base = 0x700, size = 1 }
        cpu = kept:vcpu(0)
        kept:add_breakpoint { address = 0x5000 }
        kept:add_doorbell { gpa = 0xfe000000 }
        kept:start()
        cpu:hold()
    ]] },
    { "held by a dead coroutine", [[
        kept = coroutine.create(function()
            local vm <close> = boot(NEW)
            vm:start()
            coroutine.yield()
        end)
        coroutine.resume(kept)
    ]] },
    { "after an error in the middle", [[
        pcall(function()
            local vm <close> = boot(NEW)
            vm:device { space = "pio", base = 0x700, size = 1, read = function() error "x" end }
            vm:start()
            error "on purpose"
        end)
    ]] },
    { "many of them", "kept = {} for i = 1, 8 do kept[i] = boot(NEW) kept[i]:start() end" },
}

local function run(code)
    local path = os.tmpname()
    shell.write(path, code)
    local out = shell.run { "sh", "-c", ([[
        export LUA_PATH='%s/lua/?.lua;;' LUA_CPATH='%s/build/fake/?.so;;'
        timeout 60 lua5.4 %s 2>&1; echo "status $?"
    ]]):format(here, here, path) }
    os.remove(path)
    return out
end

for _, home in ipairs { { "in process", "core.vm" }, { "in a worker", "worker.vm" } } do
    describe("at the end of a Lua state, a VM " .. home[1], function()
        for _, case in ipairs(cases) do
            -- A coroutine of a stranger's cannot wait for a worker.
            if not (case[1]:find "coroutine" and home[2] == "worker.vm") then
                it("does no harm: " .. case[1], function()
                    local code = HEAD .. case[2]:gsub("NEW", home[2])
                    assert.equal("status 0\n", run(code))
                    assert.equal("status 3\n", run(code .. "\nos.exit(3, true)"))
                end)
            end
        end
    end)
end
