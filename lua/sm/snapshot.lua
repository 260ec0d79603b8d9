-- SPDX-License-Identifier: Apache-2.0
--
-- Snapshots on the disk: what there is, what each needs, whether it is whole.
-- sm.capture writes them, sm.clone makes machines of them.
--
-- The file is core/snap.h's; what the core does not know of (which image, which
-- devices, the configuration) is JSON in its description. A snapshot with a
-- name is <data>/snapshots/NAME.sms; it is written beside its place, forced to
-- the disk, made read-only and linked to its name, so that whatever is killed
-- whenever, a name stands for a whole snapshot or for none.
--
-- What it needs: its own file, its image, which the store keeps as long as the
-- file is there (store.lua, pins), and, when it is a diff, its parent. Parents are
-- told by id; where one was when the diff was made is written down, and the folders
-- are searched when it is not there any more. The kernel is in its memory, the
-- writable disk in its file.

local uv = require "luv"
local files = require "sm.files"
local json = require "sm.json"
local lock = require "sm.lock"
local paths = require "sm.paths"
local reference = require "sm.reference"

local M = {}

local SUFFIX = ".sms"
local SET_SUFFIX = SUFFIX .. ".set"
local READ_ONLY = tonumber("400", 8)
M.FORMAT = 1 -- of the description
M.CHAIN_MAX = 16 -- files, as the core has it

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
---@field parent { id: string, path: string }? of a diff: what it needs
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

--- Where the working set of the snapshot at a path lies (sm.working_set).
---@param path string
---@return string
function M.set_path(path)
    return path:gsub(SUFFIX:gsub("%.", "%%.") .. "$", "") .. SET_SUFFIX
end

--- Whether a snapshot may have that name.
---@param name any
---@return true?
---@return string? err
function M.check_name(name)
    if type(name) ~= "string" or not name:match "^[%w][%w_.-]*$" or #name > 128 then
        return nil, ("snapshot: name '%s': expected letters, digits, '_', '.', '-' (128 at most)"):format(tostring(name))
    end
    return true
end

-- ---------------------------------------------------------------- reading

local core

local function folder(path)
    return path:match "^(.*)/" or "."
end

--- What the file at a path says of itself; `verify`: and whether its memory is whole.
---@param path string
---@param name string? for errors
---@param verify boolean?
---@param progress (fun(done: integer, total: integer))? bytes, while it is verified
---@return sm.Snapshot?
---@return string? err
function M.read(path, name, verify, progress)
    core = core or require "sm.core"
    if not name and folder(path) == M.dir() then
        name = path:match("([^/.][^/]*)" .. SUFFIX:gsub("%.", "%%.") .. "$")
    end
    local info, why = core.snapshot(path, verify or false, progress)
    if not info then
        return nil, "snapshot " .. (name and why:gsub("^.-: ", name .. ": ", 1) or why)
    end
    local meta = json.decode_object(info.meta)
    if not meta or meta.format ~= M.FORMAT or type(meta.image) ~= "table" or type(meta.devices) ~= "table"
        or type(meta.cfg) ~= "table" or not reference.parse_digest(meta.image.digest)
        or info.diff and type(meta.parent) ~= "string" then
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
        parent = info.diff and { id = info.parent, path = meta.parent } or nil,
        saved = { cpus = info.cpus, devices = meta.devices, cfg = meta.cfg },
    }, Snapshot)
end

--- A snapshot by name, or by path when there is a slash in it.
---@param what string
---@return sm.Snapshot?
---@return string? err
function M.open(what)
    if type(what) == "string" and what:find("/", 1, true) then
        return M.read(what)
    end
    local ok, err = M.check_name(what)
    if not ok then
        return nil, err
    end
    local path = M.path(what)
    if not uv.fs_stat(path) then
        return nil, ("snapshot %s: no such snapshot"):format(what)
    end
    return M.read(path, what)
end

--- What a caller gives for a snapshot: the thing itself, its name, or a path.
---@param what sm.Snapshot|string
---@return sm.Snapshot?
---@return string? err
function M.get(what)
    if type(what) == "string" then
        return M.open(what)
    end
    return what
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

-- ----------------------------------------------------------------- chains

