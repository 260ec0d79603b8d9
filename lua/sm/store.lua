-- SPDX-License-Identifier: Apache-2.0
--
-- The image store: an OCI image layout (image-spec, "image-layout.md") that
-- skopeo, umoci and others can read, plus what we derive from it. What stays and
-- what is cleared away is sm.retention's.
--
--   oci-layout  index.json      entries carry the full reference as
--                               org.opencontainers.image.ref.name
--   blobs/<algorithm>/<hex>     manifests, configurations, layers
--   derived/layers/<alg>-<hex>/ data, index: one layer as EROFS parts, by diffID
--   derived/images/<alg>-<hex>/ meta, image.json: the merged image, by manifest
--   tmp/                        unfinished things; *.part is resumed
--   locks/  leases/             flock files; who holds one is at work with it
--   pins/<hash>                 what outlives a process (a snapshot) needs this
--                               image: {owner: path, digest}; gone with its owner
--
-- Everything is published by writing beside it, fsync and rename, so that a
-- kill at any point leaves only files in tmp/, which the next pull clears.
-- Nothing is trusted into a place before it was hashed.
--
-- Who may do what at once:
--   * a pull holds `locks/use` shared, a collector wants it alone: so nothing
--     is collected that a pull has seen but not yet entered into the index;
--   * one download per blob, one conversion per layer, one merge per image:
--     `locks/<kind>-<hex>`;
--   * index.json is read freely and rewritten under `locks/index`;
--   * a live VM holds `leases/<alg>-<hex>` of its image's manifest shared;
--     removing the image wants it alone.

local uv = require "luv"
local files = require "sm.files"
local json = require "sm.json"
local lock = require "sm.lock"
local paths = require "sm.paths"
local reference = require "sm.reference"
local retention = require "sm.retention"

local M = {}

---@class sm.Store
---@field dir string
local Store = {}
Store.__index = Store
Store.__name = "sm.Store"

local layout_text = '{"imageLayoutVersion":"1.0.0"}'
local ref_name = "org.opencontainers.image.ref.name"
local full_name = "io.containerd.image.name"
local source_name = "sm.source.digest"
local pulled_name = "sm.pulled"
local index_limit_bytes = 64 << 20
local part_life_s = 24 * 3600

M.ref_name = ref_name

-- One line about a store that cannot be used, and the way out.
local function damaged(self, why)
    return nil, ("the image store is damaged: %s; move %s away and pull again")
        :format(why, self.dir)
end

local folders = { "/blobs/sha256", "/derived/layers", "/derived/images", "/tmp", "/locks",
    "/leases", "/pins" }

local function make_folders(self)
    for _, name in ipairs(folders) do
        local ok, why = paths.make(self.dir .. name)
        if not ok then
            return nil, "the image store cannot be made: " .. why
        end
    end
    return true
end

local function check_layout(self)
    local path = self.dir .. "/oci-layout"
    local text, why, code = files.read(path, 4096)
    if not text then
        if code ~= "ENOENT" then
            return nil, why
        end
        local ok
        ok, why = make_folders(self)
        if not ok then
            return nil, why
        end
        -- Two at once write the same bytes; the name decides, not the content.
        -- Whoever is in the store already may clear ours away: then try again.
        local temporary, gone = ("%s/tmp/oci-layout.%d"):format(self.dir, uv.os_getpid()), nil
        for _ = 1, 20 do
            ok, why = files.write_plain(temporary, layout_text)
            if ok then
                ok, why, gone = uv.fs_rename(temporary, path)
            end
            if ok or gone ~= "ENOENT" then
                break
            end
        end
        if not ok then
            return nil, "the image store cannot be made: " .. why
        end
        return true
    end
    local doc = json.decode_object(text)
    if not doc or type(doc.imageLayoutVersion) ~= "string" then
        return damaged(self, path .. " is not an OCI layout's")
    elseif not doc.imageLayoutVersion:find("^1%.") then
        return nil, ("%s: image layout version %s is not supported")
            :format(path, doc.imageLayoutVersion)
    end
    return true
end

--- Open the store, made if it is not there.
---@param dir string? by default ${XDG_DATA_HOME:-~/.local/share}/sm
---@return sm.Store?
---@return string? error
function M.open(dir)
    local self = setmetatable({ dir = dir or paths.data() }, Store)
    local ok, why = check_layout(self)
    if not ok then
        return nil, why
    end
    return self
end

