-- SPDX-License-Identifier: Apache-2.0

local uv = require "luv"
local files = require "sm.files"
local lock = require "sm.lock"
local loop = require "sm.loop"
local reference = require "sm.reference"
local store = require "sm.store"
local child = require "support.child"
local shell = require "support.shell"
local tiny = require "support.tiny_image"

describe("sm.lock", function()
    local dir
    before_each(function()
        dir = shell.tmpdir()
    end)
    after_each(function()
        shell.remove(dir)
    end)

    it("is exclusive, also within a process", function()
        local path = dir .. "/l"
        local one = assert(lock.try(path))
        assert.is_false(lock.try(path))
        assert.is_false(lock.try(path, { shared = true }))
        one:close()
        one:close()
        assert.equal("lock (closed)", tostring(one))
        local two <close> = assert(lock.try(path))
        assert.truthy(two)
    end)
    it("can be shared", function()
        local path = dir .. "/l"
        local a <close> = assert(lock.try(path, { shared = true }))
        local b <close> = assert(lock.try(path, { shared = true }))
        assert.is_false(lock.try(path))
        assert.truthy(a and b)
    end)
    it("counts only while its file has its name", function()
        local path = dir .. "/l"
        local old = assert(lock.try(path))
        os.remove(path)
        local new <close> = assert(lock.try(path))
        assert.truthy(new)
        old:close()
        assert.is_false(lock.try(path))
    end)
    it("goes with its file", function()
        local path = dir .. "/l"
        assert(lock.try(path)):remove()
        assert.is_nil(files.size(path))
    end)
    it("says why it cannot be had", function()
        local held, err = lock.try(dir .. "/missing/l")
        assert.is_nil(held)
        assert.truthy(err:find("no such file", 1, true))
    end)
    it("dies with a killed process, and waiting sees that", function()
        loop.run(function()
            local path = dir .. "/l"
            local other = child.lua(([[
                local l = require "sm.lock".try(%q)
                print(l and "held") io.stdout:flush()
                require "luv".sleep(60000)]]):format(path))
            other:expect("held")
            assert.is_false(lock.try(path))
            local waited = false
            local task = loop.spawn(function()
                local held <close> = assert(lock.wait(path, nil, function()
                    waited = true
                    other:kill()
                end))
                return held ~= nil
            end)
            assert.is_true(task:join(10))
            assert.is_true(waited)
            other:wait()
        end)
    end)
end)

