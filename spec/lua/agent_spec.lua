-- SPDX-License-Identifier: Apache-2.0
--
-- The agent's protocol, natively: the real agent as an ordinary process. What
-- needs a machine (mounts, root, power) is in spec/kvm.

local loop = require "sm.loop"
local machine = require "sm.machine"
local support = require "support.agent"
local uv = require "luv"

local function sh(a, script, opts)
    opts = opts or {}
    opts.argv = { "sh", "-c", script }
    return a:exec(opts)
end

local function rss_bytes()
    local file <close> = assert(io.open("/proc/self/statm"))
    return select(2, file:read("n", "n")) * 4096
end

describe("the agent: dials", function()
    -- A listener that gives these streams, one after another.
    local function listener(streams)
        return { accept = function(timeout)
            local stream = table.remove(streams, 1)
            if not stream then
                loop.sleep(timeout)
            end
            return stream, not stream and "timeout" or nil
        end }
    end
    local function broken()
        local ours, theirs = table.unpack(assert(uv.socketpair("stream", nil, { nonblock = true }, {})))
        uv.fs_close(theirs)
        return ours
    end

    it("that break before a word are followed by the next", function()
        loop.run(function()
            local stream, process = support.spawn()
            local a <close> = assert(machine.await_agent({ listener = listener { broken(), broken(), stream } }, 20))
            assert(a:boot { hostname = "spec" })
            assert.equal(0, sh(a, "exit 0").status)
            a:close()
            support.wait_exit(process)
        end)
    end)

    it("are waited for as long as was said, and no longer", function()
        loop.run(function()
            local a, err = machine.await_agent({ listener = listener { broken() } }, 0.1)
            assert.is_nil(a)
            assert.equal("timeout", err)
        end)
    end)
end)

describe("the agent: exit status", function()
    it("reports the exit code, and 128+n for a signal", function()
        support.with(nil, function(a)
            assert.equal(0, sh(a, "exit 0").status)
            assert.equal(7, sh(a, "exit 7").status)
            local killed = sh(a, "kill -9 $$")
            assert.equal(137, killed.status)
            assert.equal("KILL", killed.signal)
            assert.equal(143, sh(a, "kill -TERM $$").status)
            assert.is_nil(sh(a, "exit 130").signal)
        end)
    end)

    it("tells not found (127) from not executable (126)", function()
        support.with(nil, function(a)
            local dir <close> = support.folder()
            local script = dir.path .. "/no-magic"
            assert(a:write_file(script, "not a program", { mode = 493 }))
            for _, case in ipairs({
                { "no-such-command", 127, "no such file" },
                { "/no/such/file", 127, "no such file" },
                { "/etc/passwd/x", 127, "not a directory" },
                { "", 127, "no such file" },
                { "/etc/passwd", 126, "permission denied" },
                { "/etc", 126, "permission denied" },
                { script, 126, "exec format error" },
            }) do
                local r, err, failure = a:exec { argv = { case[1] } }
                assert.is_nil(r)
                assert.equal(case[2], failure.status, case[1])
                assert.equal("exec", failure.stage)
                assert.matches(case[3], err)
            end
        end)
    end)

    it("measures duration, peak memory and processor time", function()
        support.with(nil, function(a)
            local r = sh(a, "dd if=/dev/zero of=/dev/null bs=24M count=1 2>/dev/null")
            assert.equal(0, r.status)
            assert.is_true(r.max_rss > 24 << 20, "peak " .. r.max_rss)
            assert.is_true(r.duration > 0)
            assert.is_true(r.user_time + r.system_time <= r.duration * 8)
        end)
    end)
end)

