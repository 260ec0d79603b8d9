-- SPDX-License-Identifier: Apache-2.0
--
-- How we talk to a registry: what a 401, a redirect, a 429 or a broken connection
-- asks for is done here, by hand.
--
--   * credentials are sent to the registry's own scheme, host and port and
--     nowhere else: not along a redirect, not to a layer's foreign `urls`;
--   * at most ten redirects, never from https to http, never into our own
--     machine or the link-local network unless the registry is there, too;
--   * 408, 429, 5xx and transport errors are tried five times, after 1 s to
--     60 s or what Retry-After asks for;
--   * plain HTTP only for loopback registries, tried after https, or when the
--     caller says so.
--
-- A client is a table that `open` makes and sm.registry puts its methods on.

local auth = require "sm.auth"
local credentials = require "sm.credentials"
local fetch = require "sm.fetch"
local json = require "sm.json"
local loop = require "sm.loop"
local reference = require "sm.reference"
local url = require "sm.url"

local M = {}

local max_redirects = 10
M.max_tries = 5
local first_delay_s, max_delay_s = 1, 60
local max_wait_s = 300        -- a longer Retry-After is an answer, not a delay
M.error_limit_bytes = 64 * 1024
-- Codes of libcurl. Nobody there, or no such name, is said at once: waiting
-- for it is a person's decision.
local no_such_host, connect_failed, tls_failed = 6, 7, 35

local redirects = { [301] = true, [302] = true, [303] = true, [307] = true, [308] = true }

local known_options = {
    fetch = true, insecure = true, cafile = true, credentials = true, notify = true,
    retry_delay = true, push = true, certfile = true, keyfile = true,
}

--- The client of a reference; the options are sm.registry.open's.
---@param ref sm.Reference
---@param opts table?
---@return table client
function M.open(ref, opts)
    opts = opts or {}
    for key in pairs(opts) do
        if not known_options[key] then
            error(("unknown option %q"):format(tostring(key)), 3)
        end
    end
    local loopback = url.host_kind(ref.host:gsub(":%d+$", "")) == "loopback"
    local self = {
        ref = ref,
        fetch = opts.fetch or fetch.open(),
        owns_fetch = opts.fetch == nil,
        cafile = opts.cafile, certfile = opts.certfile, keyfile = opts.keyfile,
        insecure = opts.insecure or false,
        may_use_http = opts.insecure or loopback,
        unchecked = (opts.insecure or loopback) and not opts.cafile,
        notify = opts.notify or function() end,
        first_delay = opts.retry_delay or first_delay_s,
        actions = opts.push and "pull,push" or "pull",
    }
    self.find_credentials = opts.credentials or credentials.find
    return self
end

-- One line of a stranger's text.
function M.one_line(text)
    return (tostring(text):gsub("[%c\128-\255]+", " "):sub(1, 200))
end

-- What a registry says in its error document, or nil.
local function error_text(body)
    local doc = body and json.decode_object(body)
    local first = doc and json.is_array(doc.errors) and doc.errors[1]
    if not json.is_object(first) then
        return nil
    end
    local text = first.message or first.code
    return type(text) == "string" and text ~= "" and M.one_line(text) or nil
end

local months = { Jan = 1, Feb = 2, Mar = 3, Apr = 4, May = 5, Jun = 6, Jul = 7, Aug = 8, Sep = 9,
    Oct = 10, Nov = 11, Dec = 12 }

-- Days since 1970 of a civil date (proleptic Gregorian).
local function days_from_civil(y, m, d)
    y = m <= 2 and y - 1 or y
    local era = y // 400
    local yoe = y - era * 400
    local doy = (153 * (m + (m > 2 and -3 or 9)) + 2) // 5 + d - 1
    return era * 146097 + yoe * 365 + yoe // 4 - yoe // 100 + doy - 719468
end

