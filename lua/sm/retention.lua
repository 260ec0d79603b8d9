-- SPDX-License-Identifier: Apache-2.0
--
-- What the image store keeps, and why: what a name leads to, what a live VM leases,
-- what something that outlives a process has pinned. The rest is collected. These
-- are methods of sm.Store, whose folder and locks sm.store describes.

local uv = require "luv"
local core = require "sm.image_core"
local files = require "sm.files"
local json = require "sm.json"
local lock = require "sm.lock"
local manifest = require "sm.manifest"
local paths = require "sm.paths"
local reference = require "sm.reference"

local M = {}

local function lease_path(self, digest)
    return self.dir .. "/leases/" .. reference.file_name(digest)
end

--- The lease of an image nobody holds, alone; false: somebody does.
---@param self sm.Store
---@param digest string
---@return userdata|false|nil
---@return string? error
function M.try_lease(self, digest)
    return lock.try(lease_path(self, digest))
end

--- Hold an image for a live VM (or while preparing one): it cannot be removed
--- until `:close()`, collection, or the end of this process. Yields.
---@async
---@param digest string of the manifest
---@return userdata?
---@return string? error
function M.lease(self, digest)
    return lock.wait(lease_path(self, digest), { shared = true })
end

-- Everything reachable from a manifest or index, into `keep`.
local function mark(self, digest, keep, depth)
    local key = reference.file_name(digest)
    if keep.blobs[key] then
        return
    end
    keep.blobs[key] = true
    keep.images[key] = true
    local bytes = self:get({ digest = digest }, manifest.limit_bytes)
    local doc = bytes and depth <= manifest.max_depth and manifest.read(bytes)
    if not doc then
        return -- damaged: it protects nothing but itself
    end
    for _, entry in ipairs(doc.entries or {}) do
        mark(self, entry.digest, keep, depth + 1)
    end
    if doc.kind == "image" then
        keep.blobs[reference.file_name(doc.config.digest)] = true
        for _, layer in ipairs(doc.layers) do
            keep.blobs[reference.file_name(layer.digest)] = true
        end
        local config = self:get(doc.config, manifest.config_limit_bytes)
        config = config and manifest.read_config(config, doc)
        for _, diff_id in ipairs(config and config.rootfs.diff_ids or {}) do
            keep.layers[reference.file_name(diff_id)] = true
        end
    end
end

-- Manifests that somebody holds; leases that nobody holds are cleared.
local function mark_leased(self, keep)
    for _, entry in ipairs(files.list(self.dir .. "/leases")) do
        local digest = entry.name:gsub("-", ":", 1)
        local free = lock.try(self.dir .. "/leases/" .. entry.name)
        if free then
            free:remove()
        elseif reference.parse_digest(digest) then
            mark(self, digest, keep, 1)
        end
    end
end

local function pin_path(self, owner)
    return ("%s/pins/%s"):format(self.dir, core.sha256(owner):match("%x+$"))
end

--- Keep an image for something that outlives this process and lies at the
--- path `owner`, a snapshot's folder: it stays until `unpin`, or until nothing
--- is at that path any more. Yields.
---@async
---@param owner string absolute path
---@param digest string of the manifest
---@return true?
---@return string? error
function M.pin(self, owner, digest)
    assert(owner:sub(1, 1) == "/" and reference.parse_digest(digest))
    local ok, why = paths.make(self.dir .. "/pins")
    if not ok then
        return nil, "the image store cannot be made: " .. why
    end
    return files.write(self:temporary("pin"), pin_path(self, owner),
        json.encode { owner = owner, digest = digest })
end

--- Let go of what `pin` keeps; not there is fine.
---@param owner string
---@return true?
---@return string? error
function M.unpin(self, owner)
    return files.remove(pin_path(self, owner))
end

--- The images that others than names need, by the digest of their manifest:
--- what snapshots pinned, as the owner's path. Pins without an owner are
--- cleared.
---@return table<string, string>
function M.pinned(self)
    local out = {}
    for _, entry in ipairs(files.list(self.dir .. "/pins")) do
        local path = self.dir .. "/pins/" .. entry.name
        local text = files.read(path, 65536)
        local pin = text and json.decode_object(text)
        if pin and type(pin.owner) == "string" and reference.parse_digest(pin.digest) then
            local _, _, code = uv.fs_lstat(pin.owner)
            if code == "ENOENT" or code == "ENOTDIR" then
                files.remove(path)
            else
                out[pin.digest] = pin.owner
            end
        end
    end
    return out
end

--- Whether a live VM (or one being prepared) holds the image.
---@param digest string
---@return boolean
function M.leased(self, digest)
    local free = M.try_lease(self, digest)
    if free then
        free:remove()
    end
    return not free
end

-- Remove what is not kept from a folder; bytes freed.
local function sweep(dir, keep, prefix)
    local freed = 0
    for _, entry in ipairs(files.list(dir)) do
        if not keep[(prefix or "") .. entry.name] then
            local path = dir .. "/" .. entry.name
            local names = entry.type == "directory" and files.list(path) or { { name = "" } }
            for _, inner in ipairs(names) do
                local stat = uv.fs_lstat(inner.name == "" and path or path .. "/" .. inner.name)
                freed = freed + (stat and stat.blocks * 512 or 0)
            end
            files.remove(path)
        end
    end
    return freed
end

--- Remove everything that no name and no lease needs. Does nothing while a
--- pull is under way: its parts are not named yet. Yields.
---@async
---@return integer? bytes freed; nil without an error: a pull is under way
---@return string? error
function M.collect(self)
    local alone <close>, why = lock.try(self.dir .. "/locks/use")
    if not alone then
        return nil, why
    end
    local list
    list, why = self:entries()
    if not list then
        return nil, why
    end
    local keep = { blobs = {}, images = {}, layers = {} }
    for _, entry in ipairs(list) do
        mark(self, entry.digest, keep, 1)
    end
    mark_leased(self, keep)
    for digest in pairs(self:pinned()) do
        mark(self, digest, keep, 1)
    end
    self:clear_temporaries(true)
    -- Derived first: an image without its blobs can still be told from one
    -- whose blobs are there but not its conversion.
    local freed = sweep(self.dir .. "/derived/images", keep.images)
    freed = freed + sweep(self.dir .. "/derived/layers", keep.layers)
    for _, algorithm in ipairs(files.list(self.dir .. "/blobs")) do
        freed = freed + sweep(self.dir .. "/blobs/" .. algorithm.name, keep.blobs,
            algorithm.name .. "-")
    end
    return freed
end

return M
