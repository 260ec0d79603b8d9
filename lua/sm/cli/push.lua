-- SPDX-License-Identifier: Apache-2.0
local progress = require "sm.cli.progress"

return {
    usage = "sm push [flags] IMAGE [REFERENCE]",
    about = "Push an image of the store to the registry its name tells, or to REFERENCE.\n"
        .. "Prints the digest, which is the same here and there.",
    flags = {
        progress.FLAG,
        { "quiet", "q", nil, "print the digest only" },
    },
    min = 1,
    max = 2,
    needs = "an image",
    run = function(o, rest)
        local bars, why = progress.new(o)
        if not bars then
            return nil, "push: " .. why
        end
        local pushed, err = require("sm.image").push(rest[1], { to = rest[2], progress = function(e)
            bars:event(e)
        end })
        bars:finish()
        if not pushed then
            return nil, err
        end
        print(pushed.digest)
        return 0
    end,
}
