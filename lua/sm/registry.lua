-- SPDX-License-Identifier: Apache-2.0
--
-- A client of one registry (OCI distribution-spec 1.1, Docker v2): manifests
-- and blobs, by GET straight away; what a 401, a redirect, a 429 or a broken
-- connection asks for is done here, by hand:
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
-- All bytes of a manifest are hashed before they are read as one. Blobs go to
-- files whose digest the fetcher checks while it writes.
--
-- One client serves many tasks at once. Every method yields.

local auth = require "sm.auth"
local credentials = require "sm.credentials"
local fetch = require "sm.fetch"
local files = require "sm.files"
local json = require "sm.json"
local loop = require "sm.loop"
local manifest = require "sm.manifest"
local platform = require "sm.platform"
local reference = require "sm.reference"
local url = require "sm.url"

local M = {}

local max_redirects = 10
local max_tries = 5
local first_delay_s, max_delay_s = 1, 60
local max_wait_s = 300        -- a longer Retry-After is an answer, not a delay
local error_limit_bytes = 64 * 1024
local worthwhile_bytes = 1 << 20 -- progress that earns a broken download fresh tries
-- Codes of libcurl. Nobody there, or no such name, is said at once: waiting
-- for it is a person's decision.
local no_such_host, connect_failed, tls_failed = 6, 7, 35

local redirects = { [301] = true, [302] = true, [303] = true, [307] = true, [308] = true }

---@class sm.Registry
---@field ref sm.Reference
---@field rate_remaining string? what the registry last said about its limit
local Registry = {}
Registry.__index = Registry
Registry.__name = "sm.Registry"

local known_options = {
    fetch = true, insecure = true, cafile = true, credentials = true, notify = true,
    retry_delay = true, push = true, certfile = true, keyfile = true,
}

