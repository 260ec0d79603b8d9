-- SPDX-License-Identifier: Apache-2.0
--
-- A connected stream socket on the loop, with the methods of a luv stream.
--
-- Why not luv's own: libuv writes without MSG_NOSIGNAL, so a peer that hung up
-- raises SIGPIPE, and what becomes of that signal is the host program's
-- business, not ours. So a luv pipe reads, and bytes go out through sm.core's
-- send. A peer that hung up is an error to the writer's callback and the end to
-- the reader's.
--
-- Threads: the loop's.

local uv = require "luv"
local core = require "sm.core"
local loop = require "sm.loop"

local M = {}

---@class sm.Socket
---@field package pipe userdata
---@field package queue table
local Socket = {}
Socket.__index = Socket
Socket.__name = "sm.Socket"

local function pop(self)
    local item = self.queue[self.first]
    self.queue[self.first] = nil
    self.first = self.first + 1
    self.queued = self.queued - (#item.bytes - item.at + 1)
    return item
end

-- Hand over what is queued. True when all of it went, or never will.
local function flush(self)
    while self.first <= self.last and not self.broken do
        local item = self.queue[self.first]
        while item.at <= #item.bytes do
            local n, err = core.send(self.pipe:fileno(), item.bytes, item.at)
            if not n and err == "again" then
                return false
            elseif not n then
                self.broken = err
                break
            end
            item.at = item.at + n
            self.queued = self.queued - n
        end
        if self.broken then
            break
        end
        pop(self)
        if item.done then
            item.done()
        end
    end
    while self.first <= self.last do
        local item = pop(self)
        if item.done then
            item.done(self.broken or "closed")
        end
    end
    return true
end

local function stop_waiting(self)
    if self.poll then
        self.poll:stop()
        self.poll:close()
        uv.fs_close(self.poll_fd)
        self.poll, self.poll_fd = nil, nil
    end
end

-- The socket is full, or a callback must not be called from inside write.
local function wait_until_writable(self)
    if self.poll then
        return
    end
    local fd, err = core.writable(self.pipe:fileno())
    if not fd then
        self.broken = err
        return
    end
    self.poll_fd, self.poll = fd, assert(uv.new_poll(fd))
    self.poll:start("r", loop.guard(function()
        if self.poll and flush(self) then
            stop_waiting(self)
        end
    end))
end

--- Take a connected socket: a descriptor or a luv pipe, which belongs to the
--- object from now on.
---@param stream integer|userdata
---@return sm.Socket?
---@return string? err
function M.new(stream)
    local pipe = stream
    if type(stream) == "number" then
        pipe = uv.new_pipe(false)
        local ok, err = pipe:open(stream)
        if not ok then
            pipe:close()
            return nil, err
        end
    end
    return setmetatable({ pipe = pipe, queue = {}, first = 1, last = 0, queued = 0 }, Socket)
end

--- Two connected sockets: ours, and a descriptor for somebody else.
---@return sm.Socket? ours
---@return integer|string theirs, or why
function M.pair()
    local pair, err = uv.socketpair("stream", nil, { nonblock = true }, {})
    if not pair then
        return nil, err
    end
    return assert(M.new(pair[1])), pair[2]
end

--- Send bytes (a string or a list of strings) behind those queued; `done(err)`
--- is called when the kernel has them, or never will.
---@param bytes string|table
---@param done fun(err: string?)?
---@return true?
---@return string? err
function Socket:write(bytes, done)
    if self.pipe:is_closing() then
        return nil, "closed"
    elseif self.broken then
        return nil, self.broken
    end
    if type(bytes) == "table" then
        local parts = {}
        for i, part in ipairs(bytes) do
            parts[i] = type(part) == "table" and table.concat(part) or part
        end
        bytes = table.concat(parts)
    end
    self.last = self.last + 1
    self.queue[self.last] = { bytes = bytes, at = 1, done = done }
    self.queued = self.queued + #bytes
    if done or self.poll or not flush(self) then
        wait_until_writable(self)
    end
    return true
end

--- Send bytes with a descriptor, which stays ours. What was queued before goes first.
--- Yields.
---@async
---@param bytes string
---@param fd integer
---@return true?
---@return string? err
---@return integer? errno
function Socket:write_with(bytes, fd)
    while not self:is_closing() do
        if self.queued == 0 then
            local n, err, errno = core.send_fd(self:fileno(), fd, bytes)
            if n then
                if n < #bytes then
                    self:write(bytes:sub(n + 1))
                end
                return true
            elseif errno ~= 11 then -- EAGAIN
                return nil, err, errno
            end
        end
        loop.sleep(0.002)
    end
    return true -- the end of the socket says so
end

--- Bytes not yet taken by the kernel.
---@return integer
function Socket:get_write_queue_size()
    return self.queued
end

--- Call `on_read(err, bytes)` for what comes; both nil at the end.
---@param on_read fun(err: string?, bytes: string?)
function Socket:read_start(on_read)
    return self.pipe:read_start(on_read)
end

function Socket:read_stop()
    return self.pipe:read_stop()
end

---@return boolean
function Socket:is_closing()
    return self.pipe:is_closing()
end

function Socket:ref()
    self.pipe:ref()
end

function Socket:unref()
    self.pipe:unref()
end

---@return integer?
function Socket:fileno()
    return self.pipe:fileno()
end

--- Close it; what is queued is lost, callbacks hear of it. Idempotent.
function Socket:close()
    if self.pipe:is_closing() then
        return
    end
    stop_waiting(self)
    self.pipe:close()
    self.broken = self.broken or "closed"
    flush(self)
end
Socket.__close = Socket.close

function Socket:__tostring()
    return ("socket (%s)"):format(self.pipe:is_closing() and "closed" or self.pipe:fileno())
end

return M