--- Seconds that a Retry-After asks for: a number or an HTTP date.
---@param text string?
---@param now integer? Unix time
---@return number?
function M.retry_after(text, now)
    if not text then
        return nil
    end
    if text:find("^%s*%d+%s*$") then
        return tonumber(text)
    end
    local d, mon, y, h, mi, s = text:match("(%d+)[ -](%a%a%a)[ -](%d%d%d%d) (%d+):(%d+):(%d+)")
    if not months[mon] then
        return nil
    end
    local when = days_from_civil(tonumber(y), months[mon], tonumber(d)) * 86400
        + tonumber(h) * 3600 + tonumber(mi) * 60 + tonumber(s)
    return math.max(0, when - (now or os.time()))
end

local function same_origin(a, b)
    return a.scheme == b.scheme and a.host == b.host and a.port == b.port
end

-- Whether we go where a registry sends us: never away from https, never into
-- our own machine or network unless the registry is there, too. nil and why not.
function M.may_go(self, from, to, what)
    local where = ("%s to %s://%s"):format(what, to.scheme, url.authority(to))
    if from.scheme == "https" and to.scheme ~= "https" then
        return nil, where .. ", away from https, was refused"
    end
    local kind = url.host_kind(to.host)
    local home = self.origin
    if to.host ~= home.host and (kind == "link-local" or kind == "unspecified"
        or (kind == "loopback" and url.host_kind(home.host) ~= "loopback")) then
        return nil, ("%s, a %s address, was refused"):format(where, kind)
    end
    return to
end

-- Where a redirect leads, or nil and why we do not go there.
local function redirect_target(self, from, response)
    local location = fetch.header(response, "location")
    if not location then
        return nil, "a redirect without a Location"
    end
    local to, why = url.resolve(from, location)
    if not to then
        return nil, "a redirect to nowhere: " .. why
    end
    return M.may_go(self, from, to, "a redirect")
end

M.refused = { transient = false } -- the failure of what we do not do

-- The fields of a request that the C fetcher knows.
local exchange_fields = { "method", "body", "limit_bytes", "file", "offset", "digest", "size" }

