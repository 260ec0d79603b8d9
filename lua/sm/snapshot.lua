-- SPDX-License-Identifier: Apache-2.0
--
-- Snapshots: a machine in a file, and copies of it.
--
-- The file is core/snap.h's; what the core does not know of (which image, which
-- devices, the configuration) is JSON in its description. A snapshot with a
-- name is <data>/snapshots/NAME.sms; it is written beside its place, forced to
-- the disk, made read-only and linked to its name, so that whatever is killed
-- whenever, a name stands for a whole snapshot or for none.
--
-- What it needs: its own file, and its image, which the store keeps as long as
-- the file is there (store.lua, pins). The kernel is in its memory, the writable
-- disk in its file.
--
-- A copy is not its source: the machine's generation id changes before it runs
-- (core/vm_state.c), its agent dials again and is told the wall clock, fresh
-- randomness, a hostname and a machine id of its own. /proc/sys/kernel/random/
-- boot_id stays the source's: kernels do not let it be changed.

local uv = require "luv"
local config = require "sm.config"
local files = require "sm.files"
local json = require "sm.json"
local lock = require "sm.lock"
local loop = require "sm.loop"
local paths = require "sm.paths"
local reference = require "sm.reference"

local M = {}

local FORMAT = 1
local SUFFIX = ".sms"
local READ_ONLY = tonumber("400", 8)

---@class sm.Snapshot
---@field name string? nil: it has only a path
---@field path string
---@field id string 32 hex digits
---@field created number seconds since 1970
---@field cpus integer
---@field memory integer bytes of RAM
---@field stored integer bytes on the disk
---@field image { reference: string, digest: string }
---@field fingerprint string of the CPU it was taken on
local Snapshot = {}
Snapshot.__index = Snapshot
Snapshot.__name = "sm.Snapshot"

function Snapshot:__tostring()
    return ("snapshot %s"):format(self.name or self.path)
end

--- Where snapshots with a name lie.
---@return string
function M.dir()
    return paths.data() .. "/snapshots"
end

--- Where the snapshot of a name lies, or would.
---@param name string
---@return string
function M.path(name)
    return ("%s/%s%s"):format(M.dir(), name, SUFFIX)
end

local function check_name(name)
    if type(name) ~= "string" or not name:match "^[%w][%w_.-]*$" or #name > 128 then
        return nil, ("snapshot: name '%s': expected letters, digits, '_', '.', '-' (128 at most)"):format(tostring(name))
    end
    return true
end

-- ---------------------------------------------------------------- reading

local core

-- What the file says of itself; `verify`: and whether its memory is whole.
local function read(path, name, verify)
    core = core or require "sm.core"
    local info, why = core.snapshot(path, verify or false)
    if not info then
        return nil, "snapshot " .. (name and why:gsub("^.-: ", name .. ": ", 1) or why)
    end
    local meta = json.decode_object(info.meta)
    if not meta or meta.format ~= FORMAT or type(meta.image) ~= "table" or type(meta.devices) ~= "table"
        or type(meta.cfg) ~= "table" or not reference.parse_digest(meta.image.digest) then
        return nil, ("snapshot %s: it was not made by sm run or vm:snapshot"):format(name or path)
    end
    local stat = uv.fs_stat(path)
    return setmetatable({
        name = name,
        path = path,
        id = info.id,
        created = info.created_ns / 1e9,
        cpus = info.cpus,
        memory = info.ram_bytes,
        stored = stat and stat.blocks * 512 or 0,
        image = meta.image,
        source = meta.source,
        fingerprint = info.fingerprint,
        saved = { cpus = info.cpus, devices = meta.devices, cfg = meta.cfg },
    }, Snapshot)
end