-- The snapshot with that id in a folder, or nil.
local function find_id(dir, id)
    for _, entry in ipairs(files.list(dir)) do
        if entry.name:sub(-#SUFFIX) == SUFFIX then
            local found = M.read(dir .. "/" .. entry.name)
            if found and found.id == id then
                return found
            end
        end
    end
end

local function parent_of(snapshot)
    local wanted = snapshot.parent
    local found = uv.fs_stat(wanted.path) and M.read(wanted.path)
    if found and found.id == wanted.id then
        return found
    end
    found = find_id(folder(snapshot.path), wanted.id) or find_id(M.dir(), wanted.id)
    if not found then
        return nil, ("%s: it needs its parent %s (%s), which is gone"):format(tostring(snapshot), wanted.path,
            wanted.id)
    end
    return found
end

--- A snapshot and those it needs, from the one that is no diff on.
---@param snapshot sm.Snapshot
---@return sm.Snapshot[]?
---@return string? err
function M.chain(snapshot)
    local list = { snapshot }
    while list[1].parent do
        local parent, err = parent_of(list[1])
        if not parent then
            return nil, err
        elseif #list == M.CHAIN_MAX then
            return nil, ("%s: a chain of more than %d snapshots"):format(tostring(snapshot), M.CHAIN_MAX)
        end
        table.insert(list, 1, parent)
    end
    return list
end

--- Where the files of a chain lie.
---@param chain sm.Snapshot[]
---@return string[]
function M.paths(chain)
    local list = {}
    for i, link in ipairs(chain) do
        list[i] = link.path
    end
    return list
end

-- Those that need this one, in its folder and in the snapshot folder.
local function children_of(snapshot)
    local out, seen = {}, {}
    for _, dir in ipairs { folder(snapshot.path), M.dir() } do
        for _, entry in ipairs(seen[dir] and {} or files.list(dir)) do
            local other = entry.name:sub(-#SUFFIX) == SUFFIX and M.read(dir .. "/" .. entry.name)
            if other and other.parent and other.parent.id == snapshot.id then
                out[#out + 1] = other
            end
        end
        seen[dir] = true
    end
    return out
end

-- flock(2) on the file itself: the fd, closed when this is; false: it is taken.
local function locked(path, mode)
    local fd, err = uv.fs_open(path, "r", 0)
    if not fd then
        return nil, files.error(path, err)
    end
    core = core or require "sm.core"
    if not core.flock(fd, mode) then
        uv.fs_close(fd)
        return false
    end
    return setmetatable({}, { __close = function()
        uv.fs_close(fd)
    end })
end

--- Keep a snapshot from being removed while a diff over it is made; closed, it may
--- be. nil: it is gone, or on its way.
---@param path string
---@return table?
function M.hold(path)
    return locked(path, "shared") or nil
end

--- One file out of a diff and what it needs, without a name: see new_file. Blocks
--- while it reads.
---@param snapshot sm.Snapshot
---@param dir string
---@param progress (fun(done: integer, total: integer))? bytes
---@return sm.Lock?
---@return string? err
function M.flat_copy(snapshot, dir, progress)
    local chain, err = M.chain(snapshot)
    if not chain then
        return nil, err
    end
    local held
    held, err = M.new_file(dir)
    if not held then
        return nil, "snapshot: " .. err
    end
    local ok, why = core.flatten(M.paths(chain), held.path, progress)
    if not ok then
        held:remove()
        return nil, ("%s: %s"):format(tostring(snapshot), why)
    end
    return held
end

--- Make a diff a snapshot that needs no other, in its place; one that is no diff is
--- left alone. Diffs over it are diffs over it still. Blocks while it reads. Yields.
---@async
---@param what sm.Snapshot|string
---@param progress (fun(done: integer, total: integer))? bytes
---@return sm.Snapshot?
---@return string? err
function M.flatten(what, progress)
    local snapshot, err = M.get(what)
    if not snapshot or not snapshot.parent then
        return snapshot, err
    end
    local held
    held, err = M.flat_copy(snapshot, folder(snapshot.path), progress)
    if not held then
        return nil, err
    end
    local ok, why = uv.fs_chmod(held.path, READ_ONLY)
    if ok then
        ok, why = files.publish(held.path, snapshot.path)
    end
    if not ok then
        held:remove()
        return nil, ("%s: %s"):format(tostring(snapshot), why)
    end
    held:close()
    return M.read(snapshot.path, snapshot.name)
end

-- ----------------------------------------------------- checking, removing

--- Whether memory and disks in the file are what was written. Blocks while it
--- reads them.
---@param what sm.Snapshot|string
---@param progress (fun(done: integer, total: integer))? bytes
---@return true?
---@return string? err
function M.verify(what, progress)
    local snapshot, err = M.get(what)
    if snapshot then
        snapshot, err = M.read(snapshot.path, snapshot.name, true, progress)
    end
    if not snapshot then
        return nil, err
    end
    local set = M.set_path(snapshot.path)
    if uv.fs_stat(set) and not core.working_set_verify(set) then
        uv.fs_unlink(set) -- a copy of what was found whole: the next restore makes it anew
    end
    return true
end

--- Have the store keep an image as long as the file at `path` is there.
---@param path string
---@param digest string
---@return true?
---@return string? err
function M.pin(path, digest)
    local opened, err = require("sm.store").open()
    if not opened then
        return nil, err
    end
    return opened:pin(path, digest)
end

--- Let the image go, if the file is gone.
---@param path string
function M.unpin(path)
    local opened = require("sm.store").open()
    if opened and not uv.fs_lstat(path) then
        opened:unpin(path)
    end
end

-- Why a snapshot has to stay, or nil.
local function needed(path)
    local snapshot = not path:match "/%.[^/]*$" and M.read(path) -- nobody needs what has no name
    local child = snapshot and children_of(snapshot)[1]
    return child and ("%s needs it; remove or flatten that first"):format(tostring(child)) or nil
end

--- Forget a snapshot. VMs that run from it go on; one that others need is not
--- removed.
---@param what sm.Snapshot|string
---@return true?
---@return string? err
function M.remove(what)
    local path, shown = what, what
    if type(what) == "table" then
        path, shown = what.path, what.name or what.path
    elseif not what:find("/", 1, true) then
        local ok, err = M.check_name(what)
        if not ok then
            return nil, err
        end
        path = M.path(what)
    end
    if path:sub(1, 1) ~= "/" then
        path = uv.cwd() .. "/" .. path
    end
    local held <close> = locked(path, "exclusive")
    local why = held == false and "a diff over it is being made" or needed(path)
    local ok, err, code
    if not why then
        ok, err, code = uv.fs_unlink(path)
        uv.fs_unlink(M.set_path(path))
        M.unpin(path)
        why = not ok and (code == "ENOENT" and "no such snapshot" or err) or nil
    end
    if why then
        return nil, ("snapshot %s: %s"):format(shown, why)
    end
    return true
end

-- ---------------------------------------------------------- files for them

--- Remove unfinished files of processes that are gone (each holds a lock on its own),
--- and the working sets of snapshots that are gone.
---@param dir string
function M.sweep(dir)
    for _, entry in ipairs(files.list(dir)) do
        local path = dir .. "/" .. entry.name
        if entry.name:sub(-#SET_SUFFIX) == SET_SUFFIX then
            local of = path:sub(1, -#SET_SUFFIX - 1)
            if not uv.fs_lstat(of .. SUFFIX) and not uv.fs_lstat(of) then
                uv.fs_unlink(path)
            end
        elseif entry.name:match "^%.new%-" or entry.name:match "^%.fork%-" then
            local free = lock.try(path)
            if free then
                free:remove()
            end
        end
    end
end

--- A name for a snapshot that nobody needs longer than it takes to make copies of it.
---@return string
function M.temporary_path()
    return ("%s/.fork-%d-%d%s"):format(M.dir(), uv.os_getpid(), uv.hrtime(), SUFFIX)
end

--- An empty file beside the place it is meant for, locked while we write it.
---@param dir string
---@return sm.Lock?
---@return string? err
function M.new_file(dir)
    local ok, err = paths.make(dir)
    if not ok then
        return nil, err
    end
    M.sweep(dir)
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

--- Link a finished file to a name that must be free, so that nothing is ever
--- replaced; `temporary_too`: it need not survive a crash of the host. Yields.
---@async
---@param held sm.Lock what new_file gave
---@param path string
---@param name string for errors
---@param temporary_too boolean?
---@return true?
---@return string? err
function M.publish(held, path, name, temporary_too)
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
        ok, err = files.sync(folder(path))
    end
    return ok, err
end

return M
