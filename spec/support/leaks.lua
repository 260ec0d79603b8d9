-- SPDX-License-Identifier: Apache-2.0
--
-- A spec that leaves something behind fails: descriptors, threads, child
-- processes, and files below folders that are named.
--
--     it("gives everything back", leaks.free(function() … end))
--
-- What ends on its own time (a thread being joined by the kernel, a process
-- being reaped) gets a few seconds of the loop; what is still there is named.

local entries = require("support.shell").list
local loop = require "sm.loop"
local uv = require "luv"

local M = {}

local PATIENCE_SECONDS = 5

local function first_line(path)
    local file = io.open(path, "r")
    if not file then
        return nil
    end
    local line = file:read("l")
    file:close()
    return line
end

-- A descriptor is known by its number and what it is, so that a number that was
-- closed and opened anew counts.
local function add_fds(found)
    for _, fd in ipairs(entries("/proc/self/fd")) do
        local target = uv.fs_readlink("/proc/self/fd/" .. fd)
        if target and not target:find("^/proc/") then
            found[("fd %s: %s"):format(fd, target)] = true
        end
    end
end

local function add_threads(found)
    for _, tid in ipairs(entries("/proc/self/task")) do
        local name = first_line("/proc/self/task/" .. tid .. "/comm")
        if name then
            found[("thread %s: %s"):format(tid, name)] = true
        end
    end
end

-- Zombies too: they are children nobody has waited for.
local function add_children(found)
    local me = uv.os_getpid()
    for _, pid in ipairs(entries("/proc")) do
        if pid:find("^%d+$") then
            local stat = first_line("/proc/" .. pid .. "/stat")
            local name, state, parent = (stat or ""):match("%((.*)%) (%a) (%d+)")
            if tonumber(parent) == me then
                found[("process %s: %s (%s)"):format(pid, name, state)] = true
            end
        end
    end
end

local function add_files(found, folders)
    for _, folder in ipairs(folders) do
        for _, name in ipairs(entries(folder)) do
            found["file " .. folder .. "/" .. name] = true
        end
    end
end

-- libuv opens its own descriptors and threads at first use, and keeps them.
local warm = false
local function warm_up()
    if warm then
        return
    end
    warm = true
    local done = false
    local process = assert(uv.spawn("/bin/true", {}, function()
        done = true
    end))
    uv.fs_stat("/", function() end)
    while not done do
        uv.run("once")
    end
    process:close()
    loop.sleep(0.001)
end

--- What this process holds now.
---@param folders string[]? whose entries count too
---@return table<string, boolean>
function M.holdings(folders)
    warm_up()
    collectgarbage()
    collectgarbage()
    local found = {}
    add_fds(found)
    add_threads(found)
    add_children(found)
    add_files(found, folders or {})
    return found
end

--- What is held now and was not held before, by name.
---@param before table<string, boolean> from `holdings`
---@param folders string[]?
---@return string[]
function M.since(before, folders)
    local deadline = loop.now() + PATIENCE_SECONDS
    while true do
        local more = {}
        for name in pairs(M.holdings(folders)) do
            if not before[name] then
                more[#more + 1] = name
            end
        end
        if #more == 0 or loop.now() > deadline then
            table.sort(more)
            return more
        end
        loop.sleep(0.02)
    end
end

--- Wrap a spec's function: it fails when it leaves something behind.
---@param fn function
---@param folders string[]?
---@return function
function M.free(fn, folders)
    return function(...)
        local before = M.holdings(folders)
        fn(...)
        local left = M.since(before, folders)
        if #left > 0 then
            error("leaked:\n  " .. table.concat(left, "\n  "), 0)
        end
    end
end

return M
