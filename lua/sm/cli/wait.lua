-- SPDX-License-Identifier: Apache-2.0
local attached = require "sm.attached"
local vms = require "sm.cli.vms"

return {
    usage = "sm wait VM…",
    about = "Wait until VMs have ended, then print their exit codes.",
    flags = {},
    min = 1,
    needs = "a VM",
    run = function(_, rest)
        return vms.each(rest, function(name)
            local info, err = attached.find(name)
            if not info then
                return nil, err
            end
            local outcome = info.status == "exited" and info
            if not outcome then
                outcome, err = vms.with(info, function(vm)
                    return vm:wait()
                end)
            end
            if outcome then
                print(outcome.code)
            end
            return outcome, err
        end, true)
    end,
}
