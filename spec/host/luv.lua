-- SPDX-License-Identifier: Apache-2.0
--
-- A host with luv's loop: nothing of ours runs it. lua5.4 luv.lua SCRIPT ARG

local uv = require "luv"
local script = assert(loadfile(arg[1]))(1, arg[2])
local beats = 0
local timer = uv.new_timer()
timer:start(1, 1, function()
    beats = beats + 1
    if script.done() then
        timer:close()
    end
end)
uv.run()
assert(script.done() and beats > 0)
print "ok"
