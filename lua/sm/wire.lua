-- SPDX-License-Identifier: Apache-2.0
--
-- The words of the agent's protocol (core/guest/proto.h), in Lua: numbers,
-- names, and requests packed into fields. Nothing here touches a connection.

local M = {}

M.VERSION = 2
M.PORT = 1024
M.HEADER = "<I4BBI2"
M.HEADER_BYTES = 8
M.PAYLOAD_MAX = 65536
M.CONTROL_MAX = 8192 -- the largest answer of an agent that is not stream data
M.WINDOW = 262144
M.REQUEST_MAX = 4 << 20

M.FLAG_MORE, M.FLAG_EOF, M.FLAG_GROUP = 1, 2, 4

-- Host to guest.
M.BOOT, M.EXEC, M.STDIN, M.STDIN_EOF, M.RESIZE, M.SIGNAL = 1, 2, 3, 4, 5, 6
M.FILE_PUT, M.FILE_GET, M.CREDIT, M.CLOCK, M.SHUTDOWN, M.PING, M.BYE, M.RESUME = 7, 8, 9, 10, 11, 12, 13, 14
M.FREEZE, M.THAW = 15, 16

-- Guest to host.
M.HELLO, M.BOOTED, M.STARTED, M.STDOUT, M.STDERR = 0x81, 0x82, 0x83, 0x84, 0x85
M.EXIT, M.FAILED, M.STDIN_CREDIT, M.PONG, M.GOODBYE = 0x86, 0x87, 0x88, 0x89, 0x8a
M.REFUSED, M.STDIN_CLOSED, M.FILE_INFO, M.FROZEN = 0x8b, 0x8c, 0x8d, 0x8e

M.marks = {
    [0] = "kernel_zero", "tsc", "init", "modules", "dial", "hello", "boot", "root", "booted",
}
M.reasons = { [0] = "exited", "poweroff", "reboot", "failed" }
M.stages = {
    [0] = "request", "chain", "spawn", "user", "cwd", "exec", "file", "root", "scratch", "mount", "net",
}
M.roots = { auto = 0, scratch = 1, tmpfs = 2, readonly = 3, initramfs = 4 }

-- The guest is Linux whatever the host is, so its numbers are not the host's.
local signals = {
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
}
for number, name in ipairs(signals) do
    signals[name] = number
end

local errnos = {
    [1] = "operation not permitted", [2] = "no such file or directory",
    [5] = "input/output error", [6] = "no such device or address",
    [7] = "argument list too long", [8] = "exec format error",
    [11] = "try again", [12] = "out of memory", [13] = "permission denied",
    [16] = "device or resource busy", [17] = "file exists", [18] = "cross-device link",
    [20] = "not a directory", [21] = "is a directory", [22] = "invalid argument",
    [24] = "too many open files", [26] = "text file busy", [27] = "file too large",
    [28] = "no space left on device", [30] = "read-only file system",
    [34] = "out of range", [36] = "file name too long", [40] = "too many symbolic links",
    [71] = "protocol error", [95] = "not supported", [108] = "shutting down",
    [110] = "timed out", [114] = "already done", [125] = "cancelled",
}

---@param number integer
---@return string
function M.strerror(number)
    return errnos[number] or ("error " .. number)
end

--- The number of "TERM", "SIGTERM", "RTMIN+3" or 15.
---@param signal string|integer
---@return integer
function M.signal_number(signal)
    local number = math.tointeger(tonumber(signal))
    if not number and type(signal) == "string" then
        local name = signal:upper():gsub("^SIG", "")
        local offset = name:match("^RTMIN%+?(%d*)$")
        number = signals[name] or offset and 34 + (tonumber(offset) or 0)
    end
    if not number or number < 1 or number > 64 then
        error("unknown signal: " .. tostring(signal), 2)
    end
    return number
end

--- "TERM" for 15, "34" for a number without a name.
---@param number integer
---@return string
function M.signal_name(number)
    return signals[number] or tostring(number)
end

--- One field of a request.
---@param tag integer
---@param value string
function M.field(tag, value)
    return string.pack("<I2s4", tag, value)
end

---@param tag integer
---@param number integer
function M.field_u32(tag, number)
    return string.pack("<I2I4I4", tag, 4, number)
end

--- Fields as {tag, value} pairs, in order; nil and a reason if they are cut
--- short.
---@param text string
---@return table? fields, string? err
function M.fields(text)
    local out, at, size = {}, 1, #text
    while at <= size do
        if size - at + 1 < 6 then
            return nil, "field cut short"
        end
        local tag, length = string.unpack("<I2I4", text, at)
        if length > size - at - 5 then
            return nil, "field longer than its frame"
        end
        out[#out + 1] = { tag, text:sub(at + 6, at + 5 + length) }
        at = at + 6 + length
    end
    return out
end

--- Refuse keys that nobody reads: a misspelt option must not pass silently.
---@param what string
---@param given table
---@param known table<string, any>
function M.check_keys(what, given, known)
    for key in pairs(given) do
        if not known[key] then
            local names = {}
            for table_ in function(_, before)
                if not before then
                    return known
                end
                local meta = getmetatable(before)
                return meta and meta.__index
            end do
                for name in pairs(table_) do
                    names[#names + 1] = name
                end
            end
            table.sort(names)
            error(("%s: unknown option '%s' (known: %s)"):format(what, tostring(key), table.concat(names, ", ")), 3)
        end
    end
end

return M
