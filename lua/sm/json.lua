-- SPDX-License-Identifier: Apache-2.0
--
-- JSON from strangers (registries, images, credential files) and of our own
-- store. Decoding never raises: it answers nil and why. A null is taken as
-- "not there", which is how Go programs, who write most of these documents,
-- mean it; in an array it stays as `json.null`, so that no index moves.
--
-- Limits of lua-cjson 2.1, which Debian 12 has: an empty array and an empty
-- object are both `{}`, and whole numbers are exact up to 14 digits.

local cjson = require "cjson.safe"

local M = {}

-- Deep documents are an attack: none of ours nests further than this.
local max_depth = 32

local codec = cjson.new()
codec.decode_max_depth(max_depth)
codec.decode_invalid_numbers(false)

M.null = cjson.null

local function is_sequence(value)
    return #value > 0
end

-- Depth is bounded by the decoder, so is this recursion.
local function normalise(value)
    if math.type(value) == "float" then
        return math.tointeger(value) or value
    end
    if type(value) ~= "table" then
        return value
    end
    local keep_nulls = is_sequence(value)
    for k, v in pairs(value) do
        if v ~= cjson.null then
            value[k] = normalise(v)
        elseif not keep_nulls then
            value[k] = nil
        end
    end
    return value
end

--- Decode. Returns the value, or nil and one line.
---@param text string
---@return any value
---@return string? error
function M.decode(text)
    local value, why = codec.decode(text)
    if value == nil then
        return nil, "not JSON: " .. tostring(why)
    end
    return normalise(value)
end

--- Decode a document that must be an object.
---@param text string
---@return table? object
---@return string? error
function M.decode_object(text)
    local value, why = M.decode(text)
    if value == nil then
        return nil, why
    end
    if type(value) ~= "table" or is_sequence(value) then
        return nil, "not a JSON object"
    end
    return value
end

--- Encode a value of ours; one that cannot be encoded is our own bug.
---@param value any
---@return string
function M.encode(value)
    return assert(codec.encode(value))
end

--- Encode a list, also when it is empty.
---@param list table
---@return string
function M.encode_array(list)
    local items = {}
    for i, value in ipairs(list) do
        items[i] = M.encode(value)
    end
    return "[" .. table.concat(items, ",") .. "]"
end

--- Whether a decoded value is an array (and all of it of Lua type `kind`).
---@param value any
---@param kind? string
---@return boolean
function M.is_array(value, kind)
    if type(value) ~= "table" or (next(value) ~= nil and not is_sequence(value)) then
        return false
    end
    for _, v in ipairs(value) do
        if kind and type(v) ~= kind then
            return false
        end
    end
    return true
end

--- Whether a decoded value is an object.
---@param value any
---@return boolean
function M.is_object(value)
    return type(value) == "table" and not is_sequence(value)
end

return M
