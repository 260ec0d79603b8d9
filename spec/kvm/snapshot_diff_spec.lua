-- SPDX-License-Identifier: Apache-2.0
--
-- Diffs of real VMs: of one that was booted and goes on over its own snapshot, and
-- of a copy; chains come back, and stand alone when they are flattened.

local sm = require "sm"
local shell = require "support.shell"
local spec = require "support.vm"
local uv = require "luv"

local MIB = 1 << 20

describe("a diff of a VM", function()
    local vm, dir, base, first, nonce

    -- On a disk of this kernel, where there is one: what it maps is then in its cache.
    local function at(name)
        return ("%s/%s.sms"):format(dir, name)
    end

    local function sh(where, script)
        local r = assert(where:exec { argv = { "/bin/sh", "-c", script } })
        assert.equal(0, r.status, r.stderr)
        return r.stdout
    end

    -- So many MiB that lie in memory alone, and their sum.
    local function fill(where, name, mib)
        return sh(where, ("dd if=/dev/urandom of=/dev/shm/%s bs=1M count=%d 2>/dev/null && sha256sum < /dev/shm/%s")
            :format(name, mib, name))
    end

    local function sum(where, name)
        return sh(where, "sha256sum < /dev/shm/" .. name)
    end

    setup(function()
        -- Out of the store: only that can go elsewhere.
        local name = assert(require("sm.image").load(os.getenv "SM_SPEC_IMAGES" .. "/one.tar"))[1].names[1]
        vm = assert(sm.start(name, { memory = "128M", disk = "64M" }))
        nonce = fill(vm, "nonce", 1)
        dir = shell.tmpdir()
    end)

    teardown(function()
        if vm then
            vm:close()
        end
        shell.run("rm -rf " .. dir)
        assert.same({}, spec.settled_leftovers())
    end)

    it("is a whole snapshot the first time, and the VM goes on over it", function()
        local cat <close> = assert(vm:spawn { argv = { "cat" }, stdin = true })
        assert(cat:write "before ")
        base = assert(vm:snapshot { path = at "base", diff = true })
        assert.is_nil(base.parent)
        assert.equal(base, vm.base)
        assert(cat:write "after")
        cat:close_stdin()
        local got = {}
        for piece in function() return cat:read "stdout" end do
            got[#got + 1] = piece
        end
        assert.equal("before after", table.concat(got))
        assert.equal(nonce, sum(vm, "nonce"))
    end)

    it("holds what changed since then", function()
        local more = fill(vm, "more", 4)
        first = assert(vm:snapshot { path = at "first", diff = true })
        assert.equal(base.id, first.parent.id)
        assert.is_true(first.stored > 4 * MIB)
        assert.is_true(first.stored < base.stored, ("%d of %d"):format(first.stored, base.stored))
        local later = fill(vm, "later", 1)
        local second <close> = assert(sm.restore(assert(vm:snapshot { path = at "second", diff = true })))
        local early <close> = assert(sm.restore(first))
        assert.equal(nonce, sum(second, "nonce"))
        assert.equal(more, sum(second, "more"))
        assert.equal(later, sum(second, "later"))
        assert.equal(nonce, sum(early, "nonce"))
        assert.equal(more, sum(early, "more"))
        sh(early, "test ! -e /dev/shm/later")
        -- A whole one of a copy holds what its chain does.
        local whole = assert(second:snapshot { path = at "whole" })
        assert.is_nil(whole.parent)
        local copy <close> = assert(sm.restore(whole))
        assert.equal(more, sum(copy, "more"))
        assert.equal(later, sum(copy, "later"))
    end)

    it("is over what a copy was restored from", function()
        local copy <close> = assert(sm.restore(first))
        local own = fill(copy, "own", 1)
        local made = assert(copy:snapshot { path = at "of-copy", diff = true })
        assert.equal(first.id, made.parent.id)
        local again <close> = assert(sm.restore(made))
        assert.equal(own, sum(again, "own"))
        assert.equal(nonce, sum(again, "nonce"))
        -- A fork of a copy is a diff, too; the copy stays where it was.
        local kid <close> = assert(again:fork())
        assert.equal(own, sum(kid, "own"))
        assert.equal(made.id, again.base.id)
        -- One that was read eagerly lies over nothing: it begins anew.
        local eager <close> = assert(sm.restore(made, { eager = true }))
        assert.equal(own, sum(eager, "own"))
        assert.is_nil(assert(eager:snapshot { path = at "eager", diff = true }).parent)
    end)

    it("and a whole one may be copied while the VM runs", function()
        -- A program that changes what it wrote all the time, and knows if it was torn.
        sh(vm, [[(while :; do for f in a b c d; do echo >> /dev/shm/$f; done; done) >/dev/null 2>&1 </dev/null &
            echo $! > /dev/shm/pid; while ! test -s /dev/shm/d; do sleep 0.05; done]])
        local seen = {}
        local live = assert(vm:snapshot { path = at "live", live = true, progress = function(left)
            seen[#seen + 1] = left
        end })
        assert.equal(0, seen[#seen])
        assert.is_true(#seen > 1)
        local copy <close> = assert(sm.restore(live))
        assert.equal(nonce, sum(copy, "nonce"))
        local a, b, c, d = sh(copy, "cd /dev/shm; kill -STOP $(cat pid); sleep 0.2; for f in a b c d; do wc -l < $f; done")
            :match "(%d+)\n(%d+)\n(%d+)\n(%d+)"
        assert.is_true(a + 0 >= b + 0 and b + 0 >= c + 0 and c + 0 >= d + 0 and a - d <= 1,
            table.concat({ a, b, c, d }, " "))
        assert.is_true(sm.snapshot.verify(live))
        sh(vm, "kill $(cat /dev/shm/pid)")
    end)

    it("stands alone when it is flattened, by the command line", function()
        local code, out, err = spec.sm("snapshot rm " .. base.path)
        assert.equal(1, code)
        assert.matches("needs it; remove or flatten that first", err)
        code, out, err = spec.sm("snapshot flatten " .. first.path)
        assert.equal(0, code, out .. err)
        assert.is_nil(sm.snapshot.open(first.path).parent)
        code, out, err = spec.sm("snapshot rm " .. base.path)
        assert.equal(0, code, out .. err)
        local copy <close> = assert(sm.restore(at "second"))
        assert.equal(nonce, sum(copy, "nonce"))
        assert.is_true(sm.snapshot.verify(first.path))
    end)

    it("goes to another machine in an archive, with its image", function()
        local code, out, err = spec.sm(("snapshot export -o %s/x.tar %s"):format(dir, at "second"))
        assert.equal(0, code, out .. err)
        do -- one that was run from where it lay has nothing in the store to go along
            local other <close> = assert(sm.start(spec.image "one", { memory = "64M", disk = "64M" }))
            assert(other:snapshot { path = at "loose" })
            local bad, _, why = spec.sm("snapshot export -o /dev/null " .. at "loose")
            assert.equal(125, bad)
            assert.matches("was run from where it lies", why)
        end
        local home = os.getenv "XDG_DATA_HOME"
        uv.os_setenv("XDG_DATA_HOME", dir .. "/there")
        local _ <close> = setmetatable({}, { __close = function()
            uv.os_setenv("XDG_DATA_HOME", home)
        end })
        code, out, err = spec.sm(("snapshot import --progress none -i %s/x.tar arrived"):format(dir))
        assert.equal(0, code, out .. err)
        assert.equal("arrived\n", out)
        local copy <close> = assert(sm.restore "arrived")
        assert.equal(nonce, sum(copy, "nonce"))
        assert.equal(0, assert(copy:exec { argv = { "sha256sum", "/bin/busybox" } }).status) -- its root is there
    end)
end)
