-- SPDX-License-Identifier: Apache-2.0
--
-- Who we are to a registry: the credential files and helper programs that
-- Docker, Podman and skopeo share (containers-auth.json(5), Docker's
-- config.json). Asked only after a registry answered 401, so that a public
-- pull never starts a helper.
--
-- Files in order; within one file credHelpers[host], then credsStore, then
-- auths, whose most specific key wins. The first answer ends the search. A
-- file that is not there is skipped, one that cannot be understood is an
-- error: silently pulling as somebody else would be worse.

local child = require "sm.child"
local uv = require "luv"
local base64 = require "sm.base64"
local json = require "sm.json"
local loop = require "sm.loop"

local M = {}

---@class sm.Credential
---@field username string?
---@field password string?
---@field identity_token string? an OAuth2 refresh token
---@field registry_token string? a bearer token to use as it is
---@field source string where it came from, for messages

local helper_timeout_s = 60
local helper_limit_bytes = 64 * 1024
local docker_hub_key = "https://index.docker.io/v1/"

--- The files that may hold credentials, best first.
---@param getenv? fun(name: string): string?
---@return string[]
function M.files(getenv)
    getenv = getenv or os.getenv
    local home = getenv("HOME")
    local runtime = getenv("XDG_RUNTIME_DIR") or ("/run/containers/" .. uv.getuid())
    local list = {}
    local function add(dir, name)
        if dir and dir ~= "" then
            list[#list + 1] = dir .. name
        end
    end
    add(getenv("REGISTRY_AUTH_FILE"), "")
    add(runtime, getenv("XDG_RUNTIME_DIR") and "/containers/auth.json" or "/auth.json")
    add(getenv("XDG_CONFIG_HOME") or (home and home .. "/.config"), "/containers/auth.json")
    add(getenv("DOCKER_CONFIG") or (home and home .. "/.docker"), "/config.json")
    return list
end

-- Names under which a file may know the registry, most specific first:
-- host/a/b, host/a, host. Docker Hub goes by three names.
local function keys_for(registry, path)
    local hosts = { registry }
    if registry == "docker.io" then
        hosts = { "docker.io", "index.docker.io", docker_hub_key }
    end
    local keys = {}
    local rest = path
    while rest and rest ~= "" do
        keys[#keys + 1] = registry .. "/" .. rest
        rest = rest:match("^(.*)/[^/]*$")
    end
    table.move(hosts, 1, #hosts, #keys + 1, keys)
    return keys, hosts
end

-- Old Docker wrote addresses as keys: https://host/v1/ means host.
local function legacy_host(key)
    local host, tail = key:gsub("^https?://", ""):match("^([^/]*)(.*)$")
    if tail == "" or tail == "/" or tail:find("^/v[12]/?$") then
        return host
    end
end

local function from_entry(entry, source)
    if not json.is_object(entry) then
        return nil, source .. ": an entry of auths is not an object"
    end
    local cred = {
        username = entry.username,
        password = entry.password,
        identity_token = entry.identitytoken,
        registry_token = entry.registrytoken,
        source = source,
    }
    if type(entry.auth) == "string" and entry.auth ~= "" then
        local plain = base64.decode(entry.auth)
        local user, password = (plain or ""):match("^([^:]*):(.*)$")
        if not user then
            return nil, source .. ": an entry of auths holds no base64 of user:password"
        end
        cred.username, cred.password = user, password:gsub("\0+$", "")
    end
    for key, value in pairs(cred) do
        if type(value) ~= "string" or value:find("[\r\n]") then
            return nil, ("%s: %s must be one line of text"):format(source, key)
        elseif value == "" then
            cred[key] = nil
        end
    end
    if cred.username or cred.identity_token or cred.registry_token then
        return cred
    end
    return false -- an empty entry: Docker leaves those behind beside a helper
end

local function from_auths(auths, keys, source)
    if auths == nil then
        return nil
    end
    if not json.is_object(auths) then
        return nil, source .. ": auths is not an object"
    end
    for _, key in ipairs(keys) do
        if auths[key] then
            local cred, why = from_entry(auths[key], source)
            if cred ~= false then
                return cred, why
            end
        end
    end
    for key, entry in pairs(auths) do
        local host = legacy_host(key)
        for _, wanted in ipairs(keys) do
            if host == wanted then
                local cred, why = from_entry(entry, source)
                if cred ~= false then
                    return cred, why
                end
            end
        end
    end
end

-- A pipe that already holds `text` and its end: the child's stdin. Writing to
-- the child itself could raise SIGPIPE in a host program; this cannot.
local function filled_pipe(text)
    local fds = assert(uv.pipe({}, {}))
    assert(uv.fs_write(fds.write, text))
    uv.fs_close(fds.write)
    return fds.read
end

-- Run a program without a shell; its exit code and stdout, or nil and why.
-- Yields.
local function run(program, args, input, timeout)
    return loop.await(function(settle)
        local stdin, stdout = filled_pipe(input), uv.new_pipe()
        local out, size, code, ended = {}, 0, nil, false
        local function check()
            if code and ended then
                settle(code, table.concat(out))
            end
        end
        local process, why = child.spawn(program, { args = args, stdio = { stdin, stdout, 2 } },
            loop.guard(function(exit_code, signal, _)
                code = signal ~= 0 and 128 + signal or exit_code
                check()
            end))
        uv.fs_close(stdin)
        if not process then
            stdout:close(loop.guard(function()
                settle(nil, why)
            end))
            return
        end
        local function finish()
            ended = true
            if not stdout:is_closing() then
                stdout:close()
            end
            check()
        end
        stdout:read_start(loop.guard(function(_, chunk)
            size = size + #(chunk or "")
            if chunk and size <= helper_limit_bytes then
                out[#out + 1] = chunk
                return
            elseif chunk then
                process:kill("sigkill")
            end
            finish()
        end))
        return function()
            process:kill("sigkill")
            finish()
        end
    end, timeout)
end

-- Ask docker-credential-<name>. false: it works and knows nothing. Yields.
local function from_helper(name, server, source)
    if type(name) ~= "string" or not name:find("^[%w._-]+$") then
        return nil, ("%s: %q is not a credential helper's name"):format(source, tostring(name))
    end
    local program = "docker-credential-" .. name
    local code, out = run(program, { "get" }, server .. "\n", helper_timeout_s)
    if not code then
        return nil, ("%s names the credential helper %s: %s"):format(source, program, out)
    end
    if code ~= 0 then
        if out:lower():find("credentials not found", 1, true) then
            return false
        end
        return nil, ("%s failed: %s"):format(program,
            out:match("^%s*([^\r\n]+)") or "exit code " .. code)
    end
    local answer, why = json.decode_object(out)
    if not answer then
        return nil, ("%s: its answer is %s"):format(program, why)
    end
    local user, secret = answer.Username, answer.Secret
    if type(user) ~= "string" or type(secret) ~= "string" or (user .. secret):find("[\r\n]") then
        return nil, program .. ": its answer lacks Username or Secret"
    end
    if secret == "" then
        return false
    end
    if user == "<token>" then
        return { identity_token = secret, source = program }
    end
    return { username = user, password = secret, source = program }
end

local function read_file(path)
    local file, why, code = io.open(path, "rb")
    if not file then
        -- Not there, or not for us to read: the next file.
        return nil, (code ~= 2 and code ~= 20 and code ~= 13) and why or nil
    end
    local text = file:read("a")
    file:close()
    return text
end

local function from_file(path, registry, repository)
    local text, why = read_file(path)
    if not text or text:find("^%s*$") then
        return nil, why
    end
    local doc
    doc, why = json.decode_object(text)
    if not doc then
        return nil, ("%s: %s"):format(path, why)
    end
    local keys, hosts = keys_for(registry, repository)
    local helpers = json.is_object(doc.credHelpers) and doc.credHelpers or {}
    for _, host in ipairs(hosts) do
        if helpers[host] then
            -- A helper named for this very host has the last word in its file.
            local cred, failed = from_helper(helpers[host], host, path)
            return cred or nil, failed
        end
    end
    if doc.credsStore then
        local server = registry == "docker.io" and docker_hub_key or registry
        local cred, failed = from_helper(doc.credsStore, server, path)
        if cred or failed then
            return cred, failed
        end
    end
    return from_auths(doc.auths, keys, path)
end

--- Find credentials for a repository. nil without an error means anonymous.
--- May run a helper program. Yields.
---@async
---@param registry string as in a reference: "docker.io", "host:5000"
---@param repository string? path within it
---@param getenv? fun(name: string): string?
---@return sm.Credential?
---@return string? error
function M.find(registry, repository, getenv)
    for _, path in ipairs(M.files(getenv)) do
        local cred, why = from_file(path, registry, repository)
        if cred then
            return cred
        elseif why then
            return nil, "credentials: " .. why
        end
    end
    return nil
end

return M
