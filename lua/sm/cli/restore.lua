-- SPDX-License-Identifier: Apache-2.0
--
-- sm restore: a copy of a saved VM. With a command it runs that and ends with
-- it; without one it stays until it is told to stop.

local uv = require "luv"
local loop = require "sm.loop"
local oci_config = require "sm.oci_config"
local sm = require "sm"
local signals = require "sm.cli.signals"
local streams = require "sm.cli.streams"
local terminal = require "sm.cli.terminal"

local function run_command(o, vm, argv)
    local image = (vm.image.config or {}).config or {}
    local process, err = oci_config.resolve({ config = {
        Env = image.Env, WorkingDir = image.WorkingDir, User = image.User,
    } }, { cmd = argv, env = o.env, workdir = o.workdir, user = o.user, tty = o.tty })
    if not process then
        return nil, "restore: " .. err
    end
    local rows, cols
    if o.tty then
        rows, cols = terminal.size(0)
    end
    local proc, failure
    proc, err, failure = vm:spawn {
        argv = process.argv, env = process.env, cwd = process.cwd, user = process.user, tty = o.tty, rows = rows,
        cols = cols, stdin = o.interactive or false,
    }
    if not proc then
        return failure and failure.stage == "exec" and failure.status or nil, err
    end
    local _ <close> = signals.forward(proc)
    local joined <close> = streams.join(proc, { tty = o.tty, stdin = o.interactive })
    local result = proc:wait()
    joined:finish()
    if not result then
        local ending = vm:wait(10)
        return nil, "the guest ended: " .. (ending and ending.reason or "its agent is gone")
    end
    return result.status
end

return {
    usage = "sm restore [flags] SNAPSHOT [COMMAND [ARG…]]",
    about = "Run a copy of a saved VM: what ran in it runs on. With a command, the copy ends\n"
        .. "when that does, and the exit code is the command's; without one its name is\n"
        .. "printed and it stays until a signal or `sm stop`. A name with a slash is a path.",
    flags = {
        { "interactive", "i", nil, "join standard input to the command" },
        { "tty", "t", nil, "give the command a terminal" },
        { "detach", "d", nil, "leave the copy in the background, print its name" },
        { "name", nil, "NAME", "name of the copy (default: made up)", kind = "string" },
        { "hostname", "h", "NAME", "hostname of the copy (default: its name)", kind = "string" },
        { "env", "e", "KEY=VALUE", "set a variable of the command", kind = "list" },
        { "workdir", "w", "DIR", "working directory of the command", kind = "string" },
        { "user", "u", "USER[:GROUP]", "user of the command", kind = "string" },
        { "clock", nil, "HOW", "freeze (default) or advance the guest's clocks over the gap", kind = "string" },
        { "eager", nil, nil, "read all memory first, not when it is asked for" },
    },
    min = 1,
    needs = "a snapshot",
    run = function(o, rest)
        local cfg = { name = o.name, hostname = o.hostname, clock = o.clock, eager = o.eager }
        if o.detach then
            if #rest > 1 then
                return nil, "restore: -d takes no command; use `sm exec`"
            end
            local name = rest[1]
            if name:find("/", 1, true) and name:sub(1, 1) ~= "/" then
                name = uv.cwd() .. "/" .. name
            end
            local id, err = sm.launch_copy(name, { config = cfg })
            if not id then
                return nil, err
            end
            print(id)
            return 0
        elseif o.tty and not terminal.is_tty(0) then
            return nil, "restore: -t wants a terminal, and standard input is none"
        end
        local vm <close>, err = sm.restore(rest[1], cfg)
        if not vm then
            return nil, err
        elseif #rest > 1 then
            return run_command(o, vm, table.move(rest, 2, #rest, 1, {}))
        end
        print(vm.id)
        io.stdout:flush()
        local _ <close> = signals.take(function()
            loop.spawn(vm.stop, vm)
        end)
        local ending = vm:wait()
        return ending.code or (ending.reason == "poweroff" or ending.reason == "killed") and 0 or 1
    end,
}
