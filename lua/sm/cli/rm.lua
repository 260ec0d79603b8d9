-- SPDX-License-Identifier: Apache-2.0
local attached = require "sm.attached"
local sm = require "sm"
local vms = require "sm.cli.vms"

-- End a running VM, and wait until its owner has let go of its folder.
local function force(name, info)
    local outcome, err = vms.with(info, function(vm)
        return vm:kill()
    end)
    if not outcome then
        return nil, err
    end
    local loop = require "sm.loop"
    for _ = 1, 600 do
        local left = attached.find(info.id)
        if not left then
            return true -- it kept nothing
        end
        local ok, why = sm.remove(info.id)
        if ok then
            return true
        elseif why ~= "it is running" then
            return nil, ("%s: %s"):format(name, why)
        end
        loop.sleep(0.05)
    end
    return nil, ("%s: its owner does not end"):format(name)
end

return {
    usage = "sm rm [flags] VM…",
    about = "Remove VMs that have exited: their log and exit code.",
    flags = {
        { "force", "f", nil, "end a running one first" },
    },
    min = 1,
    needs = "a VM",
    run = function(o, rest)
        return vms.each(rest, function(name)
            local info, err = attached.find(name)
            if not info then
                return nil, err
            elseif info.status == "exited" then
                return sm.remove(info.id)
            elseif not o.force then
                return nil, ("cannot remove '%s': it is running; stop it first, or use -f"):format(name)
            end
            return force(name, info)
        end)
    end,
}
