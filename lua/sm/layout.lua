-- SPDX-License-Identifier: Apache-2.0
--
-- Somebody's OCI image layout folder as a source of images (image-spec,
-- "image-layout.md"): its index, and small blobs with their digests checked.
-- Layers are converted straight from its files; a diffID vouches for them.

local files = require "sm.files"
local json = require "sm.json"
local manifest = require "sm.manifest"
local platform = require "sm.platform"
local reference = require "sm.reference"

local M = {}

local ref_name = "org.opencontainers.image.ref.name"
local max_listed = 10

---@class sm.Layout
local Layout = {}
Layout.__index = Layout

--- Whether a folder looks like an image layout.
---@param dir string
---@return boolean
function M.is(dir)
    return files.size(dir .. "/oci-layout") ~= nil
end

--- Split "DIR[:TAG]"; a folder whose name holds a colon wins over a tag.
---@param text string
---@return string dir
---@return string? tag
function M.split(text)
    if not M.is(text) then
        local dir, tag = text:match("^(.+):([^/]+)$")
        if not dir then
            dir, tag = text:match("^(.+):([^:]*/[^:]*)$") -- names with slashes are legal
        end
        if dir then
            return dir, tag
        end
    end
    return text, nil
end

--- Open a layout. Errors say what the folder lacks.
---@param dir string
---@param core table? stand-in for sm.image_core
---@return sm.Layout?
---@return string? error
function M.open(dir, core)
    local text, why, code = files.read(dir .. "/oci-layout", 4096)
    if not text then
        if code == "ENOENT" or code == "ENOTDIR" then
            return nil, dir .. ": not an OCI image layout: it has no oci-layout file"
        end
        return nil, why
    end
    local doc = json.decode_object(text)
    if not doc or type(doc.imageLayoutVersion) ~= "string"
        or not doc.imageLayoutVersion:find("^1%.") then
        return nil, dir .. ": not an OCI image layout of version 1"
    end
    return setmetatable({ dir = dir, core = core or require "sm.image_core" }, Layout)
end

--- A layout whose files are elsewhere: in an archive that was unpacked.
---@param name string for messages
---@param index string path of its index.json
---@param find fun(digest: string): string? path of a blob
---@param core table
---@return sm.Layout
function M.over(name, index, find, core)
    return setmetatable({ dir = name, index = index, find = find, core = core }, Layout)
end

---@param digest string
---@return string path
function Layout:blob_path(digest)
    if self.find then
        return self.find(digest)
    end
    local algorithm, hex = assert(reference.parse_digest(digest))
    return ("%s/blobs/%s/%s"):format(self.dir, algorithm, hex)
end

local function read_index(self)
    local path = self.index or self.dir .. "/index.json"
    local text, why = files.read(path, manifest.limit_bytes)
    if not text then
        return nil, why
    end
    local index
    index, why = manifest.read(text, "application/vnd.oci.image.index.v1+json")
    if not index then
        return nil, path .. ": " .. why
    end
    return index
end

local function pick(self, index, tag)
    local names, latest = {}, nil
    for _, entry in ipairs(index.entries) do
        local name = entry.annotations[ref_name]
        if tag and name == tag then
            return entry
        elseif type(name) == "string" then
            names[#names + 1] = name
            latest = name == "latest" and entry or latest
        end
    end
    if not tag and (#index.entries == 1 or latest) then
        return latest or index.entries[1]
    end
    local list = table.concat(names, ", ", 1, math.min(#names, max_listed))
        :gsub("[%c\128-\255]", "?")
    if #index.entries == 0 then
        return nil, self.dir .. ": the layout is empty"
    elseif tag then
        return nil, ("%s: no image named %q; there is %s"):format(self.dir, tag,
            #names > 0 and list or "none with a name")
    end
    return nil, ("%s: holds %d images; name one, as in %s:%s"):format(self.dir, #index.entries,
        self.dir, names[1] or "TAG") .. (#names > 1 and (" (there is %s)"):format(list) or "")
end

-- A small blob, its digest checked.
local function read_blob(self, descriptor, limit)
    local path = self:blob_path(descriptor.digest)
    if not path then
        return nil, ("%s: lacks blob %s"):format(self.dir, descriptor.digest)
    end
    local bytes, why = files.read(path, limit)
    if not bytes then
        return nil, why
    end
    if descriptor.digest:find("^sha256:") and self.core.sha256(bytes) ~= descriptor.digest then
        return nil, path .. ": its content does not have its digest"
    elseif not descriptor.digest:find("^sha256:") then
        return nil, path .. ": only sha256 is supported here"
    end
    return bytes
end

local function descend(self, descriptor, wanted, depth, choose)
    if depth > manifest.max_depth then
        return nil, self.dir .. ": its indexes are nested too deep"
    end
    local bytes, why = read_blob(self, descriptor, manifest.limit_bytes)
    if not bytes then
        return nil, why
    end
    local doc
    doc, why = manifest.read(bytes, descriptor.media_type)
    if not doc then
        return nil, ("%s: %s: %s"):format(self.dir, descriptor.digest, why)
    end
    if doc.kind == "image" then
        local config_bytes
        config_bytes, why = read_blob(self, doc.config, manifest.config_limit_bytes)
        local config
        if config_bytes then
            config, why = manifest.read_config(config_bytes, doc, not choose and wanted or nil)
            why = config == nil and self.dir .. ": " .. why or why
        end
        return config and { digest = descriptor.digest, bytes = bytes, manifest = doc,
            config = config, config_bytes = config_bytes }, why
    end
    local entries, offered = manifest.candidates(doc, wanted, choose)
    local failed
    for _, entry in ipairs(entries) do
        local found
        found, why = descend(self, entry, wanted, depth + 1, choose)
        if found or entry.platform then
            return found, why
        end
        failed = failed or why
    end
    return nil, failed or ("%s: no image for %s; there is %s"):format(self.dir,
        platform.format(wanted), #offered > 0 and table.concat(offered, ", ") or "none")
end

--- What the index names, in its order.
---@return table[]? entries
---@return string? error
function Layout:list()
    local index, why = read_index(self)
    return index and index.entries, why
end

--- The image behind one of them; as `resolve`.
---@param entry table
---@param wanted sm.Platform?
---@param choose? fun(entries: table[], wanted: sm.Platform): table?
---@return table?
---@return string? error
function Layout:resolve_entry(entry, wanted, choose)
    local found, why = descend(self, entry, wanted or platform.host(), 1, choose)
    if not found then
        return nil, why
    end
    local name = entry.annotations[ref_name]
    found.tag = type(name) == "string" and name or nil
    found.source_digest = entry.digest
    return found
end

--- The image of a tag for a platform: {digest, bytes, manifest, config,
--- config_bytes, tag}.
---@param tag string?
---@param wanted sm.Platform?
---@param choose? fun(entries: table[], wanted: sm.Platform): table?
---@return table?
---@return string? error
function Layout:resolve(tag, wanted, choose)
    local index, why = read_index(self)
    if not index then
        return nil, why
    end
    local entry
    entry, why = pick(self, index, tag)
    if not entry then
        return nil, why
    end
    return self:resolve_entry(entry, wanted, choose)
end

return M
