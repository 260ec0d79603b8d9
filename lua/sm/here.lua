-- SPDX-License-Identifier: Apache-2.0
--
-- Images that are on this machine already and not in the store: layout
-- folders, archives, standard input, plain folders. Running one converts its
-- layers as they lie and keeps no copy of them; loading one brings it into the
-- store under its names.

local uv = require "luv"
local archive = require "sm.archive"
local assemble = require "sm.assemble"
local compose = require "sm.compose"
local files = require "sm.files"
local json = require "sm.json"
local layout = require "sm.layout"
local loop = require "sm.loop"

local M = {}

-- Run fn(options, …) as a task that holds the store.
local function holding_store(fn, opts, ...)
    local options, why = assemble.options(opts)
    if not options then
        return nil, why
    end
    return loop.run(function(...)
        local held <close>, failed = options.store:use()
        if not held then
            return nil, failed
        end
        return fn(options, ...)
    end, ...)
end

local function absolute(path)
    return uv.fs_realpath(path) or path
end

local function run_layout(opts, text)
    local dir, tag = layout.split(text)
    local source, why = layout.open(dir, opts.core)
    if not source then
        return nil, why
    end
    local found
    found, why = source:resolve(tag, opts.platform, opts.choose)
    if not found then
        return nil, why
    end
    return assemble.assemble(opts, found, {
        path = function(layer)
            return source:blob_path(layer.digest)
        end,
    }, "oci:" .. absolute(dir) .. (found.tag and ":" .. found.tag or ""))
end

--- An image out of an OCI layout folder, "DIR" or "DIR:TAG". Its layers are
--- converted into the store; the folder's files are only read. Options as in
--- sm.image's `pull`. Yields.
---@async
---@param text string
---@param opts table?
---@return sm.Image?
---@return string? error
function M.from_layout(text, opts)
    return holding_store(run_layout, opts, text)
end

-- "FILE" or "FILE:NAME"; a file whose name holds a colon wins.
local function split_archive(text)
    if text == "-" or uv.fs_stat(text) then
        return text
    end
    local at = 1
    while true do
        at = text:find(":", at, true)
        if not at then
            return text
        elseif text:sub(1, at - 1) == "-" or uv.fs_stat(text:sub(1, at - 1)) then
            return text:sub(1, at - 1), text:sub(at + 1)
        end
        at = at + 1
    end
end

local function run_archive(opts, text)
    local file, name = split_archive(text)
    local source <close>, why = archive.open(opts, file)
    if not source then
        return nil, why
    end
    local images
    images, why = source:images(opts.platform, opts.choose)
    local found
    if images then
        found, why = source:pick(images, name)
    end
    if not found then
        return nil, why
    end
    return assemble.assemble(opts, found, {
        path = function(layer)
            return source:path(layer)
        end,
    }, file == "-" and "-" or ("docker-archive:%s%s"):format(absolute(file), name and ":" .. name or ""))
end

--- An image out of an archive: "FILE" or "FILE:NAME", "-" for standard input;
--- what `docker save` or an OCI tool wrote, compressed or not. Options as in
--- sm.image's `pull`. Yields.
---@async
---@param text string
---@param opts table?
---@return sm.Image?
---@return string? error
function M.from_archive(text, opts)
    return holding_store(run_archive, opts, text)
end

-- A folder that is somebody's root; what runs in it is the caller's to say.
local function folder_config(opts)
    return json.encode { os = opts.platform.os, architecture = opts.platform.architecture,
        config = { Cmd = { "/bin/sh" },
            Env = { "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" } },
        rootfs = { type = "layers" } }
end

--- Pack a folder as a layer in tmp/: {path, digest, size}; the caller removes
--- the file. Yields.
---@async
---@param opts table
---@param dir string
---@return table?
---@return string? error
function M.pack(opts, dir)
    local tar = opts.store:temporary("folder")
    local job <close>, failed = assemble.core(opts).pack_folder { dir = dir, out = tar }
    if not job then
        return nil, failed
    end
    opts.progress { type = "pack", dir = dir }
    local result, why = assemble.wait(job)
    if not result then
        return nil, why
    end
    result.path = tar
    return result
end

local function run_folder(opts, dir)
    local stat = uv.fs_stat(dir)
    if not stat or stat.type ~= "directory" then
        return nil, ("%s: %s"):format(dir, stat and "not a folder" or "no such folder")
    end
    local layer, why = M.pack(opts, dir)
    if not layer then
        return nil, ("%s: %s"):format(dir, why)
    end
    local tidy <close> = setmetatable({}, { __close = function()
        files.remove(layer.path)
    end })
    local found
    found, why = compose.image(folder_config(opts), { { digest = layer.digest, size = layer.size,
        media_type = compose.layer_type "" } }, { layer.digest })
    if not found then
        return nil, why
    end
    return assemble.assemble(opts, found, {
        path = function()
            return layer.path
        end,
    }, "dir:" .. absolute(dir))
end

--- A plain folder as the root of a VM, which gets a copy: nothing it writes
--- comes back. Options as in sm.image's `pull`. Yields.
---@async
---@param dir string
---@param opts table?
---@return sm.Image?
---@return string? error
function M.from_folder(dir, opts)
    return holding_store(run_folder, opts, dir)
end

--- Whatever lies at a path: a layout folder (with ":TAG"), an archive (with
--- ":NAME"), a folder that is a root. Yields.
---@async
---@param path string
---@param opts table?
---@return sm.Image?
---@return string? error
function M.from_path(path, opts)
    local stat = uv.fs_stat(path)
    if stat and stat.type == "directory" then
        local root = not layout.is(path) and not uv.fs_stat(path .. "/index.json")
        return (root and M.from_folder or M.from_layout)(path, opts)
    elseif layout.is((layout.split(path))) then
        return M.from_layout(path, opts)
    end
    local file = split_archive(path)
    if not uv.fs_stat(file) then
        return nil, ("%s: no such file or folder"):format(path)
    end
    return M.from_archive(path, opts)
end

--- One image of an archive into the store, under its names. Yields.
---@async
---@param opts table of sm.assemble's options
---@param source sm.Archive
---@param found table one of its images
---@return sm.Image?
---@return string? error
function M.load_one(opts, source, found)
    local name = found.tags[1]
    local image, why, put = assemble.assemble(opts, found, {
        blob = function(layer, file)
            local from = source:path(layer)
            if not from then
                return nil, ("%s: the archive lacks layer %s"):format(source.name, layer.digest)
            end
            -- Another image of the archive may want it too.
            return files.link(from, file)
        end,
        progress = function() end,
    }, name or found.digest)
    if not image then
        return nil, why
    end
    for i = 1, math.max(1, #found.tags) do
        local ok
        ok, why = assemble.tag(opts, found.tags[i], put)
        if not ok then
            image:close()
            return nil, why
        end
    end
    return image
end

local function load(opts, file)
    local source <close>, why = archive.open(opts, file)
    if not source then
        return nil, why
    end
    local images
    images, why = source:images(opts.platform, opts.choose)
    if not images then
        return nil, why
    end
    local out = {}
    for i, found in ipairs(images) do
        local image
        image, why = M.load_one(opts, source, found)
        if not image then
            return nil, why
        end
        out[i] = { names = found.tags, digest = image.digest }
        image:close()
    end
    return out
end

--- Bring every image of an archive into the store, under the names it has
--- there: {{names, digest}…}. "-" is standard input. Yields.
---@async
---@param file string
---@param opts table?
---@return {names: string[], digest: string}[]?
---@return string? error
function M.load(file, opts)
    return holding_store(load, opts, file)
end

return M
