-- SPDX-License-Identifier: Apache-2.0
--
-- The other side of a guest's network in specs: small servers in this process
-- (they run while the spec waits for the guest), a DNS server that knows what
-- it is told, and a reader of captures.

local loop = require "sm.loop"
local uv = require "luv"

local M = {}

local open = {}

local function keep(handle)
    open[#open + 1] = handle
    return handle
end

--- Close every server and connection.
function M.close()
    for _, handle in ipairs(open) do
        if not handle:is_closing() then
            handle:close()
        end
    end
    open = {}
    uv.run "nowait" -- luv 1.44 does not bear an exit with one half closed
end

--- Close the newest handle: a port that was free a moment ago.
function M.close_last()
    table.remove(open):close()
end

--- A TCP server; `on_client(client)` for each, a luv stream. Its port.
---@param addr string
---@param on_client fun(client: userdata)
---@param backlog integer?
---@return integer port
function M.tcp(addr, on_client, backlog)
    local server = keep(uv.new_tcp())
    assert(server:bind(addr, 0))
    assert(server:listen(backlog or 511, loop.guard(function(err)
        assert(not err, err)
        local client = keep(uv.new_tcp())
        server:accept(client)
        on_client(client)
    end)))
    return server:getsockname().port
end

--- A TCP port whose queue is full and never taken from: who connects hears nothing.
---@param addr string
---@return integer port
function M.mute(addr)
    local server = keep(uv.new_tcp())
    assert(server:bind(addr, 0))
    assert(server:listen(0, function() end)) -- libuv takes one and then no more
    local port = server:getsockname().port
    for _ = 1, 4 do
        keep(uv.new_tcp()):connect(addr, port, function() end)
    end
    return port
end

--- Collect what a client sends; `done(data)` at its end of file.
function M.collect(client, done)
    local parts = {}
    client:read_start(loop.guard(function(err, chunk)
        if chunk then
            parts[#parts + 1] = chunk
        else
            done(table.concat(parts), err)
        end
    end))
end

--- Write and close behind it.
function M.reply(client, data)
    client:write(data, loop.guard(function()
        if not client:is_closing() then
            client:close()
        end
    end))
end

--- A UDP server: `answer(data)` gives the reply or nil. Its port.
---@param addr string
---@param answer fun(data: string): string?
---@param port integer? any
---@return integer port
function M.udp(addr, answer, port)
    local server = keep(uv.new_udp())
    assert(server:bind(addr, port or 0))
    server:recv_start(loop.guard(function(err, data, from)
        if not err and data and from then
            local out = answer(data)
            if out then
                server:send(out, from.ip, from.port, function() end)
            end
        end
    end))
    return server:getsockname().port
end

local function name_at(msg, at)
    local labels = {}
    while true do
        local len = msg:byte(at)
        if len == 0 then
            return table.concat(labels, "."), at + 1
        end
        labels[#labels + 1] = msg:sub(at + 1, at + len)
        at = at + 1 + len
    end
end

--- A DNS server for A records: names → "1.2.3.4", or a list of which each question
--- takes one until the last is left. Returns "ADDRESS:PORT" and the names asked for.
---@param names table<string, string|string[]>
---@param place { addr: string?, port: integer?, ttl: integer? }? 127.0.0.1, any, 5 s
---@return string server
---@return string[] asked
function M.dns(names, place)
    local asked = {}
    place = place or {}
    local host = place.addr or "127.0.0.1"
    local port = M.udp(host, function(msg)
        local name, at = name_at(msg, 13)
        local kind = string.unpack(">I2", msg, at)
        local addr = kind == 1 and names[name]
        if type(addr) == "table" then
            addr = #addr > 1 and table.remove(addr, 1) or addr[1]
        end
        asked[#asked + 1] = name
        local known = names[name] ~= nil
        local answer = ""
        if addr then
            local a, b, c, d = addr:match "(%d+)%.(%d+)%.(%d+)%.(%d+)"
            answer = string.pack(">I2I2I2I4I2BBBB", 0xc00c, 1, 1, place.ttl or 5, 4, a, b, c, d)
        end
        return msg:sub(1, 2) .. string.pack(">I2I2I2I2I2", known and 0x8180 or 0x8183, 1, addr and 1 or 0, 0, 0)
            .. msg:sub(13, at + 3) .. answer
    end, place.port)
    return host .. ":" .. port, asked
end

--- Whether something listens on a TCP port of this machine's IPv4.
---@param port integer
function M.listens(port)
    for line in io.lines("/proc/net/tcp") do
        if line:find((":%04X 00000000:0000 0A"):format(port), 1, true) then
            return true
        end
    end
    return false
end

--- Connect to a port of this machine, send, and wait for all that comes back.
--- Yields.
---@async
---@param addr string
---@param port integer
---@param data string?
---@param timeout number
---@return string? received
---@return string? err
function M.ask(addr, port, data, timeout)
    return loop.await(function(settle)
        local client = keep(uv.new_tcp())
        client:connect(addr, port, loop.guard(function(err)
            if err then
                return settle(nil, err)
            end
            local parts = {}
            client:read_start(loop.guard(function(read_err, chunk)
                if chunk then
                    parts[#parts + 1] = chunk
                else
                    settle(table.concat(parts), read_err)
                end
            end))
            if data then
                client:write(data)
            end
        end))
        return function()
            if not client:is_closing() then
                client:close()
            end
        end
    end, timeout)
end

--- The frames of a capture: { dst = "1.2.3.4", proto =, data = } for IPv4.
---@param path string
---@return table[]
function M.capture(path)
    local f = assert(io.open(path, "rb"))
    local text = f:read "a"
    f:close()
    assert(string.unpack("<I4", text) == 0xa1b23c4d, "no capture")
    local out, at = {}, 25
    while at + 16 <= #text do
        local len = string.unpack("<I4", text, at + 8)
        local frame = text:sub(at + 16, at + 15 + len)
        at = at + 16 + len
        local e = { data = frame, type = string.unpack(">I2", frame, 13) }
        if e.type == 0x0800 then
            e.proto = frame:byte(24)
            e.src = ("%d.%d.%d.%d"):format(frame:byte(27, 30))
            e.dst = ("%d.%d.%d.%d"):format(frame:byte(31, 34))
        end
        out[#out + 1] = e
    end
    return out
end

return M
