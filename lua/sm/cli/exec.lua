-- SPDX-License-Identifier: Apache-2.0
--
-- sm exec: a command in a running VM. Environment, folder and user are the
-- VM's own command's unless flags say otherwise.

local oci_config = require "sm.oci_config"
local signals = require "sm.cli.signals"
local streams = require "sm.cli.streams"
local terminal = require "sm.cli.terminal"
local vms = require "sm.cli.vms"

local M = {
    usage = "sm exec [flags] VM COMMAND [ARG…]",
    about = "Run a command in a running VM. The exit code is the command's; 126 a command\n"
        .. "that cannot be executed, 127 one that is not there, 128+n one killed by signal\n"
        .. "n, 1 a VM that is not running.",
    flags = {
        { "interactive", "i", nil, "join standard input to the command" },
        { "tty", "t", nil, "give the command a terminal" },
        { "detach", "d", nil, "start it and come back at once" },
        { "user", "u", "USER[:GROUP]", "user, by name or number", kind = "string" },
        { "workdir", "w", "DIR", "working directory", kind = "string" },
        { "env", "e", "KEY=VALUE", "set a variable; KEY alone takes the host's", kind = "list" },
        { "env-file", nil, "FILE", "read variables from a file", kind = "list" },
    },
    min = 2,
    needs = "a VM and a command",
}

local function options(o, info, argv)
    -- The VM's own environment takes the place of an image's.
    local process, err = oci_config.resolve({ config = {
        Env = info.env, WorkingDir = info.cwd, User = info.user,
    } }, {
        cmd = argv, env = o.env, env_file = o.env_file, workdir = o.workdir, user = o.user, tty = o.tty,
    })
    if not process then
        return nil, err
    end
    local opts = {
        argv = process.argv, env = process.env, cwd = process.cwd, user = process.user,
        tty = o.tty or nil, stdin = o.interactive or nil, detach = o.detach or nil,
    }
    if o.tty then
        opts.rows, opts.cols = terminal.size(0)
    end
    return opts
end

--- Run a command in an attached VM with the flags of `sm exec`; its exit code.
---@param vm sm.AttachedVM
---@param o table
---@param argv string[]
---@return integer? code
---@return string? err
function M.in_vm(vm, o, argv)
    local opts, err = options(o, vm.info, argv)
    if not opts then
        return nil, "exec: " .. err
    end
    local proc, failure
    proc, err, failure = vm:spawn(opts)
    if not proc then
        return failure and failure.stage == "exec" and failure.status or 1, err
    elseif o.detach then
        return 0
    end
    local held <close> = proc
    local _ <close> = signals.forward(held)
    local joined <close> = streams.join(held, { tty = o.tty, stdin = o.interactive })
    local exit
    exit, err = held:wait()
    joined:finish()
    if not exit then
        return 1, err
    end
    return exit.status
end

function M.run(o, rest)
    if o.tty and not o.detach and not terminal.is_tty(0) then
        return 1, "exec: -t wants a terminal, and standard input is none"
    end
    local code, err = vms.with(rest[1], function(vm)
        return M.in_vm(vm, o, table.move(rest, 2, #rest, 1, {}))
    end)
    return code or 1, err
end

return M
