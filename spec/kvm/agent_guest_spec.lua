-- SPDX-License-Identifier: Apache-2.0
--
-- The agent as PID 1 of a real guest: what it mounts and sets up, how it looks
-- after orphans and memory, a read-only root, and a connection that breaks.

local machine = require "sm.machine"
local shell = require "support.shell"
local sm = require "sm"
local spec = require "support.vm"

local function sh(vm, script, opts)
    opts = opts or {}
    opts.argv = { "/bin/sh", "-c", script }
    return assert(vm:exec(opts))
end

describe("the agent in a guest", function()
    local vm

    setup(function()
        vm = assert(sm.start(assert(sm.image(spec.image "one")),
            { memory = "160M", name = "agentspec", hostname = "guest-host" }))
    end)

    teardown(function()
        if vm then
            vm:close()
        end
    end)

    it("tells when each step of the boot was reached", function()
        local marks, before = vm.guest_marks, 0
        for _, name in ipairs { "init", "modules", "dial", "hello", "boot", "root", "booted" } do
            assert.is_true(marks[name] >= before, name)
            before = marks[name]
        end
        assert.is_true(marks.kernel_zero > 0)
    end)

    it("mounts what a system needs", function()
        local mounts = sh(vm, "cat /proc/mounts").stdout
        for _, pattern in ipairs {
            "overlay / overlay rw", "proc /proc proc rw,nosuid,nodev,noexec", "sysfs /sys sysfs",
            "devtmpfs /dev devtmpfs", "devpts /dev/pts devpts .*ptmxmode=666",
            "tmpfs /dev/shm tmpfs rw,nosuid,nodev", "cgroup2 /sys/fs/cgroup cgroup2",
        } do
            assert.matches(pattern, mounts)
        end
        assert.equal("ok\n", sh(vm, "echo ok > /dev/stdout").stdout)
        assert.equal("in", sh(vm, "cat /dev/stdin", { stdin = "in" }).stdout)
        assert.equal("1777 1777\n", sh(vm, "echo $(stat -c %a /tmp) $(stat -c %a /dev/shm)").stdout)
    end)

    it("names the host, and brings loopback up", function()
        assert.equal("guest-host\nguest-host\n", sh(vm, "hostname; cat /etc/hostname").stdout)
        assert.matches("127.0.1.1%s+guest%-host", sh(vm, "cat /etc/hosts").stdout)
        assert.matches("LOOPBACK,UP", sh(vm, "ip addr show lo").stdout)
        assert.matches("127.0.0.1", sh(vm, "ip addr show lo").stdout)
        assert.equal("guest-host\n", sh(vm, "echo $HOSTNAME").stdout)
    end)

    it("has the host's time", function()
        local guest = tonumber(sh(vm, "date +%s").stdout)
        -- An emulated machine is slow, not minutes slow.
        assert.is_true(math.abs(os.time() - guest) < 60)
    end)

    it("keeps the initramfs's files from using memory, and itself small", function()
        local kib = tonumber(sh(vm, "grep VmRSS /proc/1/status").stdout:match "%d+")
        assert.is_true(kib < 1024, kib)
        assert.equal("-1000\n0\n", sh(vm, "cat /proc/1/oom_score_adj /proc/self/oom_score_adj").stdout)
    end)

    it("leaves an idle guest asleep", function()
        local out = sh(vm, [[
            p=$(grep -lx kcompactd0 /proc/[0-9]*/comm); p=${p%/comm}
            woken() { grep '^voluntary' $p/status || echo none $RANDOM; }
            sleep 1; a=$(woken); sleep 2
            [ "$a" = "$(woken)" ] && echo asleep]]).stdout
        assert.equal("asleep\n", out)
    end)

    -- Its network card's watchdog would wake it every five seconds (scripts/kernel.patch);
    -- what it wrote while it booted is on its disk within the first windows.
    it("lets the CPU of an idle guest sleep", function()
        local tasks, vcpu = ("/proc/%d/task/"):format(vm.parts.worker:pid()), nil
        for _, tid in ipairs(shell.list(tasks)) do
            vcpu = shell.read(tasks .. tid .. "/comm"):match "vcpu" and tasks .. tid or vcpu
        end
        local function times_run()
            return shell.read(vcpu .. "/schedstat"):match "(%d+)%s*$"
        end
        local slept
        for _ = 1, 10 do
            local before = times_run()
            sm.loop.sleep(6)
            slept = times_run() == before
            if slept then
                break
            end
        end
        assert.is_true(slept)
    end)

    it("reaps orphans", function()
        sh(vm, "for i in 1 2 3 4 5 6 7 8; do (true &); done")
        local zombies
        for _ = 1, 50 do
            zombies = sh(vm, "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z '").stdout
            if zombies == "0\n" then
                break
            end
        end
        assert.equal("0\n", zombies)
    end)

    it("survives a command that takes all memory", function()
        local r = sh(vm, "tail /dev/zero", { timeout = 120 })
        assert.equal(137, r.status)
        assert.is_false(r.timed_out)
        assert.equal("alive\n", sh(vm, "echo alive").stdout)
    end)

    it("cannot be killed or stopped from inside", function()
        sh(vm, "kill -9 1; kill -STOP 1; kill -HUP 1; kill -SEGV 1")
        assert.equal("alive\n", sh(vm, "echo alive").stdout)
    end)

    it("dials again when the connection breaks, and what runs goes on", function()
        local p = assert(vm:spawn { argv = { "/bin/sh", "-c",
            "while ! test -e /tmp/go; do sleep 0.1; done; echo still here > /tmp/told" } })
        local before = vm.parts.agent
        before.on_error = nil
        before:close()
        assert.same({ nil, "agent: closed" }, { p:wait(5) })
        local again = assert(machine.await_agent(vm.parts, 60))
        assert.equal(before.hello.generation + 1, again.hello.generation)
        assert.is_true(again.hello.booted)
        vm.parts.agent = again
        again.on_goodbye = function(goodbye)
            vm.goodbye = goodbye
        end
        assert.matches("test %-e", sh(vm, "tr '\\0' ' ' < /proc/" .. p.pid .. "/cmdline").stdout)
        sh(vm, "touch /tmp/go; while test -e /proc/" .. p.pid .. "; do sleep 0.1; done", { timeout = 60 })
        assert.equal("still here\n", sh(vm, "cat /tmp/told").stdout)
        assert.equal(3, sh(vm, "exit 3").status)
    end)

    it("says goodbye after a grace time, orphans or not", function()
        sh(vm, "(setsid sh -c 'trap : TERM; while :; do sleep 1; done' </dev/null >/dev/null 2>&1 &)")
        local ending = vm:stop { grace = 1 }
        assert.equal("poweroff", ending.reason)
        assert.equal("poweroff", vm.goodbye.reason)
    end)
end)

describe("the agent in a guest with a read-only root", function()
    it("writes nowhere but where a system must", function()
        local vm <close> = assert(sm.start(assert(sm.image(spec.image "one")),
            { memory = "160M", name = "agentro", read_only = true }))
        for _, path in ipairs { "/x", "/etc/x", "/bin/x", "/root/x" } do
            local r = sh(vm, "echo x > " .. path)
            assert.is_true(r.status ~= 0)
            assert.matches("Read%-only file system", r.stderr)
        end
        for _, path in ipairs { "/tmp/x", "/run/x", "/dev/shm/x" } do
            assert.equal(0, sh(vm, "echo x > " .. path).status, path)
        end
        local ok, err = vm:write_file("/etc/y", "y")
        assert.is_nil(ok)
        assert.matches("read%-only", err)
        assert.matches("127.0.1.1", sh(vm, "cat /etc/hosts").stdout)
        local p = assert(vm:spawn { argv = { "/bin/sh", "-c", "exit 9" }, main = true })
        assert.equal(9, p:wait(60).status)
        local ending = assert(vm:wait(60))
        assert.same({ "exited", 9 }, { ending.reason, ending.code })
    end)
end)
