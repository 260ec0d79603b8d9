-- SPDX-License-Identifier: Apache-2.0
--
-- The host's end of the connection to the guest's agent (core/guest/proto.h).
--
-- One object per connection. What comes in is parsed as it arrives: control
-- frames whole, stream data in whatever pieces the socket gives, so that a
-- byte of a program's output is copied once on its way to the reader. What
-- goes out is bounded by the credit of each channel, never queued without end.
--
-- The guest is hostile. Every frame is checked against the state of its
-- channel before anything acts on it: its length, type and channel, the credit
-- it uses, its place in the order of frames. The first violation ends the
-- connection: everything that waits gets `nil, "agent: …"`, `on_error` hears of
-- it (the product kills the machine), and nothing more is read.
--
-- Threads: the loop's. Callbacks (`on_goodbye`, `on_error`) run on the loop
-- and must not yield.

local uv = require "luv"
local frames = require "sm.frames"
local loop = require "sm.loop"
local socket = require "sm.socket"
local wire = require "sm.wire"

local M = { refuse = frames.refuse, failure = frames.failure }

---@class sm.Agent
---@field hello table { version, generation, kernel, booted, marks }
---@field marks table<string, integer> boot marks, ns of guest time
---@field on_goodbye fun(bye: table)? { reason, code, text }
---@field on_error fun(err: string)?
---@field package chans table
local Agent = {}
Agent.__index = Agent

-- ---------------------------------------------------------------- sending

--- Wake what waits for a change of the connection's own state.
function Agent:wake()
    loop.wake(self.waiting)
end

