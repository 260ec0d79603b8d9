-- SPDX-License-Identifier: Apache-2.0
--
-- Putting an image together in the store, whatever it comes from: a resolved
-- image {digest, bytes, manifest, config, config_bytes, source_digest?} and a
-- source of its layers' bytes
--
--   source.blob(layer, file, watching)   bring the blob into a file; yields
--   source.progress(id)                  of what `watching(id)` told
--   source.path(layer)                   instead of `blob`: a file to convert as
--                                        it lies, which does not enter the store
--
-- Layers are worked on in parallel, each under its own lock, so that many
-- processes with the same image do the work once. Sources, names and policy
-- are sm.image's.

local uv = require "luv"
local compose = require "sm.compose"
local files = require "sm.files"
local gate = require "sm.gate"
local loop = require "sm.loop"
local manifest = require "sm.manifest"
local platform = require "sm.platform"
local reference = require "sm.reference"
local store = require "sm.store"

local M = {}

M.parallel_downloads = 4
local tick_s = 0.1

---@class sm.Image
---@field reference string full name, or oci:DIR:TAG
---@field name string the short one, for people
---@field digest string of the manifest
---@field config table the OCI configuration document
---@field extents {path: string, offset: integer, length: integer}[] the root device, in order
---@field size integer of the root device in bytes
---@field layers {digest: string, size: integer, diff_id: string}[]
---@field package lease userdata
local Image = {}
Image.__index = Image
Image.__name = "sm.Image"

--- Let go of the image: it may be removed from the store. Idempotent.
function Image:close()
    self.lease:close()
end
Image.__close = Image.close

local known_options = {
    store = true, platform = true, policy = true, progress = true, verify = true, limits = true,
    insecure = true, cafile = true, credentials = true, core = true, retry_delay = true,
    force = true, resolve = true, fetch = true, layers = true, choose = true,
}
local policies = { missing = true, always = true, never = true }

--- Check options and fill in defaults; misuse raises at the caller's caller.
function M.options(opts)
    opts = opts or {}
    local out = {}
    for key, value in pairs(opts) do
        if not known_options[key] then
            error(("unknown option %q"):format(tostring(key)), 3)
        end
        out[key] = value
    end
    out.policy = opts.policy or "missing"
    if not policies[out.policy] then
        error(("policy %q: expected missing, always or never"):format(tostring(out.policy)), 3)
    end
    out.progress = opts.progress or function() end
    local why
    if type(opts.platform) == "string" then
        out.platform, why = platform.parse(opts.platform)
    else
        out.platform = opts.platform or platform.host()
    end
    if out.platform and type(opts.store) ~= "table" then
        out.store, why = store.open(opts.store)
    end
    if not out.platform or not out.store then
        return nil, why
    end
    return out
end

--- The byte side: sm.image_core, or what stands in for it.
function M.core(opts)
    return opts.core or require "sm.image_core"
end

--- Wait for a job of the image core; its result. Yields.
function M.wait(job)
    loop.readable(job:pollfd())
    local result, why, errno = job:result()
    return result, why, errno
end

--- What is known of a resolved image, as the caller's img.
function M.finish(opts, found, name, lease)
    local record = opts.store:image(found.digest)
    if not record then
        return nil
    end
    local layers = {}
    for i, layer in ipairs(found.manifest.layers) do
        layers[i] = { digest = layer.digest, size = layer.size,
            diff_id = found.config.rootfs.diff_ids[i] }
    end
    local ref = reference.parse(name)
    opts.store:touch(found.digest)
    return setmetatable({
        reference = name,
        name = ref and reference.familiar(ref) or name,
        digest = found.digest,
        config = found.config,
        extents = record.extents,
        size = record.size,
        layers = layers,
        lease = lease,
    }, Image)
end

--- The manifest and configuration of an image in the store, or nil.
function M.read_local(opts, entry)
    local bytes = opts.store:get(entry, manifest.limit_bytes)
    local doc = bytes and manifest.read(bytes, entry.media_type)
    if not doc or doc.kind ~= "image" then
        return nil
    end
    local config_bytes = opts.store:get(doc.config, manifest.config_limit_bytes)
    local config = config_bytes and manifest.read_config(config_bytes, doc, opts.platform)
    if not config then
        return nil
    end
    return { digest = entry.digest, bytes = bytes, manifest = doc, config = config,
        config_bytes = config_bytes, source_digest = entry.source }
