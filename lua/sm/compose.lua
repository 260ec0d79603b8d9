-- SPDX-License-Identifier: Apache-2.0
--
-- Manifests of our own: for images that came without one (`docker save`, a
-- folder, a filtered image) and for what `sm commit` makes. The same layers and
-- the same configuration give the same bytes.

local json = require "sm.json"
local manifest = require "sm.manifest"

local M = {}

M.manifest_type = "application/vnd.oci.image.manifest.v1+json"
M.config_type = "application/vnd.oci.image.config.v1+json"
local layer_type = "application/vnd.oci.image.layer.v1.tar"

--- The media type of a layer by its first bytes.
---@param head string
---@return string
function M.layer_type(head)
    if head:sub(1, 2) == "\x1f\x8b" then
        return layer_type .. "+gzip"
    elseif head:sub(1, 4) == "\x28\xb5\x2f\xfd" then
        return layer_type .. "+zstd"
    end
    return layer_type
end

-- Whose values are empty objects and mean something.
local sets = { Volumes = true, ExposedPorts = true }

--- JSON with sorted keys. cjson writes in the order of its hash; what we write
--- ourselves has to be the same every time. It does not tell an empty list from
--- an empty object either, so those are left out, which means the same.
---@param value any
---@param name string? key whose value this is
---@return string
function M.encode(value, name)
    if type(value) ~= "table" then
        return json.encode(value)
    end
    local parts = {}
    if #value > 0 then
        for i, item in ipairs(value) do
            parts[i] = M.encode(item)
        end
        return "[" .. table.concat(parts, ",") .. "]"
    end
    local keys = {}
    for key, item in pairs(value) do
        if type(item) ~= "table" or next(item) ~= nil or sets[name] then
            keys[#keys + 1] = key
        end
    end
    table.sort(keys)
    for i, key in ipairs(keys) do
        parts[i] = json.encode(key) .. ":" .. M.encode(value[key], key)
    end
    return "{" .. table.concat(parts, ",") .. "}"
end

local function list(items)
    local parts = {}
    for i, item in ipairs(items) do
        parts[i] = M.encode(item)
    end
    return "[" .. table.concat(parts, ",") .. "]"
end

-- The layers of a configuration replaced; and its history, when it no longer
-- tells of these layers.
local function with_layers(config_bytes, diff_ids, history)
    local config, why = json.decode_object(config_bytes)
    if not config then
        return nil, "its config is " .. why
    end
    local parts = { '"rootfs":{"type":"layers","diff_ids":' .. list(diff_ids) .. "}" }
    if history then
        parts[2] = '"history":' .. list(history)
    end
    config.rootfs, config.history = nil, nil
    local rest = M.encode(config)
    return rest:sub(1, -2) .. (#rest > 2 and "," or "") .. table.concat(parts, ",") .. "}"
end

--- An image of layers and a configuration. `config_bytes` is taken as it is
--- when its diff_ids are these, else with them replaced. Returns a resolved
--- image, {digest, bytes, manifest, config, config_bytes}.
---@param config_bytes string
---@param layers {digest: string, size: integer, media_type: string}[]
---@param diff_ids string[]
---@param history table[]? of the configuration, if it is to change
---@return table?
---@return string? error
function M.image(config_bytes, layers, diff_ids, history)
    local core = require "sm.image_core"
    local config, why = json.decode_object(config_bytes)
    if not config then
        return nil, "its config is " .. why
    end
    local have = type(config.rootfs) == "table" and config.rootfs.diff_ids
    if history or type(have) ~= "table"
        or table.concat(have, " ") ~= table.concat(diff_ids, " ") then
        config_bytes, why = with_layers(config_bytes, diff_ids, history)
        if not config_bytes then
            return nil, why
        end
    end
    local entries = {}
    for i, layer in ipairs(layers) do
        entries[i] = { mediaType = layer.media_type, digest = layer.digest, size = layer.size }
    end
    local bytes = ('{"schemaVersion":2,"mediaType":"%s","config":{"mediaType":"%s","digest":"%s",'
        .. '"size":%d},"layers":%s}'):format(M.manifest_type, M.config_type,
        core.sha256(config_bytes), #config_bytes, list(entries))
    local doc
    doc, why = manifest.read(bytes, M.manifest_type)
    config = doc and manifest.read_config(config_bytes, doc)
    if not config then
        return nil, why or "its config and its layers do not agree"
    end
    return { digest = core.sha256(bytes), bytes = bytes, manifest = doc, config = config,
        config_bytes = config_bytes }
end

return M
