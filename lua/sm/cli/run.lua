-- SPDX-License-Identifier: Apache-2.0
--
-- sm run: an image as a microVM, with Docker's habits.
--
-- The command is the VM's main process: its exit is the VM's, and its exit
-- code is ours. Standard streams are joined to it; signals that would end us
-- go to it first, and after a grace time it is killed.

local config = require "sm.config"
local loop = require "sm.loop"
local net_config = require "sm.net_config"
local oci_config = require "sm.oci_config"
local progress = require "sm.cli.progress"
local signals = require "sm.cli.signals"
local sm = require "sm"
local streams = require "sm.cli.streams"
local terminal = require "sm.cli.terminal"
local timeline = require "sm.cli.timeline"

local M = {
    usage = "sm run [flags] IMAGE [COMMAND [ARG…]]",
    about = "Run an image as a hardware-isolated microVM. IMAGE is a registry's reference, a path\n"
        .. "(an OCI layout, an archive, a folder that is a root), oci:DIR[:TAG], oci-archive:FILE,\n"
        .. "docker-archive:FILE, or - for an archive on stdin. The exit code is the command's;\n"
        .. "125 is a failure of sm itself, 126 a command that cannot be executed, 127 one\n"
        .. "that is not there, 128+n one killed by signal n.",
    flags = {
        { "interactive", "i", nil, "join standard input to the command" },
        { "tty", "t", nil, "give the command a terminal" },
        { "rm", nil, nil, "with -d: forget the log and exit code at the end as well" },
        { "name", nil, "NAME", "name of the VM (default: made up)", kind = "string" },
        { "cpus", nil, "N", "virtual CPUs (default 1)", kind = "integer" },
        { "memory", "m", "SIZE", "memory, such as 512M or 2G (default 512M)", kind = "size" },
        { "disk", nil, "SIZE", "size of the writable disk, sparse (default 8G)", kind = "size" },
        { "env", "e", "KEY=VALUE", "set a variable; KEY alone takes the host's", kind = "list" },
        { "env-file", nil, "FILE", "read variables from a file", kind = "list" },
        { "workdir", "w", "DIR", "working directory", kind = "string" },
        { "user", "u", "USER[:GROUP]", "user, by name or number", kind = "string" },
        { "entrypoint", nil, "PROGRAM", "replace the image's entrypoint", kind = "string" },
        { "hostname", "h", "NAME", "hostname of the guest", kind = "string" },
        { "read-only", nil, nil, "no writable layer" },
        { "rootfs", nil, "WAY", "how the image is seen: blk (default), or pmem: the host's pages, "
            .. "shared with other guests", kind = "string" },
        { "kernel", nil, "FILE", "guest kernel: own, stock, or a vmlinux or bzImage", kind = "string" },
        { "append", nil, "TEXT", "kernel parameters to add", kind = "string" },
        { "pull", nil, "WHEN", "missing (default), always or never", kind = "string" },
        { "platform", nil, "OS/ARCH", "which of a multi-platform image", kind = "string" },
        { "commit", nil, "NAME", "when the command has ended with 0, keep what it changed as an image", kind = "string" },
        { "warm", nil, nil, "start from a snapshot of the booted machine, taken at the first time; "
            .. "`sm snapshot ls` shows it" },
        { "restart", nil, nil, "boot again when the guest reboots" },
        { "timeout", nil, "TIME", "end the command after this long (exit code 124)", kind = "seconds" },
        { "stop-timeout", nil, "TIME", "between a stop signal and SIGKILL (default 10)", kind = "seconds" },
        { "verbose", nil, nil, "the guest's console and the timeline, on stderr" },
        { "timeline", nil, nil, "where the time of the boot went, on stderr" },
        progress.FLAG,
        { "quiet", "q", nil, "no progress" },
        { "volume", "v", "SRC:DST", "shared folders: not there yet", kind = "list",
            absent = "shared folders are not there yet; copy files with a layer or vm:write_file" },
        { "net", nil, "NETWORK", "user (default), none, tap=NAME[,ip=A/N,gw=A], unix=PATH;\n"
            .. "with queues=N for several CPUs, and vhost for a tap that needs no policy", kind = "list" },
        { "network", nil, "NETWORK", "the same, as Docker spells it", kind = "list" },
        { "publish", "p", "[IP:]HOST:GUEST[/udp]", "reach a port of the guest; IP is 127.0.0.1 unless told",
            kind = "list" },
        { "publish-all", "P", nil, "the same for every port the image exposes, at free ports" },
        { "egress", nil, "POLICY", "deny_private (default): the internet, not this host nor private\n"
            .. "networks; allow_all; deny: only what --allow names", kind = "string" },
        { "allow", nil, "WHERE[:PORT]", "open an address, network, name, or `host` to the guest", kind = "list" },
        { "dns", nil, "ADDRESS", "ask this server instead of the host's", kind = "list" },
        { "dns-search", nil, "DOMAIN", "search domains", kind = "list" },
        { "add-host", nil, "NAME:ADDRESS", "a line of /etc/hosts; host-gateway is this host", kind = "list" },
        { "mtu", nil, "N", "of the network card (default 65520; 1500 on a tap)", kind = "integer" },
        { "pcap", nil, "FILE", "record the guest's traffic", kind = "string" },
        { "detach", "d", nil, "run in the background and print the VM's name" },
    },
    min = 1,
    needs = "an image",
}

