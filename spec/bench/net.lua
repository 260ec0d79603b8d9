-- SPDX-License-Identifier: Apache-2.0
--
-- What a MiB, a request and a small packet cost: the CPU time of every process of sm, and
-- of QEMU, for the same guest kernel and the same programs (iperf3; nginx asked by wrk with
-- a connection each), the kernel's own threads for them among it. By the user network, at
-- QEMU's MTU of 1500 and at ours; and by a tap, with sm's policy in front and by vhost.
-- Taps are made in a network namespace of this script's own.
--
--   unshare -n sm spec/bench/net.lua IMAGE KERNEL INITRD [MIB]  INITRD: IMAGE's files, and an /init

local loop = require "sm.loop"
local net = require "support.net"
local shell = require "support.shell"
local sm = require "sm"
local uv = require "luv"

local image, kernel, initrd, mib = arg[1], arg[2], arg[3], tonumber(arg[4] or 64)
local TIMES = 3
local SECONDS = 4 -- of requests
local PACKETS, PACKET_BYTES = 4096, 64

local TAP, HOST, GUEST = "smbench", "10.0.2.2", "10.0.2.15"

local function free_port()
    local port = net.tcp("127.0.0.1", function() end)
    net.close_last()
    return port
end

local function word(path)
    local f <close> = io.open(path)
    return f and f:read("a"):match "^%S+" or ""
end

-- ns of CPU that processes had, all threads; a vhost thread has its owner's number.
local function cpu_of(pids)
    local total, vhost = 0, {}
    for _, pid in ipairs(pids) do
        vhost["vhost-" .. pid] = true
        for name in uv.fs_scandir_next, assert(uv.fs_scandir(("/proc/%d/task"):format(pid))) do
            total = total + (tonumber(word(("/proc/%d/task/%s/schedstat"):format(pid, name))) or 0)
        end
    end
    for name in uv.fs_scandir_next, assert(uv.fs_scandir "/proc") do
        if name:match "^%d+$" and vhost[word(("/proc/%s/comm"):format(name))] then
            total = total + tonumber(word(("/proc/%s/schedstat"):format(name)))
        end
    end
    return total
end

