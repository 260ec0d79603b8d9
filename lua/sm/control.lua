-- SPDX-License-Identifier: Apache-2.0
--
-- The connection between a VM's owner and whoever else works with the VM, over
-- the control socket in the VM's folder. Both ends are this file: sm.serve is
-- the owner's side, sm.attached the other's.
--
-- A frame is a length (u32, little-endian) and a message (sm.core.pack):
--
--   { channel, kind, … }
--     open    verb, arguments       the client asks; channels count from 1
--     tell    what, value           about a request under way, either way
--     data    stream, bytes         within the credit of that stream
--     eof     stream
--     credit  stream, bytes         the reader took so many
--     done    true, result | false, text, detail    the answer, and the end
--     cancel                        the client wants no answer any more
--
-- Streams are "stdin" (and file data in), "stdout", "stderr". Each starts with a
-- credit of one window, so a reader that stops stalls its own stream and nothing
-- else. What a peer may make us hold is bounded: frames by length, data by
-- credit, requests by number; and who does not read its answers is not read
-- from. The first violation ends the connection, and only that.
--
-- Threads: the loop's.

local core = require "sm.core"
local loop = require "sm.loop"

local M = {}

M.WINDOW = 256 << 10
local PIECE_MAX = 64 << 10
local FRAME_MAX = 5 << 20      -- a request with a long command line; more is an attack
local CHANNELS_MAX = 128       -- open requests of one client
local UNREAD_MAX = 1 << 20     -- unread answers, beyond which we do not listen
local STREAMS = { stdin = true, stdout = true, stderr = true }

---@class sm.ControlChannel
---@field id integer
---@field verb string
---@field over string? why nothing more can come
local Channel = {}
Channel.__index = Channel

---@class sm.Control
---@field package chans table<integer, sm.ControlChannel>
---@field dead string? why the connection has ended
local Control = {}
Control.__index = Control

-- ------------------------------------------------------------- connection

local function send(self, message)
    if not self.dead then
        self.stream:write(string.pack("<s4", core.pack(message)))
    end
end

local function channel(self, id, verb)
    local chan = setmetatable({ conn = self, id = id, verb = verb, waiting = {}, incoming = {}, outgoing = {} }, Channel)
    for name in pairs(STREAMS) do
        chan.incoming[name] = { credit = M.WINDOW, first = 1, last = 0, taken = 0 }
        chan.outgoing[name] = { credit = M.WINDOW }
    end
    self.chans[id] = chan
    self.open_count = self.open_count + 1
    return chan
end

local function finish_channel(chan, why)
    local self = chan.conn
    if self.chans[chan.id] == chan then
        self.chans[chan.id] = nil
        self.open_count = self.open_count - 1
    end
    chan.over = chan.over or why
    loop.wake(chan.waiting)
    if chan.on_over then
        chan.on_over(chan.over)
    end
end

--- End the connection; every request under way fails with `why`.
---@param why string?
function Control:close(why)
    if self.dead then
        return
    end
    self.dead = why or "the connection was closed"
    if not self.stream:is_closing() then
        self.stream:close()
    end
    local chans = self.chans
    for _, chan in pairs(chans) do
        finish_channel(chan, self.dead)
    end
    if self.on_close then
        self.on_close(self.dead)
    end
end
Control.__close = Control.close

local Violation = {}

local function refuse(text, ...)
    error(setmetatable({ text = text:format(...) }, Violation), 0)
end

local function stream_of(side, name)
    local s = type(name) == "string" and side[name]
    if not s then
        refuse("unknown stream")
    end
    return s
end

local on = {}

function on.data(_, chan, name, bytes)
    local s = stream_of(chan.incoming, name)
    if type(bytes) ~= "string" or s.eof or #bytes > s.credit or bytes == "" then
        refuse("data beyond the credit, or after the end")
    end
    s.credit = s.credit - #bytes
    s.last = s.last + 1
    s[s.last] = bytes
    loop.wake(chan.waiting)
end

function on.eof(_, chan, name)
    stream_of(chan.incoming, name).eof = true
    loop.wake(chan.waiting)
