-- SPDX-License-Identifier: Apache-2.0
--
-- An archive of images as a source: what `docker save`, `podman save`, skopeo
-- and buildkit write. One pass puts its files into a folder of ours, hashed
-- (core/image/archive.h); the meaning is looked up afterwards, because their
-- order is nobody's promise:
--
--   oci-layout, index.json, blobs/…        an OCI archive
--   manifest.json, *.json, *.tar           a Docker archive; layers may be
--                                          links to others
--   all of these                           Docker 25 and later: the OCI side
--                                          has the identity, Docker's the names
--
-- A file is what its bytes hash to, whatever it is called. A Docker archive
-- has no manifest in today's sense; one is made (sm.compose).

local assemble = require "sm.assemble"
local compose = require "sm.compose"
local files = require "sm.files"
local json = require "sm.json"
local layout = require "sm.layout"
local manifest = require "sm.manifest"
local reference = require "sm.reference"

local M = {}

local max_hops = 8
local max_images = 256
local full_name = "io.containerd.image.name"
local ref_name = "org.opencontainers.image.ref.name"

---@class sm.Archive
---@field dir string where its files lie
---@field package by_name table<string, table>
---@field package by_digest table<string, string>
local Archive = {}
Archive.__index = Archive

-- "a/./b//../c" → "a/c"; names only, nothing is ever opened by them.
local function clean(name)
    local parts = {}
    for part in name:gmatch("[^/]+") do
        if part == ".." then
            parts[#parts] = nil
        elseif part ~= "." then
            parts[#parts + 1] = part
        end
    end
    return table.concat(parts, "/")
end

-- The regular file a name leads to, through links within the archive.
local function lookup(self, name)
    name = clean(name)
    for _ = 1, max_hops do
        local entry = self.by_name[name]
        if not entry then
            return nil
        elseif not entry.link then
            return entry
        end
        -- A hard link's target counts from the top, a symbolic one's from the
        -- link's own folder; the archive may mean either.
        local from = name:match("^(.*)/[^/]*$")
        local beside = clean((from and from .. "/" or "") .. entry.link)
        name = self.by_name[beside] and beside ~= name and beside or clean(entry.link)
    end
end

local function read_named(self, name, limit)
    local entry = lookup(self, name)
    if not entry then
        return nil, ("%s: the archive lacks %s"):format(self.name, name:gsub("[%c\128-\255]", "?"):sub(1, 100))
    end
    return files.read(entry.path, limit)
end

--- Unpack an archive into a fresh folder of the store, to be removed with
--- `close`. Yields.
---@async
---@param opts table of sm.assemble's options
---@param file string "-": standard input
---@return sm.Archive?
---@return string? error
function M.open(opts, file)
    local self = setmetatable({ name = file == "-" and "standard input" or file,
        core = assemble.core(opts), dir = opts.store:temporary("archive"), by_name = {},
        by_digest = {} }, Archive)
    local ok, why = files.make(self.dir)
    if not ok then
        return nil, why
    end
    opts.progress { type = "unpack", file = self.name }
    local job <close>, failed = self.core.unpack_archive { file = file, out = self.dir,
        limits = opts.limits }
    local entries
    if job then
        entries, why = assemble.wait(job)
    else
        why = failed
    end
    if not entries then
        self:close()
        return nil, ("%s: %s"):format(self.name, why)
    end
    for _, entry in ipairs(entries) do
        self.by_name[clean(entry.name)] = entry -- the last one of a name counts
        if entry.digest then
            self.by_digest[entry.digest] = entry.path
        end
    end
    if not self.by_name["index.json"] and not self.by_name["manifest.json"] then
        self:close()
        return nil, ("%s: not an archive of images: it has neither index.json nor manifest.json"
            .. " (a root file system in a tar is unpacked first, then run as a folder)"):format(self.name)
    end
    return self
end

--- Remove what was unpacked and not taken. Idempotent.
function Archive:close()
    files.remove(self.dir)
end
Archive.__close = Archive.close

--- The file with these bytes, or nil.
---@param descriptor {digest: string}
---@return string? path
function Archive:path(descriptor)
    return self.by_digest[descriptor.digest]
end

-- The OCI side as a layout, or nil.
local function as_layout(self)
    if self.by_name["index.json"] and self.by_name["oci-layout"] then
        return layout.over(self.name, lookup(self, "index.json").path, function(digest)
            return self.by_digest[digest]
        end, self.core)
    end
end

-- Docker's manifest.json: {config, tags, layers} of each image.
local function read_docker(self)
    local text, why = read_named(self, "manifest.json", manifest.limit_bytes)
    if not text then
        return nil, why
    end
    local doc
    doc, why = json.decode(text)
    if not doc or not json.is_array(doc, "table") or #doc == 0 then
        return nil, ("%s: its manifest.json is %s"):format(self.name, why or "not a list of images")
    end
    local list = {}
    for i, item in ipairs(doc) do
        if i > max_images then
            return nil, ("%s: more than %d images"):format(self.name, max_images)
        elseif type(item.Config) ~= "string" or not json.is_array(item.Layers or {}, "string") then
            return nil, ("%s: image %d of its manifest.json makes no sense"):format(self.name, i)
        end
        local tags = {}
        for _, tag in ipairs(json.is_array(item.RepoTags, "string") and item.RepoTags or {}) do
            local ref = reference.parse(tag)
            tags[#tags + 1] = ref and reference.format(ref) or nil
        end
        list[i] = { config = item.Config, layers = item.Layers or {}, tags = tags }
    end
    return list
end

local function head_of(path)
    local file = io.open(path, "rb")
    local head = file and file:read(4) or ""
    if file then
        file:close()
    end
    return head
end

-- One image of manifest.json as a resolved image.
local function compose_docker(self, item, wanted)
    local config_bytes, why = read_named(self, item.config, manifest.config_limit_bytes)
    if not config_bytes then
        return nil, why
    end
    local config
    config, why = json.decode_object(config_bytes)
    local diff_ids = config and json.is_object(config.rootfs) and config.rootfs.diff_ids
    if not json.is_array(diff_ids or {}, "string") or not diff_ids then
        return nil, ("%s: its config %s"):format(self.name, config and "lists no diff_ids" or "is " .. why)
    end
    local layers = {}
    for i, name in ipairs(item.layers) do
        local entry = lookup(self, name)
        if not entry then
            return nil, ("%s: the archive lacks layer %d"):format(self.name, i)
        end
        layers[i] = { digest = entry.digest, size = entry.size,
            media_type = compose.layer_type(head_of(entry.path)) }
    end
    local found
    found, why = compose.image(config_bytes, layers, diff_ids)
    if found and found.config_bytes ~= config_bytes then
        found, why = nil, "its config makes no sense"
    end
    if found then
        local ok
        ok, why = manifest.read_config(config_bytes, found.manifest, wanted)
        found = ok and found
    end
    if not found then
        return nil, ("%s: %s"):format(self.name, why)
    end
    found.tags = item.tags
    return found
end

local function has_all(self, found)
    for _, layer in ipairs(found.manifest.layers) do
        if not self.by_digest[layer.digest] then
            return false
        end
    end
    return true
end

-- Names the OCI index gives an image: whole ones only; a bare tag names nothing.
local function names_of(entry)
    local out = {}
    for _, key in ipairs { full_name, ref_name } do
        local text = entry.annotations[key]
        local ref = type(text) == "string" and text:find("[/:]") and reference.parse(text)
        if ref and not ref.digest then
            out[1] = out[1] or reference.format(ref)
        end
    end
    return out
end

local function docker_images(self, wanted)
    local list, why = read_docker(self)
    if not list then
        return nil, why
    end
    local out = {}
    for i, item in ipairs(list) do
        out[i], why = compose_docker(self, item, wanted)
        if not out[i] then
            return nil, why
        end
    end
    return out
end

local function oci_images(self, source, wanted, choose)
    local entries, why = source:list()
    if not entries then
        return nil, why
    end
    local out = {}
    for _, entry in ipairs(entries) do
        local found
        found, why = source:resolve_entry(entry, wanted, choose)
        if not found then
            return nil, why
        elseif not has_all(self, found) then
            return nil, ("%s: the archive lacks a layer of %s"):format(self.name, found.digest)
        end
        found.tags = names_of(entry)
        out[#out + 1] = found
    end
    return out
end

-- What Docker's names say about the images of the OCI side: those with the
-- same configuration are the same images.
local function add_docker_names(self, images)
    local list = self.by_name["manifest.json"] and read_docker(self) or {}
    for _, item in ipairs(list) do
        local entry = lookup(self, item.config)
        for _, found in ipairs(images) do
            if entry and entry.digest == found.manifest.config.digest and #found.tags == 0 then
                found.tags = item.tags
            end
        end
    end
end

--- Every image of the archive, resolved for a platform; each has `tags`, full
--- references that it goes by.
---@param wanted sm.Platform
---@param choose? fun(entries: table[], wanted: sm.Platform): table?
---@return table[]?
---@return string? error
function Archive:images(wanted, choose)
    local source = as_layout(self)
    local out, why
    if source then
        out, why = oci_images(self, source, wanted, choose)
        if out then
            add_docker_names(self, out)
        elseif not self.by_name["manifest.json"] then
            return nil, why
        end
    end
    if not out then
        out, why = docker_images(self, wanted)
    end
    if out and #out == 0 then
        return nil, self.name .. ": the archive holds no image"
    end
    return out, why
end

--- The one image that is meant: the only one, or the one with a name or tag.
---@param images table[]
---@param name string?
---@return table?
---@return string? error
function Archive:pick(images, name)
    if not name and #images == 1 then
        return images[1]
    end
    local ref = name and reference.parse(name)
    local full, all = ref and reference.format(ref), {}
    for _, found in ipairs(images) do
        for _, tag in ipairs(found.tags) do
            if name and (tag == full or tag:match(":([^:/]+)$") == name) then
                return found
            end
            all[#all + 1] = tag
        end
        if name and found.tag == name then
            return found
        end
    end
    if name and #images == 1 and #images[1].tags == 0 and not images[1].tag then
        return images[1]
    end
    local there = #all > 0 and "there is " .. table.concat(all, ", ", 1, math.min(#all, 10))
        or "they have no names"
    return nil, name and ("%s: no image named %q; %s"):format(self.name, name, there)
        or ("%s: holds %d images; name one; %s"):format(self.name, #images, there)
end

return M
