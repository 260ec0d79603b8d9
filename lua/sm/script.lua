-- SPDX-License-Identifier: Apache-2.0
--
-- `sm script.lua args…`: Lua scripts with the toolkit at hand, by the habits of
-- the stock interpreter: `arg`, `...`, a first line with #!, `-e`, `-l`, `-i`,
-- `-` for standard input, an error's traceback on stderr and exit code 1, any
-- other by os.exit. A script is a task of sm.loop, so what waits in it gives
-- way, and it ends when nothing is left to wait for.

local M = {}

-- Frames of ours say nothing to the script's author.
local function is_own_frame(line)
    return line:find("/sm/loop.lua:", 1, true) or line:find("/sm/script.lua:", 1, true)
        or line:find("/sm/cli.lua:", 1, true) or line:find("(...tail calls...)", 1, true)
end

-- The message and the script's own frames: those at the end that are ours go.
local function trimmed(text)
    if type(text) ~= "string" then
        return text
    end
    local lines = {}
    for line in (text .. "\n"):gmatch "(.-)\n" do
        lines[#lines + 1] = line
    end
    while #lines > 1 and (lines[#lines]:find "%[C%]: in" or is_own_frame(lines[#lines])) do
        lines[#lines] = nil
    end
    if lines[#lines] == "stack traceback:" then
        lines[#lines] = nil
    end
    return table.concat(lines, "\n")
end

local Exit = {}

-- Closing the Lua state below a running loop would crash: with `close`, a task
-- that exits leaves the loop first. Nothing runs between.
local function leave_the_loop(real_exit)
    local loop = require "sm.loop"
    return function(code, close)
        local task = loop.current()
        if not close or not task or coroutine.running() ~= task.co then
            real_exit(code, close)
        end
        local status = code == nil and 0 or code == true and 0 or code == false and 1 or code
        loop.guard(function()
            error(setmetatable({ code = status }, Exit), 0)
        end)()
        loop.await(function() end)
    end
end

local function describe(e)
    if getmetatable(e) == Exit then
        return e
    end
    if type(e) == "string" or type(e) == "number" then
        e = tostring(e)
        -- An error from a task has the task's traceback already.
        return e:find("\nstack traceback:", 1, true) and e or debug.traceback(e, 2)
    end
    local meta = getmetatable(e)
    if meta and meta.__tostring then
        return tostring(e)
    end
    return debug.traceback(("(error object is a %s value)"):format(type(e)), 2)
end

local function report(text)
    if getmetatable(text) == Exit then
        return text.code
    end
    io.stderr:write("sm: ", text, "\n")
    return 1
end

-- Run a chunk as a task of the loop. nil and a report when it fails.
local function run(chunk, ...)
    local loop = require "sm.loop"
    local ok, trace = xpcall(loop.run, describe, chunk, ...)
    if not ok then
        return nil, trimmed(trace)
    end
    return true
end

-- Until nothing is left to wait for.
local function finish()
    local ok, trace = xpcall(require("sm.loop").finish, describe)
    if not ok then
        return nil, trimmed(trace)
    end
    return true
end

local function set_arg(argv, at)
    local list = {}
    for i = 0, #argv do
        list[i - at] = argv[i]
    end
    _G.arg = list
    return table.unpack(list, 1, #list)
end

local actions = {}

function actions.e(text)
    local chunk, err = load(text, "=(command line)")
    if not chunk then
        return nil, err
    end
    return run(chunk)
end

function actions.l(name)
    local global, module = name:match "^([%a_][%w_]*)=(.+)$"
    return run(function()
        _G[global or name] = require(module or name)
    end)
end

-- The options in front of a script: what they ask for, in order.
local function parse(argv)
    local todo, i = { steps = {} }, 1
    while argv[i] do
        local word = argv[i]
        if word == "--" then
            i = i + 1
            break
        elseif word == "-" or word:sub(1, 1) ~= "-" then
            break
        elseif word == "-i" then
            todo.interactive = true
        elseif word == "-v" then
            todo.version = true
        elseif word:match "^%-[el]" then
            local value = word:sub(3)
            if value == "" then
                i = i + 1
                value = argv[i]
            end
            if not value then
                return nil, ("'%s' needs an argument"):format(word)
            end
            todo.steps[#todo.steps + 1] = { word:sub(2, 2), value }
        else
            return nil, ("unrecognized option '%s'"):format(word)
        end
        i = i + 1
    end
    todo.script = argv[i] and i or nil
    return todo
end

--- Whether a command line is for scripts: an option of the interpreter's, or
--- standard input.
---@param word string
---@return boolean
function M.is_option(word)
    return word == "-" or word:match "^%-[el]" ~= nil or word == "-i" or word == "-v"
end

local function run_script(argv, at)
    local path = argv[at]
    local chunk, err = loadfile(path ~= "-" and path or nil)
    if not chunk then
        return nil, err
    end
    return run(chunk, set_arg(argv, at))
end

--- Run a command line: `[-i] [-e CODE] [-l MODULE] [SCRIPT | -] [ARGS]`.
---@param argv string[]
---@return integer exit code
function M.main(argv)
    local todo, err = parse(argv)
    if not todo then
        return report(err)
    end
    if todo.version then
        print("sm " .. require "sm.version" .. ", " .. _VERSION)
    end
    os.exit = leave_the_loop(os.exit)
    if not todo.script then
        set_arg(argv, #argv + 1)
    end
    local ok = true
    for _, step in ipairs(todo.steps) do
        ok, err = actions[step[1]](step[2])
        if not ok then
            return report(err)
        end
    end
    if todo.script then
        ok, err = run_script(argv, todo.script)
    end
    if todo.interactive then
        if not ok then
            report(err)
        end
        local found, repl = pcall(require, "sm.repl")
        if not found then
            return report(tostring(repl))
        end
        return repl.run() or 0
    end
    if ok then
        ok, err = finish()
    end
    return ok and 0 or report(err)
end

return M
