-- SPDX-License-Identifier: Apache-2.0
--
-- Commands in the guest: `spawn` gives a process with streams, `exec` runs one
-- to its end. Any number at once, each in its own task; they share one
-- connection and none holds up another.
--
-- A process that could not be started is `nil, "exec: …", failure`, where
-- failure.status is what a shell would exit with (127 not found, 126 cannot be
-- run) and failure.stage where it went wrong.

local check = require "sm.check"
local agent = require "sm.agent"
local channel = require "sm.channel"
local files = require "sm.guest_files"
local loop = require "sm.loop"
local wire = require "sm.wire"

local M = {}

local TTY, STDIN, MAIN, LAYER = 1, 2, 4, 8
local STREAMS = { stdout = 1, stderr = 2 }
local RLIMITS = {
    cpu = 0, fsize = 1, data = 2, stack = 3, core = 4, rss = 5, nproc = 6, nofile = 7,
    memlock = 8, as = 9, locks = 10, sigpending = 11, msgqueue = 12, nice = 13, rtprio = 14,
}
local FOREVER = -1 -- RLIM_INFINITY

---@class sm.Process : sm.Channel
---@field pid integer? the process's number in the guest
local Process = setmetatable({}, { __index = channel.Channel })
Process.__index = Process

-- ------------------------------------------------------------ from the agent

local on = {}

on[wire.STARTED] = function(self, payload)
    if self.pid or self.exit or #payload ~= 4 then
        agent.refuse("STARTED out of place (channel %d)", self.id)
    end
    self.pid = string.unpack("<I4", payload)
end

on[wire.FAILED] = function(self, payload)
    if self.pid or self.exit then
        agent.refuse("FAILED out of place (channel %d)", self.id)
    end
    self.failure = agent.failure(payload)
    self.credit = {}
    for _, s in pairs(self.streams) do
        s.eof = true
    end
    self.stdin_closed = true
    self.agent:release(self)
end

on[wire.EXIT] = function(self, payload)
    if not self.pid or self.exit or #payload ~= 40 then
        agent.refuse("EXIT out of place (channel %d)", self.id)
    end
    local code, signal, ns, rss, user_ns, system_ns = string.unpack("<I4I4i8i8i8i8", payload)
    self.exit = {
        status = signal ~= 0 and 128 + signal or code,
        signal = signal ~= 0 and wire.signal_name(signal) or nil,
        duration = ns / 1e9,
        max_rss = rss,
        user_time = user_ns / 1e9,
        system_time = system_ns / 1e9,
    }
    self.stdin_closed = true
    self:ended()
end

on[wire.STDIN_CREDIT] = function(self, payload)
    self:granted(payload)
end

on[wire.STDIN_CLOSED] = function(self)
    self.stdin_closed = true
end

---@package
function Process:frame(kind, payload)
    local handler = on[kind]
    if not handler then
        agent.refuse("frame type %d for a process", kind)
    end
    handler(self, payload)
    self:wake()
end

-- A stream or the process ended; the request is over when all have.
---@package
function Process:ended()
    for _, s in pairs(self.streams) do
        if not s.eof then
            return
        end
    end
    if self.exit then
        self.agent:release(self)
    end
end

-- ------------------------------------------------------------------ requests

local function check_text(what, text)
    if type(text) ~= "string" or text:find("\0", 1, true) then
        error(("exec: %s must be a string without NUL"):format(what), 0)
    end
    return text
end

local function add_env(parts, env)
    for key, value in pairs(env or {}) do
        local entry = type(key) == "number" and value or key .. "=" .. tostring(value)
        parts[#parts + 1] = wire.field(2, check_text("env", entry))
    end
end

local function add_rlimits(parts, rlimits)
    for name, value in pairs(rlimits or {}) do
        local resource = RLIMITS[name] or error("exec: unknown limit '" .. tostring(name) .. "'", 0)
        local soft, hard = value, value
        if type(value) == "table" then
            soft, hard = value.soft or value[1], value.hard or value[2] or value[1]
        end
        parts[#parts + 1] = wire.field(8, string.pack("<I4i8i8", resource, soft or FOREVER,
            hard or FOREVER))
    end
