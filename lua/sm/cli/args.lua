-- SPDX-License-Identifier: Apache-2.0
--
-- Command lines: a command describes its flags as data; parsing, checking and
-- the help text come from the same table.
--
--   { "name", "n", "NAME", "what it is for", kind = "string" }
--     long    short  value placeholder (nil: a switch)   help
--
-- kind: "string" (default with a value), "integer", "number", "size" (bytes:
-- 512M, 2g), "seconds" (1.5, 500ms, 2m), "list" (may be repeated). A flag
-- given twice keeps the last value, as Docker does. Flags end at the first
-- word that is not one, or at `--`: what follows belongs to the command run.

local M = {}

local UNITS = { [""] = 1, b = 1, k = 1 << 10, m = 1 << 20, g = 1 << 30, t = 1 << 40 }

--- "512M", "1g", "1.5G", "4096" → bytes.
---@param text string
---@return integer? bytes
---@return string? err
function M.size(text)
    local number, unit = text:lower():match("^(%d+%.?%d*)%s*([bkmgt]?)i?b?$")
    number = tonumber(number)
    if not number then
        return nil, ("'%s' is not a size; write 512M or 2G"):format(text)
    end
    local bytes = number * UNITS[unit]
    if bytes >= 2 ^ 62 then
        return nil, ("'%s' is more than any machine has"):format(text)
    end
    return math.floor(bytes)
end

local TIME = { [""] = 1, ms = 0.001, s = 1, m = 60, h = 3600 }

--- "10", "1.5s", "500ms", "2m" → seconds.
---@param text string
---@return number? seconds
---@return string? err
function M.seconds(text)
    local number, unit = text:match("^(%d*%.?%d+)(%a*)$")
    if not number or not TIME[unit] then
        return nil, ("'%s' is not a time; write 10, 1.5s, 500ms or 2m"):format(text)
    end
    return tonumber(number) * TIME[unit]
end

local CONVERT = {
    string = function(v)
        return v
    end,
    list = function(v)
        return v
    end,
    integer = function(v)
        local n = math.tointeger(tonumber(v))
        if not n then
            return nil, ("'%s' is not a whole number"):format(v)
        end
        return n
    end,
    number = function(v)
        local n = tonumber(v)
        if not n then
            return nil, ("'%s' is not a number"):format(v)
        end
        return n
    end,
    size = M.size,
    seconds = M.seconds,
}

local function key_of(long)
    return (long:gsub("-", "_"))
end

local function index(flags)
    local by = {}
    for _, f in ipairs(flags) do
        by["--" .. f[1]] = f
        if f[2] then
            by["-" .. f[2]] = f
        end
    end
    return by
end

-- Edit distance, for "did you mean".
local function distance(a, b)
    local prev = {}
    for j = 0, #b do
        prev[j] = j
    end
    for i = 1, #a do
        local row = { [0] = i }
        for j = 1, #b do
            local same = a:byte(i) == b:byte(j) and 0 or 1
            row[j] = math.min(prev[j] + 1, row[j - 1] + 1, prev[j - 1] + same)
        end
        prev = row
    end
    return prev[#b]
end

--- The word of `words` nearest to `word`, if any is near.
---@param word string
---@param words string[]
---@return string?
function M.nearest(word, words)
    local best, least
    for _, w in ipairs(words) do
        local d = distance(word, w)
        if (not least or d < least) and d <= math.max(1, #word // 3) then
            best, least = w, d
        end
    end
    return best
end

local function unknown(by, word)
    local names = {}
    for name in pairs(by) do
        if name:sub(1, 2) == "--" then
            names[#names + 1] = name
        end
    end
    local near = M.nearest(word, names)
    return ("unknown flag %s%s"):format(word, near and (" (did you mean %s?)"):format(near) or "")
end

local function store(out, f, value)
    if f.absent then
        return nil, ("--%s: %s"):format(f[1], f.absent)
    end
    local key = key_of(f[1])
    if not f[3] then
        if value == nil or value == "true" then
            out[key] = true
        elseif value == "false" then
            out[key] = false
        else
            return nil, ("--%s takes no value"):format(f[1])
        end
        return true
    end
    local converted, err = CONVERT[f.kind or "string"](value)
    if converted == nil then
        return nil, ("--%s: %s"):format(f[1], err)
    end
    if f.kind == "list" then
        out[key] = out[key] or {}
        table.insert(out[key], converted)
    else
        out[key] = converted
    end
    return true
end

--- Parse `argv` from position `from`.
---@param flags table[] the flag table, see the head of this file
---@param argv string[]
---@param from integer
---@param verb boolean? the first word is a verb, and flags may follow it
---@return table? options by long name, dashes as underscores
---@return string[]|string rest what follows the flags, or the error
function M.parse(flags, argv, from, verb)
    local by, out, i, rest = index(flags), {}, from, {}
    while argv[i] do
        local word = argv[i]
        if word == "--" then
            i = i + 1
            break
        elseif word == "-" or word:sub(1, 1) ~= "-" then
            if not verb or rest[1] then
                break
            end
            rest[1] = word
        elseif word:sub(1, 2) == "--" then
            local name, value = word:match("^(%-%-[^=]+)=(.*)$")
            name = name or word
            local f = by[name]
            if not f then
                return nil, unknown(by, name)
            end
            if f[3] and value == nil then
                i = i + 1
                value = argv[i]
                if value == nil then
                    return nil, ("%s needs a value: %s %s"):format(name, name, f[3])
                end
            end
            local ok, err = store(out, f, value)
            if not ok then
                return nil, err
            end
        else
            -- Short flags may be joined (-it), and the last may carry a value
            -- (-m512M, -m=512M).
            local j = 2
            while j <= #word do
                local name = "-" .. word:sub(j, j)
                local f = by[name]
                if not f then
                    return nil, unknown(by, #word == 2 and word or name)
                end
                local value
                if f[3] then
                    value = word:sub(j + 1):gsub("^=", "")
                    if value == "" then
                        i = i + 1
                        value = argv[i]
                        if value == nil then
                            return nil, ("%s needs a value: %s %s"):format(name, name, f[3])
                        end
                    end
                    j = #word
                end
                local ok, err = store(out, f, value)
                if not ok then
                    return nil, err
                end
                j = j + 1
            end
        end
        i = i + 1
    end
    return out, table.move(argv, i, #argv, #rest + 1, rest)
end

--- The help text of a command.
---@param usage string e.g. "sm run [flags] IMAGE [CMD…]"
---@param about string
---@param flags table[]
---@return string
function M.help(usage, about, flags)
    local lines = { "usage: " .. usage, "", about }
    if #flags > 0 then
        lines[#lines + 1] = ""
    end
    local left, width = {}, 0
    for i, f in ipairs(flags) do
        local text = (f[2] and "-" .. f[2] .. ", " or "    ") .. "--" .. f[1]
        if f[3] then
            text = text .. " " .. f[3]
        end
        left[i] = text
        width = math.max(width, #text)
    end
    for i, f in ipairs(flags) do
        lines[#lines + 1] = ("  %s%s  %s"):format(left[i], (" "):rep(width - #left[i]), f[4])
    end
    return table.concat(lines, "\n") .. "\n"
end

return M
