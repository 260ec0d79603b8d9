-- SPDX-License-Identifier: Apache-2.0
--
-- Manifests, indexes and image configurations (OCI image-spec 1.1 and Docker's
-- schema 2), read from bytes that a stranger sent. Everything the rest of the
-- image side relies on is checked here: types, digests before they become
-- paths, sizes, one meaning per document (CVE-2021-41190: the same bytes must
-- not be an index to one reader and an image to another). Pure functions.

local json = require "sm.json"
local platform = require "sm.platform"
local reference = require "sm.reference"

local M = {}

local oci = "application/vnd.oci.image."
local docker = "application/vnd.docker.distribution.manifest."

-- All four kinds at once: docker-registry 2.8 answers 404 for an index when
-- the index type is not listed.
M.accept = table.concat({
    oci .. "index.v1+json", docker .. "list.v2+json",
    oci .. "manifest.v1+json", docker .. "v2+json",
}, ", ")

local kind_of = {
    [oci .. "index.v1+json"] = "index",
    [docker .. "list.v2+json"] = "index",
    [oci .. "manifest.v1+json"] = "image",
    [docker .. "v2+json"] = "image",
    [docker .. "v1+json"] = "schema1",
    [docker .. "v1+prettyjws"] = "schema1",
}

local image_config = {
    [oci .. "config.v1+json"] = true,
    ["application/vnd.docker.container.image.v1+json"] = true,
    ["application/octet-stream"] = true, -- Docker before 1.10
}

-- Compression is sniffed, so only the kind of layer matters.
local layer_types = {
    "^application/vnd%.oci%.image%.layer%.v1%.tar$",
    "^application/vnd%.oci%.image%.layer%.v1%.tar%+[%w]+$",
    "^application/vnd%.oci%.image%.layer%.nondistributable%.v1%.tar$",
    "^application/vnd%.oci%.image%.layer%.nondistributable%.v1%.tar%+[%w]+$",
    "^application/vnd%.docker%.image%.rootfs%.diff%.tar$",
    "^application/vnd%.docker%.image%.rootfs%.diff%.tar%.[%w]+$",
    "^application/vnd%.docker%.image%.rootfs%.foreign%.diff%.tar$",
    "^application/vnd%.docker%.image%.rootfs%.foreign%.diff%.tar%.[%w]+$",
}

M.limit_bytes = 4 << 20        -- of a manifest or index
M.config_limit_bytes = 8 << 20
M.max_depth = 4                -- of nested indexes
local max_layers = 512
local max_entries = 4096
local max_blob_bytes = 1 << 46

-- A stranger's word, safe to show.
local function shown(text)
    return ("%q"):format(tostring(text):gsub("[%c\128-\255]", "?"):sub(1, 80))
end

-- "application/JSON; charset=utf-8" → "application/json"
local function plain_type(text)
    if type(text) ~= "string" then
        return nil
    end
    return text:match("^%s*([^;%s]*)"):lower()
end

---@class sm.Descriptor
---@field digest string
---@field size integer
---@field media_type string
---@field urls string[]?

local function check_descriptor(d, what)
    if not json.is_object(d) then
        return nil, what .. " is not a descriptor"
    end
    local algorithm, why = reference.parse_digest(d.digest)
    if not algorithm then
        return nil, what .. ": " .. why
    end
    if math.type(d.size) ~= "integer" or d.size < 0 or d.size > max_blob_bytes then
        return nil, what .. ": its size is missing or absurd"
    end
    if d.mediaType ~= nil and type(d.mediaType) ~= "string" then
        return nil, what .. ": its mediaType is not text"
    end
    local urls
    if json.is_array(d.urls, "string") and #d.urls > 0 then
        urls = d.urls
    end
    return { digest = d.digest, size = d.size, media_type = plain_type(d.mediaType) or "",
        urls = urls }
end

