-- SPDX-License-Identifier: Apache-2.0
--
-- What to run in a guest: an image's configuration (OCI image-spec,
-- "config.md") with a user's overrides on top, by Docker's habits:
--
--   * argv is Entrypoint followed by Cmd; a command replaces Cmd, an
--     entrypoint replaces Entrypoint and drops the image's Cmd;
--   * the environment starts from a default PATH (and HOSTNAME, and TERM with
--     a terminal), then the image's Env, then the user's; a name alone takes
--     the host's value, and takes the variable away where the host has none;
--   * the working directory is `/` unless said, the user is root.
--
-- User names are resolved inside the guest, against the image's own passwd.
-- Everything from the image is checked here: it is a stranger's document.

local files = require "sm.files"
local json = require "sm.json"

local M = {}

M.default_path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

local env_file_limit_bytes = 1 << 20

-- Linux numbers, the same on x86_64 and arm64.
local signals = {
    HUP = 1, INT = 2, QUIT = 3, ILL = 4, TRAP = 5, ABRT = 6, IOT = 6, BUS = 7, FPE = 8, KILL = 9,
    USR1 = 10, SEGV = 11, USR2 = 12, PIPE = 13, ALRM = 14, TERM = 15, STKFLT = 16, CHLD = 17,
    CLD = 17, CONT = 18, STOP = 19, TSTP = 20, TTIN = 21, TTOU = 22, URG = 23, XCPU = 24,
    XFSZ = 25, VTALRM = 26, PROF = 27, WINCH = 28, IO = 29, POLL = 29, PWR = 30, SYS = 31,
}
local rtmin, rtmax = 34, 64

--- A signal's number from "SIGTERM", "TERM", "15" or "RTMIN+3".
---@param name string|integer
---@return integer? number
---@return string? error
function M.signal(name)
    local text = tostring(name):upper():gsub("^SIG", "")
    local number = signals[text]
    if not number and text:find("^%d+$") then
        number = tonumber(text)
    end
    if not number then
        local edge, offset = text:match("^RT(M%u%u)([+-]?%d*)$")
        if edge == "MIN" and (offset == "" or offset:find("^%+%d")) then
            number = rtmin + (tonumber(offset) or 0)
        elseif edge == "MAX" and (offset == "" or offset:find("^%-%d")) then
            number = rtmax + (tonumber(offset) or 0)
        end
    end
    if not number or number < 1 or number > rtmax then
        return nil, ("unknown signal %q"):format(tostring(name))
    end
    return math.tointeger(number)
end

-- A list of strings without NUL, or nil and why.
local function string_list(value, what)
    if value == nil then
        return {}
    end
    if not json.is_array(value, "string") then
        return nil, what .. " must be a list of strings"
    end
    for _, word in ipairs(value) do
        if word:find("\0", 1, true) then
            return nil, what .. " holds a NUL byte"
        end
    end
    return value
end

local function plain_string(value, what)
    if value ~= nil and (type(value) ~= "string" or value:find("[\0\n]")) then
        return nil, what .. " must be one line of text"
    end
    return value or ""
end

---@class sm.Environment ordered variables, one value a name
local Environment = {}
Environment.__index = Environment

local function new_environment()
    return setmetatable({ order = {}, values = {} }, Environment)
end

