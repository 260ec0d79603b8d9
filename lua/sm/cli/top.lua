-- SPDX-License-Identifier: Apache-2.0
local vms = require "sm.cli.vms"

return {
    usage = "sm top VM [ARG…]",
    about = "List the processes in a VM, by the ps of its image; ARGs are given to it.",
    flags = {},
    min = 1,
    needs = "a VM",
    run = function(_, rest)
        local argv = table.move(rest, 2, #rest, 2, { "ps" })
        local code, err = vms.with(rest[1], function(vm)
            local r, err, failure = vm:exec { argv = argv, env = { "PATH=" .. require("sm.oci_config").default_path } }
            if not r then
                local absent = failure and failure.status == 127
                return 1, absent and "top: the image has no ps" or err
            end
            io.write(r.stdout)
            io.stderr:write(r.stderr)
            return r.status
        end)
        return code or 1, err
    end,
}
