-- SPDX-License-Identifier: Apache-2.0
--
-- Our standard streams joined to a process in a VM.
--
-- Each stream is a task of its own, so one that stalls (a pipe nobody reads)
-- stalls itself and, through the agent's credit, the process's stream behind
-- it; the others go on. What kind of file a descriptor is decides how it is
-- read and written: terminals and pipes through the loop, files directly.

local uv = require "luv"
local loop = require "sm.loop"
local terminal = require "sm.cli.terminal"

local M = {}

local CHUNK = 65536

local function open_stream(fd)
    local kind = uv.guess_handle(fd)
    local handle
    if kind == "tty" then
        handle = uv.new_tty(fd, true)
    elseif kind == "pipe" then
        -- Covers pipes and unix sockets.
        handle = uv.new_pipe(false)
        if not handle:open(fd) then
            handle:close()
            handle = nil
        end
    elseif kind == "tcp" then
        handle = uv.new_tcp()
        handle:open(fd)
    end
    return handle
end

-- A reader: read() gives a chunk, or nil at the end. Yields.
local function source(fd)
    local handle = open_stream(fd)
    if not handle then
        return {
            read = function()
                local chunk = uv.fs_read(fd, CHUNK, -1)
                return chunk ~= "" and chunk or nil
            end,
            close = function() end,
        }
    end
    local queue, ended, waiting, reading = {}, false, nil, false
    local function on_read(err, chunk)
        if err or not chunk then
            ended = true
        else
            queue[#queue + 1] = chunk
            -- One chunk at a time: what we have not asked for stays in the
            -- kernel, and stalls the writer as it should.
            handle:read_stop()
            reading = false
        end
        if waiting then
            local settle = waiting
            waiting = nil
            settle()
        end
    end
    return {
        read = function()
            while not queue[1] and not ended do
                loop.await(function(settle)
                    waiting = settle
                    if not reading then
                        reading = true
                        handle:read_start(loop.guard(on_read))
                    end
                    return function()
                        waiting = nil
                    end
                end)
            end
            return table.remove(queue, 1)
        end,
        close = function()
            if not handle:is_closing() then
                handle:read_stop()
                handle:close()
            end
        end,
    }
end

-- A writer: write(chunk) returns when it is taken, nil, err when it cannot be.
-- Yields.
local function sink(fd)
    local kind = uv.guess_handle(fd)
    local handle = (kind == "pipe" or kind == "tty") and open_stream(fd) or nil
    if not handle then
        return {
            write = function(chunk)
                while chunk ~= "" do
                    local n, err = uv.fs_write(fd, chunk, -1)
                    if not n then
                        return nil, err
                    end
                    chunk = chunk:sub(n + 1)
                end
                return true
            end,
            close = function() end,
        }
    end
    return {
        write = function(chunk)
            return loop.await(function(settle)
                handle:write(chunk, loop.guard(function(err)
                    if err then
                        settle(nil, err)
                    else
                        settle(true)
                    end
                end))
            end)
        end,
        close = function()
            if not handle:is_closing() then
                handle:close()
            end
        end,
    }
end

local Joined = {}
Joined.__index = Joined

local function pump_out(self, proc, name, fd)
    local out = sink(fd)
    self.sinks[#self.sinks + 1] = out
    while true do
        local chunk = proc:read(name)
        if not chunk then
            return
        end
        local ok = out.write(chunk)
        if not ok then
            -- Nobody reads us any more: the process learns it as a writer to
            -- a closed pipe does, and whatever it still says is dropped.
            proc:signal("PIPE")
            while proc:read(name) do
            end
            return
        end
    end
end

local function pump_in(self, proc)
    local input = source(0)
    self.source = input
    while true do
        local chunk = input.read()
        if not chunk then
            proc:close_stdin()
            return
        end
        local ok = proc:write(chunk)
        if not ok then
            return -- the process reads no more
        end
    end
end

--- Join our streams to `proc`. With `tty`, the terminal is raw until finish()
--- or the end of the scope, and its size follows. Yields.
---@async
---@param proc table
---@param opts { tty: boolean?, stdin: boolean? }
function M.join(proc, opts)
    local self = setmetatable({ tasks = {}, sinks = {} }, Joined)
    if opts.tty then
        self.terminal = assert(terminal.raw(0))
        self.winch = assert(uv.new_signal())
        self.winch:start("sigwinch", loop.guard(function()
            proc:resize(terminal.size(0))
        end))
    end
    if opts.stdin then
        self.input = loop.spawn(pump_in, self, proc)
    end
    self.tasks[1] = loop.spawn(pump_out, self, proc, "stdout", 1)
    if not opts.tty then
        self.tasks[2] = loop.spawn(pump_out, self, proc, "stderr", 2)
    end
    return self
end

--- Wait until everything the process said is written. Yields.
---@async
function Joined:finish()
    for _, task in ipairs(self.tasks) do
        task:join()
    end
    self:close()
end

--- Let go of the streams, whatever is in flight; the terminal is restored.
--- Idempotent. Yields.
---@async
function Joined:close()
    if self.closed then
        return
    end
    self.closed = true
    if self.input and not self.input:finished() then
        self.input:cancel()
    end
    if self.source then
        self.source.close()
    end
    for _, task in ipairs(self.tasks) do
        if not task:finished() then
            task:cancel()
        end
    end
    for _, out in ipairs(self.sinks) do
        out.close()
    end
    if self.winch then
        self.winch:close()
    end
    if self.terminal then
        self.terminal:restore()
    end
end

Joined.__close = Joined.close

return M
