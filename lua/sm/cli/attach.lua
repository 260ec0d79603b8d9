-- SPDX-License-Identifier: Apache-2.0
--
-- sm attach: join the command of a detached VM. What it says from now on comes
-- here; ctrl-p ctrl-q lets go of a terminal and leaves the command running.

local signals = require "sm.cli.signals"
local streams = require "sm.cli.streams"
local terminal = require "sm.cli.terminal"
local vms = require "sm.cli.vms"

local DETACH = "\16\17" -- ctrl-p ctrl-q

-- The process as streams.join wants it, with the keys that let go watched for.
local function watched(proc, on_detach)
    local held = ""
    return setmetatable({
        write = function(_, bytes)
            bytes = held .. bytes
            held = ""
            local at = bytes:find(DETACH, 1, true)
            if at then
                on_detach()
                return nil, "let go"
            elseif bytes:sub(-1) == DETACH:sub(1, 1) then
                held, bytes = bytes:sub(-1), bytes:sub(1, -2)
            end
            return bytes == "" or proc:write(bytes)
        end,
    }, { __index = function(_, key)
        local method = proc[key]
        return type(method) == "function" and function(_, ...)
            return method(proc, ...)
        end or method
    end })
end

local function run(vm, o)
    local tty = vm.info.tty and terminal.is_tty(0)
    local proc <close>, err = vm:main { stdin = not o.no_stdin and vm.info.stdin or tty }
    if not proc then
        return 1, err
    end
    local let_go
    local view = watched(proc, function()
        let_go = true
        proc:close()
    end)
    if tty then
        proc:resize(terminal.size(0))
    end
    local _ <close> = not o.no_signal and signals.forward(proc) or nil
    local exit
    do
        local joined <close> = streams.join(view, { tty = tty, stdin = not o.no_stdin and (vm.info.stdin or tty) })
        exit, err = proc:wait()
        if not let_go then
            joined:finish()
        end
    end
    if let_go then
        io.stderr:write "let go; the command runs on\n"
        return 0
    elseif not exit then
        return 1, err
    end
    return exit.status
end

return {
    usage = "sm attach [flags] VM",
    about = "Join the command of a detached VM: its output from now on, its input when it was\n"
        .. "started with -i. The exit code is the command's. ctrl-p ctrl-q lets go.",
    flags = {
        { "no-stdin", nil, nil, "do not join standard input" },
        { "no-signal", nil, nil, "do not hand signals on" },
    },
    min = 1,
    max = 1,
    needs = "a VM",
    run = function(o, rest)
        local code, err = vms.with(rest[1], function(vm)
            return run(vm, o)
        end)
        return code or 1, err
    end,
}
