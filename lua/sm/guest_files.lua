-- SPDX-License-Identifier: Apache-2.0
--
-- Files into and out of the guest, over the agent's connection. A put is sent
-- without waiting for an answer, so commands may be chained to it in the same
-- round trip (sm.exec's `files`).

local agent = require "sm.agent"
local channel = require "sm.channel"
local loop = require "sm.loop"
local wire = require "sm.wire"

local M = {}

local PARENTS, APPEND, EXCL = 1, 2, 4

---@class sm.Put : sm.Channel
local Put = setmetatable({}, { __index = channel.Channel })
Put.__index = Put

local function parse_info(payload)
    if #payload ~= 28 then
        agent.refuse("FILE_INFO of %d bytes", #payload)
    end
    local size, mtime_ns, mode, uid, gid = string.unpack("<i8i8I4I4I4", payload)
    return { size = size, mtime = mtime_ns / 1e9, mode = mode & 0xfff, uid = uid, gid = gid }
end

function Put:frame(kind, payload)
    if kind == wire.STDIN_CREDIT then
        self:granted(payload)
        return
    elseif kind == wire.FILE_INFO and self.eof_sent then
        self.info = parse_info(payload)
    elseif kind == wire.FAILED then
        self.failure = agent.failure(payload)
    else
        agent.refuse("frame type %d for a file being written", kind)
    end
    self.stdin_closed = true
    self.agent:release(self)
    self:wake()
end

local put_keys = {
    mode = 1, uid = 1, gid = 1, parents = 1, append = 1, exclusive = 1,
}

local function put_fields(path, opts)
    local flags = (opts.parents == false and 0 or PARENTS) | (opts.append and APPEND or 0) |
        (opts.exclusive and EXCL or 0)
    local parts = { wire.field(1, path), wire.field_u32(5, flags) }
    for i, key in ipairs({ "mode", "uid", "gid" }) do
        if opts[key] then
            parts[#parts + 1] = wire.field_u32(i + 1, opts[key])
        end
    end
    return table.concat(parts)
end

local function pump(put, data)
    if type(data) == "string" then
        put:send_stdin(data)
    else
        for piece in data do
            if not put:send_stdin(piece) then
                break
            end
        end
    end
    put.eof_sent = true
    put:send_eof()
end

--- Begin to write a file; `data` is a string or a function that returns the
--- next piece or nil. Does not yield; `put:finish()` tells how it went.
---@param a sm.Agent
---@param path string absolute path in the guest
---@param data string|fun(): string?
---@param opts table? mode, uid, gid, parents (true), append, exclusive
---@return sm.Put? put, string? err
function M.put(a, path, data, opts)
    opts = opts or {}
    wire.check_keys("write_file", opts, put_keys)
    if path:sub(1, 1) ~= "/" or path:find("\0", 1, true) then
        error("write_file: '" .. path .. "' is not an absolute path", 3)
    end
    if a.dead then
        return nil, a.dead
    end
    local put = setmetatable(channel.init({ path = path }, a, {}), Put)
    local _, err = a:open(put)
    if err then
        return nil, err
    end
    a:request(wire.FILE_PUT, put.id, put_fields(path, opts))
    if type(data) == "string" and #data <= wire.WINDOW then
        pump(put, data) -- all of it fits the first credit: no wait inside
    else
        loop.spawn(pump, put, data)
    end
    return put
end

--- Wait for the end of a put. Yields.
---@async
---@return table? info, string? err, table? failure
function Put:finish(timeout)
    local ok, err = self:wait_for(function()
        return self.info or self.failure
    end, timeout)
    if not ok then
        return nil, "write_file: " .. err
    end
    if self.failure then
        return nil, "write_file: " .. self.failure.message, self.failure
    end
    return self.info
end

--- Write a file in the guest. Yields.
---@async
---@param a sm.Agent
---@param path string
---@param data string|fun(): string?
---@param opts table? as `put`
---@return table? info { size, mode, uid, gid, mtime }, string? err, table? failure
function M.write(a, path, data, opts)
    local put, err = M.put(a, path, data, opts)
    if not put then
        return nil, err
    end
    return put:finish()
end

---@class sm.Get : sm.Channel
local Get = setmetatable({}, { __index = channel.Channel })
Get.__index = Get

function Get:frame(kind, payload)
    if kind == wire.FILE_INFO and not self.info then
        self.info = parse_info(payload)
    elseif kind == wire.FAILED then
        self.failure = agent.failure(payload)
        self.streams[1].eof = true
        self.credit = {}
        self.agent:release(self)
    else
        agent.refuse("frame type %d for a file being read", kind)
    end
    self:wake()
end

function Get:ended()
    if not self.info then
        agent.refuse("file data before FILE_INFO")
    end
    self.agent:release(self)
end

--- Read a file of the guest: its bytes, or through `sink(piece)` (which may
--- yield) when it is large. `limit` (64 MiB) bounds what is kept in memory.
--- Yields.
---@async
---@param a sm.Agent
---@param path string
---@param opts? { sink: fun(piece: string)?, limit: integer? }
---@return string|true|nil data, string|table err_or_info, table? failure
function M.read(a, path, opts)
    opts = opts or {}
    wire.check_keys("read_file", opts, { sink = 1, limit = 1 })
    if a.dead then
        return nil, a.dead
    end
    local limit = opts.limit or 64 << 20
    local get = setmetatable(channel.init({}, a, { wire.WINDOW }), Get)
    local _, open_err = a:open(get)
    if open_err then
        return nil, open_err
    end
    a:request(wire.FILE_GET, get.id, wire.field(1, path) .. wire.field_u32(6, wire.WINDOW))
    local parts, size = {}, 0
    -- Left early (error in the sink, cancelled task): let the rest run out.
    local _ <close> = setmetatable({}, { __close = function()
        get:discard(1)
    end })
    while true do
        local piece, err = get:next_piece(1)
        if not piece and err then
            return nil, "read_file: " .. err
        elseif not piece then
            break
        elseif opts.sink then
            opts.sink(piece)
        else
            size = size + #piece
            if size > limit then
                return nil, ("read_file: %s: larger than %d bytes"):format(path, limit)
            end
            parts[#parts + 1] = piece
        end
    end
    if get.failure then
        return nil, "read_file: " .. get.failure.message, get.failure
    end
    return opts.sink and true or table.concat(parts), get.info
end

return M
