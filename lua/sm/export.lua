-- SPDX-License-Identifier: Apache-2.0
--
-- Images out of the store for other tools: as an archive that is an OCI layout
-- and, beside it, what `docker load` reads (manifest.json over the same blobs,
-- as Docker 25 and later write it), or as a layout folder. Blobs leave as they
-- are, so digests stay.
--
-- The tar is written front to back, so it may go into a pipe. Its bytes depend
-- on the images alone.

local uv = require "luv"
local assemble = require "sm.assemble"
local catalog = require "sm.catalog"
local compose = require "sm.compose"
local core = require "sm.core"
local files = require "sm.files"
local json = require "sm.json"
local loop = require "sm.loop"
local paths = require "sm.paths"
local reference = require "sm.reference"

local M = {}

local chunk_bytes = 1 << 20
local block = 512
local formats = { ["docker-archive"] = true, ["oci-archive"] = true, ["oci-dir"] = true }
local ref_name = "org.opencontainers.image.ref.name"
local full_name = "io.containerd.image.name"

-- A ustar header (POSIX.1-1988 with the size in base 256 where octal ends).
local function header(name, size, kind)
    local number = size < 8 ^ 11 and ("%011o\0"):format(size)
        or "\x80" .. ("\0"):rep(3) .. string.pack(">I8", size)
    local head = ("%s%s%s%s%s%s"):format(name .. ("\0"):rep(100 - #name),
        kind == "5" and "0000755\0" or "0000644\0", "0000000\0", "0000000\0", number,
        ("%011o\0"):format(0))
    local tail = kind .. ("\0"):rep(100) .. "ustar\00000" .. ("\0"):rep(64) .. "0000000\0"
        .. "0000000\0" .. ("\0"):rep(167)
    local sum = 8 * 32
    for _, part in ipairs { head, tail } do
        for i = 1, #part do
            sum = sum + part:byte(i)
        end
    end
    return head .. ("%06o\0 "):format(sum) .. tail
end

-- A sink of bytes that writes all of them. Yields.
local function sink_of(fd)
    return function(bytes)
        while #bytes > 0 do
            local n, why = loop.await(function(settle)
                uv.fs_write(fd, bytes, -1, loop.guard(function(err, written)
                    settle(written or false, err)
                end))
            end)
            if not n then
                return nil, "writing: " .. tostring(why):gsub("^E%u+: ", "")
            end
            bytes = bytes:sub(n + 1)
        end
        return true
    end
end

local function put(write, name, bytes)
    return write(header(name, #bytes, "0") .. bytes .. ("\0"):rep(-#bytes % block))
end

-- A blob, which must have the size it is known by.
local function put_file(write, name, path, size)
    local fd, why = uv.fs_open(path, "r", 0)
    if not fd then
        return nil, files.error(path, why)
    end
    local close <close> = setmetatable({}, { __close = function()
        uv.fs_close(fd)
    end })
    local ok
    ok, why = write(header(name, size, "0"))
    local left = size
    while ok and left > 0 do
        local bytes = uv.fs_read(fd, math.min(left, chunk_bytes))
        if not bytes or #bytes == 0 then
            return nil, path .. ": shorter than it should be; `sm verify` tells more"
        end
        left = left - #bytes
        ok, why = write(bytes)
    end
    if ok then
        ok, why = write(("\0"):rep(-size % block))
    end
    return ok, why
end

-- A sparse file without its holes, as GNU tar 1.0 has it in pax: the map of where
-- there is data comes first in the data ("Storing Sparse Files" in tar's manual).
local function put_sparse(write, name, path)
    local size = files.size(path)
    local extents, why = core.data_extents(path)
    local fd = extents and size and uv.fs_open(path, "r", 0)
    if not fd then
        return nil, ("%s: %s"):format(path, why or "cannot be read")
    end
    local close <close> = setmetatable({}, { __close = function()
        uv.fs_close(fd)
    end })
    extents[#extents + 1] = { offset = size, length = 0 } -- where it ends, hole or not
    local map, total = { ("%d\n"):format(#extents) }, 0
    for _, e in ipairs(extents) do
        map[#map + 1] = ("%d\n%d\n"):format(e.offset, e.length)
        total = total + e.length
    end
    map = table.concat(map)
    map = map .. ("\0"):rep(-#map % block)
    local pax = {}
    for _, pair in ipairs { { "GNU.sparse.major", "1" }, { "GNU.sparse.minor", "0" },
        { "GNU.sparse.name", name }, { "GNU.sparse.realsize", ("%d"):format(size) } } do
        local record = (" %s=%s\n"):format(pair[1], pair[2])
        local digits = 1 -- of the length, which counts itself
        while #tostring(#record + digits) > digits do
            digits = digits + 1
        end
        pax[#pax + 1] = (#record + digits) .. record
    end
    pax = table.concat(pax)
    local ok
    ok, why = write(header("PaxHeaders/" .. name, #pax, "x") .. pax .. ("\0"):rep(-#pax % block))
    if ok then
        ok, why = write(header("GNUSparseFile.0/" .. name, #map + total, "0") .. map)
    end
    for _, e in ipairs(extents) do
        local at, stop = e.offset, e.offset + e.length
        while ok and at < stop do
            local bytes = uv.fs_read(fd, math.min(stop - at, chunk_bytes), at)
            if not bytes or #bytes == 0 then
                return nil, path .. ": shorter than it should be"
            end
            at = at + #bytes
            ok, why = write(bytes)
        end
    end
    if ok then
        ok, why = write(("\0"):rep(-total % block))
    end
    return ok, why
end

-- What goes out: images with their names, and every blob once.
local function collect(opts, texts)
    local out, blobs, by_digest = {}, {}, {}
    local function add(descriptor)
        if not blobs[descriptor.digest] then
            blobs[descriptor.digest] = descriptor
            blobs[#blobs + 1] = descriptor
        end
    end
    for _, text in ipairs(texts) do
        local entry, why = catalog.find(opts, text)
        if not entry then
            return nil, why
        end
        local found = assemble.read_local({ store = opts.store }, entry)
        if not found then
            return nil, ("%s: its manifest or config cannot be read; `sm verify` tells more"):format(text)
        end
        add { digest = entry.digest, size = #found.bytes }
        add(found.manifest.config)
        for _, layer in ipairs(found.manifest.layers) do
            if not opts.store:has_blob(layer) then
                return nil, ("%s: layer %s is not in the store"):format(text, layer.digest)
            end
            add(layer)
        end
        local one = by_digest[entry.digest]
        if not one then
            one = { entry = entry, found = found, names = {} }
            by_digest[entry.digest] = one
            out[#out + 1] = one
        end
        if entry.name then
            one.names[#one.names + 1] = entry.name
        end
    end
    return out, nil, blobs
end

local function blob_name(digest)
    return "blobs/" .. digest:gsub(":", "/", 1)
end

local function index_of(images)
    local list = {}
    for _, one in ipairs(images) do
        for i = 1, math.max(1, #one.names) do
            local name = one.names[i]
            local ref = name and reference.parse(name)
            list[#list + 1] = compose.encode { mediaType = one.found.manifest.media_type, digest = one.entry.digest,
                size = #one.found.bytes, platform = one.entry.platform,
                annotations = name and { [full_name] = name, [ref_name] = ref and ref.tag or name } }
        end
    end
    return '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":'
        .. "[" .. table.concat(list, ",") .. "]}"
end

local function docker_manifest(images)
    local list = {}
    for i, one in ipairs(images) do
        local layers, tags = {}, {}
        for k, layer in ipairs(one.found.manifest.layers) do
            layers[k] = json.encode(blob_name(layer.digest))
        end
        for k, name in ipairs(one.names) do
            local ref = reference.parse(name)
            tags[k] = json.encode(ref and reference.familiar(ref) or name)
        end
        list[i] = ('{"Config":%s,"RepoTags":[%s],"Layers":[%s]}'):format(
            json.encode(blob_name(one.found.manifest.config.digest)), table.concat(tags, ","),
            table.concat(layers, ","))
    end
    return "[" .. table.concat(list, ",") .. "]"
end

local function write_archive(opts, images, blobs, write, with_docker)
    local ok, why = put(write, "oci-layout", '{"imageLayoutVersion":"1.0.0"}')
    if ok then
        ok, why = put(write, "index.json", index_of(images))
    end
    if ok and with_docker then
        ok, why = put(write, "manifest.json", docker_manifest(images))
    end
    table.sort(blobs, function(a, b)
        return a.digest < b.digest
    end)
    for _, blob in ipairs(blobs) do
        if ok then
            ok, why = put_file(write, blob_name(blob.digest), opts.store:blob_path(blob.digest), blob.size)
        end
    end
    for _, file in ipairs(opts.sparse or {}) do
        if ok then
            ok, why = put_sparse(write, file.name, file.path)
        end
    end
    if ok then
        ok, why = write(("\0"):rep(2 * block))
    end
    return ok, why
end

local function write_folder(opts, images, blobs, dir)
    if uv.fs_stat(dir .. "/index.json") then
        return nil, dir .. ": an image layout is there already; choose another place"
    end
    local ok, why = paths.make(dir)
    for _, blob in ipairs(blobs) do
        local to = dir .. "/" .. blob_name(blob.digest)
        if ok then
            ok, why = paths.make(to:match("^(.*)/"))
        end
        if ok then
            ok, why = uv.fs_copyfile(opts.store:blob_path(blob.digest), to, { ficlone = true })
        end
    end
    if ok then
        ok, why = files.write_plain(dir .. "/oci-layout", '{"imageLayoutVersion":"1.0.0"}')
    end
    if ok then
        ok, why = files.write(dir .. "/.index.json", dir .. "/index.json", index_of(images))
    end
    return ok, why
end

-- To a descriptor, or to a file that is there whole or not at all.
local function to_file(opts, images, blobs, out, docker)
    if type(out) == "number" then
        return write_archive(opts, images, blobs, sink_of(out), docker)
    end
    local temporary = out .. ".part"
    local fd, why = uv.fs_open(temporary, "w", tonumber("644", 8))
    if not fd then
        return nil, files.error(out, why)
    end
    local ok
    ok, why = write_archive(opts, images, blobs, sink_of(fd), docker)
    uv.fs_close(fd)
    if ok then
        ok, why = files.publish(temporary, uv.fs_realpath(out) or (out:find("/") and out or "./" .. out))
    end
    if not ok then
        uv.fs_unlink(temporary)
    end
    return ok, why
end

--- Write images of the store to `out`: a path, or a descriptor for archives.
--- opts: store, format ("docker-archive", which is an OCI archive as well;
--- "oci-archive"; "oci-dir"), sparse ({name, path} of files that go into an archive,
--- too). Yields.
---@async
---@param texts string[] references, digests or ids
---@param out string|integer
---@param opts table?
---@return true?
---@return string? error
function M.save(texts, out, opts)
    opts = opts or {}
    local format = opts.format or "docker-archive"
    if not formats[format] then
        return nil, ("format %q: expected docker-archive, oci-archive or oci-dir"):format(tostring(format))
    end
    local options, why = assemble.options { store = opts.store }
    if not options then
        return nil, why
    end
    options.sparse = opts.sparse
    return loop.run(function()
        local held <close>, failed = options.store:use()
        if not held then
            return nil, failed
        end
        local images, blobs
        images, failed, blobs = collect(options, texts)
        if not images then
            return nil, failed
        elseif format == "oci-dir" then
            return write_folder(options, images, blobs, out)
        end
        return to_file(options, images, blobs, out, format == "docker-archive")
    end)
end

return M
