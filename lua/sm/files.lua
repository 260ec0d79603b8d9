-- SPDX-License-Identifier: Apache-2.0
--
-- Files that survive a crash: written beside their place, forced to the disk,
-- renamed. A reader sees the old file or the new one; after a power failure,
-- too. Errors name the path.

local uv = require "luv"
local loop = require "sm.loop"

local M = {}

local mode_file = tonumber("600", 8)

-- libuv's "ENOSPC: no space left on device: /path" is for programs.
local function plain(path, why)
    local text = tostring(why):gsub("^E%u+: ", "")
    if text:find(path, 1, true) then
        text = text:gsub(": [^:]*$", "")
    end
    return path .. ": " .. text
end
M.error = plain

--- A whole file of at most `limit` bytes.
---@param path string
---@param limit integer?
---@return string? bytes
---@return string? error
---@return string? code "ENOENT"…
function M.read(path, limit)
    local fd, why, code = uv.fs_open(path, "r", 0)
    if not fd then
        return nil, plain(path, why), code
    end
    local stat = uv.fs_fstat(fd)
    local bytes
    if not stat or stat.type ~= "file" then
        why = "not a file"
    elseif limit and stat.size > limit then
        why = ("larger than %d bytes"):format(limit)
    else
        bytes, why, code = uv.fs_read(fd, stat.size, 0)
    end
    uv.fs_close(fd)
    if not bytes then
        return nil, plain(path, why), code
    end
    return bytes
end

--- Force a file or folder to the disk. Yields.
---@async
---@param path string
---@return true?
---@return string? error
function M.sync(path)
    local fd, why = uv.fs_open(path, "r", 0)
    if not fd then
        return nil, plain(path, why)
    end
    local failed
    loop.await(function(settle)
        uv.fs_fsync(fd, loop.guard(function(err)
            -- Here, for a task that is cancelled does not come back from its wait.
            uv.fs_close(fd)
            failed = err
            settle(true)
        end))
    end)
    if failed then
        return nil, plain(path, failed)
    end
    return true
end

local function parent(path)
    return path:match("^(.*)/[^/]*$")
end

--- Put a finished file or folder in its place, durably. What is at `path`
--- already is replaced, if it is a file. Yields.
---@async
---@param temporary string
---@param path string
---@return true?
---@return string? error
function M.publish(temporary, path)
    local ok, why = M.sync(temporary)
    if not ok then
        return nil, why
    end
    ok, why = uv.fs_rename(temporary, path)
    if not ok then
        return nil, plain(path, why)
    end
    return M.sync(parent(path))
end

--- Write a file beside its place; on an error nothing is left.
---@param path string
---@param bytes string
---@return true?
---@return string? error
function M.write_plain(path, bytes)
    local fd, why = uv.fs_open(path, "w", mode_file)
    if not fd then
        return nil, plain(path, why)
    end
    local at = 0
    while at < #bytes do
        local n
        n, why = uv.fs_write(fd, bytes:sub(at + 1), at)
        if not n then
            break
        end
        at = at + n
    end
    uv.fs_close(fd)
    if at < #bytes then
        uv.fs_unlink(path)
        return nil, plain(path, why)
    end
    return true
end

--- Put a file in its place so that a reader sees the old one or the new; after a power
--- failure it may be neither.
---@param path string
---@param bytes string
---@return true?
---@return string? error
function M.replace(path, bytes)
    local ok, why = M.write_plain(path .. ".new", bytes)
    if ok then
        ok, why = uv.fs_rename(path .. ".new", path)
    end
    return ok, why
end

--- Write bytes to `temporary`, then publish it at `path`. Yields.
---@async
---@param temporary string
---@param path string
---@param bytes string
---@return true?
---@return string? error
function M.write(temporary, path, bytes)
    local ok, why = M.write_plain(temporary, bytes)
    if ok then
        ok, why = M.publish(temporary, path)
        if not ok then
            uv.fs_unlink(temporary)
        end
    end
    return ok, why
end

--- Names in a folder, sorted; none if it is not there.
---@param path string
---@return {name: string, type: string}[]
function M.list(path)
    local out = {}
    local dir = uv.fs_scandir(path)
    while dir do
        local name, kind = uv.fs_scandir_next(dir)
        if not name then
            break
        end
        out[#out + 1] = { name = name, type = kind }
    end
    table.sort(out, function(a, b)
        return a.name < b.name
    end)
    return out
end

--- Remove a file or a folder with all in it; not there is fine.
---@param path string
---@return true?
---@return string? error
function M.remove(path)
    local stat = uv.fs_lstat(path)
    if not stat then
        return true
    end
    local ok, why, code
    if stat.type == "directory" then
        for _, entry in ipairs(M.list(path)) do
            ok, why = M.remove(path .. "/" .. entry.name)
            if not ok then
                return nil, why
            end
        end
        ok, why, code = uv.fs_rmdir(path)
    else
        ok, why, code = uv.fs_unlink(path)
    end
    if not ok and code ~= "ENOENT" then
        return nil, plain(path, why)
    end
    return true
end

--- Give a file a second name on the same file system, in place of what is there.
---@param from string
---@param to string
---@return true?
---@return string? error
function M.link(from, to)
    uv.fs_unlink(to)
    local ok, why = uv.fs_link(from, to)
    if not ok then
        return nil, plain(to, why)
    end
    return true
end

--- Make a folder for us alone; its parent is there.
---@param path string
---@return true?
---@return string? error
function M.make(path)
    local ok, why = uv.fs_mkdir(path, tonumber("700", 8))
    if not ok then
        return nil, plain(path, why)
    end
    return true
end

---@param path string
---@return integer? size of a regular file
function M.size(path)
    local stat = uv.fs_stat(path)
    return stat and stat.type == "file" and stat.size or nil
end

return M