end

---@class sm.LayerWork one distinct layer of an image being put together

-- Tell the watcher about a layer.
local function report(work, phase, now, total)
    work.opts.progress { type = "layer", digest = work.layer.digest, index = work.index,
        phase = phase, now = now, total = total }
end

local function set_phase(work, phase, sample)
    work.sample = sample and function()
        local now, total = sample()
        if now then
            report(work, phase, now, total and total > 0 and total or nil)
        end
    end
    report(work, phase, phase == "download" and 0 or nil, work.layer.size)
end

-- A script's fetcher brings the blob; what it brought is held against the
-- descriptor like everything else that comes from outside. Yields.
local function fetch_by_script(work, part, by_default)
    local layer, opts = work.layer, work.opts
    local ok, why = opts.fetch({ digest = layer.digest, size = layer.size,
        media_type = layer.media_type, urls = layer.urls }, part, by_default)
    if not ok then
        return nil, why or ("layer %s: the fetcher brought nothing"):format(layer.digest)
    end
    if files.size(part) ~= layer.size then
        files.remove(part)
        return nil, ("layer %s: the fetcher brought another size"):format(layer.digest)
    end
    local job <close>, failed = M.core(opts).digest { file = part,
        algorithm = layer.digest:match("^%w+") }
    if not job then
        return nil, failed
    end
    local result
    result, why = M.wait(job)
    if result and result.digest ~= layer.digest then
        result, why = nil, ("layer %s: the fetcher brought other bytes"):format(layer.digest)
    end
    if not result then
        files.remove(part)
        return nil, why
    end
    return true
end

-- Bring the layer's blob into the store, once among all processes. Yields.
local function ensure_blob(work)
    local st, layer = work.opts.store, work.layer
    if st:has_blob(layer) then
        return true
    end
    local held <close>, why = st:lock_digest("blob", layer.digest, function()
        set_phase(work, "waiting")
    end)
    if not held then
        return nil, why
    elseif st:has_blob(layer) then
        held:remove()
        return true
    end
    local pass <close> = work.gates.download:enter()
    local part = st:part_path(layer.digest)
    set_phase(work, "download")
    local ok
    local function by_default()
        return work.source.blob(layer, part, function(id)
            set_phase(work, "download", function()
                return work.source.progress(id)
            end)
        end)
    end
    if work.opts.fetch then
        ok, why = fetch_by_script(work, part, by_default)
    else
        ok, why = by_default()
    end
    work.sample = nil
    if ok then
        ok, why = st:adopt(layer.digest, part)
    end
    if not ok then
        return nil, why
    end
    work.fetched = true
    held:remove()
    return true
end

-- One try to convert a layer from `path`. Yields.
local function convert(work, path)
    local st = work.opts.store
    local pass <close> = work.gates.convert:enter()
    local folder = st:temporary("layer")
    local ok, why = uv.fs_mkdir(folder, tonumber("700", 8))
    if not ok then
        return nil, files.error(folder, why)
    end
    local tidy <close> = setmetatable({}, { __close = function()
        files.remove(folder)
    end})
    local job <close>, failed = M.core(work.opts).ingest {
        blob = path, media = work.layer.media_type, diff_id = work.diff_id, out = folder,
        limits = work.opts.limits,
    }
    if not job then
        return nil, failed
    end
    set_phase(work, "convert", function()
        return job:progress()
    end)
    local result, errno
    result, why, errno = M.wait(job)
    work.sample = nil
    if not result then
        return nil, why, errno
    end
    work.converted = true
    return st:publish_layer(work.diff_id, folder)
end

local disk_errors = { [28] = true, [122] = true, [30] = true, [5] = true } -- ENOSPC EDQUOT EROFS EIO

