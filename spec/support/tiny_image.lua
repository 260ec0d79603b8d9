-- SPDX-License-Identifier: Apache-2.0
--
-- Very small images as bytes in memory, and a scripted registry that serves
-- them: for faults that no real registry has. The layers are real tars.

local core = require "sm.image_core"
local json = require "sm.json"
local faulty = require "support.faulty_server"
local shell = require "support.shell"

local M = {}

M.manifest_type = "application/vnd.oci.image.manifest.v1+json"
M.index_type = "application/vnd.oci.image.index.v1+json"
M.config_type = "application/vnd.oci.image.config.v1+json"
M.layer_type = "application/vnd.oci.image.layer.v1.tar+gzip"

---@param bytes string
---@return string
function M.digest(bytes)
    return core.sha256(bytes)
end

-- A gzipped tar with one file; returns the blob and the diffID.
local function layer(name, text)
    local dir = shell.tmpdir()
    shell.write(dir .. "/" .. name, text)
    shell.run(("cd %s; tar --sort=name --mtime=@0 --owner=0 --group=0 -cf t.tar %s; gzip -kn t.tar")
        :format(shell.quote(dir), shell.quote(name)))
    local tar, blob = shell.read(dir .. "/t.tar"), shell.read(dir .. "/t.tar.gz")
    shell.remove(dir)
    return blob, core.sha256(tar)
end

--- An image of some one-file layers.
--- opts: layers ({{name, text}…}), os, architecture, config (merged into it),
--- manifest (merged into it).
---@param opts table?
---@return table {manifest (bytes), digest, blobs {digest = bytes}, layers {digest…}, size}
function M.make(opts)
    opts = opts or {}
    local blobs, layers, diff_ids, order = {}, {}, {}, {}
    for i, one in ipairs(opts.layers or { { "hello", "hello\n" }, { "world", "world\n" } }) do
        local blob, diff_id = layer(one[1], one[2])
        local digest = M.digest(blob)
        blobs[digest] = blob
        order[i] = digest
        layers[i] = { mediaType = M.layer_type, digest = digest, size = #blob }
        diff_ids[i] = diff_id
    end
    local config = { os = opts.os or "linux", architecture = opts.architecture or "amd64",
        config = { Cmd = { "/hello" } }, rootfs = { type = "layers", diff_ids = diff_ids } }
    for k, v in pairs(opts.config or {}) do
        config[k] = v
    end
    local config_bytes = json.encode(config)
    blobs[M.digest(config_bytes)] = config_bytes
    local doc = { schemaVersion = 2, mediaType = M.manifest_type, layers = layers,
        config = { mediaType = M.config_type, digest = M.digest(config_bytes),
            size = #config_bytes } }
    for k, v in pairs(opts.manifest or {}) do
        doc[k] = v
    end
    local bytes = json.encode(doc)
    return { manifest = bytes, digest = M.digest(bytes), blobs = blobs, layers = order,
        type = M.manifest_type, diff_ids = diff_ids }
end

--- An index over images; entries {image, platform = "os/arch[/variant]", …}.
---@param entries table[]
---@return table like `make`, with the parts in `parts`
function M.index(entries)
    local manifests, blobs, parts = {}, {}, {}
    for i, entry in ipairs(entries) do
        local image = entry[1]
        local os, arch, variant = (entry.platform or ""):match("^([^/]+)/([^/]+)/?(.*)$")
        manifests[i] = { mediaType = image.type, digest = image.digest, size = #image.manifest,
            annotations = entry.annotations, platform = os and { os = os, architecture = arch,
                variant = variant ~= "" and variant or nil } }
        parts[image.digest] = image
        for digest, part in pairs(image.parts or {}) do
            parts[digest] = part
        end
        for digest, bytes in pairs(image.blobs) do
            blobs[digest] = bytes
        end
    end
    local bytes = json.encode { schemaVersion = 2, mediaType = M.index_type,
        manifests = manifests }
    return { manifest = bytes, digest = M.digest(bytes), blobs = blobs, type = M.index_type,
        parts = parts }
end

--- Serve an image at any name and tag. `before(req, res, kind, what)` may
--- answer in the registry's place: it returns true if it did. `kind` is
--- "manifest", "blob" or "other".
---@param image table
---@param before? fun(req: table, res: table, kind: string, what: string): boolean?
---@return table server of support.faulty_server
function M.serve(image, before)
    return faulty.start(function(req, res)
        local kind, what = "other", req.path
        local name = req.path:match("/manifests/([^/]+)$")
        if name then
            kind, what = "manifest", name
        elseif req.path:match("/blobs/([^/]+)$") then
            kind, what = "blob", req.path:match("/blobs/([^/]+)$")
        end
        if before and before(req, res, kind, what) then
            return
        end
        if kind == "manifest" then
            local doc = image.parts and image.parts[what]
                or (what == image.digest or not what:find(":")) and image
            if doc then
                res:send(200, { ["Content-Type"] = doc.type,
                    ["Docker-Content-Digest"] = doc.digest }, doc.manifest)
            end
        elseif kind == "blob" and image.blobs[what] then
            M.send_blob(req, res, image.blobs[what])
        end
    end)
end

--- Answer with a blob, ranges included.
function M.send_blob(req, res, bytes)
    local from = tonumber((req.headers.range or ""):match("^bytes=(%d+)%-$"))
    if not from then
        res:send(200, { ["Content-Type"] = "application/octet-stream" }, bytes)
    elseif from >= #bytes then
        res:send(416, {}, "")
    else
        res:send(206, { ["Content-Range"] = ("bytes %d-%d/%d"):format(from, #bytes - 1, #bytes) },
            bytes:sub(from + 1))
    end
end

return M
