-- SPDX-License-Identifier: Apache-2.0
--
-- The owner's side of a VM's control socket: what other processes may ask of
-- the VM. There is no daemon: whoever started the VM (`sm run`, a script)
-- answers, from its own loop.
--
--   <runtime>/<id>/control.sock   mode 0600 in a folder of mode 0700
--   <runtime>/<id>/vm.json        what `sm ps` reads without asking anybody
--
-- A client that goes away has its commands killed (sm.endpoint).
--
-- Threads: the loop's.

local endpoint = require "sm.endpoint"
local files = require "sm.files"
local json = require "sm.json"
local loop = require "sm.loop"
local vmlog = require "sm.vmlog"

local M = {}

local need = endpoint.need

---@class sm.Server
local Server = {}
Server.__index = Server

-- ------------------------------------------------------------ small helpers

-- Tasks that end with the scope that made them.
local Crew = {}
Crew.__index = Crew
Crew.__close = function(self)
    for _, task in ipairs(self) do
        if not task:finished() then
            task:cancel()
        end
    end
end

local function crew()
    return setmetatable({}, Crew)
end

function Crew:add(fn, ...)
    local task = loop.spawn(fn, ...)
    self[#self + 1] = task
    return task
end

local function pump_out(chan, proc, name)
    while true do
        local piece = proc:read(name)
        if not piece then
            chan:finish(name)
            return
        elseif not chan:write(name, piece) then
            return
        end
    end
end

local function pump_in(chan, proc)
    while true do
        local piece, err = chan:read "stdin"
        if not piece then
            if not err then
                proc:close_stdin()
            end
            return
        elseif not proc:write(piece) then
            return
        end
    end
end

-- "signal" and "resize" of a client, as the process's methods. What is wrong
-- with them is the client's concern alone.
local function obey(chan, proc)
    chan.on_tell = function(what, value)
        if what == "signal" then
            pcall(proc.signal, proc, value)
        elseif what == "resize" and type(value) == "table" then
            pcall(proc.resize, proc, value[1], value[2])
        end
    end
end

-- ------------------------------------------------------------------- verbs

local verbs = {}

local EXEC_KEYS = {
    argv = "table", env = "table", cwd = "string", user = "string", tty = "boolean",
    rows = "number", cols = "number", stdin = "boolean", groups = "table", rlimits = "table",
    files = "table",
}

function verbs.exec(self, chan, args)
    local opts = {}
    for key, value in pairs(args) do
        if key ~= "detach" then
            if not EXEC_KEYS[key] then
                error(("exec: unknown option '%s'"):format(tostring(key)), 0)
            end
            opts[key] = need(args, key, EXEC_KEYS[key])
        end
    end
    local proc, err, failure = self.vm:spawn(opts)
    if not proc then
        return nil, err, failure
    end
    if args.detach then
        proc:discard(1)
        proc:discard(2)
        return { pid = proc.pid }
    end
    local held <close> = proc
    local tasks <close> = crew()
    obey(chan, held)
    chan:tell("started", { pid = proc.pid })
    tasks:add(pump_in, chan, proc)
    local outs = { tasks:add(pump_out, chan, proc, "stdout") }
    if not opts.tty then
        outs[2] = tasks:add(pump_out, chan, proc, "stderr")
    end
    local exit
    exit, err, failure = proc:wait()
    for _, task in ipairs(outs) do
        task:join()
    end
    return exit, err, failure
end

function verbs.write_file(self, chan, args)
    local path = need(args, "path", "string")
    -- When the client goes away in the middle: better no file than half of one.
    local whole = false
    local _ <close> = setmetatable({}, { __close = function()
        if not whole then
            loop.spawn(self.vm.exec, self.vm, { argv = { "rm", "-f", path } })
        end
    end })
    local info, err, failure = self.vm:write_file(path, function()
        return (chan:read "stdin")
    end, args.opts or nil)
    whole = true
    return info, err, failure
end

function verbs.read_file(self, chan, args)
    local ok, info, failure = self.vm:read_file(need(args, "path", "string"), {
        sink = function(piece)
            chan:write("stdout", piece)
        end,
    })
    if not ok then
        return nil, info, failure
    end
    return info
end

-- Records of the log as they come, until the main process and its output are
-- over. `from` is "start" or "end".
local function follow(self, chan, args)
    if not self.log then
        return nil, "its output goes where it was started; only a detached VM keeps it"
    end
    local reader <close> = vmlog.reader(self.dir)
    if args.from == "end" then
        reader:skip()
    end
    while not chan.over do
        local record = reader:next()
        if record then
            if args.times then
                chan:tell("time", { record[1], record[2], #record[3] })
            end
            if not chan:write(record[2] == 1 and "stdout" or "stderr", record[3]) then
                return nil, "gone"
            end
        elseif not args.follow or self.log_ended then
            return true
        else
            loop.await(function(settle)
                self.log_waiters[settle] = true
                return function()
                    self.log_waiters[settle] = nil
                end
            end)
        end
    end
end

function verbs.logs(self, chan, args)
    return follow(self, chan, args)
end

function verbs.attach(self, chan, args)
    local main = self.vm.main
    if not main then
        return nil, "it runs no command to attach to"
    end
    local tasks <close> = crew()
    if args.stdin then
        tasks:add(pump_in, chan, main.proc)
    end
    obey(chan, main.proc)
    local ok, err = follow(self, chan, { from = "end", follow = true })
    if not ok then
        return nil, err
    end
    return main.proc:wait()
end

function verbs.wait(self)
    self.vm:wait()
    return self:outcome()
end

function verbs.stop(self, _, args)
    self.vm:stop { grace = math.type(args.grace) and args.grace or nil }
    return self:outcome()
end

function verbs.kill(self, _, args)
    local signal = args.signal
    local main = self.vm.main
    if not signal or signal == "KILL" or signal == "SIGKILL" or signal == 9 then
        self.vm:kill()
        return self:outcome()
    elseif not main then
        return nil, "it runs no command that could take a signal"
    end
    main.proc:signal(signal)
    return true
end

function verbs.stats(self)
    return self.vm:stats()
end

local COMMIT_KEYS = { message = "string", author = "string", created_by = "string", config = "table" }

function verbs.commit(self, _, args)
    local opts = {}
    for key in pairs(type(args.opts) == "table" and args.opts or {}) do
        if not COMMIT_KEYS[key] then
            error(("commit: unknown option '%s'"):format(tostring(key)), 0)
        end
        opts[key] = need(args.opts, key, COMMIT_KEYS[key])
    end
    return self.vm:commit(args.name and need(args, "name", "string") or nil, opts)
end

-- A client names a snapshot, or gives an absolute path: its own folder is not ours.
function verbs.snapshot(self, _, args)
    for key in pairs(args) do
        if key ~= "name" and key ~= "path" and key ~= "temporary" and key ~= "diff"
            and key ~= "live" then
            error(("snapshot: unknown option '%s'"):format(tostring(key)), 0)
        end
    end
    local path = args.path
    if path ~= nil and (type(path) ~= "string" or path:sub(1, 1) ~= "/") then
        error("snapshot: path: expected an absolute path", 0)
    end
    local made, err = self.vm:snapshot { name = args.name, path = path, temporary = args.temporary == true,
        diff = args.diff == true, live = args.live == true }
    if not made then
        return nil, err
    end
    return { name = made.name, path = made.path, id = made.id, stored = made.stored, pause = made.pause }
end

-- Until the client goes away, or the VM.
function verbs.capture(self, chan, args)
    local capture <close>, err = self.vm:capture { card = math.type(args.card) == "integer" and args.card or nil }
    if not capture then
        return nil, err
    end
    for piece in function() return capture:read() end do
        if not chan:write("stdout", piece) then
            return nil, "gone"
        end
    end
    return { lost = capture:close() or 0 }
end

function verbs.inspect(self)
    return self.meta
end

-- --------------------------------------------------------------- the state

local function write_meta(self)
    files.replace(self.dir .. "/vm.json", json.encode(self.meta))
end

--- Change what others see of the VM.
---@param changes table
function Server:update(changes)
    for key, value in pairs(changes) do
        self.meta[key] = value
    end
    write_meta(self)
end

--- How it ended, for people and scripts: { code, reason, detail }.
function Server:outcome()
    local ending = self.vm.ending or {}
    local main = self.vm.main
    local exit = main and main.proc.exit
    local code = exit and exit.status or ending.code
    if not code then
        local reason = ending.reason
        code = (reason == "poweroff" or reason == "reboot") and 0 or reason == "killed" and 137 or 125
    end
    return { code = code, reason = ending.reason, detail = ending.detail }
end

local function log_changed(self)
    local waiters = self.log_waiters
    self.log_waiters = {}
    for settle in pairs(waiters) do
        settle(true)
    end
end

--- Keep what the main process says. Returns a task that ends with its output.
---@param proc sm.Process
---@param tty boolean?
---@return sm.Task?
---@return string? err
function Server:keep_log(proc, tty)
    local log, err = vmlog.new(self.dir)
    if not log then
        return nil, err
    end
    self.log = log
    log.changed = function()
        log_changed(self)
    end
    return loop.spawn(function()
        local held <close> = log
        local tasks <close> = crew()
        local function keep(name, number)
            while true do
                local piece = proc:read(name)
                if not piece then
                    return
                end
                held:write(number, piece)
            end
        end
        local outs = { tasks:add(keep, "stdout", 1) }
        if not tty then
            outs[2] = tasks:add(keep, "stderr", 2)
        end
        for _, task in ipairs(outs) do
            task:join()
        end
        self.log_ended = true
        log_changed(self)
    end)
end

--- Answer for a VM: listen in its folder and say there what it is.
---@param vm sm.VM anything with its methods
---@param dir string
---@param meta table
---@return sm.Server?
---@return string? err
function M.new(vm, dir, meta)
    local self = setmetatable({
        vm = vm, dir = dir, meta = meta, log_waiters = {},
    }, Server)
    local err
    self.endpoint, err = endpoint.listen(dir .. "/control.sock", self, verbs)
    if not self.endpoint then
        return nil, err
    end
    write_meta(self)
    return self
end

--- Stop answering, once the answers under way are out. Yields.
---@async
function Server:close()
    self.endpoint:close "the VM has ended"
end

return M
