-- SPDX-License-Identifier: Apache-2.0
--
-- A host with cqueues: the loop is one more thing to poll. lua5.4 cqueues.lua SCRIPT ARG

local cqueues = require "cqueues"
local script = assert(loadfile(arg[1]))(1, arg[2])
local beats = 0
local queue = cqueues.new()
queue:wrap(function()
    local waitable = {
        pollfd = script.pollfd,
        events = function()
            return "r"
        end,
        timeout = script.timeout,
    }
    while not script.done() do
        script.step()
        if not script.done() then
            cqueues.poll(waitable)
        end
    end
end)
queue:wrap(function()
    repeat
        cqueues.sleep(0.001)
        beats = beats + 1
    until script.done()
end)
assert(queue:loop())
assert(script.done() and beats > 0)
print "ok"
