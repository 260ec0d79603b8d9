-- SPDX-License-Identifier: Apache-2.0
--
-- The traffic of a VM, on demand: sm-net writes it into a file that is opened here, or
-- into a socket that is read here.

local files = require "sm.files"
local loop = require "sm.loop"
local socket = require "sm.socket"
local uv = require "luv"

local M = {}

---@class sm.Capture
local Capture = {}
Capture.__index = Capture
Capture.__name = "sm.Capture"

local function wake(self)
    local waiting = self.waiting
    self.waiting = nil
    if waiting then
        waiting(true)
    end
end

-- Reading stops while nobody takes what was read: then sm-net leaves frames out.
local function listen(self)
    self.stream:read_start(loop.guard(function(_, chunk)
        self.pieces[#self.pieces + 1] = chunk
        self.ended = not chunk
        if self.ended or #self.pieces > 16 then
            self.stream:read_stop()
            self.stopped = true
        end
        wake(self)
    end))
    self.stopped = false
end

--- The next piece of a pcap file; nil at the end: the VM has ended, or the capture was
--- closed. Of a capture without a path. Yields.
---@async
---@return string? piece
function Capture:read()
    while self.stream do
        local piece = table.remove(self.pieces, 1)
        if piece then
            return piece
        elseif self.ended or self.closed then
            return nil
        elseif self.stopped then
            listen(self)
        end
        loop.await(function(settle)
            self.waiting = settle
        end)
    end
end

local function let_go(self)
    self.closed = true
    if self.stream then
        self.stream:close()
    end
    wake(self)
end

--- End it; how many frames it had to leave out. Idempotent. Yields.
---@async
---@return integer? lost
function Capture:close()
    if not self.closed then
        self.closed = true
        self.lost = self.network:end_capture(self.card, self.id)
        let_go(self)
    end
    return self.lost
end

-- Also of a task that is cancelled, which cannot wait for an answer.
function Capture:__close()
    if not self.closed then
        self.network:end_capture(self.card, self.id, true)
        let_go(self)
    end
end

function Capture:__tostring()
    return ("capture of card %d (%s)"):format(self.card, self.closed and "closed" or "open")
end

local function open(self, path)
    if path then
        local fd, why = uv.fs_open(path, "w", tonumber("600", 8))
        return fd, not fd and files.error(path, why) or nil
    end
    local theirs
    self.stream, theirs = socket.pair()
    return self.stream and theirs, not self.stream and theirs or nil
end

--- See VM:capture. Yields.
---@async
---@param network sm.Network
---@param opts { card: integer?, path: string? }
---@return sm.Capture?
---@return string? err
function M.new(network, opts)
    for key in pairs(opts) do
        if key ~= "card" and key ~= "path" then
            return nil, ("capture: unknown key '%s' (known: card, path)"):format(tostring(key))
        end
    end
    local self = setmetatable({ network = network, card = opts.card or 1, pieces = {} }, Capture)
    local fd, err = open(self, opts.path)
    if not fd then
        return nil, "capture: " .. err
    end
    self.id, err = network:capture(self.card, fd)
    uv.fs_close(fd)
    if not self.id then
        if self.stream then
            self.stream:close()
        end
        return nil, err
    end
    if self.stream then
        listen(self)
    end
    return self
end

return M
