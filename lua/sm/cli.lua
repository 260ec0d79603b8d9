-- SPDX-License-Identifier: Apache-2.0
--
-- The command line. `sm COMMAND …` finds lua/sm/cli/COMMAND.lua; a first word
-- that is a file is a Lua script. A command is a module:
--
--   { usage=, about=, flags=, min=, max=, verbs=, run = function(options, rest) … end }
--
-- and is written on the public API (`require "sm"`) and nothing else. `run` is
-- a task of sm.loop; it returns an exit code (nil is 0), or nil and one line.
-- Exit codes are Docker's: 125 is our own failure, the rest the workload's.

local args = require "sm.cli.args"

local M = {}

-- In the order of the help text.
local COMMANDS = {
    { "run", "run an image as a microVM" },
    { "ps", "list the VMs" },
    { "exec", "run a command in a running VM" },
    { "logs", "what a detached VM's command said" },
    { "attach", "join a running VM's command" },
    { "stop", "end VMs in good order" },
    { "kill", "end VMs at once, or send a signal" },
    { "wait", "wait for the end of VMs, print their exit codes" },
    { "rm", "remove VMs that have exited" },
    { "commit", "keep what a running VM has changed as an image" },
    { "cp", "copy files and folders into or out of a VM" },
    { "stats", "what VMs use" },
    { "top", "the processes in a VM" },
    { "pcap", "record a running VM's network traffic" },
    { "snapshot", "save running VMs; list, show, check and remove what was saved" },
    { "restore", "run a copy of a saved VM" },
    { "fork", "copies of a running VM, as it is now" },
    { "pool", "keep booted copies of an image ready, run commands in them" },
    { "pull", "fetch an image and make it ready to run" },
    { "images", "list the images kept here" },
    { "rmi", "remove images" },
    { "load", "bring the images of an archive into the store" },
    { "save", "write images as an archive" },
    { "push", "push an image to a registry" },
    { "tag", "give an image another name" },
    { "inspect", "all that is known of a VM or an image, as JSON" },
    { "history", "how an image came to be" },
    { "du", "what the store takes on the disk" },
    { "prune", "clear the store of what nothing needs" },
    { "verify", "check the store" },
    { "doctor", "what this machine can do, what is missing, how to get it" },
    { "version", "print the version" },
}

local OWN_FAILURE = 125

local function fail(text)
    io.stderr:write("sm: ", text, "\n")
    return OWN_FAILURE
end

local function help()
    local lines = {
        "usage: sm COMMAND [flags] [args]",
        "       sm [-i] [-e CODE] [-l MODULE] [SCRIPT.lua | -] [args]",
        "                                Lua with the toolkit at hand",
        "",
    }
    for _, c in ipairs(COMMANDS) do
        lines[#lines + 1] = ("  %-8s  %s"):format(c[1], c[2])
    end
    lines[#lines + 1] = ""
    lines[#lines + 1] = "`sm COMMAND --help` tells a command's flags."
    return table.concat(lines, "\n") .. "\n"
end

local function is_command(name)
    for _, c in ipairs(COMMANDS) do
        if c[1] == name then
            return true
        end
    end
    return false
end

local function names()
    local list = {}
    for i, c in ipairs(COMMANDS) do
        list[i] = c[1]
    end
    return list
end

local function readable(path)
    local f = io.open(path, "r")
    if not f then
        return false
    end
    -- A folder opens, but does not read.
    local ok = f:read(0) ~= nil or f:seek("end") == 0
    f:close()
    return ok
end

local function wants_help(argv)
    for i = 2, #argv do
        local word = argv[i]
        if word == "--help" then
            return true
        elseif word:sub(1, 1) ~= "-" or word == "--" then
            -- Flags with values are not told apart here; a command's own
            -- parser sees --help as a flag too.
            return false
        end
    end
    return false
end

local function command(argv)
    local loop = require "sm.loop"
    local spec = require("sm.cli." .. argv[1])
    if wants_help(argv) then
        io.write(args.help(spec.usage, spec.about, spec.flags))
        return 0
    end
    local options, rest = args.parse(spec.flags, argv, 2, spec.verbs)
    if not options then
        return fail(("%s: %s\nsee `sm %s --help`"):format(argv[1], rest, argv[1]))
    end
    if #rest < (spec.min or 0) then
        return fail(("%s: needs %s\nusage: %s"):format(argv[1], spec.needs or "an argument", spec.usage))
    elseif spec.max and #rest > spec.max then
        return fail(("%s: too many arguments: '%s'\nusage: %s"):format(argv[1], rest[spec.max + 1], spec.usage))
    end
    local ok, code, err = xpcall(loop.run, debug.traceback, spec.run, options, rest)
    if not ok then
        return fail("internal error, please report it\n" .. tostring(code))
    elseif err then
        io.stderr:write("sm: ", tostring(err), "\n")
        return code or OWN_FAILURE
    end
    return code or 0
end

--- The names of the commands, in the order of the help text.
---@return string[]
function M.commands()
    return names()
end

--- Run a command line.
---@param argv string[] argv[0] is the program
---@return integer exit code
function M.main(argv)
    local first = argv[1]
    if not first then
        if require("luv").guess_handle(0) == "tty" then
            return require("sm.repl").run()
        end
        io.write(help())
        return 0
    elseif first == "--help" or first == "-h" or first == "help" then
        if argv[2] and is_command(argv[2]) then
            return M.main { [0] = argv[0], argv[2], "--help" }
        end
        io.write(help())
        return 0
    elseif first == "--version" then
        return M.main { [0] = argv[0], "version" }
    elseif is_command(first) then
        return command(argv)
    elseif first == "_owner" then
        return require("sm.owner").main()
    elseif require("sm.script").is_option(first) or first:match("%.lua$") or readable(first) then
        return require("sm.script").main(argv)
    end
    local near = args.nearest(first, names())
    return fail(("unknown command '%s'%s\nsee `sm --help`"):format(
        first, near and (" (did you mean '%s'?)"):format(near) or ""))
end

return M
