-- SPDX-License-Identifier: Apache-2.0
--
-- What every request in flight has: bytes going to the guest against its
-- credit, streams coming back against ours, and tasks waiting for either.
-- sm.exec and sm.guest_files build on it; sm.agent drives it.
--
-- A stream holds at most its window of unread bytes: credit is given back as
-- the reader takes them, half a window at a time, so a reader that stops is
-- felt by its own process and by nothing else.

local agent = require "sm.agent"
local loop = require "sm.loop"
local wire = require "sm.wire"

local M = {}

---@class sm.Channel
local Channel = {}
Channel.__index = Channel
M.Channel = Channel

--- A channel of `a`, not opened yet. `windows` is the first credit of stdout
--- and stderr, nil for a stream that does not exist.
---@param self table
---@param a sm.Agent
---@param windows integer[]
function M.init(self, a, windows)
    self.agent = a
    self.credit = { windows[1], windows[2] }
    self.streams = {}
    for i = 1, 2 do
        if windows[i] then
            self.streams[i] = { window = windows[i], taken = 0, first = 1, last = 0 }
        end
    end
    self.stdin_credit = wire.WINDOW
    self.waiting = {}
    return self
end

function Channel:wake()
    loop.wake(self.waiting)
end

-- Wait until `ready()`; nil, reason when the channel failed or time is up.
function Channel:wait_for(ready, timeout)
    return loop.wait_until(self.waiting, ready, function()
        return self.gone
    end, timeout)
end

--- The connection is gone.
function Channel:lost(err)
    self.gone = err
    self.credit = {}
    for _, s in pairs(self.streams) do
        s.eof = true
    end
    self:wake()
end

-- ------------------------------------------------------------ to the guest

--- Send bytes as credit allows. Yields while there is none.
---@async
---@return boolean? ok, string? err
function Channel:send_stdin(data)
    local at, size = 1, #data
    while at <= size do
        local ok, err = self:wait_for(function()
            return self.stdin_credit > 0 or self.stdin_closed
        end)
        if not ok then
            return nil, err
        end
        if self.stdin_closed then
            return nil, "broken pipe"
        end
        local take = math.min(self.stdin_credit, wire.PAYLOAD_MAX, size - at + 1)
        self.stdin_credit = self.stdin_credit - take
        self.agent:send(wire.STDIN, 0, self.id,
            take == size and data or data:sub(at, at + take - 1))
        at = at + take
    end
    return true
end

function Channel:send_eof()
    if not self.stdin_closed and not self.gone then
        self.stdin_closed = true
        self.agent:send(wire.STDIN_EOF, 0, self.id, "")
        self:wake()
    end
end

--- STDIN_CREDIT came.
function Channel:granted(payload)
    if #payload ~= 4 then
        agent.refuse("credit of %d bytes", #payload)
    end
    local bytes = string.unpack("<I4", payload)
    if self.stdin_credit + bytes > wire.WINDOW then
        agent.refuse("more credit than was used (channel %d)", self.id)
    end
    self.stdin_credit = self.stdin_credit + bytes
    self:wake()
end

-- ---------------------------------------------------------- from the guest

-- Bytes were taken off stream `i`: give credit back in large steps.
local function give_back(self, i, bytes)
    local s = self.streams[i]
    s.taken = s.taken + bytes
    if s.taken * 2 >= s.window and self.credit[i] then
        self.credit[i] = self.credit[i] + s.taken
        self.agent:send(wire.CREDIT, 0, self.id, string.pack("<I4I4", i, s.taken))
        s.taken = 0
    end
end

--- Called by the parser with checked data.
function Channel:data(i, piece, eof)
    local s = self.streams[i]
    if piece then
        if s.discard then
            give_back(self, i, #piece)
        elseif s.collect then
            self:collected(i, piece)
        else
            s.last = s.last + 1
            s[s.last] = piece
        end
    end
    if eof then
        s.eof = true
        self.credit[i] = nil
        self:ended()
    end
    if #self.waiting > 0 then
        self:wake()
    end
end

--- Gather a stream in memory instead of queueing it for `read`: up to `limit`
--- bytes, the rest is dropped and `truncated` set.
function Channel:collect(i, limit)
    local s = self.streams[i]
    if s then
        s.collect, s.size, s.limit = {}, 0, limit
    end
end

function Channel:collected(i, piece)
    local s = self.streams[i]
    local bytes = #piece
    if s.size + bytes > s.limit then
        self.truncated = true
        piece = piece:sub(1, s.limit - s.size)
    end
    if #piece > 0 then
        s.collect[#s.collect + 1] = piece
        s.size = s.size + #piece
    end
    give_back(self, i, bytes)
end

--- Drop what the stream holds and will bring.
function Channel:discard(i)
    local s = self.streams[i]
    if s and not s.discard then
        s.discard = true
        while s.first <= s.last do
            local piece = s[s.first]
            s[s.first] = nil
            s.first = s.first + 1
            give_back(self, i, #piece)
        end
    end
end

--- The next piece of a stream; nil at its end; nil, reason on failure. Yields.
---@async
---@param i integer
---@param timeout number?
---@return string? piece, string? err
function Channel:next_piece(i, timeout)
    local s = self.streams[i]
    if not s then
        return nil
    end
    if s.first > s.last and not s.eof then
        local ok, err = self:wait_for(function()
            return s.first <= s.last or s.eof
        end, timeout)
        if not ok then
            return nil, err
        end
    end
    if s.first > s.last then
        return nil, self.gone
    end
    local piece = s[s.first]
    s[s.first] = nil
    s.first = s.first + 1
    give_back(self, i, #piece)
    return piece
end

return M
