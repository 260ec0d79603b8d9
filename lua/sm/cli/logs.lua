-- SPDX-License-Identifier: Apache-2.0
--
-- sm logs: what the command of a detached VM said, also after its end.

local sm = require "sm"
local attached = require "sm.attached"
local vmlog = require "sm.vmlog"

local function put(stream, bytes)
    local out = stream == "stdout" and io.stdout or io.stderr
    out:write(bytes)
    out:flush()
end

-- Of a VM that has exited: its files.
local function from_files(info)
    local reader <close> = vmlog.reader(info.dir)
    for record in function() return reader:next() end do
        put(record[2] == 1 and "stdout" or "stderr", record[3])
    end
    return 0
end

return {
    usage = "sm logs [flags] VM",
    about = "Print what the command of a detached VM has said; the last 4 to 8 MiB are kept.",
    flags = {
        { "follow", "f", nil, "go on until the VM ends" },
    },
    min = 1,
    max = 1,
    needs = "a VM",
    run = function(o, rest)
        local info, err = attached.find(rest[1])
        if not info then
            return 1, err
        elseif info.status == "exited" then
            return from_files(info)
        end
        local vm <close>, why = sm.attach(info)
        if not vm then
            return 1, why
        end
        local ok
        ok, err = vm:logs({ follow = o.follow }, put)
        return ok and 0 or 1, not ok and err or nil
    end,
}
