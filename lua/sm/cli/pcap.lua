-- SPDX-License-Identifier: Apache-2.0
--
-- sm pcap: the traffic of a VM that runs, whoever started it.

local uv = require "luv"
local vms = require "sm.cli.vms"

return {
    usage = "sm pcap [-w FILE] [--card N] VM",
    about = "Record the frames of a VM's network card from now on, for tcpdump and Wireshark:\n"
        .. "what the policy lets out of the guest, and what comes in.\n"
        .. "To standard output unless told otherwise: sm pcap VM | tcpdump -r -",
    flags = {
        { "write", "w", "FILE", "write to this file, not to stdout", kind = "string" },
        { "card", nil, "N", "which network card; 1 when absent", kind = "integer" },
    },
    min = 1, max = 1,
    needs = "the name of a VM",
    run = function(o, rest)
        if not o.write and uv.guess_handle(1) == "tty" then
            return nil, "pcap: standard output is a terminal; give a file with -w, or pipe it into tcpdump -r -"
        end
        return vms.with(rest[1], function(vm)
            local capture <close>, why = vm:capture { card = o.card }
            if not capture then
                return nil, why
            end
            local fd = 1
            if o.write then -- not before: a wrong name must not cost a file that is there
                fd, why = uv.fs_open(o.write, "w", tonumber("600", 8))
                if not fd then
                    return nil, "pcap: " .. why
                end
            end
            while true do
                local piece
                piece, why = capture:read()
                if not piece then
                    break
                end
                local n, failed = uv.fs_write(fd, piece)
                if n ~= #piece then
                    return nil, failed and not failed:find "EPIPE" and "pcap: " .. failed or nil
                end
            end
            return not why and 0 or nil, why
        end)
    end,
}