--- Where a blob lives, whether or not it is there.
---@param digest string
---@return string path
function Store:blob_path(digest)
    local algorithm, hex = assert(reference.parse_digest(digest))
    return ("%s/blobs/%s/%s"):format(self.dir, algorithm, hex)
end

--- Where a converted layer lives.
---@param diff_id string
---@return string path
function Store:layer_dir(diff_id)
    return self.dir .. "/derived/layers/" .. reference.file_name(diff_id)
end

--- Where a merged image lives.
---@param digest string of its manifest
---@return string path
function Store:image_dir(digest)
    return self.dir .. "/derived/images/" .. reference.file_name(digest)
end

--- Where an unfinished download of a blob is kept.
---@param digest string
---@return string path
function Store:part_path(digest)
    return self.dir .. "/tmp/" .. reference.file_name(digest) .. ".part"
end

--- A path in tmp/ that nobody else uses.
---@param what string
---@return string path
function Store:temporary(what)
    self.serial = (self.serial or 0) + 1
    return ("%s/tmp/%s.%d.%d.%d"):format(self.dir, what, uv.os_getpid(), uv.hrtime(), self.serial)
end

--- Whether a blob of this size is there.
---@param descriptor {digest: string, size: integer}
---@return boolean
function Store:has_blob(descriptor)
    return files.size(self:blob_path(descriptor.digest)) == descriptor.size
end

--- Take a lock of the store, waiting for it. Yields.
---@async
---@param name string
---@param opts? {shared: boolean}
---@param waiting? fun()
function Store:lock(name, opts, waiting)
    return lock.wait(self.dir .. "/locks/" .. name, opts, waiting)
end

--- Serialise work on one blob, layer or image among all processes. Yields.
---@async
---@param kind "blob"|"layer"|"image"
---@param digest string
---@param waiting? fun()
function Store:lock_digest(kind, digest, waiting)
    return self:lock(kind .. "-" .. reference.file_name(digest), nil, waiting)
end

--- Keep collectors away while something is being put together; clears what
--- dead processes left. Let go with `:close()`. Yields.
---@async
---@return userdata?
---@return string? error
function Store:use()
    local ok, why = make_folders(self) -- somebody may have cleared derived/ away
    if not ok then
        return nil, why
    end
    local alone = lock.try(self.dir .. "/locks/use")
    if alone then
        self:clear_temporaries(false)
        alone:close()
    end
    return self:lock("use", { shared = true })
end

--- Remove unfinished files; `all` takes resumable downloads as well. Only for
--- one who holds `locks/use` alone.
---@param all boolean
function Store:clear_temporaries(all)
    local now = os.time()
    for _, entry in ipairs(files.list(self.dir .. "/tmp")) do
        local path = self.dir .. "/tmp/" .. entry.name
        local stat = uv.fs_lstat(path)
        local fresh = stat and now - stat.mtime.sec < part_life_s
        if all or not (entry.name:find("%.part$") and fresh) then
            files.remove(path)
        end
    end
end

--- Store bytes whose digest the caller has checked. Yields.
---@async
---@param digest string
---@param bytes string
---@return true?
---@return string? error
function Store:put(digest, bytes)
    local path = self:blob_path(digest)
    if files.size(path) == #bytes then
        return true
    end
    local ok, why = paths.make(path:match("^(.*)/"))
    if ok then
        ok, why = files.write(self:temporary("blob"), path, bytes)
    end
    return ok, why
end

--- Move a finished, verified file of ours into the blobs. Yields.
---@async
---@param digest string
---@param path string
---@return true?
---@return string? error
function Store:adopt(digest, path)
    local to = self:blob_path(digest)
    local ok, why = paths.make(to:match("^(.*)/"))
    if ok then
        ok, why = files.publish(path, to)
    end
    return ok, why
end

--- Read a small blob of an expected size.
---@param descriptor {digest: string, size: integer?}
---@param limit integer
---@return string?
---@return string? error
function Store:get(descriptor, limit)
    local bytes, why = files.read(self:blob_path(descriptor.digest), limit)
    if bytes and descriptor.size and #bytes ~= descriptor.size then
        bytes, why = nil, self:blob_path(descriptor.digest) .. ": has the wrong size"
    end
    return bytes, why
end

---@class sm.StoreEntry
---@field digest string
---@field size integer
---@field media_type string
---@field name string? full reference
---@field source string? digest that the tag named
---@field pulled string? time
---@field platform table?
---@field raw table the descriptor as it stands in index.json

