-- SPDX-License-Identifier: Apache-2.0
local vms = require "sm.cli.vms"

return {
    usage = "sm commit [flags] VM [NAME]",
    about = "Keep what a running VM has changed as a new layer on its image, under a name or by\n"
        .. "its digest, which is printed. The VM goes on.",
    flags = {
        { "message", "m", "TEXT", "a comment for the history", kind = "string" },
        { "author", "a", "NAME", "who did it", kind = "string" },
    },
    min = 1,
    max = 2,
    needs = "a VM",
    run = function(o, rest)
        local made, err = vms.with(rest[1], function(vm)
            return vm:commit(rest[2], { message = o.message, author = o.author })
        end)
        if not made then
            return nil, "commit: " .. err
        end
        print(made.digest)
        return 0
    end,
}