--- Send one frame; the payload may be a table of strings.
function Agent:send(kind, flags, chan, payload)
    if self.dead then
        return
    end
    local data = { string.pack(wire.HEADER, #payload, kind, flags, chan) }
    if #payload > 0 then
        data[2] = payload
    end
    self.stream:write(data)
end

--- Send a request, in as many frames as it takes. nil and a reason when it is
--- larger than the protocol allows.
function Agent:request(kind, chan, text)
    if #text > wire.REQUEST_MAX then
        return nil, ("request of %d bytes, the limit is %d"):format(#text, wire.REQUEST_MAX)
    end
    local at = 1
    while #text - at + 1 > wire.PAYLOAD_MAX do
        self:send(kind, wire.FLAG_MORE, chan, text:sub(at, at + wire.PAYLOAD_MAX - 1))
        at = at + wire.PAYLOAD_MAX
    end
    self:send(kind, 0, chan, at == 1 and text or text:sub(at))
    return true
end

-- --------------------------------------------------------------- channels

--- Register a channel: a table with `frame(type, payload, flags)`, `data(stream,
--- piece, eof)`, `credit[stream]` (bytes it may still send) and `lost(err)`.
---@return integer? id, string? err
function Agent:open(chan)
    for _ = 1, 65535 do
        local id = self.next_id
        self.next_id = id % 65535 + 1
        if not self.chans[id] then
            self.chans[id] = chan
            chan.id = id
            return id
        end
    end
    return nil, "agent: too many requests at once"
end

--- The request is over; its number may be used again.
function Agent:release(chan)
    self.chans[chan.id] = nil
end

-- ---------------------------------------------------------------- the end

local function shut(self)
    if not self.stream:is_closing() then
        self.stream:close()
    end
end

--- End the connection for a reason: everything that waits hears it.
function Agent:fail(err)
    if self.dead then
        return
    end
    self.dead = err
    shut(self)
    local chans = self.chans
    self.chans = {}
    for _, chan in pairs(chans) do
        chan:lost(err)
    end
    loop.wake(self.waiting)
    if self.on_error and not self.bye then
        self.on_error(err)
    end
end

--- Close the connection. Requests in flight fail with "agent: closed".
function Agent:close()
    self.on_error = nil
    self:fail("agent: closed")
end
Agent.__close = Agent.close

-- ---------------------------------------------------------------- reading

local function on_read(self, err, chunk)
    if self.dead then
        return
    end
    if err then
        self:fail("agent: connection lost: " .. err)
    elseif not chunk then
        self:fail(self.bye and "agent: the machine has ended" or "agent: connection lost")
    else
        local ok, why = xpcall(frames.feed, function(e)
            return type(e) == "table" and e or debug.traceback(e)
        end, self, chunk)
        if not ok and type(why) == "table" and why.violation then
            self:fail("agent: protocol violation: " .. why.violation)
        elseif not ok then
            self:fail("agent: fault")
            error(why, 0)
        end
    end
end

-- -------------------------------------------------------------------- API

-- Wait for a condition that control frames change. Yields.
local function wait_for(self, ready, timeout)
    local ok, why = loop.wait_until(self.waiting, ready, function()
        return self.dead
    end, timeout)
    return ok, why == "timeout" and "agent: timeout" or why
end

--- Take a connection and wait for the agent's HELLO. `stream` is a connected
--- luv pipe or a descriptor, which the agent owns from now on. Yields.
---@async
---@param stream userdata|integer
---@param opts? { timeout: number?, on_goodbye: function?, on_error: function? }
---@return sm.Agent? agent, string? err
function M.accept(stream, opts)
    opts = opts or {}
    wire.check_keys("agent.accept", opts, { timeout = 1, on_goodbye = 1, on_error = 1 })
    local why
    stream, why = socket.new(stream)
    if not stream then
        return nil, "agent: " .. why
    end
    local self = setmetatable({
        stream = stream,
        chans = {},
        next_id = 1,
        waiting = {},
        pings = {},
        marks = {},
        on_goodbye = opts.on_goodbye,
        on_error = opts.on_error,
    }, Agent)
    stream:read_start(loop.guard(function(err, chunk)
        on_read(self, err, chunk)
    end))
    local ok, err = wait_for(self, function()
        return self.hello
    end, opts.timeout)
    if not ok then
        self.on_error = nil
        self:fail(err)
        return nil, err
    end
    self.booted = self.hello.booted
    return self
end

local boot_keys = {
    root = 1, hostname = 1, hosts = 1, resolv = 1, clock = 1, entropy = 1, mounts = 1,
    grace = 1, discard = 1, nets = 1, timeout = 1, nowait = 1,
}

local function boot_fields(opts)
    local root = wire.roots[opts.root or "auto"]
    if not root then
        error("agent:boot: unknown root mode '" .. tostring(opts.root) .. "'", 3)
    end
    local seconds, micros = uv.gettimeofday()
    local parts = {
        wire.field_u32(1, root),
        wire.field(5, string.pack("<i8", opts.clock or (seconds * 1000000 + micros) * 1000)),
        wire.field(6, opts.entropy or uv.random(32)),
        wire.field_u32(9, opts.discard and 1 or 0),
    }
    for i, key in ipairs({ "hostname", "hosts", "resolv" }) do
        if opts[key] then
            parts[#parts + 1] = wire.field(i + 1, opts[key])
        end
    end
    if opts.grace then
        parts[#parts + 1] = wire.field_u32(8, math.floor(opts.grace * 1000))
    end
    for _, n in ipairs(opts.nets or {}) do
        wire.check_keys("net", n, { mac = 1, mtu = 1, ip4 = 1, gw4 = 1, ip6 = 1, gw6 = 1 })
        local mac = n.mac:gsub("%x%x:?", function(byte)
            return string.char(tonumber(byte:sub(1, 2), 16))
        end)
        parts[#parts + 1] = wire.field(16, string.pack("<c6I4zzzz", mac, n.mtu or 0,
            n.ip4 or "", n.gw4 or "", n.ip6 or "", n.gw6 or ""))
    end
    for _, m in ipairs(opts.mounts or {}) do
        wire.check_keys("mount", m, { type = 1, source = 1, target = 1, options = 1 })
        parts[#parts + 1] = wire.field(7, table.concat({
            m.type or "", m.source or "", m.target, m.options or "",
        }, "\0"))
    end
    return table.concat(parts)
end

--- Set the guest up: root file system, host name, clock, mounts. With `nowait`
--- it only sends; the requests that follow fail if it does. Yields.
---@async
---@param opts table root, hostname, hosts, resolv, clock (ns), entropy, mounts (list of
--- {type, source, target, options}), nets (list of {mac, mtu, ip4 = "a/n", gw4, ip6, gw6}), grace (s), discard, timeout (s), nowait
---@return table? marks, string? err, table? failure
function Agent:boot(opts)
    wire.check_keys("agent:boot", opts, boot_keys)
    if self.dead then
        return nil, self.dead
    end
    if self.booted then
        return nil, "boot: asked for already"
    end
    self.booted = "asked"
    local ok, err = self:request(wire.BOOT, 0, boot_fields(opts))
    if not ok or opts.nowait then
        return ok and self.marks, err
    end
    ok, err = wait_for(self, function()
        return self.booted ~= "asked"
    end, opts.timeout)
    if not ok then
        return nil, err
    end
    if not self.booted then
        return nil, "boot: " .. self.boot_failure.message, self.boot_failure
    end
    return self.marks
end

local resume_keys = {
    hostname = 1, hosts = 1, resolv = 1, clock = 1, entropy = 1, machine_id = 1, timeout = 1,
}

--- Tell a copy of a machine, which has dialled again, who it is: the wall clock
--- (now, unless given in ns), fresh randomness, names. Yields.
---@async
---@param opts table hostname, hosts, resolv, clock (ns), entropy, machine_id (32 hex digits), timeout (s)
---@return true? ok, string? err, table? failure
function Agent:resume(opts)
    wire.check_keys("agent:resume", opts, resume_keys)
    if self.dead then
        return nil, self.dead
    elseif self.booted ~= true then
        return nil, "resume: the guest was never set up"
    end
    local seconds, micros = uv.gettimeofday()
    local parts = {
        wire.field(5, string.pack("<i8", opts.clock or (seconds * 1000000 + micros) * 1000)),
        wire.field(6, opts.entropy or uv.random(32)),
    }
    for tag, key in pairs { [2] = "hostname", [3] = "hosts", [4] = "resolv", [10] = "machine_id" } do
        if opts[key] then
            parts[#parts + 1] = wire.field(tag, opts[key])
        end
    end
    self.booted = "asked"
    local ok, err = self:request(wire.RESUME, 0, table.concat(parts))
    if not ok then
        return nil, err
    end
    ok, err = wait_for(self, function()
        return self.booted ~= "asked"
    end, opts.timeout)
    if not ok then
        return nil, err
    elseif not self.booted then
        return nil, "resume: " .. self.boot_failure.message, self.boot_failure
    end
    return true
end

--- Have every process in the guest stand still, before the machine is saved. It is
--- nil and why where that cannot be: an agent of an older time, a kernel without
--- cgroups, a process that is stuck; then everything runs on. Yields.
---@async
---@param timeout number? seconds
---@return true? ok, string? err
function Agent:freeze(timeout)
    if self.dead then
        return nil, self.dead
    elseif self.hello.version < 2 then
        return nil, "freeze: the guest's agent is older than that"
    elseif self.frozen then
        return nil, "freeze: it is frozen"
    end
    self.frozen = "asked"
    self:send(wire.FREEZE, 0, 0, "")
    local ok, err = wait_for(self, function()
        return self.frozen ~= "asked"
    end, timeout)
    if not ok then
        self:thaw()
        self.frozen = "late" -- its answer may come yet
        return nil, err
    elseif not self.frozen then
        return nil, "freeze: " .. self.freeze_failure
    end
    return true
end

--- Let them go on.
function Agent:thaw()
    self.frozen = nil
    self:send(wire.THAW, 0, 0, "")
end

--- A round trip; seconds it took. Yields.
---@async
---@param timeout number?
---@return number? seconds, string? err
function Agent:ping(timeout)
    if self.dead then
        return nil, self.dead
    end
    local began = loop.now()
    local ping = { token = string.pack("<d", began) }
    self.pings[#self.pings + 1] = ping
    self:send(wire.PING, 0, 0, ping.token)
    local ok, err = wait_for(self, function()
        return ping.done
    end, timeout)
    return ok and loop.now() - began, err
end

--- Set the guest's wall clock, to now unless given in ns.
---@param realtime_ns integer?
function Agent:set_clock(realtime_ns)
    local seconds, micros = uv.gettimeofday()
    self:send(wire.CLOCK, 0, 0,
        string.pack("<i8", realtime_ns or (seconds * 1000000 + micros) * 1000))
end

--- Ask the machine to end: stop signal, `grace` seconds (10), SIGKILL,
--- GOODBYE. It returns at once; `wait_goodbye` waits.
---@param opts? { reboot: boolean?, grace: number?, signal: string|integer|nil }
function Agent:shutdown(opts)
    opts = opts or {}
    wire.check_keys("agent:shutdown", opts, { reboot = 1, grace = 1, signal = 1 })
    self:send(wire.SHUTDOWN, 0, 0, string.pack("<I4I4I4", opts.reboot and 2 or 1,
        math.floor((opts.grace or 10) * 1000),
        opts.signal and wire.signal_number(opts.signal) or 0))
end

--- Wait until the agent says that the machine ends: { reason, code, text }.
--- Yields.
---@async
---@param timeout number?
---@return table? bye, string? err
function Agent:wait_goodbye(timeout)
    local ok, err = wait_for(self, function()
        return self.bye
    end, timeout)
    if not ok then
        return nil, err
    end
    return self.bye
end

-- exec, spawn, write_file and read_file live in their own modules.
function Agent:exec(opts)
    return require("sm.exec").exec(self, opts)
end

function Agent:spawn(opts)
    return require("sm.exec").spawn(self, opts)
end

function Agent:write_file(path, data, opts)
    return require("sm.guest_files").write(self, path, data, opts)
end

function Agent:read_file(path, opts)
    return require("sm.guest_files").read(self, path, opts)
end

return M
