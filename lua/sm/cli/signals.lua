-- SPDX-License-Identifier: Apache-2.0
--
-- Signals that would end us and are somebody else's to answer: the command's in the
-- guest, or the VM's.

local uv = require "luv"
local loop = require "sm.loop"

local M = {}

local ENDING = { sigterm = "TERM", sigint = "INT", sighup = "HUP", sigquit = "QUIT" }

--- Call `answer(name)`, with the name as a guest knows it ("TERM"), on each such
--- signal, until the result is closed.
---@param answer fun(name: string)
---@return table to be closed, any number of times
function M.take(answer)
    local handles = {}
    for host, guest in pairs(ENDING) do
        local handle = assert(uv.new_signal())
        handle:start(host, loop.guard(function()
            answer(guest)
        end))
        handles[#handles + 1] = handle
    end
    local self = {}
    function self.close()
        for _, handle in ipairs(handles) do
            handle:close()
        end
        handles = {}
    end
    return setmetatable(self, { __close = self.close })
end

--- The same for a command in the guest, which gets them as they are.
---@param proc table
---@return table
function M.forward(proc)
    return M.take(function(name)
        proc:signal(name)
    end)
end

return M
