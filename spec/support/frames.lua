-- SPDX-License-Identifier: Apache-2.0
--
-- Ethernet frames for specs, right ones and wrong ones, as byte strings.

local M = {}

local function bytes_of(text, sep, base)
    local out = {}
    for part in text:gmatch("[^" .. sep .. "]+") do
        out[#out + 1] = string.char(tonumber(part, base))
    end
    return table.concat(out)
end

function M.mac(text)
    return bytes_of(text, ":", 16)
end

function M.ip4(text)
    return bytes_of(text, ".", 10)
end

--- "fd00::9" and the like: the 16 bytes.
function M.ip6(text)
    local left, right = text:match "^(.-)::(.*)$"
    local function groups(half)
        local out = {}
        for part in half:gmatch "[^:]+" do
            out[#out + 1] = string.pack(">I2", tonumber(part, 16))
        end
        return table.concat(out)
    end
    left, right = groups(left or text), groups(right or "")
    return left .. ("\0"):rep(16 - #left - #right) .. right
end

local function sum(data)
    local total = 0
    if #data % 2 == 1 then
        data = data .. "\0"
    end
    for at = 1, #data, 2 do
        total = total + string.unpack(">I2", data, at)
    end
    while total > 0xffff do
        total = (total & 0xffff) + (total >> 16)
    end
    return ~total & 0xffff
end

function M.ether(dst, src, kind, payload)
    return (M.mac(dst) .. M.mac(src) .. string.pack(">I2", kind) .. payload .. ("\0"):rep(60)):sub(1,
        math.max(60, 14 + #payload))
end

--- An IPv4 packet. f: src, dst, proto, payload, and what is to be unusual: options,
--- version, ihl, length, id, fragment, ttl.
function M.ipv4(f)
    local options = f.options or ""
    local ihl = f.ihl or 5 + #options // 4
    local head = string.pack(">BBI2I2I2BBI2", (f.version or 4) << 4 | ihl, 0, f.length or 20 + #options + #f.payload, f.id or 0x1234,
        f.fragment or 0, f.ttl or 64, f.proto, 0) .. M.ip4(f.src) .. M.ip4(f.dst) .. options
    return head:sub(1, 10) .. string.pack(">I2", sum(head)) .. head:sub(13) .. f.payload
end

--- An IPv6 packet: src, dst, next, payload.
function M.ipv6(f)
    return string.pack(">I4I2BB", 6 << 28, #f.payload, f.next, f.hops or 64) .. M.ip6(f.src) .. M.ip6(f.dst) .. f.payload
end

local function pseudo(src, dst, proto, payload)
    if #src == 4 then
        return src .. dst .. string.pack(">BBI2", 0, proto, #payload)
    end
    return src .. dst .. string.pack(">I4I4", #payload, proto)
end

--- TCP with a SYN, or `flags`; addresses as packed bytes.
function M.tcp(src, dst, sport, dport, data, flags)
    local segment = string.pack(">I2I2I4I4BBI2I2I2", sport, dport, 1000, 0, 5 << 4, flags or 2, 65535, 0, 0) .. data
    return segment:sub(1, 16) .. string.pack(">I2", sum(pseudo(src, dst, 6, segment) .. segment)) .. segment:sub(19)
end

function M.udp(src, dst, sport, dport, data)
    local datagram = string.pack(">I2I2I2I2", sport, dport, 8 + #data, 0) .. data
    return datagram:sub(1, 6) .. string.pack(">I2", sum(pseudo(src, dst, 17, datagram) .. datagram)) .. datagram:sub(9)
end

--- An ICMP echo request.
function M.echo(data)
    local m = string.pack(">BBI2I2I2", 8, 0, 0, 1, 1) .. data
    return m:sub(1, 2) .. string.pack(">I2", sum(m)) .. m:sub(5)
end

--- An ICMPv6 message; addresses as packed bytes.
function M.icmp6(src, dst, kind, body)
    local m = string.pack(">BBI2", kind, 0, 0) .. body
    return m:sub(1, 2) .. string.pack(">I2", sum(pseudo(src, dst, 58, m) .. m)) .. m:sub(5)
end

--- operation: 1 asks, 2 answers.
function M.arp(operation, sender_mac, sender, target_mac, target)
    return string.pack(">I2I2BBI2", 1, 0x0800, 6, 4, operation) .. M.mac(sender_mac) .. M.ip4(sender) .. M.mac(target_mac)
        .. M.ip4(target)
end

return M
