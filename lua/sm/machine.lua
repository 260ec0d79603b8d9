-- SPDX-License-Identifier: Apache-2.0
--
-- From an image to a machine that runs it: which devices, in which order, with
-- which kernel command line. Everything here is a command to the worker that
-- any script can give as well (sm.worker, or sm.core in process).
--
-- The order is the budget: the listener for the agent exists before the
-- worker, the worker is spawned before the kernel is looked for, so that
-- process start overlaps with file work.

local uv = require "luv"
local loop = require "sm.loop"
local agent = require "sm.agent"
local initramfs = require "sm.initramfs"
local kernel = require "sm.kernel"
local net = require "sm.net"
local paths = require "sm.paths"
local rundir = require "sm.rundir"
local scratch = require "sm.scratch"
local worker = require "sm.worker"

local M = {}

--- The port the guest's agent dials (SM_PROTO_VSOCK_PORT).
M.AGENT_PORT = 1024
M.GUEST_CID = 3

-- Said to every kernel; `--append` comes last and so wins.
--   panic=-1    reboot at once after a panic: pvpanic has told us by then
--   reboot=a    by ACPI's reset register
--   i8042.*     there is no keyboard controller to wait for
--   tsc=...     the host's clock is what it is
local CMDLINE = "console=ttyS0 panic=-1 reboot=a i8042.noaux i8042.nokbd i8042.nopnp "
    .. "tsc=reliable no_timer_check cryptomgr.notests random.trust_cpu=on"

--- The kernel command line of a configuration.
---@param cfg table checked configuration
---@return string
function M.cmdline(cfg)
    local line = CMDLINE
    if not cfg.verbose then
        line = line .. " quiet loglevel=3"
    end
    if cfg.append then
        line = line .. " " .. cfg.append
    end
    return line
end

--- Where the guest's PID 1 lies.
---@return string?
---@return string? err
function M.guest_init()
    return paths.ours("SM_INIT", "init", { "/guest/init" })
end

