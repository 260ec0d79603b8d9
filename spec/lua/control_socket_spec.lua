-- SPDX-License-Identifier: Apache-2.0
--
-- The control socket, both sides of it, with a VM that is made up: the
-- protocol's bounds, and what a bad client can do (nothing).

local attached = require "sm.attached"
local control = require "sm.control"
local core = require "sm.core"
local leaks = require "support.leaks"
local loop = require "sm.loop"
local serve = require "sm.serve"
local shell = require "support.shell"
local socket = require "sm.socket"
local uv = require "luv"

local PATIENCE = 120

local function frame(message)
    return string.pack("<s4", core.pack(message))
end

-- A process of the made-up VM: what its argv[1] says.
local function fake_process(opts)
    local proc = { pid = 42, taken = {}, closed = false, waiting = {}, written = 0 }
    local function wake()
        local list = proc.waiting
        proc.waiting = {}
        for _, settle in ipairs(list) do
            settle(true)
        end
    end
    local function wait()
        loop.await(function(settle)
            proc.waiting[#proc.waiting + 1] = settle
        end, PATIENCE)
    end
    local left = opts.argv[1] == "flood" and math.huge or opts.argv[1] == "say" and 1 or 0
    function proc.read(_, name)
        if name == "stderr" or proc.closed or left <= 0 then
            return nil
        end
        left = left - 1
        proc.written = proc.written + 1
        return opts.argv[2] or ("x"):rep(65536)
    end
    function proc:write(bytes)
        self.taken[#self.taken + 1] = bytes
        return true
    end
    function proc:close_stdin()
        self.exit = { status = tonumber(opts.argv[2]) or 0 }
        wake()
    end
    function proc:signal(number)
        self.exit = { status = 128 + number }
        wake()
    end
    function proc.resize() end
    function proc:wait()
        if opts.argv[1] == "say" then
            return { status = 0 }
        end
        while not self.exit and not self.closed do
            wait()
        end
        return self.exit or nil, "closed"
    end
    function proc:close()
        self.closed = true
        wake()
    end
    setmetatable(proc, { __close = proc.close })
    return proc
end

local function with_server(fn)
    return leaks.free(function()
        local dir = shell.tmpdir()
        loop.run(function()
            local vm = { procs = {} }
            function vm:spawn(opts)
                if opts.argv[1] == "none" then
                    return nil, "exec: none: no such file or directory", { status = 127, stage = "exec" }
                end
                self.procs[#self.procs + 1] = fake_process(opts)
                return self.procs[#self.procs]
            end
            function vm.stats()
                return { vcpus = {} }
            end
            -- Its traffic: three pieces, and then it waits until it is closed.
            function vm.capture(_, opts)
                if opts.card == 9 then
                    return nil, "capture: no such card"
                end
                local capture = { left = 3 }
                vm.captured = capture
                function capture:read()
                    self.left = self.left - 1
                    if self.left >= 0 then
                        return "piece"
                    end
                    loop.await(function(settle)
                        self.wake = settle
                    end)
                end
                function capture:close()
                    self.closed = true
                    if self.wake then
                        self.wake(true)
                    end
                    return 0
                end
                return setmetatable(capture, { __close = capture.close })
            end
            local server = assert(serve.new(vm, dir, { id = "v", status = "running" }))
            local info = { id = "v", status = "running", dir = dir }
            local ok, err = xpcall(fn, debug.traceback, info, vm, server)
            server:close()
            assert(ok, err)
        end)
        shell.remove(dir)
    end)
end

-- A connection that says bytes as they are.
local function raw(info)
    local pipe = uv.new_pipe(false)
    assert(loop.await(function(settle)
        pipe:connect(info.dir .. "/control.sock", function(err)
            settle(not err, err)
        end)
    end))
    return assert(socket.new(pipe))
end

local function until_closed(pipe)
    return loop.await(function(settle)
        pipe:read_start(function(err, chunk)
            if err or not chunk then
                pipe:close()
                settle(true)
            end
        end)
    end, PATIENCE)
end

local function still_answers(info)
    local vm <close> = assert(attached.attach(info))
    assert.equal("v", assert(vm:inspect()).id)
end

describe("the control socket", function()
    -- libuv keeps one descriptor in reserve from its first listener on.
    setup(function()
        local listener = uv.new_pipe(false)
        local dir = shell.tmpdir()
        assert(listener:bind(dir .. "/s"))
        listener:listen(1, function() end)
        listener:close()
        shell.remove(dir)
    end)

    it("is the user's alone", with_server(function(info)
        local stat = uv.fs_stat(info.dir .. "/control.sock")
        assert.equal("600", ("%o"):format(stat.mode & 511))
    end))

    it("runs commands with input, output, signals and exit codes", with_server(function(info, made)
        local vm <close> = assert(attached.attach(info))
        local r = assert(vm:exec { argv = { "say", "hello" } })
        assert.equal("hello", r.stdout)
        r = assert(vm:exec { argv = { "take", "7" }, stdin = ("abc"):rep(300000) })
        assert.equal(7, r.status)
        assert.equal(("abc"):rep(300000), table.concat(made.procs[2].taken))
        local proc <close> = assert(vm:spawn { argv = { "take" } })
        assert.equal(42, proc.pid)
        proc:signal "TERM"
        assert.equal(143, assert(proc:wait(PATIENCE)).status)
        local none, err, failure = vm:exec { argv = { "none" } }
        assert.is_nil(none)
        assert.matches("no such file", err)
        assert.equal(127, failure.status)
    end))

    it("stalls the stream of a reader that stops, and no other", with_server(function(info, made)
        local vm <close> = assert(attached.attach(info))
        local proc <close> = assert(vm:spawn { argv = { "flood" } })
        assert(proc:read "stdout")
        local flood = made.procs[1]
        local before
        repeat
            before = flood.written
            still_answers(info)
            assert.equal("other", assert(vm:exec { argv = { "say", "other" } }).stdout)
        until flood.written == before
        -- One window, what was read of it given back, and the piece in hand.
        assert.is_true(flood.written * 65536 <= 2 * control.WINDOW + 65536, flood.written)
        for _ = 1, 20 do
            assert(proc:read("stdout", PATIENCE))
        end
        assert.is_true(flood.written > before)
    end))

    it("ends the commands of a client that goes away", with_server(function(info, made)
        local vm = assert(attached.attach(info))
        assert(vm:spawn { argv = { "flood" } })
        assert(vm:spawn { argv = { "take" } })
        vm:close()
        local deadline = loop.now() + PATIENCE
        while not (made.procs[1].closed and made.procs[2].closed) do
            assert(loop.now() < deadline, "they go on")
            loop.sleep(0.01)
        end
        still_answers(info)
    end))

    it("hands out a VM's traffic until the client has enough", with_server(function(info, made)
        local vm <close> = assert(attached.attach(info))
        local none, err = vm:capture { card = 9 }
        none, err = none and none:read(), err or select(2, none:read())
        assert.is_nil(none)
        assert.matches("no such card", err)
        local capture = assert(vm:capture())
        for _ = 1, 3 do
            assert.equal("piece", (capture:read()))
        end
        capture:close()
        local deadline = loop.now() + PATIENCE
        while not made.captured.closed do
            assert(loop.now() < deadline, "it goes on")
            loop.sleep(0.01)
        end
        still_answers(info)
    end))

    it("drops whoever breaks the protocol, and goes on", with_server(function(info)
        local window = control.WINDOW
        local cases = {
            "GET / HTTP/1.1\r\n\r\n" .. ("x"):rep(64),
            string.pack("<I4", 0xffffffff),
            string.pack("<s4", "\xc1"),
            frame "text",
            frame {},
            frame { 1, "open" },
            frame { 5, "open", "stats", {} },
            frame { 1, "data", "stdin", "x" },
            frame { 1, "open", "exec", { argv = { "take" }, stdin = true } } .. frame { 1, "data", "other", "x" },
            frame { 1, "open", "exec", { argv = { "take" } } } .. frame { 1, "credit", "stdout", window },
            frame { 1, "open", "exec", { argv = { "take" } } } .. frame { 1, "credit", "stdout", -1 },
            frame { 1, "open", "exec", { argv = { "take" } } } .. frame { 1, "done", true, true },
            frame { 1, "open", "exec", { argv = { "take" } } } .. frame { 1, "eof", "stdin" }
                .. frame { 1, "data", "stdin", "late" },
            frame { 1, "open", "exec", { argv = { "take" } } }
                .. frame { 1, "data", "stdin", ("x"):rep(window) }
                .. frame { 1, "data", "stdin", ("x"):rep(window) } .. frame { 1, "data", "stdin", "x" }
                .. frame { 1, "data", "stdin", ("x"):rep(window) },
        }
        for i, bytes in ipairs(cases) do
            local pipe = raw(info)
            pipe:write(bytes)
            assert.is_true(until_closed(pipe), "case " .. i .. " was taken")
        end
        still_answers(info)
    end))

    it("answers nonsense that keeps to the protocol with an error", with_server(function(info)
        local vm <close> = assert(attached.attach(info))
        for _, case in ipairs {
            { "no-such", {}, "no such request" },
            { "exec", 5, "expected a table" },
            { "exec", { argv = 5 }, "argv: expected a table" },
            { "exec", { argv = { "x" }, odd = 1 }, "unknown option 'odd'" },
            { "exec", { argv = { "x" }, tty = "yes" }, "tty: expected a boolean" },
            { "write_file", {}, "path: expected a string" },
            { "attach", {}, "no command" },
            { "logs", {}, "only a detached VM" },
            { "kill", { signal = 15 }, "no command" },
        } do
            local res, err = vm.conn:call(case[1], case[2], PATIENCE)
            assert.is_nil(res)
            assert.truthy(err:find(case[3], 1, true), case[1] .. ": " .. err)
        end
    end))

    it("takes a half frame, silence and a reset without harm", with_server(function(info)
        local half, silent = raw(info), raw(info)
        half:write(frame({ 1, "open", "stats", {} }):sub(1, 7))
        loop.sleep(0.01)
        half:close()
        still_answers(info)
        silent:close()
        still_answers(info)
    end))

    it("bounds what a client that never reads makes it hold", with_server(function(info, _, server)
        local pipe = raw(info)
        local many = {}
        for i = 1, 20000 do
            many[i] = frame { i, "open", "inspect", {} }
        end
        pipe:write(table.concat(many))
        local worst, deadline = 0, loop.now() + 2
        while loop.now() < deadline do
            for client in pairs(server.endpoint.clients) do
                worst = math.max(worst, client.stream:get_write_queue_size())
            end
            still_answers(info)
        end
        assert.is_true(worst < 4 << 20, worst)
        pipe:close()
    end))

    it("tells requests under way why they end", with_server(function(info, _, server)
        local vm <close> = assert(attached.attach(info))
        local proc = assert(vm:spawn { argv = { "take" } })
        local task = loop.spawn(function()
            return proc:wait()
        end)
        loop.sleep(0.01)
        server:close()
        local exit, err = task:join(PATIENCE)
        assert.is_nil(exit)
        assert.matches("has ended", err)
    end))
end)
