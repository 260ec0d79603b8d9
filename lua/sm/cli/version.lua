-- SPDX-License-Identifier: Apache-2.0
return {
    usage = "sm version",
    about = "Print the version of sm.",
    flags = {},
    max = 0,
    run = function()
        print("sm " .. require "sm.version")
        return 0
    end,
}
