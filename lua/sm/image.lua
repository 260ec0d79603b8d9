-- SPDX-License-Identifier: Apache-2.0
--
-- Images, from a name to a root device: resolve, fetch, convert, merge.
--
--   reference ─▶ registry or layout folder ─▶ blobs ─▶ per layer EROFS parts
--                                                      ─▶ one merged image
--
-- A pull holds the store's `use` lock, works on its layers in parallel, each
-- under its own lock (so ten pulls of one image do the work once), and names
-- the image last. What is there already is not fetched, what is all there
-- needs no network. The result holds a lease: as long as it lives, nobody
-- removes the image.
--
-- A script can watch (`progress`), choose (`platform`, `policy`) and refuse
-- (`verify`). Every function here that fetches yields.

local uv = require "luv"
local fetch = require "sm.fetch"
local files = require "sm.files"
local gate = require "sm.gate"
local layout = require "sm.layout"
local loop = require "sm.loop"
local manifest = require "sm.manifest"
local platform = require "sm.platform"
local reference = require "sm.reference"
local registry = require "sm.registry"
local store = require "sm.store"

local M = {}

local parallel_downloads = 4
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
    force = true,
}
local policies = { missing = true, always = true, never = true }

local function read_options(opts)
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

local function core_of(opts)
    return opts.core or require "sm.image_core"
end

-- Wait for a job of the image core; its result. Yields.
local function wait_job(job)
    loop.readable(job:pollfd())
    local result, why, errno = job:result()
    return result, why, errno
end

-- What is known of a resolved image, as the caller's img.
local function finish(opts, found, name, lease)
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

