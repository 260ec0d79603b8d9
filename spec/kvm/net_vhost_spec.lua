-- SPDX-License-Identifier: Apache-2.0
--
-- A tap whose frames the host's kernel moves by itself, and cards of several pairs of
-- queues: a guest with two CPUs and two pairs, the host's own stack at the other end.

local shell = require "support.shell"
local sm = require "sm"
local spec = require "support.vm"
local uv = require "luv"

local HOST, GUEST = "10.9.1.1", "10.9.1.2"
local DOWN, UP = 2 << 20, 128 << 10 -- busybox's nc sends a frame for each KiB

describe("a card of several pairs of queues", function()
    local dir, tap, vm

    local function sh(script)
        return shell.run("set -e\n" .. script)
    end

    local function inside(script)
        local r = assert(vm:exec { argv = { "sh", "-c", script }, timeout = 120 })
        assert.equal(0, r.status, r.stderr)
        return r.stdout
    end

    local function start(net)
        return assert(sm.start(spec.image "one", { cpus = 2, memory = "128M", net = net }))
    end

    -- Bytes to the guest and back: the sum that the guest saw, and the one of what came.
    local function there_and_back(host)
        local base = 20000 + uv.os_getpid() % 10000
        local down = uv.spawn("socat", { args = { "-u", "OPEN:" .. dir .. "/data", ("TCP-LISTEN:%d,reuseaddr"):format(base) } },
            function() end)
        local up = uv.spawn("socat", { args = { "-u", ("TCP-LISTEN:%d,reuseaddr"):format(base + 1),
            "CREATE:" .. dir .. "/back" } }, function() end)
        sh(("for p in %d %d; do while ! ss -Hltn | grep -q \":$p \"; do sleep 0.05; done; done"):format(base, base + 1))
        local seen = inside(("nc %s %d </dev/null >/tmp/data; sha256sum </tmp/data; head -c %d /tmp/data >/tmp/up; nc %s %d </tmp/up"):format(
            host, base, UP, host, base + 1))
        sh(("while ! cmp -s -n %d %s/data %s/back; do [ $((n=n+1)) -lt 100 ] || exit 1; sleep 0.1; done"):format(UP, dir, dir))
        down:kill "sigkill"
        up:kill "sigkill"
        return seen
    end

    setup(function()
        dir = shell.tmpdir()
        tap = "smv" .. uv.os_getpid() % 100000
        sh(("head -c %d /dev/urandom >%s/data"):format(DOWN, dir))
    end)

    teardown(function()
        os.execute(("ip link del %s 2>/dev/null"):format(tap))
        shell.remove(dir)
        assert.same({}, spec.settled_leftovers())
    end)

    it("is on the user network", function()
        vm = start { type = "user", queues = 2, allow = { "host" } }
        assert.equal("rx-0\nrx-1\ntx-0\ntx-1\n", inside "ls /sys/class/net/eth0/queues")
        assert.equal(sh(("sha256sum <%s/data"):format(dir)), there_and_back "10.0.2.2")
        -- A copy has them too, and its driver knows of no change.
        local path = dir .. "/queues.sms"
        assert(vm:snapshot { path = path })
        vm:close()
        vm = assert(sm.restore(path))
        assert.equal(sh(("sha256sum <%s/data"):format(dir)), there_and_back "10.0.2.2")
        vm:close()
        assert(sm.snapshot.remove(path))
    end)

    describe("whose frames go past sm", function()
        setup(function()
            sh(("modprobe -q vhost_net 2>/dev/null || true; ip tuntap add %s mode tap multi_queue; "
                .. "ip addr add %s/24 dev %s; ip link set %s up"):format(tap, HOST, tap, tap))
            vm = start { type = "tap", name = tap, address = GUEST .. "/24", vhost = true, queues = 2, policy = "allow_all" }
        end)

        teardown(function()
            vm:close()
        end)

        it("carries bytes whole, in large segments, and no process of ours stands between", function()
            assert.equal("rx-0\nrx-1\ntx-0\ntx-1\n", inside "ls /sys/class/net/eth0/queues")
            local dump = uv.spawn("tcpdump", { args = { "-i", tap, "-n", "-w", dir .. "/pcap", "--immediate-mode", "-s", "96" },
                stdio = { nil, nil, nil } }, function() end)
            sh(("while ! [ -e %s/pcap ]; do sleep 0.05; done"):format(dir))
            assert.equal(sh(("sha256sum <%s/data"):format(dir)), there_and_back(HOST))
            dump:kill "sigterm"
            local longest = 0
            for length in sh(("tcpdump -n -r %s/pcap tcp 2>/dev/null"):format(dir)):gmatch "length (%d+)" do
                longest = math.max(longest, tonumber(length))
            end
            assert.is_true(longest > 1514, longest)
            assert.equal("", sh(("pgrep -f '[s]m-net.*%s' || true"):format(vm.id)))
            assert.matches("ping statistics", inside("ping -c 1 -W 5 " .. HOST))
        end)

        it("has a second life when the driver starts anew", function()
            inside(("d=$(basename $(readlink /sys/class/net/eth0/device)); cd /sys/bus/virtio/drivers/virtio_net; "
                .. "echo $d > unbind; echo $d > bind; ip addr add %s/24 dev eth0; ip link set eth0 up; ping -c 1 -W 5 %s"):format(
                GUEST, HOST))
            assert.equal(sh(("sha256sum <%s/data"):format(dir)), there_and_back(HOST))
        end)

        it("says what cannot be had with it, and goes on", function()
            local got, err = vm:snapshot { path = dir .. "/x.sms" }
            assert.is_nil(got)
            assert.matches("network card 1 is on a tap", err)
            assert.equal("", sh(("ls %s | grep sms || true"):format(dir)))
            got, err = vm:capture {}
            assert.is_nil(got)
            assert.matches("go past sm; tcpdump %-i " .. tap .. " sees them$", err)
            inside("ping -c 1 -W 5 " .. HOST)
            local single = { type = "tap", name = tap, vhost = true, policy = "allow_all" }
            got, err = sm.start(spec.image "one", { net = single })
            assert.is_nil(got)
            assert.matches("net: tap " .. tap .. ": made for several queues, or no tap$", err)
        end)
    end)
end)
