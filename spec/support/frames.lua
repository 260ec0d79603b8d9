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

--- Frames that a guest makes up and no policy that opens but UDP port 9 of a friend
--- lets out: each has a mark ("leak-NN"), so that it is found again whatever becomes of
--- its head. The last one may go, with a mark of its own.
---@param o { mac: string, peer: string, address: string, friend: string, stranger: string }
---@return string[] frames
---@return integer marks
---@return string seen the last one's mark
function M.made_up(o)
    local MAC, PEER, ALL = o.mac, o.peer, "ff:ff:ff:ff:ff:ff"
    local A, B, OTHER, SPOOF = o.friend, o.address, o.stranger, (o.address:gsub("%d+$", "77"))
    local a4, b4, o4 = M.ip4(A), M.ip4(B), M.ip4(OTHER)
    local LL, SIX = "fe80::ff:fe00:b", "fd00::9"
    local l6, s6, m6 = M.ip6(LL), M.ip6(SIX), M.ip6 "::ffff:a09:9"
    local TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
    local list, n = {}, 0
    -- A frame, marked so that it is found again whatever becomes of its head.
    local function mark()
        n = n + 1
        return ("leak-%02d-made-up-by-the-guest"):format(n)
    end
    local function ip(dst, proto, payload, more)
        local packet = { src = B, dst = dst, proto = proto, payload = payload }
        for key, value in pairs(more or {}) do
            packet[key] = value
        end
        list[#list + 1] = M.ether(PEER, MAC, 0x0800, M.ipv4(packet))
    end
    local function six(dst, next, payload, src)
        list[#list + 1] = M.ether(PEER, MAC, 0x86dd, M.ipv6 { src = src or LL, dst = dst, next = next, payload = payload })
    end
    -- What is not on the list, in every form.
    ip(OTHER, TCP, M.tcp(b4, o4, 1000, 80, mark()))
    ip(OTHER, UDP, M.udp(b4, o4, 1000, 53, mark()))
    ip(OTHER, ICMP, M.echo(mark()))
    ip(OTHER, TCP, M.tcp(b4, o4, 1000, 80, mark(), 0x10)) -- an ACK out of nothing
    ip(OTHER, UDP, M.udp(b4, o4, 1000, 53, mark()), { options = "\1\1\1\0" })
    ip(OTHER, 41, M.ipv6 { src = LL, dst = SIX, next = UDP, payload = M.udp(l6, s6, 1, 53, mark()) })
    ip(OTHER, 47, "\0\0\8\0" .. mark())
    ip("255.255.255.255", UDP, M.udp(b4, M.ip4 "255.255.255.255", 1000, 9, mark()))
    ip("224.0.0.251", UDP, M.udp(b4, M.ip4 "224.0.0.251", 5353, 5353, mark()))
    ip("127.0.0.1", UDP, M.udp(b4, M.ip4 "127.0.0.1", 1000, 53, mark()))
    ip("169.254.169.254", TCP, M.tcp(b4, M.ip4 "169.254.169.254", 1000, 80, mark()))
    -- To where it may go, but not so.
    ip(A, UDP, M.udp(M.ip4(SPOOF), a4, 1000, 9, mark()), { src = SPOOF })
    ip(A, UDP, M.udp(b4, a4, 1000, 53, mark())) -- another port
    ip(A, UDP, M.udp(b4, a4, 1000, 53, mark()), { fragment = 0x2000 }) -- the first of several
    ip(A, UDP, mark(), { fragment = 100, id = 77 }) -- one whose first was never there
    ip(A, UDP, mark(), { fragment = 0x2001, id = 78 })
    ip(A, UDP, M.udp(b4, a4, 1000, 9, mark()), { version = 5 })
    ip(A, UDP, M.udp(b4, a4, 1000, 9, mark()), { ihl = 4 })
    ip(A, UDP, M.udp(b4, a4, 1000, 9, mark()), { ihl = 15 })
    ip(A, UDP, M.udp(b4, a4, 1000, 9, mark()), { length = 1000 })
    list[#list + 1] = M.ether(PEER, "02:00:00:00:00:77", 0x0800, M.ipv4 { src = B, dst = A, proto = UDP,
        payload = M.udp(b4, a4, 1000, 9, mark()) })
    list[#list + 1] = M.ether(PEER, MAC, 0x8100, string.pack(">I2I2", 7, 0x0800) .. M.ipv4 { src = B, dst = A,
        proto = UDP, payload = M.udp(b4, a4, 1000, 9, mark()) })
    list[#list + 1] = M.ether(ALL, MAC, 0x88cc, mark())
    list[#list + 1] = M.ether(ALL, MAC, 50, ("\xaa"):rep(8) .. mark()) -- 802.3
    -- IPv6: elsewhere, mapped, behind other heads, in other names.
    six(SIX, UDP, M.udp(l6, s6, 1000, 53, mark()))
    six("::ffff:a09:9", TCP, M.tcp(l6, m6, 1000, 80, mark()))
    six("ff02::fb", UDP, M.udp(l6, M.ip6 "ff02::fb", 5353, 5353, mark()))
    six(SIX, 0, string.pack(">BBI2I4", UDP, 0, 0x0104, 0) .. M.udp(l6, s6, 1000, 53, mark()))
    six(SIX, 44, string.pack(">BBI2I4", UDP, 0, 0, 1) .. M.udp(l6, s6, 1000, 53, mark()))
    six(SIX, 43, string.pack(">BBBBI4", UDP, 0, 0, 0, 0) .. M.udp(l6, s6, 1000, 53, mark()))
    six("ff02::1", ICMP6, M.icmp6(l6, M.ip6 "ff02::1", 134, ("\0"):rep(12) .. mark())) -- a router
    six("ff02::1", ICMP6, M.icmp6(l6, M.ip6 "ff02::1", 136, "\x20\0\0\0" .. s6 .. mark())) -- another's name
    -- ARP in another's name; no room for a mark.
    list[#list + 1] = M.ether(ALL, MAC, 0x0806, M.arp(2, MAC, A, ALL, A))
    list[#list + 1] = M.ether(ALL, MAC, 0x0806, M.arp(1, MAC, SPOOF, ALL, A))
    -- The last may go, so that there is something to see.
    local seen = "may-go-made-up-by-the-guest"
    ip(A, UDP, M.udp(b4, a4, 1000, 9, seen))
    return list, n, seen
end

--- What rawsend.c reads: a length in front of each.
---@param list string[]
---@return string
function M.input(list)
    local out = {}
    for i, frame in ipairs(list) do
        out[i] = string.pack("<s2", frame)
    end
    return table.concat(out)
end

--- The marks of made-up frames in what was captured.
---@param pcap string
---@return string[]
function M.leaks(pcap)
    local out = {}
    for what in pcap:gmatch "leak%-%d%d" do
        out[#out + 1] = what
    end
    return out
end

return M