describe("sm.store", function()
    local dir, st

    before_each(function()
        dir = shell.tmpdir()
        st = assert(store.open(dir .. "/store"))
    end)
    after_each(function()
        shell.remove(dir)
    end)

    -- Put an image's blobs in and name it.
    local function add(name, image)
        for digest, bytes in pairs(image.blobs) do
            assert(st:put(digest, bytes))
        end
        assert(st:put(image.digest, image.manifest))
        assert(st:tag(name, { digest = image.digest, size = #image.manifest,
            media_type = image.type, source = image.digest,
            platform = { os = "linux", architecture = "amd64" } }))
    end
    local function find(text)
        return assert(st:find(assert(reference.parse(text))))
    end
    local function blob_count()
        return #files.list(st.dir .. "/blobs/sha256")
    end
    local one = tiny.make { layers = { { "a", "a" }, { "shared", "s" } } }
    local two = tiny.make { layers = { { "shared", "s" }, { "b", "b" } } }

    it("is a layout that opens again, for us alone", function()
        assert.equal('{"imageLayoutVersion":"1.0.0"}', shell.read(st.dir .. "/oci-layout"))
        assert.same({}, st:entries())
        assert(store.open(st.dir))
        assert.equal(tonumber("700", 8), uv.fs_stat(st.dir).mode & tonumber("777", 8))
    end)

    it("names images, and a name moves", function()
        add("quay.io/x/one:v1", one)
        add("quay.io/x/two:v1", two)
        assert.equal(2, #st:entries())
        assert.equal(one.digest, find("quay.io/x/one:v1").digest)
        add("quay.io/x/one:v1", two)
        assert.equal(2, #st:entries())
        assert.equal(two.digest, find("quay.io/x/one:v1").digest)
        assert.is_nil((st:find(assert(reference.parse("quay.io/x/one:v2")))))
        assert.equal(two.digest, find("anything@" .. two.digest).digest)
    end)

    it("is read by skopeo and umoci", function()
        add("quay.io/x/one:v1", one)
        local seen = shell.run { "skopeo", "inspect", "--format", "{{.Digest}}",
            "oci:" .. st.dir .. ":quay.io/x/one:v1" }
        assert.equal(one.digest, seen:gsub("%s+$", ""))
        assert.truthy(shell.run { "umoci", "list", "--layout", st.dir }:find("quay.io/x/one:v1", 1, true))
    end)

    it("removes what nothing needs any more, and only that", function()
        add("quay.io/x/one:v1", one)
        add("quay.io/x/two:v1", two)
        add("quay.io/x/two:again", two)
        local before = blob_count()
        assert(st:remove(find("quay.io/x/two:v1")))
        assert.equal(before, blob_count())
        assert(st:remove(find("quay.io/x/two:again")))
        -- two's manifest, config and its own layer are gone, the shared one stays
        assert.equal(before - 3, blob_count())
        for digest, bytes in pairs(one.blobs) do
            assert.equal(bytes, shell.read(st:blob_path(digest)))
        end
        local freed, err = st:remove({ name = "quay.io/x/none:v1", digest = one.digest, raw = {} })
        assert.is_nil(freed)
        assert.truthy(err:find("no such image", 1, true))
    end)

    it("keeps what a VM holds", function()
        add("quay.io/x/one:v1", one)
        local entry = find("quay.io/x/one:v1")
        local lease = assert(st:lease(one.digest))
        local freed, err = st:remove(entry)
        assert.is_nil(freed)
        assert.equal("quay.io/x/one:v1 is in use by a running VM", err)
        assert.equal(1, #st:entries())
        assert.equal(0, assert(st:remove(entry, true)))
        assert.equal(0, #st:entries())
        assert.truthy(st:has_blob { digest = one.digest, size = #one.manifest })
        lease:close()
        assert(st:collect())
        assert.equal(0, blob_count())
        assert.same({}, files.list(st.dir .. "/leases"))
    end)

    it("collects nothing while a pull is at work", function()
        assert(st:put(one.digest, one.manifest))
        local held = assert(st:use())
        local freed, err = st:collect()
        assert.is_nil(freed)
        assert.is_nil(err)
        assert.equal(1, blob_count())
        held:close()
        assert(st:collect())
        assert.equal(0, blob_count())
    end)

    it("clears what dead processes left, but keeps fresh downloads", function()
        shell.write(st:temporary("layer"), "x")
        shell.run { "mkdir", "-p", st.dir .. "/tmp/image.1/deep" }
        shell.write(st:part_path(one.digest), "half")
        shell.write(st:part_path(two.digest), "half")
        uv.fs_utime(st:part_path(two.digest), 1, os.time() - 3 * 24 * 3600)
        local held = assert(st:use())
        local left = files.list(st.dir .. "/tmp")
        assert.equal(1, #left)
        assert.equal(st:part_path(one.digest), st.dir .. "/tmp/" .. left[1].name)
        -- Somebody is at work: nothing is touched.
        shell.write(st:temporary("layer"), "x")
        local second = assert(st:use())
        assert.equal(2, #files.list(st.dir .. "/tmp"))
        held:close()
        second:close()
    end)

    it("says in one line that it is damaged, and what to do", function()
        add("quay.io/x/one:v1", one)
        for text, want in pairs {
            ["{"] = "index.json is not JSON", ["[]"] = "lists no manifests",
            ["[1]"] = "not a JSON object", ["{}"] = "lists no manifests",
            ['{"manifests":[5]}'] = "entry 1 is not a descriptor",
            ['{"manifests":[{"digest":"sha256:../x","size":1}]}'] = "entry 1 is not a descriptor",
        } do
            shell.write(st.dir .. "/index.json", text)
            local list, err = st:entries()
            assert.is_nil(list)
            assert.truthy(err:find(want, 1, true), err)
            assert.truthy(err:find("move " .. st.dir .. " away and pull again", 1, true))
            assert.is_nil(err:find("\n"))
            assert.is_nil((st:tag("a", { digest = one.digest, size = 1, media_type = "x" })))
            assert.equal(text, shell.read(st.dir .. "/index.json"))
        end
        shell.write(st.dir .. "/oci-layout", "junk")
        local opened, err = store.open(st.dir)
        assert.is_nil(opened)
        assert.truthy(err:find("is not an OCI layout's", 1, true))
        shell.write(st.dir .. "/oci-layout", '{"imageLayoutVersion":"2.0.0"}')
        opened, err = store.open(st.dir)
        assert.is_nil(opened)
        assert.truthy(err:find("version 2.0.0 is not supported", 1, true))
    end)

    it("says why it cannot be made", function()
        shell.write(dir .. "/file", "")
        local opened, err = store.open(dir .. "/file/store")
        assert.is_nil(opened)
        assert.truthy(err:find("image store", 1, true) or err:find("not a directory", 1, true), err)
    end)

    it("never makes a path of a digest it has not checked", function()
        for _, digest in ipairs { "sha256:../../../etc/passwd", "sha256:", "x", "md5:" .. ("0"):rep(32) } do
            assert.has_error(function()
                st:blob_path(digest)
            end)
        end
    end)

    it("loses no name when many processes write", function()
        loop.run(function()
            local children = {}
            for i = 1, 4 do
                children[i] = child.lua(([[
                    local st = assert(require "sm.store".open(%q))
                    for j = 1, 10 do
                        assert(st:tag("quay.io/x/p%d:v" .. j, { digest = %q, size = 1,
                            media_type = "x" }))
                    end]]):format(st.dir, i, one.digest))
            end
            for _, other in ipairs(children) do
                assert.equal(0, (other:wait()))
            end
        end)
        assert.equal(40, #st:entries())
    end)
end)
