-- SPDX-License-Identifier: Apache-2.0
--
-- Copies of saved machines, and of machines that run (forks).
--
-- A copy is not its source: the machine's generation id changes before it runs
-- (core/vm_state.c), its agent dials again and is told the wall clock, fresh
-- randomness, a hostname and a machine id of its own. /proc/sys/kernel/random/
-- boot_id stays the source's: kernels do not let it be changed.

local capture = require "sm.capture"
local config = require "sm.config"
local lock = require "sm.lock"
local loop = require "sm.loop"
local snapshots = require "sm.snapshot"
local working_set = require "sm.working_set"

local M = {}

-- What an image's root device was made of, but where it lies: the store may be another.
local function same_shape(a, b)
    local same = #a == #b
    for i = 1, same and #a or 0 do
        same = same and a[i].length == b[i].length and a[i].offset == b[i].offset
    end
    return same
end

-- The image is there, as it was: held while the copy lives.
local function hold_image(snapshot)
    local image = snapshot.image
    local store, err = require("sm.store").open()
    local record = store and store:image(image.digest)
    if store and not (record and same_shape(record.extents, image.extents or {})) then
        return nil, ("%s: it needs the image %s (%s), which is gone"):format(tostring(snapshot),
            image.name or image.reference or "its image", image.digest)
    end
    local lease
    if store then
        lease, err = store:lease(image.digest)
    end
    if not lease then
        return nil, err
    end
    return setmetatable({
        reference = image.reference, name = image.name, digest = image.digest, size = image.size,
        extents = record.extents, config = image.config, lease = lease,
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
    local chain
    if saved then
        chain, err = snapshots.chain(snapshot)
    end
    if not chain then
        return nil, err
    end
    local image
    image, err = hold_image(snapshot)
    if not image then
        return nil, err
    end
    local wanted = cfg.working_set ~= false and not cfg.eager
    local paths = snapshots.paths(chain)
    cfg.set = wanted and snapshots.set_path(snapshot.path) or nil
    local vm
    vm, err = require("sm.vm").restore(paths, saved, image, cfg)
    if not vm then
        image:close()
        return nil, (err:gsub("^snapshot%.load: ", "snapshot "))
    end
    vm.snapshot_id, vm.own_image = snapshot.id, true
    vm.base = not cfg.eager and snapshot or nil
    if wanted then
        working_set.record(snapshot, paths, vm.parts) -- without one it is only slower
    end
    local ok
    ok, err = capture.run_hook(vm, cfg.after, "after the restore")
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
    local snapshot
    snapshot, err = snapshots.get(what)
    if not snapshot then
        return nil, err
    end
    return M.copy(snapshot, checked)
end

-- Holds it, so that whoever sweeps lets it be; removes it when closed.
local function keep(path)
    local held = lock.try(path, { shared = true })
    return setmetatable({}, { __close = function()
        if held then
            held:close()
        end
        snapshots.remove(path)
    end })
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
    -- Only what the parent has written since it was restored, if it was. Every child
    -- holds the file open; its name is not needed longer than until they are there.
    local snapshot
    snapshot, err = capture.create(vm, { path = snapshots.temporary_path(), temporary = true, diff = true })
    if not snapshot then
        return nil, "fork: " .. err
    end
    local _ <close> = keep(snapshot.path)
    local flows = {}
    for i, card in ipairs(vm.parts.network and vm.parts.network.cards or {}) do
        flows[i] = card.on_flow
    end
    local tasks, children, failed = {}, {}, nil
    for i = 1, n or 1 do
        tasks[i] = loop.spawn(function()
            local own = { working_set = false } -- the file is gone before another could want it
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
    local path = snapshots.temporary_path()
    local made, err = vm:snapshot { path = path, temporary = true, diff = true }
    if not made then
        return nil, err
    end
    local _ <close> = keep(path)
    local tasks, ids = {}, {}
    local own = { working_set = false } -- see M.fork
    for key, value in pairs(cfg or {}) do
        own[key] = value
    end
    for i = 1, n do
        tasks[i] = loop.spawn(require("sm.owner").launch_copy, path, { config = own })
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
