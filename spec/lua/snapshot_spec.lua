-- SPDX-License-Identifier: Apache-2.0
--
-- Snapshots as files that are looked after: names, lists, leftovers. No VM of
-- the product: the files are made by a machine on the fake backend.
package.cpath = package.cpath:gsub("([^;]*build/)%?%.so", "%1fake/?.so;%1?.so")

local capture = require "sm.capture"
local clone = require "sm.clone"
local core = require "sm.core"
local saved = require "support.saved"
local shell = require "support.shell"
local snapshot = require "sm.snapshot"
local uv = require "luv"

describe("snapshots on the disk", function()
    local dir, old

    -- A file with this description; it has no product's machine in it.
    local function make(path, meta)
        local vm <close> = assert(core.vm { memory = "64K" })
        assert(vm:write(0x1000, "\xeb\xfe"))
        assert(vm:enter(0, "real16", 0x1000))
        assert(vm:start())
        assert(vm:pause())
        assert(vm:save { path = path, meta = meta })
    end

    local META = [[{"format":1,"image":{"digest":"sha256:]] .. ("0"):rep(64)
        .. [[","name":"app:1","extents":[]},"devices":[],"cfg":{}}]]

    before_each(function()
        dir, old = shell.tmpdir(), os.getenv "XDG_DATA_HOME"
        uv.os_setenv("XDG_DATA_HOME", dir)
        os.execute(("mkdir -p %s"):format(snapshot.dir()))
    end)

    after_each(function()
        if old then
            uv.os_setenv("XDG_DATA_HOME", old)
        else
            uv.os_unsetenv "XDG_DATA_HOME"
        end
        shell.remove(dir)
    end)

    it("are listed, oldest first, and the damaged ones told apart", function()
        make(snapshot.dir() .. "/b.sms", META)
        make(snapshot.dir() .. "/a.sms", META)
        make(snapshot.dir() .. "/foreign.sms", "not ours")
        os.execute(("echo rubbish > %s/c.sms; touch %s/.new-1-x %s/readme"):format(snapshot.dir(), snapshot.dir(), snapshot.dir()))
        local list, damaged = snapshot.list()
        assert.equal(2, #list)
        assert.equal("b", list[1].name)
        assert.equal("a", list[2].name)
        assert.equal("app:1", list[1].image.name)
        table.sort(damaged, function(x, y)
            return x.name < y.name
        end)
        assert.equal("snapshot c: this is no snapshot", damaged[1].error)
        assert.equal("snapshot foreign: it was not made by sm run or vm:snapshot", damaged[2].error)
    end)

    it("are refused by name when that is no name", function()
        for _, name in ipairs { "", ".x", "-x", "a b", ("x"):rep(129) } do
            local ok, err = snapshot.open(name)
            assert.is_nil(ok)
            assert.matches("expected letters", err)
        end
        local ok, err = snapshot.open "gone"
        assert.is_nil(ok)
        assert.equal("snapshot gone: no such snapshot", err)
        ok, err = snapshot.remove "gone"
        assert.is_nil(ok)
        assert.equal("snapshot gone: no such snapshot", err)
    end)

    it("are verified", function()
        local path = snapshot.dir() .. "/v.sms"
        make(path, META)
        assert.is_true(snapshot.verify "v")
        local f = assert(io.open(path, "r+b"))
        f:seek("set", (2 << 20) + 0x1000)
        f:write "X"
        f:close()
        local ok, err = snapshot.verify "v"
        assert.is_nil(ok)
        assert.equal("snapshot v: damaged: its memory does not match its checksum", err)
        assert.is_table(snapshot.open "v") -- which reads no memory
    end)

    it("have a working set that is checked, and goes with them", function()
        local path, set = snapshot.path "w", snapshot.set_path(snapshot.path "w")
        make(path, META)
        local copy <close> = assert(core.vm {})
        assert.equal(0, assert(copy:load { path = path, working_set = set }).working_set)
        assert(copy:read(0x1000, 2)) -- so that there is something, however late its vCPU begins
        assert(copy:start())
        local touched = assert(copy:touched())
        local function write()
            assert(io.open(set, "w")):close()
            assert(core.working_set({ path }, touched, set))
        end
        local function used()
            local again <close> = assert(core.vm {})
            local got = assert(again:load { path = path, working_set = set })
            assert.equal("\xeb\xfe", again:read(0x1000, 2))
            return got.working_set
        end
        write()
        assert.is_true(used() >= 4096)
        -- A flaw in its pages is found by verify, one in what it says of them at once.
        local f <close> = assert(io.open(set, "r+"))
        f:seek("end", -1)
        f:write "x"
        f:flush()
        assert.is_true(snapshot.verify "w")
        assert.is_nil(uv.fs_stat(set))
        write()
        local g <close> = assert(io.open(set, "r+"))
        g:seek("set", 20)
        g:write "x"
        g:flush()
        assert.equal(0, used())
        -- Those of snapshots that are gone are swept away.
        write()
        os.rename(set, snapshot.set_path(snapshot.path "gone"))
        write()
        snapshot.sweep(snapshot.dir())
        assert.is_nil(uv.fs_stat(snapshot.set_path(snapshot.path "gone")))
        assert.is_truthy(uv.fs_stat(set))
        local bare = dir .. "/bare" -- a path as the user likes it
        os.rename(set, snapshot.set_path(bare))
        assert(io.open(bare, "w")):close()
        snapshot.sweep(dir)
        assert.is_truthy(uv.fs_stat(snapshot.set_path(bare)))
        write()
        assert.is_true(snapshot.remove "w")
        assert.is_nil(uv.fs_stat(set))
    end)

    it("are whole or not there, whenever their maker is killed", function()
        math.randomseed(4)
        local found = 0
        local function begun(finished)
            for name in uv.fs_scandir_next, assert(uv.fs_scandir(snapshot.dir())) do
                if not finished or name:match "^s.*%.sms$" then
                    return true
                end
            end
        end
        for round = 1, tonumber(os.getenv "SM_SPEC_KILLS") or 8 do
            local gone
            local handle, pid = uv.spawn("/usr/bin/lua5.4", {
                args = { "spec/support/saved.lua" }, stdio = { nil, nil, 2 },
            }, function()
                gone = true
            end)
            -- Until it has saved something, and a random while longer.
            local deadline = uv.hrtime() + 60e9
            while not begun(round % 2 == 0) and uv.hrtime() < deadline do
                uv.sleep(2)
            end
            uv.sleep(math.random(0, 120))
            uv.kill(pid, "sigkill")
            while not gone do -- its locks are free when it is dead, not before
                uv.run "once"
            end
            handle:close()
            local list, damaged = snapshot.list()
            assert.same({}, damaged)
            found = found + #list
            for _, one in ipairs(list) do
                assert.is_true(snapshot.verify(one))
                assert(snapshot.chain(one)) -- what it needs is there, too
            end
            for _, one in ipairs(list) do
                assert(snapshot.flatten(one))
                assert.is_true(snapshot.verify(one.name))
            end
            for _, one in ipairs(list) do
                assert(snapshot.remove(one))
            end
        end
        assert.is_true(found >= (tonumber(os.getenv "SM_SPEC_KILLS") or 8) / 2)
        -- What the dead left unfinished goes with the next one.
        assert(capture.create(saved.machine(), { name = "last" }))
        local names = {}
        for name in uv.fs_scandir_next, assert(uv.fs_scandir(snapshot.dir())) do
            names[#names + 1] = name
        end
        assert.same({ "last.sms" }, names)
        local ok, err = capture.create(saved.machine(), { name = "last" })
        assert.is_nil(ok)
        assert.equal("snapshot last: there is one of that name", err)
    end)

    it("say that the disk is full, and leave nothing half-made", function()
        if not os.execute(("mount -t tmpfs -o size=1200k sm-spec %s 2>/dev/null"):format(snapshot.dir())) then
            pending("needs to mount a tmpfs")
            return
        end
        local ok, why = pcall(function()
            local function only(...)
                local names = {}
                for name in uv.fs_scandir_next, assert(uv.fs_scandir(snapshot.dir())) do
                    names[#names + 1] = name
                end
                table.sort(names)
                assert.same({ ... }, names)
            end
            local vm = saved.machine()
            local _ <close> = vm.parts.worker
            local function full(got, err)
                assert.is_nil(got)
                assert.matches("No space left on device", err)
                assert.is_nil(err:find "\n")
            end
            assert(capture.create(vm, { name = "fits", diff = true }))
            assert(vm.parts.worker:write(0x180000, "changed"))
            full(capture.create(vm, { name = "whole" }))
            full(capture.create(vm, { name = "live", live = true }))
            only "fits.sms"
            local diff = assert(capture.create(vm, { name = "small", diff = true }))
            full(snapshot.flatten(diff))
            only("fits.sms", "small.sms")
            assert.is_true(snapshot.verify "fits")
            assert.is_true(snapshot.verify "small")
            -- The machine goes on, and there is room again.
            shell.run { "mount", "-o", "remount,size=8m", snapshot.dir() }
            assert(capture.create(vm, { name = "whole" }))
            assert(snapshot.flatten(diff))
            assert.is_true(snapshot.verify "small")
        end)
        shell.run { "umount", snapshot.dir() }
        assert.is_true(ok, why)
    end)

    describe("as diffs", function()
        local vm

        -- A chain of three: b, d1 over it, d2 over that. What they differ in is at PAGE.
        local PAGE = 0x180000
        before_each(function()
            vm = saved.machine()
            for i, name in ipairs { "b", "d1", "d2" } do
                assert(vm.parts.worker:pause())
                assert(vm.parts.worker:write(PAGE, ("%s "):format(name):rep(100)))
                assert(vm.parts.worker:write(PAGE + i * 0x1000, name))
                assert(vm.parts.worker:resume())
                assert(capture.create(vm, { name = name, diff = true }))
            end
        end)

        -- What a machine made of it has at an address.
        local function memory_of(name, address)
            local chain = assert(snapshot.chain(assert(snapshot.open(name))))
            local paths = {}
            for i, link in ipairs(chain) do
                paths[i] = link.path
            end
            local copy <close> = assert(core.vm {})
            assert(copy:load { path = table.remove(paths), parents = paths })
            return (assert(copy:read(address, 16)):gsub("%z.*", ""):gsub(" .*", ""))
        end

        it("need their parents, and hold what changed", function()
            local b, d1, d2 = snapshot.open "b", snapshot.open "d1", snapshot.open "d2"
            assert.is_nil(b.parent)
            assert.equal(b.id, d1.parent.id)
            assert.equal(d1.id, d2.parent.id)
            assert.equal(3, #snapshot.chain(d2))
            assert.is_true(d2.stored < b.stored)
            assert.equal("b", memory_of("b", PAGE))
            assert.equal("d1", memory_of("d1", PAGE))
            assert.equal("d2", memory_of("d2", PAGE))
            assert.equal("b", memory_of("d2", PAGE + 0x1000))
            assert.equal("d1", memory_of("d2", PAGE + 0x2000))
            assert.equal("", memory_of("d1", PAGE + 0x3000))
        end)

        it("keep their parents from being removed", function()
            local ok, err = snapshot.remove "b"
            assert.is_nil(ok)
            assert.equal("snapshot b: snapshot d1 needs it; remove or flatten that first", err)
            assert(snapshot.remove "d2")
            assert(snapshot.remove "d1")
            assert(snapshot.remove "b")
            assert.same({}, (snapshot.list()))
        end)

        it("are not begun over one that is being removed, nor is one removed that is used", function()
            local held <close> = assert(snapshot.hold(snapshot.path "d2"))
            local ok, err = snapshot.remove "d2"
            assert.is_nil(ok)
            assert.equal("snapshot d2: a diff over it is being made", err)
        end)

        it("say so when a parent is gone or another", function()
            os.remove(snapshot.path "d1")
            local chain, err = snapshot.chain(snapshot.open "d2")
            assert.is_nil(chain)
            assert.matches("^snapshot d2: it needs its parent .*/d1.sms %(%x+%), which is gone$", err)
            assert(os.rename(snapshot.path "b", snapshot.path "d1"))
            chain, err = snapshot.chain(snapshot.open "d2")
            assert.is_nil(chain)
            assert.matches("which is gone$", err)
            local vm2, why = clone.restore "d2"
            assert.is_nil(vm2)
            assert.equal(err, why)
        end)

        it("find a parent that was renamed", function()
            assert(os.rename(snapshot.path "b", snapshot.path "other"))
            assert.equal("d2", memory_of("d2", PAGE))
            assert.equal("snapshot other: snapshot d1 needs it; remove or flatten that first",
                select(2, snapshot.remove "other"))
        end)

        it("become whole ones by flatten, and those over them stay good", function()
            local before = snapshot.open "d1"
            local flat = assert(snapshot.flatten "d1")
            assert.equal(before.id, flat.id)
            assert.is_nil(flat.parent)
            assert.is_true(snapshot.verify "d1")
            assert(snapshot.remove "b")
            assert.equal("d2", memory_of("d2", PAGE))
            assert.equal("b", memory_of("d2", PAGE + 0x1000))
            assert.equal(flat.id, assert(snapshot.flatten "d1").id) -- again: nothing to do
            assert(snapshot.flatten "d2")
            assert(snapshot.remove "d1")
            assert.equal("d2", memory_of("d2", PAGE))
            assert.equal("d1", memory_of("d2", PAGE + 0x2000))
        end)

        it("tell how far verify and flatten are", function()
            for _, act in ipairs { snapshot.verify, snapshot.flatten } do
                local last, of = 0, nil
                assert(act("d2", function(done, total)
                    assert.is_true(done > last and done <= total)
                    last, of = done, total
                    error "of its own, which stops nothing"
                end))
                assert.equal(of, last)
                assert.is_true(last >= 2 << 20)
            end
        end)

        it("are left alone by a flatten that fails", function()
            local b = snapshot.open "b"
            assert(uv.fs_chmod(b.path, tonumber("600", 8)))
            local f = assert(io.open(b.path, "r+b"))
            f:seek("set", (2 << 20) + 0x1000)
            f:write "X"
            f:close()
            local ok, err = snapshot.flatten "d1"
            assert.is_nil(ok)
            assert.matches("^snapshot d1: .*damaged: its memory does not match its checksum$", err)
            assert.equal(b.id, snapshot.open("d1").parent.id)
            for _, entry in ipairs(require("sm.files").list(snapshot.dir())) do
                assert.matches("^[bd]", entry.name)
            end
        end)

        it("end in a whole one when the chain is full", function()
            for i = 3, snapshot.CHAIN_MAX do
                local made = assert(capture.create(vm, { name = "d" .. i, diff = true }))
                assert.equal(i < snapshot.CHAIN_MAX, made.parent ~= nil, i)
            end
        end)

        it("are refused an option that there is not", function()
            local ok, err = capture.create(vm, { name = "x", differ = true })
            assert.is_nil(ok)
            assert.equal("snapshot: unknown key 'differ' (known: name, path, before, diff, live, progress)", err)
        end)
    end)

    it("are refused when their image is gone", function()
        make(snapshot.dir() .. "/g.sms", (META:gsub('"extents":%[%]',
            '"extents":[{"path":"/nonexistent/data","offset":0,"length":4096}]')))
        local vm, err = clone.restore "g"
        assert.is_nil(vm)
        assert.matches("^snapshot g: it needs the image app:1 %(sha256:0+%), which is gone$", err)
        vm, err = clone.restore("g", { memory = "1G" })
        assert.is_nil(vm)
        assert.matches("unknown key 'memory'", err)
    end)
end)

describe("a pool's configuration", function()
    it("is checked before anything starts", function()
        local pool = require "sm.pool"
        local function refused(pattern, cfg)
            local ok, err = pool.new(cfg)
            assert.is_nil(ok)
            assert.matches(pattern, err)
        end
        refused("needs an image, or a snapshot", {})
        refused("needs an image, or a snapshot", { image = "a", snapshot = "b" })
        refused("unknown key 'size'", { image = "a", size = 3 })
        refused("min: expected a whole number, at least 0", { image = "a", min = -1 })
        refused("max: expected at least min %(5%)", { image = "a", min = 5, max = 2 })
        refused("idle_timeout: expected seconds", { image = "a", idle_timeout = 0 })
        refused("no warmup", { snapshot = "a", warmup = function() end })
    end)
end)
