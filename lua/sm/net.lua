-- SPDX-License-Identifier: Apache-2.0
--
-- A VM's network: the process that carries it, its cards, ports and policy.
--
--   sm.net.switch()   a switch for VMs of this script; give it as a `net`
--
-- A card exists before the worker connects to it, and everything that can be
-- refused (a port that is taken, a tap without permission) is refused before
-- the machine is made. The policy is in sm-net; what is here says it in words.
-- A vhost card is the worker's and the host's kernel's alone: sm-net has no part in it.

local uv = require "luv"
local loop = require "sm.loop"
local net_config = require "sm.net_config"
local netd = require "sm.netd"

local M = {}

local function new_mac()
    local b = { uv.random(4):byte(1, 4) }
    return ("02:73:%02x:%02x:%02x:%02x"):format(b[1], b[2], b[3], b[4])
end

-- The host's resolvers and search list.
local function host_resolvers()
    local servers, search = {}, {}
    local f = io.open("/etc/resolv.conf")
    for line in f and f:lines() or function() end do
        local server = line:match("^%s*nameserver%s+(%S+)")
        if server and net_config.family(server) then
            servers[#servers + 1] = server
        end
        local list = line:match("^%s*search%s+(.+)$") or line:match("^%s*domain%s+(%S+)")
        if list then
            search = {}
            for name in list:gmatch("%S+") do
                search[#search + 1] = name
            end
        end
    end
    if f then
        f:close()
    end
    return servers, search
end

local function without_prefix(text)
    return text and text:match("^[^/]+")
end

local function prefix_of(text)
    return text and tonumber(text:match("/(%d+)$"))
end

--- An event in words, for people.
---@param e table
---@return string
function M.describe(e)
    local where = e.addr and (e.addr:find(":", 1, true) and "[" .. e.addr .. "]" or e.addr)
    local host = e.addr == net_config.USER.gw4 or e.addr == net_config.USER.gw6
    if e.type == "blocked" then
        local target = (host and "host" or where) .. (e.port > 0 and ":" .. e.port or "")
        local text = ("blocked %s to %s%s (%s)"):format(e.proto, target,
            e.name and not host and ", " .. e.name or "", e.why)
        if e.why:find("denied", 1, true) or e.why:find("never", 1, true) or e.why:find("resolver", 1, true)
            or e.why:find("no such", 1, true) then
            return text
        end
        return ("%s; --allow %s opens it"):format(text, target)
    elseif e.type == "rebinding" then
        return ("kept back the answer %s for the name %s (DNS rebinding); --allow %s opens it"):format(
            e.addr, e.name, host and "host" or where)
    elseif e.type == "name" then
        return ("refused to resolve %s (not on the list); --allow %s opens it"):format(e.name, e.name)
    elseif e.type == "gone" then
        return "lost: " .. e.why
    end
    return e.type
end

---@class sm.Network
local Network = {}
Network.__index = Network
Network.__name = "sm.Network"

-- The script's word on a flow. May yield; an error or nonsense is no.
local function decide(self, card, e)
    local flow = {
        proto = e.proto, addr = e.addr, port = e.port, name = e.name, local_port = e.local_port,
    }
    local ok, verdict = pcall(card.on_flow, flow)
    if not ok then
        io.stderr:write("sm: on_flow: ", tostring(verdict), "\n")
    end
    self.daemon:post("net.decide", { nic = e.nic, flow = e.flow, allow = ok and (verdict == "allow" or verdict == true) })
end

local function on_event(self, e)
    if e.type == "flow" then
        local card = self.by_nic[e.nic]
        if card and card.on_flow then
            loop.spawn(decide, self, card, e)
        end
        return
    end
    e.vm = self.id
    if self.listener then
        self.listener(e)
    else
        io.stderr:write("sm: network: ", M.describe(e), "\n")
    end
end

-- What sm-net is told of a card.
local function request_of(self, card, cfg, path)
    local r = {
        type = card.type, path = path, mac = card.mac, mtu = card.mtu,
        default = card.policy, ask = card.on_flow and true or nil,
        allow = card.allow, deny = card.deny, pcap = card.pcap or cfg.pcap,
        rate_bytes = card.rate and card.rate.bytes, rate_packets = card.rate and card.rate.packets,
    }
    if card.type == "user" then
        local u = net_config.USER
        r.ip4, r.prefix4, r.gw4, r.dns4 = without_prefix(u.ip4), prefix_of(u.ip4), u.gw4, u.dns4
        r.ip6, r.prefix6, r.gw6, r.dns6 = without_prefix(u.ip6), prefix_of(u.ip6), u.gw6, u.dns6
        local servers, search = host_resolvers()
        r.servers = card.dns or cfg.dns or servers
        self.resolv = { servers = { u.dns4 }, search = card.search or cfg.dns_search or search }
        if cfg.allow then
            r.allow = table.move(cfg.allow, 1, #cfg.allow, #(r.allow or {}) + 1,
                table.move(r.allow or {}, 1, #(r.allow or {}), 1, {}))
        end
    else
        r.ip4, r.ip6 = without_prefix(card.address), without_prefix(card.address6)
        r.tap, r.peer = card.name, card.path
        local dns = card.dns or cfg.dns
        if dns and not self.resolv then
            self.resolv = { servers = dns, search = card.search or cfg.dns_search or {} }
        end
        if cfg.allow and card.type ~= "switch" then
            r.allow = table.move(cfg.allow, 1, #cfg.allow, #(r.allow or {}) + 1, r.allow or {})
        end
    end
    return r
end

local function guest_side(card)
    local u = net_config.USER
    if card.type == "user" then
        return { mac = card.mac, mtu = card.mtu, ip4 = u.ip4, gw4 = u.gw4, ip6 = u.ip6, gw6 = u.gw6 }
    end
    return { mac = card.mac, mtu = card.mtu, ip4 = card.address, gw4 = card.gateway, ip6 = card.address6,
        gw6 = card.gateway6 }
end

local function open_card(self, card, cfg, dir, i)
    card.mac = card.mac or new_mac()
    if card.vhost then
        self.devices[i] = { "device.add", {
            type = "net", tap = card.name, mac = card.mac, mtu = card.mtu, queues = card.queues,
        } }
        return true
    end
    local path = ("%s/net%d.sock"):format(dir, i - 1)
    local res, err
    if card.type == "switch" then
        res, err = card.switch:plug(self, card, path)
    else
        res, err = self.daemon:call("net.open", request_of(self, card, cfg, path))
        if res then
            self.by_nic[res.nic] = card
        end
    end
    if not res then
        return nil, err
    end
    card.nic = res.nic
    self.devices[i] = { "device.add", {
        type = "net", path = path, mac = card.mac, mtu = card.mtu, vnet = true,
        tso = card.type == "user" or card.type == "tap" or nil, queues = card.queues,
    } }
    return true
end

-- The ports of an image, for -P: "80/tcp" …
local function exposed(image)
    local config = image.config and image.config.config
    local out = {}
    for name in pairs(config and config.ExposedPorts or {}) do
        local port, proto = name:match("^(%d+)/?(%a*)$")
        if port then
            out[#out + 1] = { udp = proto == "udp", addr = "127.0.0.1", host = 0, guest = tonumber(port) }
        end
    end
    table.sort(out, function(a, b)
        return a.guest < b.guest
    end)
    return out
end

local function publish(self, list)
    local user
    for _, card in pairs(self.by_nic) do
        if card.type == "user" then
            user = card
        end
    end
    for _, port in ipairs(list) do
        if not user then
            return nil, "network: ports are published by the user network, and this VM has none"
        end
        local got, err = self.daemon:call("net.publish", {
            nic = user.nic, udp = port.udp, addr = port.addr, port = port.host, guest = port.guest,
        })
        if not got then
            return nil, err
        end
        self.ports[#self.ports + 1] = {
            proto = port.udp and "udp" or "tcp", addr = port.addr, port = got, guest = port.guest,
        }
    end
    return true
end

--- Make the network of a VM. Yields.
---@async
---@param cfg table checked configuration
---@param image table
---@param id string
---@param dir string the VM's folder
---@return sm.Network? network nil and no error: the VM has none
---@return string? err
function M.start(cfg, image, id, dir)
    if #cfg.net == 0 then
        if cfg.publish and #cfg.publish > 0 then
            return nil, "network: ports are published by the user network, and this VM has none"
        end
        return nil
    end
    local self = setmetatable({
        id = id, by_nic = {}, devices = {}, nets = {}, ports = {}, cards = {},
        listener = cfg.on_net, add_host = cfg.add_host or {},
    }, Network)
    local own = false
    for i, card in ipairs(cfg.net) do
        local copy = {}
        for key, value in pairs(card) do
            copy[key] = value
        end
        self.cards[i] = copy
        own = own or not (card.type == "switch" or card.vhost)
    end
    local ok, err = true, nil
    if own then
        self.daemon, err = netd.spawn {
            name = id,
            on_event = function(e)
                on_event(self, e)
            end,
        }
        ok = self.daemon
    end
    for i, card in ipairs(self.cards) do
        if ok then
            ok, err = open_card(self, card, cfg, dir, i)
            self.nets[i] = guest_side(card) -- a switch has given it an address
        end
    end
    if ok then
        ok, err = publish(self, cfg.publish or {})
    end
    if ok and cfg.publish_all then
        ok, err = publish(self, exposed(image))
    end
    if ok and own then
        ok, err = self.daemon:call("net.confine", {})
    end
    if not ok then
        self:close()
        return nil, err
    end
    return self
end

--- What the agent is told at boot.
---@param hosts string the hosts file so far
---@return table fields nets, resolv, hosts
function Network:boot_fields(hosts)
    local lines = { hosts }
    if self.resolv and self.resolv.servers[1] == net_config.USER.dns4 then
        lines[#lines + 1] = net_config.USER.gw4 .. "\thost.docker.internal host.sm.internal\n"
    end
    for _, h in ipairs(self.add_host) do
        lines[#lines + 1] = ("%s\t%s\n"):format(h.addr, h.name)
    end
    self.hosts = table.concat(lines)
    for _, card in ipairs(self.cards) do
        if card.type == "switch" then
            lines[#lines + 1] = card.switch:hosts(self)
        end
    end
    local out = { nets = self.nets, hosts = table.concat(lines) }
    if self.resolv then
        local text = {}
        for _, server in ipairs(self.resolv.servers) do
            text[#text + 1] = "nameserver " .. (server:match("^([%d.]+):%d+$") or server)
        end
        if #self.resolv.search > 0 then
            text[#text + 1] = "search " .. table.concat(self.resolv.search, " ")
        end
        out.resolv = table.concat(text, "\n") .. "\n"
    end
    return out
end

--- The guest has its addresses: connections to published ports go in.
function Network:ready(vm)
    for _, card in ipairs(self.cards) do
        if card.type == "switch" then
            card.switch:joined(self, vm)
        elseif card.nic then
            self.daemon:post("net.ready", { nic = card.nic })
        end
    end
end

local function daemon_of(self, card)
    return card.type == "switch" and card.switch.daemon or self.daemon
end

--- See VM:capture. Yields.
---@async
---@param index integer of the card
---@param fd integer that sm-net writes to
---@return integer? id of the capture
---@return string? err
function Network:capture(index, fd)
    local card = self.cards[index]
    if not card then
        return nil, ("capture: the VM has no network card %d (it has %d)"):format(index, #self.cards)
    elseif card.vhost then
        return nil, ("capture: the frames of a vhost card go past sm; tcpdump -i %s sees them"):format(card.name)
    end
    local res, err = daemon_of(self, card):call("net.capture", { nic = card.nic }, fd)
    return res and res.capture, err
end

--- No more of it; `post`: without waiting for the answer. Yields.
---@async
---@param index integer
---@param id integer
---@param post boolean?
---@return integer? lost frames that were left out
function Network:end_capture(index, id, post)
    local card = self.cards[index]
    local daemon = daemon_of(self, card)
    local res = daemon[post and "post" or "call"](daemon, "net.capture", { nic = card.nic, capture = id })
    return res and res.lost
end

--- Counters of every card. Yields.
---@async
---@return table[]? stats out_frames, in_bytes, drops = { reason = n }, flows …
---@return string? err
function Network:stats()
    local out = {}
    for i, card in ipairs(self.cards) do
        local stats, err = {}, nil -- the host's kernel counts for a vhost card, on its tap
        if not card.vhost then
            stats, err = daemon_of(self, card):call("net.stats", { nic = card.nic })
            if not stats then
                return nil, err
            end
        end
        stats.type = card.type
        out[i] = stats
    end
    return out
end

--- End it. Idempotent. Yields.
---@async
function Network:close()
    for _, card in ipairs(self.cards) do
        if card.type == "switch" then
            card.switch:unplug(self, card)
        end
    end
    if self.daemon then
        self.daemon:close()
    end
end

Network.__close = Network.close

-- ---------------------------------------------------------------- switches

---@class sm.Switch
local Switch = {}
Switch.__index = Switch
Switch.__name = "sm.Switch"

local switches = 0

--- A switch: VMs whose `net` holds it reach each other, by address and by
--- name, and nobody else. `subnet` is an IPv4 /24, "10.77.0" when absent.
---@param opts { subnet: string?, policy: string?, mtu: integer? }?
---@return sm.Switch
function M.switch(opts)
    opts = opts or {}
    for key in pairs(opts) do
        if key ~= "subnet" and key ~= "mtu" then
            error(("sm.net.switch: unknown key '%s' (known: subnet, mtu)"):format(tostring(key)), 2)
        end
    end
    local subnet = opts.subnet or ("10.77.%d"):format(switches % 256)
    if net_config.family(subnet .. ".1") ~= 4 then
        error("sm.net.switch: subnet: expected the first three numbers of an IPv4 /24, such as '10.77.0'", 2)
    end
    switches = switches + 1
    return setmetatable({ subnet = subnet, mtu = opts.mtu, members = {}, next_host = 2 }, Switch)
end

--- Plug a VM's card in; its process starts with the first. Yields.
---@async
function Switch:plug(network, card, path)
    local err
    if not self.daemon then
        self.daemon, err = netd.spawn {
            name = "switch",
            on_event = function(e)
                local member = self.members[e.nic]
                if member then
                    on_event(member.network, e)
                end
            end,
        }
        if not self.daemon then
            return nil, err
        end
        local ok
        ok, err = self.daemon:call("net.confine", { files = true })
        if not ok then
            return nil, err
        end
    end
    if not card.address then
        if self.next_host > 254 then
            return nil, "network: the switch has no address left"
        end
        card.address = ("%s.%d/24"):format(self.subnet, self.next_host)
        self.next_host = self.next_host + 1
    end
    card.mtu = self.mtu or card.mtu
    local r = request_of(network, card, {}, path)
    local res
    res, err = self.daemon:call("net.open", r)
    if res then
        self.members[res.nic] = { network = network, card = card }
    end
    return res, err
end

-- The other members' lines of a hosts file.
function Switch:hosts(network)
    local lines = {}
    for _, m in pairs(self.members) do
        if m.network ~= network then
            lines[#lines + 1] = ("%s\t%s\n"):format(without_prefix(m.card.address), m.name or m.network.id)
        end
    end
    table.sort(lines)
    return table.concat(lines)
end

-- A member is up: the others learn its name.
function Switch:joined(network, vm)
    for _, m in pairs(self.members) do
        if m.network == network then
            m.vm, m.name = vm, vm.cfg.hostname or vm.id
        end
    end
    for _, m in pairs(self.members) do
        if m.vm and m.network ~= network and not m.vm.ending then
            m.vm:write_file("/etc/hosts", m.network.hosts .. self:hosts(m.network))
        end
    end
end

function Switch:unplug(network, card)
    for nic, m in pairs(self.members) do
        if m.network == network and m.card == card then
            self.members[nic] = nil
            if self.daemon then
                self.daemon:post("net.close", { nic = nic })
            end
        end
    end
end

--- End the switch. VMs on it keep a card without a cable. Yields.
---@async
function Switch:close()
    if self.daemon then
        self.daemon:close()
        self.daemon = nil
    end
end

Switch.__close = Switch.close

return M
