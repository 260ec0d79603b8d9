-- SPDX-License-Identifier: Apache-2.0
local human = require("sm.cli.progress").human

return {
    usage = "sm du",
    about = "What the store takes on the disk.",
    flags = {},
    max = 0,
    run = function()
        local usage, err = require("sm.image").usage()
        if not usage then
            return nil, "du: " .. err
        end
        local rows, width = {}, #"REFERENCE"
        for i, one in ipairs(usage.list) do
            rows[i] = { one.reference or one.digest, human(one.unique), human(one.shared),
                os.date("!%Y-%m-%d %H:%M", one.used), one.in_use or "" }
            width = math.max(width, #rows[i][1])
        end
        local format = "%-" .. width .. "s  %-10s  %-10s  %-16s  %s"
        print((format:format("REFERENCE", "ALONE", "SHARED", "LAST USED", "IN USE BY"):gsub("%s+$", "")))
        for _, row in ipairs(rows) do
            print((format:format(table.unpack(row)):gsub("%s+$", "")))
        end
        print(("\nblobs %s, converted layers %s, merged images %s, unfinished %s; in all %s"):format(
            human(usage.blobs), human(usage.layers), human(usage.images), human(usage.unfinished),
            human(usage.total)))
        return 0
    end,
}
