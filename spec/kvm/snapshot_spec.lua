-- SPDX-License-Identifier: Apache-2.0
--
-- Snapshots and copies of real VMs: one boot, many checks.

local sm = require "sm"
local shell = require "support.shell"
local spec = require "support.vm"
local uv = require "luv"

local loop = sm.loop
-- Names of our own: what an interrupted run left behind is not in the way.
local NAME = ("spec-%d-%d"):format(uv.os_getpid(), uv.hrtime() % 1000000)

local function now_ns()
    local s, us = uv.gettimeofday()
    return (s * 1000000 + us) * 1000
end

describe("a saved VM", function()
    local vm, dir, snapshot, victim

    local function sh(where, script)
        local r = assert(where:exec { argv = { "/bin/sh", "-c", script } })
        assert.equal(0, r.status, r.stderr)
        return r.stdout
    end

    -- What a machine's clock says, in ns, and the host's before and after.
    local function clock(where)
        local before = now_ns()
        local s, us = sh(where, "adjtimex"):match "tv_sec: +(%d+).-tv_usec: +(%d+)"
        return (s * 1000000 + us) * 1000, before, now_ns()
    end

    local function uptime(where)
        return tonumber(sh(where, "cut -d' ' -f1 /proc/uptime"))
    end

    setup(function()
        dir = shell.tmpdir()
        vm = assert(sm.start(assert(sm.image(spec.image "multi")), { cpus = 2, memory = "128M" }))
        -- What lives in RAM alone: a file on tmpfs, and a variable of a process.
        sh(vm, [[
            echo 0123456789abcdef0123456789abcdef > /etc/machine-id
            echo on-disk > /root/file
            nonce=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
            echo $nonce > /dev/shm/nonce
            (while :; do echo $nonce > /dev/shm/alive; sleep 0.2; done) >/dev/null 2>&1 </dev/null &
            while ! test -s /dev/shm/alive; do sleep 0.05; done
        ]])
    end)

    teardown(function()
        for _, one in pairs { victim, vm } do
            one:close()
        end
        shell.remove(dir)
        assert.same({}, spec.settled_leftovers())
    end)

    it("goes on with its streams whole", function()
        loop.run(function()
            local cat <close> = assert(vm:spawn { argv = { "cat" }, stdin = true })
            cat:write "before, "
            local got = ""
            while #got < 8 do
                got = got .. assert(cat:read "stdout")
            end
            snapshot = assert(vm:snapshot { name = NAME })
            cat:write "after"
            cat:close_stdin()
            while true do
                local piece = cat:read "stdout"
                if not piece then
                    break
                end
                got = got .. piece
            end
            assert.equal("before, after", got)
            assert.equal(0, cat:wait().status)
        end)
        assert.is_true(snapshot.stored < 100 << 20, snapshot.stored)
        assert.is_true(sm.snapshot.verify(NAME))
    end)

    it("comes back as a copy that is no twin", function()
        local nonce = sh(vm, "cat /dev/shm/nonce")
        local then_up = uptime(vm)
        local restored_at = loop.now()
        local copy <close> = assert(sm.restore(NAME))
        -- A restore, not a boot: the process runs that has the nonce.
        assert.equal(nonce, sh(copy, "rm -f /dev/shm/alive; while ! test -s /dev/shm/alive; do sleep 0.05; done; cat /dev/shm/alive"))
        assert.equal("on-disk\n", sh(copy, "cat /root/file"))
        -- Names, and random numbers, of its own.
        assert.equal(copy.id .. "\n", sh(copy, "hostname"))
        assert.matches(copy.id, sh(copy, "cat /etc/hosts"))
        assert.not_equal(sh(vm, "cat /etc/machine-id"), sh(copy, "cat /etc/machine-id"))
        assert.matches("^%x+\n$", sh(copy, "cat /etc/machine-id"))
        if assert(require("sm.kernel").find()).source == "own" then -- Debian's has no driver for it
            assert.matches("reseeded due to virtual machine fork", sh(copy, "dmesg"))
        end
        -- The wall clock is the host's, the monotonic one stood still.
        local guest, before, after = clock(copy)
        assert.is_true(guest > before - 50e6 and guest < after + 50e6,
            ("guest %d, host %d to %d"):format(guest, before, after))
        assert.is_true(uptime(copy) <= then_up + (loop.now() - restored_at) + 1)
        -- Two machines from now on.
        sh(copy, "echo changed > /root/file; echo more > /root/other; sync")
        assert.equal("on-disk\n", sh(vm, "cat /root/file; test ! -e /root/other"))
    end)

    it("comes back faster once its first copy has shown what it needs", function()
        local set = snapshot.path:gsub("%.sms$", ".sms.set")
        assert.is_truthy(uv.fs_stat(set))
        local copy <close> = assert(sm.restore(NAME))
        assert.is_true(copy.parts.loaded.working_set > 1 << 20, copy.parts.loaded.working_set)
        assert.equal(sh(vm, "cat /dev/shm/nonce"),
            sh(copy, "rm -f /dev/shm/alive; while ! test -s /dev/shm/alive; do sleep 0.05; done; cat /dev/shm/alive"))
        sh(copy, "cat /lib/ld-musl* /bin/busybox 2>/dev/null | cksum; dmesg | tail -1")
    end)

    it("forks into a tree", function()
        local nonce = sh(vm, "cat /dev/shm/nonce")
        local kids = assert(vm:fork(2))
        assert.equal(2, #kids)
        local draws = { [sh(vm, "head -c 32 /dev/urandom | od -An -tx1")] = true }
        for _, kid in ipairs(kids) do
            assert.equal(vm, kid.parent)
            assert.equal(nonce, sh(kid, "cat /dev/shm/nonce"))
            local draw = sh(kid, "head -c 32 /dev/urandom | od -An -tx1")
            assert.is_nil(draws[draw])
            draws[draw] = true
        end
        assert.same(kids, vm.children)
        assert.not_equal(sh(kids[1], "hostname"), sh(kids[2], "hostname"))
        kids[1]:close()
        victim = kids[2]
    end)

    it("keeps its image, and is refused in one line when something is wrong", function()
        local ok, err = sm.restore "no-such"
        assert.is_nil(ok)
        assert.equal("snapshot no-such: no such snapshot", err)
        ok, err = vm:snapshot { name = NAME }
        assert.is_nil(ok)
        assert.equal("snapshot " .. NAME .. ": there is one of that name", err)
        ok, err = vm:snapshot {}
        assert.is_nil(ok)
        assert.matches("needs a name, or a path", err)
        ok, err = vm:snapshot { name = "../x" }
        assert.is_nil(ok)
        assert.matches("name '%.%./x': expected letters", err)
        os.execute(("head -c 3000000 %s > %s/cut.sms"):format(snapshot.path, dir))
        ok, err = sm.restore(dir .. "/cut.sms")
        assert.is_nil(ok)
        assert.matches("damaged: 3000000 bytes long, it should be", err)
        local pinned = assert(require("sm.store").open()):pinned()
        assert.equal(snapshot.path, pinned[vm.image.digest])
    end)

    it("leaves nothing when its worker dies in the middle of it", function()
        loop.run(function()
            local task = loop.spawn(function()
                return victim:snapshot { name = NAME .. "-half" }
            end)
            loop.sleep(0.02)
            uv.kill(victim.parts.worker:pid(), "sigkill")
            local made, err = task:join(120)
            assert.is_nil(made)
            assert.equal("string", type(err))
            victim:close()
        end)
        assert.is_nil((sm.snapshot.open(NAME .. "-half")))
        local mine = ("^%%.new%%-%d%%-"):format(uv.os_getpid())
        for name in uv.fs_scandir_next, assert(uv.fs_scandir(sm.snapshot.dir())) do
            assert.not_matches(mine, name)
        end
    end)

    it("is forgotten when it is removed, and lets its image go", function()
        assert(sm.snapshot.remove(NAME))
        assert.is_nil((sm.snapshot.open(NAME)))
        assert.is_nil(assert(require("sm.store").open()):pinned()[vm.image.digest])
    end)
end)
