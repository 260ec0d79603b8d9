-- SPDX-License-Identifier: Apache-2.0
--
-- VMs of other processes: the list of them, and a handle to one that has the
-- methods of a VM of one's own. A handle is a connection; closing it lets go of
-- the VM and does not end it.

local check = require "sm.check"
local uv = require "luv"
local control = require "sm.control"
local loop = require "sm.loop"
local rundir = require "sm.rundir"
local socket = require "sm.socket"
local wire = require "sm.wire"

local M = {}

local CONNECT_SECONDS = 30

---@class sm.AttachedVM
---@field id string
---@field info table what `sm.vms` says of it
---@field package lease sm.ControlChannel? of the pool that has lent it
local VM = {}
VM.__index = VM
VM.__name = "sm.AttachedVM"

function VM:__tostring()
    return ("vm %s (%s)"):format(self.id, self.conn.dead and "let go" or "attached")
end

--- The VMs of this user, the newest first: { id, image, status = "running"|
--- "exited", code, created, started, finished, command, owner, worker, cpus,
--- memory, detached, dir … }. Yields.
---@async
---@return table[]?
---@return string? err
function M.list()
    return rundir.list()
end

--- What is known of a VM, by its name or the beginning of it. Yields.
---@async
---@param name string
---@return table?
---@return string? err
function M.find(name)
    local list, err = rundir.list()
    if not list then
        return nil, err
    end
    local found
    for _, info in ipairs(list) do
        if info.id == name then
            return info
        elseif info.id:sub(1, #name) == name then
            if found then
                return nil, ("'%s' is the beginning of more than one VM's name"):format(name)
            end
            found = info
        end
    end
    if not found or name == "" then
        return nil, ("no VM named '%s'"):format(name)
    end
    return found
end

--- Connect to a control socket. Yields.
---@async
---@param path string
---@return userdata? stream
---@return string? err
function M.connect(path)
    local pipe = uv.new_pipe(false)
    local ok, err = loop.await(function(settle)
        pipe:connect(path, loop.guard(function(why)
            if why then
                settle(nil, why)
            else
                settle(true)
            end
        end))
    end, CONNECT_SECONDS)
    if not ok then
        if not pipe:is_closing() then
            pipe:close()
        end
        return nil, err
    end
    return socket.new(pipe)
end

--- Connect to a running VM of another process. Yields.
---@async
---@param name string|table a name, the beginning of one, or what `list` gave
---@return sm.AttachedVM?
---@return string? err
function M.attach(name)
    local info, err = name, nil
    if type(name) ~= "table" then
        info, err = M.find(name)
        if not info then
            return nil, err
        end
    end
    if info.status ~= "running" then
        return nil, ("the VM '%s' is not running"):format(info.id)
    end
    local stream
    stream, err = M.connect(info.dir .. "/control.sock")
    if not stream then
        return nil, ("the VM '%s' does not answer: %s"):format(info.id, err)
    end
    return setmetatable({ id = info.id, info = info, conn = control.new(stream) }, VM)
end

--- Let go of the VM; one that a pool has lent is given back. Idempotent.
function VM:close()
    self.conn:close()
    if self.lease then
        self.lease:close()
    end
end
VM.__close = VM.close

-- --------------------------------------------------------------- processes

---@class sm.AttachedProcess
---@field pid integer?
local Process = {}
Process.__index = Process

--- Write to standard input; waits while the process does not read. Yields.
---@async
---@param data string
---@return true? ok
---@return string? err
function Process:write(data)
    check("attached_proc:write", 1, data, "data", "string")
    return self.chan:write("stdin", data)
end

--- End of standard input.
function Process:close_stdin()
    self.chan:finish "stdin"
end

--- The next piece of "stdout" or "stderr"; nil at the end. Yields.
---@async
---@param name? "stdout"|"stderr"
---@param timeout number? seconds
---@return string? piece
---@return string? err
function Process:read(name, timeout)
    check("attached_proc:read", 1, name, "name", "string?")
    check("attached_proc:read", 2, timeout, "timeout", "number?")
    return self.chan:read(name or "stdout", timeout)
end

--- All that is left of a stream. Yields.
---@async
---@param name? "stdout"|"stderr"
---@return string? data
---@return string? err
function Process:read_all(name)
    check("attached_proc:read_all", 1, name, "name", "string?")
    local parts = {}
    while true do
        local piece, err = self:read(name)
        if err then
            return nil, err
        elseif not piece then
            return table.concat(parts)
        end
        parts[#parts + 1] = piece
    end
end

--- Send a signal.
---@param signal string|integer
function Process:signal(signal)
    check("attached_proc:signal", 1, signal, "signal", "string|integer")
    self.chan:tell("signal", wire.signal_number(signal))
end

--- Tell the terminal its new size.
---@param rows integer
---@param cols integer
function Process:resize(rows, cols)
    check("attached_proc:resize", 1, rows, "rows", "integer")
    check("attached_proc:resize", 2, cols, "cols", "integer")
    self.chan:tell("resize", { rows, cols })
end

--- Wait for the end: { status, signal, duration … }. Yields.
---@async
---@param timeout number? seconds
---@return table? exit
---@return string? err
function Process:wait(timeout)
    check("attached_proc:wait", 1, timeout, "timeout", "number?")
    return self.chan:answer(timeout)
end

--- Let go: a command that still runs is killed. Idempotent.
function Process:close()
    self.chan:close()
end
Process.__close = Process.close

---@class sm.AttachedCapture
local Capture = {}
Capture.__index = Capture

--- The next piece of a pcap file; nil at the end. Yields.
---@async
---@return string? piece
---@return string? err
function Capture:read()
    local piece = self.chan:read "stdout"
    if piece then
        return piece
    end
    local result, err = self.chan:answer()
    return nil, not result and err or nil
end

--- End it. Idempotent.
function Capture:close()
    self.chan:close()
end
Capture.__close = Capture.close

--- As `capture` of a VM of one's own, without `path`. Yields.
---@async
---@param opts { card: integer? }?
---@return sm.AttachedCapture?
---@return string? err
function VM:capture(opts)
    check("attached:capture", 1, opts, "opts", "table?")
    local chan, err = self.conn:open("capture", opts or {})
    return chan and setmetatable({ chan = chan }, Capture), err
end

local SPAWN_KEYS = {
    argv = 1, env = 1, cwd = 1, user = 1, groups = 1, tty = 1, rows = 1, cols = 1, stdin = 1,
    rlimits = 1, files = 1, detach = 1,
}

--- Start a command in the VM; as `spawn` of a VM of one's own, without `main`,
--- `stop_signal` and `window`. With `detach` nobody holds it: the result is
--- { pid }. Yields.
---@async
---@param opts table
---@return sm.AttachedProcess|table|nil
---@return string? err
---@return table? failure
function VM:spawn(opts)
    check("attached:spawn", 1, opts, "opts", "table")
    wire.check_keys("spawn", opts, SPAWN_KEYS)
    local chan, err = self.conn:open("exec", opts)
    if not chan then
        return nil, err
    end
    local proc = setmetatable({ chan = chan }, Process)
    chan.on_tell = function(what, value)
        if what == "started" and type(value) == "table" then
            proc.pid = value.pid
        end
    end
    local _ <close> = setmetatable({}, { __close = function()
        if not proc.pid and not proc.chan.over then
            chan:close() -- the task that wanted it was cancelled
        end
    end })
    local failure
    chan:wait_for(function()
        return proc.pid or chan.result or chan.failure
    end)
    if proc.pid then
        return proc
    end
    local result
    result, err, failure = chan:answer()
    return result, err, failure
end

local EXEC_KEYS = setmetatable({ stdout = 1, stderr = 1, timeout = 1, grace = 1, limit = 1 }, { __index = SPAWN_KEYS })
local DEFAULT_LIMIT = 64 << 20

local function feed(proc, source)
    if type(source) == "string" then
        proc:write(source)
    else
        for piece in source do
            if not proc:write(piece) then
                break
            end
        end
    end
    proc:close_stdin()
end

-- Read a stream to its end, into a sink or a bounded string.
local function drain(proc, name, sink, limit, out)
    local parts, size = {}, 0
    while true do
        local piece = proc:read(name)
        if not piece then
            break
        elseif sink then
            sink(piece)
        else
            if size + #piece > limit then
                out.truncated = true
                piece = piece:sub(1, limit - size)
            end
            parts[#parts + 1] = piece
            size = size + #piece
        end
    end
    out[name] = not sink and table.concat(parts) or nil
end

local function await_exit(proc, opts)
    local exit, err, failure = proc:wait(opts.timeout)
    if exit or err ~= "timeout" then
        return exit, err, failure
    end
    proc:signal "TERM"
    exit = proc:wait(opts.grace or 2)
    if not exit then
        proc:signal "KILL"
        exit, err, failure = proc:wait()
    end
    if exit then
        exit.timed_out = true
    end
    return exit, err, failure
end

--- Run a command to its end; as `exec` of a VM of one's own, without `chain`.
--- Yields.
---@async
---@param opts table
---@return table? result
---@return string? err
---@return table? failure
function VM:exec(opts)
    check("attached:exec", 1, opts, "opts", "table")
    wire.check_keys("exec", opts, EXEC_KEYS)
    local start = {}
    for key in pairs(SPAWN_KEYS) do
        start[key] = opts[key]
    end
    start.stdin = (opts.stdin ~= nil and opts.stdin ~= false) or nil
    local proc, err, failure = self:spawn(start)
    if not proc then
        return nil, err, failure
    end
    local held <close> = proc
    local out, tasks = { truncated = false }, {}
    local _ <close> = setmetatable({}, { __close = function()
        for _, task in ipairs(tasks) do
            if not task:finished() then
                task:cancel()
            end
        end
    end })
    for i, name in ipairs { "stdout", "stderr" } do
        tasks[i] = loop.spawn(drain, held, name, opts[name], opts.limit or DEFAULT_LIMIT, out)
    end
    if start.stdin then
        tasks[3] = loop.spawn(feed, held, opts.stdin)
    end
    local exit
    exit, err, failure = await_exit(held, opts)
    if not exit then
        return nil, err, failure
    end
    tasks[1]:join()
    tasks[2]:join()
    exit.stdout, exit.stderr = out.stdout, not opts.tty and out.stderr or nil
    exit.timed_out, exit.truncated = exit.timed_out or false, out.truncated
    return exit
end

-- ------------------------------------------------------------------- files

--- Write a file in the guest; as `write_file` of a VM of one's own. Yields.
---@async
---@param path string absolute path in the guest
---@param data string|function the bytes, or a function that gives the next piece or nil
---@param opts table? mode, uid, gid, parents, append, exclusive
---@return table? info
---@return string? err
---@return table? failure
function VM:write_file(path, data, opts)
    check("attached:write_file", 1, path, "path", "string")
    check("attached:write_file", 2, data, "data", "string|function")
    check("attached:write_file", 3, opts, "opts", "table?")
    if type(path) ~= "string" or path:sub(1, 1) ~= "/" then
        error("write_file: path: expected an absolute path, got " .. tostring(path), 2)
    end
    local chan <close>, err = self.conn:open("write_file", { path = path, opts = opts or {} })
    if not chan then
        return nil, err
    end
    if type(data) == "string" then
        chan:write("stdin", data)
    else
        for piece in data do
            if not chan:write("stdin", piece) then
                break
            end
        end
    end
    chan:finish "stdin"
    return chan:answer()
end

--- Read a file of the guest; as `read_file` of a VM of one's own. Yields.
---@async
---@param path string
---@param opts { sink: fun(piece: string)?, limit: integer? }?
---@return string|true|nil data
---@return string|table err_or_info
---@return table? failure
function VM:read_file(path, opts)
    check("attached:read_file", 1, path, "path", "string")
    check("attached:read_file", 2, opts, "opts", "table?")
    opts = opts or {}
    wire.check_keys("read_file", opts, { sink = 1, limit = 1 })
    local chan <close>, err = self.conn:open("read_file", { path = path })
    if not chan then
        return nil, err
    end
    local limit = opts.limit or DEFAULT_LIMIT
    local parts, size = {}, 0
    while true do
        local piece = chan:read "stdout"
        if not piece then
            break
        elseif opts.sink then
            opts.sink(piece)
        else
            size = size + #piece
            if size > limit then
                return nil, ("read_file: %s: larger than %d bytes"):format(path, limit)
            end
            parts[#parts + 1] = piece
        end
    end
    local info, failure
    info, err, failure = chan:answer()
    if not info then
        return nil, err, failure
    end
    return opts.sink and true or table.concat(parts), info
end

-- ---------------------------------------------------------------- the rest

--- Follow what a detached VM's command says: `on_piece(stream, bytes, time)`
--- is called with "stdout" or "stderr". Returns at the end of what there is, or
--- of the VM with `follow`. Yields.
---@async
---@param opts { follow: boolean?, from: string? } from "start" or "end"
---@param on_piece fun(stream: string, bytes: string)
---@return true?
---@return string? err
function VM:logs(opts, on_piece)
    check("attached:logs", 1, opts, "opts", "table")
    check("attached:logs", 2, on_piece, "on_piece", "function")
    local chan <close>, err = self.conn:open("logs", { follow = opts.follow or false, from = opts.from or "start" })
    if not chan then
        return nil, err
    end
    local errors = loop.spawn(function()
        for piece in function() return (chan:read "stderr") end do
            on_piece("stderr", piece)
        end
    end)
    local _ <close> = setmetatable({}, { __close = function()
        if not errors:finished() then
            errors:cancel()
        end
    end })
    for piece in function() return (chan:read "stdout") end do
        on_piece("stdout", piece)
    end
    errors:join()
    local ok
    ok, err = chan:answer()
    return ok and true or nil, err
end

--- Attach to the VM's own command: a process whose output begins now, and
--- whose `close` lets go of it without ending it. Yields.
---@async
---@param opts { stdin: boolean? }?
---@return sm.AttachedProcess?
---@return string? err
function VM:main(opts)
    check("attached:main", 1, opts, "opts", "table?")
    local chan, err = self.conn:open("attach", { stdin = opts and opts.stdin or false })
    if not chan then
        return nil, err
    end
    return setmetatable({ chan = chan }, Process)
end

--- Wait until the VM has ended: { code, reason, detail }. Yields.
---@async
---@param timeout number?
---@return table? outcome
---@return string? err
function VM:wait(timeout)
    check("attached:wait", 1, timeout, "timeout", "number?")
    return self.conn:call("wait", {}, timeout)
end

--- Ask the VM to end in good order, and wait for it. Yields.
---@async
---@param opts { grace: number? }?
---@return table? outcome
---@return string? err
function VM:stop(opts)
    check("attached:stop", 1, opts, "opts", "table?")
    return self.conn:call("stop", { grace = opts and opts.grace })
end

--- End the VM now; with a signal other than KILL, send it to the VM's own
--- command instead. Yields.
---@async
---@param signal string|integer|nil
---@return table|true|nil
---@return string? err
function VM:kill(signal)
    check("attached:kill", 1, signal, "signal", "string|integer?")
    return self.conn:call("kill", { signal = signal and wire.signal_number(signal) })
end

--- Keep what the VM has changed as a new layer on its image, in the store; as
--- `commit` of a VM of one's own. Yields.
---@async
---@param name string?
---@param opts { message: string?, author: string?, created_by: string?, config: table? }?
---@return table?
---@return string? err
function VM:commit(name, opts)
    check("attached:commit", 1, name, "name", "string?")
    check("attached:commit", 2, opts, "opts", "table?")
    return self.conn:call("commit", { name = name, opts = opts or {} })
end

--- Counters of the machine. Yields.
---@async
---@return table?
---@return string? err
function VM:stats()
    return self.conn:call("stats", {})
end

--- Have its owner save the VM; it goes on. Yields.
---@async
---@param opts { name: string?, path: string?, diff: boolean?, live: boolean? }
---@return { name: string?, path: string, id: string, stored: integer, pause: number }?
---@return string? err
function VM:snapshot(opts)
    check("attached:snapshot", 1, opts, "opts", "table")
    local path = opts.path
    if path and path:sub(1, 1) ~= "/" then
        path = uv.cwd() .. "/" .. path
    end
    return self.conn:call("snapshot", { name = opts.name, path = path, temporary = opts.temporary, diff = opts.diff,
        live = opts.live })
end

--- What its owner says of the VM now, as in `sm.vms`. Yields.
---@async
---@return table?
---@return string? err
function VM:inspect()
    return self.conn:call("inspect", {})
end

return M
