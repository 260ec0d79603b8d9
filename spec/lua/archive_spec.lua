-- SPDX-License-Identifier: Apache-2.0
--
-- Images that come as files: archives of skopeo and umoci, in every dialect, by
-- path and by pipe; plain folders; and archives that lie.

local uv = require "luv"
local core = require "sm.image_core"
local erofs = require "support.erofs"
local files = require "sm.files"
local folder = require "support.folder"
local image = require "sm.image"
local images = require "support.images"
local ingest = require "support.ingest"
local shell = require "support.shell"
local tar = require "support.tar"
local tiny = require "support.tiny_image"

local q = shell.quote

describe("images in files:", function()
    local shared, layout, plain -- made once
    local dir, store_dir

    setup(function()
        shared = shell.tmpdir()
        layout = images.make(shared .. "/oci")
        images.copy("oci:" .. layout .. ":multi", "docker-archive:" .. shared .. "/docker.tar:team/multi:v1")
        images.copy("oci:" .. layout .. ":multi", "oci-archive:" .. shared .. "/oci.tar:v1")
        plain = shared .. "/store"
        local img <close> = assert(image.get("oci:" .. layout .. ":multi", { store = plain }))
        assert.truthy(img)
    end)
    teardown(function()
        shell.remove(shared)
    end)
    before_each(function()
        dir = shell.tmpdir()
        store_dir = dir .. "/store"
    end)
    after_each(function()
        shell.remove(dir)
    end)

    local function get(text)
        return image.get(text, { store = store_dir })
    end
    local function refuses(want, found, err)
        assert.is_nil(found)
        assert.truthy(err:find(want, 1, true), err)
        assert.is_nil(err:find("[\r\n]"))
        assert.same({}, files.list(store_dir .. "/tmp"))
    end
    local function meta_of(img)
        return core.sha256 { file = img.extents[1].path }
    end
    local function expected()
        local img <close> = assert(image.get("oci:" .. layout .. ":multi", { store = plain }))
        return meta_of(img), img.digest
    end

    it("the same root from a Docker archive, an OCI one, packed or not", function()
        local meta, digest = expected()
        shell.run(("cd %s; gzip -k docker.tar; zstd -q docker.tar"):format(q(shared)))
        for _, text in ipairs { shared .. "/docker.tar", "docker-archive:" .. shared .. "/docker.tar",
            shared .. "/docker.tar.gz", shared .. "/docker.tar.zst",
            shared .. "/docker.tar:team/multi:v1", shared .. "/docker.tar:v1" } do
            local img <close> = assert(get(text))
            assert.truthy(img.reference:find("^docker%-archive:/"), img.reference)
            local again <close> = assert(get(img.reference))
            assert.equal(img.digest, again.digest)
            assert.equal(meta, meta_of(img), text)
            assert.same({ "/bin/sh" }, img.config.config.Cmd)
        end
        for _, text in ipairs { shared .. "/oci.tar", "oci-archive:" .. shared .. "/oci.tar",
            "oci-archive:" .. shared .. "/oci.tar:v1" } do
            local img <close> = assert(get(text))
            assert.equal(digest, img.digest)
            assert.equal(meta, meta_of(img), text)
        end
        -- No copy of a layer stays behind, only what is derived from it.
        assert.same({}, files.list(store_dir .. "/tmp"))
        assert.truthy(#files.list(store_dir .. "/blobs/sha256") <= 4)
        refuses('no image named "other"', get(shared .. "/docker.tar:other"))
    end)

    it("on standard input, also from a pipe", function()
        local meta = expected()
        local code = ([[
            local img <close> = assert(require "sm.image".get("-", { store = %q }))
            print(require "sm.image_core".sha256 { file = img.extents[1].path })]]):format(store_dir)
        shell.write(dir .. "/get.lua", code)
        assert.equal(meta .. "\n", shell.run(("lua5.4 %s/get.lua < %s/docker.tar"):format(q(dir), q(shared))))
        assert.equal(meta .. "\n", shell.run(("cat %s/oci.tar | gzip -1 | lua5.4 %s/get.lua")
            :format(q(shared), q(dir))))
    end)

    it("loaded under their names, and run without the archive", function()
        local loaded = assert(image.load(shared .. "/docker.tar", { store = store_dir }))
        assert.same({ "docker.io/team/multi:v1" }, loaded[1].names)
        local img <close> = assert(image.pull("team/multi:v1", { store = store_dir, policy = "never" }))
        assert.equal(loaded[1].digest, img.digest)
        assert.equal(expected(), meta_of(img))
        -- Every blob is there: other tools read it.
        local text = shell.run { "skopeo", "inspect", "oci:" .. store_dir .. ":docker.io/team/multi:v1" }
        assert.truthy(text:find(loaded[1].digest, 1, true))
        assert.same({}, image.verify { store = store_dir, deep = true }.problems)
    end)

    it("loaded without a name, and removed by digest", function()
        images.copy("oci:" .. layout .. ":one", "oci-archive:" .. dir .. "/bare.tar")
        local loaded = assert(image.load(dir .. "/bare.tar", { store = store_dir }))
        assert.same({}, loaded[1].names)
        assert(image.load(dir .. "/bare.tar", { store = store_dir }))
        assert.equal(1, #image.list { store = store_dir })
        assert(image.remove(loaded[1].digest:sub(8, 24), { store = store_dir }))
        assert.same({}, files.list(store_dir .. "/blobs/sha256"))
    end)

    it("several in one archive", function()
        local multi = assert(image.load(shared .. "/docker.tar", { store = store_dir }))
        images.copy("oci:" .. layout .. ":one", "docker-archive:" .. dir .. "/one.tar:one:v2")
        assert(image.load(dir .. "/one.tar", { store = store_dir }))
        assert(image.save({ "team/multi:v1", "one:v2" }, dir .. "/both.tar", { store = store_dir }))
        local other = dir .. "/other"
        local loaded = assert(image.load(dir .. "/both.tar", { store = other }))
        assert.equal(2, #loaded)
        assert.equal(multi[1].digest, loaded[1].digest)
        refuses("holds 2 images; name one; there is docker.io/team/multi:v1", get(dir .. "/both.tar"))
        local img <close> = assert(get(dir .. "/both.tar:one:v2"))
        assert.equal("docker-archive:" .. dir .. "/both.tar:one:v2", img.reference)
    end)

    it("a folder as a root, entry by entry", function()
        local root = dir .. "/root"
        shell.run(([[mkdir -p %s; cd %s; mkdir -p bin deep/er; echo x > bin/tool; chmod 4751 bin/tool
            ln bin/tool hard; ln -s bin/tool soft; truncate -s 3M sparse; printf end >> sparse
            echo u > "$(printf 'n\303\251')"; setfattr -n user.k -v v bin/tool
            chmod 1777 deep; mkfifo pipe; [ "$(id -u)" != 0 ] || { chown 12:34 bin/tool; mknod null c 1 3
            setcap cap_net_raw+ep bin/tool; }]]):format(q(root), q(root)))
        local img <close> = assert(get(root))
        assert.equal("dir:" .. uv.fs_realpath(root), img.reference)
        local device = dir .. "/device"
        for _, extent in ipairs(img.extents) do
            shell.run(("cat %s >> %s"):format(q(extent.path), q(device)))
        end
        shell.run { "fsck.erofs", device }
        local tree, close = erofs.read(device)
        assert.same({}, ingest.differences(folder.read(root), tree))
        close()
        -- The same folder is the same image.
        local again <close> = assert(get("dir:" .. root))
        assert.equal(img.digest, again.digest)
        refuses("no such folder", get("dir:" .. dir .. "/none"))
        refuses("no such file or folder", get(dir .. "/none"))
        assert.same({}, files.list(store_dir .. "/tmp"))
    end)

    describe("archives that lie are one clear error:", function()
        local function archive(entries)
            local path = dir .. "/lie.tar"
            shell.write(path, tar.make(entries))
            return path
        end
        local function docker(manifest, more)
            local entries = { { "manifest.json", data = manifest } }
            return archive(table.move(more or {}, 1, #(more or {}), 2, entries))
        end

        it("what is no archive of images", function()
            refuses("neither index.json nor manifest.json", get(archive { { "etc/passwd", data = "x" } }))
            shell.write(dir .. "/junk", ("junk"):rep(1000))
            refuses("not a tar archive", get(dir .. "/junk"))
            shell.write(dir .. "/cut", shell.read(shared .. "/docker.tar"):sub(1, 1000000))
            refuses("tar", get(dir .. "/cut"))
        end)
        it("manifests that make no sense", function()
            for _, text in ipairs { "", "{}", "[]", "[1]", "[{}]", '[{"Config":1}]', '[{"Config":"x","Layers":[1]}]',
                ("["):rep(1000) } do
                local img, err = get(docker(text))
                refuses("lie.tar: ", img, err)
            end
        end)
        it("names that lead nowhere, in circles, or out", function()
            for _, name in ipairs { "none", "../../../etc/passwd", "/etc/passwd", "a" } do
                refuses("the archive lacks", get(docker(('[{"Config":"%s","Layers":[]}]'):format(name),
                    { { "a", link = "b" }, { "b", link = "a" },
                        { "out", link = "/etc/passwd" } })))
            end
        end)
        it("a layer that is not what the config says", function()
            local what = tiny.make { layers = { { "a", "a" } } }
            local config
            for digest, bytes in pairs(what.blobs) do
                config = digest ~= what.layers[1] and bytes or config
            end
            refuses("diffID is", get(docker('[{"Config":"c.json","Layers":["l.tar"]}]', {
                { "c.json", data = config }, { "l.tar", data = tar.make { { "other", data = "b" } } },
            })))
        end)
        it("OCI blobs whose bytes are not their name", function()
            local index = ('{"schemaVersion":2,"manifests":[{"mediaType":"%s","digest":"sha256:%s","size":2}]}')
                :format(tiny.manifest_type, ("ab"):rep(32))
            refuses("lie.tar", get(archive { { "oci-layout", data = '{"imageLayoutVersion":"1.0.0"}' },
                { "index.json", data = index }, { "blobs/sha256/" .. ("ab"):rep(32), data = "{}" } }))
        end)
        it("a bomb", function()
            local img, err = image.get(shared .. "/docker.tar", { store = store_dir, limits = { bytes = 100000 } })
            refuses("(limit bytes)", img, err)
        end)
    end)
end)
