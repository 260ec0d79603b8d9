-- SPDX-License-Identifier: Apache-2.0
return {
    usage = "sm rmi [flags] IMAGE [IMAGE…]",
    about = "Remove images; what other images share stays.",
    flags = {
        { "force", "f", nil, "also the name of an image that a VM or a snapshot uses; its parts stay until then" },
    },
    min = 1,
    needs = "an image",
    run = function(o, rest)
        local image = require "sm.image"
        local code = 0
        for _, ref in ipairs(rest) do
            local ok, err = image.remove(ref, { force = o.force })
            if ok then
                print("removed " .. ref)
            else
                io.stderr:write("sm: rmi: ", err, "\n")
                code = 1
            end
        end
        return code
    end,
}
