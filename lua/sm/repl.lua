-- SPDX-License-Identifier: Apache-2.0
--
-- The REPL: `sm` alone, in a terminal.
--
-- The terminal is one more handle of sm.loop, so VMs, timers and tasks go on
-- while somebody types; what they print goes above the line being typed. A
-- line runs as a task of the loop and may wait. Ctrl-C ends that task, and a
-- computation that never waits, but no VM: those are processes, or threads, of
-- their own.
--
-- The terminal is raw from begin to end; a computation looks for a Ctrl-C
-- among the keys from a count hook, by a second descriptor of the terminal.

local lineedit = require "sm.lineedit"
local loop = require "sm.loop"
local show = require "sm.show"
local uv = require "luv"

local M = {}

local HISTORY_MAX = 1000
local INTERRUPTED = "interrupted"
local HOOK_COUNT = 200000 -- instructions of Lua between two looks at the keys

local function state_dir()
    local named = os.getenv "XDG_STATE_HOME"
    if not named or named == "" then
        named = (os.getenv "HOME" or "/") .. "/.local/state"
    end
    return named .. "/sm"
end

-- ---- history ----

local function read_history(path)
    local lines = {}
    local file = io.open(path, "r")
    if file then
        for line in file:lines() do
            lines[#lines + 1] = (line:gsub("\\(.)", { n = "\n", ["\\"] = "\\" }))
        end
        file:close()
    end
    return table.move(lines, math.max(1, #lines - HISTORY_MAX + 1), #lines, 1, {})
end

local function append_history(path, line)
    local file = io.open(path, "a")
    if file then
        file:write((line:gsub("[\\\n]", { ["\n"] = "\\n", ["\\"] = "\\\\" })), "\n")
        file:close()
    end
end

-- ---- completion ----

local KEYWORDS = {
    "and", "break", "do", "else", "elseif", "end", "false", "for", "function", "goto", "if", "in",
    "local", "nil", "not", "or", "repeat", "return", "then", "true", "until", "while",
}

-- Names that indexing a value would find, with what lies there.
local function names_of(value)
    local names, seen = {}, {}
    for _ = 1, 8 do -- of an __index chain
        local meta = getmetatable(value)
        if type(value) == "table" and not seen[value] then
            seen[value] = true
            for key, field in next, value do
                if type(key) == "string" and names[key] == nil then
                    names[key] = field
                end
            end
        end
        value = type(meta) == "table" and rawget(meta, "__index")
        if type(value) ~= "table" then
            break
        end
    end
    return names
end

-- The value of "a.b.c" without calling anything of the user's.
local function look_up(env, path)
    local value = env
    for name in path:gmatch "[%a_][%w_]*" do
        value = names_of(value)[name]
    end
    return value
end

--- Candidates for the end of `text`, and where it begins (for sm.lineedit).
---@param env table
---@param text string
---@return string[]
---@return integer start
function M.complete(env, text)
    local path, separator, word = text:match "([%a_][%w_%.]*)([%.:])([%a_]?[%w_]*)$"
    local names
    if path then
        local value = look_up(env, path)
        names = type(value) == "string" and string or names_of(value)
    else
        word = text:match "[%a_][%w_]*$" or ""
        if word == "" then
            return {}, #text + 1
        end
        names = names_of(env)
        for _, keyword in ipairs(KEYWORDS) do
            names[keyword] = names[keyword] or true
        end
    end
    local list = {}
    for name, value in pairs(names) do
        local callable = type(value) == "function"
        if name:sub(1, #word) == word and name:find "^[%a_][%w_]*$" and name:sub(1, 2) ~= "__"
            and (separator ~= ":" or callable) then
            list[#list + 1] = name .. (callable and "(" or "")
        end
    end
    table.sort(list)
    return list, #text - #word + 1
end

-- ---- help ----

local BANNER = [[
sm %s, the microVM toolkit. A line of Lua and Enter; Tab completes, Ctrl-D ends.
help() tells more.]]

local OVERVIEW = [[
  vm = assert(sm.start("debian:12-slim"))       boot an image
  vm:exec { argv = { "uname", "-a" } }          run something in it
  m = assert(core.vm { memory = "1M" })         a bare machine; m:<Tab> shows what it can do
  m = vm:machine()                              the machine of a VM: m:regs(0), m:add_breakpoint{…}
  inspect.peek(vm, address, len)                memory by the guest's own addresses
  inspect.virtqueue(vm, "blk0")                 a device's queue
  s = assert(symbols.load "System.map")         names: s:find "do_sys_openat2", s:name(0xffff…)
  on_event(m, print)                            a machine's events, while you type
  print(trace.summary(trace.record(vm)))        where its exits go
  help(sm.start)   quit()]]

-- The name of a machine's method, in process or in a worker.
local function method_name(fn)
    local registered = debug.getregistry()["sm.core.vm"]
    for _, methods in ipairs { require("sm.worker").methods, registered and registered.__index or {} } do
        for name, method in pairs(methods) do
            if method == fn then
                return name
            end
        end
    end
end

-- What the command table says of a machine's method.
local function command_help(fn)
    local name = method_name(fn)
    for _, command in ipairs(require("sm.core").commands()) do
        if name and command.method == name then
            local lines = { ("vm:%s: %s"):format(name, command.doc) }
            for _, arg in ipairs(command.args or {}) do
                lines[#lines + 1] = ("  %-10s %s%s: %s"):format(arg.key, arg.choices or arg.type,
                    arg.required and "" or ", optional", arg.doc)
            end
            return table.concat(lines, "\n")
        end
    end
end

local function help_text(what)
    if what == nil then
        return OVERVIEW
    end
    local found, help = pcall(require, "sm.help")
    if found then
        local of = type(help) == "function" and help or help.of or help.help or help.text
        local ok, text = pcall(of, what)
        if ok and type(text) == "string" then
            return text
        end
    end
    return command_help(what) or "no help on " .. show.value(what)
end

-- ---- running a line ----

-- A chunk, or nil and what is wrong, or nil, nil: the text is not complete.
local function compile(text, env)
    local chunk = load("return " .. text, "=repl", "t", env)
    if chunk then
        return chunk
    end
    local err
    chunk, err = load(text:gsub("^%s*=", "return "), "=repl", "t", env)
    if chunk then
        return chunk
    end
    return nil, not err:find "<eof>$" and err or nil
end

---@class sm.Repl
local Repl = {}
Repl.__index = Repl

-- Print above the line that is being typed.
function Repl:say(text)
    local shown = self.editor.shown
    self.editor:hide()
    self.write((text:gsub("\r?\n", "\r\n")) .. (text:sub(-1) == "\n" and "" or "\r\n"))
    if shown then
        self.editor:show()
    end
end

-- Look for a Ctrl-C among the keys; others are kept for the editor. In a
-- computation, so without the loop.
local function watch_keys(self)
    return function()
        local bytes = self.keys_fd and uv.fs_read(self.keys_fd, 256, -1)
        if type(bytes) == "string" and bytes ~= "" then
            local at = bytes:find("\3", 1, true)
            if at then
                self.typed = bytes:sub(at + 1)
                error(INTERRUPTED, 0)
            end
            self.typed = self.typed .. bytes
        end
    end
end

local function results(self, ok, ...)
    if not ok then
        local err = ...
        self:say(type(err) == "string" and err or "error: " .. show.value(err))
        return
    end
    local n = select("#", ...)
    if n > 0 then
        local texts = {}
        for i = 1, n do
            texts[i] = show.value((select(i, ...)))
        end
        self:say(table.concat(texts, "\t"))
        self.env._ = (...)
    end
end

local function own_traceback(err)
    if type(err) ~= "string" or err == INTERRUPTED then
        return err
    end
    local lines = {}
    for line in debug.traceback(err, 2):gmatch "[^\n]+" do
        if line:find "in function 'xpcall'" or line:find "%[C%]: in %?" then
            break
        end
        lines[#lines + 1] = line
    end
    if lines[#lines]:find "^%s+%[C%]" then
        lines[#lines] = nil
    end
    return #lines > 2 and table.concat(lines, "\n") or lines[1]
end

-- Run a chunk as a task; the prompt comes back when it is done.
local function evaluate(self, chunk)
    self.task = loop.spawn(function()
        debug.sethook(watch_keys(self), "", HOOK_COUNT)
        results(self, xpcall(chunk, own_traceback))
        debug.sethook()
        self.task = nil
        if not self.over then
            self:prompt()
            self:feed ""
        end
    end)
end

function Repl:prompt()
    self.editor:begin(self.pending and ">> " or "> ")
end

local function on_line(self, line)
    local text = self.pending and self.pending .. "\n" .. line or line
    if not text:find "%S" then
        return self:prompt()
    end
    local chunk, err = compile(text, self.env)
    if not chunk and not err then
        self.pending = text
        return self:prompt()
    end
    self.pending = nil
    if self.editor:remember(text) and self.history_path then
        append_history(self.history_path, text)
    end
    if not chunk then
        self:say(err)
        return self:prompt()
    end
    evaluate(self, chunk)
end

local function interrupt(self)
    if self.task then
        local task = self.task
        self.task = nil
        task.quiet = true
        task:cancel()
        self:say "interrupted"
    end
    self.pending = nil
    self:prompt()
end

-- Keys from the terminal.
function Repl:feed(bytes)
    if self.task then -- only Ctrl-C matters; the rest waits
        self.typed = self.typed .. bytes
        local at = self.typed:find("\3", 1, true)
        if at then
            self.typed = self.typed:sub(at + 1)
            interrupt(self)
        end
        return
    end
    bytes, self.typed = self.typed .. bytes, ""
    repeat
        local event, line = self.editor:feed(bytes)
        bytes = ""
        if event == "line" then
            on_line(self, line)
        elseif event == "interrupt" then
            interrupt(self)
        elseif event == "end" then
            self:quit()
        end
    until not event or self.task or self.over
end

function Repl:quit(code)
    self.over, self.code = true, code or 0
    if self.settle then
        self.settle()
    end
end

-- ---- the names a line sees ----

-- Tell a machine's events to fn, or print them, until it stops.
local function on_event(self, vm, fn)
    if type(vm) == "table" and vm.parts then -- its own task takes them
        return vm:on_event(function(event)
            local ok, err = pcall(fn, event)
            if not ok then
                self:say("on_event: " .. tostring(err))
            end
        end)
    end
    return loop.spawn(function()
        while true do
            local event
            if type(vm) == "userdata" then
                loop.readable(vm:pollfd())
                event = vm:next()
            else
                event = vm:next_event()
                if not event then
                    return
                end
            end
            if event then
                local ok, err = pcall(fn or print, event)
                if not ok then
                    self:say("on_event: " .. tostring(err))
                end
                if event.type == "state" and event.state == "stopped" then
                    return
                end
            end
        end
    end)
end

local function environment(self)
    local env = {
        sm = require "sm", core = require "sm.core", worker = require "sm.worker", loop = loop,
        inspect = require "sm.inspect", symbols = require "sm.symbols", trace = require "sm.trace",
    }
    function env.print(...)
        local texts = table.pack(...)
        for i = 1, texts.n do
            texts[i] = type(texts[i]) == "table" and show.value(texts[i]) or tostring(texts[i])
        end
        self:say(table.concat(texts, "\t"))
    end
    function env.help(what)
        self:say(help_text(what))
    end
    function env.quit(code)
        self:quit(code)
    end
    env.exit = env.quit
    function env.on_event(vm, fn)
        return on_event(self, vm, fn or env.print)
    end
    return setmetatable(env, { __index = _G })
end

-- ---- the beginning and the end ----

local function open_terminal(self)
    self.tty = assert(uv.new_tty(0, true))
    -- A second way to the keys, that does not wait; see watch_keys.
    local flags = uv.constants.O_RDONLY | uv.constants.O_NONBLOCK | (uv.constants.O_NOCTTY or 0)
    self.keys_fd = uv.fs_open("/proc/self/fd/0", flags, 0)
    assert(self.tty:set_mode(1))
    self.editor.columns = self.tty:get_winsize() or 80
    self.winch = assert(uv.new_signal())
    self.winch:start("sigwinch", loop.guard(function()
        self.editor.columns = self.tty:get_winsize() or 80
        if self.editor.shown then
            self.editor:show()
        end
    end))
    self.winch:unref()
    self.tty:read_start(loop.guard(function(err, bytes)
        if err or not bytes then
            self:quit()
        else
            self:feed(bytes)
        end
    end))
end

local function close_terminal(self)
    uv.tty_reset_mode()
    for _, handle in ipairs { self.tty, self.winch } do
        if not handle:is_closing() then
            handle:close()
        end
    end
    if self.keys_fd then
        uv.fs_close(self.keys_fd)
    end
    -- luv 1.44 crashes when the Lua state ends with a handle half closed.
    for _ = 1, 3 do
        uv.run "nowait"
    end
end

local function new()
    local self = setmetatable({ typed = "" }, Repl)
    self.write = function(text)
        io.stdout:write(text)
        io.stdout:flush()
    end
    self.env = environment(self)
    local dir = state_dir()
    if require("sm.paths").make(dir) then
        self.history_path = dir .. "/history"
    end
    self.editor = lineedit.new {
        write = self.write,
        history = self.history_path and read_history(self.history_path),
        complete = function(text)
            return M.complete(self.env, text)
        end,
    }
    return self
end

-- Without a terminal: lines of standard input, as a script that prints.
local function run_plain()
    local chunk, err = load(io.read "a", "=stdin")
    if not chunk then
        io.stderr:write("sm: ", err, "\n")
        return 1
    end
    loop.run(chunk)
    loop.finish()
    return 0
end

--- Read, run and print until the end of input or quit(). Not in a task.
---@return integer code
function M.run()
    if uv.guess_handle(0) ~= "tty" then
        return run_plain()
    end
    local self = new()
    open_terminal(self)
    local _ <close> = setmetatable({}, { __close = function()
        close_terminal(self)
    end })
    self:say(BANNER:format(require "sm.version"))
    self:prompt()
    while not self.over do
        -- An error of a task that nobody joined ends no session.
        local ok, err = pcall(loop.run, function()
            loop.await(function(settle)
                self.settle = settle
            end)
        end)
        if not ok then
            self:say("a task failed: " .. tostring(err))
        end
    end
    return self.code
end

return M