local function exchange_for(self, request, target, authorization)
    local exchange = { url = url.format(target), cafile = self.cafile,
        insecure = self.unchecked or nil, headers = {} }
    for _, key in ipairs(exchange_fields) do
        exchange[key] = request[key]
    end
    table.move(request.headers or {}, 1, #(request.headers or {}), 1, exchange.headers)
    if same_origin(target, self.origin) then
        exchange.certfile, exchange.keyfile = self.certfile, self.keyfile
    end
    if authorization then
        table.insert(exchange.headers, "Authorization: " .. authorization)
    end
    return exchange
end

-- One request and the redirects after it. Its authorization goes only to the
-- scheme, host and port it was meant for. Returns the response and whether
-- that place (and not a redirect's target) gave it.
function M.follow(self, target, request, authorization, watching)
    local start = target
    for _ = 0, max_redirects do
        local home = same_origin(target, start)
        local response, why, failure = self.fetch:exchange(
            exchange_for(self, request, target, home and authorization), watching)
        if not response then
            return nil, why, failure
        end
        if not redirects[response.status] then
            return response, home
        elseif request.body then
            return nil, "a redirect of a POST was refused", M.refused
        end
        target, why = redirect_target(self, target, response)
        if not target then
            return nil, why, M.refused
        end
    end
    return nil, ("more than %d redirects"):format(max_redirects), M.refused
end

function M.delay_for(self, try, response)
    local asked = response and M.retry_after(fetch.header(response, "retry-after"))
    local delay = math.min(self.first_delay * 2 ^ (try - 1), max_delay_s)
    if asked then
        return math.max(asked, asked > 0 and 0 or delay), asked
    end
    -- Spread out those who failed together.
    return delay * (0.75 + math.random() / 2)
end

function M.worth_retrying(response, failure)
    if not response then
        return failure.transient and failure.code ~= no_such_host
            and failure.code ~= connect_failed
    end
    local status = response.status
    return status == 408 or status == 429 or (status >= 500 and status ~= 501)
end

local function failure_text(self, response, why)
    if not response then
        return why
    end
    local text = error_text(response.body)
    if response.status == 429 then
        local wait = M.retry_after(fetch.header(response, "retry-after"))
        return ("%s says: too many requests (429)%s%s; a login usually raises the limit")
            :format(self.ref.registry, text and ", " .. text or "",
                wait and (", try again in %d s"):format(wait) or "")
    end
    return ("%s answered %d%s"):format(self.ref.registry, response.status,
        text and ": " .. text or "")
end

-- `follow`, tried again while that makes sense; with `request.once` only for
-- what the server answered, broken connections being the caller's business.
local function persist(self, target, request, authorization, watching)
    for try = 1, M.max_tries do
        local response, why, failure = M.follow(self, target, request, authorization, watching)
        if try == M.max_tries or not M.worth_retrying(response, failure)
            or (not response and request.once) then
            return response, why, failure
        end
        local delay, asked = M.delay_for(self, try, response)
        if asked and asked > max_wait_s then
            return response, why, failure
        end
        self.notify { type = "retry", reason = failure_text(self, response, why), delay = delay,
            try = try }
        loop.sleep(delay)
    end
end

-- The registry's scheme: https, or for those who may http when https is not
-- spoken there. Settled once, by an exchange that carries nothing secret.
local function settle_origin(self)
    if self.origin then
        return true
    end
    self.origin = assert(url.parse("https://" .. self.ref.host .. "/v2/"))
    if self.may_use_http then
        local response, _, failure = self.fetch:exchange {
            url = url.format(self.origin), insecure = self.unchecked or nil, cafile = self.cafile,
            certfile = self.certfile, keyfile = self.keyfile,
            limit_bytes = M.error_limit_bytes,
        }
        local plain_port = not self.ref.host:find(":%d+$")
        if not response and (failure.code == tls_failed
            or (failure.code == connect_failed and plain_port)) then
            self.origin = assert(url.parse("http://" .. self.ref.host .. "/v2/"))
        end
    end
    self.auth = auth.open {
        registry = self.ref.registry,
        origin = self.origin,
        credentials = function(path)
            return self.find_credentials(self.ref.registry, path)
        end,
        request = function(request)
            local response, why = persist(self, request.url, request, request.authorization)
            return response, not response and why or nil
        end,
    }
    return true
end

-- Many tasks may come at once; the first settles it for all.
local function settle(self)
    if not self.origin_task then
        self.origin_task = loop.spawn(settle_origin, self)
    end
    self.origin_task:join()
end

-- A request below /v2/<name>/, with authorization as the registry asks.
function M.send(self, target, request, watching)
    settle(self)
    local path = self.ref.path
    local scope = "repository:" .. path .. ":" .. self.actions
    local authorization, why = self.auth:header(scope, path)
    if why then
        return nil, why
    end
    for _ = 1, 3 do
        local to = target(self.origin) -- an upload may lead to another place
        local ours = same_origin(to, self.origin)
        local response, home_or_why, failure = persist(self, to, request,
            ours and authorization or nil, watching)
        if not response then
            return nil, home_or_why, failure
        end
        if response.status ~= 401 or not home_or_why or not ours then
            return response
        end
        authorization, why = self.auth:answer(response.headers, scope, path, authorization)
        if not authorization then
            return nil, why
        end
    end
    return nil, self.ref.registry .. " does not accept the token it gave us"
end

function M.endpoint(self, kind, name)
    return function(origin)
        return { scheme = origin.scheme, host = origin.host, port = origin.port,
            path = ("/v2/%s/%s/%s"):format(self.ref.path, kind, name) }
    end
end

-- The error of a whole operation: which image, and what happened.
function M.fail(self, what, response, why, failure)
    local name = reference.familiar(self.ref)
    if failure and (failure.code == connect_failed or failure.code == no_such_host) then
        why = ("cannot reach the registry %s: %s"):format(self.ref.registry, why)
    end
    if not response then
        return nil, ("%s: %s"):format(name, why)
    end
    local status = response.status
    if status == 404 then
        return nil, ("%s: not found: %s has no such %s"):format(name, self.ref.registry, what)
    elseif status == 401 or status == 403 then
        local text = error_text(response.body)
        return nil, ("%s: access denied by %s%s"):format(name, self.ref.registry,
            text and ": " .. text or "")
    end
    return nil, ("%s: %s"):format(name, failure_text(self, response, why))
end

return M
