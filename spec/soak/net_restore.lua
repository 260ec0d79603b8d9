-- SPDX-License-Identifier: Apache-2.0
--
-- A machine with traffic flowing is saved and goes on as a copy of itself, again and
-- again. After each: what it serves is answered at the port that moved along, and a
-- program of the guest that read from outside, whose connection was the source's, has
-- been told so and has connected anew. Prints the longest waits.
--
--   sm spec/soak/net_restore.lua IMAGE CYCLES

local net = require "support.net"
local sm = require "sm"
local loop = sm.loop
local uv = require "luv"
local image, cycles = arg[1], tonumber(arg[2])
local dir = os.getenv "TMPDIR" or "/tmp" -- a disk of this kernel, and emptied (support/on_lab_disk)
local path = ("%s/soak-net-%d.sms"):format(dir, uv.os_getpid())
local LIMIT = 60 -- seconds, for anything, on a slow machine

-- Sends without an end, a little at a time; the number of connections so far.
local connections, flowing = 0, {}
local source = net.tcp("127.0.0.1", function(peer)
    connections = connections + 1
    flowing[peer] = true
    peer:read_start(function(err, chunk)
        if err or not chunk then
            flowing[peer] = nil
            if not peer:is_closing() then
                peer:close()
            end
        end
    end)
end)
local timer = uv.new_timer()
timer:start(20, 20, function()
    for peer in pairs(flowing) do
        if not peer:is_closing() then
            peer:write(("x"):rep(1000), function() end)
        end
    end
end)

local function sh(vm, script)
    local r = assert(vm:exec { argv = { "sh", "-c", script }, timeout = 300 })
    assert(r.status == 0, r.stderr)
    return r.stdout
end

local port = net.tcp("127.0.0.1", function() end)
net.close_last()
local vm = assert(sm.start(image, { memory = "96M", publish = { port .. ":8080" },
    net = { type = "user", allow = { "host:" .. source } } }))
sh(vm, ([[mkdir -p /www; echo it works >/www/index.html; httpd -p 8080 -h /www
    mkfifo /tmp/mute # says nothing, and does not end
    (while :; do nc 10.0.2.2 %d 0<>/tmp/mute >/dev/null; done) >/dev/null 2>&1 </dev/null &]]):format(source))

local function wait_for(what, cond)
    local began = loop.now()
    while not cond() do
        assert(loop.now() - began < LIMIT, what)
        loop.sleep(0.05)
    end
    return loop.now() - began
end

local function answers()
    return (net.ask("127.0.0.1", port, "GET /index.html HTTP/1.0\r\n\r\n", LIMIT) or ""):find "it works"
end

local longest = { again = 0, answer = 0 }
wait_for("the guest does not connect", function() return connections > 0 end)
for cycle = 1, cycles do
    assert(answers(), "nobody answers")
    local snapshot = assert(vm:snapshot { path = path })
    vm:close()
    local before = connections
    vm = assert(sm.restore(snapshot, { publish = { port .. ":8080" } }))
    assert(sm.snapshot.remove(snapshot))
    longest.again = math.max(longest.again, wait_for(("cycle %d: the reader hangs"):format(cycle), function()
        return connections > before
    end))
    longest.answer = math.max(longest.answer, wait_for(("cycle %d: nobody answers"):format(cycle), answers))
    wait_for("the guest does not connect", function() return next(flowing) ~= nil end)
end
vm:close()
timer:close()
net.close()
print(("%d cycles: a reader connected anew within %.2f s, the port answered within %.2f s"):format(cycles,
    longest.again, longest.answer))
