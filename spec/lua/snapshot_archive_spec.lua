-- SPDX-License-Identifier: Apache-2.0
--
-- A snapshot on its way to another machine: what is written is judged by GNU tar and
-- skopeo, what is taken in by its checksums. The machine is one on the fake backend,
-- its image a real one.
package.cpath = package.cpath:gsub("([^;]*build/)%?%.so", "%1fake/?.so;%1?.so")

local capture = require "sm.capture"
local child = require "support.child"
local image = require "sm.image"
local images = require "support.images"
local loop = require "sm.loop"
local saved = require "support.saved"
local shell = require "support.shell"
local snapshot = require "sm.snapshot"
local snapshots = require "sm.snapshot_archive"
local store = require "sm.store"
local uv = require "luv"

local q = shell.quote

describe("a snapshot in an archive", function()
    local shared, dir, old, vm, file, digest

    -- The data folder of this machine, or of another one.
    local function on(name)
        uv.os_setenv("XDG_DATA_HOME", dir .. "/" .. name)
    end

    setup(function()
        shared = shell.tmpdir()
        images.copy("oci:" .. images.make(shared .. "/oci") .. ":one", "docker-archive:" .. shared .. "/one.tar:one:v1")
    end)
    teardown(function()
        shell.remove(shared)
    end)

    before_each(function()
        dir, old = shell.tmpdir(), os.getenv "XDG_DATA_HOME"
        on "here"
        digest = assert(image.load(shared .. "/one.tar"))[1].digest
        vm = saved.machine()
        vm.image.digest, vm.image.extents = digest, assert(store.open()):image(digest).extents
        assert(capture.create(vm, { name = "b", diff = true }))
        assert(vm.parts.worker:write(0x180000, "changed"))
        assert(capture.create(vm, { name = "d", diff = true }))
        file = dir .. "/d.tar"
    end)
    after_each(function()
        vm.parts.worker:close()
        if old then
            uv.os_setenv("XDG_DATA_HOME", old)
        else
            uv.os_unsetenv "XDG_DATA_HOME"
        end
        shell.remove(dir)
    end)

    it("is an image for other tools, and the flattened snapshot beside it", function()
        assert(snapshots.export("d", file))
        assert.matches("snapshot.sms\n", shell.run("tar -tf " .. q(file)))
        shell.run(("cd %s && tar -xf d.tar snapshot.sms"):format(q(dir)))
        local out = assert(snapshot.open(dir .. "/snapshot.sms"))
        assert.is_nil(out.parent)
        assert.equal(snapshot.open("d").id, out.id)
        assert.is_true(snapshot.verify(out))
        assert.equal(digest, shell.run(("skopeo inspect --format '{{.Digest}}' oci-archive:%s"):format(q(file))):gsub("%s", ""))
        -- No hole of it takes room; what is left is what was stored.
        local size, room = uv.fs_stat(file).size, out.stored + uv.fs_stat(shared .. "/one.tar").size + 65536
        assert.is_true(size < room, ("%d, %d"):format(size, room))
        assert(snapshot.flatten "d")
        assert(snapshots.export("d", dir .. "/flat.tar"))
        assert.equal(shell.run(("tar -xOf %s snapshot.sms | sha256sum"):format(q(file))),
            shell.run(("tar -xOf %s/flat.tar snapshot.sms | sha256sum"):format(q(dir))))
        for _, entry in ipairs(require("sm.files").list(snapshot.dir())) do
            assert.matches("^[bd]%.sms$", entry.name)
        end
    end)

    it("is taken in on another machine, with its image", function()
        assert(snapshots.export("d", file))
        on "there"
        local made = assert(snapshots.import(file, "arrived"))
        assert.equal("arrived", made.name)
        assert.equal(digest, made.image.digest)
        assert.is_true(snapshot.verify "arrived")
        assert.equal(tonumber("400", 8), uv.fs_stat(made.path).mode & tonumber("777", 8))
        assert.truthy(assert(store.open()):image(digest))
        -- And keeps it from being removed.
        local ok, err = image.remove "one:v1"
        assert.is_nil(ok)
        assert.matches("snapshot", err)
        assert(snapshot.remove "arrived")
        assert(image.remove "one:v1")
    end)

    it("is refused in one line when something is wrong with it, and leaves nothing", function()
        assert(snapshots.export("d", file))
        shell.run(("cd %s && head -c 100000 d.tar > short.tar && tar -xf d.tar && printf X | dd of=snapshot.sms bs=1 "
            .. "seek=$((0x200000 + 0x180000)) conv=notrunc 2>/dev/null && tar -Scf damaged.tar oci-layout index.json manifest.json "
            .. "blobs snapshot.sms && tar -cf other.tar snapshot.sms && head -c 9999 /dev/urandom > snapshot.sms && "
            .. "tar -cf noise.tar oci-layout index.json manifest.json blobs snapshot.sms"):format(q(dir)))
        on "there"
        for name, words in pairs {
            ["short.tar"] = "short.tar: ", ["damaged.tar"] = "its memory does not match its checksum",
            ["other.tar"] = "not an archive of images", ["noise.tar"] = "this is no snapshot", ["none.tar"] = "none.tar",
            ["../" .. shared:match "[^/]*$" .. "/one.tar"] = "no snapshot is in it",
        } do
            local made, err = snapshots.import(dir .. "/" .. name, "x")
            assert.is_nil(made, name)
            assert.truthy(err:find(words, 1, true), err)
            assert.is_nil(err:find "\n")
        end
        assert.same({}, (snapshot.list()))
        assert.equal("", shell.run(("ls -A %s/there/sm/tmp 2>/dev/null || true"):format(q(dir))))
        local made, err = snapshots.import(file, "../x")
        assert.is_nil(made)
        assert.matches("expected letters", err)
        assert(snapshots.import(file, "x"))
        made, err = snapshots.import(file, "x")
        assert.is_nil(made)
        assert.equal("snapshot x: there is one of that name", err)
        made, err = snapshots.export("gone", file)
        assert.is_nil(made)
        assert.equal("snapshot gone: no such snapshot", err)
        made, err = snapshots.export("x", dir .. "/no/folder/x.tar")
        assert.is_nil(made)
        assert.matches("no/folder", err)
    end)

    it("is whole or not there, whenever who writes or takes it in is killed", function()
        math.randomseed(5)
        local rounds = tonumber(os.getenv "SM_SPEC_KILLS") or 8
        local exported, imported = 0, 0
        local function run(code, milliseconds)
            loop.run(function()
                local other = child.lua(code)
                other:expect "begun"
                if milliseconds then
                    loop.sleep(milliseconds / 1000)
                    other:kill()
                end
                local status = other:wait()
                assert(milliseconds or status == 0)
            end)
        end
        local export = ([[package.cpath = %q
            print "begun" io.stdout:flush()
            assert(require "sm.snapshot_archive".export("d", %q))]]):format(package.cpath, file)
        local import = ([[package.cpath = %q
            print "begun" io.stdout:flush()
            assert(require "sm.snapshot_archive".import(%q, "x"))]]):format(package.cpath, dir .. "/good.tar")
        local function length(code) -- of its work, in milliseconds
            local began = uv.hrtime()
            run(code)
            return (uv.hrtime() - began) // 1000000
        end
        local export_ms = length(export)
        os.rename(file, dir .. "/good.tar")
        on "there"
        local import_ms = length(import)
        assert(snapshot.remove "x")
        local good = shell.run(("sha256sum < %s"):format(q(dir .. "/good.tar")))
        for _ = 1, rounds do
            on "here"
            run(export, math.random(0, export_ms))
            if uv.fs_stat(file) then
                exported = exported + 1
                assert.equal(good, shell.run(("sha256sum < %s"):format(q(file))))
                os.remove(file)
            end
            on "there"
            run(import, math.random(0, import_ms))
            local list, damaged = snapshot.list()
            assert.same({}, damaged)
            for _, one in ipairs(list) do
                imported = imported + 1
                assert.is_true(snapshot.verify(one))
                assert.truthy(assert(store.open()):image(digest))
                assert(snapshot.remove(one))
            end
            assert.same({}, image.verify {}.problems)
        end
        -- Nobody in the way of who comes next, and nothing is left then.
        on "here"
        run(export)
        assert.equal(good, shell.run(("sha256sum < %s"):format(q(file))))
        assert.equal("b.sms d.sms\n", shell.run(("cd %s && echo $(ls -A)"):format(q(snapshot.dir()))))
        assert.is_nil(uv.fs_stat(file .. ".part"))
        on "there"
        run(import)
        assert.is_true(snapshot.verify "x")
        assert.equal("x.sms\n", shell.run(("cd %s && echo $(ls -A)"):format(q(snapshot.dir()))))
        assert.equal("", shell.run(("ls -A %s/there/sm/images/tmp 2>/dev/null || true"):format(q(dir))))
        assert.is_true(exported + imported < 2 * rounds) -- some were killed in time
    end)
end)
