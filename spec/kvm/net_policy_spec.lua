-- SPDX-License-Identifier: Apache-2.0
--
-- Policies of the user network, judged from outside: sm runs on a host (a network
-- namespace) whose only cable goes to another, which has every kind of address there is
-- and listens to the cable with tcpdump. What is denied never gets that far.

local f = require "support.frames"
local shell = require "support.shell"
local spec = require "support.vm"
local uv = require "luv"

-- Of the outer host, by what they are to a policy.
local PLACES = {
    public = "93.184.216.34", private = "10.9.3.2", shared = "100.64.9.2", metadata = "169.254.169.254",
    public6 = "2606:2800:220:1::34", unique6 = "fd09::2",
}
local ORDER = { "public", "private", "shared", "metadata", "public6", "unique6" }
local OPEN, LAST = 80, 7777 -- ports

-- A guest that sends a file of frames, until the last of them has gone out.
local SENDS = [[
    local sm = require "sm"
    local image, mac, friend, frames = table.unpack(arg)
    local vm <close> = assert(sm.start(image, { memory = "128M",
        net = { type = "user", mac = mac, policy = "deny", allow = { friend .. ":9" } } }))
    for path, from in pairs { ["/tmp/rawsend"] = "build/guest/rawsend", ["/tmp/frames"] = frames } do
        local f <close> = assert(io.open(from, "rb"))
        assert(vm:write_file(path, f:read "a", { mode = tonumber("755", 8) }))
    end
    assert(vm:exec { argv = { "sh", "-c", "/tmp/rawsend eth0 </tmp/frames" } })
    local gone
    repeat
        for _, flow in ipairs(assert(vm:net_stats())[1].flows) do
            gone = gone or (flow.addr == friend and flow.port == 9)
        end
        sm.loop.sleep(0.05)
    until gone
]]

-- A name server of the outer host; its answers may be kept for no time at all.
local NAMES = [[
    require("support.net").dns({
        ["good.test"] = { "93.184.216.34", "93.184.216.35" }, ["evil.test"] = "93.184.216.36",
        ["nas.test"] = "10.9.3.2", ["cloud.test"] = "169.254.169.254", ["host.test"] = "10.0.2.2",
    }, { addr = "192.0.2.3", port = 53, ttl = 0 })
    require("sm").loop.sleep(3600)
]]

