-- SPDX-License-Identifier: Apache-2.0
--
-- help(x): what the documentation says of a function, or of a name ("sm.start",
-- "vm:exec", "exec"), or of a module.

local docs = require "sm.docs"

local M = {}

-- Lua functions are known by where they are defined, those of C by identity.
local function by_function(fn)
    local info = debug.getinfo(fn, "S")
    local path = info.source:match "^@(.*)$"
    for _, entry in ipairs(docs.entries()) do
        if entry.path and path and entry.line == info.linedefined and entry.path == path then
            return entry
        end
    end
    local core = require "sm.core"
    local registered = debug.getregistry()["sm.core.vm"]
    for _, entry in ipairs(docs.entries()) do
        local from = entry.place.name == "core" and core
            or entry.place.name == "core_vm" and registered and registered.__index
        if from and rawget(from, entry.name) == fn then
            return entry
        end
    end
    for name, method in pairs(require("sm.worker").methods or {}) do
        if method == fn then
            return M.find("core_vm:" .. name)
        end
    end
end

--- The entry of a name: whole ("vm:exec", "sm.start") or its last part.
---@param name string
---@return table?
function M.find(name)
    for _, entry in ipairs(docs.entries()) do
        if entry.id == name or entry.id:gsub(":", ".") == name then
            return entry
        end
    end
    for _, entry in ipairs(docs.entries()) do
        if entry.name == name then
            return entry
        end
    end
end

-- A module's table: one line for each of its functions.
local function overview(place)
    local lines = { place.about, "" }
    for _, entry in ipairs(docs.entries()) do
        if entry.place == place then
            lines[#lines + 1] = ("  %-36s %s"):format(docs.signature(entry), entry.text:match "^[^\n]*")
        end
    end
    return table.concat(lines, "\n")
end

--- The text of help on something; nil when nothing is known of it.
---@param what any
---@return string?
function M.of(what)
    local entry
    if type(what) == "function" then
        entry = by_function(what)
    elseif type(what) == "string" then
        entry = M.find(what)
    end
    if entry then
        return docs.plain(entry)
    end
    for _, place in ipairs(docs.PUBLIC) do
        if what == place.name or type(what) == "table" and not place.class and package.loaded[place.module] == what
            or type(what) == "table" and place.name == "core" and package.loaded["sm.core"] == what then
            return overview(place)
        end
    end
end

return M
