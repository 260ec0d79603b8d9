-- SPDX-License-Identifier: Apache-2.0
--
-- Arguments of public functions: a mistake raises an error that names the
-- function, the argument and what was expected, at the line of the caller.

--- `types` are names of Lua types, "integer", or "any", separated by "|"; one
--- that ends in "?" takes nil.
---@param fn string name of the function
---@param position integer of the argument
---@param value any
---@param name string of the argument
---@param types string
return function(fn, position, value, name, types)
    local kind = type(value)
    for word in types:gmatch "[^|?]+" do
        if kind == word or word == "integer" and math.type(value) == "integer" then
            return
        end
    end
    if value == nil and types:sub(-1) == "?" then
        return
    end
    error(("bad argument #%d '%s' to '%s' (%s expected, got %s)"):format(
        position, name, fn, types:gsub("%?$", ""):gsub("|", " or "), kind), 3)
end
