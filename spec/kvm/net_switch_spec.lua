-- SPDX-License-Identifier: Apache-2.0
--
-- Two VMs of one script: joined by a switch, their flows decided by a function
-- of the script, their ports reached through the agent.

local net = require "support.net"
local sm = require "sm"
local spec = require "support.vm"

local image = spec.image "one"
local loop = sm.loop
local WAIT = 400

local function start(cfg)
    cfg.memory = "192M"
    return assert(sm.start(image, cfg))
end

-- A shell command in the guest: its output and status.
local function sh(vm, script)
    local r = assert(vm:exec { argv = { "sh", "-c", script }, timeout = WAIT })
    return r.stdout, r.status
end

describe("networks of a script", function()
    teardown(function()
        net.close()
        assert.same({}, spec.settled_leftovers())
    end)

    it("are decided by its function, and join VMs by a switch", function()
        local good = net.tcp("127.0.0.1", function(client)
            net.reply(client, "good\n")
        end)
        local bad = net.tcp("127.0.0.1", function(client)
            net.reply(client, "bad\n")
        end)
        local flows = {}
        local switch <close> = sm.net.switch()
        local a <close> = start { name = "alpha", net = switch }
        local b <close> = start {
            name = "beta",
            net = {
                { type = "user", on_flow = function(flow)
                    flows[#flows + 1] = ("%s %s %d"):format(flow.proto, flow.addr, flow.port)
                    return flow.port == good and "allow" or "deny"
                end },
                switch,
            },
            on_net = function() end,
        }
        assert.equal("good\n", (sh(b, "nc 10.0.2.2 " .. good .. " </dev/null")))
        local out, status = sh(b, "nc 10.0.2.2 " .. bad .. " </dev/null")
        assert.equal("", out)
        assert.not_equal(0, status)
        assert.same({ "tcp 10.0.2.2 " .. good, "tcp 10.0.2.2 " .. bad }, flows)

        sh(a, "mkdir -p /www; seq 1 50000 >/www/numbers; httpd -p 80 -h /www")
        local want = sh(a, "sha256sum </www/numbers")
        assert.equal(want, (sh(b, "wget -q -O - http://alpha/numbers | sha256sum")))
        do -- the same port from here, and one of ours from there, by the agent
            local s <close> = assert(a:connect(80, WAIT))
            assert(s:write("GET /numbers HTTP/1.0\r\n\r\n"))
            assert.matches("50000\n$", (assert(s:read_all())))
            local l <close> = assert(b:listen(9000, WAIT))
            local said
            local task = loop.spawn(function()
                said = sh(b, "echo question | nc 127.0.0.1 9000")
            end)
            local c <close> = assert(l:accept(WAIT))
            assert.equal("question\n", (c:read(WAIT)))
            assert(c:write("answer\n"))
            c:shutdown()
            task:join(WAIT)
            assert.equal("answer\n", said)
        end
        -- The other way by name too: alpha was there before beta.
        assert.equal(0, select(2, sh(a, "ping -c 1 -W 60 beta")))
        -- The switch leads nowhere else.
        assert.not_equal(0, select(2, sh(a, "nc -w 10 10.0.2.2 " .. good .. " </dev/null")))
    end)
end)
