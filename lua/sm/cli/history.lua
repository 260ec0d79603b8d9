-- SPDX-License-Identifier: Apache-2.0
local human = require("sm.cli.progress").human

local function plain(text, width)
    text = (text or ""):gsub("[%c\128-\255]+", " ")
    return width and #text > width and text:sub(1, width - 3) .. "..." or text
end

return {
    usage = "sm history [flags] IMAGE",
    about = "How an image came to be, newest step first.",
    flags = {
        { "no-trunc", nil, nil, "whole lines" },
    },
    min = 1,
    max = 1,
    needs = "an image",
    run = function(o, rest)
        local steps, err = require("sm.image").history(rest[1])
        if not steps then
            return nil, "history: " .. err
        end
        local row = o.no_trunc and "%-20s  %-10s  %s  %s" or "%-20s  %-10s  %-60s  %s"
        print((row:format("CREATED", "SIZE", "CREATED BY", "COMMENT"):gsub(" +$", "")))
        for _, step in ipairs(steps) do
            local created = plain(step.created):sub(1, 19):gsub("T", " ")
            local width = not o.no_trunc and 60 or nil
            print((row:format(created, human(step.size), plain(step.created_by, width),
                plain(step.comment, width)):gsub(" +$", "")))
        end
        return 0
    end,
}
