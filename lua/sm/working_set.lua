-- SPDX-License-Identifier: Apache-2.0
--
-- The working set of a snapshot: the memory that its first copy needed until its
-- agent had answered, in NAME.sms.set beside it. Later copies have that read in one go
-- (core/working_set.h). It is made by itself, checked when it is used, and nobody misses
-- it: where it cannot be written, copies are made without.

local uv = require "luv"
local core = require "sm.core"
local files = require "sm.files"
local snapshots = require "sm.snapshot"

local M = {}

local recording = {} -- by path: several copies may be made at once

local function record(snapshot, path, chain, parts)
    local touched, err = parts.worker:call("snapshot.touched", {})
    if not touched then
        return nil, err
    end
    local held
    held, err = snapshots.new_file(path:match "^(.*)/")
    if not held then
        return nil, err
    end
    local ok
    ok, err = core.working_set(chain, touched, held.path)
    if ok then
        ok, err = files.publish(held.path, path)
    end
    if not ok then
        held:remove()
        return nil, err
    end
    held:close()
    if not uv.fs_stat(snapshot.path) then -- it was removed meanwhile
        uv.fs_unlink(path)
    end
    return true
end

--- Write down what a copy has touched until now, unless it was made with a working set
--- already. Yields.
---@async
---@param snapshot sm.Snapshot
---@param chain string[] its files, as sm.snapshot's paths
---@param parts table the copy's, see sm.machine
---@return true?
---@return string? err
function M.record(snapshot, chain, parts)
    local path = snapshots.set_path(snapshot.path)
    if parts.loaded.working_set > 0 or recording[path] then
        return true
    end
    recording[path] = true
    local ok, err = record(snapshot, path, chain, parts)
    recording[path] = nil
    return ok, err
end

return M
