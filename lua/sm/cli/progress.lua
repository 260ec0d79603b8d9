-- SPDX-License-Identifier: Apache-2.0
--
-- Progress of a pull: a bar per layer on a terminal, a line per finished layer
-- elsewhere, a JSON object per event for programs, nothing when quiet. On
-- stderr, so that stdout stays the workload's. Fed with the events of
-- `image.pull`.

local uv = require "luv"
local json = require "sm.json"

local M = {}

local Progress = {}
Progress.__index = Progress

--- 1536 → "1.5 KiB".
---@param bytes number
---@return string
function M.human(bytes)
    local units = { "B", "KiB", "MiB", "GiB", "TiB" }
    local i = 1
    while bytes >= 1024 and i < #units do
        bytes, i = bytes / 1024, i + 1
    end
    return (i == 1 and "%d %s" or "%.1f %s"):format(i == 1 and math.floor(bytes) or bytes, units[i])
end

--- The flag that commands with progress have.
M.FLAG = { "progress", nil, "HOW", "auto (default), plain, json (an object per line) or none, on stderr",
    kind = "string" }

local HOW = { auto = true, plain = true, json = true, none = true }

---@param opts { quiet: boolean?, progress: string? }
---@return table? progress
---@return string? err
function M.new(opts)
    local how = opts.progress or "auto"
    if not HOW[how] then
        return nil, ("--progress %s: expected auto, plain, json or none"):format(how)
    end
    local self = setmetatable({ order = {}, by = {}, drawn = 0 }, Progress)
    self.json, self.plain = how == "json", how == "plain"
    self.quiet = how == "none" or (opts.quiet and not self.json)
    self.tty = how == "auto" and not self.quiet and uv.guess_handle(2) == "tty"
    return self
end

-- What an event says, without the documents that hang on it.
local function json_line(e)
    local out = {}
    for k, v in pairs(e) do
        if type(v) ~= "table" and type(v) ~= "function" then
            out[k] = v
        end
    end
    return json.encode(out) .. "\n"
end

local function short(digest)
    return (digest:gsub("^%w+:", "")):sub(1, 12)
end

local function bar(now, total, width)
    local full = total > 0 and math.min(width, math.floor(now / total * width)) or 0
    return "[" .. ("="):rep(full) .. (" "):rep(width - full) .. "]"
end

local function line(l)
    local what
    if l.phase == "exists" then
        what = "already here"
    elseif l.phase == "done" then
        what = "ready, " .. M.human(l.total or 0)
    elseif l.phase == "mounted" then
        what = "taken from another repository"
    elseif l.phase == "waiting" then
        what = "another process is at it"
    elseif l.phase == "convert" then
        what = "unpacking " .. M.human(l.total or 0)
    else
        what = ("%s %s / %s"):format(bar(l.now or 0, l.total or 0, 30), M.human(l.now or 0), M.human(l.total or 0))
    end
    return ("%s  %s"):format(short(l.digest), what)
end

function Progress:draw()
    local now = uv.hrtime()
    if self.last and now - self.last < 5e7 and not self.final then
        return
    end
    self.last = now
    local out = {}
    if self.drawn > 0 then
        out[#out + 1] = ("\27[%dA"):format(self.drawn)
    end
    for _, l in ipairs(self.order) do
        out[#out + 1] = "\r\27[K" .. line(l) .. "\n"
    end
    self.drawn = #self.order
    io.stderr:write(table.concat(out))
    io.stderr:flush()
end

local FINAL = { done = true, exists = true, mounted = true }

--- One event of image.pull.
function Progress:event(e)
    if self.quiet then
        return
    elseif self.json then
        io.stderr:write(json_line(e))
        io.stderr:flush()
        return
    elseif self.tty and (e.type == "unpack" or e.type == "pack") then
        io.stderr:write(("%s %s\n"):format(e.type == "pack" and "packing" or "reading", e.file or e.dir))
        self.drawn = 0
        return
    elseif e.type == "retry" then
        io.stderr:write(e.place and ("%s; trying %s\n"):format(e.reason, e.place)
            or ("%s; trying again in %g s\n"):format(e.reason, e.delay))
        self.drawn = 0
        return
    elseif e.type ~= "layer" then
        return
    end
    local l = self.by[e.digest]
    if not l then
        l = { digest = e.digest }
        self.by[e.digest] = l
        self.order[#self.order + 1] = l
    end
    local finished = FINAL[e.phase] and not FINAL[l.phase]
    if FINAL[l.phase] then
        return
    end
    l.phase = e.phase
    l.now = e.now or l.now
    l.total = e.total or l.total
    if self.tty then
        self.final = finished
        self:draw()
    elseif finished then
        io.stderr:write(line(l), "\n")
    end
end

--- For what is one long thing: a function that is told how far it is, in bytes. Its end
--- alone is worth no line, unless they were asked for.
---@param name string
---@return fun(done: integer, total: integer)?
function Progress:meter(name)
    if not self.tty and not self.json and not self.plain then
        return nil
    end
    return function(done, total)
        self:event { type = "layer", digest = name, phase = done < total and "read" or "done", now = done, total = total }
    end
end

--- After the last event.
function Progress:finish()
    if self.tty and #self.order > 0 then
        self.final = true
        self:draw()
    end
end

return M