-- Listen where the worker's vsock device will connect for the guest.
local function listen(path)
    local server = assert(uv.new_pipe(false))
    local ok, err = server:bind(path)
    if not ok then
        server:close()
        return nil, err
    end
    local waiting, queue = nil, {}
    server:listen(8, loop.guard(function(listen_err)
        if listen_err then
            return
        end
        local client = uv.new_pipe(false)
        if not server:accept(client) then
            client:close()
        elseif waiting then
            local settle = waiting
            waiting = nil
            settle(client)
        else
            queue[#queue + 1] = client
        end
    end))
    local self = {}
    --- The next connection, or nil, "timeout". Yields.
    function self.accept(timeout)
        if queue[1] then
            return table.remove(queue, 1)
        end
        return loop.await(function(settle)
            waiting = settle
            return function()
                waiting = nil
            end
        end, timeout)
    end
    function self.close()
        for _, client in ipairs(queue) do
            client:close()
        end
        queue = {}
        if not server:is_closing() then
            server:close()
        end
    end
    return self
end

-- The devices of a machine, in the order they are added. A snapshot keeps this
-- list: its copies get the same devices in the same order.
local function devices_of(cfg, image, files, dir, network)
    local list = {
        { type = "serial" },
        { type = "rng" },
        { type = "vsock", cid = M.GUEST_CID, path = dir .. "/v.sock" },
        cfg.rootfs == "pmem" and { type = "pmem", extents = image.extents }
            or { type = "blk", serial = "rootfs", readonly = true, extents = image.extents },
    }
    if not cfg.read_only then
        list[#list + 1] = {
            type = "blk", serial = "scratch", size = cfg.disk,
            extents = files.scratch,
            overlay = files.overlay, ephemeral = true,
        }
    end
    for _, device in ipairs(network and network.devices or {}) do
        list[#list + 1] = device[2]
    end
    return list
end

-- The same devices for a copy: sockets, cards and overlays of its own. What a
-- writable disk held comes with the snapshot, in place of its base.
local function devices_again(saved, image, id, dir, network)
    local list, nets = {}, 0
    for i, device in ipairs(saved) do
        local copy = {}
        for key, value in pairs(device) do
            copy[key] = value
        end
        if copy.type == "vsock" then
            copy.path = dir .. "/v.sock"
        elseif copy.type == "net" then
            nets = nets + 1
            copy = network.devices[nets][2]
        elseif copy.overlay then
            local path, err = scratch.overlay(("%s-%d"):format(id, i))
            if not path then
                return nil, err
            end
            copy.overlay, copy.ephemeral, copy.extents = path, true, nil
        elseif copy.extents then
            copy.extents = image.extents -- the store may lie elsewhere now
        end
        list[i] = copy
    end
    return list
end

-- Give the worker commands, in order, until one is refused. Yields.
local function give(w, steps)
    local res, err
    for _, step in ipairs(steps) do
        res, err = w:call(step[1], step[2])
        if res == nil then
            if err:find("/dev/kvm", 1, true) then
                err = err .. "; `sm doctor` tells what to do"
            end
            return nil, err
        end
    end
    return res
end

-- vm.create, the devices, and then what is last. Yields.
local function wire(w, create, devices, last)
    local steps = { { "vm.create", create } }
    for _, device in ipairs(devices) do
        steps[#steps + 1] = { "device.add", device }
    end
    steps[#steps + 1] = last
    return give(w, steps)
end

-- What a stock kernel needs for a root in memory, in the order of loading.
local NET_MODULES = { "failover.ko", "net_failover.ko", "virtio_net.ko", "inet_diag.ko", "tcp_diag.ko" }
local PMEM_MODULES = { "libnvdimm.ko", "nd_btt.ko", "nd_pmem.ko", "nd_virtio.ko", "virtio_pmem.ko" }

-- The drivers that go into the initramfs, or nil and why there are none.
local function modules_for(found, cfg)
    local modules = found.initrd_modules
    if #modules == 0 then
        return modules
    end
    local wanted = {}
    if #cfg.net > 0 then
        table.move(NET_MODULES, 1, #NET_MODULES, 1, wanted)
    end
    if cfg.rootfs == "pmem" then
        table.move(PMEM_MODULES, 1, #PMEM_MODULES, #wanted + 1, wanted)
    end
    local by_name = {}
    for _, list in ipairs { found.initrd_modules, found.extra_modules or {} } do
        for _, module in ipairs(list) do
            by_name[module.name] = module
        end
    end
    modules = table.move(modules, 1, #modules, 1, {})
    for _, name in ipairs(wanted) do
        if not by_name[name] then
            return nil, ("this kernel comes without %s; use our own kernel, or do without (net = \"none\", rootfs = \"blk\")"):format(name)
        end
        modules[#modules + 1] = by_name[name]
    end
    return modules
end

-- Files the machine needs, made or found. Yields.
local function prepare(cfg, id)
    local found, err = kernel.find(cfg.kernel)
    if not found then
        return nil, err
    end
    local init
    init, err = M.guest_init()
    if not init then
        return nil, err
    end
    local initrd
    local modules
    modules, err = modules_for(found, cfg)
    if not modules then
        return nil, err
    end
    initrd, err = initramfs.build { init = init, modules = modules }
    if not initrd then
        return nil, err
    end
    local files = { kernel = found, initrd = initrd }
    if not cfg.read_only then
        files.scratch, err = scratch.template(cfg.disk)
        if not files.scratch then
            return nil, err
        end
        files.overlay, err = scratch.overlay(id)
        if not files.overlay then
            return nil, err
        end
    end
    return files
end

-- A name for a machine that was given none.
local function new_id()
    return (uv.random(6):gsub(".", function(c)
        return ("%02x"):format(c:byte())
    end))
end

-- What every machine begins with: the folder, the listener, the worker and the
-- network. Yields.
local function begin(cfg, image)
    local id = cfg.name or new_id()
    local dir, err = rundir.new(id)
    if not dir then
        return nil, err
    end
    local parts = { rundir = dir, id = id }
    parts.listener, err = listen(("%s/v.sock_%d"):format(dir.path, M.AGENT_PORT))
    if parts.listener then
        parts.worker, err = worker.spawn { name = id }
    end
    if parts.worker then
        parts.network, err = net.start(cfg, image, id, dir.path)
    end
    if err then
        M.stop(parts)
        return nil, err
    end
    return parts
end

--- Start a machine. Yields.
---@async
---@param image table what sm.image gives
---@param cfg table checked configuration (sm.config)
---@param marks table timeline, filled in (seconds, loop.now)
---@return table? parts { worker, rundir, listener, kernel, devices }
---@return string? err
function M.start(image, cfg, marks)
    local parts, err = begin(cfg, image)
    if not parts then
        return nil, err
    end
    local function give_up(why)
        M.stop(parts)
        return nil, why
    end
    local files
    files, err = prepare(cfg, parts.id)
    if not files then
        return give_up(err)
    end
    parts.kernel = files.kernel
    parts.devices = devices_of(cfg, image, files, parts.rundir.path, parts.network)
    local ok
    ok, err = wire(parts.worker, { cpus = cfg.cpus, memory = cfg.memory }, parts.devices, {
        "kernel.load", { kernel = files.kernel.path, initrd = files.initrd, cmdline = M.cmdline(cfg) },
    })
    if not ok then
        return give_up(err)
    end
    marks.vm_ready = loop.now()
    ok, err = parts.worker:call("vm.start", {})
    if ok == nil then
        return give_up(err)
    end
    marks.kernel_entered = loop.now()
    return parts
end

--- Start a copy of a saved machine: the worker, the same devices, its state; it
--- runs when this returns. Yields.
---@async
---@param paths string[] of the snapshot, last, and of those it needs
---@param saved table { cpus, devices }
---@param image table
---@param opts table { name, eager, clock, net, set … }; set: path of its working set
---@param marks table timeline, filled in
---@return table? parts as start
---@return string? err
function M.restore(paths, saved, image, opts, marks)
    local parts, err = begin(opts, image)
    if not parts then
        return nil, err
    end
    local function give_up(why)
        M.stop(parts)
        return nil, why
    end
    parts.devices, err = devices_again(saved.devices, image, parts.id, parts.rundir.path, parts.network)
    if not parts.devices then
        return give_up(err)
    end
    local ok
    ok, err = wire(parts.worker, { cpus = saved.cpus }, parts.devices, {
        "snapshot.load", { path = paths[#paths], parents = table.move(paths, 1, #paths - 1, 1, {}), eager = opts.eager,
            clock = opts.clock, working_set = opts.set },
    })
    if not ok then
        return give_up(err)
    end
    parts.loaded = ok
    marks.vm_ready = loop.now()
    ok, err = parts.worker:call("vm.start", {})
    if ok == nil then
        return give_up(err)
    end
    marks.resumed = loop.now()
    return parts
end

--- Undo what start did, in any state it stopped in. Yields.
---@async
function M.stop(parts)
    if parts.agent then
        parts.agent:close()
        parts.agent = nil
    end
    if parts.listener then
        parts.listener.close()
        parts.listener = nil
    end
    if parts.worker then
        parts.worker:close()
        parts.worker = nil
    end
    if parts.network then
        parts.network:close()
        parts.network = nil
    end
    if parts.rundir then
        parts.rundir:close()
        parts.rundir = nil
    end
    loop.flush()
end

--- Wait for the agent on the listener. A connection that breaks before its HELLO is
--- not the end: a guest's kernel gives up a dial after two seconds, also when it had
--- no time to run in them, and the agent dials again. Yields.
---@async
---@param parts table
---@param timeout number seconds
---@return table? agent
---@return string? err
function M.await_agent(parts, timeout)
    local deadline = loop.now() + timeout
    while true do
        local stream, why = parts.listener.accept(deadline - loop.now())
        if not stream then
            return nil, why
        end
        local found, err = agent.accept(stream, { timeout = math.max(0, deadline - loop.now()) })
        if found or not err:find("^agent: connection lost") or loop.now() >= deadline then
            return found, err
        end
    end
end

return M
