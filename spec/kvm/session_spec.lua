-- SPDX-License-Identifier: Apache-2.0
--
-- A day with VMs in the background: run -d, ps, exec, cp, logs, attach, stop,
-- each command a process of its own on real VMs.

local loop = require "sm.loop"
local net = require "support.net"
local shell = require "support.shell"
local spec = require "support.vm"
local terminal = require "support.terminal"
local uv = require "luv"

local one = spec.image "one"

local function ok(tail, stdin)
    local code, out, err = spec.sm(tail, stdin)
    assert(code == 0, ("sm %s: %d\n%s%s"):format(tail, code, out, err))
    return out
end

describe("VMs in the background", function()
    local dir

    setup(function()
        dir = shell.tmpdir()
    end)

    -- What a failed spec left is not the next one's concern.
    after_each(function()
        spec.sm "rm -f day b c far t"
    end)

    teardown(function()
        shell.remove(dir)
        assert.same({}, spec.settled_leftovers())
    end)

    it("are started, seen, entered, read and ended from separate processes", function()
        assert.equal("day\n", ok("run -q -d --name day " .. one .. " sh -c 'echo up; echo no >&2; sleep 100000'"))
        assert.matches("\nday +oci:%S+ +sh %-c .- Up ", ok "ps")
        assert.equal("day\n", ok "ps -q")

        local code, out, err = spec.sm "exec -e ADDED=1 -w /tmp -u 1000 day sh -c 'echo $ADDED $SPEC; pwd; id -u; echo e >&2; exit 7'"
        assert.equal(7, code)
        assert.equal("1 yes\n/tmp\n1000\n", out)
        assert.equal("e\n", err)
        assert.equal(127, (spec.sm "exec day no-such"))
        shell.write(dir .. "/in", ("line\n"):rep(100000))
        assert.equal(shell.run("sha256sum <" .. dir .. "/in"), ok("exec -i day sha256sum", dir .. "/in"))
        assert.equal(137, (spec.sm "exec day sh -c 'kill -9 $$'"))

        -- Files and folders, both ways.
        shell.run(("cd %s; mkdir -p src/sub; echo a >src/a; echo b >src/sub/b; ln -s a src/link; chmod 750 src/a"):format(dir))
        ok(("cp %s/in day:/tmp/"):format(dir))
        ok(("cp day:/tmp/in %s/out"):format(dir))
        shell.run(("cmp %s/in %s/out"):format(dir, dir))
        ok(("cp %s/src day:/tmp"):format(dir))
        ok "exec day sh -c 'mknod /tmp/src/disk b 7 0; mkfifo /tmp/src/fifo'"
        ok(("cp day:/tmp/src %s/back"):format(dir))
        -- Everything but the device and the fifo, which nobody wants from a guest.
        shell.run(("diff -r %s/src %s/back"):format(dir, dir))
        assert.equal("a\n", shell.run(("readlink %s/back/link"):format(dir)))
        assert.equal("750\n", shell.run(("stat -c %%a %s/back/a"):format(dir)))
        ok("cp day:/tmp/src -  >" .. dir .. "/out.tar; true")
        assert.matches("src/sub/b\n", shell.run("tar -tf " .. dir .. "/out.tar"))
        shell.run(("cd %s; tar -cf in.tar src"):format(dir))
        ok "exec day mkdir /tmp/in-a-stream"
        ok("cp - day:/tmp/in-a-stream", dir .. "/in.tar")
        assert.equal("b\n", ok "exec day cat /tmp/in-a-stream/src/sub/b")
        code, _, err = spec.sm("cp day:/none " .. dir .. "/x")
        assert.equal(1, code)
        assert.matches("no such file", err)

        code, out, err = spec.sm "logs day"
        assert.equal(0, code)
        assert.equal("up\n", out)
        assert.equal("no\n", err)
        assert.matches('"status": "running"', ok "inspect day")
        assert.matches("\nday +[%d.]+%% ", ok "stats --no-stream")
        local file = os.tmpname()
        shell.run(([[./sm pcap -w %s day >/dev/null 2>&1 </dev/null & p=$!
            while ! [ -s %s ]; do sleep 0.1; done
            ./sm exec day sh -c 'nc -w 1 93.184.216.34 80' >/dev/null 2>&1 </dev/null || true
            while [ $(stat -c %%s %s) -lt 100 ]; do sleep 0.1; done
            kill $p; wait $p || true]]):format(file, file, file))
        local seen = {}
        for _, frame in ipairs(net.capture(file)) do
            seen[frame.dst or 0] = true
        end
        os.remove(file)
        assert.is_true(seen["93.184.216.34"])
        assert.matches("sleep 100000", ok "top day")

        code, _, err = spec.sm("run -q -d --name day " .. one .. " true")
        assert.equal(125, code)
        assert.matches("running already", err)
        code, _, err = spec.sm "rm day"
        assert.equal(1, code)
        assert.matches("it is running", err)

        assert.equal("day\n", ok "stop -t 1 day")
        assert.equal("", ok "ps -q")
        assert.matches("Exited %(1%d%d%)", ok "ps -a")
        assert.equal("up\n", (ok "logs day"))
        assert.equal(1, (spec.sm "exec day true"))
        assert.equal("day\n", ok "rm day")
        assert.equal("", ok "ps -a -q")
    end)

    it("keep their exit code, or go with --rm; wait, logs -f and kill -s work", function()
        -- The follower and the waiter see the end that a signal brings.
        ok("run -q -d --name b " .. one .. " sh -c 'trap \"echo bye; exit 9\" USR1; echo up; while :; do sleep 0.1; done'")
        local script = dir .. "/script"
        shell.write(script, ([[
            ./sm logs -f b >%s/follow & f=$!
            ./sm wait b >%s/code & w=$!
            until grep -q up %s/follow; do sleep 0.1; done
            ./sm kill -s USR1 b
            wait $f $w
        ]]):format(dir, dir, dir))
        shell.run("bash " .. script)
        assert.equal("up\nbye\n", shell.read(dir .. "/follow"))
        assert.equal("9\n", shell.read(dir .. "/code"))
        assert.equal("9\n", ok "wait b")
        ok "rm b"
        ok("run -q -d --rm --name c " .. one .. " sleep 100000")
        ok "kill c"
        local limit = loop.now() + 240
        while ok "ps -a -q" ~= "" do
            assert(loop.now() < limit, "it stays")
        end
        assert.equal(1, (spec.sm "kill c"))
    end)

    it("include the ones in the foreground; a killed owner leaves nothing", function()
        local script = dir .. "/script2"
        shell.write(script, ([[
            ./sm run -q --name fg %s sh -c 'echo up; sleep 100000' >%s/fg &
            pid=$!
            until grep -q up %s/fg; do sleep 0.1; done
            ./sm ps -q
            ./sm exec fg echo inside
            worker=$(./sm inspect fg | sed -n 's/.*"worker": \([0-9]*\).*/\1/p')
            kill -9 $pid
            wait $pid
            ./sm ps -a -q
            ./sm exec fg true || echo gone
            while [ -e /proc/$worker ]; do sleep 0.1; done
        ]]):format(one, dir, dir))
        assert.equal("fg\ninside\ngone\n", shell.run("bash " .. script .. " 2>/dev/null"))
    end)

    it("are the same from Lua, in another process", function()
        ok("run -q -d --name far " .. one .. " sleep 100000")
        local script = dir .. "/far.lua"
        shell.write(script, [[
            local sm = require "sm"
            local list = assert(sm.vms())
            assert(#list == 1 and list[1].id == "far")
            local vm <close> = assert(sm.attach "fa")
            local r = assert(vm:exec { argv = { "cat" }, stdin = "through" })
            assert(r.status == 0 and r.stdout == "through")
            r = assert(vm:exec { argv = { "sleep", "1000" }, timeout = 0.5 })
            assert(r.timed_out and r.status == 143, r.status)
            assert(vm:write_file("/tmp/f", "data", { mode = 384 }))
            local data, info = vm:read_file "/tmp/f"
            assert(data == "data" and info.mode == 384)
            local bad, err, failure = vm:read_file "/nowhere"
            assert(not bad and err:find "no such file" and failure.errno == 2)
            -- A reader that stops stalls its own command, and nobody else's.
            local p <close> = assert(vm:spawn { argv = { "cat", "/dev/zero" } })
            assert(p:read "stdout")
            for i = 1, 5 do
                assert(vm:exec { argv = { "echo", tostring(i) } }.stdout == i .. "\n")
            end
            local n = 0
            while n < 2 << 20 do
                n = n + #assert(p:read "stdout")
            end
            p:close()
            local stats = assert(vm:stats())
            assert(stats.vcpus[1].exits > 0)
            print(assert(vm:stop { grace = 1 }).code)
        ]])
        assert.matches("^1%d%d\n$", ok(script))
        ok "rm far"
    end)

    it("give a terminal: exec -it and attach, with size, signals and ctrl-p ctrl-q", function()
        ok("run -q -dit --name t " .. one .. " sh")
        local tty <close> = terminal.open(91, 27)
        local function keys(...)
            tty:keys(...)
        end
        local function see(pattern)
            tty:see(pattern, 240)
        end
        keys("clear; ./sm exec -it t sh", "Enter")
        see "/data # "
        keys("stty size", "Enter")
        see "\n27 91"
        tty:resize(77, 33)
        keys("clear; stty size", "Enter")
        see "33 77"
        keys("sleep 1000", "Enter")
        see "sleep 1000"
        keys "C-c"
        keys("echo code $?", "Enter")
        see "\ncode 130"
        keys("exit 5", "Enter")
        see "host> "
        keys("echo was $?", "Enter")
        see "\nwas 5"
        keys("clear; ./sm attach t", "Enter")
        uv.sleep(500)
        keys("echo at$((1+1))ached", "Enter")
        see "\nat2ached"
        keys("C-p", "C-q")
        see "let go"
        see "host> "
        assert.equal("t\n", ok "ps -q")
        ok "rm -f t"
    end)
end)
