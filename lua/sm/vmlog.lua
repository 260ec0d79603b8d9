-- SPDX-License-Identifier: Apache-2.0
--
-- What a detached VM's command said, kept beside its sockets until the VM is
-- removed: `log`, and `log.1` before it. A record is a length (u32, little-
-- endian) and a message { microseconds since 1970, 1 stdout | 2 stderr, bytes }.
-- The last 4 to 8 MiB are kept, because the folder may be a tmpfs.
--
-- One process writes; any may read, also after the writer is gone. A follower
-- in the writing process is woken by `changed`.

local uv = require "luv"
local core = require "sm.core"

local M = {}

M.HALF_BYTES = 4 << 20
local RECORD_MAX = 1 << 20

local Writer = {}
Writer.__index = Writer

local function open(path)
    return uv.fs_open(path, "w", tonumber("600", 8))
end

--- Begin a log in a folder.
---@param dir string
---@return table? writer
---@return string? err
function M.new(dir)
    local fd, err = open(dir .. "/log")
    if not fd then
        return nil, err
    end
    return setmetatable({ dir = dir, fd = fd, size = 0, turns = 0 }, Writer)
end

local function rotate(self)
    uv.fs_close(self.fd)
    self.fd = nil
    uv.fs_rename(self.dir .. "/log", self.dir .. "/log.1")
    self.fd = open(self.dir .. "/log")
    self.size, self.turns = 0, self.turns + 1
end

--- Keep a piece. A full disk loses it; the VM goes on.
---@param stream 1|2
---@param bytes string
function Writer:write(stream, bytes)
    local s, us = uv.gettimeofday()
    local record = string.pack("<s4", core.pack { s * 1000000 + us, stream, bytes })
    if self.size + #record > M.HALF_BYTES then
        rotate(self)
    end
    if self.fd then
        uv.fs_write(self.fd, record, -1)
        self.size = self.size + #record
    end
    if self.changed then
        self.changed()
    end
end

function Writer:close()
    if self.fd then
        uv.fs_close(self.fd)
        self.fd = nil
    end
end
Writer.__close = Writer.close

local Reader = {}
Reader.__index = Reader

local function next_file(self)
    local path = table.remove(self.files, 1)
    while path do
        local fd = uv.fs_open(path, "r", 0)
        if fd then
            if self.fd then
                uv.fs_close(self.fd)
            end
            self.fd, self.at = fd, 0
            return true
        end
        path = table.remove(self.files, 1)
    end
end

--- Read a log from its beginning. Closed with :close().
---@param dir string
---@return table reader
function M.reader(dir)
    local self = setmetatable({ dir = dir, files = { dir .. "/log.1", dir .. "/log" }, at = 0 }, Reader)
    next_file(self)
    return self
end

local function record_at(fd, at)
    local head = uv.fs_read(fd, 4, at)
    if not head or #head < 4 then
        return nil
    end
    local len = string.unpack("<I4", head)
    if len > RECORD_MAX then
        return nil
    end
    local body = uv.fs_read(fd, len, at + 4)
    if not body or #body < len then
        return nil -- being written
    end
    local record = core.unpack(body)
    if type(record) ~= "table" or type(record[3]) ~= "string" then
        return nil
    end
    return record, at + 4 + len
end

-- The writer put a new file in place of the one we read: go on with it.
local function follow_rotation(self)
    local held, named = uv.fs_fstat(self.fd), uv.fs_stat(self.dir .. "/log")
    if held and named and held.ino ~= named.ino then
        self.files = { self.dir .. "/log" }
        return next_file(self)
    end
end

--- The next record { microseconds, stream, bytes }; nil when there is none yet.
---@return table?
function Reader:next()
    while self.fd do
        local record, after = record_at(self.fd, self.at)
        if record then
            self.at = after
            return record
        elseif self.files[1] and not next_file(self) or not self.files[1] and not follow_rotation(self) then
            return nil
        end
    end
end

--- Go behind what is there; the number of records passed.
function Reader:skip()
    local n = 0
    while self:next() do
        n = n + 1
    end
    return n
end

function Reader:close()
    if self.fd then
        uv.fs_close(self.fd)
        self.fd = nil
    end
end
Reader.__close = Reader.close

return M
