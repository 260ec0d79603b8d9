-- SPDX-License-Identifier: Apache-2.0
--
-- A client of one registry (OCI distribution-spec 1.1, Docker v2): manifests
-- and blobs, by GET straight away; sm.registry_http has the manners.
--
-- All bytes of a manifest are hashed before they are read as one. Blobs go to
-- files whose digest the fetcher checks while it writes.
--
-- One client serves many tasks at once. Every method yields.

local fetch = require "sm.fetch"
local files = require "sm.files"
local http = require "sm.registry_http"
local loop = require "sm.loop"
local manifest = require "sm.manifest"
local platform = require "sm.platform"
local reference = require "sm.reference"
local url = require "sm.url"

local M = {}

local worthwhile_bytes = 1 << 20 -- progress that earns a broken download fresh tries

---@class sm.Registry
---@field ref sm.Reference
---@field rate_remaining string? what the registry last said about its limit
local Registry = {}
Registry.__index = Registry
Registry.__name = "sm.Registry"

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
    return setmetatable(http.open(ref, opts), Registry)
end

--- A client for one of the places where sm.registries finds a repository: its
--- certificates and leave to be insecure, and for the rest what the caller gives
--- (`own`: insecure, cafile, credentials, retry_delay, push, notify).
---@param place sm.Place
---@param shared sm.Fetch
---@param own table
---@return sm.Registry
function M.at(place, shared, own)
    return M.open(place.ref, {
        fetch = shared, insecure = own.insecure or place.insecure, cafile = own.cafile or place.cafile,
        certfile = place.certfile, keyfile = place.keyfile, credentials = own.credentials,
        retry_delay = own.retry_delay, push = own.push, notify = own.notify,
    })
end

--- Let go of the connections.
function Registry:close()
    if self.owns_fetch then
        self.fetch:close()
    end
end
Registry.__close = Registry.close

--- Fetch a manifest or index by digest or tag, checked and read.
---@async
---@param name string tag or digest
---@param media_type string? what the descriptor that names it says
---@return table? {manifest, bytes, digest}
---@return string? error
function Registry:manifest(name, media_type)
    local response, why, failure = http.send(self, http.endpoint(self, "manifests", name), {
        headers = { "Accept: " .. manifest.accept },
        limit_bytes = manifest.limit_bytes,
        digest = name:find(":", 1, true) and name or nil,
    })
    if not response or response.status ~= 200 then
        return http.fail(self, "image or tag", response, why, failure)
    end
    self.rate_remaining = fetch.header(response, "ratelimit-remaining") or self.rate_remaining
    local image = reference.familiar(self.ref)
    local doc
    doc, why = manifest.read(response.body, fetch.header(response, "content-type"))
    if doc and media_type and media_type ~= "" and media_type ~= doc.media_type then
        doc, why = nil, ("its index calls it %s, it calls itself %s")
            :format(http.one_line(media_type), doc.media_type)
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
    local response = http.send(self, http.endpoint(self, "manifests", self.ref.digest or self.ref.tag), {
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
    local response, why, failure = http.send(self, http.endpoint(self, "blobs", descriptor.digest), {
        limit_bytes = math.max(descriptor.size, http.error_limit_bytes), digest = descriptor.digest,
    })
    if not response or response.status ~= 200 then
        return http.fail(self, "config blob", response, why, failure)
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
    local response, why, failure = http.send(self, http.endpoint(self, "blobs", descriptor.digest), {
        file = file, offset = have, digest = descriptor.digest, size = descriptor.size,
        once = true, -- a broken body is resumed, with a fresh address
    }, watching)
    if response and (response.status == 200 or response.status == 206) then
        return true
    elseif response and response.status == 404 and descriptor.urls then
        return self:foreign_blob(descriptor, file, watching)
    elseif response then
        local _, text = http.fail(self, "layer " .. descriptor.digest, response, why, failure)
        return nil, text, false
    end
    local got = files.size(file) or 0
    -- What an earlier run left may be bad, or the server may not do ranges:
    -- the fetcher removed the file, and a fresh start is worth it.
    local again = http.worth_retrying(nil, failure or http.refused) or (have > 0 and got == 0)
    local _, text = http.fail(self, "layer", nil, ("layer %s: %s"):format(descriptor.digest, why),
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
        if not again or tries >= http.max_tries then
            return nil, why
        end
        local delay = http.delay_for(self, tries)
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
            local response, why = http.follow(self, target, {
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
    local response, why, failure = http.send(self, http.endpoint(self, "blobs", digest), {
        method = "HEAD", limit_bytes = http.error_limit_bytes,
    })
    if response and (response.status == 200 or response.status == 404) then
        return response.status == 200
    end
    return http.fail(self, "blob", response, why, failure)
end

-- Where an upload goes on: the registry says it anew with every answer.
local function next_location(self, response, from)
    local location = fetch.header(response, "location")
    local target, why
    if location then
        target, why = url.resolve(from, location)
    end
    if target then
        target, why = http.may_go(self, from, target, "an upload")
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
    local response, why, failure = http.send(self, function(origin)
        return { scheme = origin.scheme, host = origin.host, port = origin.port,
            path = ("/v2/%s/blobs/uploads/"):format(self.ref.path),
            query = from and url.query { { "mount", digest }, { "from", from } } or nil }
    end, { method = "POST", limit_bytes = http.error_limit_bytes, body = "" })
    if response and response.status == 201 and from then
        return nil, nil, true
    elseif response and response.status == 202 then
        return next_location(self, response, self.origin)
    end
    return http.fail(self, "repository", response, why, failure)
end

--- One chunk of an upload, which begins at `offset`. Returns where the next goes.
---@async
---@param location sm.Url
---@param bytes string
---@param offset integer
---@return sm.Url?
---@return string? error
function Registry:upload_chunk(location, bytes, offset)
    local response, why, failure = http.send(self, function()
        return location
    end, { method = "PATCH", body = bytes, limit_bytes = http.error_limit_bytes, headers = {
        "Content-Type: application/octet-stream",
        ("Content-Range: %d-%d"):format(offset, offset + #bytes - 1),
    } })
    if response and (response.status == 202 or response.status == 201) then
        return next_location(self, response, location)
    end
    return http.fail(self, "upload", response, why, failure)
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
    local response, why, failure = http.send(self, function()
        return { scheme = location.scheme, host = location.host, port = location.port,
            path = location.path, query = query }
    end, { method = "PUT", body = bytes, limit_bytes = http.error_limit_bytes,
        headers = { "Content-Type: application/octet-stream" } })
    if response and response.status == 201 then
        return true
    end
    return http.fail(self, "upload", response, why, failure)
end

--- Put a manifest under a tag or digest.
---@async
---@param name string
---@param bytes string
---@param media_type string
---@return true?
---@return string? error
function Registry:put_manifest(name, bytes, media_type)
    local response, why, failure = http.send(self, http.endpoint(self, "manifests", name), {
        method = "PUT", body = bytes, limit_bytes = http.error_limit_bytes,
        headers = { "Content-Type: " .. media_type },
    })
    if response and response.status == 201 then
        return true
    end
    return http.fail(self, "repository", response, why, failure)
end

return M
