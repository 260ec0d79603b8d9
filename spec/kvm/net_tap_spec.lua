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
        local MAC, PEER, ALL = "02:00:00:00:00:0b", "02:00:00:00:00:0a", "ff:ff:ff:ff:ff:ff"
        local OTHER, SPOOF = "10.9.0.9", "10.9.0.77"
        local a4, b4, o4 = f.ip4(A), f.ip4(B), f.ip4(OTHER)
        local LL, SIX = "fe80::ff:fe00:b", "fd00::9"
        local l6, s6, m6 = f.ip6(LL), f.ip6(SIX), f.ip6 "::ffff:a09:9"
        local TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
        local list, n = {}, 0
        -- A frame, marked so that it is found again whatever becomes of its head.
        local function mark()
            n = n + 1
            return ("leak-%02d-made-up-by-the-guest"):format(n)
        end
        local function ip(dst, proto, payload, more)
            local packet = { src = B, dst = dst, proto = proto, payload = payload }
            for key, value in pairs(more or {}) do
                packet[key] = value
            end
            list[#list + 1] = f.ether(PEER, MAC, 0x0800, f.ipv4(packet))
        end
        local function six(dst, next, payload, src)
            list[#list + 1] = f.ether(PEER, MAC, 0x86dd, f.ipv6 { src = src or LL, dst = dst, next = next, payload = payload })
        end
        -- What is not on the list, in every form.
        ip(OTHER, TCP, f.tcp(b4, o4, 1000, 80, mark()))
        ip(OTHER, UDP, f.udp(b4, o4, 1000, 53, mark()))
        ip(OTHER, ICMP, f.echo(mark()))
        ip(OTHER, TCP, f.tcp(b4, o4, 1000, 80, mark(), 0x10)) -- an ACK out of nothing
        ip(OTHER, UDP, f.udp(b4, o4, 1000, 53, mark()), { options = "\1\1\1\0" })
        ip(OTHER, 41, f.ipv6 { src = LL, dst = SIX, next = UDP, payload = f.udp(l6, s6, 1, 53, mark()) })
        ip(OTHER, 47, "\0\0\8\0" .. mark())
        ip("255.255.255.255", UDP, f.udp(b4, f.ip4 "255.255.255.255", 1000, 9, mark()))
        ip("224.0.0.251", UDP, f.udp(b4, f.ip4 "224.0.0.251", 5353, 5353, mark()))
        ip("127.0.0.1", UDP, f.udp(b4, f.ip4 "127.0.0.1", 1000, 53, mark()))
        ip("169.254.169.254", TCP, f.tcp(b4, f.ip4 "169.254.169.254", 1000, 80, mark()))
        -- To where it may go, but not so.
        ip(A, UDP, f.udp(f.ip4(SPOOF), a4, 1000, 9, mark()), { src = SPOOF })
        ip(A, UDP, f.udp(b4, a4, 1000, 53, mark())) -- another port
        ip(A, UDP, f.udp(b4, a4, 1000, 53, mark()), { fragment = 0x2000 }) -- the first of several
        ip(A, UDP, mark(), { fragment = 100, id = 77 }) -- one whose first was never there
        ip(A, UDP, mark(), { fragment = 0x2001, id = 78 })
        ip(A, UDP, f.udp(b4, a4, 1000, 9, mark()), { version = 5 })
        ip(A, UDP, f.udp(b4, a4, 1000, 9, mark()), { ihl = 4 })
        ip(A, UDP, f.udp(b4, a4, 1000, 9, mark()), { ihl = 15 })
        ip(A, UDP, f.udp(b4, a4, 1000, 9, mark()), { length = 1000 })
        list[#list + 1] = f.ether(PEER, "02:00:00:00:00:77", 0x0800, f.ipv4 { src = B, dst = A, proto = UDP,
            payload = f.udp(b4, a4, 1000, 9, mark()) })
        list[#list + 1] = f.ether(PEER, MAC, 0x8100, string.pack(">I2I2", 7, 0x0800) .. f.ipv4 { src = B, dst = A,
            proto = UDP, payload = f.udp(b4, a4, 1000, 9, mark()) })
        list[#list + 1] = f.ether(ALL, MAC, 0x88cc, mark())
        list[#list + 1] = f.ether(ALL, MAC, 50, ("\xaa"):rep(8) .. mark()) -- 802.3
        -- IPv6: elsewhere, mapped, behind other heads, in other names.
        six(SIX, UDP, f.udp(l6, s6, 1000, 53, mark()))
        six("::ffff:a09:9", TCP, f.tcp(l6, m6, 1000, 80, mark()))
        six("ff02::fb", UDP, f.udp(l6, f.ip6 "ff02::fb", 5353, 5353, mark()))
        six(SIX, 0, string.pack(">BBI2I4", UDP, 0, 0x0104, 0) .. f.udp(l6, s6, 1000, 53, mark()))
        six(SIX, 44, string.pack(">BBI2I4", UDP, 0, 0, 1) .. f.udp(l6, s6, 1000, 53, mark()))
        six(SIX, 43, string.pack(">BBBBI4", UDP, 0, 0, 0, 0) .. f.udp(l6, s6, 1000, 53, mark()))
        six("ff02::1", ICMP6, f.icmp6(l6, f.ip6 "ff02::1", 134, ("\0"):rep(12) .. mark())) -- a router
        six("ff02::1", ICMP6, f.icmp6(l6, f.ip6 "ff02::1", 136, "\x20\0\0\0" .. s6 .. mark())) -- another's name
        -- ARP in another's name; no room for a mark.
        list[#list + 1] = f.ether(ALL, MAC, 0x0806, f.arp(2, MAC, A, ALL, A))
        list[#list + 1] = f.ether(ALL, MAC, 0x0806, f.arp(1, MAC, SPOOF, ALL, A))
        -- The last may go, so that there is something to see.
        local seen = "may-go-made-up-by-the-guest"
        ip(A, UDP, f.udp(b4, a4, 1000, 9, seen))

        local input = {}
        for k, frame in ipairs(list) do
            input[k] = string.pack("<s2", frame)
        end
        local file <close> = assert(io.open(dir .. "/frames", "wb"))
        file:write(table.concat(input))
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
        local leaked = {}
        for what in pcap:read("a"):gmatch "leak%-%d%d" do
            leaked[#leaked + 1] = what
        end
        assert.same({}, leaked)
        assert.is_true(n > 25)
        local arp = sh(("tcpdump -n -e -r %s/raw.pcap arp and ether src %s 2>/dev/null"):format(dir, MAC))
        for line in arp:gmatch "[^\n]+" do
            assert.matches("tell " .. B:gsub("%.", "%%."), line)
        end
    end)
end)