describe("what a guest of the user network may reach", function()
    local dir, inner, outer

    local function sh(script)
        return shell.run("set -e\n" .. script)
    end

    local function write(name, text)
        local file <close> = assert(io.open(dir .. "/" .. name, "wb"))
        file:write(text)
    end

    setup(function()
        dir = shell.tmpdir()
        inner, outer = "sm-in" .. uv.os_getpid(), "sm-out" .. uv.os_getpid()
        local lines = { ([[modprobe -q veth 2>/dev/null || true; ip netns add %s; ip netns add %s
            ip link add v0 netns %s type veth peer name v0 netns %s]]):format(inner, outer, inner, outer) }
        for ns, last in pairs { [inner] = "1", [outer] = "3" } do
            lines[#lines + 1] = ([[n="ip -n %s"; $n link set lo up; $n link set v0 up
                $n addr add 192.0.2.%s/24 dev v0; $n addr add 2001:db8::%s/64 dev v0 nodad]]):format(ns, last, last)
        end
        lines[#lines + 1] = ("ip -n %s route add default via 192.0.2.3; ip -n %s -6 route add default via 2001:db8::3"):format(
            inner, inner)
        for _, place in ipairs(ORDER) do
            local addr = PLACES[place]
            lines[#lines + 1] = ("ip -n %s addr add %s dev lo %s"):format(outer, addr, addr:find ":" and "nodad" or "")
        end
        sh(table.concat(lines, "\n"))
    end)

    teardown(function()
        for _, ns in ipairs { inner, outer } do
            os.execute(("ip netns pids %s | xargs -r kill -9; ip netns del %s"):format(ns, ns))
        end
        shell.remove(dir)
        assert.same({}, spec.settled_leftovers())
    end)

    -- What passes the cable while ./sm does this on the inner host: what sm said.
    local function watched(tail)
        sh(([[
            ip netns exec %s tcpdump -i v0 -U -w %s/pcap --immediate-mode 'not icmp6' 2>%s/tcpdump & t=$!
            while ! grep -q listening %s/tcpdump; do sleep 0.1; done
            ip netns exec %s ./sm %s </dev/null >%s/out 2>&1 || true
            # tcpdump has seen all once it has seen this
            while ! grep -q the-last-of-all %s/pcap; do
                ip netns exec %s bash -c 'echo the-last-of-all >/dev/udp/192.0.2.3/%d'; sleep 0.1
            done
            kill -INT $t; wait $t 2>/dev/null || true]]):format(outer, dir, dir, dir, inner, tail, dir, dir, inner, LAST))
        local out <close> = assert(io.open(dir .. "/out", "rb"))
        return out:read "a"
    end

    -- What was sent to each of these, "ADDRESS.PORT": a set.
    local function sent()
        local found = {}
        for to in sh(("tcpdump -n -r %s/pcap 'tcp or udp' 2>/dev/null"):format(dir)):gmatch "> (%S+): " do
            found[to] = true
        end
        return found
    end

    -- The places that something was sent to, by kind.
    local function reached()
        local found = {}
        for to in pairs(sent()) do
            found[to:match "^(.+)%.%d+$"] = true
        end
        local out = {}
        for _, place in ipairs(ORDER) do
            out[#out + 1] = found[PLACES[place]] and place
        end
        return table.concat(out, " ")
    end

    local PROBES = {}
    for _, place in ipairs(ORDER) do -- a connection refused, or dropped, is an answer as good
        PROBES[#PROBES + 1] = ("nc -w 2 %s %d </dev/null & nslookup -timeout=1 -retry=1 name.test %s &"):format(PLACES[place],
            OPEN, PLACES[place])
    end
    PROBES = table.concat(PROBES, "\n") .. "\nwait"

    for _, case in ipairs {
        { "", "public public6" },
        { "--egress allow_all", "public private shared metadata public6 unique6" },
        { "--egress deny", "" },
        { "--egress deny --allow 10.9.3.0/24 --allow [fd09::2]:80", "private unique6" },
    } do
        it(("with '%s': %s"):format(case[1], case[2] == "" and "nothing" or case[2]), function()
            local out = watched(("run -q -m 128M %s %s sh -c %s"):format(case[1], spec.image "one", shell.quote(PROBES)))
            assert.equal(case[2], reached(), out)
            for _, place in ipairs(ORDER) do
                local blocked = out:find("blocked tcp to ", 1, true) and out:find(PLACES[place], 1, true)
                if not case[2]:find(place, 1, true) then
                    assert.is_truthy(blocked, place .. ": " .. out)
                end
            end
        end)
    end

    -- Each attempt has a port of its own. The least that an answer is kept for is a
    -- minute: who has just asked may take a moment to connect (core/net/policy.c).
    it("goes by names whose answers are short-lived, and change", function()
        write("names", NAMES)
        sh(("ip netns exec %s ./sm %s/names >%s/names.out 2>&1 & while ! ip netns exec %s ss -lun | grep -q :53; do sleep 0.1; done"):format(
            outer, dir, dir, outer))
        local script = [[
            try() { nc -w 5 $1 $2 </dev/null; }
            try 93.184.216.34 8001      # before anybody asked
            try good.test 8002; began=$(cut -d. -f1 /proc/uptime)
            try 93.184.216.34 8003      # by the answer of a moment ago
            try good.test 8004          # has moved
            try 93.184.216.34 8005      # within its minute
            try evil.test 8006
            try 93.184.216.36 8007
            try nas.test 8008           # on the list: somebody's own network
            try cloud.test 8009; try 169.254.169.254 8010
            try host.test 8011
            while [ $(($(cut -d. -f1 /proc/uptime) - began)) -lt 62 ]; do sleep 1; done
            try 93.184.216.34 8012
            try good.test 8013          # asks anew
            true]]
        local out = watched(("run -q -m 128M --dns 192.0.2.3 --egress deny --allow good.test --allow nas.test "
            .. "--allow cloud.test --allow host.test %s sh -c %s"):format(spec.image "one", shell.quote(script)))
        local ports = {}
        for to in pairs(sent()) do
            ports[#ports + 1] = to:match "%.(80[01]%d)$"
        end
        table.sort(ports)
        assert.equal("8002 8003 8004 8005 8008 8013", table.concat(ports, " "), out)
        assert.is_true(sent()["93.184.216.35.8004"] and sent()["93.184.216.35.8013"])
        assert.matches("refused to resolve evil.test", out, 1, true)
        assert.matches("kept back the answer 169.254.169.254 for the name cloud.test", out, 1, true)
        assert.matches("kept back the answer 10.0.2.2 for the name host.test", out, 1, true)
    end)

    it("is no more by frames that it makes up", function()
        local mac = "02:00:00:00:00:0b"
        local list, n, seen = f.made_up { mac = mac, peer = "52:55:0a:00:02:02", address = "10.0.2.15",
            friend = PLACES.private, stranger = "10.9.3.9" }
        write("frames", f.input(list))
        write("script", SENDS)
        local out = watched(("%s/script %s %s %s %s/frames"):format(dir, spec.image "one", mac, PLACES.private, dir))
        local pcap <close> = assert(io.open(dir .. "/pcap", "rb"))
        local text = pcap:read "a"
        assert.is_truthy(text:find(seen, 1, true), out)
        assert.same({}, f.leaks(text))
        assert.is_true(n > 25)
    end)
end)