end

function on.credit(_, chan, name, bytes)
    local s = stream_of(chan.outgoing, name)
    if math.type(bytes) ~= "integer" or bytes <= 0 or s.credit + bytes > M.WINDOW then
        refuse("more credit than was used")
    end
    s.credit = s.credit + bytes
    loop.wake(chan.waiting)
end

function on.tell(_, chan, what, value)
    if chan.on_tell then
        chan.on_tell(what, value)
    end
    loop.wake(chan.waiting)
end

function on.done(self, chan, ok, result, detail)
    if self.serve then
        refuse("an answer to the one who answers")
    end
    if ok then
        chan.result = { result }
    else
        chan.failure = { tostring(result), detail or nil }
    end
    for _, s in pairs(chan.incoming) do
        s.eof = true
    end
    finish_channel(chan, "the request has ended")
end

function on.cancel(_, chan)
    finish_channel(chan, "cancelled")
end

local function dispatch(self, message)
    local id, kind = message[1], message[2]
    if math.type(id) ~= "integer" or type(kind) ~= "string" then
        refuse("not a frame")
    end
    if kind == "open" then
        if not self.serve or id ~= self.next_id or type(message[3]) ~= "string" then
            refuse("open out of order")
        elseif self.open_count >= CHANNELS_MAX then
            refuse("too many requests at once")
        end
        self.next_id = id + 1
        self.serve(channel(self, id, message[3]), message[4])
        return
    end
    local handler = on[kind]
    if not handler or id < 1 or id >= self.next_id then
        refuse("a frame of an unknown kind or request")
    end
    local chan = self.chans[id]
    if chan then -- else: said before our word of its end was read
        handler(self, chan, message[3], message[4], message[5])
    end
end

local function take_frames(self)
    local input = table.concat(self.parts)
    local at = 1
    while #input - at + 1 >= 4 and not self.dead do
        local len = string.unpack("<I4", input, at)
        if len > FRAME_MAX then
            refuse("a frame of %d bytes", len)
        end
        if #input - at + 1 < 4 + len then
            break
        end
        local message = core.unpack(input:sub(at + 4, at + 3 + len))
        at = at + 4 + len
        if type(message) ~= "table" then
            refuse("not a message")
        end
        dispatch(self, message)
    end
    local rest = input:sub(at)
    self.parts, self.have = { rest }, #rest
    self.need = #rest >= 4 and 4 + string.unpack("<I4", rest) or 4
end

local listen

-- A client that does not read its answers is not listened to until it has.
local function hold_back(self)
    if self.serve and not self.held_back and self.stream:get_write_queue_size() > UNREAD_MAX then
        self.held_back = true
        self.stream:read_stop()
        self.stream:write("", loop.guard(function(err)
            self.held_back = false
            if not err and not self.dead then
                listen(self)
            end
        end))
    end
end