local function read_entry(raw)
    if not json.is_object(raw) or not reference.parse_digest(raw.digest)
        or math.type(raw.size) ~= "integer" then
        return nil
    end
    local notes = json.is_object(raw.annotations) and raw.annotations or {}
    local function note(key)
        return type(notes[key]) == "string" and notes[key] or nil
    end
    return {
        digest = raw.digest,
        size = raw.size,
        media_type = raw.mediaType,
        name = note(full_name) or note(ref_name),
        source = note(source_name),
        pulled = note(pulled_name),
        platform = json.is_object(raw.platform) and raw.platform or nil,
        raw = raw,
    }
end

--- Everything the index names.
---@return sm.StoreEntry[]?
---@return string? error
function Store:entries()
    local path = self.dir .. "/index.json"
    local text, why, code = files.read(path, index_limit_bytes)
    if not text then
        if code == "ENOENT" then
            return {}
        end
        return nil, why
    end
    local doc
    doc, why = json.decode_object(text)
    if not doc then
        return damaged(self, path .. " is " .. why)
    elseif not json.is_array(doc.manifests) then
        return damaged(self, path .. " lists no manifests")
    end
    local list = {}
    for i, raw in ipairs(doc.manifests) do
        list[i] = read_entry(raw)
        if not list[i] then
            return damaged(self, ("%s: entry %d is not a descriptor"):format(path, i))
        end
    end
    return list
end

local function write_entries(self, list)
    local raw = {}
    for i, entry in ipairs(list) do
        raw[i] = entry.raw
    end
    return files.write(self:temporary("index"), self.dir .. "/index.json",
        '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":'
        .. json.encode_array(raw) .. "}\n")
end

-- Rewrite the index: change(list) → new list, or nil and why. Yields.
local function rewrite(self, change)
    local held <close>, why = self:lock("index")
    if not held then
        return nil, why
    end
    local list
    list, why = self:entries()
    if not list then
        return nil, why
    end
    list, why = change(list)
    if not list then
        return nil, why
    end
    return write_entries(self, list)
end

