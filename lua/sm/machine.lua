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

-- Where the guest's PID 1 lies: next to the C modules.
local function guest_init()
    local core = assert(package.searchpath("sm.core", package.cpath))
    local base = core:match("^(.*)/sm/core%.so$")
    for _, path in ipairs { base .. "/guest/init", base .. "/../../../libexec/sm/init" } do
        if uv.fs_stat(path) then
            return path
        end
    end
    return nil, "the guest's agent is missing: build/guest/init; run `make`"
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

-- Give the worker its machine. Yields.
local function wire(w, cfg, image, files, dir, network)
    local steps = {
        { "vm.create", { cpus = cfg.cpus, memory = cfg.memory } },
        { "device.add", { type = "serial" } },
        { "device.add", { type = "rng" } },
        { "device.add", { type = "vsock", cid = M.GUEST_CID, path = dir .. "/v.sock" } },
        cfg.rootfs == "pmem" and { "device.add", { type = "pmem", extents = image.extents } }
            or { "device.add", { type = "blk", serial = "rootfs", readonly = true, extents = image.extents } },
    }
    if not cfg.read_only then
        steps[#steps + 1] = { "device.add", {
            type = "blk", serial = "scratch", size = cfg.disk,
            extents = { { path = files.scratch, offset = 0, length = cfg.disk } },
            overlay = files.overlay, ephemeral = true,
        } }
    end
    for _, device in ipairs(network and network.devices or {}) do
        steps[#steps + 1] = device
    end
    steps[#steps + 1] = { "kernel.load", {
        kernel = files.kernel.path, initrd = files.initrd, cmdline = M.cmdline(cfg),
    } }
    for _, step in ipairs(steps) do
        local res, err = w:call(step[1], step[2])
        if res == nil then
            if err:find("/dev/kvm", 1, true) then
                err = err .. "; `sm doctor` tells what to do"
            end
            return nil, err
        end
    end
    return true
end

-- What a stock kernel needs for a root in memory, in the order of loading.
local NET_MODULES = { "failover.ko", "net_failover.ko", "virtio_net.ko" }
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
    init, err = guest_init()
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

--- Start a machine and wait for its agent's first word. Yields.
---@async
---@param image table what sm.image gives
---@param cfg table checked configuration (sm.config)
---@param marks table timeline, filled in (seconds, loop.now)
---@return table? parts { worker, agent, rundir, listener, kernel }
---@return string? err
function M.start(image, cfg, marks)
    local id = cfg.name or ("%08x%04x"):format(os.time() & 0xffffffff, math.random(0, 0xffff))
    local dir, err = rundir.new(id)
    if not dir then
        return nil, err
    end
    local parts = { rundir = dir, id = id }
    local function give_up(why)
        M.stop(parts)
        return nil, why
    end
    parts.listener, err = listen(("%s/v.sock_%d"):format(dir.path, M.AGENT_PORT))
    if not parts.listener then
        return give_up(err)
    end
    parts.worker, err = worker.spawn { name = id }
    if not parts.worker then
        return give_up(err)
    end
    parts.network, err = net.start(cfg, image, id, dir.path)
    if err then
        return give_up(err)
    end
    local files
    files, err = prepare(cfg, id)
    if not files then
        return give_up(err)
    end
    parts.kernel = files.kernel
    local ok
    ok, err = wire(parts.worker, cfg, image, files, dir.path, parts.network)
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

--- Wait for the agent on the listener. Yields.
---@async
---@param parts table
---@param timeout number seconds
---@return table? agent
---@return string? err
function M.await_agent(parts, timeout)
    local stream, why = parts.listener.accept(timeout)
    if not stream then
        return nil, why
    end
    return agent.accept(stream, { timeout = timeout })
end

return M
