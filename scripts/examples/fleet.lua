-- SPDX-License-Identifier: Apache-2.0
-- A fleet of VMs, each under a coroutine of its own, all on one thread: a task
-- gives way while its VM computes. Each guest squares a number in 16-bit code and
-- hands the result to a port that its task owns.
--
--   sm scripts/examples/fleet.lua [HOW MANY]

local core = require "sm.core"
local loop = require "sm.loop"

local function word(n)
    return string.pack("<I2", n)
end

-- ax = n * n by counting, out to port 0x700
local function program(n)
    return "\xb9" .. word(n)          -- mov cx, n
        .. "\x31\xc0"                 -- xor ax, ax
        .. ("\x40"):rep(n)            -- inc ax, n times: one round
        .. "\xe2" .. string.char(256 - n - 2) -- loop to the round
        .. "\xba\x00\x07\xef\xf4"     -- mov dx, 0x700; out dx, ax; hlt
end

-- Boot one VM, wait for its answer. Yields.
local function ask(n)
    local vm <close> = assert(core.vm { memory = "64K" })
    assert(vm:write(0x1000, program(n)))
    assert(vm:enter(0, "real16", 0x1000))
    local answer
    assert(vm:device {
        space = "pio", base = 0x700, size = 2,
        write = function(_, value) answer = value end,
    })
    assert(vm:start())
    while not answer do
        assert(loop.readable(vm:pollfd(), 60))
        vm:next()
    end
    return answer
end

local many = math.tointeger(tonumber((...) or 8))
loop.run(function()
    local tasks = {}
    for i = 1, many do
        tasks[i] = loop.spawn(ask, i % 100 + 1)
    end
    local right = 0
    for i, task in ipairs(tasks) do
        local n = i % 100 + 1
        right = right + (task:join() == n * n and 1 or 0)
    end
    print(("%d VMs, %d right answers"):format(many, right))
end)
