-- SPDX-License-Identifier: Apache-2.0
--
-- The product API on a real VM: one boot, many checks.

local sm = require "sm"
local spec = require "support.vm"

local loop = sm.loop

describe("a VM started from Lua", function()
    local vm

    setup(function()
        vm = assert(sm.start(assert(sm.image(spec.image "multi")), { cpus = 2, memory = "256M", name = "apispec" }))
    end)

    teardown(function()
        if vm then
            vm:close()
        end
        assert.same({}, spec.leftovers())
    end)

    local function sh(script, opts)
        opts = opts or {}
        opts.argv = { "/bin/sh", "-c", script }
        return assert(vm:exec(opts))
    end

    it("runs a command and keeps its streams apart", function()
        local r = sh "echo out; echo err >&2; exit 7"
        assert.equal(7, r.status)
        assert.equal("out\n", r.stdout)
        assert.equal("err\n", r.stderr)
        assert.is_true(r.duration > 0)
        assert.is_true(r.max_rss > 0)
        assert.is_falsy(r.timed_out)
    end)

    it("has the CPUs and the memory it was given", function()
        assert.equal("2\n", sh("nproc").stdout)
        local kib = tonumber(sh("grep MemTotal /proc/meminfo").stdout:match "%d+")
        assert.is_true(kib > 190 * 1024 and kib <= 256 * 1024, kib)
    end)

    it("sees the image as its layers make it", function()
        assert.equal("two\n", sh("cat /data/changed").stdout)
        assert.equal(1, sh("test -e /data/gone").status)
        assert.equal("upper\n", sh("ls /data/opaque").stdout)
        assert.equal("file\n", sh("cat /data/wasdir").stdout)
        assert.equal("two\n", sh("cat /data/hardlink").stdout)
        assert.equal("200000\n", sh("tail -n 1 /data/big").stdout)
        assert.matches("^%-rws", sh("ls -l /bin/su").stdout)
    end)

    it("writes to the sparse disk, and syncs it", function()
        local r = sh "dd if=/dev/zero of=/data/written bs=1M count=32 2>/dev/null && sync && stat -c %s /data/written"
        assert.equal("33554432\n", r.stdout)
        assert.matches("overlay", sh("grep ' / ' /proc/mounts").stdout)
    end)

    it("gives the hostname, an environment, a folder and a user", function()
        assert.equal("apispec\n", sh("hostname").stdout)
        local r = sh("pwd; id -u; id -g; echo $A", { cwd = "/tmp", user = "web", env = { "A=b" } })
        assert.equal("/tmp\n1000\n1000\nb\n", r.stdout)
    end)

    it("feeds stdin and takes it back whole", function()
        local text = ("0123456789abcdef"):rep(64 * 1024) -- 1 MiB
        local r = sh("cat", { stdin = text })
        assert.equal(#text, #r.stdout)
        assert.is_true(text == r.stdout)
    end)

    it("tells signals, time limits and what cannot run", function()
        assert.equal("KILL", sh("kill -9 $$").signal)
        local r = sh("sleep 60", { timeout = 0.5 })
        assert.is_true(r.timed_out)
        local ok, err = vm:exec { argv = { "/no/such" } }
        assert.is_nil(ok)
        assert.matches("/no/such", err)
    end)

    it("puts files in and takes them out", function()
        local bytes = string.pack("<I4", 0xdeadbeef):rep(50000)
        assert(vm:write_file("/srv/new/file", bytes))
        assert.is_true(bytes == assert(vm:read_file("/srv/new/file")))
        assert.is_nil((vm:read_file "/no/such/file"))
    end)

    it("runs many commands at once", function()
        local done = loop.run(function()
            local tasks = {}
            for i = 1, 20 do
                tasks[i] = loop.spawn(function()
                    return sh("echo " .. i).stdout
                end)
            end
            local out = {}
            for i, t in ipairs(tasks) do
                out[i] = t:join()
            end
            return out
        end)
        for i = 1, 20 do
            assert.equal(i .. "\n", done[i])
        end
    end)

    it("stalls only the stream that nobody reads", function()
        loop.run(function()
            local stalled = assert(vm:spawn { argv = { "/bin/sh", "-c", "yes" } })
            local r = sh "seq 1 100000 | tail -n 1"
            assert.equal("100000\n", r.stdout)
            stalled:signal(9)
            while stalled:read "stdout" do
            end
            assert.equal("KILL", stalled:wait().signal)
        end)
    end)

    it("has a terminal that knows its size and its signals", function()
        loop.run(function()
            local p = assert(vm:spawn {
                argv = { "/bin/sh", "-c", "stty size; cat" }, tty = true, rows = 31, cols = 97, stdin = true,
            })
            local out = ""
            while not out:find "31 97" do
                out = out .. assert(p:read "stdout")
            end
            p:write "\3" -- Ctrl-C
            while p:read "stdout" do
            end
            assert.equal("INT", p:wait().signal)
        end)
    end)

    it("lives in a worker that maps neither Lua nor curl, and little else", function()
        local m = spec.mappings(vm.parts.worker:pid(), 256 << 20)
        for _, path in ipairs(m.files) do
            assert.is_nil(path:match "lua" or path:match "curl" or path:match "archive", path)
        end
        assert.is_true(m.private < 3 << 20, ("%d KiB private"):format(m.private >> 10))
    end)

    it("ends in good order, and says so", function()
        local ending = vm:stop()
        assert.equal("poweroff", ending.reason)
        assert.is_nil((vm:exec { argv = { "true" } }))
    end)
end)
