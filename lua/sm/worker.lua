-- SPDX-License-Identifier: Apache-2.0
--
-- A VM in a process of its own: the proxy to an `sm-worker`.
--
-- The proxy has the methods of the VMs that `sm.core.vm` gives (they come from
-- the same command table), and refuses the same things with the same words.
-- A call sends a request and waits for the reply: it yields in a task of
-- sm.loop, and runs the loop outside any.
--
--   proxy ─ calls ─▶ requests by id ─▶ pipe ─▶ sm-worker
--     ▲── replies, events ◀── frames ◀── pipe ──┘
--
-- Devices written in Lua stay in this process: an access travels as an exit
-- event, its handler runs as a task, the answer travels back.
--
-- The worker's end is an event like any other: {type = "state", state =
-- "stopped", reason = "crash"}, unless the VM had stopped before. The proxy
-- keeps the loop alive only while somebody waits for it.

local child = require "sm.child"
local core = require "sm.core"
local loop = require "sm.loop"
local paths = require "sm.paths"
local socket = require "sm.socket"
local uv = require "luv"

local M = {}

-- Beside the module in use: the fake backend's gets the fake backend's worker.
local PLACES = { "/sm-worker" }
local LENGTH_BYTES = 4
local END_SECONDS = 15 -- the worker ends itself sooner (core/worker.c)
local EBUSY, BUSY_TURNS = 16, 1000 -- turns of the pipe, not of the vCPU

---@class sm.WorkerState what the loop's callbacks hold; never the proxy itself
---@field pipe userdata
---@field process userdata
---@field pid integer
---@field pending table<integer, fun(...)>
---@field events table
---@field waiters table
---@field input string
---@field holds integer
---@field next_id integer
---@field stopped boolean a "stopped" event has come
---@field exited boolean
---@field eof boolean
---@field closed boolean
---@field polled boolean?
---@field over boolean? nothing more can come
---@field obituary string?
---@field handlers table<integer, table> of devices, by claim
---@field busy integer commands that ask again because a vCPU waits
---@field held table<integer, boolean> vCPUs held for them

---@class sm.Worker
---@field package link sm.WorkerState
local Worker = {}
Worker.__index = Worker
Worker.__name = "sm.Worker"

-- ---- what keeps the loop running ----

local function hold(state)
    state.holds = state.holds + 1
    if state.holds == 1 then
        for _, handle in ipairs { state.pipe, state.process } do
            if not handle:is_closing() then
                handle:ref()
            end
        end
    end
end

local function drop(state)
    state.holds = state.holds - 1
    if state.holds == 0 then
        for _, handle in ipairs { state.pipe, state.process } do
            if not handle:is_closing() then
                handle:unref()
            end
        end
    end
end

local Hold = {}
Hold.__close = function(self)
    drop(self.link)
end

-- To be kept in a <close> variable: a task that is cancelled lets go too.
local function held(state)
    hold(state)
    return setmetatable({ link = state }, Hold)
end

-- ---- from the worker ----

local serve

