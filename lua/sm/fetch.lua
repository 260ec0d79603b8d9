-- SPDX-License-Identifier: Apache-2.0
--
-- HTTP exchanges for tasks: the C fetcher (libcurl multi, in sm.image_core)
-- behind calls that wait. One exchange is one request and one answer; what to
-- do about redirects, 401s and failures is the registry client's business.
--
-- The fetcher's descriptor is polled only while an exchange is under way, so
-- an idle one keeps no loop alive.

local uv = require "luv"
local loop = require "sm.loop"

local M = {}

---@class sm.Response
---@field status integer
---@field headers string[][] {name, value} in the order they came
---@field body string? of a memory sink
---@field bytes integer length of the body
---@field digest string? of a file sink, "sha256:…"

---@class sm.Fetch
local Fetch = {}
Fetch.__index = Fetch
Fetch.__name = "sm.Fetch"

local function close_poll(self)
    if self.poll then
        self.poll:stop()
        self.poll:close()
        self.poll = nil
    end
end

local function drain(self)
    while true do
        local result = self.fetcher:next()
        if not result then
            break
        end
        local settle = self.waiting[result.id]
        self.waiting[result.id] = nil
        if settle then
            settle(result)
        end
    end
    if next(self.waiting) == nil then
        close_poll(self)
    end
end

local function watch(self)
    if not self.poll then
        self.poll = assert(uv.new_poll(self.fetcher:pollfd()))
        self.poll:start("r", loop.guard(function()
            drain(self)
        end))
    end
end

--- opts: parallel (4), user_agent, core (a stand-in for sm.image_core).
---@param opts table?
---@return sm.Fetch
function M.open(opts)
    opts = opts or {}
    local core = opts.core or require "sm.image_core"
    return setmetatable({
        fetcher = assert(core.fetcher {
            parallel = opts.parallel or 4,
            user_agent = opts.user_agent or "sm",
        }),
        waiting = {},
    }, Fetch)
end

--- One exchange; the request is the C fetcher's. `watching(id)` is called once
--- it has begun, for `progress`. Returns the response, or nil, one line and
--- {code (libcurl's), transient (another try may help)}. Yields.
---@async
---@param request table
---@param watching? fun(id: integer)
---@return sm.Response?
---@return string? error
---@return {code: integer?, transient: boolean?}? failure
function Fetch:exchange(request, watching)
    local result = loop.await(function(settle)
        local id, why = self.fetcher:submit(request)
        if not id then
            settle { error = why }
            return
        end
        self.waiting[id] = settle
        watch(self)
        if watching then
            watching(id)
        end
        return function()
            self.waiting[id] = nil
            if self.fetcher then -- not closed meanwhile
                self.fetcher:cancel(id)
            end
            if next(self.waiting) == nil then
                close_poll(self)
            end
        end
    end)
    if not result or result.error then
        return nil, result and result.error or "cancelled",
            { code = result and result.curl_code, transient = result and result.transient }
    end
    return result
end

--- Bytes so far, and in all if known, of an exchange under way.
---@param id integer
---@return integer? now
---@return integer? total
function Fetch:progress(id)
    if self.waiting[id] then
        return self.fetcher:progress(id)
    end
end

--- Stop everything; idempotent.
function Fetch:close()
    close_poll(self)
    self.waiting = {}
    if self.fetcher then
        self.fetcher:close()
        self.fetcher = nil
    end
    loop.flush()
end
Fetch.__close = Fetch.close

--- The first value of a header, by any case of its name.
---@param response sm.Response
---@param name string lowercase
---@return string?
function M.header(response, name)
    for _, header in ipairs(response.headers or {}) do
        if header[1]:lower() == name then
            return header[2]
        end
    end
end

return M
