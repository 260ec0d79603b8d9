-- SPDX-License-Identifier: Apache-2.0
local progress = require "sm.cli.progress"
local sm = require "sm"

return {
    usage = "sm pull [flags] IMAGE",
    about = "Fetch an image and make it ready to run.",
    flags = {
        { "platform", nil, "OS/ARCH", "which of a multi-platform image", kind = "string" },
        progress.FLAG,
        { "quiet", "q", nil, "print the digest only" },
    },
    min = 1,
    max = 1,
    needs = "an image",
    run = function(o, rest)
        local bars, why = progress.new(o)
        if not bars then
            return nil, "pull: " .. why
        end
        local image, err = sm.image(rest[1], {
            pull = "always",
            platform = o.platform,
            progress = function(e)
                bars:event(e)
            end,
        })
        bars:finish()
        if not image then
            return nil, err
        end
        print(image.digest)
        return 0
    end,
}
