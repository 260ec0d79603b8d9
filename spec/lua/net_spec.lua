-- SPDX-License-Identifier: Apache-2.0
--
-- What a configuration may say of networks, and sm-net as a process: what it
-- refuses, in which words. No VM takes part.

local child = require "support.shell"
local config = require "sm.config"
local loop = require "sm.loop"
local net = require "sm.net"
local net_config = require "sm.net_config"
local netd = require "sm.netd"
local uv = require "luv"

local function err_of(cfg)
    local ok, err = config.check(cfg)
    assert.is_nil(ok)
    return err
end

describe("a network's configuration", function()
    it("is the user network unless told otherwise", function()
        local cfg = assert(config.check {})
        assert.equal(1, #cfg.net)
        assert.equal("user", cfg.net[1].type)
        assert.equal("deny_private", cfg.net[1].policy)
        assert.equal(65520, cfg.net[1].mtu)
        assert.same({}, assert(config.check { net = "none" }).net)
        assert.same({}, assert(config.check { net = false }).net)
    end)

    it("takes several cards, in their short and long forms", function()
        local cards = assert(config.check {
            net = { "user", "tap=tap7,ip=10.1.0.2/24,gw=10.1.0.1,mtu=9000", { type = "unix", path = "/x" }, net.switch() },
        }).net
        assert.equal("tap7", cards[2].name)
        assert.equal("10.1.0.2/24", cards[2].address)
        assert.equal(9000, cards[2].mtu)
        assert.equal(1500, cards[3].mtu)
        assert.equal("allow_all", cards[4].policy)
    end)

    it("is refused with one line that names the mistake", function()
        assert.equal("net: unknown network 'moon' (known: user, none, tap=NAME, unix=PATH)", err_of { net = "moon" })
        assert.matches("^net: unknown key 'alow' of a user network", err_of { net = { type = "user", alow = {} } })
        assert.matches("policy: expected deny_private", err_of { net = { type = "user", policy = "open" } })
        assert.matches("mtu: expected 576 to 65520", err_of { net = { type = "user", mtu = 9 } })
        assert.matches("address: '10.0.0.1/33': expected ADDRESS/PREFIX",
            err_of { net = "tap=t0,ip=10.0.0.1/33" })
        assert.matches("gateway: 'x' is no address", err_of { net = "tap=t0,gw=x" })
        assert.matches("unknown option 'speed=1'", err_of { net = "tap=t0,speed=1" })
        assert.matches("tap: expected a device's name", err_of { net = "tap=a/b" })
        assert.matches("^publish: '80:x': expected", err_of { publish = { "80:x" } })
        assert.matches("^publish: '1.2.3:80:80'", err_of { publish = { "1.2.3:80:80" } })
        assert.matches("^publish: '65536:80'", err_of { publish = { "65536:80" } })
        assert.matches("^add_host: 'a:b': expected NAME:ADDRESS", err_of { add_host = { "a:b" } })
    end)

    it("lets the host's kernel have a tap's frames only where nothing is asked of them", function()
        local card = assert(config.check {
            net = { type = "tap", name = "tap7", vhost = true, queues = 2, policy = "allow_all" },
        }).net[1]
        assert.is_true(card.vhost)
        assert.equal(2, card.queues)
        local function refused(more)
            local tap = { type = "tap", name = "tap7", vhost = true, policy = "allow_all" }
            for key, value in pairs(more) do
                tap[key] = value
            end
            return err_of { net = tap }
        end
        assert.equal("net: vhost: frames go past any policy, so policy has to be allow_all, not deny_private",
            err_of { net = "tap=tap7,vhost" })
        for key, value in pairs { allow = { "10.0.0.1" }, deny = { "10.0.0.1" }, on_flow = print, pcap = "x", rate = {} } do
            assert.equal("net: vhost: frames go past sm, so it cannot be had with " .. key, refused { [key] = value })
        end
        assert.equal("net: queues: expected 1 to 8, got 9", refused { queues = 9 })
        assert.matches("unknown key 'vhost' of a user network", err_of { net = { type = "user", vhost = true } })
        assert.matches("unknown option 'vhost'", err_of { net = "unix=/x,vhost" })
    end)

    it("reads ports as Docker does, but for 127.0.0.1", function()
        local ports = assert(net_config.publish { "8080:80", "53:53/udp", "0.0.0.0:1:2", "[::1]:3:4", "80" })
        assert.same({ udp = false, addr = "127.0.0.1", host = 8080, guest = 80 }, ports[1])
        assert.same({ udp = true, addr = "127.0.0.1", host = 53, guest = 53 }, ports[2])
        assert.equal("0.0.0.0", ports[3].addr)
        assert.equal("::1", ports[4].addr)
        assert.equal(0, ports[5].host)
    end)

    it("knows an address when it sees one", function()
        for text, family in pairs {
            ["1.2.3.4"] = 4, ["::"] = 6, ["fe80::1"] = 6, ["1:2:3:4:5:6:7:8"] = 6, ["::ffff:1.2.3.4"] = 6,
            ["1.2.3"] = false, ["01.2.3.4"] = false, ["256.1.1.1"] = false, ["1::2::3"] = false, [":1"] = false,
            ["1:2"] = false, ["::1.2.3"] = false, ["12345::"] = false, [""] = false, ["a.b"] = false,
        } do
            assert.equal(family or nil, net_config.family(text), text)
        end
    end)
end)

describe("the network process", function()
    local dir

    before_each(function()
        dir = child.tmpdir()
    end)
    after_each(function()
        child.remove(dir)
    end)

    local function start(cfg, image)
        return net.start(assert(config.check(cfg)), image or {}, "spec", dir)
    end

    it("opens a card, publishes, counts, and ends", function()
        local network <close> = assert(start { publish = { "80", "[::1]::81", "82/udp" } })
        assert.equal(3, #network.ports)
        assert.is_true(network.ports[1].port > 0)
        assert.equal("udp", network.ports[3].proto)
        local stats = assert(network:stats())
        assert.equal(0, stats[1].out_frames)
        assert.same({}, stats[1].flows)
        assert.is_truthy(uv.fs_stat(dir .. "/net0.sock"))
    end)

    it("has a queue for a burst of clients, and for those who come before the guest", function()
        local network <close> = assert(start { publish = { "80", "[::1]::80" } })
        local connected, clients = 0, {}
        for i = 1, 200 do
            local port = network.ports[1 + i % 2]
            clients[i] = uv.new_tcp()
            clients[i]:connect(port.addr, port.port, function(err)
                connected = connected + (err and 0 or 1)
            end)
        end
        local began = loop.now()
        while connected < #clients and loop.now() - began < 10 do
            loop.sleep(0.01)
        end
        for _, client in ipairs(clients) do
            client:close()
        end
        assert.equal(#clients, connected)
        assert.is_true(loop.now() - began < 0.9) -- a second is how long a lost SYN waits
    end)

    it("sleeps while nothing happens", function()
        local network <close> = assert(start {})
        local function wakeups()
            local f <close> = assert(io.open(("/proc/%d/status"):format(network.daemon.pid)))
            return tonumber(f:read("a"):match "\nvoluntary_ctxt_switches:%s*(%d+)")
        end
        assert(network:stats())
        local before = wakeups()
        loop.sleep(3.2)
        assert.is_true(wakeups() - before <= 1)
    end)

    it("publishes what the image exposes", function()
        local image = { config = { config = { ExposedPorts = { ["80/tcp"] = {}, ["53/udp"] = {} } } } }
        local network <close> = assert(start({ publish_all = true }, image))
        assert.equal(53, network.ports[1].guest)
        assert.equal("udp", network.ports[1].proto)
        assert.equal(80, network.ports[2].guest)
    end)

    it("says in one line what cannot be", function()
        local taken = assert(start { publish = { "80" } })
        local port = taken.ports[1].port
        local first = dir
        dir = child.tmpdir()
        local _, err = start { publish = { ("%d:80"):format(port) } }
        child.remove(first)
        taken:close()
        assert.equal(("network: cannot publish TCP port %d at 127.0.0.1: the port is taken"):format(port), err)
        local function of(cfg)
            child.remove(dir)
            dir = child.tmpdir()
            local got, why = start(cfg)
            assert.is_nil(got)
            return why
        end
        assert.equal("network: allow '10.0.0.0/33': malformed network: the prefix is 0 to 32, or 128 for IPv6",
            of { allow = { "10.0.0.0/33" } })
        assert.matches("allow 'host:0': malformed port", of { allow = { "host:0" } })
        assert.matches("deny 'a b': expected a name, an address or a network", of { net = { type = "user", deny = "a b" } })
        assert.matches("^network: unix /nowhere: No such file", of { net = "unix=/nowhere" })
        assert.matches("^network: pcap /nowhere/x: No such file", of { pcap = "/nowhere/x" })
        assert.matches("^network: dns 'x': expected ADDRESS", of { dns = { "x" } })
        assert.matches("this VM has none", of { net = "none", publish = { "80:80" } })
    end)

    it("says why there is no tap", function()
        -- Root makes one; then it is taken. Others may not.
        local tap = { net = { type = "tap", name = ("sm%d"):format(uv.os_getpid() % 100000) } }
        local held, err = start(tap)
        if held then
            local first = dir
            dir = child.tmpdir()
            local _, again = start(tap)
            held:close()
            child.remove(first)
            assert.matches("^network: tap sm%d+: in use$", again)
        else
            assert.matches("^network: tap sm%d+: [^\n]+$", err)
        end
    end)

    it("survives a parent that talks nonsense, by ending", function()
        local daemon <close> = assert(netd.spawn { name = "spec" })
        local res, err = daemon:call("net.nothing", {})
        assert.is_nil(res)
        assert.matches("no such request", err)
        assert.is_nil((daemon:call("net.stats", { nic = 7 })))
        daemon.pipe:write("\255\255\255\255")
        assert.is_nil((daemon:call("net.stats", { nic = 0 })))
    end)
end)
