-- SPDX-License-Identifier: Apache-2.0
--
-- The proxy to an `sm-net` process (core/net/main.c): requests, their answers,
-- events. A call sends and waits; the process ends when its socket does. The
-- proxy keeps the loop alive only while somebody waits for it.

local child = require "sm.child"
local core = require "sm.core"
local loop = require "sm.loop"
local paths = require "sm.paths"
local socket = require "sm.socket"
local uv = require "luv"

local M = {}

-- The fake backend's module lies below the real one's.
local PLACES = { "/sm-net", "/../sm-net" }

---@class sm.Netd
local Netd = {}
Netd.__index = Netd
Netd.__name = "sm.Netd"

local function end_all(self, why)
    if self.over then
        return
    end
    self.over = why
    if not self.pipe:is_closing() then
        self.pipe:close()
    end
    local pending = self.pending
    self.pending = {}
    for _, settle in pairs(pending) do
        settle(nil)
    end
    if self.on_end and not self.closed then
        self.on_end(why)
    end
end

local function receive(self, chunk)
    local input, at = self.input .. chunk, 1
    while #input - at + 1 >= 4 do
        local len = string.unpack("<I4", input, at)
        if #input - at + 1 < 4 + len then
            break
        end
        local message = core.unpack(input:sub(at + 4, at + 3 + len))
        if type(message) ~= "table" then
            end_all(self, "the network process sent nonsense")
            return
        end
        at = at + 4 + len
        if message[1] == 0 then
            if self.on_event then
                self.on_event(message[2])
            end
        else
            local settle = self.pending[message[1]]
            self.pending[message[1]] = nil
            if settle then
                settle(message)
            end
        end
    end
    self.input = input:sub(at)
end

--- Make a request and wait for its answer. Yields.
---@async
---@param name string
---@param args table?
---@param fd integer? goes along, and stays ours
---@return any result
---@return string? err
function Netd:call(name, args, fd)
    if self.over then
        return nil, "network: " .. self.over
    end
    self.next_id = self.next_id + 1
    local id = self.next_id
    local frame = string.pack("<s4", core.pack { id, name, args or {} })
    self.pipe:ref()
    self.waits = self.waits + 1
    if fd then
        self.pipe:write_with(frame, fd)
    end
    local reply = loop.await(function(settle)
        self.pending[id] = settle
        if not fd then
            self.pipe:write(frame)
        end
        return function()
            self.pending[id] = nil
        end
    end)
    self.waits = self.waits - 1
    if self.waits == 0 and not self.pipe:is_closing() then
        self.pipe:unref()
    end
    if not reply then
        return nil, "network: " .. (self.over or "cancelled")
    elseif not reply[2] then
        return nil, "network: " .. reply[3], reply[4]
    end
    return reply[3]
end

--- Send a request whose answer nobody waits for.
function Netd:post(name, args)
    if not self.over then
        self.next_id = self.next_id + 1
        self.pipe:write(string.pack("<s4", core.pack { self.next_id, name, args or {} }))
    end
end

--- End the process and wait until it is gone. Idempotent. Yields.
---@async
function Netd:close()
    if self.closed then
        return
    end
    self.closed = true
    end_all(self, "closed")
    if self.exited or not self.process then
        return
    end
    local task = loop.current()
    if not task and uv.loop_mode() then
        return
    end
    self.process:ref()
    local _, why = loop.await(function(settle)
        self.on_exit = settle
    end, 10)
    if why == "timeout" then
        self.process:kill("sigkill")
    end
end

Netd.__close = Netd.close

--- Start a network process.
---@param opts { name: string?, on_event: fun(event: table)?, on_end: fun(why: string)? }
---@return sm.Netd?
---@return string? err
function M.spawn(opts)
    local path, err = paths.ours("SM_NET", "sm-net", PLACES)
    if not path then
        return nil, err
    end
    local pipe, theirs = socket.pair()
    if not pipe then
        return nil, theirs
    end
    local self = setmetatable({
        pipe = pipe, pending = {}, input = "", next_id = 0, waits = 0,
        on_event = opts.on_event, on_end = opts.on_end,
    }, Netd)
    local pid
    self.process, pid = child.spawn(path, {
        args = { opts.name or "vm" },
        stdio = { nil, nil, 2, theirs },
        detached = true,
    }, loop.guard(function(code, signal)
        self.exited = true
        self.process:close()
        end_all(self, signal ~= 0 and ("the network process was killed by signal %d"):format(signal)
            or ("the network process exited with status %d"):format(code))
        if self.on_exit then
            self.on_exit(true)
        end
    end))
    uv.fs_close(theirs)
    if not self.process then
        self.pipe:close()
        return nil, ("%s: %s"):format(path, pid)
    end
    self.pid = pid
    self.pipe:read_start(loop.guard(function(_, chunk)
        if chunk then
            receive(self, chunk)
        else
            end_all(self, "the network process went away")
        end
    end))
    self.pipe:unref()
    self.process:unref()
    return self
end

return M
