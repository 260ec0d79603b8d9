-- SPDX-License-Identifier: Apache-2.0
--
-- Two hosts, as network namespaces with a cable between them, and a VM on a tap of each:
-- they talk, what is not allowed does not leave (seen on the cable, by tcpdump), also
-- when a guest makes frames up, and large segments pass as such.

local f = require "support.frames"
local shell = require "support.shell"
local spec = require "support.vm"
local uv = require "luv"

local A, B = "10.9.0.1", "10.9.0.2"

describe("two VMs on taps of two hosts", function()
    local dir, hosts

    local function sh(script)
        return shell.run("set -e\n" .. script)
    end

    -- ./sm on one of the hosts.
    local function on(host, tail)
        return ("ip netns exec %s ./sm %s"):format(hosts[host], tail)
    end

    setup(function()
        dir = shell.tmpdir()
        hosts = { "sm-a" .. uv.os_getpid(), "sm-b" .. uv.os_getpid() }
        sh("modprobe -q tun bridge veth 2>/dev/null || true")
        for i, ns in ipairs(hosts) do
            sh(([[ip netns add %s; n="ip -n %s"
                $n link add br0 type bridge; $n link set br0 up; $n link set lo up
                $n tuntap add tap0 mode tap; $n link set tap0 master br0; $n link set tap0 up]]):format(ns, ns))
            if i == 2 then
                sh(("ip link add v0 netns %s type veth peer name v0 netns %s"):format(hosts[1], ns))
            end
        end
        for _, ns in ipairs(hosts) do
            sh(("ip -n %s link set v0 master br0; ip -n %s link set v0 up"):format(ns, ns))
        end
        sh(on(1, ("run -q -d --name tap-a -m 128M --net tap=tap0,ip=%s/24 --allow %s %s sh -c 'mkdir -p /www; "
            .. "seq 1 200000 > /www/numbers; httpd -f -p 80 -h /www'"):format(A, B, spec.image "one")))
    end)

    teardown(function()
        spec.sm "kill tap-a"
        spec.sm "rm tap-a"
        for _, ns in ipairs(hosts) do
            os.execute("ip netns del " .. ns)
        end
        shell.remove(dir)
        assert.same({}, spec.settled_leftovers())
    end)

    -- What passes the cable while a VM of the second host runs this: its output, and the
    -- lines of tcpdump.
    local function watched(filter, allow, script)
        local out = sh(([[
            ip netns exec %s tcpdump -i v0 -n -e -l %s >%s/cable 2>%s/tcpdump & t=$!
            while ! grep -q listening %s/tcpdump; do sleep 0.1; done
            %s 2>&1 || true
            kill $t; wait $t 2>/dev/null || true]]):format(hosts[1], shell.quote(filter), dir, dir, dir,
            on(2, ("run -q -m 128M --net tap=tap0,ip=%s/24 %s %s sh -c %s"):format(B, allow, spec.image "one",
                shell.quote(script)))))
        return out, sh(("cat %s/cable"):format(dir))
    end

    it("talk, and large segments pass as such", function()
        local out, cable = watched("tcp", "--allow " .. A, ([[
            while ! wget -q -O /dev/null http://%s/numbers; do [ $((n=n+1)) -lt 50 ] || exit 1; sleep 0.2; done
            wget -q -O - http://%s/numbers | sha256sum]]):format(A, A))
        assert.equal(sh "seq 1 200000 | sha256sum", out)
        local longest = 0
        for length in cable:gmatch ", length (%d+): " do
            longest = math.max(longest, tonumber(length))
        end
        assert.is_true(longest > 1514, longest)
    end)

    it("send nothing where they may not", function()
        local out, cable = watched(("src %s and (tcp or udp or icmp)"):format(B), "", ([[
            nc -w 3 %s 80 </dev/null; nslookup name.test %s; ping -c 1 -W 1 %s]]):format(A, A, A))
        assert.equal("", (cable:gsub("%s", ""))) -- it says good-bye with an empty line
        assert.matches("blocked tcp to " .. A:gsub("%.", "%%.") .. ":80", out)
        assert.matches("blocked udp to " .. A:gsub("%.", "%%.") .. ":53", out)
    end)

    it("let no frame out that a guest has made up", function()
        local MAC, PEER = "02:00:00:00:00:0b", "02:00:00:00:00:0a"
        local list, n, seen = f.made_up { mac = MAC, peer = PEER, address = B, friend = A, stranger = "10.9.0.9" }
        local file <close> = assert(io.open(dir .. "/frames", "wb"))
        file:write(f.input(list))
        file:flush()
        sh(([[
            ip netns exec %s tcpdump -i v0 -U -w %s/raw.pcap 2>%s/tcpdump & t=$!
            while ! grep -q listening %s/tcpdump; do sleep 0.1; done
            %s <%s/frames >%s/out 2>&1
            while ! grep -q %s %s/raw.pcap; do sleep 0.1; done
            kill $t; wait $t 2>/dev/null || true]]):format(hosts[1], dir, dir, dir,
            on(2, ("run -q -i -m 128M --net tap=tap0,ip=%s/24,mac=%s --allow %s:9 %s sh -c %s"):format(B, MAC, A,
                spec.image "one", shell.quote(("echo %s | base64 -d > /tmp/rawsend; chmod 755 /tmp/rawsend; /tmp/rawsend eth0"):format(
                    (sh "base64 -w 0 build/guest/rawsend"))))), dir, dir, seen, dir))
        local pcap <close> = assert(io.open(dir .. "/raw.pcap", "rb"))
        assert.same({}, f.leaks(pcap:read "a"))
        assert.is_true(n > 25)
        local arp = sh(("tcpdump -n -e -r %s/raw.pcap arp and ether src %s 2>/dev/null"):format(dir, MAC))
        for line in arp:gmatch "[^\n]+" do
            assert.matches("tell " .. B:gsub("%.", "%%."), line)
        end
    end)
end)
