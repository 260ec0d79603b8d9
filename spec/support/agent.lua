-- SPDX-License-Identifier: Apache-2.0
--
-- The agent as an ordinary process on one end of a socket pair, and a scripted
-- peer for what a hostile one might say.

local agent = require "sm.agent"
local loop = require "sm.loop"
local socket = require "sm.socket"
local uv = require "luv"
local wire = require "sm.wire"

local M = {}

M.init = (os.getenv("SM_BUILD") or "build") .. "/guest/init"

function M.is_root()
    return uv.getuid() == 0
end

local function socketpair()
    return table.unpack(assert(uv.socketpair("stream", nil, { nonblock = true }, {})))
end

--- Run the agent; `prefix` is a command to run it under (unshare …).
--- Returns our end of its connection and the process { pid, exited, code }.
function M.spawn(opts)
    opts = opts or {}
    local ours, theirs = socketpair()
    local command, args = M.init, { "--fd", "3" }
    if opts.root then
        args[3], args[4] = "--root", opts.root
    end
    if opts.prefix then
        table.insert(args, 1, command)
        for i = #opts.prefix, 2, -1 do
            table.insert(args, 1, opts.prefix[i])
        end
        command = opts.prefix[1]
    end
    local process = { waiting = {} }
    process.handle, process.pid = uv.spawn(command, {
        args = args,
        stdio = { nil, nil, (opts.quiet == false or os.getenv("SM_AGENT_LOG")) and 2 or nil, theirs },
    }, loop.guard(function(code, signal)
        process.handle:close()
        process.exited, process.code, process.signal = true, code, signal
        loop.wake(process.waiting)
    end))
    uv.fs_close(theirs)
    assert(process.handle, process.pid)
    return ours, process
end

--- Run the agent and take its connection; boot it unless `boot` is false.
--- Returns the accepted connection and the process.
function M.start(opts)
    opts = opts or {}
    local ours, process = M.spawn(opts)
    local a = assert(agent.accept(ours, { timeout = 10, on_error = opts.on_error }))
    if opts.boot ~= false then
        assert(a:boot { hostname = "spec" })
    end
    return a, process
end

function M.wait_exit(process, timeout)
    while not process.exited do
        assert(loop.wait_in(process.waiting, timeout or 10), "the agent did not exit")
    end
    return process.code
end

--- Run `fn(a, process)` against a fresh agent, which must end cleanly after.
function M.with(opts, fn)
    loop.run(function()
        local a, process = M.start(opts)
        local ok, err = xpcall(fn, debug.traceback, a, process)
        if not a.dead then
            a:close()
        end
        local code = M.wait_exit(process)
        assert(ok, err)
        assert(code == 0 and process.signal == 0, "the agent ended badly: " .. code)
    end)
end

function M.frame(kind, chan, payload, flags)
    payload = payload or ""
    return string.pack(wire.HEADER, #payload, kind, flags or 0, chan or 0) .. payload
end

M.hello = M.frame(wire.HELLO, 0, wire.field_u32(1, wire.VERSION) .. wire.field_u32(2, 0))

--- A scripted peer: returns the connection and `say(bytes)`, after HELLO.
function M.fake(opts)
    local ours, theirs = socketpair()
    local peer = socket.new(theirs)
    peer:read_start(function() end)
    peer:write(M.hello)
    local a = assert(agent.accept(ours, opts))
    return a, function(bytes)
        peer:write(bytes)
    end, peer
end

--- A temporary folder, removed with all it holds when the variable closes.
function M.folder()
    local path = assert(uv.fs_mkdtemp((os.getenv("TMPDIR") or "/tmp") .. "/sm-spec-XXXXXX"))
    return setmetatable({ path = path }, { __close = function()
        os.execute("rm -rf '" .. path .. "'")
    end })
end

return M
