-- SPDX-License-Identifier: Apache-2.0
local attached = require "sm.attached"
local json = require "sm.json"

-- The configuration is the document as it is, not our reading of it.
local function shape(about)
    local ours = json.encode { Reference = about.reference, Digest = about.digest, Source = about.source,
        Id = about.manifest.config.digest, MediaType = about.media_type, Pulled = about.pulled,
        RootBytes = about.size, Layers = about.manifest.layers }
    return ours:sub(1, -2) .. ',"Image":' .. about.config_bytes .. "}"
end

-- JSON for people: two spaces a level, keys in order.
local function pretty(value, indent)
    if type(value) ~= "table" then
        return (json.encode(value):gsub("\\/", "/"))
    end
    local inner, lines = indent .. "  ", {}
    if #value > 0 then
        for i, item in ipairs(value) do
            lines[i] = inner .. pretty(item, inner)
        end
        return "[\n" .. table.concat(lines, ",\n") .. "\n" .. indent .. "]"
    elseif next(value) == nil then
        return "{}"
    end
    local keys = {}
    for key in pairs(value) do
        keys[#keys + 1] = tostring(key)
    end
    table.sort(keys)
    for i, key in ipairs(keys) do
        lines[i] = ("%s%s: %s"):format(inner, pretty(key, inner), pretty(value[key], inner))
    end
    return "{\n" .. table.concat(lines, ",\n") .. "\n" .. indent .. "}"
end

return {
    usage = "sm inspect NAME [NAME…]",
    about = "All that is known of VMs, or of images in the store, as a JSON list. A name is a\n"
        .. "VM's if there is one so called, else an image's.",
    flags = {},
    min = 1,
    needs = "a VM or an image",
    run = function(_, rest)
        local list = {}
        for i, name in ipairs(rest) do
            local info = attached.find(name)
            if info then
                list[i] = pretty(info, "")
            else
                local about, err = require("sm.image").inspect(name)
                if not about then
                    return 1, "inspect: " .. err
                end
                list[i] = shape(about)
            end
        end
        print("[" .. table.concat(list, ",\n") .. "]")
        return 0
    end,
}