describe("the agent: environment", function()
    it("gives exactly the variables asked for, and sane defaults", function()
        support.with(nil, function(a)
            local r = a:exec { argv = { "env" }, env = { A = "1", B = "two words", C = "" } }
            local seen = {}
            for line in r.stdout:gmatch("[^\n]+") do
                local k, v = line:match("^([^=]+)=(.*)$")
                seen[k] = v
            end
            assert.equal("1", seen.A)
            assert.equal("two words", seen.B)
            assert.equal("", seen.C)
            assert.matches("/usr/bin", seen.PATH)
            assert.is_string(seen.HOME)
            seen.A, seen.B, seen.C, seen.PATH, seen.HOME = nil, nil, nil, nil, nil
            assert.same({}, seen)
        end)
    end)

    it("searches the PATH that the command is given", function()
        support.with(nil, function(a)
            local dir <close> = support.folder()
            assert(a:write_file(dir.path .. "/tool", "#!/bin/sh\necho found\n", { mode = 493 }))
            local r = a:exec { argv = { "tool" }, env = { PATH = "/nowhere:" .. dir.path } }
            assert.equal("found\n", r.stdout)
            local _, _, failure = a:exec { argv = { "tool" }, env = { PATH = "/nowhere" } }
            assert.equal(127, failure.status)
        end)
    end)

    it("starts in the folder asked for and makes it when missing", function()
        support.with(nil, function(a)
            local dir <close> = support.folder()
            local deep = dir.path .. "/not/there yet"
            assert.equal(deep .. "\n", a:exec { argv = { "pwd" }, cwd = deep }.stdout)
            assert.equal("/\n", a:exec { argv = { "pwd" } }.stdout)
            local r, err, failure = a:exec { argv = { "pwd" }, cwd = "/etc/passwd" }
            assert.is_nil(r)
            assert.equal("cwd", failure.stage)
            assert.matches("not a directory", err)
        end)
    end)

    it("leaves no descriptor, no signal mask and its own session", function()
        support.with(nil, function(a)
            -- Listing the folder needs one descriptor of its own.
            local r = sh(a, "ls /proc/self/fd | tr '\\n' ' '; " ..
                "grep -E '^Sig(Blk|Ign)' /proc/self/status")
            assert.matches("^0 1 2 3 ", r.stdout)
            assert.matches("SigBlk:%s+0+\n", r.stdout)
            assert.matches("SigIgn:%s+0+\n", r.stdout)
            local p = assert(a:spawn { argv = { "sh", "-c", "cut -d' ' -f 1,5,6 /proc/$$/stat" } })
            local pid, pgrp, session = p:read_all("stdout"):match("(%d+) (%d+) (%d+)")
            assert.equal(pid, pgrp)
            assert.equal(pid, session)
            assert.equal(tostring(p.pid), pid)
            p:wait()
        end)
    end)

    it("applies resource limits", function()
        support.with(nil, function(a)
            local r = sh(a, "ulimit -n; ulimit -c", { rlimits = { nofile = { 77, 99 }, core = 0 } })
            assert.equal("77\n0\n", r.stdout)
        end)
    end)
end)

