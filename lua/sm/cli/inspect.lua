-- SPDX-License-Identifier: Apache-2.0
local json = require "sm.json"

-- The configuration is the document as it is, not our reading of it.
local function shape(about)
    local ours = json.encode { Reference = about.reference, Digest = about.digest, Source = about.source,
        Id = about.manifest.config.digest, MediaType = about.media_type, Pulled = about.pulled,
        RootBytes = about.size, Layers = about.manifest.layers }
    return ours:sub(1, -2) .. ',"Image":' .. about.config_bytes .. "}"
end

return {
    usage = "sm inspect IMAGE [IMAGE…]",
    about = "All that is known of images in the store, as a JSON list.",
    flags = {},
    min = 1,
    needs = "an image",
    run = function(_, rest)
        local list = {}
        for i, name in ipairs(rest) do
            local about, err = require("sm.image").inspect(name)
            if not about then
                return nil, "inspect: " .. err
            end
            list[i] = shape(about)
        end
        print("[" .. table.concat(list, ",") .. "]")
        return 0
    end,
}