-- Convert the layer, once among all processes. A blob that lay in the store
-- and turns out bad is fetched again, once. Yields.
local function ensure_layer(work)
    local st, layer = work.opts.store, work.layer
    local held <close>, why = st:lock_digest("layer", work.diff_id, function()
        set_phase(work, "waiting")
    end)
    if not held then
        return nil, why
    elseif st:has_layer(work.diff_id) then
        held:remove()
        return true
    end
    local direct = work.source.path and work.source.path(layer)
    local ok, errno
    ok, why, errno = convert(work, direct or st:blob_path(layer.digest))
    if not ok and not direct and not work.fetched and not disk_errors[errno] then
        files.remove(st:blob_path(layer.digest))
        ok, why = ensure_blob(work)
        if ok then
            ok, why = convert(work, st:blob_path(layer.digest))
        end
    end
    if not ok then
        return nil, ("layer %s: %s"):format(layer.digest, why)
    end
    held:remove()
    return true
end

local function run_layer(work)
    local st = work.opts.store
    local direct = work.source.path and work.source.path(work.layer)
    if st:has_layer(work.diff_id) and (direct or st:has_blob(work.layer)) then
        report(work, "exists", work.layer.size, work.layer.size)
        return true
    end
    local ok, why = true, nil
    if not direct then
        ok, why = ensure_blob(work)
    end
    if ok and not st:has_layer(work.diff_id) then
        ok, why = ensure_layer(work)
    end
    if ok then
        report(work, "done", work.layer.size, work.layer.size)
    end
    return ok, why
end

-- The distinct layers of an image as pieces of work.
local function plan(opts, found, source)
    local gates = {
        download = gate.new(M.parallel_downloads),
        convert = gate.new(math.max(1, uv.available_parallelism())),
    }
    local list, seen = {}, {}
    for i, layer in ipairs(found.manifest.layers) do
        local diff_id = found.config.rootfs.diff_ids[i]
        local key = layer.digest .. diff_id
        if not seen[key] then
            seen[key] = true
            list[#list + 1] = { opts = opts, layer = layer, diff_id = diff_id, index = i,
                gates = gates, source = source }
        end
    end
    return list
end

-- All layers at once; the first error ends the others. Yields.
local function run_layers(works)
    local tasks = {}
    local stop <close> = setmetatable({}, { __close = function()
        for _, task in ipairs(tasks) do
            task:cancel()
        end
    end })
    local failed, left = nil, #works
    loop.await(function(settle)
        for i, work in ipairs(works) do
            tasks[i] = loop.spawn(function()
                local ok, why = run_layer(work)
                left = left - 1
                if not ok then
                    failed = failed or why
                end
                if left == 0 or failed then
                    settle(true)
                end
            end)
        end
        if left == 0 then
            settle(true) -- an image without layers
        end
    end)
    if failed then
        return nil, failed
    end
    return true
end

-- Report running downloads and conversions now and then, until closed.
local function ticker(works)
    local timer = uv.new_timer()
    timer:start(math.floor(tick_s * 1000), math.floor(tick_s * 1000), loop.guard(function()
        for _, work in ipairs(works) do
            if work.sample then
                work.sample()
            end
        end
    end))
    return setmetatable({}, { __close = function()
        timer:stop()
        timer:close()
    end })
end

-- Merge the layers, once among all processes. Yields.
local function ensure_merged(opts, found)
    local st = opts.store
    if st:image(found.digest) then
        return true
    end
    local held <close>, why = st:lock_digest("image", found.digest)
    if not held then
        return nil, why
    elseif st:image(found.digest) then
        held:remove()
        return true
    end
    opts.progress { type = "merge" }
    local dirs, layers = {}, {}
    for i, diff_id in ipairs(found.config.rootfs.diff_ids) do
        dirs[i] = st:layer_dir(diff_id)
        layers[i] = { diff_id = diff_id, bytes = files.size(dirs[i] .. "/data") }
    end
    local folder = st:temporary("image")
    local ok
    ok, why = uv.fs_mkdir(folder, tonumber("700", 8))
    if not ok then
        return nil, files.error(folder, why)
    end
    local tidy <close> = setmetatable({}, { __close = function()
        files.remove(folder)
    end})
    local job <close>, failed = M.core(opts).merge {
        layers = dirs, out = folder .. "/meta", limits = opts.limits, async = true,
    }
    if not job then
        return nil, failed
    end
    local result, errno
    result, why, errno = M.wait(job)
    if not result then
        return nil, "merging the layers: " .. why, errno
    end
    ok, why = st:publish_image(found.digest, folder, {
        size = result.size, meta = result.bytes, inodes = result.inodes, layers = layers,
    })
    if ok then
        held:remove()
    end
    return ok, why