function Environment:set(name, value)
    if not self.values[name] then
        self.order[#self.order + 1] = name
    end
    self.values[name] = value
end

function Environment:unset(name)
    if self.values[name] then
        self.values[name] = nil
        for i, other in ipairs(self.order) do
            if other == name then
                table.remove(self.order, i)
                break
            end
        end
    end
end

function Environment:list()
    local list = {}
    for i, name in ipairs(self.order) do
        list[i] = name .. "=" .. self.values[name]
    end
    return list
end

-- One "NAME=value" or "NAME" (the host's value, or none).
local function apply(env, entry, lookup)
    local name, value = entry:match("^([^=]*)=(.*)$")
    name = name or entry
    if name == "" then
        return nil, ("environment %q: the name is missing"):format(entry)
    end
    value = value or lookup(name)
    if value then
        env:set(name, value)
    else
        env:unset(name)
    end
    return true
end

local function sorted_entries(map)
    local list = {}
    for name, value in pairs(map) do
        if type(name) ~= "string" or name == "" or name:find("=", 1, true) then
            return nil, ("environment: %q is not a variable's name"):format(tostring(name))
        end
        list[#list + 1] = value == false and name or name .. "=" .. tostring(value)
    end
    table.sort(list)
    return list
end

-- Overrides come as a list ("A=1", "B") or as a map {A = 1, B = false}; in
-- the map false takes a variable away, whatever the host has.
local function apply_overrides(env, given, lookup)
    local list = given
    if #given == 0 then
        local why
        list, why = sorted_entries(given)
        if not list then
            return nil, why
        end
        lookup = function() end
    end
    local ok, why = string_list(list, "env")
    if not ok then
        return nil, why
    end
    for _, entry in ipairs(list) do
        ok, why = apply(env, entry, lookup)
        if not ok then
            return nil, why
        end
    end
    return true
end

--- Parse a file of `NAME=value` lines as Docker does: `#` comments, no
--- quoting, a name alone takes the host's value if there is one.
---@param text string
---@param lookup? fun(name: string): string? the host's environment
---@return string[]? entries
---@return string? error "line N: reason"
function M.parse_env_file(text, lookup)
    lookup = lookup or os.getenv
    text = text:gsub("^\xEF\xBB\xBF", "")
    local list, number = {}, 0
    for line in (text .. "\n"):gmatch("(.-)\r?\n") do
        number = number + 1
        line = line:gsub("^%s+", "")
        if line ~= "" and line:sub(1, 1) ~= "#" then
            local name, value = line:match("^([^=]*)=(.*)$")
            if not name then
                name = line:gsub("%s+$", "")
                value = lookup(name)
            end
            if name == "" then
                return nil, ("line %d: the variable's name is missing"):format(number)
            elseif name:find("%s") then
                return nil, ("line %d: white space in the variable's name %q"):format(number, name)
            elseif line:find("\0", 1, true) or not utf8.len(line) then
                return nil, ("line %d: not UTF-8 text"):format(number)
            end
            if value then
                list[#list + 1] = name .. "=" .. value
            end
        end
    end
    return list
end

-- The variables of files, in the order of the files.
local function apply_files(env, names, lookup)
    for _, name in ipairs(type(names) == "string" and { names } or names) do
        local text, why = files.read(name, env_file_limit_bytes)
        local list
        if text then
            list, why = M.parse_env_file(text, lookup)
            why = why and name .. ": " .. why
        end
        if not list then
            return nil, "env file " .. why
        end
        for _, entry in ipairs(list) do
            apply(env, entry, lookup)
        end
    end
    return true
end

local function resolve_argv(config, over)
    local entrypoint, cmd, why
    if over.entrypoint ~= nil then
        local given = over.entrypoint
        if type(given) == "string" then
            given = given ~= "" and { given } or {}
        end
        entrypoint, why = string_list(given, "entrypoint")
        cmd = {}
    else
        entrypoint, why = string_list(config.Entrypoint, "the image's Entrypoint")
        if entrypoint then
            cmd, why = string_list(config.Cmd, "the image's Cmd")
        end
    end
    if entrypoint and cmd and over.cmd and #over.cmd > 0 then
        cmd, why = string_list(over.cmd, "cmd")
    end
    if not entrypoint or not cmd then
        return nil, why
    end
    local argv = table.move(cmd, 1, #cmd, #entrypoint + 1, { table.unpack(entrypoint) })
    if #argv == 0 then
        return nil, "no command: the image has neither Entrypoint nor Cmd, so give one"
    end
    if argv[1] == "" then
        return nil, "no command: its first word is empty"
    end
    return argv
end

local function resolve_env(config, over)
    local env = new_environment()
    env:set("PATH", M.default_path)
    if over.hostname then
        env:set("HOSTNAME", over.hostname)
    end
    if over.tty then
        env:set("TERM", over.term or "xterm")
    end
    local list, why = string_list(config.Env, "the image's Env")
    if not list then
        return nil, why
    end
    for _, entry in ipairs(list) do
        if entry:find("^[^=]+=") then -- anything else has no meaning: Docker ignores it too
            apply(env, entry)
        end
    end
    local lookup = over.lookup or os.getenv
    local ok = true
    if over.env_file then
        ok, why = apply_files(env, over.env_file, lookup)
    end
    if ok and over.env then
        ok, why = apply_overrides(env, over.env, lookup)
    end
    if not ok then
        return nil, why
    end
    return env:list()
end

local function resolve_cwd(config, over)
    local cwd, why = plain_string(over.workdir or config.WorkingDir, "the working directory")
    if not cwd then
        return nil, why
    end
    if over.workdir and cwd:sub(1, 1) ~= "/" then
        return nil, ("the working directory %q is not an absolute path"):format(cwd)
    end
    return cwd:sub(1, 1) == "/" and cwd or "/" .. cwd
end

local function resolve_hostname(_, over)
    local name = over.hostname
    if name == nil then
        return nil
    end
    if type(name) ~= "string" or #name > 64 or not name:find("^%w[%w.-]*$") then
        return nil, ("%q is not a host name (letters, digits, - and ., at most 64)")
            :format(tostring(name))
    end
    return name
end

local function resolve_user(config, over)
    local user, why = plain_string(over.user or config.User, "the user")
    if user == "" then
        return "0"
    end
    return user, why
end

local function resolve_stop_signal(config, over)
    return M.signal(over.stop_signal or config.StopSignal or "TERM")
end

-- In this order, so that an error is about the first thing that is wrong.
local parts = {
    { key = "hostname", resolve = resolve_hostname },
    { key = "argv", resolve = resolve_argv },
    { key = "env", resolve = resolve_env },
    { key = "cwd", resolve = resolve_cwd },
    { key = "user", resolve = resolve_user },
    { key = "stop_signal", resolve = resolve_stop_signal },
}

local function sorted_keys(map)
    local keys = {}
    if json.is_object(map) then
        for key in pairs(map) do
            keys[#keys + 1] = tostring(key)
        end
    end
    table.sort(keys)
    return keys
end

local known = {
    cmd = "table", entrypoint = true, env = "table", env_file = true, workdir = "string", user = "string",
    hostname = "string", tty = "boolean", term = "string", stop_signal = true, lookup = "function",
}

local function check_overrides(over)
    for key, value in pairs(over) do
        if not known[key] then
            error(("unknown override %q"):format(tostring(key)), 3)
        elseif known[key] ~= true and type(value) ~= known[key] then
            error(("override %s: expected a %s, got a %s"):format(key, known[key], type(value)), 3)
        end
    end
end

--- What to run, from an image's configuration document and overrides:
--- cmd {string…}, entrypoint (string or list), env (list or map), env_file
--- (path or list; `env` wins over it), workdir, user, hostname, tty, term,
--- stop_signal, lookup (the host's environment).
--- Returns {argv, env {"K=V"…}, cwd, user, stop_signal (number), hostname,
--- volumes, ports}, or nil and one line.
---@param image table the whole OCI configuration document
---@param over? table
---@return table? process
---@return string? error
function M.resolve(image, over)
    over = over or {}
    check_overrides(over)
    local config = image.config or {}
    if not json.is_object(config) then
        return nil, "image configuration: config must be an object"
    end
    local out, why = {
        volumes = sorted_keys(config.Volumes),
        ports = sorted_keys(config.ExposedPorts),
    }, nil
    for _, part in ipairs(parts) do
        out[part.key], why = part.resolve(config, over)
        if out[part.key] == nil and why then
            return nil, why
        end
    end
    return out
end

return M
