-- SPDX-License-Identifier: Apache-2.0
--
-- Tracing a VM for a while, and what it comes to: as `perf kvm stat` does for
-- KVM, here for what reaches the VMM.
--
--   local trace = require "sm.trace"
--   print(trace.summary(trace.record(vm, { seconds = 2 })))
--
-- Works on a VM of sm.core, on a worker's proxy and on what sm.start gives.

local inspect = require "sm.inspect"
local loop = require "sm.loop"

local M = {}

local KEYS = {
    seconds = "number", exits = "boolean", requests = "boolean", interrupts = "boolean",
    first = "number", last = "number", keep = "function", on_event = "function", done = "function",
}

local function check(opts)
    for key, value in pairs(opts) do
        if not KEYS[key] then
            error(("trace.record: unknown key '%s'"):format(tostring(key)), 3)
        elseif type(value) ~= KEYS[key] then
            error(("trace.record: %s: expected a %s, got a %s"):format(key, KEYS[key], type(value)), 3)
        end
    end
end

-- Every record until the time is over, from a machine whose events are ours.
local function drain(vm, opts, take)
    local deadline = loop.now() + (opts.seconds or 1)
    while not (opts.done and opts.done()) do
        local left = deadline - loop.now()
        local event = vm:next_event(math.max(0, math.min(left, 0.1)))
        if event then
            take(event)
            if event.type == "state" and event.state == "stopped" then
                return
            end
        elseif left <= 0 then
            return
        end
    end
end

-- The same from a product VM, whose events its own task takes.
local function overhear(vm, opts, take)
    local before = vm:on_event(take)
    local _ <close> = setmetatable({}, { __close = function()
        vm:on_event(before)
    end })
    local deadline = loop.now() + (opts.seconds or 1)
    while loop.now() < deadline and not vm.ending and not (opts.done and opts.done()) do
        loop.sleep(math.min(0.05, math.max(0, deadline - loop.now())))
    end
end

--- Trace for `seconds` (1), or until `done()`; returns the records in order,
--- with `lost` beside them: how many did not fit. With no kind chosen, all are
--- traced. `first` and `last` bound the addresses of exits; `keep(record)`
--- chooses; `on_event` gets what is no record. Yields.
---@async
---@param vm table|userdata
---@param opts { seconds: number?, exits: boolean?, requests: boolean?, interrupts: boolean?, first: integer?, last: integer?, keep: (fun(record: table): boolean)?, on_event: fun(event: table)?, done: (fun(): boolean)? }?
---@return table records
function M.record(vm, opts)
    opts = opts or {}
    check(opts)
    local machine = inspect.machine_of(vm)
    local all = not (opts.exits or opts.requests or opts.interrupts)
    local records = { lost = 0 }
    local function take(event)
        if event.type == "trace" then
            if not opts.keep or opts.keep(event) then
                records[#records + 1] = event
            end
        elseif event.type == "lost" and event.source == "trace" then
            records.lost = records.lost + event.count
        elseif opts.on_event then
            opts.on_event(event)
        end
    end
    assert(machine:trace {
        exits = all or opts.exits, requests = all or opts.requests,
        interrupts = all or opts.interrupts, first = opts.first, last = opts.last,
    })
    local begun = loop.now()
    local ok, err = pcall(machine == vm and drain or overhear, vm, opts, take)
    records.seconds = loop.now() - begun
    pcall(machine.trace, machine, {})
    if not ok then
        error(err, 0)
    end
    return records
end

local function label(record)
    if record.kind == "exit" then
        local way = record.write and "write" or "read"
        if record.what == "pio" or record.what == "mmio" then
            return ("%s %s 0x%x"):format(record.what, way, record.address)
        end
        return record.what
    elseif record.kind == "request" then
        return ("%s %s"):format(record.device, record.what)
    end
    return ("gsi %d"):format(record.gsi)
end

--- Records by what they are: a list of {kind, label, count, total_ns, min_ns,
--- max_ns, faults}, the most time first.
---@param records table
---@return table
function M.group(records)
    local rows, by = {}, {}
    for _, record in ipairs(records) do
        local name = label(record)
        local key = record.kind .. " " .. name
        local row = by[key]
        if not row then
            row = { kind = record.kind, label = name, count = 0, total_ns = 0, min_ns = math.huge, max_ns = 0, faults = 0 }
            by[key] = row
            rows[#rows + 1] = row
        end
        row.count = row.count + 1
        row.total_ns = row.total_ns + record.duration_ns
        row.min_ns = math.min(row.min_ns, record.duration_ns)
        row.max_ns = math.max(row.max_ns, record.duration_ns)
        row.faults = row.faults + (record.fault and 1 or 0)
    end
    table.sort(rows, function(a, b)
        if a.total_ns ~= b.total_ns then
            return a.total_ns > b.total_ns
        elseif a.count ~= b.count then
            return a.count > b.count
        end
        return a.label < b.label
    end)
    return rows
end

local TITLES = { exit = "exits to the VMM", request = "requests to devices", interrupt = "interrupts" }

--- A table for people.
---@param records table what M.record gives
---@return string
function M.summary(records)
    local rows = M.group(records)
    local lines = {}
    for _, kind in ipairs { "exit", "request", "interrupt" } do
        local count, total = 0, 0
        for _, row in ipairs(rows) do
            if row.kind == kind then
                count, total = count + row.count, total + row.total_ns
            end
        end
        if count > 0 then
            lines[#lines + 1] = ("%d %s in %.2f s"):format(count, TITLES[kind], records.seconds or 0)
            lines[#lines + 1] = ("  %-28s %8s %7s %7s %10s %10s %10s"):format(
                "what", "count", "count%", "time%", "min us", "avg us", "max us")
            for _, row in ipairs(rows) do
                if row.kind == kind then
                    lines[#lines + 1] = ("  %-28s %8d %6.1f%% %6.1f%% %10.2f %10.2f %10.2f%s"):format(
                        row.label, row.count, 100 * row.count / count,
                        total > 0 and 100 * row.total_ns / total or 0, row.min_ns / 1e3,
                        row.total_ns / row.count / 1e3, row.max_ns / 1e3,
                        row.faults > 0 and (" (%d by faults)"):format(row.faults) or "")
                end
            end
        end
    end
    if records.lost and records.lost > 0 then
        lines[#lines + 1] = ("%d records did not fit and were lost"):format(records.lost)
    end
    return table.concat(lines, "\n")
end

return M
