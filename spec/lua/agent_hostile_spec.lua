-- SPDX-License-Identifier: Apache-2.0
--
-- The client against an agent that lies. Whatever it says, the answer is one
-- clear error, a closed connection, and nothing left waiting.

local agent = require "sm.agent"
local loop = require "sm.loop"
local support = require "support.agent"
local uv = require "luv"
local wire = require "sm.wire"

local frame = support.frame

local function u32(...)
    return string.pack("<" .. ("I4"):rep(select("#", ...)), ...)
end

local STARTED = frame(wire.STARTED, 1, u32(42))
local EXIT = frame(wire.EXIT, 1, string.pack("<I4I4i8i8i8i8", 0, 0, 1, 2, 3, 4))
local EOF1 = frame(wire.STDOUT, 1, "", wire.FLAG_EOF)
local EOF2 = frame(wire.STDERR, 1, "", wire.FLAG_EOF)
local INFO = string.pack("<i8i8I4I4I4", 5, 0, 420, 0, 0)

-- What the peer says to `exec{argv={"x"}, stdin="in"}`, and what is wrong.
local exec_cases = {
    { "a frame longer than any may be", string.pack(wire.HEADER, 65537, wire.STDOUT, 0, 1), "65537 bytes" },
    { "a length of 4 GiB", string.pack(wire.HEADER, 0xffffffff, wire.STDOUT, 0, 1), "4294967295" },
    { "a control frame that is too long", string.pack(wire.HEADER, 60000, wire.FAILED, 0, 1), "60000 bytes" },
    { "an unknown type", frame(0x55, 0), "type 85" },
    { "an unknown type on a channel", frame(0xff, 1), "type 255" },
    { "a host's frame", frame(wire.EXEC, 1), "type 2" },
    { "flags where none belong", frame(wire.STARTED, 1, u32(1), 1), "flags 1" },
    { "unknown data flags", frame(wire.STDOUT, 1, "x", 0x80), "data flags" },
    { "data for a channel that is not open", frame(wire.STDOUT, 9, "x"), "not open" },
    { "data on the control channel", frame(wire.STDOUT, 0, "x"), "not open" },
    { "a frame for a channel that is not open", frame(wire.EXIT, 9, ("x"):rep(40)), "not open" },
    { "an empty data frame", frame(wire.STDOUT, 1, ""), "empty" },
    { "data beyond the credit", frame(wire.STDOUT, 1, ("x"):rep(5000)), "5000 bytes against a credit of 4096" },
    { "data after the end of the stream", EOF1 .. frame(wire.STDOUT, 1, "x"), "closed" },
    { "the end of a stream twice", EOF1 .. EOF1, "closed" },
    { "EXIT before STARTED", EXIT, "EXIT out of place" },
    { "EXIT twice", STARTED .. EXIT .. EXIT, "EXIT out of place" },
    { "a short EXIT", STARTED .. frame(wire.EXIT, 1, "x"), "EXIT out of place" },
    { "STARTED twice", STARTED .. STARTED, "STARTED out of place" },
    { "a short STARTED", frame(wire.STARTED, 1, "x"), "STARTED out of place" },
    { "FAILED after STARTED", STARTED .. frame(wire.FAILED, 1, u32(2, 5)), "FAILED out of place" },
    { "a short FAILED", frame(wire.FAILED, 1, "x"), "FAILED of 1" },
    { "an unknown stage", frame(wire.FAILED, 1, u32(2, 99)), "stage 99" },
    { "stdin credit that was never used", frame(wire.STDIN_CREDIT, 1, u32(3)), "more credit" },
    { "stdin credit of 4 GiB", frame(wire.STDIN_CREDIT, 1, u32(0xffffffff)), "more credit" },
    { "a short credit", frame(wire.STDIN_CREDIT, 1, "x"), "credit of 1" },
    { "a file's frame for a process", frame(wire.FILE_INFO, 1, INFO), "for a process" },
    { "anything after the request is over", STARTED .. EXIT .. EOF1 .. EOF2 .. EXIT, "not open", true },
    { "HELLO again", support.hello, "second HELLO" },
    { "BOOTED unasked", frame(wire.BOOTED, 0), "BOOTED without BOOT" },
    { "a boot failure unasked", frame(wire.FAILED, 0, u32(2, 5)), "FAILED without BOOT" },
    { "FROZEN unasked", frame(wire.FROZEN, 0, "\0\0\0\0"), "FROZEN without FREEZE" },
    { "PONG unasked", frame(wire.PONG, 0, "x"), "PONG without PING" },
    { "an unknown goodbye", frame(wire.GOODBYE, 0, u32(77, 0)), "reason 77" },
    { "a short goodbye", frame(wire.GOODBYE, 0, "x"), "GOODBYE" },
    { "anything after goodbye", frame(wire.GOODBYE, 0, u32(1, 0)) .. STARTED, "after GOODBYE" },
    { "that it does not know us", frame(wire.REFUSED, 1, "\2"), "frame type 2" },
}

