-- SPDX-License-Identifier: Apache-2.0
--
-- Where a process answers others: a socket of mode 0600 in its folder of mode 0700, and
-- a table of verbs. Each request is a task. A client that misbehaves loses its
-- connection, one that goes away has its requests cancelled; the owner does not notice
-- either.
--
-- Threads: the loop's.

local uv = require "luv"
local control = require "sm.control"
local loop = require "sm.loop"
local socket = require "sm.socket"

local M = {}

local CLIENTS_MAX = 128
local LAST_WORDS_SECONDS = 2 -- for answers under way when it is closed

---@class sm.Endpoint
local Endpoint = {}
Endpoint.__index = Endpoint

--- An argument of a request; an error to its sender if it is not of that type.
---@param args any
---@param key string
---@param kind string
function M.need(args, key, kind)
    local value = type(args) == "table" and args[key] or nil
    if type(value) ~= kind then
        error(("%s: expected a %s, got %s"):format(key, kind, type(value)), 0)
    end
    return value
end

-- One request: the verb's results are the answer, its error too.
local function serve(self, chan, args)
    local verb = self.verbs[chan.verb]
    if not verb then
        chan:done(false, ("no such request: '%s'"):format(chan.verb:sub(1, 40)))
        return
    elseif type(args) ~= "table" then
        chan:done(false, "expected a table of arguments")
        return
    end
    local task
    task = loop.spawn(function()
        local ok, result, err, detail = xpcall(verb, function(e)
            return type(e) == "string" and e or tostring(e)
        end, self.owner, chan, args)
        if not ok then
            chan:done(false, result)
        elseif result == nil or result == false then
            chan:done(false, err or "failed", type(detail) == "table" and detail or nil)
        else
            chan:done(true, result)
        end
    end)
    chan.on_over = function()
        if not task:finished() and loop.current() ~= task then
            task:cancel()
        end
    end
end

local function accept(self, listener)
    local pipe = uv.new_pipe(false)
    if not listener:accept(pipe) or self.client_count >= CLIENTS_MAX then
        pipe:close()
        return
    end
    local stream = socket.new(pipe)
    if not stream then
        return
    end
    local client = control.new(stream, function(chan, args)
        serve(self, chan, args)
    end)
    self.clients[client] = true
    self.client_count = self.client_count + 1
    client.on_close = function()
        self.clients[client] = nil
        self.client_count = self.client_count - 1
    end
end

--- Answer at a path: verbs[name](owner, chan, arguments) → result, or nil and why.
---@param path string
---@param owner any
---@param verbs table<string, fun(owner: any, chan: sm.ControlChannel, args: table): any, string?, table?>
---@return sm.Endpoint?
---@return string? err
function M.listen(path, owner, verbs)
    local self = setmetatable({ owner = owner, verbs = verbs, clients = {}, client_count = 0 }, Endpoint)
    local listener = assert(uv.new_pipe(false))
    local ok, err = listener:bind(path)
    if not ok then
        listener:close()
        return nil, err
    end
    uv.fs_chmod(path, tonumber("600", 8))
    listener:listen(16, loop.guard(function(listen_err)
        if not listen_err then
            accept(self, listener)
        end
    end))
    listener:unref()
    self.listener = listener
    return self
end

local function idle(self)
    for client in pairs(self.clients) do
        if client.open_count > 0 or client.stream:get_write_queue_size() > 0 then
            return false
        end
    end
    return true
end

--- Stop answering, once the answers under way are out; what is still asked then fails
--- with `why`. Idempotent. Yields.
---@async
---@param why string
function Endpoint:close(why)
    if self.closed then
        return
    end
    self.closed = true
    if not self.listener:is_closing() then
        self.listener:close()
    end
    local deadline = loop.now() + LAST_WORDS_SECONDS
    while not idle(self) and loop.now() < deadline do
        loop.sleep(0.005)
    end
    for client in pairs(self.clients) do
        client:close(why)
    end
end

return M
