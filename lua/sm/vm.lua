-- SPDX-License-Identifier: Apache-2.0
--
-- A running VM, as the product sees it: commands run in it, files go in and
-- out, and it ends for one reason.
--
-- Two voices tell how a VM ends. The worker sees the machine stop (power off,
-- reset, panic, triple fault, its own death); the agent announces an orderly
-- end before the machine stops. The reason is the machine's, and the agent's
-- word makes it finer:
--
--   agent said      machine did          reason
--   exited(code)    poweroff             exited, code
--   poweroff        poweroff             poweroff
--   reboot          reboot               reboot
--   anything        panic, crash         panic, crash
--   nothing         poweroff, reboot     poweroff, reboot
--   anything        worker died          crash; killed when we asked for it

local check = require "sm.check"
local uv = require "luv"
local loop = require "sm.loop"
local machine = require "sm.machine"

local M = {}

---@class sm.VM
---@field id string
---@field parent sm.VM? whose copy it is
---@field base sm.Snapshot? what its memory lies over: a diff is against that
---@field children sm.VM[] its copies that were made by fork
---@field timeline table<string, number> seconds of loop.now() by mark
local VM = {}
VM.__index = VM
VM.__name = "sm.VM"

function VM:__tostring()
    local state = self.ending and "ended: " .. self.ending.reason or "running"
    return ("vm %s (%s)"):format(self.id, state)
end

local function decide(self, state)
    local said = self.goodbye
    local reason = state.reason
    if self.broken and reason == "killed" then
        return { reason = "crash", detail = self.broken }
    elseif self.killed and (reason == "killed" or reason == "crash") then
        return { reason = "killed", detail = state.detail }
    elseif reason == "poweroff" and said and said.reason == "exited" then
        return { reason = "exited", code = said.code }
    elseif reason == "poweroff" and said and said.reason == "reboot" then
        -- A kernel that cannot reset powers off instead.
        return { reason = "reboot" }
    elseif reason == "reboot" and said and said.reason == "exited" then
        return { reason = "exited", code = said.code }
    elseif said and said.reason == "failed" then
        return { reason = "crash", detail = said.text }
    end
    return { reason = reason, detail = state.detail }
end

--- How the VM has ended, in words.
---@return string
function VM:obituary()
    local e = self.ending
    if not e then
        return "the VM has ended"
    end
    return ("the VM has ended: %s%s"):format(e.reason, e.detail and e.detail ~= "" and ", " .. e.detail or "")
end

local function ended(self, state)
    if self.ending then
        return
    end
    self.ending = decide(self, state)
    loop.wake(self.waiters)
end

-- The task that listens to the worker until the machine has stopped.
local function watch(self)
    while not self.ending do
        local event, err = self.parts.worker:next_event()
        if not event then
            ended(self, { reason = "crash", detail = err or "the worker went away" })
        elseif event.type == "state" and event.state == "stopped" then
            ended(self, event)
        elseif event.type == "console" then
            self:drain_console()
        elseif self.cfg.on_event then
            self.cfg.on_event(event)
        end
    end
    self:drain_console()
    if self.parts.agent then
        self.parts.agent:fail(self:obituary())
    end
end

--- The machine under it, in its worker: memory, registers, breakpoints, faults and
--- traces, as `worker.vm` gives. Its events are the VM's to take: see `on_event`.
---@return table machine
function VM:machine()
    return self.parts.worker
end

--- Give every event of the machine that the VM has no use for (a vCPU that is held,
--- a trace) to a function; nil: to none. Returns the one before.
---@param fn? fun(event: table)
---@return fun(event: table)?
function VM:on_event(fn)
    check("vm:on_event", 1, fn, "fn", "function?")
    local before = self.cfg.on_event
    self.cfg.on_event = fn
    return before
end

--- Take what the guest's consoles wrote since the last time; kept, at most
--- 64 KiB of it, for error messages. Yields.
function VM:drain_console()
    local worker = self.parts.worker
    while worker do
        local bytes = worker:call("console.read", {})
        bytes = type(bytes) == "table" and bytes.data or bytes
        if type(bytes) ~= "string" or bytes == "" then
            return
        end
        self.console = (self.console .. bytes):sub(-65536)
        if self.cfg.on_console then
            self.cfg.on_console(bytes)
        end
    end
end

-- The agent's connection ended by itself. A kernel that goes down resets its
-- devices first, so the machine's own end may be on its way; a guest that
-- breaks the protocol is not one to wait for. Yields.
local function lost_agent(self, why)
    if why == "agent: connection lost" and self:wait(10) or self.ending then
        return
    end
    self.broken = why
    self:kill()
end