-- `complete`: the request itself was answered before the violation came.
local function expect_violation(a, run, bytes, say, pattern, complete)
    local heard = {}
    a.on_error = function(err)
        heard[#heard + 1] = err
    end
    local task = loop.spawn(run)
    loop.sleep(0) -- the request is on its way, channel 1
    say(bytes)
    local result, err = task:join(10)
    if not complete then
        assert.is_nil(result)
        assert.matches("agent: ", err)
    end
    assert.is_string(a.dead)
    assert.matches("protocol violation: .*" .. pattern, a.dead)
    assert.is_true(a.stream:is_closing())
    assert.is_nil(next(a.chans))
    assert.is_true(#heard <= 1)
    return heard
end

describe("the agent's client: a hostile peer of exec", function()
    for _, case in ipairs(exec_cases) do
        it("refuses " .. case[1], function()
            loop.run(function()
                local a, say, peer = support.fake()
                expect_violation(a, function()
                    return a:exec { argv = { "x" }, stdin = "in", window = 4096 }
                end, case[2], say, case[3], case[4])
                peer:close()
            end)
        end)
    end

    it("refuses the same, byte by byte", function()
        loop.run(function()
            for _, case in ipairs(exec_cases) do
                local a, say, peer = support.fake()
                local task = loop.spawn(function()
                    return a:exec { argv = { "x" }, stdin = "in", window = 4096 }
                end)
                loop.sleep(0)
                for i = 1, #case[2] do
                    say(case[2]:sub(i, i))
                end
                local result = task:join(10)
                assert.is_true(case[4] or not result, case[1])
                assert.matches(case[3], a.dead, 1, false)
                peer:close()
            end
        end)
    end)

    it("takes an honest conversation however it is cut", function()
        loop.run(function()
            local talk = STARTED .. frame(wire.STDOUT, 1, "hello ") .. frame(wire.STDERR, 1, "err") ..
                frame(wire.STDOUT, 1, "world", wire.FLAG_EOF) .. EXIT .. EOF2
            for cut = 1, #talk - 1 do
                local a, say, peer = support.fake()
                local task = loop.spawn(function()
                    return a:exec { argv = { "x" } }
                end)
                loop.sleep(0)
                say(talk:sub(1, cut))
                loop.sleep(0)
                say(talk:sub(cut + 1))
                local r, err = task:join(10)
                assert(r, err)
                assert.equal("hello world", r.stdout)
                assert.equal("err", r.stderr)
                a:close()
                peer:close()
            end
        end)
    end)
end)

describe("the agent's client: a hostile peer of files", function()
    for _, case in ipairs({
        { "file data before its description", frame(wire.STDOUT, 1, "x", wire.FLAG_EOF), "before FILE_INFO" },
        { "a description twice", frame(wire.FILE_INFO, 1, INFO):rep(2), "file being read" },
        { "a short description", frame(wire.FILE_INFO, 1, "x"), "FILE_INFO of 1" },
        { "stderr of a file", frame(wire.FILE_INFO, 1, INFO) .. frame(wire.STDERR, 1, "x"), "never was" },
        { "more of a file than its credit", frame(wire.FILE_INFO, 1, INFO) ..
            frame(wire.STDOUT, 1, ("x"):rep(65536)):rep(4):sub(1, -1) .. frame(wire.STDOUT, 1, "x"),
            "against a credit of 0", true },
        { "an exit status of a file", frame(wire.EXIT, 1, ("x"):rep(40)), "file being read" },
    }) do
        it("refuses " .. case[1], function()
            loop.run(function()
                local a, say, peer = support.fake()
                local sink
                if case[4] then
                    -- A reader that has stopped gives no credit back.
                    sink = function()
                        loop.await(function() end, 5)
                    end
                end
                local task = loop.spawn(function()
                    return a:read_file("/x", { sink = sink })
                end)
                loop.sleep(0)
                say(case[2])
                while not a.dead do
                    loop.sleep(0.001)
                end
                assert.matches(case[3], a.dead)
                task:cancel()
                peer:close()
            end)
        end)
    end

    it("refuses a description of a file before all of it was sent", function()
        loop.run(function()
            local a, say, peer = support.fake()
            expect_violation(a, function()
                return a:write_file("/x", ("x"):rep(1 << 20))
            end, frame(wire.FILE_INFO, 1, INFO), say, "file being written")
            peer:close()
        end)
    end)
end)

describe("the agent's client: the first word", function()
    local function accept(bytes, close)
        return loop.run(function()
            local fds = assert(uv.socketpair("stream", nil, { nonblock = true }, {}))
            local peer = uv.new_pipe(false)
            assert(peer:open(fds[2]))
            peer:write(bytes)
            if close then
                peer:shutdown(function() end)
            end
            local a, err = agent.accept(fds[1], { timeout = 0.2 })
            peer:close()
            return a, err
        end)
    end

    it("must be HELLO of this version, and come in time", function()
        for _, case in ipairs({
            { "GET / HTTP/1.0\r\n\r\n", "protocol violation" },
            { frame(wire.STARTED, 1, u32(1)), "before HELLO" },
            { frame(wire.HELLO, 0, ""), "version nil" },
            { frame(wire.HELLO, 0, wire.field_u32(1, wire.VERSION + 1)), "version 3" },
            { frame(wire.HELLO, 0, wire.field_u32(1, 1) .. wire.field_u32(99, 1)), "field 99" },
            { frame(wire.HELLO, 0, wire.field(1, "x")), "version of 1 bytes" },
            { frame(wire.HELLO, 0, "\1\0\255\255\255\255"), "longer than its frame" },
            { frame(wire.HELLO, 0, "\1"), "cut short" },
            { frame(wire.HELLO, 0, wire.field(4, ("x"):rep(5))), "mark of 5" },
            { frame(wire.HELLO, 0, wire.field(4, ("\255"):rep(12))), "mark 4294967295" },
            { frame(wire.HELLO, 3, wire.field_u32(1, 1)), "channel 3" },
            { "", "timeout" },
            { support.hello:sub(1, 5), "timeout" },
        }) do
            local a, err = accept(case[1])
            assert.is_nil(a)
            assert.matches(case[2], err)
        end
        local a, err = accept("", true)
        assert.is_nil(a)
        assert.matches("connection lost", err)
    end)

    it("may carry any text as the kernel's name", function()
        local a = accept(frame(wire.HELLO, 0, wire.field_u32(1, 1) .. wire.field(3, "6.1\27[2J\n" .. ("x"):rep(300))))
        assert.equal(128, #a.hello.kernel)
        assert.is_nil(a.hello.kernel:find("%c"))
        a:close()
    end)
end)

describe("the agent's client: a peer that vanishes", function()
    it("fails everything that waits, once, and says why", function()
        loop.run(function()
            local heard = {}
            local a, _, peer = support.fake({ on_error = function(err)
                heard[#heard + 1] = err
            end })
            local tasks = {
                loop.spawn(function() return a:exec { argv = { "x" } } end),
                loop.spawn(function() return a:spawn { argv = { "x" } } end),
                loop.spawn(function() return a:write_file("/x", ("x"):rep(1 << 20)) end),
                loop.spawn(function() return a:read_file("/x") end),
                loop.spawn(function() return a:boot {} end),
                loop.spawn(function() return a:ping() end),
                loop.spawn(function() return a:wait_goodbye() end),
            }
            loop.sleep(0)
            peer:close()
            for i, task in ipairs(tasks) do
                local result, err = task:join(10)
                assert.is_nil(result, i)
                assert.matches("connection lost", err)
            end
            assert.equal(1, #heard)
            local result, err = a:exec { argv = { "x" } }
            assert.is_nil(result)
            assert.equal(heard[1], err)
        end)
    end)

    it("after goodbye it is no error", function()
        loop.run(function()
            local heard, bye = 0, nil
            local a, say, peer = support.fake({
                on_error = function() heard = heard + 1 end,
                on_goodbye = function(b) bye = b end,
            })
            say(frame(wire.GOODBYE, 0, u32(0, 3) .. "text\27with\ncontrols"))
            assert.equal("exited", a:wait_goodbye(5).reason)
            peer:close()
            local result, err = a:exec { argv = { "x" } }
            assert.is_nil(result)
            assert.matches("agent: ", err)
            assert.equal(0, heard)
            assert.same({ reason = "exited", code = 3, text = "text?with?controls" }, bye)
        end)
    end)
end)