local function check_layers(list)
    if not json.is_array(list) then
        return nil, "its layers are not a list"
    elseif #list > max_layers then
        return nil, ("it has %d layers, more than the %d allowed"):format(#list, max_layers)
    end
    local layers = {}
    for i, item in ipairs(list) do
        local what = "layer " .. i
        local layer, why = check_descriptor(item, what)
        if not layer then
            return nil, why
        end
        local known = false
        for _, pattern in ipairs(layer_types) do
            known = known or layer.media_type:find(pattern) ~= nil
        end
        if layer.media_type:find("encrypted", 1, true) then
            return nil, what .. " is encrypted, which is not supported"
        elseif not known then
            return nil, ("%s is of an unknown type, %s"):format(what, shown(layer.media_type))
        end
        layers[i] = layer
    end
    return layers
end

local function read_image(doc)
    local artefact = doc.artifactType
    local config_type = json.is_object(doc.config) and plain_type(doc.config.mediaType)
    if artefact == nil and config_type and not image_config[config_type] then
        artefact = config_type
    end
    if artefact ~= nil and not image_config[plain_type(artefact) or ""] then
        return nil, "it is not a container image but an artefact of type " .. shown(artefact)
    end
    local config, why = check_descriptor(doc.config, "its config")
    if not config then
        return nil, why
    elseif config.size > M.config_limit_bytes then
        return nil, "its config is larger than " .. M.config_limit_bytes .. " bytes"
    end
    local layers
    layers, why = check_layers(doc.layers)
    if not layers then
        return nil, why
    end
    return { config = config, layers = layers }
end

local function read_index(doc)
    if not json.is_array(doc.manifests) then
        return nil, "its manifests are not a list"
    elseif #doc.manifests > max_entries then
        return nil, "its index has too many entries"
    end
    local entries = {}
    for i, item in ipairs(doc.manifests) do
        local entry, why = check_descriptor(item, "entry " .. i)
        if not entry then
            return nil, why
        elseif entry.size > M.limit_bytes then
            return nil, ("entry %d is larger than %d bytes"):format(i, M.limit_bytes)
        end
        entry.platform = json.is_object(item.platform) and item.platform or nil
        entry.annotations = json.is_object(item.annotations) and item.annotations or {}
        entries[i] = entry
    end
    return { entries = entries }
end

local function kind_from(doc, content_type)
    local declared = plain_type(doc.mediaType)
    local from_doc = kind_of[declared or ""]
    local from_header = kind_of[content_type or ""]
    if declared and declared ~= "" and not from_doc then
        return nil, "it is of an unknown type, " .. shown(declared)
    end
    if from_doc and from_header and declared ~= content_type then
        return nil, ("it was sent as %s but calls itself %s"):format(content_type, declared)
    end
    local kind = from_doc or from_header
    if doc.schemaVersion == 1 or kind == "schema1" then
        return nil, "it is in schema 1, a format obsolete since 2017, "
            .. "which is not supported; push it again with a newer tool"
    elseif doc.schemaVersion ~= 2 then
        return nil, "it has no schemaVersion 2"
    end
    if doc.manifests ~= nil and (doc.layers ~= nil or doc.config ~= nil) then
        return nil, "it claims to be an index and an image at once"
    end
    local shape = doc.manifests ~= nil and "index" or doc.layers ~= nil and "image"
    if not shape then
        return nil, "it has neither layers nor manifests"
    elseif kind and kind ~= shape then
        return nil, ("it is sent as an %s but has the form of an %s"):format(kind, shape)
    end
    return shape, declared or (from_header and content_type)
end

---@class sm.Manifest
---@field kind "image"|"index"
---@field media_type string
---@field config sm.Descriptor? of an image
---@field layers sm.Descriptor[]? of an image
---@field entries table[]? of an index

--- Read a manifest or an index. `content_type` is what it was sent or
--- described as, if known. The error continues a sentence that names the image.
---@param bytes string
---@param content_type string?
---@return sm.Manifest?
---@return string? error
function M.read(bytes, content_type)
    local doc, why = json.decode_object(bytes)
    if not doc then
        return nil, "its manifest is " .. why
    end
    local kind, media_type = kind_from(doc, plain_type(content_type))
    if not kind then
        return nil, media_type
    end
    local out
    if kind == "index" then
        out, why = read_index(doc)
        media_type = media_type or oci .. "index.v1+json"
    else
        out, why = read_image(doc)
        media_type = media_type or oci .. "manifest.v1+json"
    end
    if not out then
        return nil, why
    end
    out.kind, out.media_type = kind, media_type
    return out
end

local function is_attestation(entry)
    local p = entry.platform
    return entry.annotations["vnd.docker.reference.type"] == "attestation-manifest"
        or (p and p.os == "unknown" and p.architecture == "unknown")
end

--- The entries of an index that may serve a platform, best first: the exact
--- variant, then compatible ones, then entries that name no platform (their
--- configuration will tell). `choose(entries, wanted)` picks one in our place.
---@param index sm.Manifest
---@param wanted sm.Platform
---@param choose? fun(entries: table[], wanted: sm.Platform): table?
---@return table[] entries
---@return string[] offered what there is, for the error
function M.candidates(index, wanted, choose)
    local found, offered, unnamed = {}, {}, {}
    local usable = {}
    for _, entry in ipairs(index.entries) do
        if not is_attestation(entry) then
            if entry.platform then
                usable[#usable + 1] = entry
                offered[#offered + 1] = shown(platform.format(entry.platform)):gsub('"', "")
            else
                unnamed[#unnamed + 1] = entry
            end
        end
    end
    if choose then
        local all = table.move(unnamed, 1, #unnamed, #usable + 1, table.move(usable, 1, #usable, 1, {}))
        return { choose(all, wanted) }, offered
    end
    for _, variant in ipairs(platform.variants(wanted)) do
        for _, entry in ipairs(usable) do
            local p = entry.platform
            if p.os == wanted.os and p.architecture == wanted.architecture
                and (p.variant or "") == variant then
                found[#found + 1] = entry
            end
        end
    end
    table.move(unnamed, 1, #unnamed, #found + 1, found)
    return found, offered
end

--- Read an image's configuration and hold it against its manifest.
---@param bytes string
---@param manifest sm.Manifest
---@param wanted sm.Platform? refuse an image for another one
---@return table? config the document
---@return string? error
function M.read_config(bytes, manifest, wanted)
    local config, why = json.decode_object(bytes)
    if not config then
        return nil, "its config is " .. why
    end
    local rootfs = config.rootfs
    if not json.is_object(rootfs) or not json.is_array(rootfs.diff_ids, "string") then
        return nil, "its config lists no diff_ids"
    end
    if #rootfs.diff_ids ~= #manifest.layers then
        return nil, ("it has %d layers but its config lists %d")
            :format(#manifest.layers, #rootfs.diff_ids)
    end
    for i, diff_id in ipairs(rootfs.diff_ids) do
        local algorithm
        algorithm, why = reference.parse_digest(diff_id)
        if not algorithm then
            return nil, ("diff_ids[%d]: %s"):format(i, why)
        end
    end
    -- A configuration that names no platform is taken at its manifest's word.
    if wanted and config.os and config.architecture and not (config.os == wanted.os
        and config.architecture == wanted.architecture) then
        return nil, ("it is for %s, not for %s"):format(
            shown(platform.format { os = config.os, architecture = config.architecture })
                :gsub('"', ""), platform.format(wanted))
    end
    return config
end

return M
