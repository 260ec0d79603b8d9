-- SPDX-License-Identifier: Apache-2.0
--
-- What a MiB and a request through the user network cost: the CPU time of every process
-- of sm, and of QEMU with its user network, for the same guest kernel and the same
-- programs (iperf3, nginx asked by wrk with a connection each). At QEMU's MTU of 1500,
-- and at ours.
--
--   sm spec/bench/net.lua IMAGE KERNEL INITRD [MIB]     INITRD: IMAGE's files, and an /init

local loop = require "sm.loop"
local net = require "support.net"
local shell = require "support.shell"
local sm = require "sm"
local uv = require "luv"

local image, kernel, initrd, mib = arg[1], arg[2], arg[3], tonumber(arg[4] or 64)
local SECONDS = 4 -- of requests

local function free_port()
    local port = net.tcp("127.0.0.1", function() end)
    net.close_last()
    return port
end

-- ns of CPU that processes had, all threads.
local function cpu_of(pids)
    local total = 0
    for _, pid in ipairs(pids) do
        for name in uv.fs_scandir_next, assert(uv.fs_scandir(("/proc/%d/task"):format(pid))) do
            local f <close> = io.open(("/proc/%d/task/%s/schedstat"):format(pid, name))
            total = total + (f and tonumber(f:read("a"):match "^%d+") or 0)
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

local function measure(side, what)
    local before = cpu_of(side.pids)
    local n = what()
    return (cpu_of(side.pids) - before) / n / 1000
end

local function rows(side)
    local out = {}
    out[1] = measure(side, function() -- out of the guest
        local port = free_port()
        local server = host(("exec iperf3 -s -1 -p %d >/dev/null"):format(port))
        while not net.listens(port) and os.execute(("grep -q :%04X /proc/net/tcp6"):format(port)) ~= true do
            loop.sleep(0.05)
        end
        side.guest(("iperf3 -c 10.0.2.2 -p %d -n %dM 2>&1"):format(port, mib))
        server()
        return mib
    end)
    out[2] = measure(side, function() -- into it
        local _, code = host(("iperf3 -c 127.0.0.1 -p %d -n %dM >/dev/null"):format(side.iperf, mib))()
        assert(code == 0, "iperf3 failed")
        return mib
    end)
    out[3] = measure(side, function()
        local report = host(("wrk -t 1 -c 4 -d %ds --timeout 10s -H 'Connection: close' http://127.0.0.1:%d/page"):format(
            SECONDS, side.web))()
        assert(not report:find "Non%-2xx", report)
        return assert(tonumber(report:match "(%d+) requests in"), report)
    end)
    return out
end

local function with_sm(mtu)
    local iperf, web = free_port(), free_port()
    local vm <close> = assert(sm.start(image, { memory = "256M", publish = { iperf .. ":5201", web .. ":80" },
        net = { type = "user", mtu = mtu, policy = "allow_all", allow = { "host" } } }))
    assert(vm:exec { argv = { "sh", "-c", "nginx; iperf3 -s -D" } })
    return rows {
        iperf = iperf, web = web, pids = { vm.parts.worker:pid(), vm.parts.network.daemon.pid },
        guest = function(command)
            local r = assert(vm:exec { argv = { "sh", "-c", command }, timeout = 600 })
            assert(r.status == 0, r.stdout)
        end,
    }
end

local function with_qemu()
    local iperf, web, door = free_port(), free_port(), free_port()
    local out, said, gone = uv.new_pipe(), "", false
    local handle, pid = uv.spawn("qemu-system-x86_64", { args = {
        "-accel", "kvm", "-cpu", "host", "-M", "microvm,rtc=on", "-m", "256", "-nodefaults", "-no-user-config", "-display", "none",
        "-serial", "stdio", "-no-reboot", "-kernel", kernel, "-initrd", initrd,
        "-append", "console=ttyS0 quiet panic=-1 mitigations=off reboot=t",
        "-global", "virtio-mmio.force-legacy=false", "-device", "virtio-net-device,netdev=n",
        "-netdev", ("user,id=n,hostfwd=tcp:127.0.0.1:%d-:5201,hostfwd=tcp:127.0.0.1:%d-:80,hostfwd=tcp:127.0.0.1:%d-:2"):format(
            iperf, web, door),
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
        iperf = iperf, web = web, pids = { pid },
        guest = function(command)
            local text = assert(net.ask("127.0.0.1", door, command .. "; echo status $?; exit\n", 600))
            assert(text:find "status 0", text)
        end,
    }
end

loop.run(function()
    local ours, small, theirs = with_sm(nil), with_sm(1500), with_qemu()
    print(("%-40s %10s %10s %10s %8s %8s"):format(("user network, %d MiB each way"):format(mib), "sm", "sm, 1500",
        "QEMU", "ratio", "at 1500"))
    for i, what in ipairs { "CPU us a MiB, out of the guest", "CPU us a MiB, into it", "CPU us a connection and request" } do
        print(("%-40s %10.0f %10.0f %10.0f %8.3f %8.3f"):format(what, ours[i], small[i], theirs[i], ours[i] / theirs[i],
            small[i] / theirs[i]))
    end
end)
