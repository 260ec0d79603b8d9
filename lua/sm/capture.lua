-- SPDX-License-Identifier: Apache-2.0
--
-- Saving a machine that runs: paused, written, and it goes on. What the core does
-- not know of (which image, which devices, the configuration) is JSON in the
-- snapshot's description; sm.clone makes the machine again from it.
--
-- A diff holds what was written since the machine was restored, or since its last
-- diff; it needs that parent. The first one of a machine that was booted has no
-- parent and is a whole one. Afterwards the machine's memory lies over the file, as
-- a copy's does, so that the next diff is as small as what is written until then.

local uv = require "luv"
local json = require "sm.json"
local loop = require "sm.loop"
local snapshot = require "sm.snapshot"

local M = {}

local FREEZE_SECONDS = 10 -- the agent gives up after one

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
            deny = card.deny, dns = card.dns, search = card.search, rate = card.rate, queues = card.queues,
            on_flow = card.on_flow and true or nil, -- there was one: a copy without it would be freer
        }
    end
    return list
end

--- What makes the machine again, besides its state: JSON for the file.
---@param vm sm.VM
---@param parent sm.Snapshot? of a diff
---@return string?
---@return string? err
function M.describe(vm, parent)
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
        format = snapshot.FORMAT,
        source = vm.id,
        parent = parent and parent.path,
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

--- What a diff of a VM would be over: the snapshot that its memory lies over, if
--- that is still there and its chain has room.
---@param vm sm.VM
---@return sm.Snapshot?
function M.base_of(vm)
    local base = vm.base
    local now = base and uv.fs_stat(base.path) and snapshot.open(base.path)
    local chain = now and now.id == base.id and snapshot.chain(now)
    return chain and #chain < snapshot.CHAIN_MAX and now or nil
end

-- Where the workload cannot stand still it runs on, and a copy's knows the time a
-- little later. Yields.
local function freeze(vm)
    local agent = vm.parts.agent
    return agent and agent:freeze(FREEZE_SECONDS) and agent or nil
end

-- What of the writing has to happen while nothing moves. Yields.
local function stand_still(vm, worker)
    local frozen = freeze(vm)
    local began = loop.now()
    local ok, err = worker:call("vm.pause", {})
    local resumed, why = ok, nil
    if ok then
        ok, err = worker:call("snapshot.capture", {})
        resumed, why = worker:call("vm.resume", {})
    end
    local pause = loop.now() - began
    if frozen then
        frozen:thaw()
    end
    if not ok or not resumed then
        return nil, err or why
    end
    return { pause = pause, frozen = frozen ~= nil }
end

--- Write a machine that runs into a file. It stands still while what is written has to
--- be of one moment: all its memory, or with `live` what it has written since the
--- rest was copied. Yields.
---@async
---@param vm sm.VM
---@param path string an empty file
---@param how { meta: string, diff: boolean?, rebase: boolean?, live: boolean?, progress: fun(left: integer)? }
---@return table? saved what snapshot.finish gives, `pause` in seconds, and whether programs were `frozen`
---@return string? err
function M.write(vm, path, how)
    local worker = vm.parts.worker
    local ok, err = worker:call("snapshot.begin", { path = path, diff = how.diff or false,
        rebase = how.rebase or false, live = how.live or false })
    if not ok then
        return nil, err
    end
    local left = how.live and 1 or 0
    while left and left > 0 do
        left, err = worker:call("snapshot.copy", {})
        if left and how.progress then
            how.progress(left)
        end
    end
    local still, saved
    if left then
        still, err = stand_still(vm, worker)
    end
    if still then
        saved, err = worker:call("snapshot.finish", { meta = how.meta, sync = false })
    end
    if not saved then
        worker:call("snapshot.abandon", {})
        return nil, err
    end
    saved.pause, saved.frozen = still.pause, still.frozen
    return saved
end

--- Run a function of the caller's, or a command in the guest. Yields.
---@async
---@param vm sm.VM
---@param hook function|string[]|nil
---@param what string for errors
---@return true?
---@return string? err
function M.run_hook(vm, hook, what)
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

local known = { name = true, path = true, before = true, temporary = true, diff = true,
    live = true, progress = true }

local function check(vm, opts)
    for key in pairs(opts or {}) do
        if not known[key] then
            return nil, ("snapshot: unknown key '%s' (known: name, path, before, diff, live, progress)"):format(tostring(key))
        end
    end
    if not opts or (opts.name == nil) == (opts.path == nil) then
        return nil, "snapshot: needs a name, or a path"
    end
    local path = opts.path
    if opts.name then
        local ok, err = snapshot.check_name(opts.name)
        if not ok then
            return nil, err
        end
        path = snapshot.path(opts.name)
    elseif path:sub(1, 1) ~= "/" then
        path = uv.cwd() .. "/" .. path
    end
    if uv.fs_lstat(path) then
        return nil, ("snapshot %s: there is one of that name"):format(opts.name or opts.path)
    elseif vm.ending then
        return nil, "snapshot: " .. vm:obituary()
    end
    return path
end

-- Write the file and give it its name. Returns what was written, or nil and why.
local function write_and_publish(vm, opts, path, parent)
    local meta, err = M.describe(vm, parent)
    if not meta then
        return nil, err
    end
    local held
    held, err = snapshot.new_file(path:match "^(.*)/")
    if not held then
        return nil, "snapshot: " .. err
    end
    -- A file without a name may be gone at any time: nothing is laid over it.
    local rebase = opts.diff and not opts.temporary
    local saved
    saved, err = M.write(vm, held.path, { meta = meta, diff = parent ~= nil, rebase = rebase, live = opts.live,
        progress = opts.progress })
    if rebase then
        vm.base = nil -- until the new one has its name
    end
    local ok = saved
    if ok then
        ok, err = snapshot.pin(path, vm.image.digest)
    end
    if ok then
        ok, err = snapshot.publish(held, path, opts.name or opts.path, opts.temporary)
    end
    held:remove()
    if not ok then
        snapshot.unpin(path)
        return nil, err
    end
    return saved
end

--- See VM:snapshot; `temporary`: it need not survive a crash of the host. Yields.
---@async
---@param vm sm.VM
---@param opts table
---@return sm.Snapshot?
---@return string? err
function M.create(vm, opts)
    local path, err = check(vm, opts)
    if not path then
        return nil, err
    end
    local ok
    ok, err = M.run_hook(vm, opts.before, "before the snapshot")
    if not ok then
        return nil, err
    end
    local parent, held
    if opts.diff then
        held = vm.base and snapshot.hold(vm.base.path) -- first, so that it stays while we look
        parent = held and M.base_of(vm)
    end
    local _ <close> = held
    local saved
    saved, err = write_and_publish(vm, opts, path, parent)
    if not saved then
        return nil, err
    end
    local made
    made, err = snapshot.open(opts.name or path)
    if made then
        made.pause, made.frozen = saved.pause, saved.frozen
        if saved.rebased then
            vm.base = made
        end
    end
    return made, err
end

return M
