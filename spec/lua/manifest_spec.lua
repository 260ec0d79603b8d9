-- SPDX-License-Identifier: Apache-2.0

local json = require "sm.json"
local manifest = require "sm.manifest"
local platform = require "sm.platform"

local oci = "application/vnd.oci.image."
local list_type = "application/vnd.docker.distribution.manifest.list.v2+json"

local function digest(n)
    return "sha256:" .. ("%064x"):format(n)
end

local function desc(n, media_type)
    return { mediaType = media_type, digest = digest(n), size = n }
end

-- A good image manifest with some fields replaced.
local function image(changes)
    local doc = {
        schemaVersion = 2,
        mediaType = oci .. "manifest.v1+json",
        config = desc(1, oci .. "config.v1+json"),
        layers = { desc(2, oci .. "layer.v1.tar+gzip") },
    }
    for k, v in pairs(changes or {}) do
        doc[k] = v ~= "none" and v or nil
    end
    return json.encode(doc)
end

describe("sm.manifest", function()
    it("reads both dialects", function()
        for _, case in ipairs {
            { oci .. "manifest.v1+json", oci .. "config.v1+json", "layer.v1.tar+zstd", oci },
            { "application/vnd.docker.distribution.manifest.v2+json",
                "application/vnd.docker.container.image.v1+json", "rootfs.diff.tar.gzip",
                "application/vnd.docker.image." },
        } do
            local m = assert(manifest.read(image {
                mediaType = case[1], config = desc(1, case[2]),
                layers = { desc(2, case[4] .. case[3]) },
            }, case[1] .. "; charset=utf-8"))
            assert.equal("image", m.kind)
            assert.equal(digest(2), m.layers[1].digest)
            assert.equal(2, m.layers[1].size)
        end
    end)

    it("takes the type from the header, from the document, or from its form", function()
        assert.equal("image", assert(manifest.read(image { mediaType = "none" },
            oci .. "manifest.v1+json")).kind)
        assert.equal("image", assert(manifest.read(image(), "application/json")).kind)
        local m = assert(manifest.read(image { mediaType = "none" }, nil))
        assert.equal(oci .. "manifest.v1+json", m.media_type)
    end)

    local bad = {
        { "junk", "x", nil, "not JSON" },
        { "an array", "[1]", nil, "not a JSON object" },
        { "deep nesting", ("["):rep(1000), nil, "not JSON" },
        { "schema 1", '{"schemaVersion":1,"fsLayers":[]}', nil, "schema 1" },
        { "schema 1 by header", '{"schemaVersion":2,"layers":[]}',
            "application/vnd.docker.distribution.manifest.v1+prettyjws", "schema 1" },
        { "no version", image { schemaVersion = "none" }, nil, "schemaVersion" },
        { "another type than sent", image(), list_type, "calls itself" },
        { "an unknown type", image { mediaType = "text/html" }, nil, "unknown type" },
        { "both at once", image { manifests = { desc(1) } }, nil, "at once" },
        { "neither", image { layers = "none" }, nil, "neither" },
        { "an index in an image's clothes", image { mediaType = "none" },
            oci .. "index.v1+json", "has the form of an image" },
        { "a helm chart", image { config = desc(1, "application/vnd.cncf.helm.config.v1+json") },
            nil, 'artefact of type "application/vnd.cncf.helm.config.v1+json"' },
        { "an empty config", image { config = desc(1, "application/vnd.oci.empty.v1+json") }, nil,
            "artefact" },
        { "an artifactType", image { artifactType = "application/x-wasm" }, nil, "artefact" },
        { "no config", image { config = "none" }, nil, "config is not a descriptor" },
        { "a huge config", image { config = { digest = digest(1), size = 1 << 40,
            mediaType = oci .. "config.v1+json" } }, nil, "config is larger" },
        { "a bad digest", image { layers = { { digest = "sha256:../../x", size = 1,
            mediaType = oci .. "layer.v1.tar" } } }, nil, "layer 1: invalid digest" },
        { "an unknown digest", image { layers = { { digest = "md5:00", size = 1,
            mediaType = oci .. "layer.v1.tar" } } }, nil, "not supported" },
        { "no size", image { layers = { { digest = digest(1),
            mediaType = oci .. "layer.v1.tar" } } }, nil, "layer 1: its size" },
        { "a negative size", image { layers = { { digest = digest(1), size = -1,
            mediaType = oci .. "layer.v1.tar" } } }, nil, "layer 1: its size" },
        { "half a byte", image { layers = { { digest = digest(1), size = 1.5,
            mediaType = oci .. "layer.v1.tar" } } }, nil, "layer 1: its size" },
        { "a layer of another kind", image { layers = { desc(1, "text/plain") } }, nil,
            'unknown type, "text/plain"' },
        { "an encrypted layer", image { layers = { desc(1, oci .. "layer.v1.tar+gzip+encrypted") } },
            nil, "encrypted" },
        { "layers as an object", image { layers = { a = 1 } }, nil, "layers are not a list" },
    }
    for _, case in ipairs(bad) do
        it("refuses " .. case[1], function()
            local m, err = manifest.read(case[2], case[3])
            assert.is_nil(m)
            assert.truthy(err:find(case[4], 1, true), err)
            assert.is_nil(err:find("[%c]"))
        end)
    end

    it("refuses too many layers", function()
        local layers = {}
        for i = 1, 600 do
            layers[i] = desc(i, oci .. "layer.v1.tar")
        end
        local _, err = manifest.read(image { layers = layers })
        assert.truthy(err:find("600 layers", 1, true))
    end)

    describe("platform choice", function()
        local function choose(wanted, ...)
            local entries = {}
            for i, name in ipairs { ... } do
                entries[i] = desc(i, oci .. "manifest.v1+json")
                if name ~= "" then
                    entries[i].platform = name == "unknown/unknown"
                        and { os = "unknown", architecture = "unknown" }
                        or assert(platform.parse(name))
                end
            end
            local index = assert(manifest.read(json.encode {
                schemaVersion = 2, manifests = entries }, oci .. "index.v1+json"))
            local found, offered = manifest.candidates(index, assert(platform.parse(wanted)))
            local order = {}
            for i, entry in ipairs(found) do
                order[i] = entry.size
            end
            return order, offered
        end
        local rows = {
            { "linux/amd64", { "linux/arm64", "linux/amd64" }, { 2 } },
            { "linux/amd64", { "windows/amd64", "linux/amd64", "linux/amd64" }, { 2, 3 } },
            { "linux/amd64", { "linux/amd64/v3", "linux/amd64" }, { 2, 1 } },
            { "linux/amd64", { "linux/amd64/v4" }, {} },
            { "linux/arm64", { "linux/arm64/v8" }, { 1 } },
            { "linux/arm64/v8", { "linux/arm64" }, { 1 } },
            { "linux/arm64", { "linux/arm/v7" }, {} },
            { "linux/arm/v7", { "linux/arm/v5", "linux/arm/v6", "linux/arm/v7" }, { 3, 2, 1 } },
            { "linux/arm/v6", { "linux/arm/v5", "linux/arm/v6", "linux/arm/v7" }, { 2, 1 } },
            { "linux/amd64", { "unknown/unknown", "linux/amd64" }, { 2 } },
            { "linux/amd64", { "unknown/unknown" }, {} },
            { "linux/amd64", { "", "linux/amd64" }, { 2, 1 } },
            { "linux/riscv64", { "linux/riscv64" }, { 1 } },
        }
        for _, row in ipairs(rows) do
            it(row[1] .. " among " .. table.concat(row[2], " "), function()
                assert.same(row[3], (choose(row[1], table.unpack(row[2]))))
            end)
        end
        it("says what there is", function()
            local _, offered = choose("linux/amd64", "linux/arm/v7", "windows/amd64")
            assert.same({ "linux/arm/v7", "windows/amd64" }, offered)
        end)
        it("skips attestations by annotation", function()
            local entry = desc(1)
            entry.platform = { os = "linux", architecture = "amd64" }
            entry.annotations = { ["vnd.docker.reference.type"] = "attestation-manifest" }
            local index = assert(manifest.read(json.encode { schemaVersion = 2,
                manifests = { entry } }))
            assert.same({}, (manifest.candidates(index, platform.parse "linux/amd64")))
        end)
    end)

    describe("configuration", function()
        local m = assert(manifest.read(image()))
        local function check(doc, wanted)
            return manifest.read_config(type(doc) == "string" and doc or json.encode(doc), m,
                wanted and platform.parse(wanted))
        end
        it("reads one, with nulls as nothing", function()
            local config = assert(check('{"os":"linux","architecture":"amd64","config":{"Env":null},'
                .. '"rootfs":{"type":"layers","diff_ids":["' .. digest(9) .. '"]}}', "linux/amd64"))
            assert.is_nil(config.config.Env)
            assert.same({ digest(9) }, config.rootfs.diff_ids)
        end)
        for name, case in pairs {
            ["no rootfs"] = { { os = "linux" }, "no diff_ids" },
            ["a wrong count"] = { { rootfs = { diff_ids = { digest(1), digest(2) } } },
                "1 layers but its config lists 2" },
            ["a bad diff_id"] = { { rootfs = { diff_ids = { "sha256:zz" } } }, "diff_ids[1]" },
            ["another platform"] = { { os = "linux", architecture = "s390x",
                rootfs = { diff_ids = { digest(1) } } }, "it is for linux/s390x, not for linux/amd64" },
            ["junk"] = { "{", "not JSON" },
        } do
            it("refuses " .. name, function()
                local config, err = check(case[1], "linux/amd64")
                assert.is_nil(config)
                assert.truthy(err:find(case[2], 1, true), err)
            end)
        end
    end)
end)

describe("sm.platform", function()
    it("parses what people write", function()
        assert.same({ os = "linux", architecture = "amd64" }, platform.parse "x86_64")
        assert.same({ os = "linux", architecture = "arm64", variant = "v8" },
            platform.parse "linux/aarch64/v8")
        assert.is_nil((platform.parse "linux//x"))
        assert.is_nil((platform.parse "a/b/c/d"))
        assert.is_nil((platform.parse ""))
    end)
end)
