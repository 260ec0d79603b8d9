-- SPDX-License-Identifier: Apache-2.0
local sm = require "sm"
local vms = require "sm.cli.vms"

return {
    usage = "sm fork [flags] VM",
    about = "Copies of a running VM, as it is now, running beside it; their names are printed.\n"
        .. "Each has its own hostname, machine id, randomness and disk. `sm exec` and\n"
        .. "`sm stop` work with them as with any VM.",
    flags = {
        { "number", "n", "N", "how many (default 1)", kind = "integer" },
        { "clock", nil, "HOW", "freeze (default) or advance the guest's clocks over the gap", kind = "string" },
    },
    min = 1,
    max = 1,
    needs = "a VM",
    run = function(o, rest)
        local n = o.number or 1
        if n < 1 then
            return nil, "fork: -n: expected at least 1"
        end
        local ids, err = vms.with(rest[1], function(vm)
            return require("sm.clone").fork_attached(vm, n, { clock = o.clock })
        end)
        if not ids then
            return nil, err
        end
        for _, id in ipairs(ids) do
            print(id)
        end
        return 0
    end,
}
