-- SPDX-License-Identifier: Apache-2.0
--
-- Streams to ports through the agent, natively: the agent and its helper as
-- ordinary processes, the ports this machine's.

local guest_stream = require "sm.guest_stream"
local loop = require "sm.loop"
local net = require "support.net"
local support = require "support.agent"

describe("a stream through the agent", function()
    local program = guest_stream.PROGRAM

    setup(function()
        guest_stream.PROGRAM = (os.getenv "SM_BUILD" or "build") .. "/guest/init"
        if guest_stream.PROGRAM:sub(1, 1) ~= "/" then
            guest_stream.PROGRAM = require("luv").cwd() .. "/" .. guest_stream.PROGRAM
        end
    end)
    teardown(function()
        guest_stream.PROGRAM = program
        net.close()
    end)

    it("reaches a port, carries bytes both ways, and half closes", function()
        local port = net.tcp("127.0.0.1", function(client)
            net.collect(client, function(data)
                net.reply(client, data:upper())
            end)
        end)
        support.with(nil, function(a)
            local s <close> = assert(guest_stream.connect(a, port, 60))
            local sent = ("abc"):rep(400000)
            assert(s:write(sent))
            s:shutdown()
            assert.equal(sent:upper(), s:read_all())
        end)
    end)

    it("reaches a port of ::1", function()
        local port = net.tcp("::1", function(client)
            net.reply(client, "six")
        end)
        support.with(nil, function(a)
            local s <close> = assert(guest_stream.connect(a, port, 60))
            assert.equal("six", s:read_all())
        end)
    end)

    it("says that nobody listens", function()
        local port = net.tcp("127.0.0.1", function() end)
        net.close_last()
        support.with(nil, function(a)
            local s, err = guest_stream.connect(a, port, 60)
            assert.is_nil(s)
            assert.equal(("port %d: Connection refused"):format(port), err)
        end)
    end)

    it("listens, and takes connections in their order", function()
        local port = net.tcp("127.0.0.1", function() end)
        net.close_last()
        support.with(nil, function(a)
            local l <close> = assert(guest_stream.listen(a, port, 60))
            local again, err = guest_stream.listen(a, port, 60)
            assert.is_nil(again)
            assert.matches(("port %d: Address.* in use"):format(port), err)
            local answers = {}
            local tasks = {}
            for i = 1, 3 do
                tasks[i] = loop.spawn(function()
                    answers[i] = net.ask("127.0.0.1", port, "from " .. i .. "\n", 60)
                end)
            end
            for _ = 1, 3 do
                local s <close> = assert(l:accept(60))
                local line = assert(s:read(60))
                assert(s:write("for " .. line))
                s:shutdown()
                -- Until the other side has seen the end.
                for _ = 1, 600 do
                    local i = tonumber(line:match "%d+")
                    if answers[i] then
                        break
                    end
                    loop.sleep(0.1)
                end
            end
            for i = 1, 3 do
                tasks[i]:join(60)
                assert.equal(("for from %d\n"):format(i), answers[i])
            end
            local none, why = l:accept(0.1)
            assert.is_nil(none)
            assert.matches("timeout", why)
        end)
    end)
end)