local function on_read(self, err, chunk)
    if self.dead then
        return
    elseif err or not chunk then
        self:close(err and "the connection was lost: " .. err or "the connection has ended")
        return
    end
    self.parts[#self.parts + 1] = chunk
    self.have = self.have + #chunk
    if self.have < self.need then
        return
    end
    local ok, why = xpcall(take_frames, function(e)
        return getmetatable(e) == Violation and e or debug.traceback(e)
    end, self)
    if ok then
        hold_back(self)
        return
    elseif getmetatable(why) == Violation then
        self:close("protocol violation: " .. why.text)
    else
        self:close("fault")
        error(why, 0)
    end
end

function listen(self)
    self.stream:read_start(loop.guard(function(err, chunk)
        on_read(self, err, chunk)
    end))
end

--- Speak over a connected stream, which belongs to the connection from now on.
--- `serve(chan, arguments)` makes this the side that answers.
---@param stream userdata
---@param serve fun(chan: sm.ControlChannel, args: any)?
---@return sm.Control
function M.new(stream, serve)
    local self = setmetatable({
        stream = stream, serve = serve, chans = {}, open_count = 0, next_id = 1,
        parts = {}, have = 0, need = 4,
    }, Control)
    listen(self)
    return self
end

--- Ask: opens a channel.
---@param verb string
---@param args any
---@return sm.ControlChannel?
---@return string? err
function Control:open(verb, args)
    if self.dead then
        return nil, self.dead
    end
    local id = self.next_id
    self.next_id = id + 1
    local chan = channel(self, id, verb)
    send(self, { id, "open", verb, args == nil and {} or args })
    return chan
end

--- Ask and wait for the answer. Yields.
---@async
---@param verb string
---@param args any
---@param timeout number?
---@return any result
---@return string? err
---@return table? detail
function Control:call(verb, args, timeout)
    local chan <close>, err = self:open(verb, args)
    if not chan then
        return nil, err
    end
    return chan:answer(timeout)
end

-- ---------------------------------------------------------------- channel

--- Say something about the request.
---@param what string
---@param value any
function Channel:tell(what, value)
    if not self.over then
        send(self.conn, { self.id, "tell", what, value == nil and false or value })
    end
end

--- Write to a stream; waits for credit. nil and why when nobody will read it.
--- Yields.
---@async
---@param name string
---@param bytes string
---@return true?
---@return string? err
function Channel:write(name, bytes)
    local s = self.outgoing[name]
    local at, size = 1, #bytes
    while at <= size do
        self:wait_for(function()
            return s.credit > 0
        end)
        if self.over then
            return nil, self.over
        end
        local take = math.min(s.credit, PIECE_MAX, size - at + 1)
        s.credit = s.credit - take
        send(self.conn, { self.id, "data", name, bytes:sub(at, at + take - 1) })
        at = at + take
    end
    if self.over then
        return nil, self.over
    end
    return true
end

--- The end of a stream.
---@param name string
function Channel:finish(name)
    if not self.over then
        send(self.conn, { self.id, "eof", name })
    end
end

--- The next piece of a stream; nil at its end; nil and why on failure. Yields.
---@async
---@param name string
---@param timeout number?
---@return string? piece
---@return string? err
function Channel:read(name, timeout)
    local s = self.incoming[name]
    local ok, why = self:wait_for(function()
        return s.first <= s.last or s.eof or self.over
    end, timeout)
    if not ok then
        return nil, why
    elseif s.first > s.last then
        return nil, not s.eof and self.over or nil
    end
    local piece = s[s.first]
    s[s.first] = nil
    s.first = s.first + 1
    s.taken = s.taken + #piece
    if s.taken * 2 >= M.WINDOW and not self.over then
        s.credit = s.credit + s.taken
        send(self.conn, { self.id, "credit", name, s.taken })
        s.taken = 0
    end
    return piece
end

--- Wait until `ready()` holds; nil, why when the request ended before. Yields.
---@async
---@param ready fun(): any
---@param timeout number?
function Channel:wait_for(ready, timeout)
    return loop.wait_until(self.waiting, ready, function()
        return self.over
    end, timeout)
end

--- Wait for the answer: the result, or nil, why, detail. Yields.
---@async
---@param timeout number?
---@return any result
---@return string? err
---@return any detail
function Channel:answer(timeout)
    local ok, err = self:wait_for(function()
        return self.result or self.failure
    end, timeout)
    if self.result then
        return self.result[1]
    elseif self.failure then
        return nil, self.failure[1], self.failure[2]
    end
    return nil, ok and "no answer" or err
end

--- Answer the request, and end it.
---@param ok boolean
---@param result any, or why
---@param detail any
function Channel:done(ok, result, detail)
    if not self.over then
        if result == nil then
            result = ok and true or "failed"
        end
        send(self.conn, { self.id, "done", ok, result, detail == nil and false or detail })
        self.on_over = nil
        finish_channel(self, "the request has ended")
    end
end

--- Give the request up. Idempotent.
function Channel:close()
    if not self.over then
        send(self.conn, { self.id, "cancel" })
        finish_channel(self, "cancelled")
    end
end
Channel.__close = Channel.close

return M