--- Name an image whose parts are all there; a name moves from what had it.
--- Without a name it is kept by its digest alone. Yields.
---@async
---@param name string? full reference
---@param image {digest: string, size: integer, media_type: string, source: string?,
---  platform: table?}
---@return true?
---@return string? error
function Store:tag(name, image)
    local raw = {
        mediaType = image.media_type,
        digest = image.digest,
        size = image.size,
        platform = image.platform,
        annotations = {
            [ref_name] = name,
            [full_name] = name,
            [source_name] = image.source,
            [pulled_name] = os.date("!%Y-%m-%dT%H:%M:%SZ"),
        },
    }
    return rewrite(self, function(list)
        local out = {}
        for _, entry in ipairs(list) do
            local same = entry.name == name and (name or entry.digest == image.digest)
            if not same then
                out[#out + 1] = entry
            end
        end
        out[#out + 1] = { raw = raw }
        return out
    end)
end

--- The entry of a reference: by its name, or, for a digest, any image with
--- that content.
---@param ref sm.Reference
---@return sm.StoreEntry? entry nil without an error: not there
---@return string? error
function Store:find(ref)
    local list, why = self:entries()
    if not list then
        return nil, why
    end
    local name = reference.format(ref)
    for _, entry in ipairs(list) do
        if entry.name == name then
            return entry
        end
    end
    for _, entry in ipairs(list) do
        if ref.digest and (entry.digest == ref.digest or entry.source == ref.digest) then
            return entry
        end
    end
    return nil
end

--- Whether a converted layer is there, whole as far as sizes tell.
---@param diff_id string
---@return boolean
function Store:has_layer(diff_id)
    local dir = self:layer_dir(diff_id)
    return files.size(dir .. "/index") ~= nil and files.size(dir .. "/data") ~= nil
end

-- The derived record of an image, if every file it speaks of has its size.
local function read_record(self, digest)
    local dir = self:image_dir(digest)
    local text = files.read(dir .. "/image.json", index_limit_bytes)
    local record = text and json.decode_object(text)
    if not record or record.version ~= 1 or not json.is_array(record.layers, "table")
        or math.type(record.size) ~= "integer" or math.type(record.meta) ~= "integer" then
        return nil
    end
    local extents = { { path = dir .. "/meta", offset = 0, length = record.meta } }
    for _, layer in ipairs(record.layers) do
        if not reference.parse_digest(layer.diff_id) or math.type(layer.bytes) ~= "integer" then
            return nil
        end
        if layer.bytes > 0 then
            extents[#extents + 1] = { path = self:layer_dir(layer.diff_id) .. "/data",
                offset = 0, length = layer.bytes }
        end
    end
    for _, extent in ipairs(extents) do
        if files.size(extent.path) ~= extent.length then
            return nil
        end
    end
    return { extents = extents, size = record.size, inodes = record.inodes }
end

--- The merged image: {extents, size, inodes}, or nil if it is to be made.
---@param digest string of the manifest
---@return table?
function Store:image(digest)
    return read_record(self, digest)
end

--- Publish a merged image from a folder in tmp/ that holds `meta`. `layers` is
--- {{diff_id, bytes}…}, lowest first. Yields.
---@async
---@param digest string
---@param folder string
---@param record {size: integer, meta: integer, inodes: integer, layers: table}
---@return true?
---@return string? error
function Store:publish_image(digest, folder, record)
    local text = ('{"version":1,"size":%d,"meta":%d,"inodes":%d,"layers":%s}')
        :format(record.size, record.meta, record.inodes, json.encode_array(record.layers))
    local ok, why = files.write_plain(folder .. "/image.json", text)
    for _, name in ipairs { "/meta", "/image.json" } do
        if ok then
            ok, why = files.sync(folder .. name)
        end
    end
    if ok then
        -- One that failed its check before is in the way.
        ok, why = files.remove(self:image_dir(digest))
    end
    if ok then
        ok, why = files.publish(folder, self:image_dir(digest))
    end
    return ok, why
end

--- Publish a converted layer from a folder in tmp/. Yields.
---@async
---@param diff_id string
---@param folder string
---@return true?
---@return string? error
function Store:publish_layer(diff_id, folder)
    local ok, why = true, nil
    for _, name in ipairs { "/data", "/index" } do
        if ok then
            ok, why = files.sync(folder .. name)
        end
    end
    if ok then
        ok, why = files.remove(self:layer_dir(diff_id))
    end
    if ok then
        ok, why = files.publish(folder, self:layer_dir(diff_id))
    end
    return ok, why
end

for name, method in pairs(retention) do
    Store[name] = method
end

--- Take entries out of the index; how many were there. Yields.
---@async
---@param entries sm.StoreEntry[]
---@return true?
---@return string? error
---@return integer? found
function Store:untag(entries)
    local gone, found = {}, 0
    for _, entry in ipairs(entries) do
        gone[entry.digest .. " " .. (entry.name or "")] = true
    end
    local ok, why = rewrite(self, function(list)
        local out = {}
        for _, other in ipairs(list) do
            if gone[other.digest .. " " .. (other.name or "")] then
                found = found + 1
            else
                out[#out + 1] = other
            end
        end
        return out
    end)
    return ok, why, found
end

--- When the image was last made ready for use, or came here.
---@param entry sm.StoreEntry
---@return integer Unix time
function Store:last_used(entry)
    local stat = uv.fs_stat(self:image_dir(entry.digest) .. "/image.json")
    if stat then
        return stat.mtime.sec
    end
    stat = uv.fs_stat(self:blob_path(entry.digest))
    return stat and stat.mtime.sec or 0
end

--- Note that the image is being used now.
---@param digest string
function Store:touch(digest)
    local now = os.time()
    uv.fs_utime(self:image_dir(digest) .. "/image.json", now, now)
end

--- Take a name away and collect what nothing needs any more. An image that a
--- live VM uses is refused, unless `force`: then only its name goes, and its
--- parts with the next removal after the VM. Yields.
---@async
---@param entry sm.StoreEntry
---@param force boolean?
---@return integer? freed bytes
---@return string? error
function Store:remove(entry, force)
    local lease, why = retention.try_lease(self, entry.digest)
    if lease == nil then
        return nil, why
    elseif not lease and not force then
        return nil, ("%s is in use by a running VM"):format(entry.name or entry.digest)
    end
    local owner = self:pinned()[entry.digest]
    if owner and not force then
        if lease then
            lease:remove()
        end
        return nil, ("%s is needed by %s"):format(entry.name or entry.digest, owner)
    end
    local found, ok
    ok, why, found = self:untag({ entry })
    if lease then
        lease:remove()
    end
    if not ok then
        return nil, why
    elseif found == 0 then
        return nil, ("%s: no such image"):format(entry.name or entry.digest)
    end
    local freed
    freed, why = self:collect()
    if why then
        return nil, why
    end
    return freed or 0
end

return M