end

-- A converted layer that came from an earlier run may be damaged; the merge
-- finds that out. Then those are converted anew, once. Yields.
local function merge_or_repair(opts, found, works)
    local ok, why, errno = ensure_merged(opts, found)
    if ok or disk_errors[errno] then
        return ok, why
    end
    local suspects = {}
    for _, work in ipairs(works) do
        if not work.converted then
            suspects[#suspects + 1] = work
            files.remove(opts.store:layer_dir(work.diff_id))
        end
    end
    if #suspects == 0 then
        return nil, why
    end
    ok, why = run_layers(suspects)
    if not ok then
        return nil, why
    end
    return ensure_merged(opts, found)
end

--- Ask the caller's policy about an image, fetched or found here.
---@param opts table
---@param found table
---@param name string
---@return boolean? fine
---@return string? error
function M.approve(opts, found, name)
    if not opts.verify then
        return true
    end
    local fine, reason = opts.verify {
        reference = name, digest = found.digest, source_digest = found.source_digest,
        config = found.config, manifest = found.manifest,
    }
    if not fine then
        return nil, ("%s: refused by policy%s"):format(name, reason and ": " .. reason or "")
    end
    return true
end

--- What is left of a resolved image after the caller's layer filter: the image
--- itself, or another one with fewer layers and a digest of its own.
---@param opts table
---@param found table
---@return table
function M.filter_layers(opts, found)
    if not opts.layers then
        return found
    end
    local kept, diff_ids = {}, {}
    for i, layer in ipairs(found.manifest.layers) do
        local diff_id = found.config.rootfs.diff_ids[i]
        if opts.layers({ digest = layer.digest, size = layer.size, media_type = layer.media_type,
            diff_id = diff_id, index = i }, found.config) then
            kept[#kept + 1], diff_ids[#diff_ids + 1] = layer, diff_id
        end
    end
    if #kept == #found.manifest.layers then
        return found
    end
    local other = assert(compose.image(found.config_bytes, kept, diff_ids))
    other.source_digest = found.source_digest
    return other
end

--- Put a resolved image together. Returns the image. The caller holds the
--- store's `use` lock. The third result is what was put together: not what was
--- asked for when the layer filter left something out. Yields.
---@async
---@param opts table of `options`
---@param found table
---@param source table
---@param name string
---@return sm.Image?
---@return string? error
---@return table? found
function M.assemble(opts, found, source, name)
    local st = opts.store
    opts.progress { type = "resolved", digest = found.digest, layers = found.manifest.layers,
        reference = name }
    local fine, refused = M.approve(opts, found, name)
    if not fine then
        return nil, refused
    end
    found = M.filter_layers(opts, found)
    local lease, why = st:lease(found.digest)
    if not lease then
        return nil, why
    end
    local ok
    ok, why = st:put(found.manifest.config.digest, found.config_bytes)
    if ok then
        ok, why = st:put(found.digest, found.bytes)
    end
    local works = plan(opts, found, source)
    do
        local ticking <close> = ticker(works)
        if ok then
            ok, why = run_layers(works)
        end
        if ok then
            ok, why = merge_or_repair(opts, found, works)
        end
    end
    local image = ok and M.finish(opts, found, name, lease)
    if not image then
        lease:close()
        return nil, why or "the image store changes under our hands; try again"
    end
    return image, nil, found
end

--- Give a name to what was put together. Yields.
---@async
function M.tag(opts, name, found)
    return opts.store:tag(name, {
        digest = found.digest, size = #found.bytes, media_type = found.manifest.media_type,
        source = found.source_digest, platform = { os = found.config.os or opts.platform.os,
            architecture = found.config.architecture or opts.platform.architecture,
            variant = found.config.variant },
    })
end

return M
