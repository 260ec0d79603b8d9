-- SPDX-License-Identifier: Apache-2.0
--
-- The network of a guest: the user-mode backend from inside and outside, what
-- the policy lets out, published ports. The servers are this process's own, on
-- the loopback of the machine the VM runs on.

local net = require "support.net"
local sm = require "sm"
local sha256 = require("sm.image_core").sha256
local spec = require "support.vm"

local image = spec.image "one"
local loop = sm.loop
-- Of a transfer, each way, and at once; scripts/soak asks for more.
local MIB = tonumber(os.getenv "SM_SPEC_NET_MIB") or 8
local CONNECTIONS = tonumber(os.getenv "SM_SPEC_NET_CONNECTIONS") or 40
local WAIT = 400 + 10 * MIB + 5 * CONNECTIONS

local function start(cfg)
    cfg.memory = cfg.memory or "192M"
    return assert(sm.start(image, cfg))
end

-- A shell command in the guest: its output, status and errors.
local function sh(vm, script)
    local r = assert(vm:exec { argv = { "sh", "-c", script }, timeout = WAIT })
    return r.stdout, r.status, r.stderr
end

describe("the network of a guest", function()
    local vm, events, capture, dns, early, client
    local ports = {}
    local received = {}

    setup(function()
        capture = os.tmpname()
        events = {}
        dns = net.dns { ["pub.test"] = "93.184.216.34", ["inside.test"] = "10.1.2.3", ["gone.test"] = "0.0.0.0" }
        -- Says how much it got, and its hash, once the client has said all.
        ports.sink = net.tcp("127.0.0.1", function(peer)
            net.collect(peer, function(data)
                local line = ("%d %s\n"):format(#data, sha256(data))
                if received.tell then
                    received.tell(line)
                end
                net.reply(peer, line)
            end)
        end)
        local text = ("all work and no play makes a dull packet\n"):rep(1 << 15):sub(1, 1 << 20):rep(MIB)
        received.text = text
        ports.source = net.tcp("127.0.0.1", function(peer)
            net.reply(peer, text)
        end)
        ports.hello = net.tcp("127.0.0.1", function(client)
            net.reply(client, "hello\n")
        end)
        ports.six = net.tcp("::1", function(client)
            net.reply(client, "hello six\n")
        end)
        ports.udp = tonumber(dns:match ":(%d+)$")
        ports.secret = net.tcp("127.0.0.1", function(client)
            received.secret = true
            client:close()
        end)
        ports.closed = net.tcp("127.0.0.1", function() end)
        net.close_last()
        -- A port that is free, and somebody who connects to it before there is
        -- anything behind it.
        ports.web = net.tcp("127.0.0.1", function() end)
        net.close_last()
        client = loop.spawn(function()
            while not net.listens(ports.web) do
                loop.sleep(0.1)
            end
            early = net.ask("127.0.0.1", ports.web, "GET /index.html HTTP/1.0\r\n\r\n", 2 * WAIT)
        end)
        vm = start {
            net = {
                type = "user", pcap = capture, dns = { dns },
                allow = {
                    "host:" .. ports.sink, "host:" .. ports.source, "host:" .. ports.hello,
                    "host:" .. ports.six, "host:" .. ports.udp, "host:" .. ports.closed,
                },
            },
            publish = { ports.web .. ":8080" },
            add_host = { "myself.test:10.0.2.2" },
            on_net = function(e)
                events[#events + 1] = e
            end,
        }
    end)

    it("serves a published port, and a client that came before the guest waits", function()
        assert.is_nil(early)
        sh(vm, "mkdir -p /www; echo it works >/www/index.html; httpd -p 8080 -h /www")
        client:join(WAIT)
        assert.matches("it works", early)
        for _ = 1, 5 do
            assert.matches("it works", (assert(net.ask("127.0.0.1", ports.web,
                "GET /index.html HTTP/1.0\r\n\r\n", WAIT))))
        end
    end)

    teardown(function()
        if vm then
            vm:close()
        end
        client:join(1)
        net.close()
        os.remove(capture)
        assert.same({}, spec.settled_leftovers())
    end)

    local function event_of(kind, what)
        for _, e in ipairs(events) do
            if e.type == kind and (e.addr == what or e.name == what) then
                return e
            end
        end
    end

    it("has its addresses, a route and a resolver without asking for them", function()
        local out = sh(vm, "ip -4 addr show eth0; ip route; cat /etc/resolv.conf; cat /sys/class/net/eth0/mtu")
        assert.matches("inet 10%.0%.2%.15/24", out)
        assert.matches("default via 10%.0%.2%.2", out)
        assert.matches("nameserver 10%.0%.2%.3", out)
        assert.matches("65520", out)
    end)

    it("reaches a server by address, by a name of /etc/hosts, and over IPv6", function()
        assert.equal("hello\n", (sh(vm, "nc 10.0.2.2 " .. ports.hello .. " </dev/null")))
        assert.equal("hello\n", (sh(vm, "nc myself.test " .. ports.hello .. " </dev/null")))
        assert.equal("hello six\n", (sh(vm, "nc fd00:736d::2 " .. ports.six .. " </dev/null")))
    end)

    it("talks UDP to a port of the host", function()
        local port = dns:match ":(%d+)$"
        assert.matches("93%.184%.216%.34", (sh(vm, "nslookup -type=a -port=" .. port .. " pub.test 10.0.2.2")))
    end)

    it("resolves names, and keeps back a name that points inside", function()
        assert.matches("93%.184%.216%.34", (sh(vm, "nslookup -type=a pub.test")))
        local out = sh(vm, "nslookup -type=a inside.test 2>&1")
        assert.is_nil(out:find("10.1.2.3", 1, true))
        assert.is_nil((sh(vm, "nslookup -type=a gone.test 2>&1")):find("Address: 0.0.0.0", 1, true))
        assert.matches("NXDOMAIN", (sh(vm, "nslookup -type=a nowhere.test 2>&1")))
        assert.equal("10.1.2.3", event_of("rebinding", "inside.test").addr)
    end)

    it("pings its gateway", function()
        local _, status = sh(vm, "ping -c 2 -W 60 10.0.2.2")
        assert.equal(0, status)
    end)

    it("sends, half closes, and hears the answer", function()
        sh(vm, "yes all work and no play makes a dull packet | head -c 1048576 >/tmp/m")
        local out = sh(vm, "nc 10.0.2.2 " .. ports.sink .. " </tmp/m")
        assert.equal(("%d %s\n"):format(1 << 20, sha256(received.text:sub(1, 1 << 20))), out)
    end)

    it("moves data out", function() -- a program of nc's has the socket itself: sendfile
        local told = loop.spawn(function()
            return loop.await(function(settle)
                received.tell = settle
            end, WAIT)
        end)
        sh(vm, ([[printf '#!/bin/sh\nfor i in $(seq %d); do cat /tmp/m; done\n' >/tmp/send; chmod +x /tmp/send
            nc 10.0.2.2 %d -e /tmp/send]]):format(MIB, ports.sink))
        assert.equal(("%d %s\n"):format(MIB << 20, sha256(received.text)), told:join())
    end)

    it("moves data in, to a slow reader", function()
        local want = sha256(received.text):match "%x+$"
        local out = sh(vm, "nc 10.0.2.2 " .. ports.source .. " </dev/null | (sleep 2; sha256sum)")
        assert.equal(want, out:match "^%x+")
    end)

    it("bears many connections at once", function()
        local out = sh(vm, ("mkdir -p /tmp/o; for i in $(seq %d); do nc 10.0.2.2 %d </dev/null >/tmp/o/$i & done; wait; "
            .. "cat /tmp/o/* | sort | uniq -c"):format(CONNECTIONS, ports.hello))
        assert.matches("^%s*" .. CONNECTIONS .. " hello\n$", out)
    end)

    it("sees a refused connection as one, promptly", function()
        local _, status, err = sh(vm, "nc 10.0.2.2 " .. ports.closed .. " </dev/null")
        assert.not_equal(0, status)
        assert.matches("refused", err)
    end)

    it("records its traffic on demand, into a file and for a reader", function()
        local none, why = vm:capture { card = 7 }
        assert.is_nil(none)
        assert.matches("no network card 7", why)
        none, why = vm:capture { path = "/no/such/folder/x" }
        assert.is_nil(none)
        assert.matches("/no/such/folder/x", why)
        local path = os.tmpname()
        local function to_the_server(frames)
            local n = 0
            for _, f in ipairs(frames) do
                n = n + (f.dst == "10.0.2.2" and f.proto == 6 and 1 or 0)
            end
            return n
        end
        do
            local capture = assert(vm:capture { path = path })
            assert.equal("hello\n", (sh(vm, "nc 10.0.2.2 " .. ports.hello .. " </dev/null")))
            assert.equal(0, capture:close())
            assert.is_true(to_the_server(net.capture(path)) >= 3)
        end
        -- Whoever reads has the same, and several may; one that ends leaves the others alone.
        local first, second = assert(vm:capture()), assert(vm:capture())
        assert.equal(24, #assert(first:read())) -- the head of the file
        first:close()
        assert.is_nil(first:read())
        assert.equal("hello\n", (sh(vm, "nc 10.0.2.2 " .. ports.hello .. " </dev/null")))
        local f = assert(io.open(path, "wb"))
        repeat
            f:write((assert(second:read())))
            f:flush()
        until to_the_server(net.capture(path)) >= 3
        f:close()
        second:close()
        os.remove(path)
    end)

    it("lets nothing out that the default policy forbids, and says so", function()
        local targets = {
            "10.0.2.2 " .. ports.secret, "127.0.0.2 80", "10.1.2.3 80", "172.16.0.1 443", "192.168.1.1 22",
            "169.254.169.254 80", "169.254.1.1 80", "100.64.0.1 80", "0.0.0.1 80", "10.0.2.77 80",
            "fd00:ec2::254 80", "fe80::1%eth0 80", "fd12::1 80", "64:ff9b::a01:203 80", "2002:a01:203::1 80",
        }
        local script = {}
        for i, target in ipairs(targets) do
            script[i] = ("{ nc -w 20 %s </dev/null >/dev/null 2>&1 && echo open %s; } &"):format(target, target)
        end
        -- 127/8 must be forced out of the guest's own loopback.
        local out = sh(vm, "ip route del local 127.0.0.0/8 dev lo table local 2>/dev/null; "
            .. table.concat(script, "\n") .. "\nwait; echo x | nc -u -w 1 10.1.2.3 53; ping -c 1 -W 2 10.1.2.3; true")
        assert.is_nil(out:find("open", 1, true))
        assert.is_nil(received.secret)
        assert.equal("metadata service", event_of("blocked", "169.254.169.254").why)
        assert.equal("private address", event_of("blocked", "10.1.2.3").why)
        local allowed = { ["10.0.2.2"] = true, ["10.0.2.15"] = true }
        local seen = 0
        for _, e in ipairs(net.capture(capture)) do
            if e.dst then
                seen = seen + 1
                assert.is_true(allowed[e.dst] or false, "left the guest for " .. e.dst)
            end
        end
        assert.is_true(seen > 100)
    end)

    it("counts frames, flows and drops with their reason", function()
        local card = assert(vm:net_stats())[1]
        assert.is_true(card.out_bytes > MIB << 20)
        assert.is_true(card.drops["private address"] > 0)
        assert.equal("user", card.type)
        local found
        for _, flow in ipairs(card.flows) do
            found = found or flow.proto == "tcp" and flow.addr == "10.1.2.3" and flow.verdict == "refused"
        end
        assert.is_true(found)
    end)
end)
