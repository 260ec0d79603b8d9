-- SPDX-License-Identifier: Apache-2.0
--
-- Addresses of the http(s) kind (RFC 3986): taken apart, put together,
-- relative ones resolved; and what sort of place a host is, for the rules
-- that keep a hostile registry from sending us to our own machines.

local M = {}

---@class sm.Url
---@field scheme "http"|"https"
---@field host string lowercase; an IPv6 literal in brackets
---@field port integer
---@field path string begins with "/"
---@field query string? without "?"

local default_port = { http = 80, https = 443 }

--- Take an absolute http(s) address apart. User names in it are refused: they
--- would be credentials from a stranger.
---@param text string
---@return sm.Url?
---@return string? error
function M.parse(text)
    if type(text) ~= "string" or #text > 16384 or text:find("[%s%c]") then
        return nil, "not an address"
    end
    local scheme, authority, rest = text:match("^(%a[%w+.-]*)://([^/?#]*)(.*)$")
    scheme = scheme and scheme:lower()
    if not default_port[scheme] then
        return nil, ("%q is not an http(s) address"):format(text:sub(1, 80))
    end
    if authority:find("@", 1, true) then
        return nil, "the address holds a user name"
    end
    local host, port = authority:match("^(%[[%x:.]+%]):?(%d*)$")
    if not host then
        host, port = authority:match("^([%w._-]+):?(%d*)$")
    end
    port = host and (port == "" and default_port[scheme] or tonumber(port))
    if not port or port < 1 or port > 65535 then
        return nil, ("%q has no valid host and port"):format(text:sub(1, 80))
    end
    rest = rest:gsub("#.*$", "")
    local path, query = rest:match("^([^?]*)%??(.*)$")
    return {
        scheme = scheme,
        host = host:lower(),
        port = math.tointeger(port),
        path = path ~= "" and path or "/",
        query = rest:find("?", 1, true) and query or nil,
    }
end

---@param url sm.Url
---@return string host[:port], the port only when it is not the scheme's
function M.authority(url)
    if url.port == default_port[url.scheme] then
        return url.host
    end
    return url.host .. ":" .. url.port
end

---@param url sm.Url
---@return string
function M.format(url)
    return url.scheme .. "://" .. M.authority(url) .. url.path
        .. (url.query and "?" .. url.query or "")
end

-- RFC 3986, 5.2.4.
local function remove_dots(path)
    local out = {}
    local trailing = path:find("/%.%.?$") ~= nil
    for part in path:gmatch("[^/]+") do
        if part == ".." then
            out[#out] = nil
        elseif part ~= "." then
            out[#out + 1] = part
        end
    end
    local text = "/" .. table.concat(out, "/")
    if (trailing or path:sub(-1) == "/") and text ~= "/" then
        text = text .. "/"
    end
    return text
end

--- Resolve a `Location` against the address it came from.
---@param base sm.Url
---@param text string
---@return sm.Url?
---@return string? error
function M.resolve(base, text)
    if text:find("^%a[%w+.-]*:") then
        return M.parse(text)
    elseif text:find("^//") then
        return M.parse(base.scheme .. ":" .. text)
    end
    local root = base.scheme .. "://" .. M.authority(base)
    if text:sub(1, 1) == "/" then
        return M.parse(root .. text)
    elseif text:sub(1, 1) == "?" then
        return M.parse(root .. base.path .. text)
    end
    local path, query = text:match("^([^?]*)(.*)$")
    return M.parse(root .. remove_dots(base.path:match("^(.*/)") .. path) .. query)
end

--- Percent-encode everything but the unreserved characters.
---@param text string
---@return string
function M.escape(text)
    return (text:gsub("[^%w%-._~]", function(c)
        return ("%%%02X"):format(c:byte())
    end))
end

--- A query string or form body from a list of {name, value} pairs.
---@param pairs_list string[][]
---@return string
function M.query(pairs_list)
    local out = {}
    for i, pair in ipairs(pairs_list) do
        out[i] = M.escape(pair[1]) .. "=" .. M.escape(pair[2])
    end
    return table.concat(out, "&")
end

-- A host that getaddrinfo would read as a number ("2130706433", "0x7f.1")
-- means an address in disguise.
local function ipv4(host)
    local a, b, c, d = host:match("^(%d%d?%d?)%.(%d%d?%d?)%.(%d%d?%d?)%.(%d%d?%d?)$")
    if not a then
        return nil
    end
    return { tonumber(a), tonumber(b), tonumber(c), tonumber(d) }
end

local function numeric_in_disguise(host)
    local last = host:gsub("%.$", ""):match("([^.]*)$")
    return last:find("^%d+$") or last:find("^0x%x*$")
end

local function classify_ipv4(parts)
    local a, b = parts[1], parts[2]
    if a == 127 then
        return "loopback"
    elseif a == 169 and b == 254 then
        return "link-local"
    elseif a == 10 or (a == 172 and b >= 16 and b <= 31) or (a == 192 and b == 168)
        or (a == 100 and b >= 64 and b <= 127) then
        return "private"
    elseif a == 0 or a >= 224 then
        return "unspecified"
    end
    return "public"
end

local function classify_ipv6(text)
    local head = tonumber(text:match("^(%x+):") or "0", 16)
    local embedded = text:match(":([%d.]+)$")
    local parts = embedded and ipv4(embedded)
    if text:find("^[0:]*1$") then
        return "loopback"
    elseif text:find("^[0:]*$") then
        return "unspecified"
    elseif parts then
        return classify_ipv4(parts)
    elseif text:lower():find("^[0:]*:ffff:") then
        return "private" -- a mapped IPv4 address written in hex: whatever it is
    elseif head & 0xffc0 == 0xfe80 then
        return "link-local"
    elseif head & 0xfe00 == 0xfc00 then
        return "private"
    elseif head & 0xff00 == 0xff00 then
        return "unspecified"
    end
    return "public"
end

--- What a host literally is: "name", or for addresses "public", "loopback",
--- "private", "link-local" or "unspecified". A name is not looked up, except
--- that localhost is known.
---@param host string as in sm.Url
---@return string
function M.host_kind(host)
    host = host:lower()
    local inner = host:match("^%[(.*)%]$")
    if inner then
        return classify_ipv6(inner)
    end
    local parts = ipv4(host:gsub("%.$", ""))
    if parts then
        return classify_ipv4(parts)
    elseif numeric_in_disguise(host) then
        return "unspecified"
    elseif host:gsub("%.$", "") == "localhost" or host:find("%.localhost%.?$") then
        return "loopback"
    end
    return "name"
end

return M
