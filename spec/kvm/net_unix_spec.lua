-- SPDX-License-Identifier: Apache-2.0
--
-- A card on a unix socket, with QEMU at its other end (-netdev stream): two VMs of two
-- VMMs talk, both ways.

local sm = require "sm"
local spec = require "support.vm"
local uv = require "luv"

local loop = sm.loop
local OURS, THEIRS = "10.8.0.1", "10.8.0.2"

describe("a card on a unix socket", function()
    local dir, handle, pid, gone, out, said, vm

    local function sh(script)
        local r = assert(vm:exec { argv = { "sh", "-c", script }, timeout = 300 })
        assert.equal(0, r.status, r.stderr)
        return r.stdout
    end

    setup(function()
        dir = assert(uv.fs_mkdtemp(os.getenv "XDG_RUNTIME_DIR" .. "/wire-XXXXXX"))
        local kernel = assert(require("sm.kernel").find "own")
        out, said = uv.new_pipe(), ""
        handle, pid = uv.spawn("qemu-system-x86_64", { args = {
            "-accel", "kvm", "-cpu", "host", "-M", "microvm,rtc=on", "-m", "128", "-nodefaults", "-no-user-config",
            "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", kernel.path,
            "-initrd", os.getenv "SM_SPEC_IMAGES" .. "/peer.cpio",
            "-append", "console=ttyS0 quiet panic=-1 reboot=t address=" .. THEIRS .. "/24",
            "-global", "virtio-mmio.force-legacy=false", "-device", "virtio-net-device,netdev=n",
            "-netdev", "stream,id=n,server=on,addr.type=unix,addr.path=" .. dir .. "/wire",
        }, stdio = { nil, out, 2 } }, loop.guard(function()
            gone = true
        end))
        assert(handle, pid)
        out:read_start(loop.guard(function(_, chunk)
            said = said .. (chunk or "")
        end))
        loop.run(function()
            while not said:find "ready" do
                assert(not gone, "QEMU ended: " .. said)
                loop.sleep(0.05)
            end
        end)
        vm = assert(sm.start(spec.image "one", { memory = "128M",
            net = { type = "unix", path = dir .. "/wire", address = OURS .. "/24", policy = "deny", allow = { THEIRS } } }))
    end)

    teardown(function()
        if vm then
            vm:close()
        end
        if pid then
            uv.kill(pid, "sigkill")
            loop.run(function()
                while not gone do
                    loop.sleep(0.02)
                end
            end)
            handle:close()
            out:close()
            uv.run "nowait" -- luv 1.44 does not bear an exit with one half closed
        end
        os.execute("rm -rf " .. dir)
        assert.same({}, spec.settled_leftovers())
    end)

    it("carries what QEMU's guest serves, and nothing to anybody else", function()
        local want = sh "seq 1 200000 | sha256sum"
        assert.equal(want, sh(("wget -q -O - http://%s/numbers | sha256sum"):format(THEIRS)))
        sh("ping -c 1 -W 30 " .. THEIRS)
        local r = assert(vm:exec { argv = { "sh", "-c", "nc -w 3 10.8.0.3 80 </dev/null" }, timeout = 300 })
        assert.not_equal(0, r.status)
        local stats = assert(vm:net_stats())[1]
        assert.is_true(stats.in_bytes > 1200000)
        assert.is_truthy(next(stats.drops))
    end)
end)
