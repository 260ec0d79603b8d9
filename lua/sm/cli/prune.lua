-- SPDX-License-Identifier: Apache-2.0
local human = require("sm.cli.progress").human
local args = require "sm.cli.args"

local DAY = 24 * 3600

-- "36h", "7d", or what args.seconds takes.
local function age(text)
    local days = text:match("^(%d+)d$")
    if days then
        return tonumber(days) * DAY
    end
    return args.seconds(text)
end

return {
    usage = "sm prune [flags]",
    about = "Clear the store: what no image needs any more and unfinished downloads; with flags,\n"
        .. "images as well. What a running VM or a snapshot needs always stays.",
    flags = {
        { "all", "a", nil, "every image that nothing uses" },
        { "age", nil, "TIME", "images not used for so long, such as 12h or 30d", kind = "string" },
        { "size", nil, "SIZE", "the longest unused images, until the store is no larger", kind = "size" },
        { "dry-run", "n", nil, "only tell which images would go" },
    },
    max = 0,
    run = function(o)
        local seconds, why
        if o.age then
            seconds, why = age(o.age)
            if not seconds then
                return nil, "prune: --age: " .. why
            end
        end
        local result, err = require("sm.image").prune { all = o.all, age = seconds, size = o.size,
            dry_run = o.dry_run }
        if not result then
            return nil, "prune: " .. err
        end
        for _, name in ipairs(result.removed) do
            print((o.dry_run and "would remove " or "removed ") .. name)
        end
        if not o.dry_run then
            print("freed " .. human(result.freed))
        end
        return 0
    end,
}
