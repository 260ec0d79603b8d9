-- SPDX-License-Identifier: Apache-2.0
--
-- The images that are in the store, seen as a catalogue: listed, looked into,
-- named, removed, measured, verified, cleared away. Nothing here fetches.

local uv = require "luv"
local assemble = require "sm.assemble"
local files = require "sm.files"
local loop = require "sm.loop"
local manifest = require "sm.manifest"
local platform = require "sm.platform"
local reference = require "sm.reference"

local M = {}

--- The images in the store, by name: {reference, name, digest, id (of the
--- configuration), size (bytes of its blobs), platform, pulled, ready}.
---@param opts table?
---@return table[]?
---@return string? error
function M.list(opts)
    local options, why = assemble.options(opts)
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

--- An entry by reference, or by the beginning of its digest or id.
function M.find(opts, text)
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
            local found = assemble.read_local({ store = opts.store }, entry)
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
    local options, why = assemble.options(opts)
    if not options then
        return nil, why
    end
    return loop.run(function()
        local entry, failed = M.find(options, text)
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
    local options, why = assemble.options(opts)
    if not options then
        return nil, why
    end
    local entry
    entry, why = M.find(options, text)
    if not entry then
        return nil, why
    end
    local found = assemble.read_local({ store = options.store }, entry)
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
        config_bytes = found.config_bytes,
        size = record and record.size,
        extents = record and record.extents,
    }
end

--- Give an image of the store another name. Yields.
---@async
---@param text string what it is called now: reference, digest or id
---@param name string
---@param opts table? store
---@return true?
---@return string? error
function M.tag(text, name, opts)
    local options, why = assemble.options(opts)
    if not options then
        return nil, why
    end
    local ref
    ref, why = reference.parse(name)
    if not ref then
        return nil, why
    elseif ref.digest then
        return nil, ("%s: a name cannot hold a digest"):format(name)
    end
    return loop.run(function()
        local held <close>, failed = options.store:use()
        if not held then
            return nil, failed
        end
        local entry
        entry, failed = M.find(options, text)
        if not entry then
            return nil, failed
        end
        return options.store:tag(reference.format(ref), { digest = entry.digest,
            size = entry.size, media_type = entry.media_type, source = entry.source,
            platform = entry.platform })
    end)
end

