-- SPDX-License-Identifier: Apache-2.0
--
-- The network as Debian's own programs see it: glibc's resolver, wget, ping, bash's
-- /dev/tcp and /dev/udp. The servers are this process's own.

local net = require "support.net"
local sm = require "sm"
local spec = require "support.vm"

describe("the network of a Debian guest", function()
    local vm
    local ports = {}

    -- What a script of bash says, and its status.
    local function sh(script)
        local r = assert(vm:exec { argv = { "bash", "-c", script }, timeout = 120 })
        return r.stdout, r.status, r.stderr
    end

    -- Answers a request, whatever it is, and closes.
    local function http(addr, body)
        return net.tcp(addr, function(client)
            local head = ""
            client:read_start(function(_, chunk)
                head = head .. (chunk or "")
                if head:find "\r\n\r\n" then
                    head = ""
                    net.reply(client, ("HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s"):format(#body, body))
                end
            end)
        end)
    end

    setup(function()
        local dns = net.dns { ["pub.test"] = "93.184.216.34", ["inside.test"] = "10.1.2.3" }
        ports.four, ports.six = http("127.0.0.1", "over four\n"), http("::1", "over six\n")
        ports.echo = net.udp("127.0.0.1", function(data)
            return "heard " .. data
        end)
        ports.closed = net.tcp("127.0.0.1", function() end)
        net.close_last()
        ports.mute = net.mute "127.0.0.1"
        vm = assert(sm.start(("oci:%s/debian/oci:demo"):format(os.getenv "SM_SPEC_IMAGES"), { memory = "192M",
            dns = { dns }, dns_search = { "test" }, allow = { "host" } }))
    end)

    teardown(function()
        vm:close()
        net.close()
        assert.same({}, spec.settled_leftovers())
    end)

    it("serves wget, by address, by name and over IPv6", function()
        assert.equal("over four\n", (sh(("wget -qO- http://10.0.2.2:%d/"):format(ports.four))))
        assert.equal("over four\n", (sh(("wget -qO- http://host.docker.internal:%d/"):format(ports.four))))
        assert.equal("over six\n", (sh(("wget -qO- 'http://[fd00:736d::2]:%d/'"):format(ports.six))))
    end)

    it("resolves names as glibc does, with the search list, and keeps back what points inside", function()
        assert.matches("^93%.184%.216%.34 ", (sh "getent ahostsv4 pub.test"))
        assert.matches("^93%.184%.216%.34 ", (sh "getent ahostsv4 pub"))
        local out, status = sh "getent ahosts inside.test"
        assert.equal("", out)
        assert.equal(2, status)
        out, status = sh "getent ahosts nowhere.test"
        assert.equal("", out)
        assert.equal(2, status)
    end)

    it("answers ping and UDP", function()
        assert.matches(" 0%% packet loss", (sh "ping -c 2 -W 30 10.0.2.2"))
        assert.equal("heard word", (sh(("exec 3<>/dev/udp/10.0.2.2/%d; printf word >&3; head -c 10 <&3"):format(ports.echo))))
    end)

    it("tells a refused connection from one that is not allowed, promptly", function()
        local _, status, err = sh(("exec 3<>/dev/tcp/10.0.2.2/%d"):format(ports.closed))
        assert.equal(1, status)
        assert.matches("Connection refused", err)
        _, status = sh "exec 3<>/dev/tcp/10.1.2.3/80"
        assert.equal(1, status)
    end)

    it("lets a connection that nobody answers time out", function()
        local _, status, err = sh(("wget -O- --tries=1 --connect-timeout=2 http://10.0.2.2:%d/"):format(ports.mute))
        assert.equal(4, status)
        assert.matches("timed out", err)
    end)
end)