--- A client for the registry of a reference.
--- opts: fetch (a shared sm.Fetch), insecure (true: plain HTTP and unchecked
--- certificates allowed), cafile (authorities besides the system's), certfile and keyfile
--- (who we are, for the registry itself), credentials (function(registry, path) →
--- sm.Credential?, err), push (tokens that allow it), notify (function(event), for retries),
--- retry_delay (seconds of the first wait, for specs).
---@param ref sm.Reference
---@param opts table?
---@return sm.Registry
function M.open(ref, opts)
    opts = opts or {}
    for key in pairs(opts) do
        if not known_options[key] then
            error(("unknown option %q"):format(tostring(key)), 2)
        end
    end
    local loopback = url.host_kind(ref.host:gsub(":%d+$", "")) == "loopback"
    local self = setmetatable({
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
        scheme = nil, -- settled by the first exchange
    }, Registry)
    self.find_credentials = opts.credentials or credentials.find
    return self
end

--- Let go of the connections.
function Registry:close()
    if self.owns_fetch then
        self.fetch:close()
    end
end
Registry.__close = Registry.close

-- One line of a stranger's text.
local function one_line(text)
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
    return type(text) == "string" and text ~= "" and one_line(text) or nil
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
local function may_go(self, from, to, what)
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
    return may_go(self, from, to, "a redirect")
end

local refused = { transient = false } -- the failure of what we do not do

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
local function follow(self, target, request, authorization, watching)
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
            return nil, "a redirect of a POST was refused", refused
        end
        target, why = redirect_target(self, target, response)
        if not target then
            return nil, why, refused
        end
    end
    return nil, ("more than %d redirects"):format(max_redirects), refused
end

local function delay_for(self, try, response)
    local asked = response and M.retry_after(fetch.header(response, "retry-after"))
    local delay = math.min(self.first_delay * 2 ^ (try - 1), max_delay_s)
    if asked then
        return math.max(asked, asked > 0 and 0 or delay), asked
    end
    -- Spread out those who failed together.
    return delay * (0.75 + math.random() / 2)
end

local function worth_retrying(response, failure)
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
    for try = 1, max_tries do
        local response, why, failure = follow(self, target, request, authorization, watching)
        if try == max_tries or not worth_retrying(response, failure)
            or (not response and request.once) then
            return response, why, failure
        end
        local delay, asked = delay_for(self, try, response)
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
            limit_bytes = error_limit_bytes,
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
local function send(self, target, request, watching)
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

local function endpoint(self, kind, name)
    return function(origin)
        return { scheme = origin.scheme, host = origin.host, port = origin.port,
            path = ("/v2/%s/%s/%s"):format(self.ref.path, kind, name) }
    end
end

-- The error of a whole operation: which image, and what happened.
local function fail(self, what, response, why, failure)
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

--- Fetch a manifest or index by digest or tag, checked and read.
---@async
---@param name string tag or digest
---@param media_type string? what the descriptor that names it says
---@return table? {manifest, bytes, digest}
---@return string? error
function Registry:manifest(name, media_type)
    local response, why, failure = send(self, endpoint(self, "manifests", name), {
        headers = { "Accept: " .. manifest.accept },
        limit_bytes = manifest.limit_bytes,
        digest = name:find(":", 1, true) and name or nil,
    })
    if not response or response.status ~= 200 then
        return fail(self, "image or tag", response, why, failure)
    end
    self.rate_remaining = fetch.header(response, "ratelimit-remaining") or self.rate_remaining
    local image = reference.familiar(self.ref)
    local doc
    doc, why = manifest.read(response.body, fetch.header(response, "content-type"))
    if doc and media_type and media_type ~= "" and media_type ~= doc.media_type then
        doc, why = nil, ("its index calls it %s, it calls itself %s")
            :format(one_line(media_type), doc.media_type)
    end
    if not doc then
        return nil, ("%s: %s"):format(image, why)
    end
    return { manifest = doc, bytes = response.body, digest = response.digest }
end

--- What a tag points to now, by HEAD (which does not count against Docker
--- Hub's limit); nil if the registry does not say.
---@async
---@return string? digest
function Registry:head()
    local response = send(self, endpoint(self, "manifests", self.ref.digest or self.ref.tag), {
        method = "HEAD", headers = { "Accept: " .. manifest.accept },
        limit_bytes = manifest.limit_bytes,
    })
    local digest = response and response.status == 200
        and fetch.header(response, "docker-content-digest")
    return digest and reference.parse_digest(digest) and digest or nil
end

local function wanted_text(image, wanted, offered)
    table.sort(offered)
    return ("%s: no image for %s; there is %s"):format(image, platform.format(wanted),
        #offered > 0 and table.concat(offered, ", ") or "none for any platform")
end

-- Walk an index to the image manifest that serves the platform.
local function descend(self, found, wanted, depth, choose)
    local image = reference.familiar(self.ref)
    if found.manifest.kind == "image" then
        return found
    elseif depth > manifest.max_depth then
        return nil, ("%s: its indexes are nested deeper than %d"):format(image, manifest.max_depth)
    end
    local entries, offered = manifest.candidates(found.manifest, wanted, choose)
    local failed
    for _, entry in ipairs(entries) do
        local inner, why = self:manifest(entry.digest, entry.media_type)
        if not inner then
            return nil, why
        end
        inner, why = descend(self, inner, wanted, depth + 1, choose)
        if inner then
            local config
            config, why = self:config(inner, not choose and wanted or nil)
            if config then
                return inner
            end
        end
        failed = failed or why
        if entry.platform then
            break -- it said it serves us: its error is the answer
        end
    end
    return nil, failed or wanted_text(image, wanted, offered)
end

--- Resolve the reference to an image manifest for a platform and its
--- configuration. Returns {digest, bytes, manifest, config, config_bytes,
--- source_digest (what the tag or digest named)}.
---@async
---@param wanted sm.Platform?
---@param choose? fun(entries: table[], wanted: sm.Platform): table?
---@return table?
---@return string? error
function Registry:resolve(wanted, choose)
    wanted = wanted or platform.host()
    local top, why = self:manifest(self.ref.digest or self.ref.tag)
    if not top then
        return nil, why
    end
    local found
    found, why = descend(self, top, wanted, 1, choose)
    if not found then
        return nil, why
    end
    if not found.config then
        local ok
        ok, why = self:config(found, wanted)
        if not ok then
            return nil, why
        end
    end
    found.source_digest = top.digest
    return found
end

--- Fetch and check the configuration of a resolved manifest; kept in it.
---@async
---@param found table
---@param wanted sm.Platform?
---@return table? config
---@return string? error
function Registry:config(found, wanted)
    local descriptor = found.manifest.config
    local image = reference.familiar(self.ref)
    local response, why, failure = send(self, endpoint(self, "blobs", descriptor.digest), {
        limit_bytes = math.max(descriptor.size, error_limit_bytes), digest = descriptor.digest,
    })
    if not response or response.status ~= 200 then
        return fail(self, "config blob", response, why, failure)
    end
    local config
    if #response.body ~= descriptor.size then
        why = "its config has another size than its manifest says"
    else
        config, why = manifest.read_config(response.body, found.manifest, wanted)
    end
    if not config then
        return nil, ("%s: %s"):format(image, why)
    end
    found.config, found.config_bytes = config, response.body
    return config
end

-- One request for a blob, continuing what the file holds already. Returns true;
-- or nil, an error, and whether to try again.
local function blob_once(self, descriptor, file, watching)
    local have = files.size(file) or 0
    if have > descriptor.size then
        files.remove(file)
        have = 0
    end
    local response, why, failure = send(self, endpoint(self, "blobs", descriptor.digest), {
        file = file, offset = have, digest = descriptor.digest, size = descriptor.size,
        once = true, -- a broken body is resumed, with a fresh address
    }, watching)
    if response and (response.status == 200 or response.status == 206) then
        return true
    elseif response and response.status == 404 and descriptor.urls then
        return self:foreign_blob(descriptor, file, watching)
    elseif response then
        local _, text = fail(self, "layer " .. descriptor.digest, response, why, failure)
        return nil, text, false
    end
    local got = files.size(file) or 0
    -- What an earlier run left may be bad, or the server may not do ranges:
    -- the fetcher removed the file, and a fresh start is worth it.
    local again = worth_retrying(nil, failure or refused) or (have > 0 and got == 0)
    local _, text = fail(self, "layer", nil, ("layer %s: %s"):format(descriptor.digest, why),
        failure)
    return nil, text, again, got - have >= worthwhile_bytes
end

--- Fetch a blob into a file, continuing one that is there from an earlier
--- try. The fetcher checks digest and size while it writes and removes a file
--- that is wrong. `watching(id)` as in `sm.Fetch`.
---@async
---@param descriptor sm.Descriptor
---@param file string
---@param watching? fun(id: integer)
---@return true?
---@return string? error
function Registry:blob(descriptor, file, watching)
    local tries = 0
    while true do
        local ok, why, again, progressed = blob_once(self, descriptor, file, watching)
        if ok then
            return true
        end
        tries = progressed and 1 or tries + 1
        if not again or tries >= max_tries then
            return nil, why
        end
        local delay = delay_for(self, tries)
        self.notify { type = "retry", reason = why, delay = delay, try = tries,
            digest = descriptor.digest }
        loop.sleep(delay)
    end
end

--- Fetch a blob from the addresses its descriptor names, without credentials.
---@async
---@param descriptor sm.Descriptor
---@param file string
---@param watching? fun(id: integer)
---@return true?
---@return string? error
function Registry:foreign_blob(descriptor, file, watching)
    local failed = "none of its addresses is usable"
    for _, text in ipairs(descriptor.urls) do
        local target = url.parse(text)
        local kind = target and url.host_kind(target.host)
        if target and target.scheme == "https" and (kind == "name" or kind == "public") then
            files.remove(file)
            local response, why = follow(self, target, {
                file = file, offset = 0, digest = descriptor.digest, size = descriptor.size,
            }, nil, watching)
            if response and response.status == 200 then
                return true
            end
            failed = why or "status " .. response.status
        end
    end
    return nil, ("%s: foreign layer %s: %s"):format(reference.familiar(self.ref),
        descriptor.digest, failed)
end

-- ------------------------------------------------------------------ pushing

--- Whether the registry has a blob; nil and why when it does not say.
---@async
---@param digest string
---@return boolean?
---@return string? error
function Registry:has_blob(digest)
    local response, why, failure = send(self, endpoint(self, "blobs", digest), {
        method = "HEAD", limit_bytes = error_limit_bytes,
    })
    if response and (response.status == 200 or response.status == 404) then
        return response.status == 200
    end
    return fail(self, "blob", response, why, failure)
end

-- Where an upload goes on: the registry says it anew with every answer.
local function next_location(self, response, from)
    local location = fetch.header(response, "location")
    local target, why
    if location then
        target, why = url.resolve(from, location)
    end
    if target then
        target, why = may_go(self, from, target, "an upload")
    end
    if not target then
        return nil, ("%s: %s does not say where the upload goes%s"):format(
            reference.familiar(self.ref), self.ref.registry, why and ": " .. why or "")
    end
    return target
end

--- Begin the upload of a blob, unless the registry can take it from its
--- repository `from`. Returns where the upload goes; or nil, an error; or nil,
--- nil, true when it was mounted.
---@async
---@param digest string
---@param from string? path of another repository
---@return sm.Url? location
---@return string? error
---@return boolean? mounted
function Registry:upload_begin(digest, from)
    local response, why, failure = send(self, function(origin)
        return { scheme = origin.scheme, host = origin.host, port = origin.port,
            path = ("/v2/%s/blobs/uploads/"):format(self.ref.path),
            query = from and url.query { { "mount", digest }, { "from", from } } or nil }
    end, { method = "POST", limit_bytes = error_limit_bytes, body = "" })
    if response and response.status == 201 and from then
        return nil, nil, true
    elseif response and response.status == 202 then
        return next_location(self, response, self.origin)
    end
    return fail(self, "repository", response, why, failure)
end

--- One chunk of an upload, which begins at `offset`. Returns where the next goes.
---@async
---@param location sm.Url
---@param bytes string
---@param offset integer
---@return sm.Url?
---@return string? error
function Registry:upload_chunk(location, bytes, offset)
    local response, why, failure = send(self, function()
        return location
    end, { method = "PATCH", body = bytes, limit_bytes = error_limit_bytes, headers = {
        "Content-Type: application/octet-stream",
        ("Content-Range: %d-%d"):format(offset, offset + #bytes - 1),
    } })
    if response and (response.status == 202 or response.status == 201) then
        return next_location(self, response, location)
    end
    return fail(self, "upload", response, why, failure)
end

--- The last chunk (or all) of an upload, and its digest.
---@async
---@param location sm.Url
---@param bytes string
---@param digest string
---@return true?
---@return string? error
function Registry:upload_end(location, bytes, digest)
    local query = url.query { { "digest", digest } }
    if location.query and location.query ~= "" then
        query = location.query .. "&" .. query
    end
    local response, why, failure = send(self, function()
        return { scheme = location.scheme, host = location.host, port = location.port,
            path = location.path, query = query }
    end, { method = "PUT", body = bytes, limit_bytes = error_limit_bytes,
        headers = { "Content-Type: application/octet-stream" } })
    if response and response.status == 201 then
        return true
    end
    return fail(self, "upload", response, why, failure)
end

--- Put a manifest under a tag or digest.
---@async
---@param name string
---@param bytes string
---@param media_type string
---@return true?
---@return string? error
function Registry:put_manifest(name, bytes, media_type)
    local response, why, failure = send(self, endpoint(self, "manifests", name), {
        method = "PUT", body = bytes, limit_bytes = error_limit_bytes,
        headers = { "Content-Type: " .. media_type },
    })
    if response and response.status == 201 then
        return true
    end
    return fail(self, "repository", response, why, failure)
end

return M