--- How an image came to be, newest first: {created, created_by, comment, size,
--- digest (of the step's layer)}.
---@param text string
---@param opts table?
---@return table[]?
---@return string? error
function M.history(text, opts)
    local about, why = M.inspect(text, opts)
    if not about then
        return nil, why
    end
    local steps = type(about.config.history) == "table" and about.config.history or {}
    local layers, at, out = about.manifest.layers, 0, {}
    local function word(step, key)
        return type(step[key]) == "string" and step[key] or nil
    end
    for _, step in ipairs(steps) do
        local layer
        if type(step) == "table" and not step.empty_layer then
            at = at + 1
            layer = layers[at]
        end
        if type(step) == "table" then
            table.insert(out, 1, { created = word(step, "created"), comment = word(step, "comment"),
                created_by = word(step, "created_by"), digest = layer and layer.digest,
                size = layer and layer.size or 0 })
        end
    end
    -- Layers of which the history says nothing.
    for i = at + 1, #layers do
        table.insert(out, 1, { digest = layers[i].digest, size = layers[i].size })
    end
    return out
end

-- ---------------------------------------------------------------- measuring

local function allocated(path)
    local stat = uv.fs_lstat(path)
    if not stat then
        return 0
    elseif stat.type ~= "directory" then
        return stat.blocks * 512
    end
    local sum = 0
    for _, entry in ipairs(files.list(path)) do
        sum = sum + allocated(path .. "/" .. entry.name)
    end
    return sum
end

-- The paths in the store that an image consists of.
local function parts_of(options, entry)
    local st, out = options.store, {}
    out[1] = st:blob_path(entry.digest)
    out[2] = st:image_dir(entry.digest)
    local found = assemble.read_local({ store = st }, entry)
    if found then
        out[3] = st:blob_path(found.manifest.config.digest)
        for _, layer in ipairs(found.manifest.layers) do
            out[#out + 1] = st:blob_path(layer.digest)
        end
        for _, diff_id in ipairs(found.config.rootfs.diff_ids) do
            out[#out + 1] = st:layer_dir(diff_id)
        end
    end
    return out
end

--- What the store takes on the disk, in bytes allocated: {total, blobs, layers,
--- images, unfinished, list = {{reference, digest, size, shared, unique, used,
--- in_use}…}}. `shared` is what an image has in common with others.
---@param opts table?
---@return table?
---@return string? error
function M.usage(opts)
    local options, why = assemble.options(opts)
    if not options then
        return nil, why
    end
    local st = options.store
    local entries
    entries, why = st:entries()
    if not entries then
        return nil, why
    end
    local owners, parts = {}, {}
    for i, entry in ipairs(entries) do
        parts[i] = {}
        for _, path in ipairs(parts_of(options, entry)) do
            parts[i][path] = true
        end
        for path in pairs(parts[i]) do
            owners[path] = owners[path] or {}
            owners[path][entry.digest] = true
        end
    end
    local pinned, list = st:pinned(), {}
    for i, entry in ipairs(entries) do
        local one = { reference = entry.name, digest = entry.digest, shared = 0, unique = 0,
            used = st:last_used(entry),
            in_use = st:leased(entry.digest) and "VM" or pinned[entry.digest] and "snapshot" or nil }
        for path in pairs(parts[i]) do
            local alone = next(owners[path], next(owners[path])) == nil
            local key = alone and "unique" or "shared"
            one[key] = one[key] + allocated(path)
        end
        one.size = one.shared + one.unique
        list[i] = one
    end
    local out = { list = list, blobs = allocated(st.dir .. "/blobs"),
        layers = allocated(st.dir .. "/derived/layers"),
        images = allocated(st.dir .. "/derived/images"), unfinished = allocated(st.dir .. "/tmp") }
    out.total = out.blobs + out.layers + out.images + out.unfinished
    return out
end

-- ------------------------------------------------------------------ pruning

local known_prune = { store = true, all = true, age = true, size = true, dry_run = true }

-- Images that may go, the longest unused first.
local function removable(options, what)
    local st = options.store
    local entries, why = st:entries()
    if not entries then
        return nil, why
    end
    local pinned, now, out, kept = st:pinned(), os.time(), {}, 0
    for _, entry in ipairs(entries) do
        local used = st:last_used(entry)
        if pinned[entry.digest] or st:leased(entry.digest) then
            kept = kept + 1
        elseif not entry.name or what.all or what.size
            or (what.age and now - used >= what.age) then
            if not (what.age and now - used < what.age) then
                out[#out + 1] = { entry = entry, used = used }
            end
        end
    end
    table.sort(out, function(a, b)
        if a.used ~= b.used then
            return a.used < b.used
        end
        return (a.entry.name or a.entry.digest) < (b.entry.name or b.entry.digest)
    end)
    return out, nil, kept
end

local busy = "a pull is under way; nothing was removed, try again later"

local function prune(options, what)
    local st = options.store
    local list, why, kept = removable(options, what)
    if not list then
        return nil, why
    end
    local result = { removed = {}, freed = 0, kept_in_use = kept }
    local function room()
        return what.size and M.usage({ store = st }).total <= what.size
    end
    local function collect()
        local freed, failed = st:collect()
        if not freed then
            return nil, failed or busy
        end
        result.freed = result.freed + freed
        return true
    end
    local ok = true
    if not what.dry_run then
        ok, why = collect()
    end
    for _, item in ipairs(list) do
        if not ok or (not what.all and item.entry.name and room()) then
            break
        end
        if not what.dry_run then
            ok, why = st:untag { item.entry }
            if ok then
                ok, why = collect()
            end
        end
        result.removed[#result.removed + 1] = item.entry.name or item.entry.digest
    end
    if not ok then
        return nil, why
    end
    return result
end

--- Clear the store: always what no name needs any more and what was left
--- unfinished; with `all`, every image; with `age` (seconds), those that were
--- not used for so long; with `size` (bytes), the longest unused until the
--- store is no larger. What a live VM or a snapshot needs stays. With
--- `dry_run` it only tells. {removed, freed, kept_in_use}. Yields.
---@async
---@param opts { store: any, all: boolean?, age: number?, size: integer?, dry_run: boolean? }?
---@return table?
---@return string? error
function M.prune(opts)
    opts = opts or {}
    for key in pairs(opts) do
        if not known_prune[key] then
            error(("unknown option %q"):format(tostring(key)), 2)
        end
    end
    local options, why = assemble.options { store = opts.store }
    if not options then
        return nil, why
    end
    return loop.run(prune, options, opts)
end

M.verify = require("sm.verify").store

return M
