-- SPDX-License-Identifier: Apache-2.0
--
-- What a running VM has changed, as a new layer on its image: the agent tells
-- the writable layer as a tar (core/guest/layer.c), which becomes a blob, and
-- with a configuration of one more step a manifest of ours. The guest goes on
-- running; a program that writes meanwhile may leave a file half old, half
-- new, as with any copy of a live system.
--
-- The guest is hostile: its tar is a layer like any other, converted under the
-- same limits, and it cannot grow past `limit` bytes on the host's disk.

local uv = require "luv"
local assemble = require "sm.assemble"
local compose = require "sm.compose"
local files = require "sm.files"
local loop = require "sm.loop"
local reference = require "sm.reference"

local M = {}

local default_limit_bytes = 64 << 30
local known = { store = true, message = true, author = true, created_by = true, config = true,
    limit = true, limits = true, progress = true }

-- The guest's tar into a file. Yields.
local function receive(vm, file, limit)
    local proc, why = vm:spawn { argv = { "layer" }, layer = true }
    if not proc then
        return nil, why
    end
    local fd
    fd, why = uv.fs_open(file, "w", tonumber("600", 8))
    if not fd then
        return nil, files.error(file, why)
    end
    local size, failed = 0, nil
    while not failed do
        local piece, err = proc:read "stdout"
        if not piece then
            failed = err
            break
        end
        size = size + #piece
        local n
        n, why = uv.fs_write(fd, piece, -1)
        if n ~= #piece then
            failed = files.error(file, why or "short write")
        elseif size > limit then
            failed = ("the changes are larger than %d bytes (limit)"):format(limit)
        end
    end
    uv.fs_close(fd)
    if failed then
        proc:signal "KILL"
        return nil, failed
    end
    local text = proc:read_all "stderr"
    local exit
    exit, why = proc:wait()
    if not exit then
        return nil, why
    elseif exit.status ~= 0 then
        return nil, "the guest could not read its changes: "
            .. (text or ""):gsub("[%c\128-\255]+", " "):gsub("%s+$", ""):sub(1, 200)
    end
    return size
end

-- The configuration with the caller's changes ("Cmd", "Env", …) over it.
local function configure(image, opts)
    local json = require "sm.json"
    local bytes = image.config_bytes
    if not opts.config then
        return bytes
    end
    local config = json.decode_object(bytes)
    config.config = config.config or {}
    for key, value in pairs(opts.config) do
        config.config[key] = value
    end
    return compose.encode(config)
end

local function history_of(config, step)
    local list = {}
    for i, item in ipairs(type(config.history) == "table" and config.history or {}) do
        list[i] = item
    end
    list[#list + 1] = step
    return list
end

-- What the image was when the VM started: its manifest and blobs in the store.
local function base_of(options, image)
    local found = assemble.read_local({ store = options.store }, { digest = image.digest,
        size = files.size(options.store:blob_path(image.digest)) })
    if not found then
        return nil, ("%s: its manifest is not in the image store"):format(image.name)
    end
    for _, layer in ipairs(found.manifest.layers) do
        if not options.store:has_blob(layer) then
            return nil, ("%s: it was run from where it lay, and its layers are not in the image store;"
                .. " pull or `sm load` it first"):format(image.name)
        end
    end
    return found
end

local function commit(vm, options, name, opts)
    local st = options.store
    local held <close>, why = st:use()
    if not held then
        return nil, why
    end
    local base
    base, why = base_of(options, vm.image)
    if not base then
        return nil, why
    end
    local file = st:temporary("commit")
    local tidy <close> = setmetatable({}, { __close = function()
        files.remove(file)
    end })
    local size
    size, why = receive(vm, file, opts.limit or default_limit_bytes)
    if not size then
        return nil, why
    end
    local job <close> = assert(assemble.core(options).digest { file = file })
    local sum
    sum, why = assemble.wait(job)
    if not sum then
        return nil, why
    end
    local layers, diff_ids = {}, {}
    for i, layer in ipairs(base.manifest.layers) do
        layers[i], diff_ids[i] = layer, base.config.rootfs.diff_ids[i]
    end
    layers[#layers + 1] = { digest = sum.digest, size = size, media_type = compose.layer_type "" }
    diff_ids[#diff_ids + 1] = sum.digest
    local found
    found, why = compose.image(configure(base, opts), layers, diff_ids, history_of(base.config, {
        created = os.date("!%Y-%m-%dT%H:%M:%SZ"), created_by = opts.created_by or "sm commit",
        comment = opts.message, author = opts.author,
    }))
    if not found then
        return nil, why
    end
    local image
    image, why = assemble.assemble(options, found, {
        blob = function(layer, to)
            if layer.digest ~= sum.digest then
                return nil, ("layer %s is gone from the image store"):format(layer.digest)
            end
            return files.link(file, to)
        end,
        progress = function() end,
    }, name or found.digest)
    if not image then
        return nil, why
    end
    local close <close> = image
    local ok
    ok, why = assemble.tag(options, name, found)
    if not ok then
        return nil, why
    end
    return { reference = name or found.digest, digest = found.digest, layer = sum.digest, size = size }
end

--- Keep what a running VM has changed as an image: its own image with one more
--- layer. opts: store, message, author, created_by, config (keys of the image's
--- `config` to replace: Cmd, Env …), limit (bytes of the layer), limits (of its
--- conversion). Yields.
---@async
---@param vm sm.VM
---@param name string? reference to know it by
---@param opts table?
---@return { reference: string, digest: string, layer: string, size: integer }?
---@return string? error
function M.commit(vm, name, opts)
    opts = opts or {}
    for key in pairs(opts) do
        if not known[key] then
            error(("commit: unknown option %q"):format(tostring(key)), 2)
        end
    end
    local options, why = assemble.options { store = opts.store, limits = opts.limits,
        progress = opts.progress }
    if not options then
        return nil, why
    end
    local full
    if name then
        local ref
        ref, why = reference.parse(name)
        if not ref or ref.digest then
            return nil, why or ("%s: a name cannot hold a digest"):format(name)
        end
        full = reference.format(ref)
    end
    return loop.run(commit, vm, options, full, opts)
end

return M
