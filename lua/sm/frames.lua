-- SPDX-License-Identifier: Apache-2.0
--
-- The parser of what a guest's agent says, and the judge of it.
--
-- Control frames are taken whole, stream data in whatever pieces the socket
-- gave. Before anything acts on a frame it is checked: its length, type and
-- flags, that its channel is open, that data stays within the credit given,
-- that HELLO came first and nothing comes after GOODBYE. What a channel makes
-- of its own frames it checks itself (sm.exec, sm.guest_files).
--
-- The state is the connection's (sm.agent): `rest` is an incomplete frame's
-- beginning, `data_*` the data frame being received.

local wire = require "sm.wire"

local M = {}

--- A violation of the protocol: an error, caught where `feed` is called; that it
--- is a table tells it from a fault of ours.
---@param format string
local function refuse(format, ...)
    error({ violation = format:format(...) }, 0)
end
M.refuse = refuse

-- ---------------------------------------------------------------- control

local function fields_of(payload, what)
    local fields, err = wire.fields(payload)
    if not fields then
        refuse("%s: %s", what, err)
    end
    return fields
end

local function take_mark(self, value)
    if #value ~= 12 then
        refuse("mark of %d bytes", #value)
    end
    local id, ns = string.unpack("<I4i8", value)
    if not wire.marks[id] then
        refuse("mark %d", id)
    end
    self.marks[wire.marks[id]] = ns
end

local function u32_of(value, what)
    if #value ~= 4 then
        refuse("%s of %d bytes", what, #value)
    end
    return (string.unpack("<I4", value))
end

local control = {}

control[wire.HELLO] = function(self, payload)
    if self.hello then
        refuse("second HELLO")
    end
    local hello = { marks = self.marks }
    for _, field in ipairs(fields_of(payload, "HELLO")) do
        local tag, value = field[1], field[2]
        if tag == 1 then
            hello.version = u32_of(value, "version")
        elseif tag == 2 then
            hello.generation = u32_of(value, "generation")
        elseif tag == 3 then
            hello.kernel = value:gsub("[^%g ]", "?"):sub(1, 128)
        elseif tag == 4 then
            take_mark(self, value)
        elseif tag == 5 then
            hello.booted = u32_of(value, "booted") == 1
        else
            refuse("HELLO field %d", tag)
        end
    end
    -- A snapshot brings the agent of its time.
    if not hello.version or hello.version < 1 or hello.version > wire.VERSION then
        refuse("protocol version %s, this is %d", tostring(hello.version), wire.VERSION)
    end
    self.hello = hello
end

control[wire.BOOTED] = function(self, payload)
    if self.booted ~= "asked" then
        refuse("BOOTED without BOOT")
    end
    for _, field in ipairs(fields_of(payload, "BOOTED")) do
        if field[1] ~= 4 then
            refuse("BOOTED field %d", field[1])
        end
        take_mark(self, field[2])
    end
    self.booted = true
end

--- errno, stage and text of FAILED as one failure object.
function M.failure(payload)
    if #payload < 8 then
        refuse("FAILED of %d bytes", #payload)
    end
    local errno, stage = string.unpack("<I4I4", payload)
    if not wire.stages[stage] then
        refuse("stage %d", stage)
    end
    local text = payload:sub(9):gsub("%c", "?"):sub(1, 512)
    return {
        errno = errno,
        stage = wire.stages[stage],
        text = text,
        -- What a shell would say: 127 not found, 126 cannot be run.
        status = wire.stages[stage] == "exec" and (errno == 2 or errno == 20) and 127 or 126,
        message = ("%s: %s"):format(text, wire.strerror(errno)),
    }
end

control[wire.FAILED] = function(self, payload)
    if self.booted ~= "asked" then
        refuse("FAILED without BOOT")
    end
    self.booted = false
    self.boot_failure = M.failure(payload)
end

control[wire.PONG] = function(self, payload)
    local ping = table.remove(self.pings, 1)
    if not ping or ping.token ~= payload then
        refuse("PONG without PING")
    end
    ping.done = true
end

control[wire.FROZEN] = function(self, payload)
    if self.frozen ~= "asked" and self.frozen ~= "late" or #payload ~= 4 then
        refuse("FROZEN without FREEZE")
    end
    local errno = string.unpack("<I4", payload)
    self.frozen = self.frozen == "asked" and errno == 0 or nil
    self.freeze_failure = errno ~= 0 and wire.strerror(errno) or nil
end

control[wire.GOODBYE] = function(self, payload)
    if #payload < 8 or self.bye then
        refuse("GOODBYE")
    end
    local reason, code = string.unpack("<I4I4", payload)
    if not wire.reasons[reason] then
        refuse("GOODBYE reason %d", reason)
    end
    self.bye = {
        reason = wire.reasons[reason],
        code = code,
        text = payload:sub(9):gsub("%c", "?"):sub(1, 256),
    }
    self:send(wire.BYE, 0, 0, "")
    if self.on_goodbye then
        self.on_goodbye(self.bye)
    end
end

control[wire.REFUSED] = function(_, payload)
    refuse("the agent does not know frame type %s", payload:byte() or "?")
end

-- ---------------------------------------------------------------- parsing

local channel_types = {
    [wire.STARTED] = true, [wire.EXIT] = true, [wire.FAILED] = true,
    [wire.STDIN_CREDIT] = true, [wire.STDIN_CLOSED] = true, [wire.FILE_INFO] = true,
}

-- The header of stream data: whose it is, and whether it may be sent.
local function begin_data(self, length, kind, flags, id)
    local chan = self.chans[id]
    if not chan then
        refuse("data for channel %d, which is not open", id)
    end
    local stream = kind == wire.STDOUT and 1 or 2
    local credit = chan.credit[stream]
    if not credit then
        refuse("data on a stream that is closed or never was (channel %d)", id)
    end
    if length > credit then
        refuse("%d bytes against a credit of %d (channel %d)", length, credit, id)
    end
    if flags & ~wire.FLAG_EOF ~= 0 then
        refuse("data flags %d", flags)
    end
    local eof = flags & wire.FLAG_EOF ~= 0
    if length == 0 and not eof then
        refuse("empty data frame")
    end
    chan.credit[stream] = credit - length
    if length == 0 then
        chan:data(stream, nil, true)
        return
    end
    self.data_chan, self.data_stream, self.data_left, self.data_eof = chan, stream, length, eof
end

-- A piece of the current data frame. Returns the position after it.
local function continue_data(self, buffer, at)
    local have = #buffer - at + 1
    local take = math.min(have, self.data_left)
    local piece = (at == 1 and take == #buffer) and buffer or buffer:sub(at, at + take - 1)
    self.data_left = self.data_left - take
    local chan = self.data_chan
    local eof = self.data_left == 0 and self.data_eof
    if self.data_left == 0 then
        self.data_chan = nil
    end
    chan:data(self.data_stream, piece, eof)
    return at + take
end

local function dispatch(self, kind, flags, id, payload)
    if not self.hello and kind ~= wire.HELLO then
        refuse("frame type %d before HELLO", kind)
    end
    if self.bye then
        refuse("frame type %d after GOODBYE", kind)
    end
    if flags ~= 0 then
        refuse("flags %d on frame type %d", flags, kind)
    end
    if id == 0 or kind == wire.REFUSED then
        local handler = control[kind]
        if not handler then
            refuse("frame type %d on the control channel", kind)
        end
        handler(self, payload)
        self:wake()
        return
    end
    if not channel_types[kind] then
        refuse("frame type %d on channel %d", kind, id)
    end
    local chan = self.chans[id]
    if not chan then
        refuse("frame type %d for channel %d, which is not open", kind, id)
    end
    chan:frame(kind, payload)
end

-- One header and, unless it is stream data, its frame. Returns the position
-- after it, or nil when more bytes are needed.
local function next_frame(self, buffer, at)
    if #buffer - at + 1 < wire.HEADER_BYTES then
        return nil
    end
    local length, kind, flags, id = string.unpack(wire.HEADER, buffer, at)
    if kind == wire.STDOUT or kind == wire.STDERR then
        if length > wire.PAYLOAD_MAX then
            refuse("frame of %d bytes", length)
        end
        begin_data(self, length, kind, flags, id)
        return at + wire.HEADER_BYTES
    end
    if length > wire.CONTROL_MAX then
        refuse("frame type %d of %d bytes", kind, length)
    end
    local stop = at + wire.HEADER_BYTES + length
    if stop > #buffer + 1 then
        return nil
    end
    dispatch(self, kind, flags, id, buffer:sub(at + wire.HEADER_BYTES, stop - 1))
    return stop
end

--- Parse what arrived. Raises { violation = reason } on the first bad frame.
---@param self sm.Agent
---@param chunk string
function M.feed(self, chunk)
    local buffer, at = chunk, 1
    if self.rest then
        buffer = self.rest .. chunk
        self.rest = nil
    end
    while at <= #buffer and not self.dead do
        if self.data_chan then
            at = continue_data(self, buffer, at)
        else
            local after = next_frame(self, buffer, at)
            if not after then
                self.rest = at == 1 and buffer or buffer:sub(at)
                return
            end
            at = after
        end
    end
end

return M
