-- SPDX-License-Identifier: Apache-2.0
local vms = require "sm.cli.vms"

return {
    usage = "sm kill [flags] VM…",
    about = "End VMs at once, as pulling the plug does; or send a signal to their command.",
    flags = {
        { "signal", "s", "SIGNAL", "by name or number (default KILL)", kind = "string" },
    },
    min = 1,
    needs = "a VM",
    run = function(o, rest)
        if o.signal and not pcall(require("sm.wire").signal_number, o.signal) then
            return 1, ("kill: unknown signal '%s'"):format(o.signal)
        end
        return vms.each(rest, function(name)
            return vms.with(name, function(vm)
                return vm:kill(o.signal)
            end)
        end)
    end,
}
