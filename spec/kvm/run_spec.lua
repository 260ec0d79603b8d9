-- SPDX-License-Identifier: Apache-2.0
--
-- `sm run` as people use it, each a process of its own on a real VM.

local spec = require "support.vm"

local one, static, config = spec.image "one", spec.image "static", spec.image "config"

describe("sm run", function()
    after_each(function()
        assert.same({}, spec.leftovers())
    end)

    it("gives the command's output and exit code", function()
        local code, out, err = spec.sm("run -q " .. one .. " sh -c 'cat /etc/os-release; echo no >&2; exit 7'")
        assert.equal(7, code)
        assert.equal('NAME="spec multi"\nID=spec\n', out)
        assert.equal("no\n", err)
    end)

    it("answers 127, 126 and 128+n as Docker does", function()
        assert.equal(127, (spec.sm("run -q " .. one .. " no-such-command")))
        assert.equal(126, (spec.sm("run -q " .. one .. " /etc/passwd")))
        assert.equal(137, (spec.sm("run -q " .. one .. " sh -c 'kill -9 $$'")))
    end)

    it("runs an image of one static binary, read-only too", function()
        local code, out = spec.sm("run -q " .. static)
        assert.equal(0, code)
        assert.equal("static 1 0\n", out)
        code, out = spec.sm("run -q --read-only " .. static .. " argument")
        assert.equal(3, code)
        assert.equal("static 2 0\n", out)
    end)

    it("follows the image's configuration, and flags over it", function()
        local code, out = spec.sm("run -q " .. config)
        assert.equal(0, code)
        assert.equal("entry default\n", out)
        code, out = spec.sm("run -q --entrypoint /bin/sh -e ADDED=1 " .. config
            .. " -c 'id -un; pwd; echo $FROM $ADDED'")
        assert.equal(0, code)
        assert.equal("web\n/made/here\nimage 1\n", out)
        code, out = spec.sm("run -q -u 4242:4343 -w / --entrypoint /bin/sh " .. config .. " -c 'id -u; id -g; pwd'")
        assert.equal(0, code)
        assert.equal("4242\n4343\n/\n", out)
    end)

    it("joins stdin with -i", function()
        local path = os.tmpname()
        local f = assert(io.open(path, "wb"))
        f:write(("line\n"):rep(200000))
        f:close()
        local code, out = spec.sm("run -q -i " .. one .. " sha256sum", path)
        local want = io.popen("sha256sum <" .. path):read "l"
        os.remove(path)
        assert.equal(0, code)
        assert.equal(want .. "\n", out)
    end)

    it("has the CPUs and memory asked for", function()
        local code, out = spec.sm("run -q --cpus 4 -m 192M " .. one .. " sh -c 'nproc; grep MemTotal /proc/meminfo'")
        assert.equal(0, code)
        local cpus, kib = out:match "^(%d+)\nMemTotal: +(%d+)"
        assert.equal("4", cpus)
        assert.is_true(tonumber(kib) > 130 * 1024 and tonumber(kib) <= 192 * 1024)
    end)

    it("says what ended the guest when it was not the command", function()
        local code, _, err = spec.sm("run -q " .. one .. " sh -c 'echo c > /proc/sysrq-trigger; sleep 100'")
        assert.equal(125, code)
        assert.matches("panic", err)
    end)

    it("forwards SIGTERM, and leaves nothing after kill -9", function()
        local script = os.tmpname()
        local f = assert(io.open(script, "w"))
        f:write(([[
            ./sm run -q %s sh -c 'trap "echo stopping; exit 5" TERM; echo up; while :; do sleep 0.1; done' >"$0.out" &
            pid=$!
            until grep -q up "$0.out" 2>/dev/null; do sleep 0.1; done
            kill -TERM $pid
            wait $pid
            echo "code $?" >>"$0.out"
            ./sm run -q %s sh -c 'echo up; sleep 1000' >"$0.two" &
            pid=$!
            until grep -q up "$0.two" 2>/dev/null; do sleep 0.1; done
            kill -9 $pid
            wait $pid 2>/dev/null
        ]]):format(one, one))
        f:close()
        os.execute("bash " .. script)
        local out = io.open(script .. ".out"):read "a"
        os.remove(script)
        os.remove(script .. ".out")
        os.remove(script .. ".two")
        assert.equal("up\nstopping\ncode 5\n", out)
        -- The folder of the killed one is swept by the next run.
        assert.equal(0, (spec.sm("run -q " .. one .. " true")))
        assert.same({}, spec.settled_leftovers())
    end)

    it("boots with Debian's stock kernel as well", function()
        local code, out = spec.sm("run -q --kernel stock " .. one .. " uname -r")
        assert.equal(0, code)
        assert.matches("cloud%-amd64", out)
    end)
end)