describe("the agent: streams", function()
    it("keeps stdout and stderr apart", function()
        support.with(nil, function(a)
            local r = sh(a, "echo out; echo err >&2; echo out2")
            assert.equal("out\nout2\n", r.stdout)
            assert.equal("err\n", r.stderr)
        end)
    end)

    it("gives end-of-file on stdin unless there is some", function()
        support.with(nil, function(a)
            assert.equal("", a:exec { argv = { "cat" } }.stdout)
            assert.equal("hello", a:exec { argv = { "cat" }, stdin = "hello" }.stdout)
            assert.equal("", a:exec { argv = { "cat" }, stdin = "" }.stdout)
        end)
    end)

    it("passes 64 MiB through unchanged, with the client's memory flat", function()
        support.with(nil, function(a)
            local dir <close> = support.folder()
            local from, to = dir.path .. "/from", dir.path .. "/to"
            os.execute("head -c 64M /dev/urandom > " .. from)
            local input <close> = assert(io.open(from, "rb"))
            local output <close> = assert(io.open(to, "wb"))
            collectgarbage()
            local before, peak, pieces = rss_bytes(), 0, 0
            local r = assert(a:exec {
                argv = { "cat" },
                stdin = function()
                    return input:read(65536)
                end,
                stdout = function(piece)
                    output:write(piece)
                    pieces = pieces + 1
                    if pieces % 64 == 0 then
                        peak = math.max(peak, rss_bytes())
                    end
                end,
            })
            output:close()
            assert.equal(0, r.status)
            local sums = io.popen("sha256sum < " .. from .. "; sha256sum < " .. to)
            local one, two = sums:read("l", "l")
            sums:close()
            assert.equal(one, two)
            assert.is_true(peak - before < 12 << 20, ("grew by %d KiB"):format((peak - before) // 1024))
        end)
    end)

    it("a reader that stops stalls only its own stream", function()
        support.with(nil, function(a)
            local stalled = assert(a:spawn { argv = { "sh", "-c", "yes & yes >&2" } })
            -- Its window fills and stays full; another command passes 4 MiB.
            local r = sh(a, "head -c 4194304 /dev/zero | cat; echo done >&2")
            assert.equal(4194304, #r.stdout)
            assert.equal("done\n", r.stderr)
            -- stderr of the same process flows while its stdout does not.
            local got = 0
            while got < 1 << 20 do
                got = got + #assert(stalled:read("stderr"))
            end
            local held = 0
            for i = stalled.streams[1].first, stalled.streams[1].last do
                held = held + #stalled.streams[1][i]
            end
            assert.equal(stalled.streams[1].window, held)
            stalled:close()
            assert.equal("KILL", stalled:wait(10).signal)
        end)
    end)

    it("a writer waits for a process that does not read, and hears when it has gone", function()
        support.with(nil, function(a)
            local p = assert(a:spawn { argv = { "sh", "-c", "exec <&-; echo closed; sleep 60" },
                stdin = true })
            assert.equal("closed\n", p:read("stdout"))
            local ok, err = p:write(("x"):rep(1 << 20))
            assert.is_nil(ok)
            assert.equal("broken pipe", err)
            p:close()
            local q = assert(a:spawn { argv = { "sleep", "60" }, stdin = true })
            local writer = loop.spawn(q.write, q, ("x"):rep(1 << 20))
            assert.same({ nil, "timeout" }, { writer:join(0.1) })
            q:signal("KILL")
            ok, err = writer:join(10)
            assert.is_nil(ok)
            assert.equal("broken pipe", err)
        end)
    end)

    it("ends with the process, and does not kill what is left behind by closing its streams", function()
        support.with(nil, function(a)
            local dir <close> = support.folder()
            local fifo, result = dir.path .. "/go", dir.path .. "/result"
            os.execute("mkfifo " .. fifo .. " " .. result)
            local r = sh(a, ("(read x < %s; echo late; echo $? > %s) & echo now"):format(fifo, result))
            assert.equal("now\n", r.stdout)
            local waiter = loop.spawn(function()
                return sh(a, "cat " .. result)
            end)
            sh(a, "echo go > " .. fifo)
            assert.equal("0\n", waiter:join(10).stdout)
        end)
    end)

    it("bounds what it keeps of a large output", function()
        support.with(nil, function(a)
            local r = sh(a, "head -c 1000000 /dev/zero", { limit = 5000 })
            assert.equal(5000, #r.stdout)
            assert.is_true(r.truncated)
            assert.is_false(sh(a, "echo small", { limit = 5000 }).truncated)
        end)
    end)
end)

describe("the agent: terminals", function()
    local function read_until(p, pattern)
        local text = ""
        while not text:find(pattern) do
            local piece, err = p:read("stdout", 10)
            assert(piece, (err or "ended") .. " after: " .. text)
            text = text .. piece
        end
        return text
    end

    it("gives a controlling terminal of the size asked for", function()
        support.with(nil, function(a)
            local r = a:exec { argv = { "sh", "-c", "test -t 0 && test -t 1 && test -t 2 && " ..
                "stty size < /dev/tty && echo $TERM" }, tty = true, rows = 31, cols = 117 }
            assert.equal("31 117\r\nxterm\r\n", r.stdout)
            assert.is_nil(r.stderr)
            assert.equal(0, r.status)
        end)
    end)

    it("tells the process of a new size", function()
        support.with(nil, function(a)
            local p = assert(a:spawn { argv = { "sh", "-c",
                "trap 'stty size; exit 3' WINCH; echo ready; sleep 60 & wait" },
                tty = true, rows = 24, cols = 80 })
            read_until(p, "ready")
            p:resize(42, 123)
            read_until(p, "42 123")
            assert.equal(3, p:wait(10).status)
        end)
    end)

    it("Ctrl-C ends the foreground process", function()
        support.with(nil, function(a)
            local p = assert(a:spawn { argv = { "sh", "-c", "echo ready; exec sleep 60" },
                tty = true })
            read_until(p, "ready")
            p:write("\3")
            assert.equal("INT", p:wait(10).signal)
            assert.equal(130, p.exit.status)
        end)
    end)

    it("line editing and end-of-file are the terminal's", function()
        support.with(nil, function(a)
            local p = assert(a:spawn { argv = { "cat" }, tty = true })
            p:write("helo\127lo\n")
            read_until(p, "\nhello\r\n")
            p:close_stdin()
            assert.equal(0, p:wait(10).status)
        end)
    end)
end)

describe("the agent: signals and time", function()
    it("signals a process or its group", function()
        support.with(nil, function(a)
            local p = assert(a:spawn { argv = { "sh", "-c", "trap 'exit 9' USR1; echo ready; " ..
                "sleep 60 & wait" } })
            assert.equal("ready\n", p:read("stdout", 10))
            p:signal("USR1")
            assert.equal(9, p:wait(10).status)
            local q = assert(a:spawn { argv = { "sh", "-c", "sleep 60; echo not reached" } })
            q:signal("SIGKILL", true)
            assert.equal(137, q:wait(10).status)
        end)
    end)

    it("ends what runs too long: TERM, then KILL", function()
        support.with(nil, function(a)
            local r = sh(a, "echo begun; sleep 60", { timeout = 0.2 })
            assert.is_true(r.timed_out)
            assert.equal("TERM", r.signal)
            assert.equal("begun\n", r.stdout)
            r = sh(a, "trap '' TERM; echo begun; while :; do sleep 1; done",
                { timeout = 0.2, grace = 0.1 })
            assert.is_true(r.timed_out)
            assert.equal("KILL", r.signal)
            assert.is_false(sh(a, "true", { timeout = 10 }).timed_out)
        end)
    end)

    it("a cancelled exec leaves no process", function()
        support.with(nil, function(a)
            local dir <close> = support.folder()
            local task = loop.spawn(function()
                return sh(a, "echo $$ > " .. dir.path .. "/pid; exec sleep 60")
            end)
            local pid
            repeat
                pid = sh(a, "cat " .. dir.path .. "/pid 2>/dev/null").stdout:match("%d+")
            until pid
            local _, p = next(a.chans)
            task:cancel()
            assert(p:wait_for(function()
                return p.exit
            end, 10))
            assert.equal("KILL", p.exit.signal)
            assert.is_nil(uv.fs_stat("/proc/" .. pid))
        end)
    end)

    it("refuses a signal nobody knows", function()
        support.with(nil, function(a)
            local p = assert(a:spawn { argv = { "sleep", "60" } })
            assert.has_error(function()
                p:signal("NOSUCH")
            end)
            p:close()
        end)
    end)
end)

describe("the agent: files", function()
    it("writes and reads files with their modes", function()
        support.with(nil, function(a)
            local dir <close> = support.folder()
            local path = dir.path .. "/made/for/it/file"
            local info = assert(a:write_file(path, "content\0with zero", { mode = 416 }))
            assert.equal(416, info.mode) -- 0640
            assert.equal(17, info.size)
            local data, got = a:read_file(path)
            assert.equal("content\0with zero", data)
            assert.equal(416, got.mode)
            assert(a:write_file(path, "more", { append = true }))
            assert.equal("content\0with zeromore", (a:read_file(path)))
            assert(a:write_file(path, ""))
            assert.equal("", (a:read_file(path)))
        end)
    end)

    it("carries files larger than its windows", function()
        support.with(nil, function(a)
            local dir <close> = support.folder()
            local data = {}
            for i = 1, 48 do
                data[i] = string.char(i):rep(65521)
            end
            data = table.concat(data)
            assert(a:write_file(dir.path .. "/big", data))
            assert.is_true(data == a:read_file(dir.path .. "/big"))
            local size = 0
            assert(a:read_file(dir.path .. "/big", { sink = function(piece)
                size = size + #piece
                loop.sleep(0)
            end }))
            assert.equal(#data, size)
            local none, err = a:read_file(dir.path .. "/big", { limit = 1000 })
            assert.is_nil(none)
            assert.matches("larger than 1000 bytes", err)
        end)
    end)

    it("says what is wrong, and leaves nothing half-made", function()
        support.with(nil, function(a)
            local dir <close> = support.folder()
            os.execute("mkfifo " .. dir.path .. "/fifo")
            for _, case in ipairs({
                { dir.path, "is a directory" },
                { dir.path .. "/fifo", "no such device" },
                { "/etc/passwd/x", "not a directory" },
            }) do
                local ok, err = a:write_file(case[1], "x")
                assert.is_nil(ok)
                assert.matches(case[2], err)
            end
            local ok, err = a:read_file(dir.path .. "/none")
            assert.is_nil(ok)
            assert.matches("no such file", err)
            assert.is_nil((a:read_file(dir.path)))
            ok, err = a:write_file("/dev/full", "x")
            assert.is_nil(ok)
            assert(a:write_file(dir.path .. "/one", "1", { exclusive = true }))
            ok, err = a:write_file(dir.path .. "/one", "2", { exclusive = true })
            assert.is_nil(ok)
            assert.matches("file exists", err)
            assert.equal("1", (a:read_file(dir.path .. "/one")))
        end)
    end)

    it("staged files, a command and a chained second one take one round trip", function()
        support.with(nil, function(a)
            local dir <close> = support.folder()
            local tool = dir.path .. "/tool"
            local r = assert(a:exec {
                files = {
                    [tool] = { data = "#!/bin/sh\ncat " .. dir.path .. "/in > " .. dir.path .. "/out\n",
                        mode = 493 },
                    [dir.path .. "/in"] = "staged",
                },
                argv = { tool },
                chain = { argv = { "cat", dir.path .. "/out" } },
            })
            assert.equal(0, r.status)
            assert.equal("staged", r.chain.stdout)
        end)
    end)

    it("a chain stops at the first failure", function()
        support.with(nil, function(a)
            local dir <close> = support.folder()
            local mark = dir.path .. "/mark"
            local r = assert(sh(a, "exit 3", { chain = { argv = { "touch", mark } } }))
            assert.equal(3, r.status)
            assert.is_nil(r.chain)
            assert.is_nil(uv.fs_stat(mark))
            local none, err = a:exec { files = { ["/etc/passwd/x"] = "x" }, argv = { "touch", mark } }
            assert.is_nil(none)
            assert.matches("/etc/passwd/x: not a directory", err)
            assert.is_nil(uv.fs_stat(mark))
        end)
    end)
end)

describe("the agent: many at once", function()
    it("runs 100 commands side by side", function()
        support.with(nil, function(a)
            local tasks = {}
            for i = 1, 100 do
                tasks[i] = loop.spawn(function()
                    return sh(a, "cat; echo " .. i .. " >&2; exit " .. i, { stdin = ("x"):rep(i * 100) })
                end)
            end
            for i = 1, 100 do
                local r = tasks[i]:join(60)
                assert.equal(i, r.status)
                assert.equal(i * 100, #r.stdout)
                assert.equal(i .. "\n", r.stderr)
            end
            assert.is_nil(next(a.chans))
        end)
    end)

    it("uses its channel numbers again", function()
        support.with(nil, function(a)
            a.next_id = 65530
            for _ = 1, 12 do
                assert.equal(0, sh(a, "true").status)
            end
        end)
    end)
end)

describe("the agent: the end", function()
    it("says goodbye with the main command's exit code", function()
        support.with(nil, function(a, process)
            local p = assert(a:spawn { argv = { "sh", "-c", "echo bye; exit 5" }, main = true })
            assert.equal("bye\n", p:read_all("stdout"))
            local bye = assert(a:wait_goodbye(10))
            assert.equal("exited", bye.reason)
            assert.equal(5, bye.code)
            assert.equal(0, support.wait_exit(process))
        end)
    end)

    it("delivers all output of the main command before goodbye", function()
        support.with(nil, function(a)
            local p = assert(a:spawn { argv = { "head", "-c", "300000", "/dev/zero" }, main = true })
            assert.equal(0, p:wait(10).status)
            -- The window is full and nobody reads: no goodbye yet.
            assert.same({ nil, "agent: timeout" }, { a:wait_goodbye(0.1) })
            assert.equal(300000, #p:read_all("stdout"))
            assert.equal("exited", a:wait_goodbye(10).reason)
        end)
    end)

    it("ends with 127 when the main command does not exist", function()
        support.with(nil, function(a)
            local p, err = a:spawn { argv = { "no-such-command" }, main = true }
            assert.is_nil(p)
            assert.matches("no such file", err)
            assert.equal(127, a:wait_goodbye(10).code)
        end)
    end)

    it("shutdown asks the main command by its stop signal, then kills", function()
        support.with(nil, function(a)
            local p = assert(a:spawn { argv = { "sh", "-c", "trap 'exit 4' QUIT; echo ready; " ..
                "sleep 60 & wait" }, main = true, stop_signal = "QUIT" })
            p:read("stdout", 10)
            a:shutdown { grace = 10 }
            local bye = a:wait_goodbye(10)
            assert.same({ "exited", 4 }, { bye.reason, bye.code })
        end)
        support.with(nil, function(a)
            local p = assert(a:spawn { argv = { "sh", "-c", "trap '' TERM; echo ready; " ..
                "while :; do sleep 1; done" }, main = true })
            p:read("stdout", 10)
            a:shutdown { grace = 0.1 }
            local bye = a:wait_goodbye(10)
            assert.same({ "exited", 137 }, { bye.reason, bye.code })
        end)
    end)

    it("shutdown without a main command is a poweroff", function()
        support.with(nil, function(a)
            local p = assert(a:spawn { argv = { "sleep", "60" } })
            a:shutdown { grace = 5 }
            assert.equal("poweroff", a:wait_goodbye(10).reason)
            assert.equal("TERM", p.exit.signal)
        end)
    end)

    it("understands how poweroff, reboot and halt speak to PID 1", function()
        for signal, reason in pairs({
            USR1 = "poweroff", USR2 = "poweroff", TERM = "reboot", INT = "reboot",
            ["RTMIN+3"] = "poweroff", ["RTMIN+4"] = "poweroff", ["RTMIN+5"] = "reboot",
        }) do
            support.with(nil, function(a, process)
                os.execute(("kill -s %s %d"):format(
                    signal:match("^RTMIN%+(%d)") and 34 + signal:match("%d") or signal, process.pid))
                assert.equal(reason, a:wait_goodbye(10).reason, signal)
            end)
        end
    end)

    it("after goodbye a request fails with a reason", function()
        support.with(nil, function(a)
            a:shutdown()
            a:wait_goodbye(10)
            local r, err = sh(a, "true")
            assert.is_nil(r)
            assert.matches("agent: ", err)
        end)
    end)

    it("kills its commands when the connection breaks", function()
        support.with(nil, function(a, process)
            local p = assert(a:spawn { argv = { "sleep", "60" } })
            a:close()
            support.wait_exit(process)
            assert.is_nil(uv.fs_stat("/proc/" .. p.pid))
            local exit, err = p:wait(1)
            assert.is_nil(exit)
            assert.equal("agent: closed", err)
        end)
    end)
end)

describe("the agent: options", function()
    it("refuses what it does not know by name", function()
        support.with(nil, function(a)
            for _, try in ipairs({
                function() a:exec { argv = { "true" }, enviroment = {} } end,
                function() a:spawn { argv = { "true" }, timeout = 1 } end,
                function() a:write_file("/tmp/x", "", { perm = 1 }) end,
                function() a:exec { argv = {} } end,
                function() a:exec { argv = { "a\0b" } } end,
                function() a:exec { argv = { "true" }, rlimits = { nosuch = 1 } } end,
                function() a:write_file("relative", "") end,
            }) do
                assert.has_error(try)
            end
            -- None of these mistakes left a channel behind.
            assert.is_nil(next(a.chans))
            assert.equal(0, sh(a, "true").status)
        end)
    end)

    it("carries long command lines and large environments", function()
        support.with(nil, function(a)
            local long = ("y"):rep(100000)
            local env = {}
            for i = 1, 2000 do
                env["V" .. i] = ("z"):rep(200)
            end
            local r = a:exec { argv = { "sh", "-c", "printf %s $1 | wc -c; env | grep -c ^V", "sh", long },
                env = env }
            assert.equal("100000\n2000\n", r.stdout)
            local none, err, failure = a:exec { argv = { "echo", ("x"):rep(3 << 20) } }
            assert.is_nil(none)
            assert.matches("argument list too long", err)
            assert.equal(126, failure.status)
            none, err = a:exec { argv = { "echo", ("x"):rep(5 << 20) } }
            assert.is_nil(none)
            assert.matches("the limit is", err)
        end)
    end)

    it("is told who it is after a redial, and only once it has booted", function()
        support.with({ boot = false }, function(a)
            local ok, err = a:resume { hostname = "copy" }
            assert.is_nil(ok)
            assert.equal("resume: the guest was never set up", err)
        end)
        support.with({}, function(a)
            assert.is_true(a:resume {
                hostname = "copy", hosts = "127.0.0.1 copy\n", resolv = "", machine_id = ("0a"):rep(16), timeout = 10,
            })
            assert.is_true(a:resume {}) -- a copy of a copy
            local ok, err = a:resume { machine_id = "short" }
            assert.is_nil(ok)
            assert.matches("^resume: RESUME: ", err)
            assert.is_false(pcall(a.resume, a, { root = "tmpfs" }))
        end)
    end)

    it("freezes nothing outside of a machine, nor where it is too old for that", function()
        support.with({}, function(a)
            local ok, err = a:freeze(10)
            assert.is_nil(ok)
            assert.equal("freeze: not supported", err)
            assert.equal(0, sh(a, "true").status)
            a.hello.version = 1
            ok, err = a:freeze(10)
            assert.is_nil(ok)
            assert.matches("older", err)
        end)
    end)

    it("fails requests before boot, and boots once", function()
        support.with({ boot = false }, function(a)
            local r, err = sh(a, "true")
            assert.is_nil(r)
            assert.matches("not booted", err)
            local marks = assert(a:boot { hostname = "x" })
            for _, name in ipairs({ "init", "hello", "boot", "booted" }) do
                assert.is_number(marks[name])
            end
            assert.is_true(marks.booted >= marks.boot and marks.boot >= marks.init)
            assert.equal(0, sh(a, "true").status)
            assert.is_nil((a:boot {}))
            assert.is_true(a:ping(10) >= 0)
        end)
    end)
end)
