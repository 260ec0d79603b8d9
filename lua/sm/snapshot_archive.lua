-- SPDX-License-Identifier: Apache-2.0
--
-- A snapshot with all it needs in one file, for another machine: an archive of its
-- image, which is an OCI archive for any tool, and in it `snapshot.sms`, flattened and
-- sparse. Taken in, the image is an image of the store under its names and the
-- snapshot one of those here; its memory is held against its checksums first.

local uv = require "luv"
local archive = require "sm.archive"
local assemble = require "sm.assemble"
local export = require "sm.export"
local here = require "sm.here"
local loop = require "sm.loop"
local paths = require "sm.paths"
local snapshots = require "sm.snapshot"

local M = {}

local ENTRY = "snapshot.sms"

--- Write a snapshot and its image to `out`: a path, which is there whole or not at all,
--- or a descriptor. Yields.
---@async
---@param what sm.Snapshot|string
---@param out string|integer
---@param opts { store: sm.Store|string|nil }?
---@return true?
---@return string? err
function M.export(what, out, opts)
    local snapshot, err = snapshots.get(what)
    if not snapshot then
        return nil, err
    end
    return loop.run(function()
        -- So that nobody removes it, or what it needs, meanwhile.
        local hold <close> = snapshots.hold(snapshot.path)
        local flat, ok, why
        if snapshot.parent then
            flat, why = snapshots.flat_copy(snapshot, snapshots.dir())
            if not flat then
                return nil, why
            end
        end
        local _ <close> = setmetatable({}, { __close = function()
            if flat then
                flat:remove()
            end
        end })
        ok, why = export.save({ snapshot.image.digest }, out, {
            store = opts and opts.store, sparse = { { name = ENTRY, path = (flat or snapshot).path } },
        })
        if not ok and why:find "no such image in the store$" then
            why = ("%s: its image %s was run from where it lies and is not in the store; `sm load` or `sm pull` it, run "
                .. "that, and save it again"):format(tostring(snapshot), snapshot.image.name or snapshot.image.reference
                or snapshot.image.digest)
        end
        return ok, why
    end)
end

-- The images of the archive into the store; whether the one that is meant is there.
local function take_images(opts, source, digest)
    local images, why = source:images(opts.platform, opts.choose)
    if not images then
        return nil, why
    end
    local found = false
    for _, one in ipairs(images) do
        local image
        image, why = here.load_one(opts, source, one)
        if not image then
            return nil, why
        end
        found = found or image.digest == digest
        image:close()
    end
    if not found then
        return nil, ("%s: its image (%s) is not in it"):format(source.name, digest)
    end
    return true
end

local function import(opts, file, name)
    local path = snapshots.path(name)
    local ok, why = snapshots.check_name(name)
    if ok and uv.fs_lstat(path) then
        ok, why = nil, ("snapshot %s: there is one of that name"):format(name)
    elseif ok then
        ok, why = paths.make(snapshots.dir())
    end
    if not ok then
        return nil, why
    end
    local held <close>, refused = opts.store:use()
    if not held then
        return nil, refused
    end
    local source <close>, broken = archive.open(opts, file)
    if not source then
        return nil, broken
    end
    local entry = source.by_name[ENTRY]
    if not entry or not entry.path then
        return nil, ("%s: no snapshot is in it; `sm load` takes images"):format(source.name)
    end
    local snapshot
    snapshot, why = snapshots.read(entry.path, name, true)
    if snapshot and snapshot.parent then
        snapshot, why = nil, ("snapshot %s: it is a diff, without its parent"):format(name)
    end
    if not snapshot then
        return nil, ("%s: %s"):format(source.name, why)
    end
    ok, why = take_images(opts, source, snapshot.image.digest)
    if ok then
        ok, why = snapshots.pin(path, snapshot.image.digest)
    end
    if ok then
        ok, why = snapshots.publish(entry, path, name)
        if not ok then
            snapshots.unpin(path)
        end
    end
    if not ok then
        return nil, why
    end
    return snapshots.open(name)
end

--- Take in what `export` wrote, under a name; "-" is standard input. Options as in
--- sm.image's `pull`. Yields.
---@async
---@param file string
---@param name string
---@param opts table?
---@return sm.Snapshot?
---@return string? err
function M.import(file, name, opts)
    local options, why = assemble.options(opts)
    if not options then
        return nil, why
    end
    return loop.run(import, options, file, name)
end

return M
