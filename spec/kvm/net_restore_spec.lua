-- SPDX-License-Identifier: Apache-2.0
--
-- The connections of a machine that is copied: the source's go on whole, the copy's end
-- at once, for its network knows none of them; what listens in it is reached at the port
-- it is given anew.

local net = require "support.net"
local sm = require "sm"
local spec = require "support.vm"
local uv = require "luv"

local loop = sm.loop

describe("the network of a copy", function()
    local function sh(vm, script)
        local r = assert(vm:exec { argv = { "sh", "-c", script }, timeout = 300 })
        assert.equal(0, r.status, r.stderr)
        return r.stdout
    end

    teardown(function()
        net.close()
        assert.same({}, spec.settled_leftovers())
    end)

    for _, kernel in ipairs { "own", "stock" } do
        it("has none of its source's connections, and serves, with the " .. kernel .. " kernel", function()
            local path = ("%s/net-%s-%d-%d.sms"):format(os.getenv "TMPDIR" or "/tmp", kernel,
                uv.os_getpid(), uv.hrtime() % 1000000)
            local _ <close> = setmetatable({}, { __close = function()
                os.remove(path)
                os.remove((path:gsub("%.sms$", ".sms.set")))
            end })
            local peers = {}
            local port = net.tcp("127.0.0.1", function(peer)
                peers[#peers + 1] = peer
                peer:read_start(function() end)
                peer:write "first "
            end)
            local six = net.tcp("::1", function(peer)
                peer:read_start(function() end)
                peer:write "first "
            end)
            local web = net.tcp("127.0.0.1", function() end)
            net.close_last()
            local vm <close> = assert(sm.start(spec.image "one", { memory = "192M", kernel = kernel,
                net = { type = "user", allow = { "host:" .. port, "host:" .. six } }, publish = { web .. ":8080" } }))
            -- Those that read from outside, and one over the loopback, whose both ends are copied.
            sh(vm, ([[
                mkdir -p /www /tmp/n; echo it works >/www/index.html; httpd -p 8080 -h /www
                mkfifo /tmp/n/mute # says nothing, and does not end
                hold() { (nc $2 $3 0<>/tmp/n/mute >/tmp/n/$1.got; echo $? >/tmp/n/$1.ended) >/dev/null 2>&1 </dev/null & }
                (nc -l -p 99 -e sh -c 'while ! [ -e /tmp/n/go ]; do sleep 0.1; done; echo word') >/dev/null 2>&1 </dev/null &
                hold out 10.0.2.2 %d
                hold six fd00:736d::2 %d
                sleep 1
                hold in 127.0.0.1 99
                while ! [ -s /tmp/n/out.got ] || ! [ -s /tmp/n/six.got ]; do sleep 0.1; done]]):format(port, six))
            assert.equal(1, #peers)
            assert(vm:snapshot { path = path })
            do
                local other = net.tcp("127.0.0.1", function() end)
                net.close_last()
                local copy <close> = assert(sm.restore(path, { publish = { other .. ":8080" } }))
                -- The readers' connections end at once (busybox's nc takes the error for an end), and
                -- they have nothing that was not said.
                sh(copy, "n=0; while ! [ -s /tmp/n/out.ended ] || ! [ -s /tmp/n/six.ended ]; do sleep 0.1; n=$((n+1)); "
                    .. "[ $n -lt 100 ] || exit 1; done")
                assert.equal("first ", sh(copy, "cat /tmp/n/out.got"))
                assert.equal("", sh(copy, "cat /proc/net/tcp | grep -v :0063 | grep ' 01 ' || true"))
                -- What was inside goes on.
                assert.equal("word\n", sh(copy, [[touch /tmp/n/go
                    while ! [ -s /tmp/n/in.got ]; do sleep 0.1; done; cat /tmp/n/in.got]]))
                -- Those who come are served, those who go are let.
                assert.matches("it works", (assert(net.ask("127.0.0.1", other, "GET /index.html HTTP/1.0\r\n\r\n", 60))))
                sh(copy, ("(nc 10.0.2.2 %d 0<>/tmp/n/mute >/tmp/n/again) </dev/null >/dev/null 2>&1 & while ! [ -s /tmp/n/again ]; do sleep 0.1; done"):format(port))
            end
            -- The source heard nothing of all that.
            assert.equal("", sh(vm, "cat /tmp/n/out.ended 2>/dev/null || true"))
            peers[1]:write "second"
            sh(vm, "while ! grep -q 'first second' /tmp/n/out.got; do sleep 0.1; done")
            assert.matches("it works", (assert(net.ask("127.0.0.1", web, "GET /index.html HTTP/1.0\r\n\r\n", 60))))
        end)
    end
end)