-- The last lines of the console, for people.
local function last_words(self)
    local lines = {}
    for text in self.console:gmatch("[^\r\n]+") do
        lines[#lines + 1] = text
        if #lines > 8 then
            table.remove(lines, 1)
        end
    end
    return #lines > 0 and "\nthe guest's last words:\n  " .. table.concat(lines, "\n  ") or ""
end

-- Wait for the agent, or for the machine to end before it comes. Yields.
local function await_agent(self)
    local agent, err
    local task = loop.spawn(function()
        agent, err = machine.await_agent(self.parts, self.cfg.boot_timeout)
    end)
    self.waiters[#self.waiters + 1] = function()
        if not agent and not task:finished() then
            task:cancel()
        end
    end
    pcall(task.join, task)
    table.remove(self.waiters)
    if agent then
        return agent
    elseif self.ending then
        local e = self.ending
        return nil, ("the guest ended before it was ready: %s%s%s"):format(
            e.reason, e.detail and e.detail ~= "" and ", " .. e.detail or "", last_words(self))
    elseif err == "timeout" then
        return nil, ("the guest did not answer in %g s (is it a Linux kernel with virtio-vsock?)%s"):format(
            self.cfg.boot_timeout, last_words(self))
    end
    return nil, ("the guest's agent: %s%s"):format(err or "gone", last_words(self))
end

local function hosts_file(hostname)
    return ("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t%s\n"):format(hostname)
end

-- Let other processes see the VM and work with it (`sm ps`, `sm exec` …).
local function serve_others(self)
    local cfg, image, parts = self.cfg, self.image, self.parts
    local err
    self.server, err = require("sm.serve").new(self, parts.rundir.path, {
        id = self.id,
        image = image.name or image.reference,
        digest = image.digest,
        status = "running",
        created = os.time(),
        owner = uv.os_getpid(),
        worker = parts.worker:pid(),
        cpus = cfg.cpus,
        memory = cfg.memory,
        disk = not cfg.read_only and cfg.disk or nil,
        hostname = rawget(cfg, "hostname") or self.id,
    })
    return self.server, err
end

local function new(image, cfg)
    return setmetatable({
        image = image,
        cfg = cfg,
        console = "",
        waiters = {},
        children = {},
        timeline = { start = loop.now() },
    }, VM)
end

-- The machine runs: listen to it, and wait for its agent. Yields.
local function adopt(self, parts)
    self.parts, self.id = parts, parts.id
    self.watcher = loop.spawn(watch, self)
    local agent, err = await_agent(self)
    if not agent then
        return nil, err
    end
    self.timeline.hello = loop.now()
    parts.agent = agent
    agent.on_goodbye = function(goodbye)
        self.goodbye = goodbye
    end
    agent.on_error = function(why)
        loop.spawn(lost_agent, self, why)
    end
    return agent
end

-- Commands can run: the VM, or nil and why nobody may know of it. Yields.
local function ready(self)
    local parts = self.parts
    self.timeline.booted = loop.now()
    self.guest_marks = parts.agent.marks
    if parts.network then
        self.ports = parts.network.ports
        parts.network:ready(self)
    end
    local ok, err = serve_others(self)
    if not ok then
        self:close()
        return nil, err
    end
    return self
end

--- Boot `image` with a checked configuration; returns when commands can run.
--- Yields.
---@async
---@param image table
---@param cfg table
---@return sm.VM?
---@return string? err
function M.start(image, cfg)
    local self = new(image, cfg)
    local parts, err = machine.start(image, cfg, self.timeline)
    if not parts then
        return nil, err
    end
    local agent
    agent, err = adopt(self, parts)
    if not agent then
        self:close()
        return nil, err
    end
    local hostname = cfg.hostname or self.id
    local network = parts.network and parts.network:boot_fields(hosts_file(hostname)) or {}
    local ok
    ok, err = agent:boot {
        root = cfg.read_only and "readonly" or "scratch",
        hostname = hostname,
        hosts = network.hosts or hosts_file(hostname),
        resolv = network.resolv,
        nets = network.nets,
    }
    if not ok then
        local words = last_words(self)
        self:close()
        return nil, "the guest could not set itself up: " .. tostring(err) .. words
    end
    return ready(self)
end

local function machine_id()
    return (uv.random(16):gsub(".", function(c)
        return ("%02x"):format(c:byte())
    end))
end

--- A copy of a saved machine; returns when it has been told who it is and
--- commands can run. Yields.
---@async
---@param paths string[] of the snapshot, last, and of those it needs
---@param saved table what its owner wrote into it (sm.snapshot)
---@param image table what its root device is
---@param cfg table checked: name, hostname, eager, clock, boot_timeout, on_…
---@return sm.VM?
---@return string? err
function M.restore(paths, saved, image, cfg)
    local own_hostname = cfg.hostname
    local self = new(image, setmetatable(cfg, { __index = saved.cfg }))
    local parts, err = machine.restore(paths, saved, image, cfg, self.timeline)
    if not parts then
        return nil, err
    end
    local agent
    agent, err = adopt(self, parts)
    if not agent then
        self:close()
        return nil, err
    end
    local hostname = own_hostname or self.id
    local network = parts.network and parts.network:boot_fields(hosts_file(hostname)) or {}
    local ok
    ok, err = agent:resume {
        hostname = hostname,
        hosts = network.hosts or hosts_file(hostname),
        resolv = network.resolv,
        machine_id = machine_id(),
        timeout = cfg.boot_timeout,
    }
    if not ok then
        self:close()
        return nil, "the guest could not be told who it is: " .. tostring(err)
    end
    return ready(self)
end

local function agent_of(self)
    if self.ending or not self.parts.agent then
        return nil, self:obituary()
    end
    return self.parts.agent
end

--- Start a command and wait until it runs (sm.exec). With `main` it is the
--- VM's own: its end is the VM's. Yields.
---@async
---@param opts table
---@return sm.Process? process
---@return string? err
---@return table? failure
function VM:spawn(opts)
    check("vm:spawn", 1, opts, "opts", "table")
    local agent, err = agent_of(self)
    if not agent then
        return nil, err
    end
    local proc, failure
    proc, err, failure = agent:spawn(opts)
    if proc and opts.main then
        self.main = { proc = proc, stop_signal = opts.stop_signal or "TERM" }
        self.server:update {
            command = opts.argv, env = opts.env, cwd = opts.cwd, user = opts.user,
            tty = opts.tty or false, stdin = opts.stdin or false,
        }
    end
    return proc, err, failure
end

--- Run a command to its end. Options are those of `spawn`, and: stdin (a string,
--- or a function that gives the next piece), stdout and stderr (functions that
--- take each piece), limit (bytes kept of each), timeout and grace (seconds),
--- chain (options of a second command, run if the first succeeds). Yields.
---@async
---@param opts table argv and more
---@return table? result { status, signal, stdout, stderr, duration, timed_out, truncated, max_rss … }
---@return string? err
---@return table? failure
function VM:exec(opts)
    check("vm:exec", 1, opts, "opts", "table")
    local agent, err = agent_of(self)
    if not agent then
        return nil, err
    end
    return agent:exec(opts)
end

--- Write a file in the guest. Yields.
---@async
---@param path string absolute path in the guest
---@param data string|function the bytes, or a function that gives the next piece or nil
---@param opts table? mode, uid, gid, parents (true), append, exclusive
---@return table? info { size, mode, uid, gid, mtime }
---@return string? err
---@return table? failure
function VM:write_file(path, data, opts)
    check("vm:write_file", 1, path, "path", "string")
    check("vm:write_file", 2, data, "data", "string|function")
    check("vm:write_file", 3, opts, "opts", "table?")
    local agent, err = agent_of(self)
    if not agent then
        return nil, err
    end
    return agent:write_file(path, data, opts)
end

--- Read a file of the guest: its bytes, or through opts.sink(piece). Yields.
---@async
---@param path string absolute path in the guest
---@param opts table? sink, limit (bytes kept in memory)
---@return string|true|nil data
---@return string|table err_or_info
---@return table? failure
function VM:read_file(path, opts)
    check("vm:read_file", 1, path, "path", "string")
    check("vm:read_file", 2, opts, "opts", "table?")
    local agent, err = agent_of(self)
    if not agent then
        return nil, err
    end
    return agent:read_file(path, opts)
end

--- A stream to a TCP port of the guest's loopback, through its agent: no port
--- of the host takes part. Yields.
---@async
---@param port integer
---@param timeout number? seconds
---@return sm.Stream?
---@return string? err
function VM:connect(port, timeout)
    check("vm:connect", 1, port, "port", "integer")
    check("vm:connect", 2, timeout, "timeout", "number?")
    local agent, err = agent_of(self)
    if not agent then
        return nil, err
    end
    return require("sm.guest_stream").connect(agent, port, timeout)
end

--- Listen on a TCP port inside the guest; `l:accept()` gives streams. Yields.
---@async
---@param port integer
---@param timeout number? seconds
---@return sm.Listener?
---@return string? err
function VM:listen(port, timeout)
    check("vm:listen", 1, port, "port", "integer")
    check("vm:listen", 2, timeout, "timeout", "number?")
    local agent, err = agent_of(self)
    if not agent then
        return nil, err
    end
    return require("sm.guest_stream").listen(agent, port, timeout)
end

--- Wait until the VM has ended. Yields.
---@async
---@param timeout number? seconds
---@return table? ending { reason = "exited"|"poweroff"|"reboot"|"panic"|"crash"|"killed", code = integer?, detail = string? }
---@return string? err "timeout"
function VM:wait(timeout)
    check("vm:wait", 1, timeout, "timeout", "number?")
    if not self.ending then
        local ok, err = loop.wait_in(self.waiters, timeout)
        if not ok then
            return nil, err
        end
    end
    return self.ending
end

-- The VM's own command is asked first: its exit code is then the VM's.
local function stop_main(self, grace)
    local main = self.main
    if main and not main.proc.exit then
        main.proc:signal(main.stop_signal)
        if not main.proc:wait(grace) then
            main.proc:signal("KILL")
            main.proc:wait(5)
        end
        self:wait(10)
    end
end

--- Ask the guest to end in good order: its command gets its stop signal, after
--- `grace` seconds SIGKILL; then all other processes likewise; the disks are
--- synced. A guest that does not do as asked is killed. Yields.
---@async
---@param opts { grace: number? }?
---@return table ending as VM:wait
function VM:stop(opts)
    check("vm:stop", 1, opts, "opts", "table?")
    local grace = opts and opts.grace or 10
    stop_main(self, grace)
    local agent = agent_of(self)
    if agent then
        agent:shutdown { grace = grace }
        if self:wait(grace + 10) then
            return self.ending
        end
    end
    return self:kill()
end

--- End the VM now, as pulling the plug does. Yields.
---@async
---@return table ending
function VM:kill()
    if not self.ending then
        self.killed = true
        self.parts.worker:call("vm.kill", {})
        if not self:wait(5) then
            self.parts.worker:close()
            ended(self, { reason = "killed", detail = "the worker did not answer" })
        end
    end
    return self.ending
end

--- End the VM if it runs, and give everything back. Idempotent. Yields.
---@async
function VM:close()
    if self.closed then
        return
    end
    self.closed = true
    if not self.ending then
        self:kill()
    end
    if self.watcher and loop.current() ~= self.watcher then
        self.watcher:join(5)
    end
    if self.server then
        self.server:close()
    end
    machine.stop(self.parts)
    if self.own_image then
        self.image:close()
    end
end

VM.__close = VM.close

--- Keep what the VM has changed as a new layer on its image, in the store under
--- a name; see sm.commit. Yields.
---@async
---@param name string?
---@param opts table?
---@return { reference: string, digest: string, layer: string, size: integer }?
---@return string? err
function VM:commit(name, opts)
    check("vm:commit", 1, name, "name", "string?")
    check("vm:commit", 2, opts, "opts", "table?")
    return require("sm.commit").commit(self, name, opts)
end

--- Save the machine, its memory and its writable disk; it goes on where it was.
--- A snapshot with a name lies in the snapshot folder and keeps its image from
--- being removed; one with a path lies there, and that is all. With `diff` it holds
--- only what changed since the machine was restored, or since its last diff, and
--- needs that parent; the first of a machine that was booted is a whole one. With
--- `live` its memory is copied while it runs (`progress(bytes left)`), and it stands
--- still only for what it wrote meanwhile. Yields.
---@async
---@param opts { name: string?, path: string?, diff: boolean?, live: boolean?, progress: fun(left: integer)?, before: (fun(vm: sm.VM): any)|string[]|nil }
---@return sm.Snapshot?
---@return string? err
function VM:snapshot(opts)
    check("vm:snapshot", 1, opts, "opts", "table")
    return require("sm.capture").create(self, opts)
end

--- Copies of this machine as it is now, running beside it: one, or a list of
--- `n`. Each knows its `parent`, and this VM its `children`. Yields.
---@async
---@param n integer?
---@param cfg table? as sm.restore
---@return sm.VM|sm.VM[]|nil
---@return string? err
function VM:fork(n, cfg)
    check("vm:fork", 1, n, "n", "integer?")
    check("vm:fork", 2, cfg, "cfg", "table?")
    return require("sm.clone").fork(self, n, cfg)
end

--- Counters of the machine, from the worker. Yields.
---@async
---@return table?
---@return string? err
function VM:stats()
    return self.parts.worker:call("vm.stats", {})
end

--- Counters of the network cards, from outside the guest: frames, bytes, drops
--- by their reason, the flows. Yields.
---@async
---@return table[]? cards
---@return string? err
function VM:net_stats()
    if not self.parts.network then
        return {}
    end
    return self.parts.network:stats()
end

--- Record the frames of a network card from now on, in pcap's format, those that the
--- policy lets through: into a file, or to be read piece by piece. A reader who is slow
--- loses frames, and the guest no time. Yields.
---@async
---@param opts { card: integer?, path: string? }? card: 1, the first
---@return sm.Capture?
---@return string? err
function VM:capture(opts)
    check("vm:capture", 1, opts, "opts", "table?")
    if not self.parts.network then
        return nil, "capture: the VM has no network"
    end
    return require("sm.packet_capture").new(self.parts.network, opts or {})
end

return M