local function add_event(state, event)
    if event.type == "exit" and state.handlers[event.claim] then
        loop.spawn(serve, state, state.handlers[event.claim], event)
        return
    end
    state.events[#state.events + 1] = event
    if event.type == "state" and event.state == "stopped" then
        state.stopped = true
    end
    loop.wake(state.waiters)
end

local function deliver(state, message)
    if message[1] == 0 then
        add_event(state, message[2])
        return
    end
    local settle = state.pending[message[1]]
    state.pending[message[1]] = nil
    if settle then
        settle(message)
    end
end

local function take_frames(state, chunk)
    local input = state.input .. chunk
    local at = 1
    while #input - at + 1 >= LENGTH_BYTES do
        local len = string.unpack("<I4", input, at)
        if #input - at + 1 < LENGTH_BYTES + len then
            break
        end
        local from = at + LENGTH_BYTES
        local message, err = core.unpack(input:sub(from, from + len - 1))
        if type(message) ~= "table" then
            error("sm-worker sent nonsense: " .. tostring(err))
        end
        at = from + len
        deliver(state, message)
    end
    state.input = input:sub(at)
end

-- A long frame arrives in many chunks: join them once, not at each.
local function receive(state, chunk)
    local parts = state.parts
    parts[#parts + 1] = chunk
    state.part_bytes = state.part_bytes + #chunk
    if state.part_bytes < state.need_bytes then
        return
    end
    local joined = table.concat(parts)
    state.parts, state.part_bytes = {}, 0
    take_frames(state, joined)
    local rest = state.input
    local whole = #rest >= LENGTH_BYTES and LENGTH_BYTES + string.unpack("<I4", rest)
        or LENGTH_BYTES
    state.need_bytes = whole - #rest
end

-- Both the socket and the process have ended: nothing can follow.
local function finish(state)
    if not (state.eof and state.exited) or state.over then
        return
    end
    state.over = true
    if not state.stopped then
        add_event(state, {
            type = "state",
            state = "stopped",
            reason = state.closed and "killed" or "crash",
            detail = state.obituary,
        })
    end
    local pending = state.pending
    state.pending = {}
    for _, settle in pairs(pending) do
        settle(nil)
    end
    loop.wake(state.waiters)
end

local function at_eof(state)
    if not state.eof then
        state.eof = true
        if not state.pipe:is_closing() then
            state.pipe:close()
        end
    end
    finish(state)
end

local function at_exit(state, code, signal)
    state.exited = true
    if signal ~= 0 then
        state.obituary = ("the worker was killed by signal %d"):format(signal)
    else
        state.obituary = ("the worker exited with status %d"):format(code)
    end
    if not state.process:is_closing() then
        state.process:close()
    end
    if state.closed then
        at_eof(state)
    else
        finish(state) -- what it said last is still in the pipe
    end
end

-- ---- calls ----

local function gone(state, name)
    if state.closed then
        error("attempt to use a closed vm", 2)
    end
    return nil, ("%s: %s"):format(name, state.obituary or "the worker has ended"), 32 -- EPIPE
end

-- Commands whose `path` a confined worker cannot open: it is opened here, and
-- the descriptor goes along with the request.
local TO_WRITE = uv.constants.O_RDWR | uv.constants.O_CREAT
local OPENED_HERE = { ["snapshot.save"] = TO_WRITE, ["snapshot.begin"] = TO_WRITE }
local ERRNO = { ENOENT = 2, EACCES = 13, EEXIST = 17, ENOTDIR = 20, EISDIR = 21, ENOSPC = 28, EROFS = 30 }

-- The file of such a request and whether it was made for it; or nil, why, errno.
local function open_for(name, ...)
    local first = ...
    local path = type(first) == "table" and first.path or first
    if type(path) ~= "string" then
        return false -- the worker says what is wrong with it
    end
    local mode, flags = tonumber("600", 8), OPENED_HERE[name]
    local fd, why, code = uv.fs_open(path, flags | uv.constants.O_EXCL, mode)
    local made = fd and path or nil
    if not fd and code == "EEXIST" then
        fd, why, code = uv.fs_open(path, flags, mode)
    end
    if not fd then
        return nil, ("%s: %s: %s"):format(name, path, why:match "^E%u+: ([^:]*)" or why), ERRNO[code] or 5
    end
    return fd, made
end

-- Send one request and wait for its reply. Always tail-called, so that level 2
-- of an error is the caller of the method. Yields.
local function request(self, name, ...)
    local state = self.link
    if state.closed or state.eof then
        return gone(state, name)
    end
    state.next_id = state.next_id + 1
    local id = state.next_id
    local message, wrong = core.request(id, name, ...)
    if not message then
        error(wrong, 2)
    end
    local frame = string.pack("<s4", message)
    local reply, fd, made, errno
    if OPENED_HERE[name] then
        fd, made, errno = open_for(name, ...)
        if fd == nil then
            return nil, made, errno
        elseif fd then
            local sent
            sent, wrong, errno = state.pipe:write_with(frame, fd)
            uv.fs_close(fd)
            if not sent then
                return nil, ("%s: %s"):format(name, wrong), errno
            end
        end
    end
    do
        local _ <close> = held(state)
        reply = loop.await(function(settle)
            state.pending[id] = settle
            if not fd then
                state.pipe:write(frame) -- when it fails, the end of the pipe says so
            end
            return function()
                state.pending[id] = nil
            end
        end)
    end
    if made and not (reply and reply[2]) then
        uv.fs_unlink(made)
    end
    if not reply then
        return gone(state, name)
    elseif reply[2] then
        return reply[3] == nil and true or reply[3]
    elseif reply[5] then
        error(reply[3], 2)
    end
    return nil, reply[3], reply[4]
end

-- A request whose reply nobody waits for.
local function post(state, name, args)
    if not state.closed and not state.eof then
        state.next_id = state.next_id + 1
        state.pipe:write(string.pack("<s4", assert(core.request(state.next_id, name, args))))
    end
end

-- ---- devices written in Lua ----

local function ask_handler(handlers, event)
    if event.write then
        if handlers.write then
            handlers.write(event.offset, event.value, event.len)
        end
        return nil
    end
    local value = handlers.read and handlers.read(event.offset, event.len)
    if value ~= nil and not math.tointeger(value) then
        error(("a read handler returned a %s, not an integer"):format(type(value)), 0)
    end
    return value
end

-- A task. A handler that raises gives the access what nobody's access gets.
function serve(state, handlers, event)
    local ok, value = pcall(ask_handler, handlers, event)
    local hold = state.busy > 0
    post(state, "vcpu.answer", { vcpu = event.vcpu, value = ok and value or nil, hold = hold })
    if hold then
        state.held[event.vcpu] = true
    end
    if not ok then
        add_event(state, {
            type = "device", claim = event.claim, vcpu = event.vcpu, error = tostring(value),
        })
    end
end

-- As long as a command asks again, answers hold their vCPU; after it they go
-- on, but the one that was to be held.
local Busy = {}
Busy.__close = function(self)
    local state = self.link
    state.busy = state.busy - 1
    if self.keep then
        state.held[self.keep] = nil
    end
    for vcpu in pairs(state.held) do
        post(state, "vcpu.continue", { vcpu = vcpu })
    end
    state.held = {}
end

-- A vCPU that waits for a handler of ours makes a command fail with EBUSY. The
-- handler's turn comes while we ask again; it is held behind its access, so
-- that a guest that hammers a device does not win. Yields.
local function request_served(self, name, ...)
    local res, err, errno = request(self, name, ...)
    if errno ~= EBUSY then
        return res, err, errno
    end
    local args = ...
    local keep = name == "vcpu.hold" and (type(args) == "table" and args.vcpu or args)
    self.link.busy = self.link.busy + 1
    local _ <close> = setmetatable({ link = self.link, keep = keep or nil }, Busy)
    for _ = 1, BUSY_TURNS do
        res, err, errno = request(self, name, ...)
        if errno ~= EBUSY then
            break
        end
    end
    return res, err, errno
end

local function send(self, name, ...)
    if next(self.link.handlers) then
        return request_served(self, name, ...)
    end
    return request(self, name, ...)
end

for _, command in ipairs(core.commands()) do
    if command.method then
        local name = command.name
        Worker[command.method] = function(self, ...)
            return send(self, name, ...)
        end
    end
end

local Device = {}
Device.__index = Device
Device.__name = "sm.Device"

--- Give the range up: accesses go to nobody from now on. Yields.
---@async
function Device:close()
    local state = self.vm.link
    if self.closed then
        return
    end
    self.closed = true
    state.handlers[self.claim] = nil
    if not state.closed and not state.eof then
        self.vm:call("bus.release", { claim = self.claim })
    end
end

Device.__close = Device.close

function Device:__tostring()
    local closed = self.closed or self.vm.link.closed
    return closed and "device (closed)" or ("device (claim %d)"):format(self.claim)
end

--- A device written in Lua: a range of the bus, claimed, and who answers.
--- Handlers run as tasks, one at a time for each vCPU. Yields.
---@async
---@param cfg { space: "mmio"|"pio", base: integer, size: integer|string, read: (fun(offset: integer, len: integer): integer?)?, write: fun(offset: integer, value: integer, len: integer)? }
---@return table? device with :close()
---@return string? err
---@return integer? errno
function Worker:device(cfg)
    if type(cfg) ~= "table" then
        error("bad argument #1 to 'device' (table expected, got " .. type(cfg) .. ")", 2)
    end
    local range, handlers = {}, {}
    for key, value in pairs(cfg) do
        range[key] = value
    end
    for _, key in ipairs { "read", "write" } do
        local handler = range[key]
        if handler ~= nil and type(handler) ~= "function" then
            error(("vm.device: %s: expected a function, got %s"):format(key, type(handler)), 2)
        end
        range[key], handlers[key] = nil, handler
    end
    local claim, err, errno = send(self, "bus.claim", range)
    if not claim then
        return nil, err, errno
    end
    self.link.handlers[claim] = handlers
    return setmetatable({ vm = self, claim = claim }, Device)
end

-- ---- parts: vm:vcpu(0), vm:line(5) ----

-- A part is a number and its VM; its methods are the commands that take that
-- number first, under the command's own name.
local function add_part(method, key)
    local Part = { __name = "sm." .. method }
    Part.__index = Part
    Part.__eq = function(a, b)
        return a.vm == b.vm and a.number == b.number
    end
    Part.__tostring = function(self)
        return ("%s %d%s"):format(method, self.number, self.vm.link.closed and " (closed)" or "")
    end
    for _, command in ipairs(core.commands()) do
        if command.args and command.args[1] and command.args[1].key == key then
            local name = command.name
            Part[name:match("%.(.*)$")] = function(self, ...)
                return send(self.vm, name, self.number, ...)
            end
        end
    end
    Worker[method] = function(self, number)
        if self.link.closed then
            error("attempt to use a closed vm", 2)
        elseif not math.tointeger(number) then
            error(("bad argument #1 to '%s' (integer expected, got %s)"):format(method, type(number)), 2)
        end
        return setmetatable({ vm = self, number = math.tointeger(number) }, Part)
    end
end

add_part("vcpu", "vcpu")
add_part("line", "gsi")

--- Run a command by name. Yields.
---@async
---@param name string
---@param args table?
---@return any result, or nil
---@return string? err
---@return integer? errno
function Worker:call(name, args)
    if args ~= nil and type(args) ~= "table" then
        error("bad argument #2 to 'call' (table expected, got " .. type(args) .. ")", 2)
    end
    return send(self, name, args or {})
end

-- ---- events ----

--- What to poll so that `next` has something: the loop's own descriptor.
---@return integer
function Worker:pollfd()
    local state = self.link
    if state.closed then
        error("attempt to use a closed vm", 2)
    end
    if not state.polled then
        state.polled = true
        hold(state) -- a foreign loop waits for it, for good
    end
    return loop.pollfd()
end

---@return string
function Worker:events()
    return "r"
end

---@return number? seconds
function Worker:timeout()
    return #self.link.events > 0 and 0 or loop.timeout()
end

--- The next event, or nil. Never waits.
---@return table?
function Worker:next()
    local state = self.link
    if state.closed then
        error("attempt to use a closed vm", 2)
    end
    if not state.events[1] and not uv.loop_mode() then
        loop.step()
    end
    return table.remove(state.events, 1)
end

-- Until an event has come or the worker has ended. Yields.
local function wait_for_news(state, timeout)
    local _ <close> = held(state)
    return loop.wait_in(state.waiters, timeout)
end

--- Wait for the next event. nil, "timeout", or nil and why there is none any
--- more. Yields.
---@async
---@param timeout number? seconds
---@return table?
---@return string? err
function Worker:next_event(timeout)
    local state = self.link
    while not state.events[1] do
        if state.over or state.closed then
            return nil, state.obituary or "the worker was closed"
        end
        local _, why = wait_for_news(state, timeout)
        if why == "timeout" and not state.events[1] then
            return nil, "timeout"
        end
    end
    return table.remove(state.events, 1)
end

--- The worker's process id.
---@return integer
function Worker:pid()
    return self.link.pid
end

-- ---- the end ----

-- Whether waiting here is possible: in a task of ours, or with no loop running.
local function may_wait()
    local task = loop.current()
    if task and coroutine.running() == task.co then
        return true
    end
    return not uv.loop_mode()
end

local function hang_up(state)
    state.closed = true
    if not state.pipe:is_closing() then
        state.pipe:close()
        state.eof = true
    end
end

local function wait_for_exit(state, timeout)
    while not state.exited do
        local _, why = wait_for_news(state, timeout)
        if why == "timeout" then
            return
        end
    end
end

--- Stop the VM and its process. Waits until it has been reaped, where waiting
--- is possible. May be called again. Yields.
---@async
function Worker:close()
    local state = self.link
    hang_up(state)
    if state.exited or not may_wait() then
        loop.flush()
        return
    end
    wait_for_exit(state, END_SECONDS)
    if not state.exited then
        state.process:kill("sigkill")
        wait_for_exit(state)
    end
end

Worker.__close = Worker.close

-- No handle is closed here: at the end of the Lua state luv's own finalizers do
-- that, and do not bear to come second. The worker sees its socket end.
function Worker:__gc()
    local state = self.link
    state.closed = true
    if not state.pipe:is_closing() then
        core.hangup(state.pipe:fileno())
    end
end

function Worker:__tostring()
    local state = self.link
    if state.closed then
        return "vm (closed)"
    elseif state.over then
        return ("vm (%s)"):format(state.obituary)
    end
    return ("vm (worker %d)"):format(state.pid)
end

-- ---- the beginning ----

local function check_options(opts)
    for key, value in pairs(opts) do
        if key ~= "name" and key ~= "executable" then
            error(("worker.spawn: unknown key '%s' (known: name, executable)"):format(key), 3)
        elseif type(value) ~= "string" then
            error(("worker.spawn: %s: expected a string, got %s"):format(key, type(value)), 3)
        end
    end
end

--- Start a worker with no VM in it yet; `vm.create` makes one.
---@param opts? { name: string?, executable: string? }
---@return sm.Worker?
---@return string? err
function M.spawn(opts)
    opts = opts or {}
    check_options(opts)
    local path, err = opts.executable, nil
    if not path then
        path, err = paths.ours("SM_WORKER", "sm-worker", PLACES)
    end
    if not path then
        return nil, err
    end
    local pipe, theirs = socket.pair()
    if not pipe then
        return nil, theirs
    end
    local state = {
        pipe = pipe,
        pending = {}, events = {}, waiters = {}, parts = {}, handlers = {},
        busy = 0, held = {},
        input = "", part_bytes = 0, need_bytes = LENGTH_BYTES,
        holds = 0, next_id = 0,
        stopped = false, exited = false, eof = false, closed = false,
    }
    local pid
    state.process, pid = child.spawn(path, {
        args = { opts.name or "vm" },
        stdio = { nil, nil, 2, theirs },
        detached = true,
    }, loop.guard(function(code, signal)
        at_exit(state, code, signal)
    end))
    uv.fs_close(theirs)
    if not state.process then
        state.pipe:close()
        return nil, ("%s: %s"):format(path, pid)
    end
    state.pid = pid
    state.pipe:read_start(loop.guard(function(read_err, chunk)
        if chunk then
            receive(state, chunk)
        else
            local _ = read_err
            at_eof(state)
        end
    end))
    state.pipe:unref()
    state.process:unref()
    return setmetatable({ link = state }, Worker)
end

--- A VM in a worker: as `sm.core.vm`, with `name` beside its keys. Yields.
---@async
---@param cfg? table cpus, memory, name
---@return sm.Worker?
---@return string? err
---@return integer? errno
function M.vm(cfg)
    local args = {}
    for key, value in pairs(cfg or {}) do
        args[key] = value
    end
    args.name = nil
    local self, err = M.spawn { name = cfg and cfg.name }
    if not self then
        return nil, err
    end
    local ok, res, why, errno = pcall(self.call, self, "vm.create", args)
    if ok and res then
        return self
    end
    self:close()
    if not ok then
        error(res, 2)
    end
    return nil, why, errno
end


--- The methods of the proxy by name, for `help`.
M.methods = Worker

return M