end

local function exec_fields(opts, chain)
    local parts = {}
    if type(opts.argv) ~= "table" or #opts.argv == 0 then
        error("exec: argv must be a list with at least one string", 0)
    end
    for _, arg in ipairs(opts.argv) do
        parts[#parts + 1] = wire.field(1, check_text("argv", arg))
    end
    add_env(parts, opts.env)
    if opts.cwd and opts.cwd ~= "" then
        parts[#parts + 1] = wire.field(3, check_text("cwd", opts.cwd))
    end
    if opts.user and opts.user ~= "" then
        parts[#parts + 1] = wire.field(4, check_text("user", opts.user))
    end
    parts[#parts + 1] = wire.field_u32(5, (opts.tty and TTY or 0) |
        ((opts.stdin or opts.tty) and STDIN or 0) | (opts.main and MAIN or 0)
        | (opts.layer and LAYER or 0))
    if opts.tty then
        parts[#parts + 1] = wire.field(6, string.pack("<I2I2", opts.rows or 24, opts.cols or 80))
    end
    parts[#parts + 1] = wire.field(7, string.pack("<I4I4", opts.window, opts.window))
    add_rlimits(parts, opts.rlimits)
    for _, id in ipairs(chain) do
        parts[#parts + 1] = wire.field(9, string.pack("<I2", id))
    end
    for _, gid in ipairs(opts.groups or {}) do
        parts[#parts + 1] = wire.field_u32(10, gid)
    end
    if opts.stop_signal then
        parts[#parts + 1] = wire.field_u32(11, wire.signal_number(opts.stop_signal))
    end
    return table.concat(parts)
end

local spawn_keys = {
    argv = 1, env = 1, cwd = 1, user = 1, groups = 1, tty = 1, rows = 1, cols = 1, stdin = 1,
    rlimits = 1, main = 1, stop_signal = 1, files = 1, window = 1, layer = 1,
}

local function put_all(a, wanted, chain)
    local puts = {}
    for key, file in pairs(wanted or {}) do
        local path, data, opts = key, file, nil
        if type(file) == "table" then
            path, data = file.path or key, file.data
            opts = { mode = file.mode, uid = file.uid, gid = file.gid }
        end
        local put, err = files.put(a, path, data, opts)
        if not put then
            return nil, err
        end
        puts[#puts + 1] = put
        chain[#chain + 1] = put.id
    end
    return puts
end

-- Send everything, wait for nothing.
local function launch(a, opts, chain)
    if a.dead then
        return nil, a.dead
    end
    local puts, err = put_all(a, opts.files, chain)
    if not puts then
        return nil, err
    end
    local window = opts.window or wire.WINDOW
    opts = setmetatable({ window = window }, { __index = opts })
    local p = channel.init({ puts = puts }, a, { window, not opts.tty and window or nil })
    setmetatable(p, Process)
    p.stdin_closed = not (opts.stdin or opts.tty)
    local text = exec_fields(opts, chain)
    local id
    id, err = a:open(p)
    if not id then
        return nil, err
    end
    local ok
    ok, err = a:request(wire.EXEC, id, text)
    if not ok then
        a:release(p)
        return nil, "exec: " .. err
    end
    return p
end

-- Why it did not start, as the three values every function here returns.
local function explain(p)
    if not p.failure then
        return nil, p.gone or "exec: it ended"
    end
    for _, put in ipairs(p.puts) do
        if put.failure then
            return nil, "exec: " .. put.failure.message, put.failure
        end
    end
    local boot = p.agent.boot_failure
    if boot and p.failure.stage == "request" then
        return nil, "boot: " .. boot.message, boot
    end
    return nil, "exec: " .. p.failure.message, p.failure
end

--- Start a command and wait until it runs. Yields.
---
--- `stdin = true` opens its standard input for `p:write`; otherwise it reads
--- end-of-file. `files` ({path = data} or a list of {path=, data=, mode=, uid=,
--- gid=}) are written first, in the same round trip. `env` is a map or a list of
--- "NAME=value". With `main` the machine ends when the command does. With
--- `layer` no command runs: stdout is what the root's writable layer holds, as
--- the tar of an image layer (`sm.commit` reads it).
---@async
---@param a sm.Agent
---@param opts table argv (required), env, cwd, user, groups, tty, rows, cols, stdin,
--- rlimits ({nofile = n | {soft, hard}}), main, stop_signal, files, window (bytes)
---@return sm.Process? process, string? err, table? failure
function M.spawn(a, opts)
    wire.check_keys("spawn", opts, spawn_keys)
    local p, err = launch(a, opts, {})
    if not p then
        return nil, err
    end
    local ok = p:wait_for(function()
        return p.pid or p.failure
    end)
    if not ok or p.failure then
        return explain(p)
    end
    return p
end

-- ------------------------------------------------------------ process methods

local function stream_index(name)
    return STREAMS[name] or error("no stream called '" .. tostring(name) .. "'", 3)
end

--- Write to standard input; waits while the process does not read. Yields.
---@async
---@param data string
---@return boolean? ok, string? err "broken pipe" when nobody reads any more
function Process:write(data)
    check("proc:write", 1, data, "data", "string")
    return self:send_stdin(data)
end

--- End of standard input (on a terminal: its end-of-file character).
function Process:close_stdin()
    self:send_eof()
end

--- The next piece of "stdout" (with a terminal: of everything) or "stderr"; nil
--- at the end; nil, reason on failure or timeout. Yields.
---@async
---@param name? "stdout"|"stderr"
---@param timeout number?
---@return string? piece, string? err
function Process:read(name, timeout)
    check("proc:read", 1, name, "name", "string?")
    check("proc:read", 2, timeout, "timeout", "number?")
    return self:next_piece(stream_index(name or "stdout"), timeout)
end

--- All that is left of a stream. Yields.
---@async
---@param name? "stdout"|"stderr"
---@return string? data, string? err
function Process:read_all(name)
    check("proc:read_all", 1, name, "name", "string?")
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

--- Send a signal to the process, or to its whole process group.
---@param signal string|integer
---@param group boolean?
function Process:signal(signal, group)
    check("proc:signal", 1, signal, "signal", "string|integer")
    check("proc:signal", 2, group, "group", "boolean?")
    local number = wire.signal_number(signal)
    if not self.exit and not self.failure and not self.gone then
        self.agent:send(wire.SIGNAL, group and wire.FLAG_GROUP or 0, self.id,
            string.pack("<I4", number))
    end
end

--- Tell the terminal its new size.
---@param rows integer
---@param cols integer
function Process:resize(rows, cols)
    check("proc:resize", 1, rows, "rows", "integer")
    check("proc:resize", 2, cols, "cols", "integer")
    if not self.exit and not self.failure and not self.gone then
        self.agent:send(wire.RESIZE, 0, self.id, string.pack("<I2I2", rows, cols))
    end
end

--- Wait for the end: { status, signal, duration, max_rss, user_time,
--- system_time }. Output may still be unread. Yields.
---@async
---@param timeout number?
---@return table? exit, string? err
function Process:wait(timeout)
    check("proc:wait", 1, timeout, "timeout", "number?")
    local ok, err = self:wait_for(function()
        return self.exit or self.failure
    end, timeout)
    if not ok then
        return nil, err
    end
    if self.failure then
        return explain(self)
    end
    return self.exit
end

--- Kill the process group and forget the output. Idempotent.
function Process:close()
    self:signal("KILL", true)
    self:discard(1)
    self:discard(2)
end
Process.__close = Process.close

-- ---------------------------------------------------------------------- exec

local exec_keys = setmetatable({
    stdin = 1, stdout = 1, stderr = 1, timeout = 1, grace = 1, limit = 1, chain = 1,
}, { __index = spawn_keys })

local DEFAULT_LIMIT = 64 << 20

local function feed_stdin(p, source)
    if type(source) == "string" then
        p:send_stdin(source)
    else
        for piece in source do
            if not p:send_stdin(piece) then
                break
            end
        end
    end
    p:send_eof()
end

local function sink_stream(p, i, sink)
    while true do
        local piece = p:next_piece(i)
        if not piece then
            return
        end
        sink(piece)
    end
end

-- Helper tasks of one exec; cancelled if exec is left early.
local function start_tasks(p, opts, tasks)
    if type(opts.stdin) == "string" or type(opts.stdin) == "function" then
        tasks[#tasks + 1] = loop.spawn(feed_stdin, p, opts.stdin)
        tasks.stdin = tasks[#tasks]
    elseif opts.stdin then
        error("exec: stdin must be a string or a function (spawn has `p:write`)", 0)
    end
    for name, i in pairs(STREAMS) do
        if opts[name] and p.streams[i] then
            tasks[#tasks + 1] = loop.spawn(sink_stream, p, i, opts[name])
        else
            p:collect(i, opts.limit or DEFAULT_LIMIT)
        end
    end
end

-- The process's end, or the end we bring about when its time is up.
local function await_exit(p, opts)
    local exit, err, failure = p:wait(opts.timeout)
    if exit or err ~= "timeout" then
        return exit, err, failure
    end
    p:signal("TERM", true)
    exit = p:wait(opts.grace or 2)
    if not exit then
        p:signal("KILL", true)
        exit, err, failure = p:wait()
    end
    if exit then
        exit.timed_out = true
    end
    return exit, err, failure
end

local function result_of(p, exit)
    local function text(i)
        local s = p.streams[i]
        return s and s.collect and table.concat(s.collect) or nil
    end
    exit.stdout, exit.stderr = text(1), text(2)
    exit.timed_out = exit.timed_out or false
    exit.truncated = p.truncated or false
    return exit
end

local function finish(p, opts, tasks)
    local exit, err, failure = await_exit(p, opts)
    if not exit then
        return nil, err, failure
    end
    if tasks.stdin and not tasks.stdin:finished() then
        tasks.stdin:cancel()
    end
    local ok
    ok, err = p:wait_for(function()
        for _, s in pairs(p.streams) do
            if not s.eof then
                return false
            end
        end
        return true
    end)
    for _, task in ipairs(tasks) do
        if task ~= tasks.stdin then
            task:join()
        end
    end
    if not ok or p.gone then
        return nil, err or p.gone
    end
    return result_of(p, exit)
end

--- Run a command to its end. Yields.
---
--- Options are those of `spawn`, and: `stdin` (string, or a function returning
--- the next piece or nil), `stdout`/`stderr` (functions given each piece, which
--- may yield; without them the output is in the result, at most `limit` bytes
--- of each, `truncated` if there was more), `timeout` in seconds, after which
--- the process group gets SIGTERM, and SIGKILL after `grace` (2) more, and
--- `chain`, options of a second command that is sent along and starts if the
--- first succeeds: its result is `result.chain`.
---@async
---@param a sm.Agent
---@param opts table
---@return table? result status, signal, stdout, stderr, duration, timed_out,
--- truncated, max_rss, user_time, system_time, chain
---@return string? err
---@return table? failure
function M.exec(a, opts)
    wire.check_keys("exec", opts, exec_keys)
    if opts.chain then
        wire.check_keys("exec chain", opts.chain, exec_keys)
    end
    local running = {}
    local tasks = { {}, {} }
    local _ <close> = setmetatable({}, { __close = function()
        for i, p in ipairs(running) do
            for _, task in ipairs(tasks[i]) do
                if not task:finished() then
                    task:cancel()
                end
            end
            p:close()
        end
    end })
    local p, err = launch(a, opts, {})
    if not p then
        return nil, err
    end
    running[1] = p
    if opts.chain then
        running[2], err = launch(a, opts.chain, { p.id })
        if not running[2] then
            return nil, err
        end
        start_tasks(running[2], opts.chain, tasks[2])
    end
    start_tasks(p, opts, tasks[1])
    local result, failure
    result, err, failure = finish(p, opts, tasks[1])
    if not result then
        return nil, err, failure
    end
    if running[2] and result.status == 0 then
        result.chain, err, failure = finish(running[2], opts.chain, tasks[2])
        if not result.chain then
            return nil, err, failure
        end
    end
    return result
end

return M
