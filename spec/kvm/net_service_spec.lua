-- SPDX-License-Identifier: Apache-2.0
--
-- A real server in a guest under load: nginx, asked by wrk from the host through a
-- published port, and from a second VM over a switch. No request fails. MTU 1500, too.
-- scripts/soak asks for a minute.

local net = require "support.net"
local shell = require "support.shell"
local sm = require "sm"
local spec = require "support.vm"

local SECONDS = tonumber(os.getenv "SM_SPEC_WRK_SECONDS") or 4
local CONNECTIONS = 20

describe("a server in a guest", function()
    local server, client, port, switch

    local function sh(vm, script)
        local r = assert(vm:exec { argv = { "sh", "-c", script }, timeout = SECONDS + 400 })
        assert.equal(0, r.status, r.stdout .. r.stderr)
        return r.stdout
    end

    -- What wrk says, if no request failed: how many there were.
    local function requests(report)
        assert.is_nil(report:find "Socket errors", report)
        assert.is_nil(report:find "Non%-2xx", report)
        return tonumber(report:match "(%d+) requests in")
    end

    local function wrk(url)
        return ("wrk -t 1 -c %d -d %ds --timeout 10s %s 2>&1"):format(CONNECTIONS, SECONDS, url)
    end

    setup(function()
        port = net.tcp("127.0.0.1", function() end)
        net.close_last()
        switch = sm.net.switch()
        local image = spec.image "serve"
        server = assert(sm.start(image, { name = "server", memory = "192M", publish = { port .. ":80" },
            net = { { type = "user", mtu = 1500 }, switch } }))
        client = assert(sm.start(image, { name = "client", memory = "256M", net = { switch } }))
        sh(server, "nginx")
    end)

    teardown(function()
        for _, one in pairs { server, client, switch } do
            one:close()
        end
        net.close()
        assert.same({}, spec.settled_leftovers())
    end)

    it("answers every request that comes by its published port", function()
        assert.equal("1500\n", sh(server, "cat /sys/class/net/eth0/mtu"))
        local n = requests(shell.run(wrk("http://127.0.0.1:" .. port .. "/page")))
        assert.is_true(n > CONNECTIONS, n)
        assert.equal(shell.run "seq 1000 | sha256sum", shell.run(("curl -s http://127.0.0.1:%d/page | sha256sum"):format(port)))
    end)

    it("answers every request of another VM on its switch", function()
        local n = requests(sh(client, wrk "http://server:80/page"))
        assert.is_true(n > CONNECTIONS, n)
    end)
end)