-- The manifest and configuration of an image in the store, or nil.
local function read_local(opts, entry)
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
    ok, why = work.source.blob(layer, part, function(id)
        set_phase(work, "download", function()
            return work.source.progress(id)
        end)
    end)
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
    local job <close>, failed = core_of(work.opts).ingest {
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
    result, why, errno = wait_job(job)
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
        download = gate.new(parallel_downloads),
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
    local job <close>, failed = core_of(opts).merge {
        layers = dirs, out = folder .. "/meta", limits = opts.limits, async = true,
    }
    if not job then
        return nil, failed
    end
    local result, errno
    result, why, errno = wait_job(job)
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

-- Put a resolved image together from a source {blob(layer, file, watching),
-- progress(id), path(layer)?}. Returns img. The caller holds `use`. Yields.
local function assemble(opts, found, source, name)
    local st = opts.store
    opts.progress { type = "resolved", digest = found.digest, layers = found.manifest.layers,
        reference = name }
    if opts.verify then
        local fine, reason = opts.verify {
            reference = name, digest = found.digest, source_digest = found.source_digest,
            config = found.config, manifest = found.manifest,
        }
        if not fine then
            return nil, ("%s: refused by policy%s"):format(name, reason and ": " .. reason or "")
        end
    end
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
    local image = ok and finish(opts, found, name, lease)
    if not image then
        lease:close()
        return nil, why or "the image store changes under our hands; try again"
    end
    return image
end

-- A registry client made at the first need, and the source it makes.
local function registry_source(opts, ref)
    local self = {}
    local transport
    function self.client()
        if not self.opened then
            transport = fetch.open { parallel = parallel_downloads, core = opts.core }
            self.opened = registry.open(ref, {
                fetch = transport, insecure = opts.insecure, cafile = opts.cafile,
                credentials = opts.credentials, retry_delay = opts.retry_delay,
                notify = opts.progress,
            })
        end
        return self.opened
    end
    function self.blob(layer, file, watching)
        return self.client():blob(layer, file, watching)
    end
    function self.progress(id)
        return transport:progress(id)
    end
    return setmetatable(self, { __close = function()
        if transport then
            transport:close()
        end
    end })
end

-- What is in the store under this name and good for the platform, or nil.
local function find_local(opts, ref)
    local entry, why = opts.store:find(ref)
    if not entry then
        return nil, why
    end
    local found = read_local(opts, entry)
    return found, nil, entry
end

-- The warm start: everything is there. nil: it is not.
local function warm(opts, ref)
    local name = reference.format(ref)
    for _ = 1, 3 do
        local found, why = find_local(opts, ref)
        if not found or not opts.store:image(found.digest) then
            return nil, why
        end
        local lease
        lease, why = opts.store:lease(found.digest)
        if not lease then
            return nil, why
        end
        -- Somebody may have removed it before we held it.
        local again = find_local(opts, ref)
        if again and again.digest == found.digest then
            local image = finish(opts, found, name, lease)
            if image then
                return image
            end
        end
        lease:close()
    end
end

-- Resolve by network or, for what is here in part, by what is here.
local function resolve(opts, ref, source)
    if opts.policy ~= "always" then
        local found = find_local(opts, ref)
        if found then
            return found
        end
    end
    opts.progress { type = "resolve", reference = reference.format(ref) }
    return source.client():resolve(opts.platform)
end

-- With policy "always": whether the store has what the tag means now. Yields.
local function is_current(opts, ref, source)
    local entry = opts.store:find(ref)
    if not entry or not entry.source then
        return false
    end
    opts.progress { type = "resolve", reference = reference.format(ref) }
    return source.client():head() == entry.source
end

local function pull(opts, ref)
    local name = reference.format(ref)
    if opts.policy ~= "always" then
        local image, why = warm(opts, ref)
        if image or why then
            return image, why
        end
    end
    if opts.policy == "never" then
        return nil, ("%s: not in the image store, and pulling was forbidden")
            :format(reference.familiar(ref))
    end
    local source <close> = registry_source(opts, ref)
    if opts.policy == "always" and is_current(opts, ref, source) then
        local image = warm(opts, ref)
        if image then
            return image
        end
    end
    local held <close>, why = opts.store:use()
    if not held then
        return nil, why
    end
    local found
    found, why = resolve(opts, ref, source)
    if not found then
        return nil, why
    end
    local image
    image, why = assemble(opts, found, source, name)
    if not image then
        return nil, why
    end
    local ok
    ok, why = opts.store:tag(name, {
        digest = found.digest, size = #found.bytes, media_type = found.manifest.media_type,
        source = found.source_digest, platform = { os = found.config.os or opts.platform.os,
            architecture = found.config.architecture or opts.platform.architecture,
            variant = found.config.variant },
    })
    if not ok then
        image:close()
        return nil, why
    end
    opts.progress { type = "done", reference = name, digest = found.digest }
    return image
end

--- Bring an image from a registry into the store, or find it there, and return
--- it ready to be a root device.
--- opts: store (an sm.Store or a folder), platform ("os/arch[/variant]"),
--- policy ("missing", "always", "never"), progress (function(event)), verify
--- (function{reference, digest, source_digest, config, manifest} → boolean,
--- reason), limits (of conversion), insecure, cafile, credentials. Yields.
---
--- Events: {type="resolve"}, {type="resolved", digest, layers}, {type="layer",
--- digest, index, phase = "exists"|"waiting"|"download"|"convert"|"done", now,
--- total}, {type="retry", reason, delay, try}, {type="merge"}, {type="done"}.
---@async
---@param ref string|sm.Reference
---@param opts table?
---@return sm.Image?
---@return string? error
function M.pull(ref, opts)
    local options, why = read_options(opts)
    if not options then
        return nil, why
    end
    if type(ref) == "string" then
        ref, why = reference.parse(ref)
        if not ref then
            return nil, why
        end
    end
    return loop.run(pull, options, ref)
end

local function load_layout(opts, text)
    local dir, tag = layout.split(text)
    local source, why = layout.open(dir, opts.core)
    if not source then
        return nil, why
    end
    local held <close>, failed = opts.store:use()
    if not held then
        return nil, failed
    end
    local found
    found, why = source:resolve(tag, opts.platform)
    if not found then
        return nil, why
    end
    local absolute = uv.fs_realpath(dir) or dir
    return assemble(opts, found, {
        path = function(layer)
            return source:blob_path(layer.digest)
        end,
    }, "oci:" .. absolute .. (found.tag and ":" .. found.tag or ""))
end

--- An image out of an OCI layout folder, "DIR" or "DIR:TAG". Its layers are
--- converted into the store; the folder's files are only read. Options as in
--- `pull`. Yields.
---@async
---@param text string
---@param opts table?
---@return sm.Image?
---@return string? error
function M.from_layout(text, opts)
    local options, why = read_options(opts)
    if not options then
        return nil, why
    end
    return loop.run(load_layout, options, text)
end

--- What `sm run` takes: "oci:DIR[:TAG]", a path to a layout folder, or a
--- reference. Options as in `pull`. Yields.
---@async
---@param text string
---@param opts table?
---@return sm.Image?
---@return string? error
function M.get(text, opts)
    local path = text:match("^oci:(.+)$")
    if path then
        return M.from_layout(path, opts)
    elseif text:find("^%.?%.?/") or text == "." or text == ".." then
        return M.from_layout(text, opts)
    end
    return M.pull(text, opts)
end

--- The images in the store, by name: {reference, name, digest, id (of the
--- configuration), size (bytes of its blobs), platform, pulled, ready}.
---@param opts table?
---@return table[]?
---@return string? error
function M.list(opts)
    local options, why = read_options(opts)
    if not options then
        return nil, why
    end
    local entries
    entries, why = options.store:entries()
    if not entries then
        return nil, why
    end
    local list = {}
    for i, entry in ipairs(entries) do
        local bytes = options.store:get(entry, manifest.limit_bytes)
        local doc = bytes and manifest.read(bytes, entry.media_type)
        local size = entry.size
        if doc and doc.kind == "image" then
            size = size + doc.config.size
            for _, layer in ipairs(doc.layers) do
                size = size + layer.size
            end
        end
        local ref = entry.name and reference.parse(entry.name)
        list[i] = {
            reference = entry.name,
            name = ref and reference.familiar(ref) or entry.name,
            digest = entry.digest,
            id = doc and doc.config and doc.config.digest,
            size = size,
            platform = entry.platform and platform.format(entry.platform),
            pulled = entry.pulled,
            ready = options.store:image(entry.digest) ~= nil,
        }
    end
    table.sort(list, function(a, b)
        return (a.reference or a.digest) < (b.reference or b.digest)
    end)
    return list
end

-- An entry by reference, or by the beginning of its digest or id.
local function find_entry(opts, text)
    local ref, why = reference.parse(text)
    if ref then
        local entry, failed = opts.store:find(ref)
        if entry or failed then
            return entry, failed
        end
    end
    local prefix = text:gsub("^sha256:", "")
    if #prefix >= 6 and not prefix:find("%X") then
        local entries, failed = opts.store:entries()
        if not entries then
            return nil, failed
        end
        local match
        for _, entry in ipairs(entries) do
            local found = read_local({ store = opts.store }, entry)
            local id = found and found.manifest.config.digest or ""
            if entry.digest:find(":" .. prefix, 1, true) or id:find(":" .. prefix, 1, true) then
                if match and match.digest ~= entry.digest then
                    return nil, ("%s: means more than one image"):format(text)
                end
                match = match or entry
            end
        end
        if match then
            return match
        end
    end
    return nil, ref and ("%s: no such image in the store"):format(text) or why
end

--- Remove an image by reference, digest or id; with `force` also while a VM
--- uses it. Returns the bytes that were freed. Yields.
---@async
---@param text string
---@param opts table? store, force
---@return integer? freed
---@return string? error
function M.remove(text, opts)
    local options, why = read_options(opts)
    if not options then
        return nil, why
    end
    return loop.run(function()
        local entry, failed = find_entry(options, text)
        if not entry then
            return nil, failed
        end
        return options.store:remove(entry, options.force)
    end)
end

--- All that is known of an image in the store: {reference, digest, source,
--- pulled, manifest, config, layers, size}.
---@param text string
---@param opts table?
---@return table?
---@return string? error
function M.inspect(text, opts)
    local options, why = read_options(opts)
    if not options then
        return nil, why
    end
    local entry
    entry, why = find_entry(options, text)
    if not entry then
        return nil, why
    end
    local found = read_local({ store = options.store }, entry)
    if not found then
        return nil, ("%s: the image store is damaged: its manifest or config cannot be read; "
            .. "remove the image and pull it again"):format(text)
    end
    local record = options.store:image(entry.digest)
    return {
        reference = entry.name,
        digest = entry.digest,
        source = entry.source,
        pulled = entry.pulled,
        media_type = entry.media_type,
        manifest = found.manifest,
        config = found.config,
        size = record and record.size,
        extents = record and record.extents,
    }
end

return M
