-- SPDX-License-Identifier: Apache-2.0
--
-- Values as text for people: what the REPL prints. Tables with sorted keys, at
-- most a few levels and a screenful; strings quoted; bytes that are no text as
-- escapes.

local M = {}

local DEPTH, ITEMS, WIDTH, STRING = 4, 60, 76, 400

local function quote(text)
    local cut = #text > STRING and ("... (%d bytes)"):format(#text) or ""
    text = text:sub(1, STRING)
    -- Text in UTF-8 stays readable, other bytes do not reach the terminal.
    local clean = utf8.len(text) and "[%c\\\"\127]" or "[^\32-\126]"
    return '"' .. text:gsub(clean == "[^\32-\126]" and '[^\32-\126]' or clean, function(char)
        local named = ({ ["\n"] = "\\n", ["\t"] = "\\t", ["\r"] = "\\r", ['"'] = '\\"', ["\\"] = "\\\\" })[char]
        return named or ("\\x%02x"):format(char:byte())
    end) .. '"' .. cut
end

local function scalar(value)
    if type(value) == "string" then
        return quote(value)
    elseif math.type(value) == "integer" and (value > 0xffff or value < -0xffff) then
        return ("%d (0x%x)"):format(value, value)
    end
    return tostring(value)
end

local function key_text(key)
    if type(key) == "string" and key:find "^[%a_][%w_]*$" then
        return key
    end
    return "[" .. (type(key) == "string" and quote(key) or tostring(key)) .. "]"
end

local function sorted_keys(t, skip)
    local keys = {}
    for key in next, t do
        if not (math.type(key) == "integer" and key >= 1 and key <= skip) then
            keys[#keys + 1] = key
        end
    end
    table.sort(keys, function(a, b)
        if type(a) == type(b) and (type(a) == "number" or type(a) == "string") then
            return a < b
        end
        return type(a) .. tostring(a) < type(b) .. tostring(b)
    end)
    return keys
end

local show

local function show_table(t, depth, seen, indent)
    local meta = getmetatable(t)
    if type(meta) == "table" and (meta.__tostring or meta.__name) and depth > 0 then
        return tostring(t)
    elseif seen[t] then
        return "{...}"
    elseif depth >= DEPTH then
        return next(t) == nil and "{}" or "{...}"
    end
    seen[t] = true
    local parts, n = {}, rawlen(t)
    local function add(text)
        parts[#parts + 1] = text
        return #parts < ITEMS
    end
    local more = false
    for i = 1, n do
        if not add(show(rawget(t, i), depth + 1, seen, indent .. "  ")) then
            more = i < n
            break
        end
    end
    if not more then
        for _, key in ipairs(sorted_keys(t, n)) do
            if #parts >= ITEMS then
                more = true
                break
            end
            add(key_text(key) .. " = " .. show(rawget(t, key), depth + 1, seen, indent .. "  "))
        end
    end
    seen[t] = nil
    if more then
        parts[#parts + 1] = "..."
    end
    local line = table.concat(parts, ", ")
    if #parts == 0 then
        return "{}"
    elseif #line + #indent < WIDTH and not line:find "\n" then
        return "{ " .. line .. " }"
    end
    return "{\n" .. indent .. "  " .. table.concat(parts, ",\n" .. indent .. "  ") .. "\n" .. indent .. "}"
end

function show(value, depth, seen, indent)
    if type(value) == "table" then
        return show_table(value, depth, seen, indent)
    end
    return scalar(value)
end

--- A value as text.
---@param value any
---@return string
function M.value(value)
    local meta = type(value) == "table" and getmetatable(value)
    if type(meta) == "table" and meta.__tostring then
        return tostring(value)
    end
    return show(value, 0, {}, "")
end

return M
