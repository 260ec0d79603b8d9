-- SPDX-License-Identifier: Apache-2.0
local vms = require "sm.cli.vms"

return {
    usage = "sm stop [flags] VM…",
    about = "End VMs in good order: their command gets its stop signal, SIGKILL after the\n"
        .. "grace time, and disks are synced.",
    flags = {
        { "time", "t", "TIME", "seconds until SIGKILL (default 10)", kind = "seconds" },
    },
    min = 1,
    needs = "a VM",
    run = function(o, rest)
        return vms.each(rest, function(name)
            return vms.with(name, function(vm)
                return vm:stop { grace = o.time }
            end)
        end)
    end,
}
