-- SPDX-License-Identifier: Apache-2.0
--
-- At most so many tasks at once: `local pass <close> = gate:enter()`.

local loop = require "sm.loop"

local M = {}

local Gate = {}
Gate.__index = Gate

---@param places integer
function M.new(places)
    return setmetatable({ free = places, queue = {} }, Gate)
end

local function leave(gate)
    local nextup = table.remove(gate.queue, 1)
    if nextup then
        nextup(true) -- the place passes on
    else
        gate.free = gate.free + 1
    end
end

--- Wait for a place; it is given back when the result is closed. Yields.
---@async
---@return table
function Gate:enter()
    if self.free > 0 then
        self.free = self.free - 1
    else
        loop.wait_in(self.queue, nil, function() -- the place was ours already
            leave(self)
        end)
    end
    local gate, done = self, false
    return setmetatable({}, { __close = function()
        if not done then
            done = true
            leave(gate)
        end
    end })
end

return M
