-- SPDX-License-Identifier: Apache-2.0
--
-- What the commands about running VMs share: finding them, doing something
-- with several, and tables for people.

local sm = require "sm"

local M = {}

--- Do something with each VM named; Docker's way: names of what was done go to
--- standard output, failures to standard error, and the exit code is 1 if any.
---@param names string[]
---@param act fun(name: string): any, string?
---@param quiet boolean? print no names
---@return integer code
function M.each(names, act, quiet)
    local code = 0
    for _, name in ipairs(names) do
        local ok, err = act(name)
        if not ok then
            io.stderr:write("sm: ", err or "failed", "\n")
            code = 1
        elseif not quiet then
            print(name)
        end
    end
    return code
end

--- Attach, do, let go.
---@param name string|table
---@param fn fun(vm: sm.AttachedVM): any, string?
function M.with(name, fn)
    local vm <close>, err = sm.attach(name)
    if not vm then
        return nil, err
    end
    return fn(vm)
end

--- "3 minutes", as Docker says it.
---@param seconds integer
---@return string
function M.ago(seconds)
    if seconds < 1 then
        return "less than a second"
    elseif seconds < 60 then
        return ("%d second%s"):format(seconds, seconds == 1 and "" or "s")
    elseif seconds < 3600 then
        local n = seconds // 60
        return n == 1 and "about a minute" or ("%d minutes"):format(n)
    elseif seconds < 48 * 3600 then
        local n = seconds // 3600
        return n == 1 and "about an hour" or ("%d hours"):format(n)
    end
    return ("%d days"):format(seconds // 86400)
end

--- A table in columns, the first row its head.
---@param rows string[][]
function M.print_table(rows)
    local width = {}
    for _, row in ipairs(rows) do
        for i, cell in ipairs(row) do
            width[i] = math.max(width[i] or 0, utf8.len(cell) or #cell)
        end
    end
    for _, row in ipairs(rows) do
        local line = {}
        for i, cell in ipairs(row) do
            line[i] = i == #row and cell or cell .. (" "):rep(width[i] - (utf8.len(cell) or #cell))
        end
        print((table.concat(line, "   "):gsub("%s+$", "")))
    end
end

return M
