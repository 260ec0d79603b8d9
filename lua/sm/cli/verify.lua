-- SPDX-License-Identifier: Apache-2.0
return {
    usage = "sm verify [flags]",
    about = "Check the store: every blob against its digest, every image against its layers.\n"
        .. "Exit code 1 when something is wrong.",
    flags = {
        { "deep", nil, nil, "convert every layer again and compare" },
        { "repair", nil, nil, "remove what is wrong; the next pull fetches or makes it anew" },
    },
    max = 0,
    run = function(o)
        local result, err = require("sm.image").verify { deep = o.deep, repair = o.repair }
        if not result then
            return nil, "verify: " .. err
        end
        for _, problem in ipairs(result.problems) do
            print(("%s: %s%s"):format(problem.path, problem.what, o.repair and "; removed" or ""))
        end
        print(("%d images, %d blobs, %d problems"):format(result.images, result.blobs, #result.problems))
        return #result.problems > 0 and 1 or 0
    end,
}
