-- SPDX-License-Identifier: Apache-2.0
local sm = require "sm"
local vms = require "sm.cli.vms"

local function status(info, now)
    if info.status == "running" then
        return "Up " .. vms.ago(now - (info.created or now))
    end
    return ("Exited (%s) %s ago"):format(info.code or "?", vms.ago(now - (info.finished or now)))
end

-- A command as one would type it, with nothing in it that moves the cursor.
local function command_text(info, whole)
    local words = {}
    for i, word in ipairs(info.command or {}) do
        word = tostring(word):gsub("%c", "?")
        words[i] = word:find("[%s\"']") and ("%q"):format(word) or word
    end
    local text = table.concat(words, " ")
    return not whole and #text > 30 and text:sub(1, 29) .. "…" or text
end

return {
    usage = "sm ps [flags]",
    about = "List the VMs of this user, the newest first, whoever started them.",
    flags = {
        { "all", "a", nil, "those that have exited as well" },
        { "quiet", "q", nil, "names only" },
        { "no-trunc", nil, nil, "whole commands" },
    },
    max = 0,
    run = function(o)
        local list, err = sm.vms()
        if not list then
            return nil, err
        end
        local now = os.time()
        local rows = { { "NAME", "IMAGE", "COMMAND", "CREATED", "STATUS" } }
        for _, info in ipairs(list) do
            if o.all or info.status == "running" then
                rows[#rows + 1] = {
                    info.id, info.image or "", command_text(info, o.no_trunc),
                    vms.ago(now - (info.created or now)) .. " ago", status(info, now),
                }
            end
        end
        if o.quiet then
            for i = 2, #rows do
                print(rows[i][1])
            end
            return 0
        end
        vms.print_table(rows)
        return 0
    end,
}