-- Each of these runs in a process of its own: the loop has the guests' to do.
local function host(command)
    local lines, code = {}, nil
    local out = uv.new_pipe()
    local waiting
    -- iperf3 maps a file that it has unlinked, which the lab's 9p cannot.
    local handle = assert(uv.spawn("sh", { args = { "-c", "export TMPDIR=/dev/shm; " .. command }, stdio = { nil, out, 2 } }, loop.guard(function(status)
        code = status
        if waiting then
            waiting(true)
        end
    end)))
    out:read_start(loop.guard(function(_, chunk)
        lines[#lines + 1] = chunk
        if not chunk then
            out:close()
        end
    end))
    return function() -- its output, at its end
        while not code or not out:is_closing() do
            loop.await(function(settle)
                waiting = settle
            end, 0.2)
            waiting = nil
        end
        handle:close()
        return table.concat(lines), code
    end
end

-- The least of several: whatever else runs on the machine can only add to it.
local function measure(side, what)
    local least = math.huge
    for _ = 1, TIMES do
        local before = cpu_of(side.pids)
        local n = what()
        least = math.min(least, (cpu_of(side.pids) - before) / n / 1000)
    end
    return least
end

local function rows(side)
    local out = {}
    local function from_guest(options, n)
        return measure(side, function()
            local port = free_port()
            local server = host(("exec iperf3 -s -1 -p %d >/dev/null"):format(port))
            while not net.listens(port) and os.execute(("grep -q :%04X /proc/net/tcp6"):format(port)) ~= true do
                loop.sleep(0.05)
            end
            side.guest(("iperf3 -c 10.0.2.2 -p %d %s 2>&1"):format(port, options))
            server()
            return n
        end)
    end
    out[1] = from_guest(("-n %dM"):format(mib), mib)
    out[2] = measure(side, function() -- into it
        local _, code = host(("iperf3 -c %s -p %d -n %dM >/dev/null"):format(side.address, side.iperf, mib))()
        assert(code == 0, "iperf3 failed")
        return mib
    end)
    out[3] = measure(side, function()
        local report = host(("wrk -t 1 -c 4 -d %ds --timeout 10s -H 'Connection: close' http://%s:%d/page"):format(
            SECONDS, side.address, side.web))()
        assert(not report:find "Non%-2xx", report)
        return assert(tonumber(report:match "(%d+) requests in"), report)
    end)
    out[4] = from_guest(("-u -b 0 -l %d -k %d"):format(PACKET_BYTES, PACKETS), PACKETS)
    return out
end

local function with_sm(card)
    local tap = card.type == "tap"
    local side = { address = tap and GUEST or "127.0.0.1", iperf = tap and 5201 or free_port(), web = tap and 80 or free_port() }
    card.policy = "allow_all"
    local vm <close> = assert(sm.start(image, { memory = "256M", net = card,
        publish = not tap and { side.iperf .. ":5201", side.web .. ":80" } or nil }))
    assert(vm:exec { argv = { "sh", "-c", "nginx; iperf3 -s -D" } })
    side.pids = { vm.parts.worker:pid(), vm.parts.network.daemon and vm.parts.network.daemon.pid }
    function side.guest(command)
        local r = assert(vm:exec { argv = { "sh", "-c", command }, timeout = 600 })
        assert(r.status == 0, r.stdout)
    end
    return rows(side)
end

local function with_qemu(tap)
    local iperf, web, door = 5201, 80, 2
    local backend = ("tap,id=n,ifname=%s,script=no,downscript=no,vhost=on"):format(TAP)
    if not tap then
        iperf, web, door = free_port(), free_port(), free_port()
        backend = ("user,id=n,hostfwd=tcp:127.0.0.1:%d-:5201,hostfwd=tcp:127.0.0.1:%d-:80,hostfwd=tcp:127.0.0.1:%d-:2"):format(
            iperf, web, door)
    end
    local out, said, gone = uv.new_pipe(), "", false
    local handle, pid = uv.spawn("qemu-system-x86_64", { args = {
        "-accel", "kvm", "-cpu", "host", "-M", "microvm,rtc=on", "-m", "256", "-nodefaults", "-no-user-config", "-display", "none",
        "-serial", "stdio", "-no-reboot", "-kernel", kernel, "-initrd", initrd,
        "-append", "console=ttyS0 quiet panic=-1 mitigations=off reboot=t",
        "-global", "virtio-mmio.force-legacy=false", "-device", "virtio-net-device,netdev=n",
        "-netdev", backend,
    }, stdio = { nil, out, 2 } }, loop.guard(function()
        gone = true
    end))
    assert(handle, pid)
    out:read_start(loop.guard(function(_, chunk)
        said = said .. (chunk or "")
    end))
    local _ <close> = setmetatable({}, { __close = function()
        uv.kill(pid, "sigkill")
        while not gone do
            loop.sleep(0.02)
        end
        handle:close()
        out:close()
    end })
    while not said:find "ready" do
        assert(not gone, "QEMU ended: " .. said)
        loop.sleep(0.05)
    end
    return rows {
        address = tap and GUEST or "127.0.0.1", iperf = iperf, web = web, pids = { pid },
        guest = function(command)
            local text = assert(net.ask(tap and GUEST or "127.0.0.1", door, command .. "; echo status $?; exit\n", 600))
            assert(text:find "status 0", text)
        end,
    }
end

local WHAT = { "CPU us a MiB, out of the guest", "CPU us a MiB, into it", "CPU us a connection and request",
    ("CPU us a UDP packet of %d bytes out"):format(PACKET_BYTES) }

local function print_table(title, first, second, ours, other, theirs)
    print(("%-40s %10s %10s %10s %8s %8s"):format(title, first, second, "QEMU", "ratio", "ratio 2"))
    for i, what in ipairs(WHAT) do
        print(("%-40s %10.0f %10.0f %10.0f %8.3f %8.3f"):format(what, ours[i], other[i], theirs[i], ours[i] / theirs[i],
            other[i] / theirs[i]))
    end
end

assert(os.execute "ip link set lo up", "no network namespace of our own")
loop.run(function()
    print_table(("user network, %d MiB each way"):format(mib), "sm", "sm, 1500",
        with_sm { type = "user", allow = { "host" } }, with_sm { type = "user", allow = { "host" }, mtu = 1500 }, with_qemu())
    os.execute "modprobe -q vhost_net"
    assert(os.execute(("ip tuntap add %s mode tap && ip addr add %s/24 dev %s && ip link set %s up"):format(TAP, HOST, TAP, TAP)))
    local function tap(vhost)
        return { type = "tap", name = TAP, address = GUEST .. "/24", gateway = HOST, vhost = vhost }
    end
    print_table(("tap, %d MiB each way"):format(mib), "sm", "sm, vhost", with_sm(tap()), with_sm(tap(true)), with_qemu(true))
end)
