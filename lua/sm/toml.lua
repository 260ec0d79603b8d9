-- SPDX-License-Identifier: Apache-2.0
--
-- A reader of TOML (toml.io, 1.0), for configuration files that other programs
-- share with us. Not read, and said so with the line: dates, multi-line strings.
-- No library in Debian reads TOML from Lua 5.4.

local M = {}

local depth_limit = 16
local escapes = { b = "\b", t = "\t", n = "\n", f = "\f", r = "\r", ['"'] = '"', ["\\"] = "\\" }

-- Everything below works on a state {text, at} and raises {line, text} by `fail`.
local function fail(s, text)
    local _, lines = s.text:sub(1, s.at - 1):gsub("\n", "")
    error({ ("line %d: %s"):format(lines + 1, text) }, 0)
end

-- What the pattern (anchored here) captures, moving past it; or nil.
local function take(s, pattern)
    local from, to, what = s.text:find("^" .. pattern, s.at)
    if from then
        s.at = to + 1
        return what or s.text:sub(from, to)
    end
end

local function blanks(s)
    take(s, "[ \t]+")
end

-- Blanks, comments and line ends.
local function space(s)
    repeat
        local found = take(s, "[ \t\r\n]+") or take(s, "#[^\n]*")
    until not found
end

local function end_of_line(s)
    blanks(s)
    take(s, "#[^\n]*")
    if not take(s, "\r?\n") and s.at <= #s.text then
        fail(s, "something is left over on the line")
    end
end

local function unescape(s, body)
    local bad
    local text = body:gsub("\\(.)(%x?%x?%x?%x?)", function(c, hex)
        if c == "u" and #hex == 4 then
            return utf8.char(tonumber(hex, 16))
        elseif escapes[c] then
            return escapes[c] .. hex
        end
        bad = c
    end)
    if bad then
        fail(s, ("the escape \\%s is not known"):format(bad))
    end
    return text
end

local function quoted(s)
    if s.text:find('^"""', s.at) or s.text:find("^'''", s.at) then
        fail(s, "multi-line strings are not read")
    end
    local literal = take(s, "'([^'\n]*)'")
    if literal then
        return literal
    end
    local from = s.at + 1
    local at = from
    while true do
        local c
        at, c = s.text:match('()(["\\\n])', at)
        if not at or c == "\n" then
            fail(s, "a string does not end")
        elseif c == '"' then
            break
        end
        at = at + 2
    end
    local body = s.text:sub(from, at - 1)
    body = unescape(s, body)
    s.at = at + 1
    return body
end

local function is_quote(s)
    return s.text:find("^[\"']", s.at) ~= nil
end

-- a.b."c d" as a list.
local function key_path(s)
    local path = {}
    repeat
        blanks(s)
        local key = is_quote(s) and quoted(s) or take(s, "[%w_-]+")
        if not key then
            fail(s, "expected a key")
        end
        path[#path + 1] = key
        blanks(s)
    until not take(s, "%.")
    return path
end

-- The table at the first n keys of the path, made where it is not there. The
-- last of an array of tables stands for it.
local function descend(s, from, path, n)
    local at = from
    for i = 1, n do
        local next_one = at[path[i]]
        if next_one == nil then
            next_one = {}
            at[path[i]] = next_one
        elseif type(next_one) == "table" and s.arrays[next_one] then
            next_one = next_one[#next_one]
        end
        if type(next_one) ~= "table" or s.closed[next_one] then
            fail(s, ("%s is not a table"):format(path[i]))
        end
        at = next_one
    end
    return at
end

local value

local function assign(s, into, depth)
    local path = key_path(s)
    if not take(s, "=") then
        fail(s, "expected =")
    end
    blanks(s)
    local at = descend(s, into, path, #path - 1)
    local key = path[#path]
    if at[key] ~= nil then
        fail(s, ("%s is there twice"):format(key))
    end
    at[key] = value(s, depth)
end

local function array(s, depth)
    local out = {}
    s.closed[out] = true
    space(s)
    while not take(s, "%]") do
        out[#out + 1] = value(s, depth)
        space(s)
        if not take(s, ",") and not s.text:find("^%]", s.at) then
            fail(s, "expected , or ]")
        end
        space(s)
    end
    return out
end

local function inline_table(s, depth)
    local out = {}
    blanks(s)
    while not take(s, "}") do
        assign(s, out, depth)
        blanks(s)
        if not take(s, ",") and not s.text:find("^}", s.at) then
            fail(s, "expected , or }")
        end
        blanks(s)
    end
    s.closed[out] = true
    return out
end

function value(s, depth)
    if depth > depth_limit then
        fail(s, "nested too deeply")
    end
    if is_quote(s) then
        return quoted(s)
    elseif take(s, "%[") then
        return array(s, depth + 1)
    elseif take(s, "{") then
        return inline_table(s, depth + 1)
    end
    local word = take(s, "[%w_+.:-]+") or ""
    if word == "true" or word == "false" then
        return word == "true"
    end
    local number = not word:find "^[+-]?0%d" and not word:find "__" and tonumber((word:gsub("_", "")))
    if not number then
        fail(s, word == "" and "expected a value" or ("%q is not a value that is read here"):format(word))
    end
    return number
end

local function header(s, root)
    local list = take(s, "%[%[") ~= nil
    if not list then
        take(s, "%[")
    end
    local path = key_path(s)
    if not take(s, list and "%]%]" or "%]") then
        fail(s, "a [header] does not end")
    end
    end_of_line(s)
    if not list then
        return descend(s, root, path, #path)
    end
    local at = descend(s, root, path, #path - 1)
    local key = path[#path]
    local all = at[key]
    if all == nil then
        all = {}
        at[key] = all
        s.arrays[all] = true
    elseif type(all) ~= "table" or not s.arrays[all] then
        fail(s, ("%s is not an array of tables"):format(key))
    end
    all[#all + 1] = {}
    return all[#all]
end

local function document(s)
    local root = {}
    local into = root
    space(s)
    while s.at <= #s.text do
        if s.text:find("^%[", s.at) then
            into = header(s, root)
        else
            assign(s, into, 1)
            end_of_line(s)
        end
        space(s)
    end
    return root
end

--- Read a document into a table: tables and arrays as tables, numbers as numbers.
---@param text string
---@return table?
---@return string? error "line N: …"
function M.decode(text)
    local s = { text = text, at = 1, arrays = {}, closed = {} }
    local ok, result = pcall(document, s)
    if ok then
        return result
    elseif type(result) == "table" then
        return nil, result[1]
    end
    error(result, 0)
end

return M