-- The cards that --net, --network, --egress and --mtu describe.
local function cards(o)
    local names = o.net or o.network or { "user" }
    local out = {}
    for i, name in ipairs(names) do
        -- Docker's word for what every container gets.
        out[i] = (name == "bridge" or name == "default") and "user" or name
    end
    if not o.egress and not o.mtu then
        return out
    end
    for i, name in ipairs(out) do
        local list = net_config.net(name)
        if not list then
            return out -- config.check has the words for it
        end
        local card = list[1]
        if card then
            card.policy, card.mtu = o.egress or card.policy, o.mtu or card.mtu
        end
        out[i] = card or false
    end
    return out
end

-- Flags → configuration of the machine.
local function machine_config(o)
    return {
        net = cards(o),
        publish = o.publish,
        publish_all = o.publish_all,
        allow = o.allow,
        dns = o.dns,
        dns_search = o.dns_search,
        add_host = o.add_host,
        pcap = o.pcap,
        cpus = o.cpus,
        memory = o.memory,
        disk = o.disk,
        name = o.name,
        hostname = o.hostname,
        kernel = o.kernel,
        append = o.append,
        read_only = o.read_only,
        rootfs = o.rootfs,
        pull = o.pull,
        platform = o.platform,
        verbose = o.verbose,
        warm = o.warm,
        on_console = o.verbose and function(bytes)
            io.stderr:write((bytes:gsub("\r\n", "\n")))
        end or nil,
    }
end

local function get_image(o, ref)
    local bars, why = progress.new(o)
    if not bars then
        return nil, "run: " .. why
    end
    local image, err = sm.image(ref, {
        pull = o.pull,
        platform = o.platform,
        progress = function(e)
            bars:event(e)
        end,
    })
    bars:finish()
    return image, err
end

-- What to run, from the image's configuration and the flags.
local function process_of(o, image, command)
    local overrides = {
        cmd = #command > 0 and command or nil,
        entrypoint = o.entrypoint,
        env = o.env,
        env_file = o.env_file,
        workdir = o.workdir,
        user = o.user,
        hostname = o.hostname,
        tty = o.tty,
    }
    return oci_config.resolve(image.config, overrides)
end

-- Signals that end a program are the command's to answer, and ours if it does not.
-- Returns what gives them back when it is closed.
local function forward_signals(proc, vm, o, stop_signal)
    local stopping = false
    local function stop(name)
        if stopping then
            vm:kill()
            return
        end
        stopping = true
        proc:signal(name)
        if not proc:wait(o.stop_timeout or 10) then
            proc:signal("KILL")
            if not proc:wait(5) then
                vm:kill()
            end
        end
    end
    return signals.take(function(name)
        loop.spawn(stop, name == "TERM" and stop_signal or name)
    end)
end

-- The command has ended and the machine has not: keep what was changed.
local function finish_commit(o, vm, result, process)
    if result.status == 0 then
        local kept, err = vm:commit(o.commit, { created_by = table.concat(process.argv, " ") })
        if not kept then
            vm:stop()
            return nil, err
        elseif not o.quiet then
            io.stderr:write(("%s %s\n"):format(kept.reference, kept.digest))
        end
    end
    vm:stop()
    return result.status
