-- SPDX-License-Identifier: Apache-2.0
--
-- Is the store what it says it is? Every blob is hashed, every image followed
-- to its last layer, every merged image made again from the indexes of its
-- layers and compared; with `deep`, every layer is converted again as well
-- (the same tar gives the same bytes, so a difference is damage). `repair`
-- removes what is wrong: the next pull makes or fetches it anew.

local assemble = require "sm.assemble"
local files = require "sm.files"
local loop = require "sm.loop"
local manifest = require "sm.manifest"

local M = {}

local known = { store = true, deep = true, repair = true, progress = true }

local function note(run, path, what)
    run.problems[#run.problems + 1] = { path = path, what = what }
    if run.opts.repair then
        files.remove(path)
    end
end

-- The digest of a file, computed on a thread. Yields.
local function digest_of(run, path, algorithm)
    local job <close>, why = run.core.digest { file = path, algorithm = algorithm }
    if not job then
        return nil, why
    end
    local result
    result, why = assemble.wait(job)
    return result and result.digest, why
end

local function check_blobs(run)
    local base = run.store.dir .. "/blobs"
    for _, algorithm in ipairs(files.list(base)) do
        for _, entry in ipairs(files.list(base .. "/" .. algorithm.name)) do
            local path = ("%s/%s/%s"):format(base, algorithm.name, entry.name)
            run.watch { type = "verify", path = path }
            local have, why = digest_of(run, path, algorithm.name)
            run.blobs = run.blobs + 1
            if have ~= algorithm.name .. ":" .. entry.name then
                note(run, path, have and "its bytes have another digest" or why)
            end
        end
    end
end

-- Make the merged image again and compare. Yields.
local function check_merged(run, digest, diff_ids)
    local st = run.store
    local dir = st:image_dir(digest)
    if not files.size(dir .. "/image.json") then
        return -- never made, or made anew by the next pull
    end
    if not st:image(digest) then
        note(run, dir, "a part of it has another size than recorded")
        return
    end
    local dirs = {}
    for i, diff_id in ipairs(diff_ids) do
        dirs[i] = st:layer_dir(diff_id)
    end
    local out = st:temporary("verify")
    local job <close>, why = run.core.merge { layers = dirs, out = out, async = true }
    local result
    if job then
        result, why = assemble.wait(job)
    end
    local a = result and digest_of(run, out)
    local b = result and digest_of(run, dir .. "/meta")
    files.remove(out)
    if not result then
        note(run, dir, "its layers do not merge: " .. tostring(why))
    elseif a ~= b then
        note(run, dir, "its metadata is not what its layers give")
    end
end

-- Convert a layer again and compare. Yields.
local function check_layer(run, layer, diff_id)
    local st = run.store
    local dir, blob = st:layer_dir(diff_id), st:blob_path(layer.digest)
    if run.seen[diff_id] or not st:has_layer(diff_id) or not files.size(blob) then
        return
    end
    run.seen[diff_id] = true
    local out = st:temporary("verify")
    local ok, why = files.make(out)
    if not ok then
        note(run, dir, why)
        return
    end
    local job <close>, failed = run.core.ingest { blob = blob, diff_id = diff_id, out = out }
    local result
    result, why = nil, failed
    if job then
        result, why = assemble.wait(job)
    end
    run.layers = run.layers + 1
    for _, name in ipairs { "/index", "/data" } do
        if result and digest_of(run, out .. name) ~= digest_of(run, dir .. name) then
            note(run, dir, "it is not what its blob gives")
            break
        end
    end
    files.remove(out)
    if not result then
        note(run, blob, "it does not convert: " .. tostring(why))
    end
end

local function check_image(run, entry)
    local st = run.store
    local bytes, why = st:get(entry, manifest.limit_bytes)
    local doc
    if bytes then
        doc, why = manifest.read(bytes, entry.media_type)
    end
    if not doc or doc.kind ~= "image" then
        note(run, st:blob_path(entry.digest), why or "it is no image's manifest")
        return
    end
    local config
    bytes, why = st:get(doc.config, manifest.config_limit_bytes)
    if bytes then
        config, why = manifest.read_config(bytes, doc)
    end
    if not config then
        note(run, st:blob_path(doc.config.digest), why)
        return
    end
    for i, layer in ipairs(doc.layers) do
        if not st:has_blob(layer) then
            note(run, st:blob_path(layer.digest), "missing, or of another size; needed by "
                .. (entry.name or entry.digest))
        elseif run.opts.deep then
            check_layer(run, layer, config.rootfs.diff_ids[i])
        end
    end
    check_merged(run, entry.digest, config.rootfs.diff_ids)
end

local function verify(run)
    local held <close>, why = run.store:use()
    if not held then
        return nil, why
    end
    local entries
    entries, why = run.store:entries()
    if not entries then
        return nil, why
    end
    check_blobs(run)
    for _, entry in ipairs(entries) do
        check_image(run, entry)
    end
    return { problems = run.problems, blobs = run.blobs, images = #entries, layers = run.layers }
end

--- Verify the store: {problems = {{path, what}…}, blobs, images, layers}. Yields.
---@async
---@param opts { store: any, deep: boolean?, repair: boolean?, progress: fun(event: table)? }?
---@return table?
---@return string? error
function M.store(opts)
    opts = opts or {}
    for key in pairs(opts) do
        if not known[key] then
            error(("unknown option %q"):format(tostring(key)), 2)
        end
    end
    local options, why = assemble.options { store = opts.store }
    if not options then
        return nil, why
    end
    return loop.run(verify, { opts = opts, store = options.store, core = assemble.core(options),
        watch = opts.progress or function() end, problems = {}, seen = {}, blobs = 0, layers = 0 })
end

return M
