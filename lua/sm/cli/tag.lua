-- SPDX-License-Identifier: Apache-2.0
return {
    usage = "sm tag IMAGE NAME",
    about = "Give an image of the store another name.",
    flags = {},
    min = 2,
    max = 2,
    needs = "an image and a name",
    run = function(_, rest)
        local ok, err = require("sm.image").tag(rest[1], rest[2])
        if not ok then
            return nil, err
        end
        return 0
    end,
}
