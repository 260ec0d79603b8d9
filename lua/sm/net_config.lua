-- SPDX-License-Identifier: Apache-2.0
--
-- What a configuration may say about networks, checked and in one form: a list
-- of cards, a list of published ports, hosts entries. Plain data but for the
-- script's own functions.
--
--   net = "user"                     "none" or false, "tap=NAME", "unix=PATH"
--   net = { type = "user", policy = "deny_private", allow = { "10.1.2.3:80" },
--           deny = {…}, on_flow = function(flow) return "allow" end,
--           mtu = 65520, pcap = "FILE", rate = { bytes = 1e6, packets = 1000 } }
--   net = { { type = "tap", name = "tap0", address = "10.1.0.2/24",
--             gateway = "10.1.0.1" }, switch, … }
--   net = { type = "tap", name = "tap0", queues = 2, vhost = true, policy = "allow_all" }
--                                    the host's kernel moves the frames, past any policy

local M = {}

--- The user network: the same in every VM, nobody else is on it.
M.USER = {
    ip4 = "10.0.2.15/24", gw4 = "10.0.2.2", dns4 = "10.0.2.3",
    ip6 = "fd00:736d::15/64", gw6 = "fd00:736d::2", dns6 = "fd00:736d::3",
}
M.MTU = { user = 65520, switch = 65520, tap = 1500, unix = 1500 }
M.MAX_CARDS = 8
M.MAX_QUEUES = 8

local POLICIES = { deny_private = true, allow_all = true, deny = true }
local COMMON = {
    type = true, policy = true, allow = true, deny = true, on_flow = true, mtu = true,
    pcap = true, rate = true, mac = true, queues = true,
}
local OWN = {
    user = { dns = true, search = true },
    tap = { name = true, address = true, gateway = true, address6 = true, gateway6 = true, dns = true,
        search = true, vhost = true },
    unix = { path = true, address = true, gateway = true, address6 = true, gateway6 = true, dns = true,
        search = true },
    switch = { switch = true, address = true },
}

local function number_in(text, low, high)
    local n = math.tointeger(tonumber(text))
    return n and n >= low and n <= high and n or nil
end

