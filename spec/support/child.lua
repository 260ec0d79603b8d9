-- SPDX-License-Identifier: Apache-2.0
--
-- Other processes for specs: a Lua script run by the same interpreter with the
-- same paths. The loop has to run while one is waited for.

local uv = require "luv"
local loop = require "sm.loop"

local M = {}

local Child = {}
Child.__index = Child

--- Start `lua5.4 -e code`; its stdout is collected line by line.
---@param code string
---@return table child
function M.lua(code)
    local out = uv.new_pipe()
    local self = setmetatable({ text = "", waiters = {} }, Child)
    local function wake()
        local waiters = self.waiters
        self.waiters = {}
        for _, fn in ipairs(waiters) do
            fn(true)
        end
    end
    self.process, self.pid = uv.spawn("lua5.4", { args = { "-e", code }, stdio = { nil, out, 2 } },
        function(exit_code, signal)
            self.code, self.signal = exit_code, signal
            self.process:close()
            wake()
        end)
    assert(self.process, self.pid)
    out:read_start(function(_, chunk)
        if chunk then
            self.text = self.text .. chunk
        else
            self.ended = true
            out:close()
        end
        wake()
    end)
    return self
end

local function wait_for(self, cond)
    while not cond() do
        loop.await(function(settle)
            self.waiters[#self.waiters + 1] = settle
        end)
    end
end

--- Wait until the output holds `text`, or the process is gone. Yields.
function Child:expect(text)
    wait_for(self, function()
        return self.text:find(text, 1, true) or self.code and self.ended
    end)
    assert(self.text:find(text, 1, true), "the child said: " .. self.text)
end

--- Wait for the end; exit code, signal, output. Yields.
function Child:wait()
    wait_for(self, function()
        return self.code and self.ended
    end)
    return self.code, self.signal, self.text
end

--- kill -9
function Child:kill()
    if not self.code then
        uv.kill(self.pid, "sigkill")
    end
end

return M
