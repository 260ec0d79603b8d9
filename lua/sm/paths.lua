-- SPDX-License-Identifier: Apache-2.0
--
-- Where things live on the host, by the XDG base directory specification:
--   cache    what can be made again: kernels, initramfs, disk templates
--   data     images
--   runtime  sockets of live VMs; a tmpfs where the system has one

local uv = require "luv"

local M = {}

local function env(name)
    local v = os.getenv(name)
    return v ~= "" and v or nil
end

local function home()
    return env("HOME") or uv.os_homedir() or "/"
end

--- ${SM_CACHE:-${XDG_CACHE_HOME:-~/.cache}/sm}
---@return string
function M.cache()
    return env("SM_CACHE") or (env("XDG_CACHE_HOME") or home() .. "/.cache") .. "/sm"
end

--- ${XDG_DATA_HOME:-~/.local/share}/sm
---@return string
function M.data()
    return (env("XDG_DATA_HOME") or home() .. "/.local/share") .. "/sm"
end

--- ${XDG_RUNTIME_DIR:-/tmp/sm-UID}/sm
---@return string
function M.runtime()
    return (env("XDG_RUNTIME_DIR") or ("/tmp/sm-%d"):format(uv.getuid())) .. "/sm"
end

-- Where programs lie once installed, from the folder that sm/core.so is looked up
-- in: beside the module in a rock's tree, else where `make install` puts them.
local installed = { "/sm/", "/../../../libexec/sm/" }

--- A program that came with these modules: what `variable` names, or where it is
--- in this tree (`places`, from that folder), or where it was installed.
---@param variable string of the environment
---@param name string
---@param places string[]
---@return string? path
---@return string? err
function M.ours(variable, name, places)
    local named = env(variable)
    if named then
        return named
    end
    local module = package.searchpath("sm.core", package.cpath) or ""
    local base = module:match("^(.*)/sm/core%.so$")
    places = table.move(places, 1, #places, 1, {})
    for _, folder in ipairs(installed) do
        places[#places + 1] = folder .. name
    end
    for _, place in ipairs(places) do
        local stat = base and uv.fs_stat(base .. place)
        if stat and stat.type == "file" then
            return base .. place
        end
    end
    return nil, ("%s is missing beside %s; run `make`"):format(name, base or "sm.core")
end

--- mkdir -p with mode 0700 for what is new.
---@param dir string
---@return true?
---@return string? err
function M.make(dir)
    local stat = uv.fs_stat(dir)
    if stat then
        if stat.type ~= "directory" then
            return nil, dir .. ": is in the way, a folder is wanted there"
        end
        return true
    end
    local parent = dir:match("^(.+)/[^/]+$")
    if parent then
        local ok, err = M.make(parent)
        if not ok then
            return nil, err
        end
    end
    local ok, err, code = uv.fs_mkdir(dir, tonumber("700", 8))
    if not ok and code ~= "EEXIST" then
        return nil, err
    end
    return true
end

--- rm -r, without following links; errors are left lying.
---@param path string
function M.remove_tree(path)
    local stat = uv.fs_lstat(path)
    if not stat then
        return
    end
    if stat.type == "directory" then
        local scan = uv.fs_scandir(path)
        while scan do
            local name = uv.fs_scandir_next(scan)
            if not name then
                break
            end
            M.remove_tree(path .. "/" .. name)
        end
        uv.fs_rmdir(path)
    else
        uv.fs_unlink(path)
    end
end

return M
