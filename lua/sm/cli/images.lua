-- SPDX-License-Identifier: Apache-2.0
local human = require("sm.cli.progress").human

return {
    usage = "sm images [flags]",
    about = "List the images kept here.",
    flags = {
        { "quiet", "q", nil, "digests only" },
        { "no-trunc", nil, nil, "whole digests" },
    },
    max = 0,
    run = function(o)
        local list, err = require("sm.image").list()
        if not list then
            return nil, err
        end
        if o.quiet then
            for _, image in ipairs(list) do
                print(image.digest)
            end
            return 0
        end
        local rows, width = {}, #"REFERENCE"
        for i, image in ipairs(list) do
            local digest = o.no_trunc and image.digest or image.digest:gsub("^%w+:", ""):sub(1, 12)
            rows[i] = { image.reference or "<none>", digest, human(image.size or 0) }
            width = math.max(width, #rows[i][1])
        end
        local format = "%-" .. width .. "s  %-" .. (o.no_trunc and 71 or 12) .. "s  %s"
        print(format:format("REFERENCE", "DIGEST", "SIZE"))
        for _, row in ipairs(rows) do
            print(format:format(table.unpack(row)))
        end
        return 0
    end,
}
