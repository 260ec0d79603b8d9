-- SPDX-License-Identifier: Apache-2.0
--
-- The folder of a live VM: its sockets, and the lock that says it lives.
--
--   <runtime>/<id>/lock       held (flock) by the process that owns the VM
--   <runtime>/<id>/v.sock*    vsock, Firecracker's convention
--
-- A process that is killed cannot tidy up; its lock is gone all the same. So
-- whoever makes a new folder first removes those whose lock nobody holds.

local uv = require "luv"
local lock = require "sm.lock"
local paths = require "sm.paths"

local M = {}

local Rundir = {}
Rundir.__index = Rundir

-- sun_path holds 108 bytes; the longest name in the folder is "v.sock_65535".
local SOCKET_MAX = 107 - #"/v.sock_65535"

local function sweep(base)
    local scan = uv.fs_scandir(base)
    while scan do
        local name, kind = uv.fs_scandir_next(scan)
        if not name then
            break
        end
        local dir = base .. "/" .. name
        if kind == "directory" and uv.fs_stat(dir .. "/lock") then
            local dead = lock.try(dir .. "/lock")
            if dead then
                paths.remove_tree(dir)
                dead:close()
            end
        end
    end
end

--- Make the folder of a new VM.
---@param id string
---@return table? rundir { path=, id=, close= }
---@return string? err
function M.new(id)
    local base = paths.runtime()
    local ok, err = paths.make(base)
    if not ok then
        return nil, err
    end
    sweep(base)
    local path = base .. "/" .. id
    if #path > SOCKET_MAX then
        return nil, ("%s: too long a path for a socket; set XDG_RUNTIME_DIR to a shorter one"):format(path)
    end
    local code
    ok, err, code = uv.fs_mkdir(path, tonumber("700", 8))
    if not ok then
        if code == "EEXIST" then
            return nil, ("a VM named '%s' is running already"):format(id)
        end
        return nil, err
    end
    local held
    held, err = lock.try(path .. "/lock")
    if not held then
        paths.remove_tree(path)
        return nil, err or path .. ": taken by another"
    end
    return setmetatable({ path = path, id = id, lock = held }, Rundir)
end

--- Remove the folder. Idempotent.
function Rundir:close()
    if self.lock then
        paths.remove_tree(self.path)
        self.lock:close()
        self.lock = nil
    end
end

Rundir.__close = Rundir.close
Rundir.__gc = Rundir.close

return M
