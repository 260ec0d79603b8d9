-- SPDX-License-Identifier: Apache-2.0
--
-- Images out of the store into a registry (distribution-spec 1.1, "Pushing"):
-- for each blob HEAD, or a mount from a repository of the same registry that
-- this store knows to have it, or an upload in chunks, so memory does not
-- grow with the layer; then the manifest. Bytes go as they are: a pull by
-- anybody gives the same digests.

local uv = require "luv"
local assemble = require "sm.assemble"
local catalog = require "sm.catalog"
local fetch = require "sm.fetch"
local files = require "sm.files"
local gate = require "sm.gate"
local loop = require "sm.loop"
local reference = require "sm.reference"
local registries = require "sm.registries"
local registry = require "sm.registry"

local M = {}

local chunk_bytes = 8 << 20
local parallel_uploads = 4

local known = { store = true, to = true, progress = true, insecure = true, cafile = true,
    credentials = true, retry_delay = true, core = true }

-- Another repository of this registry whose image, in our store, has the blob.
local function find_mount(job, digest)
    for _, entry in ipairs(job.entries) do
        local ref = entry.name and reference.parse(entry.name)
        if ref and ref.host == job.ref.host and ref.path ~= job.ref.path then
            local found = assemble.read_local({ store = job.store }, entry)
            for _, layer in ipairs(found and found.manifest.layers or {}) do
                if layer.digest == digest then
                    return ref.path
                end
            end
        end
    end
end

local function upload_chunks(job, blob, location, path)
    local fd, why = uv.fs_open(path, "r", 0)
    if not fd then
        return nil, files.error(path, why)
    end
    local close <close> = setmetatable({}, { __close = function()
        uv.fs_close(fd)
    end })
    local at = 0
    while blob.size - at > chunk_bytes do
        local bytes = uv.fs_read(fd, chunk_bytes, at)
        if not bytes or #bytes < chunk_bytes then
            return nil, path .. ": shorter than it should be; `sm verify` tells more"
        end
        location, why = job.client:upload_chunk(location, bytes, at)
        if not location then
            return nil, why
        end
        at = at + #bytes
        job.report(blob, "upload", at)
    end
    local rest = blob.size > at and uv.fs_read(fd, blob.size - at, at) or ""
    if not rest or #rest ~= blob.size - at then
        return nil, path .. ": shorter than it should be; `sm verify` tells more"
    end
    return job.client:upload_end(location, rest, blob.digest)
end

local function push_blob(job, blob)
    local there, why = job.client:has_blob(blob.digest)
    if there == nil then
        return nil, why
    elseif there then
        job.report(blob, "exists", blob.size)
        return true
    end
    local location, mounted
    location, why, mounted = job.client:upload_begin(blob.digest, find_mount(job, blob.digest))
    if not location and not mounted then
        return nil, why
    elseif mounted then
        job.report(blob, "mounted", blob.size)
        return true
    end
    local ok
    ok, why = upload_chunks(job, blob, location, job.store:blob_path(blob.digest))
    if ok then
        job.report(blob, "done", blob.size)
    end
    return ok, why
end

-- All at once, a few at a time; the first error ends the others. Yields.
local function push_blobs(job, blobs)
    local places, tasks, failed = gate.new(parallel_uploads), {}, nil
    local stop <close> = setmetatable({}, { __close = function()
        for _, task in ipairs(tasks) do
            task:cancel()
        end
    end })
    local left = #blobs
    loop.await(function(settle)
        for i, blob in ipairs(blobs) do
            tasks[i] = loop.spawn(function()
                local ok, why
                do
                    local pass <close> = places:enter()
                    ok, why = push_blob(job, blob)
                end
                left = left - 1
                failed = failed or (not ok and (why or "the upload failed") or nil)
                if failed or left == 0 then
                    settle(true)
                end
            end)
        end
    end)
    return not failed or nil, failed
end

local function push(options, opts, text)
    local st = options.store
    local held <close>, why = st:use()
    if not held then
        return nil, why
    end
    local entry
    entry, why = catalog.find(options, text)
    if not entry then
        return nil, why
    end
    local ref
    ref, why = reference.parse(opts.to or entry.name or "")
    if not ref then
        return nil, why
    elseif ref.digest then
        return nil, ("%s: a push needs a name and a tag, not a digest"):format(opts.to)
    end
    local found = assemble.read_local({ store = st }, entry)
    if not found then
        return nil, ("%s: its manifest or config cannot be read; `sm verify` tells more"):format(text)
    end
    local blobs, seen = {}, {}
    for _, blob in ipairs { found.manifest.config, table.unpack(found.manifest.layers) } do
        if not seen[blob.digest] and not (blob.urls and not st:has_blob(blob)) then
            seen[blob.digest] = true
            blobs[#blobs + 1] = blob
            if not st:has_blob(blob) then
                return nil, ("%s: blob %s is not in the store"):format(text, blob.digest)
            end
        end
    end
    -- The last place is the registry itself; mirrors take no pushes.
    local places
    places, why = registries.places(ref)
    if not places then
        return nil, ("%s: %s"):format(reference.familiar(ref), why)
    end
    local transport <close> = fetch.open { parallel = parallel_uploads, core = opts.core }
    local watch = opts.progress or function() end
    local job = { store = st, ref = ref, entries = assert(st:entries()),
        client = registry.at(places[#places], transport, { insecure = opts.insecure,
            cafile = opts.cafile, credentials = opts.credentials, retry_delay = opts.retry_delay,
            notify = watch, push = true }) }
    function job.report(blob, phase, now)
        watch { type = "layer", digest = blob.digest, phase = phase, now = now, total = blob.size }
    end
    local ok
    ok, why = push_blobs(job, blobs)
    if ok then
        ok, why = job.client:put_manifest(ref.tag, found.bytes, found.manifest.media_type)
    end
    if not ok then
        return nil, why
    end
    return { reference = reference.format(ref), digest = entry.digest, size = #found.bytes }
end

--- Push an image of the store to the registry of its name, or of `to`:
--- {reference, digest, size}. opts: store, to, progress, insecure, cafile,
--- credentials. Yields.
---@async
---@param text string reference, digest or id of an image in the store
---@param opts table?
---@return table?
---@return string? error
function M.push(text, opts)
    opts = opts or {}
    for key in pairs(opts) do
        if not known[key] then
            error(("unknown option %q"):format(tostring(key)), 2)
        end
    end
    local options, why = assemble.options { store = opts.store, core = opts.core }
    if not options then
        return nil, why
    end
    return loop.run(push, options, opts, text)
end

return M
