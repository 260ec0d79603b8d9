-- SPDX-License-Identifier: Apache-2.0
--
-- Streams to and from TCP ports of a guest, through its agent: no port of the
-- host takes part, and no network card need be there. The agent's program runs
-- once more in the guest, as a process that joins a socket to its standard
-- streams (core/guest/pipe.c); credit, end of file and kill are exec's.

local exec = require "sm.exec"
local loop = require "sm.loop"

local M = {}

-- PID 1 is the agent, whatever the guest's root holds.
M.PROGRAM = "/proc/1/exe"

---@class sm.Stream
local Stream = {}
Stream.__index = Stream
Stream.__name = "sm.Stream"

--- The next piece; nil at the end, nil and a reason on failure. Yields.
---@async
---@param timeout number? seconds
---@return string? piece
---@return string? err
function Stream:read(timeout)
    return self.proc:read("stdout", timeout)
end

--- All that is left. Yields.
---@async
---@return string? data
---@return string? err
function Stream:read_all()
    return self.proc:read_all("stdout")
end

--- Write; waits while nobody reads. Yields.
---@async
---@param data string
---@return boolean? ok
---@return string? err
function Stream:write(data)
    return self.proc:write(data)
end

--- Say that nothing more will be written; reading goes on.
function Stream:shutdown()
    self.proc:close_stdin()
end

--- Idempotent.
function Stream:close()
    self.proc:close()
end
Stream.__close = Stream.close

local function check_port(what, port)
    if math.type(port) ~= "integer" or port < 1 or port > 65535 then
        error(("%s: expected a port from 1 to 65535"):format(what), 3)
    end
end

-- Start the helper and wait until it is joined to a connection. Yields.
local function join(agent, mode, port, timeout)
    local proc, err = exec.spawn(agent, { argv = { M.PROGRAM, mode, tostring(port) }, user = "0:0", stdin = true })
    if not proc then
        return nil, err
    end
    local said
    said, err = proc:read("stderr", timeout)
    if said == "connected\n" then
        return setmetatable({ proc = proc }, Stream)
    end
    proc:close()
    said = said and said:match("^[^\n]*")
    return nil, ("port %d: %s"):format(port, said and said:match(": (.*)$") or said or err or "the guest's helper ended")
end

--- Connect to a TCP port of the guest's loopback. Yields.
---@async
---@param agent sm.Agent
---@param port integer
---@param timeout number? seconds
---@return sm.Stream?
---@return string? err
function M.connect(agent, port, timeout)
    check_port("connect", port)
    return join(agent, "--connect", port, timeout)
end

---@class sm.Listener
local Listener = {}
Listener.__index = Listener
Listener.__name = "sm.Listener"

--- The next connection. nil, "timeout". Yields.
---@async
---@param timeout number? seconds
---@return sm.Stream?
---@return string? err
function Listener:accept(timeout)
    local deadline = timeout and loop.now() + timeout
    while self.waiting == 0 do
        local piece, err = self.proc:read("stdout", deadline and math.max(0, deadline - loop.now()))
        if not piece then
            return nil, err or "closed"
        end
        local _, count = piece:gsub("accepted\n", "")
        self.waiting = self.waiting + count
    end
    self.waiting = self.waiting - 1
    return join(self.agent, "--take", self.port, deadline and math.max(0.1, deadline - loop.now()))
end

--- Stop listening; connections that were accepted stay. Idempotent.
function Listener:close()
    self.proc:close()
end
Listener.__close = Listener.close

--- Listen on a TCP port in the guest: its programs connect to it. Yields.
---@async
---@param agent sm.Agent
---@param port integer
---@param timeout number? seconds
---@return sm.Listener?
---@return string? err
function M.listen(agent, port, timeout)
    check_port("listen", port)
    local proc, err = exec.spawn(agent, { argv = { M.PROGRAM, "--listen", tostring(port) }, user = "0:0", stdin = true })
    if not proc then
        return nil, err
    end
    local said
    said, err = proc:read("stdout", timeout)
    if said and said:match("^listening\n") then
        local _, count = said:gsub("accepted\n", "")
        return setmetatable({ proc = proc, agent = agent, port = port, waiting = count }, Listener)
    end
    local why = proc:read("stderr", 1)
    proc:close()
    return nil, ("port %d: %s"):format(port, why and why:match(": ([^\n]*)") or err or "the guest's helper ended")
end

return M