local function is_ipv4(text)
    local parts = { text:match("^(%d+)%.(%d+)%.(%d+)%.(%d+)$") }
    for _, part in ipairs(parts) do
        if not number_in(part, 0, 255) or (#part > 1 and part:sub(1, 1) == "0") then
            return false
        end
    end
    return #parts == 4
end

-- Groups of one half of an IPv6 address, or nil. An IPv4 tail counts two.
local function groups_of(half, tail_allowed)
    local count = 0
    if half == "" then
        return 0
    end
    for part, colon in (half .. ":"):gmatch("([^:]*)(:)") do
        count = count + 1
        if part:find(".", 1, true) and tail_allowed and colon and half:sub(-#part) == part and is_ipv4(part) then
            count = count + 1
        elseif not part:match("^%x%x?%x?%x?$") then
            return nil
        end
    end
    return count
end

--- Whether it is an IPv4 or IPv6 address: 4, 6 or nil.
---@param text any
---@return integer?
function M.family(text)
    if type(text) ~= "string" then
        return nil
    elseif is_ipv4(text) then
        return 4
    elseif not text:find(":", 1, true) then
        return nil
    end
    local left, right = text:match("^(.-)::(.*)$")
    if left then
        local a, b = groups_of(left, false), groups_of(right, true)
        return a and b and a + b <= 7 and 6 or nil
    end
    return groups_of(text, true) == 8 and 6 or nil
end

local function check_prefix(what, text, family)
    local addr, prefix = tostring(text):match("^(.*)/(%d+)$")
    if not addr or M.family(addr) ~= family or not number_in(prefix, 1, family == 4 and 32 or 128) then
        return nil, ("%s: '%s': expected ADDRESS/PREFIX"):format(what, text)
    end
    return text
end

local function check_list(what, value)
    if type(value) == "string" then
        value = { value }
    end
    if type(value) ~= "table" then
        return nil, ("%s: expected a list of text"):format(what)
    end
    for _, item in ipairs(value) do
        if type(item) ~= "string" then
            return nil, ("%s: expected a list of text"):format(what)
        end
    end
    return value
end

-- "tap=tap0,ip=10.1.0.2/24,gw=10.1.0.1" and its short forms.
local function parse_text(text)
    if text == "none" or text == "user" then
        return text ~= "none" and { type = text } or false
    end
    local kind, rest = text:match("^(%a+)=(.+)$")
    if kind ~= "tap" and kind ~= "unix" then
        return nil, ("unknown network '%s' (known: user, none, tap=NAME, unix=PATH)"):format(text)
    end
    local out = { type = kind }
    local words = { ip = "address", gw = "gateway", ip6 = "address6", gw6 = "gateway6", dns = "dns", mtu = "mtu", mac = "mac",
        queues = "queues" }
    local first, options = rest:match("^([^,]+),?(.*)$")
    out[kind == "tap" and "name" or "path"] = first
    for word in (options or ""):gmatch("[^,]+") do
        local key, value = word:match("^(%w+)=(.+)$")
        if word == "vhost" and kind == "tap" then
            out.vhost = true
        elseif not key or not words[key] then
            return nil, ("network '%s': unknown option '%s' (known: ip, gw, ip6, gw6, dns, mtu, mac, queues%s)"):format(
                text, word, kind == "tap" and ", vhost" or "")
        else
            out[words[key]] = (key == "mtu" or key == "queues") and tonumber(value) or value
        end
    end
    return out
end

local function check_addresses(out)
    for _, f in ipairs { { "address", "gateway", 4 }, { "address6", "gateway6", 6 } } do
        if out[f[1]] then
            local ok, err = check_prefix(f[1], out[f[1]], f[3])
            if not ok then
                return nil, err
            end
        end
        if out[f[2]] and M.family(out[f[2]]) ~= f[3] then
            return nil, ("%s: '%s' is no address"):format(f[2], out[f[2]])
        end
    end
    return true
end

-- With vhost nothing of ours sees a frame: what asks for more than that is refused.
local function check_vhost(out)
    if out.policy ~= "allow_all" then
        return nil, ("vhost: frames go past any policy, so policy has to be allow_all, not %s"):format(out.policy)
    end
    for _, key in ipairs { "allow", "deny", "on_flow", "pcap", "rate" } do
        if out[key] ~= nil then
            return nil, ("vhost: frames go past sm, so it cannot be had with %s"):format(key)
        end
    end
    return true
end

local function check_card(value)
    if type(value) == "string" then
        local parsed, err = parse_text(value)
        if not parsed then
            return parsed, err
        end
        value = parsed
    elseif type(value) == "table" and value.plug then
        value = { type = "switch", switch = value }
    elseif value == false then
        return false
    end
    if type(value) ~= "table" then
        return nil, ("expected a network's name or table, got a %s"):format(type(value))
    end
    local out = {}
    local own = OWN[value.type]
    if not own then
        return nil, ("unknown network '%s' (known: user, tap, unix, a switch)"):format(tostring(value.type))
    end
    for key, v in pairs(value) do
        if not COMMON[key] and not own[key] then
            return nil, ("unknown key '%s' of a %s network"):format(tostring(key), value.type)
        end
        out[key] = v
    end
    out.policy = out.policy or (out.type == "switch" and "allow_all" or "deny_private")
    if not POLICIES[out.policy] then
        return nil, ("policy: expected deny_private, allow_all or deny, got '%s'"):format(tostring(out.policy))
    end
    if out.on_flow ~= nil and type(out.on_flow) ~= "function" then
        return nil, "on_flow: expected a function"
    end
    for _, key in ipairs { "allow", "deny", "dns", "search" } do
        if out[key] ~= nil then
            local list, err = check_list(key, out[key])
            if not list then
                return nil, err
            end
            out[key] = list
        end
    end
    out.mtu = out.mtu or M.MTU[out.type]
    if not number_in(out.mtu, 576, 65520) then
        return nil, ("mtu: expected 576 to 65520, got %s"):format(tostring(out.mtu))
    end
    if out.type == "tap" and (type(out.name) ~= "string" or not out.name:match("^[%w_.-]+$") or #out.name > 15) then
        return nil, "tap: expected a device's name (15 letters, digits, '_', '.', '-' at most)"
    elseif out.type == "unix" and type(out.path) ~= "string" then
        return nil, "unix: expected a socket's path"
    end
    if out.queues ~= nil and not number_in(out.queues, 1, M.MAX_QUEUES) then
        return nil, ("queues: expected 1 to %d, got %s"):format(M.MAX_QUEUES, tostring(out.queues))
    end
    if out.vhost then
        local ok, err = check_vhost(out)
        if not ok then
            return nil, err
        end
    end
    local rate = out.rate or {}
    for _, key in ipairs { "bytes", "packets" } do
        if rate[key] and not number_in(rate[key], 1, 1 << 40) then
            return nil, ("rate.%s: expected a number per second"):format(key)
        end
    end
    local ok, err = check_addresses(out)
    if not ok then
        return nil, err
    end
    return out
end

--- The key `net`: a list of cards, empty for none.
---@param value any
---@return table[]? cards
---@return string? err
function M.net(value)
    if value == nil then
        value = "user"
    end
    local list = value
    if type(value) ~= "table" or value.type or value.plug then
        list = { value }
    end
    local out = {}
    for _, item in ipairs(list) do
        local card, err = check_card(item)
        if card == nil then
            return nil, err
        elseif card then
            out[#out + 1] = card
        end
    end
    if #out > M.MAX_CARDS then
        return nil, ("at most %d networks"):format(M.MAX_CARDS)
    end
    return out
end

local function parse_publish(text)
    local spec, proto = text:match("^(.-)/(%a+)$")
    spec, proto = spec or text, proto or "tcp"
    local bad = ("'%s': expected [ADDRESS:]HOST:GUEST[/udp], ports 1 to 65535"):format(text)
    if proto ~= "tcp" and proto ~= "udp" then
        return nil, bad
    end
    local addr, rest = spec:match("^%[(.-)%]:(.*)$")
    if not addr then
        addr, rest = spec:match("^(%d+%.%d+%.%d+%.%d+):(.*)$")
    end
    rest = rest or spec
    local host, guest = rest:match("^(%d*):(%d+)$")
    if not host then
        host, guest = "", rest:match("^(%d+)$")
    end
    local out = {
        udp = proto == "udp", addr = addr or "127.0.0.1",
        host = host == "" and 0 or number_in(host, 0, 65535), guest = number_in(guest, 1, 65535),
    }
    if not out.host or not out.guest or not M.family(out.addr) then
        return nil, bad
    end
    return out
end

--- The key `publish`: a list of "[ip:]host:guest[/udp]".
---@param value any
---@return table[]? ports { udp, addr, host, guest }
---@return string? err
function M.publish(value)
    local list, err = check_list("publish", value)
    if not list then
        return nil, err
    end
    local out = {}
    for i, text in ipairs(list) do
        out[i], err = parse_publish(text)
        if not out[i] then
            return nil, err
        end
    end
    return out
end

--- The key `add_host`: a list of "name:address"; "host-gateway" is the host.
---@param value any
---@return table[]? hosts { name, addr }
---@return string? err
function M.add_host(value)
    local list, err = check_list("add_host", value)
    if not list then
        return nil, err
    end
    local out = {}
    for i, text in ipairs(list) do
        local name, addr = text:match("^([%w._-]+)[:=](.+)$")
        if addr == "host-gateway" then
            addr = M.USER.gw4
        end
        addr = addr and addr:gsub("^%[(.*)%]$", "%1")
        if not name or not M.family(addr) then
            return nil, ("'%s': expected NAME:ADDRESS"):format(text)
        end
        out[i] = { name = name, addr = addr }
    end
    return out
end

--- A list of rules, "10.0.0.0/8", "name:443" …; sm-net parses them.
function M.rules(value)
    return check_list("allow", value)
end

return M
