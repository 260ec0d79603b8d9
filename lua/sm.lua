-- SPDX-License-Identifier: Apache-2.0
--
-- The front door.
--
--   local sm = require "sm"
--   local image = assert(sm.image "debian:12")
--   local vm <close> = assert(sm.start(image, { cpus = 2, memory = "1G" }))
--   local r = assert(vm:exec { argv = { "uname", "-a" } })
--   print(r.status, r.stdout)
--
-- Calls that wait give up the thread to other tasks of `sm.loop`; called from
-- a plain script they simply return when they are done.

local check = require "sm.check"
local config = require "sm.config"
local net = require "sm.net"

local M = {}

M.version = require "sm.version"
M.loop = require "sm.loop"
--- Networks between VMs: sm.net.switch().
M.net = net

--- Make an image ready to run: fetched when it is not here. `ref` is a
--- registry reference (`debian:12`, `host:5000/app@sha256:…`) or an image of
--- this machine (`oci:DIR[:TAG]`, `oci-archive:FILE`, `docker-archive:FILE`,
--- `dir:DIR`, a path to any of these, `-` for standard input). `opts` is what
--- sm.image's `pull` takes, its `policy` under the name `pull`. Yields.
---@async
---@param ref string
---@param opts table?
---@return table? image { reference, digest, config, extents, size }
---@return string? err
function M.image(ref, opts)
    check("sm.image", 1, ref, "ref", "string")
    check("sm.image", 2, opts, "opts", "table?")
    local options = {}
    for key, value in pairs(opts or {}) do
        options[key == "pull" and "policy" or key] = value
    end
    return require("sm.image").get(ref, options)
end

--- Boot a VM on an image. Yields.
---@async
---@param image table|string what sm.image gives, or a reference
---@param cfg table? see sm.config
---@return sm.VM?
---@return string? err
function M.start(image, cfg)
    check("sm.start", 1, image, "image", "table|string")
    check("sm.start", 2, cfg, "cfg", "table?")
    local checked, err = config.check(cfg)
    if not checked then
        return nil, err
    end
    if type(image) == "string" then
        image, err = M.image(image, { pull = checked.pull, platform = checked.platform, progress = checked.progress })
        if not image then
            return nil, err
        end
    end
    return require(checked.warm and "sm.warm" or "sm.vm").start(image, checked)
end

--- All counters of a VM in one table: vcpus, devices, memory, and how its
--- process is confined. Takes a VM of any kind. Yields.
---@async
---@param vm table|userdata
---@return table?
---@return string? err
function M.stats(vm)
    check("sm.stats", 1, vm, "vm", "table|userdata")
    return vm:stats()
end

--- Trace a VM for a while; see sm.trace. Yields.
---@async
---@param vm table|userdata
---@param opts table?
---@return table records
function M.trace(vm, opts)
    check("sm.trace", 1, vm, "vm", "table|userdata")
    check("sm.trace", 2, opts, "opts", "table?")
    return require("sm.trace").record(vm, opts)
end

--- Start a VM that outlives this process: `sm run -d`. A small process of its
--- own holds it. Yields.
---@async
---@param image table|string what sm.image gives, or a reference
---@param opts { config: table?, process: table, keep: boolean? } config as for sm.start; process {argv, env, cwd, user, tty, rows, cols, stdin, stop_signal}; keep: its log and exit code stay after its end, until sm.remove
---@return string? id
---@return string? err
---@return table? failure
function M.launch(image, opts)
    check("sm.launch", 1, image, "image", "table|string")
    check("sm.launch", 2, opts, "opts", "table")
    return require("sm.owner").launch(image, opts)
end

--- The VMs of this user, whoever started them, the newest first: { id, image,
--- status = "running"|"exited", code, created, finished, command, owner, worker,
--- cpus, memory, detached … }. Yields.
---@async
---@return table[]?
---@return string? err
function M.vms()
    return require("sm.attached").list()
end

--- A handle to a running VM of another process, with the methods of one's own:
--- exec, spawn, read_file, write_file, wait, stop, kill, stats. Closing it lets
--- go of the VM. Yields.
---@async
---@param name string|table its name, the beginning of it, or an entry of sm.vms
---@return sm.AttachedVM?
---@return string? err
function M.attach(name)
    check("sm.attach", 1, name, "name", "string|table")
    return require("sm.attached").attach(name)
end

--- Forget a VM that has exited: its log and exit code. Yields.
---@async
---@param name string
---@return true?
---@return string? err
function M.remove(name)
    check("sm.remove", 1, name, "name", "string")
    local info, err = require("sm.attached").find(name)
    if not info then
        return nil, err
    end
    return require("sm.rundir").remove(info.dir)
end

--- A copy of a saved machine. `snapshot` is what vm:snapshot gave, a name, or a
--- path (with a slash). The copy has its own hostname, machine id, randomness and
--- wall clock; commands run in it when this returns. Yields.
---@async
---@param snapshot sm.Snapshot|string
---@param cfg { name: string?, hostname: string?, clock: "freeze"|"advance"|nil, eager: boolean?, working_set: boolean?, after: (fun(vm: sm.VM): any)|string[]|nil }?
---@return sm.VM?
---@return string? err
function M.restore(snapshot, cfg)
    check("sm.restore", 1, snapshot, "snapshot", "table|string")
    check("sm.restore", 2, cfg, "cfg", "table?")
    return require("sm.clone").restore(snapshot, cfg)
end

--- A copy of a saved machine that outlives this process, as sm.launch's. Yields.
---@async
---@param snapshot string a name or a path
---@param opts { config: table? }? config as for sm.restore
---@return string? id
---@return string? err
function M.launch_copy(snapshot, opts)
    check("sm.launch_copy", 1, snapshot, "snapshot", "string")
    check("sm.launch_copy", 2, opts, "opts", "table?")
    return require("sm.owner").launch_copy(snapshot, opts)
end

--- Snapshots kept here: list, open, chain, flatten, remove, verify; export and import.
M.snapshot = setmetatable({}, { __index = function(_, key)
    local from = (key == "export" or key == "import") and "sm.snapshot_archive" or "sm.snapshot"
    return require(from)[key]
end })

--- Keep a pool in a process of its own, which outlives this one; its name. `cfg` is
--- sm.pool's without functions: `warmup` is a command. Yields.
---@async
---@param name string
---@param cfg table
---@return string? name
---@return string? err
function M.launch_pool(name, cfg)
    check("sm.launch_pool", 1, name, "name", "string")
    check("sm.launch_pool", 2, cfg, "cfg", "table")
    return require("sm.owner").launch_pool(name, cfg)
end

--- The pools of this user that processes of their own keep, the newest first. Yields.
---@async
---@return table[]?
---@return string? err
function M.pools()
    return require("sm.pools").list()
end

--- Connect to one of them, to take VMs from it. Yields.
---@async
---@param name string
---@return sm.AttachedPool?
---@return string? err
function M.attach_pool(name)
    check("sm.attach_pool", 1, name, "name", "string")
    return require("sm.pools").attach(name)
end

--- A pool of copies of one machine, ready to be taken. Yields.
---@async
---@param cfg table see sm.pool
---@return sm.Pool?
---@return string? err
function M.pool(cfg)
    check("sm.pool", 1, cfg, "cfg", "table")
    return require("sm.pool").new(cfg)
end

return M
