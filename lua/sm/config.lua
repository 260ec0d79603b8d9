-- SPDX-License-Identifier: Apache-2.0
--
-- The configuration of a VM: one table, validated in one place. Errors name
-- the key and what was expected; an unknown key is an error.

local uv = require "luv"
local args = require "sm.cli.args"
local net_config = require "sm.net_config"

local M = {}

--- Most vCPUs a VM may have (SM_MAX_VCPUS in core/backend.h).
M.MAX_CPUS = 64
--- Less than this and a kernel does not come up.
M.MIN_MEMORY = 48 << 20
M.DEFAULT_MEMORY = 512 << 20

local function bytes(v)
    if type(v) == "string" then
        return args.size(v)
    end
    return math.tointeger(v), "expected bytes, or text such as '512M'"
end

local function is(kind)
    return function(v)
        if type(v) ~= kind then
            return nil, ("expected a %s, got a %s"):format(kind, type(v))
        end
        return v
    end
end

local KEYS = {
    cpus = function(v)
        local n = math.tointeger(v)
        if not n or n < 1 or n > M.MAX_CPUS then
            return nil, ("expected 1 to %d, got %s"):format(M.MAX_CPUS, tostring(v))
        end
        return n
    end,
    memory = function(v)
        local n, err = bytes(v)
        if not n then
            return nil, err
        end
        local total = uv.get_total_memory()
        if n < M.MIN_MEMORY then
            return nil, ("%d MiB is too little for a kernel; at least %d MiB"):format(n >> 20, M.MIN_MEMORY >> 20)
        elseif n > total then
            return nil, ("%d MiB is more than this machine has (%d MiB)"):format(n >> 20, total >> 20)
        end
        -- Whole 2 MiB, so that huge pages fit.
        return (n + (2 << 20) - 1) // (2 << 20) * (2 << 20)
    end,
    disk = function(v)
        local n, err = bytes(v)
        if not n then
            return nil, err
        end
        local least = require("sm.scratch").MIN_BYTES
        if n < least then
            return nil, ("%d bytes is too small for a file system; at least %d MiB"):format(n, least >> 20)
        elseif n > 16 << 40 then
            return nil, "more than 16 TiB, the most an ext4 of 4 KiB blocks holds"
        end
        return n
    end,
    name = function(v)
        if type(v) ~= "string" or not v:match("^[%w][%w_.-]*$") or #v > 63 then
            return nil, "expected letters, digits, '_', '.', '-' (63 at most, the first a letter or digit)"
        end
        return v
    end,
    hostname = function(v)
        if type(v) ~= "string" or not v:match("^[%w][%w.-]*$") or #v > 64 then
            return nil, "expected letters, digits, '-', '.' (64 at most)"
        end
        return v
    end,
    kernel = is "string",
    append = function(v)
        if type(v) ~= "string" or v:find("[%z\n]") then
            return nil, "expected one line of kernel parameters"
        end
        return v
    end,
    read_only = is "boolean",
    -- How the image gets into the guest: a disk with a page cache of the
    -- guest's own, or the host's pages themselves (README, security model).
    rootfs = function(v)
        if v ~= "blk" and v ~= "pmem" then
            return nil, "expected blk or pmem"
        end
        return v
    end,
    verbose = is "boolean",
    warm = is "boolean",
    boot_timeout = is "number",
    eager = is "boolean",
    working_set = is "boolean",
    clock = function(v)
        if v ~= "freeze" and v ~= "advance" then
            return nil, "expected freeze or advance"
        end
        return v
    end,
    after = function(v)
        if type(v) ~= "function" and type(v) ~= "table" then
            return nil, "expected a function, or a command as a list"
        end
        return v
    end,
    on_console = is "function",
    on_event = is "function",
    net = net_config.net,
    publish = net_config.publish,
    publish_all = is "boolean",
    allow = net_config.rules,
    dns = net_config.rules,
    dns_search = net_config.rules,
    add_host = net_config.add_host,
    pcap = is "string",
    on_net = is "function",
    on_flow = is "function",
    progress = is "function",
    pull = function(v)
        if v ~= "missing" and v ~= "always" and v ~= "never" then
            return nil, "expected missing, always or never"
        end
        return v
    end,
    platform = is "string",
}

-- What a copy of a saved machine may be given; the rest is what was saved.
local ONLY_RESTORE = { eager = true, working_set = true, clock = true, after = true, on_flow = true }
local FOR_RESTORE = {
    name = true, hostname = true, boot_timeout = true, on_console = true, on_event = true,
    eager = true, working_set = true, clock = true, after = true, publish = true, publish_all = true,
    on_net = true, on_flow = true, pcap = true,
}

--- Whether a copy of a saved machine may be given this key anew.
---@param key string
---@return boolean
function M.for_restore(key)
    return FOR_RESTORE[key] or false
end

local function check_keys(cfg, allowed)
    local out = {}
    for key, value in pairs(cfg or {}) do
        local check = KEYS[key]
        if not check or not allowed(key) then
            local known = {}
            for name in pairs(KEYS) do
                known[#known + 1] = allowed(name) and name or nil
            end
            local near = args.nearest(tostring(key), known)
            return nil, ("unknown key '%s'%s"):format(tostring(key), near and (" (did you mean '%s'?)"):format(near) or "")
        end
        local ok, err = check(value)
        if ok == nil then
            return nil, ("%s: %s"):format(key, err)
        end
        out[key] = ok
    end
    return out
end

--- Check what a copy of a saved machine is given.
---@param cfg table?
---@return table? checked
---@return string? err
function M.check_restore(cfg)
    local out, err = check_keys(cfg, function(key)
        return FOR_RESTORE[key]
    end)
    if not out then
        return nil, err
    end
    out.boot_timeout = out.boot_timeout or 120
    return out
end

--- Check a configuration and fill in defaults.
---@param cfg table?
---@return table? checked
---@return string? err
function M.check(cfg)
    local out, err = check_keys(cfg, function(key)
        return not ONLY_RESTORE[key]
    end)
    if not out then
        return nil, err
    end
    out.net = out.net or net_config.net()
    out.cpus = out.cpus or 1
    out.memory = out.memory or math.min(M.DEFAULT_MEMORY, uv.get_total_memory() // (2 << 20) * (2 << 20))
    out.disk = out.disk or require("sm.scratch").DEFAULT_BYTES
    out.boot_timeout = out.boot_timeout or 120
    return out
end

return M