--- A snapshot by name, or by path when there is a slash in it.
---@param what string
---@return sm.Snapshot?
---@return string? err
function M.open(what)
    if type(what) == "string" and what:find("/", 1, true) then
        return read(what)
    end
    local ok, err = check_name(what)
    if not ok then
        return nil, err
    end
    local path = M.path(what)
    if not uv.fs_stat(path) then
        return nil, ("snapshot %s: no such snapshot"):format(what)
    end
    return read(path, what)
end

--- All with a name, oldest first; those that cannot be read are in the second
--- list as { name, error }.
---@return sm.Snapshot[]
---@return table[] damaged
function M.list()
    local list, damaged = {}, {}
    for _, entry in ipairs(files.list(M.dir())) do
        local name = entry.name:match("^([%w].*)" .. SUFFIX:gsub("%.", "%%.") .. "$")
        if name then
            local found, err = M.open(name)
            if found then
                list[#list + 1] = found
            elseif uv.fs_stat(M.dir() .. "/" .. entry.name) then
                damaged[#damaged + 1] = { name = name, error = err }
            end
        end
    end
    table.sort(list, function(a, b)
        return a.created < b.created
    end)
    return list, damaged
end

--- Whether memory and disks in the file are what was written. Blocks while it
--- reads them.
---@param what sm.Snapshot|string
---@return true?
---@return string? err
function M.verify(what)
    local snapshot, err = what, nil
    if type(what) == "string" then
        snapshot, err = M.open(what)
    end
    if snapshot then
        snapshot, err = read(snapshot.path, snapshot.name, true)
    end
    if not snapshot then
        return nil, err
    end
    return true
end

-- The store keeps an image as long as the file at `path` is there.
local function pin(path, digest)
    local opened, err = require("sm.store").open()
    if not opened then
        return nil, err
    end
    return opened:pin(path, digest)
end

local function unpin(path)
    local opened = require("sm.store").open()
    if opened and not uv.fs_lstat(path) then
        opened:unpin(path)
    end
end

--- Forget a snapshot. VMs that run from it go on.
---@param what sm.Snapshot|string
---@return true?
---@return string? err
function M.remove(what)
    local path = type(what) == "table" and what.path
    if not path then
        if not what:find("/", 1, true) then
            local ok, err = check_name(what)
            if not ok then
                return nil, err
            end
            path = M.path(what)
        else
            path = what
        end
    end
    local ok, err, code = uv.fs_unlink(path)
    unpin(path:sub(1, 1) == "/" and path or uv.cwd() .. "/" .. path)
    if not ok then
        return nil, ("snapshot %s: %s"):format(type(what) == "table" and tostring(what) or what,
            code == "ENOENT" and "no such snapshot" or err)
    end
    return true
end

-- ---------------------------------------------------------------- writing

-- The cards of a machine, as a copy gets them. On a network of its own a copy may
-- keep address and MAC; on one it shares with its source it would be a twin.
local function cards_of(vm)
    local list = {}
    for i, card in ipairs(vm.parts.network and vm.parts.network.cards or {}) do
        if card.type ~= "user" then
            return nil, ("snapshot: network card %d is on a %s, where a copy would have its source's address; "
                .. "only machines on user networks can be copied"):format(i, card.type)
        end
        list[i] = {
            type = card.type, mac = card.mac, mtu = card.mtu, policy = card.policy, allow = card.allow,
            deny = card.deny, dns = card.dns, search = card.search, rate = card.rate,
            on_flow = card.on_flow and true or nil, -- there was one: a copy without it would be freer
        }
    end
    return list
end

-- What makes the machine again, besides its state.
local function describe(vm)
    local image, cfg = vm.image, vm.cfg
    local cards, err = cards_of(vm)
    if not cards then
        return nil, err
    end
    local extents = {}
    for i, e in ipairs(image.extents) do
        extents[i] = { path = e.path, offset = e.offset, length = e.length }
    end
    return json.encode {
        format = FORMAT,
        source = vm.id,
        image = {
            reference = image.reference, name = image.name, digest = image.digest,
            size = image.size, extents = extents, config = image.config,
        },
        devices = vm.parts.devices,
        cfg = {
            cpus = cfg.cpus, memory = cfg.memory, disk = cfg.disk, read_only = cfg.read_only,
            rootfs = cfg.rootfs, net = cards, allow = cfg.allow, dns = cfg.dns,
            dns_search = cfg.dns_search, add_host = cfg.add_host,
        },
    }
end

-- Unfinished files of processes that are gone. Each holds a lock on its own.
local function sweep(dir)
    for _, entry in ipairs(files.list(dir)) do
        if entry.name:match "^%.new%-" or entry.name:match "^%.fork%-" then
            local path = dir .. "/" .. entry.name
            local free = lock.try(path)
            if free then
                free:remove()
            end
        end
    end
end

-- An empty file beside the place it is meant for, locked while we write it.
local function temporary(dir)
    local ok, err = paths.make(dir)
    if not ok then
        return nil, err
    end
    sweep(dir)
    local path = ("%s/.new-%d-%s"):format(dir, uv.os_getpid(), uv.random(6):gsub(".", function(c)
        return ("%02x"):format(c:byte())
    end))
    local held
    held, err = lock.try(path)
    if not held then
        return nil, err or path .. ": taken by another"
    end
    return held
end

-- Pause, write, go on. The pause is as long as the writing into the page cache.
-- Yields.
local function capture(vm, path, meta)
    local worker = vm.parts.worker
    local ok, err = worker:call("vm.pause", {})
    if not ok then
        return nil, err
    end
    local began = loop.now()
    local saved, why = worker:call("snapshot.save", { path = path, meta = meta, sync = false })
    ok, err = worker:call("vm.resume", {})
    if not saved then
        return nil, why
    elseif not ok then
        return nil, err
    end
    saved.pause = loop.now() - began
    return saved
end

-- A function of the caller's, or a command in the guest. Yields.
local function run_hook(vm, hook, what)
    if type(hook) == "function" then
        local ok, err = hook(vm)
        if ok == false or (ok == nil and err) then
            return nil, ("%s: %s"):format(what, err or "refused")
        end
    elseif hook then
        local result, err = vm:exec { argv = hook }
        if not result then
            return nil, ("%s: %s"):format(what, err)
        elseif result.status ~= 0 then
            return nil, ("%s: `%s` ended with %d: %s"):format(what, table.concat(hook, " "), result.status,
                result.stderr:gsub("%s+$", ""))
        end
    end
    return true
end

-- Link to a name that must be free, so that nothing is ever replaced.
local function publish(held, path, name, temporary_too)
    local ok, err = true, nil
    if not temporary_too then
        ok, err = files.sync(held.path)
    end
    -- One that will be swept stays writable: a lock opens it for that.
    if ok and not temporary_too then
        ok, err = uv.fs_chmod(held.path, READ_ONLY)
    end
    local code
    if ok then
        ok, err, code = uv.fs_link(held.path, path)
        if code == "EEXIST" then
            err = ("snapshot %s: there is one of that name"):format(name)
        end
    end
    if ok then
        ok, err = files.sync(path:match "^(.*)/")
    end
    return ok, err
end

local known = { name = true, path = true, before = true, temporary = true }

--- See VM:snapshot; `temporary`: it need not survive a crash of the host. Yields.
---@async
---@param vm sm.VM
---@param opts table
---@return sm.Snapshot?
---@return string? err
function M.create(vm, opts)
    for key in pairs(opts or {}) do
        if not known[key] then
            return nil, ("snapshot: unknown key '%s' (known: name, path, before)"):format(tostring(key))
        end
    end
    if not opts or (opts.name == nil) == (opts.path == nil) then
        return nil, "snapshot: needs a name, or a path"
    end
    local path, ok, err = opts.path, nil, nil
    if opts.name then
        ok, err = check_name(opts.name)
        if not ok then
            return nil, err
        end
        path = M.path(opts.name)
    elseif path:sub(1, 1) ~= "/" then
        path = uv.cwd() .. "/" .. path
    end
    if uv.fs_lstat(path) then
        return nil, ("snapshot %s: there is one of that name"):format(opts.name or opts.path)
    elseif vm.ending then
        return nil, "snapshot: " .. vm:obituary()
    end
    local meta
    meta, err = describe(vm)
    if not meta then
        return nil, err
    end
    ok, err = run_hook(vm, opts.before, "before the snapshot")
    if not ok then
        return nil, err
    end
    local held
    held, err = temporary(path:match "^(.*)/")
    if not held then
        return nil, "snapshot: " .. err
    end
    local saved
    saved, err = capture(vm, held.path, meta)
    ok = saved
    if ok then
        ok, err = pin(path, vm.image.digest)
    end
    if ok then
        ok, err = publish(held, path, opts.name or opts.path, opts.temporary)
    end
    held:remove()
    if not ok then
        unpin(path)
        return nil, err
    end
    local snapshot
    snapshot, err = read(path, opts.name)
    if snapshot then
        snapshot.pause = saved.pause
    end
    return snapshot, err
end

-- ---------------------------------------------------------------- copies

-- The image is there, as it was: held while the copy lives.
local function hold_image(snapshot)
    local image = snapshot.image
    local short = image.name or image.reference or "its image"
    for _, e in ipairs(image.extents or {}) do
        local size = files.size(e.path)
        if not size or size < (e.offset or 0) + (e.length or 0) then
            return nil, ("%s: it needs the image %s (%s), which is gone"):format(tostring(snapshot), short,
                image.digest)
        end
    end
    local store = require "sm.store"
    local opened, err = store.open()
    local lease
    if opened then
        lease, err = opened:lease(image.digest)
    end
    if not lease then
        return nil, err
    end
    return setmetatable({
        reference = image.reference, name = image.name, digest = image.digest, size = image.size,
        extents = image.extents, config = image.config, lease = lease,
    }, { __index = { close = function()
        lease:close()
    end } })
end

-- What was saved, with the functions a file cannot hold: `flows`, by card, or
-- `on_flow` for all.
local function saved_with(snapshot, on_flow, flows)
    local cards = {}
    for i, card in ipairs(snapshot.saved.cfg.net or {}) do
        cards[i] = {}
        for key, value in pairs(card) do
            cards[i][key] = value
        end
        if card.on_flow then
            cards[i].on_flow = on_flow or flows[i]
            if not cards[i].on_flow then
                return nil, ("%s: a function decides about the flows of its network card %d, and a file holds none: "
                    .. "give on_flow"):format(tostring(snapshot), i)
            end
        end
    end
    local cfg = setmetatable({ net = cards }, { __index = snapshot.saved.cfg })
    return { cpus = snapshot.saved.cpus, devices = snapshot.saved.devices, cfg = cfg }
end

--- As sm.restore, for who has checked the configuration (sm.config) already.
--- Yields.
---@async
---@param snapshot sm.Snapshot
---@param cfg table checked, and the copy's own from now on
---@param flows table<integer, function>? by card, for those without `on_flow`
---@return sm.VM?
---@return string? err
function M.copy(snapshot, cfg, flows)
    local saved, err = saved_with(snapshot, cfg.on_flow, flows or {})
    if not saved then
        return nil, err
    end
    local image
    image, err = hold_image(snapshot)
    if not image then
        return nil, err
    end
    local vm
    vm, err = require("sm.vm").restore(snapshot.path, saved, image, cfg)
    if not vm then
        image:close()
        return nil, (err:gsub("^snapshot%.load: ", "snapshot "))
    end
    vm.snapshot_id, vm.own_image = snapshot.id, true
    local ok
    ok, err = run_hook(vm, cfg.after, "after the restore")
    if not ok then
        vm:close()
        return nil, err
    end
    return vm
end

--- See sm.restore. Yields.
---@async
---@param what sm.Snapshot|string
---@param cfg table?
---@return sm.VM?
---@return string? err
function M.restore(what, cfg)
    local checked, err = config.check_restore(cfg)
    if not checked then
        return nil, err
    end
    local snapshot = what
    if type(what) == "string" then
        snapshot, err = M.open(what)
    end
    if not snapshot then
        return nil, err
    end
    return M.copy(snapshot, checked)
end

--- See VM:fork. Yields.
---@async
---@param vm sm.VM
---@param n integer?
---@param cfg table?
---@return sm.VM|sm.VM[]|nil
---@return string? err
function M.fork(vm, n, cfg)
    if n ~= nil and (math.type(n) ~= "integer" or n < 1) then
        return nil, "fork: expected how many, at least 1"
    end
    local checked, err = config.check_restore(cfg)
    if not checked then
        return nil, err
    elseif checked.name and n and n > 1 then
        return nil, "fork: one name for several copies"
    elseif vm.ending then
        return nil, "fork: " .. vm:obituary()
    end
    local meta, held
    meta, err = describe(vm)
    if not meta then
        return nil, err
    end
    held, err = temporary(M.dir())
    if not held then
        return nil, "fork: " .. err
    end
    -- Every child holds the file open; its name is not needed longer than that.
    local _ <close> = setmetatable({}, { __close = function()
        held:remove()
    end })
    local saved, snapshot
    saved, err = capture(vm, held.path, meta)
    if saved then
        snapshot, err = read(held.path)
    end
    if not snapshot then
        return nil, err
    end
    local flows = {}
    for i, card in ipairs(vm.parts.network and vm.parts.network.cards or {}) do
        flows[i] = card.on_flow
    end
    local tasks, children, failed = {}, {}, nil
    for i = 1, n or 1 do
        tasks[i] = loop.spawn(function()
            local own = {}
            for key, value in pairs(checked) do
                own[key] = value
            end
            return M.copy(snapshot, own, flows)
        end)
    end
    for _, task in ipairs(tasks) do
        local child, why = task:join()
        failed = failed or (not child and why)
        children[#children + 1] = child
    end
    if failed then
        for _, child in ipairs(children) do
            child:close()
        end
        return nil, failed
    end
    for _, child in ipairs(children) do
        child.parent = vm
        table.insert(vm.children, child)
    end
    if n then
        return children
    end
    return children[1]
end

--- Copies of another process's VM, each in a process of its own: their names.
--- Yields.
---@async
---@param vm sm.AttachedVM
---@param n integer
---@param cfg table? as sm.restore
---@return string[]? ids
---@return string? err
function M.fork_attached(vm, n, cfg)
    local ok, err = paths.make(M.dir())
    if not ok then
        return nil, err
    end
    sweep(M.dir())
    local path = ("%s/.fork-%d-%d%s"):format(M.dir(), uv.os_getpid(), uv.hrtime(), SUFFIX)
    local made
    made, err = vm:snapshot { path = path, temporary = true }
    if not made then
        return nil, err
    end
    local held = lock.try(path, { shared = true }) -- whoever sweeps lets it be
    local _ <close> = setmetatable({}, { __close = function()
        if held then
            held:close()
        end
        M.remove(path)
    end })
    local tasks, ids = {}, {}
    for i = 1, n do
        tasks[i] = loop.spawn(require("sm.owner").launch_copy, path, { config = cfg })
    end
    local failed
    for _, task in ipairs(tasks) do
        local id, why = task:join()
        failed = failed or not id and why or nil
        ids[#ids + 1] = id
    end
    if failed then
        for _, id in ipairs(ids) do
            local copy = require("sm").attach(id)
            if copy then
                copy:kill()
                copy:close()
            end
        end
        return nil, failed
    end
    return ids
end

return M