end

-- One boot: an exit code, and a line when there is something to say; "reboot"
-- as the line of a guest that rebooted.
local function boot(o, image, process, marks)
    local cfg = machine_config(o)
    local vm, err = sm.start(image, cfg)
    if not vm then
        return nil, err
    end
    local _ <close> = vm
    local raw_rows, raw_cols
    if o.tty then
        raw_rows, raw_cols = terminal.size(0)
    end
    local stop_signal = process.stop_signal or "TERM"
    local proc, failure
    proc, err, failure = vm:spawn {
        argv = process.argv,
        env = process.env,
        cwd = process.cwd,
        user = process.user,
        tty = o.tty,
        rows = raw_rows,
        cols = raw_cols,
        stdin = o.interactive or false,
        main = not o.commit,
        stop_signal = stop_signal,
    }
    if not proc then
        -- What a shell would answer: 127 not found, 126 cannot be run.
        return failure and failure.stage == "exec" and failure.status or nil, err
    end
    vm.timeline.command = loop.now()
    if o.publish_all and not o.quiet then
        for _, port in ipairs(vm.ports or {}) do
            io.stderr:write(("sm: %s:%d -> %d/%s\n"):format(port.addr, port.port, port.guest, port.proto))
        end
    end
    if o.verbose or o.timeline then
        io.stderr:write(timeline.format(vm, marks))
    end
    local taken <close> = forward_signals(proc, vm, o, stop_signal)
    local joined <close> = streams.join(proc, { tty = o.tty, stdin = o.interactive })
    local timed_out
    local result, why = proc:wait(o.timeout)
    if not result and why == "timeout" then
        timed_out = true
        proc:signal(stop_signal)
        result = proc:wait(o.stop_timeout or 10)
        if not result then
            proc:signal("KILL")
            result = proc:wait(10)
        end
    end
    joined:finish()
    taken.close()
    if o.commit and result then
        return finish_commit(o, vm, result, process)
    end
    local ending = vm:wait(30) or vm:kill()
    if timed_out then
        return 124
    elseif result then
        return result.status
    elseif ending.reason == "reboot" then
        return 0, "reboot"
    elseif ending.reason == "poweroff" then
        return 0
    elseif ending.reason == "killed" then
        return 137
    end
    return nil, ("the guest ended: %s%s"):format(ending.reason, ending.detail and ", " .. ending.detail or "")
end

-- In the background, under a process of its own.
local function detach(o, image, process)
    local cfg = machine_config(o)
    cfg.on_console, cfg.verbose = nil, nil
    local rows, cols
    if o.tty then
        rows, cols = terminal.size(0)
    end
    local id, err, failure = sm.launch(image, {
        config = cfg,
        keep = not o.rm,
        process = {
            argv = process.argv, env = process.env, cwd = process.cwd, user = process.user,
            tty = o.tty, rows = rows, cols = cols, stdin = o.interactive or false,
            stop_signal = process.stop_signal,
        },
    })
    if not id then
        return failure and failure.stage == "exec" and failure.status or nil, err
    end
    print(id)
    return 0
end

function M.run(o, rest)
    local marks = { process = loop.now() }
    local ok, err = config.check(machine_config(o))
    if not ok then
        return nil, "run: " .. err
    end
    if o.detach and (o.timeout or o.restart or o.commit) then
        return nil, ("run: -d does not go with --%s%s"):format(o.timeout and "timeout" or o.restart and "restart"
            or "commit", o.commit and "; use `sm commit` while it runs" or "")
    end
    if o.tty and not o.detach and not terminal.is_tty(0) then
        return nil, "run: -t wants a terminal, and standard input is none"
    end
    local image
    image, err = get_image(o, rest[1])
    if not image then
        return nil, err
    end
    marks.image = loop.now()
    local process
    process, err = process_of(o, image, table.move(rest, 2, #rest, 1, {}))
    if not process then
        return nil, "run: " .. err
    end
    if o.detach then
        return detach(o, image, process)
    end
    while true do
        local code, why = boot(o, image, process, marks)
        if why ~= "reboot" then
            return code, why
        elseif not o.restart then
            return 0
        end
    end
end

return M
