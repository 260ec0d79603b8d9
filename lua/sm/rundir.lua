-- SPDX-License-Identifier: Apache-2.0
--
-- The folder of a VM: its sockets, what it is, and the lock that says it lives.
--
--   <runtime>/.lock             held while a folder is made or removed
--   <runtime>/<id>/lock         held (flock) by the process that owns the VM
--   <runtime>/<id>/vm.json      what `sm ps` shows (sm.serve); pool.json: sm.pool_server
--   <runtime>/<id>/control.sock requests of other processes (sm.serve)
--   <runtime>/<id>/log*         output of a detached VM (sm.vmlog)
--   <runtime>/<id>/v.sock*      vsock, Firecracker's convention
--
-- A process that is killed cannot tidy up; its lock is gone all the same. So
-- whoever looks at the folders removes those whose lock nobody holds, except
-- the ones whose vm.json says that the VM has exited: a detached VM's log and
-- exit code stay until `sm rm`.

local uv = require "luv"
local files = require "sm.files"
local json = require "sm.json"
local lock = require "sm.lock"
local paths = require "sm.paths"

local M = {}

---@class sm.Rundir
---@field path string
---@field id string
local Rundir = {}
Rundir.__index = Rundir

-- sun_path holds 108 bytes; the longest name in the folder is "v.sock_65535".
local SOCKET_MAX = 107 - #"/v.sock_65535"
local META_MAX = 1 << 20

local function read_meta(dir, name)
    local text = files.read(dir .. "/" .. (name or "vm.json"), META_MAX)
    local meta = text and json.decode(text)
    return type(meta) == "table" and meta or nil
end

-- Whether the owner of a folder lives. Many may look at once: the lock is shared.
local function is_live(dir)
    if not uv.fs_stat(dir .. "/lock") then
        return false
    end
    local got = lock.try(dir .. "/lock", { shared = true })
    if got then
        got:close()
        return false
    end
    return got == false
end

-- Remove what nobody owns. The base lock is held: no folder is half made.
local function sweep(base)
    for _, entry in ipairs(files.list(base)) do
        local dir = base .. "/" .. entry.name
        if entry.type == "directory" and not is_live(dir) then
            local meta = read_meta(dir)
            if not meta or meta.status ~= "exited" then
                paths.remove_tree(dir)
            end
        end
    end
end

-- The lock under which folders come and go. Yields.
local function lock_base(base)
    local ok, err = paths.make(base)
    if not ok then
        return nil, err
    end
    return lock.wait(base .. "/.lock")
end

--- Make the folder of a new VM. Yields.
---@async
---@param id string
---@return sm.Rundir?
---@return string? err
function M.new(id)
    local base = paths.runtime()
    local path = base .. "/" .. id
    if #path > SOCKET_MAX then
        return nil, ("%s: too long a path for a socket; set XDG_RUNTIME_DIR to a shorter one"):format(path)
    end
    local base_lock <close>, err = lock_base(base)
    if not base_lock then
        return nil, err
    end
    sweep(base)
    local ok, code
    ok, err, code = uv.fs_mkdir(path, tonumber("700", 8))
    if not ok then
        if code == "EEXIST" then
            local meta = read_meta(path)
            if meta and meta.status == "exited" then
                return nil, ("the name '%s' is taken by a VM that has exited; `sm rm %s` frees it"):format(id, id)
            end
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

--- Remove the folder, or leave it with its log and vm.json (`keep`). Idempotent.
function Rundir:close()
    if not self.lock then
        return
    end
    if self.keep then
        for _, entry in ipairs(files.list(self.path)) do
            if entry.name:find("%.sock") then
                uv.fs_unlink(self.path .. "/" .. entry.name)
            end
        end
    else
        paths.remove_tree(self.path)
    end
    self.lock:close()
    self.lock = nil
end

Rundir.__close = Rundir.close
Rundir.__gc = Rundir.close

--- The VMs of this user: what their vm.json says (or another file, for what else has
--- a folder here), and `dir`. Stale folders are removed on the way. Yields.
---@async
---@param name string? of the file
---@return table[]?
---@return string? err
function M.list(name)
    local base = paths.runtime()
    if not uv.fs_stat(base) then
        return {}
    end
    local base_lock <close>, err = lock_base(base)
    if not base_lock then
        return nil, err
    end
    sweep(base)
    local list = {}
    for _, entry in ipairs(files.list(base)) do
        local dir = base .. "/" .. entry.name
        local meta = entry.type == "directory" and read_meta(dir, name)
        if meta and type(meta.id) == "string" then
            meta.dir = dir
            list[#list + 1] = meta
        end
    end
    table.sort(list, function(a, b)
        return (a.created or 0) > (b.created or 0)
    end)
    return list
end

--- Remove the folder of a VM that has exited. Yields.
---@async
---@param dir string
---@return true?
---@return string? err
function M.remove(dir)
    local base_lock <close>, err = lock_base(paths.runtime())
    if not base_lock then
        return nil, err
    elseif is_live(dir) then
        return nil, "it is running"
    end
    paths.remove_tree(dir)
    return true
end

return M
