-- SPDX-License-Identifier: Apache-2.0
--
-- sm stats: what VMs use, by their worker processes. CPU is the share of one
-- CPU between two looks, memory what the worker holds of the host's.

local uv = require "luv"
local human = require("sm.cli.progress").human
local loop = require "sm.loop"
local sm = require "sm"
local vms = require "sm.cli.vms"

local LOOK_SECONDS = 1
local TICKS = 100 -- USER_HZ, the same on every Linux we run on

local function read(path)
    local f = io.open(path, "r")
    local text = f and f:read "a"
    if f then
        f:close()
    end
    return text
end

local function usage(pid)
    local stat = read(("/proc/%d/stat"):format(pid))
    local fields = {}
    for word in (stat and stat:match "%) (.*)$" or ""):gmatch "%S+" do
        fields[#fields + 1] = word
    end
    if not fields[22] then
        return nil
    end
    return {
        at = loop.now(),
        cpu = (tonumber(fields[12]) + tonumber(fields[13])) / TICKS,
        rss = tonumber(fields[22]) * 4096,
    }
end

local function exits(name)
    local total = 0
    local stats = vms.with(name, function(vm)
        return vm:stats()
    end)
    for _, vcpu in ipairs(stats and stats.vcpus or {}) do
        total = total + vcpu.exits
    end
    return stats and total
end

local function chosen(names)
    if #names == 0 then
        local running = {}
        for _, info in ipairs(assert(sm.vms())) do
            if info.status == "running" then
                running[#running + 1] = info
            end
        end
        return running
    end
    local list = {}
    for i, name in ipairs(names) do
        local info, err = require("sm.attached").find(name)
        if not info then
            return nil, err
        elseif info.status ~= "running" then
            return nil, ("the VM '%s' is not running"):format(info.id)
        end
        list[i] = info
    end
    return list
end

local function look(list, before)
    local rows = { { "NAME", "CPU %", "MEM USAGE / LIMIT", "VCPUS", "EXITS" } }
    local now = {}
    for _, info in ipairs(list) do
        local u = usage(info.worker)
        local b = before[info.id]
        if u then
            now[info.id] = u
            rows[#rows + 1] = {
                info.id,
                b and ("%.2f%%"):format((u.cpu - b.cpu) / math.max(u.at - b.at, 1e-3) * 100) or "--",
                human(u.rss) .. " / " .. human(info.memory or 0),
                tostring(info.cpus), tostring(exits(info) or "--"),
            }
        end
    end
    return rows, now
end

return {
    usage = "sm stats [flags] [VM…]",
    about = "What VMs use: all that run, or those named.",
    flags = {
        { "no-stream", nil, nil, "once, instead of every second" },
    },
    run = function(o, rest)
        local before = {}
        while true do
            local list, err = chosen(rest)
            if not list then
                return 1, err
            end
            local rows
            if next(before) == nil then
                rows, before = look(list, before)
                loop.sleep(o.no_stream and 0.2 or LOOK_SECONDS)
                list = chosen(rest) or {}
            end
            rows, before = look(list, before)
            if not o.no_stream and uv.guess_handle(1) == "tty" then
                io.write "\27[H\27[J"
            end
            vms.print_table(rows)
            if o.no_stream then
                return 0
            end
            io.flush()
            loop.sleep(LOOK_SECONDS)
        end
    end,
}
