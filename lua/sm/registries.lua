-- SPDX-License-Identifier: Apache-2.0
--
-- Where the images of a registry are to be had on this machine, and whom to
-- believe there: the files that Podman and skopeo (containers-registries.conf(5),
-- version 2; containers-certs.d(5)) and Docker (/etc/docker/certs.d) read, too.
--
--   registries.conf     mirrors, another location, insecure, blocked
--   certs.d/HOST[:PORT] *.crt: authorities to believe besides the system's;
--                       NAME.cert with NAME.key: who we are to a server that asks
--
-- $CONTAINERS_REGISTRIES_CONF is the only registries.conf if it is set; otherwise
-- the user's, or else the system's, and over it the files in registries.conf.d.
-- A file that cannot be understood is an error: pulling from where it does not say
-- would be worse. Short names are Docker's; [aliases] and search lists are not used.

local uv = require "luv"
local reference = require "sm.reference"
local toml = require "sm.toml"

local M = {}

---@class sm.Place one place where a repository is
---@field ref sm.Reference what to ask for there
---@field insecure boolean plain HTTP and unchecked certificates are allowed
---@field mirror boolean not the registry itself
---@field cafile string?
---@field certfile string?
---@field keyfile string?

local function config_home(getenv)
    local home = getenv "HOME"
    local dir = getenv "XDG_CONFIG_HOME"
    return dir and dir ~= "" and dir or home and home .. "/.config" or nil
end

-- The names in a folder that end so, sorted; a folder that is not there has none.
local function names(dir, suffix)
    local out = {}
    local req = uv.fs_scandir(dir)
    while req do
        local name = uv.fs_scandir_next(req)
        if not name then
            break
        elseif name:sub(-#suffix) == suffix then
            out[#out + 1] = name
        end
    end
    table.sort(out)
    return out
end

--- The registries.conf files that count, in the order they are read.
---@param getenv fun(name: string): string?
---@return string[]
function M.files(getenv)
    local alone = getenv "CONTAINERS_REGISTRIES_CONF"
    if alone and alone ~= "" then
        return { alone }
    end
    local system = "/etc/containers/registries.conf"
    local own = config_home(getenv)
    own = own and own .. "/containers/registries.conf"
    local list = { own and uv.fs_stat(own) and own or system }
    for _, base in ipairs { system, own } do
        for _, name in ipairs(names(base .. ".d", ".conf")) do
            list[#list + 1] = base .. ".d/" .. name
        end
    end
    return list
end

local function read(path)
    local file, why, code = io.open(path, "rb")
    if not file then
        return nil, (code ~= 2 and code ~= 20) and why or nil
    end
    local text, failed = file:read "a"
    file:close()
    return text, text == nil and ("%s: %s"):format(path, failed) or nil
end

local shapes = {
    registry = { prefix = "string", location = "string", insecure = "boolean", blocked = "boolean" },
    mirror = { location = "string", insecure = "boolean" },
}

local function check(entry, kind)
    for key, wanted in pairs(shapes[kind]) do
        local got = type(entry) == "table" and entry[key]
        if type(entry) ~= "table" or (got ~= nil and type(got) ~= wanted) then
            return ("%s of a [[%s]]: expected a %s"):format(key, kind, wanted)
        end
    end
    if kind == "mirror" and not entry.location then
        return "a mirror without a location"
    end
end

local function check_registry(entry)
    local why = check(entry, "registry")
    if not why and not (entry.prefix or entry.location) then
        why = "a [[registry]] without a location or prefix"
    elseif not why and entry.mirror ~= nil and type(entry.mirror) ~= "table" then
        why = "mirror is not an array of tables"
    end
    for _, mirror in ipairs(not why and entry.mirror or {}) do
        why = why or check(mirror, "mirror")
    end
    return why
end

-- All [[registry]] entries by prefix; a later file's replaces an earlier one's.
local function load(getenv)
    local by_prefix = {}
    for _, path in ipairs(M.files(getenv)) do
        local text, why = read(path)
        if why then
            return nil, why
        end
        local doc
        doc, why = toml.decode(text or "")
        if not doc then
            return nil, ("%s: %s"):format(path, why)
        end
        local list = doc.registry or {}
        why = type(list) ~= "table" and "registry is not an array of tables" or nil
        for _, entry in ipairs(not why and list or {}) do
            why = why or check_registry(entry)
            if not why then
                entry.source = path
                by_prefix[entry.prefix or entry.location] = entry
            end
        end
        if why then
            return nil, ("%s: %s"):format(path, why)
        end
    end
    return by_prefix
end

-- How much of the name the prefix covers, in bytes; nil: it is not the name's.
local function covers(prefix, name)
    if prefix:sub(1, 2) == "*." then
        local host = name:match "^[^/:]*"
        local tail = prefix:sub(2)
        return #host > #tail and host:sub(-#tail) == tail and #host or nil
    end
    local after = name:sub(#prefix + 1, #prefix + 1)
    return name:sub(1, #prefix) == prefix and (after == "" or after:find "^[/:@]") and #prefix or nil
end

-- "host/path" as it is found at a location, with the tag and digest of ref.
local function moved(ref, location, rest)
    local name = (location:gsub("/+$", "")) .. rest
    local other, why = reference.parse(name .. (ref.tag and ":" .. ref.tag or "")
        .. (ref.digest and "@" .. ref.digest or ""))
    if not other then
        return nil, ("location %q: %s"):format(location, why)
    end
    return other
end

local function best(by_prefix, name)
    local found, length = nil, 0
    for prefix, entry in pairs(by_prefix) do
        local n = covers(prefix, name)
        if n and #prefix > length then
            found, length = entry, #prefix
            entry.covered = n
        end
    end
    return found
end

-- Adds what certs.d has for the place's host.
local function certificates(place, getenv)
    local host = place.ref.host
    local own = config_home(getenv)
    for _, base in ipairs { own and own .. "/containers" or "/etc/containers", "/etc/containers", "/etc/docker" } do
        local dir = ("%s/certs.d/%s"):format(base, host)
        local crt, cert = names(dir, ".crt"), names(dir, ".cert")
        if #crt > 1 then
            return ("%s: more than one .crt; put them into one file"):format(dir)
        end
        place.cafile = place.cafile or crt[1] and dir .. "/" .. crt[1]
        if cert[1] and not place.certfile then
            place.certfile = dir .. "/" .. cert[1]
            place.keyfile = place.certfile:gsub("%.cert$", ".key")
            if not uv.fs_stat(place.keyfile) then
                return ("%s: its .key is not there"):format(place.certfile)
            end
        end
    end
end

--- The places to look for what a reference names, best first: mirrors in the order
--- they are given, then the registry (or where its location says).
---@param ref sm.Reference
---@param getenv? fun(name: string): string?
---@return sm.Place[]?
---@return string? error
function M.places(ref, getenv)
    getenv = getenv or os.getenv
    local by_prefix, why = load(getenv)
    if not by_prefix then
        return nil, why
    end
    local name = ref.registry .. "/" .. ref.path
    local entry = best(by_prefix, name)
    local places = {}
    local function add(location, rest, insecure, mirror)
        local other = ref
        if location then
            other, why = moved(ref, location, rest)
        end
        if other then
            places[#places + 1] = { ref = other, insecure = insecure or false, mirror = mirror }
            why = certificates(places[#places], getenv)
        end
        return not why
    end
    if not entry then
        add()
    elseif entry.blocked then
        return nil, ("%s is blocked by %s"):format(ref.registry, entry.source)
    else
        local rest = name:sub(entry.covered + 1)
        for _, mirror in ipairs(entry.mirror or {}) do
            if not add(mirror.location, rest, mirror.insecure, true) then
                break
            end
        end
        -- A wildcard prefix says what is meant, not where it is.
        local elsewhere = not why and entry.location ~= (entry.prefix or entry.location) and entry.location
        if not why then
            add(elsewhere or nil, rest, entry.insecure, false)
        end
        why = why and ("%s: %s"):format(entry.source, why)
    end
    if why then
        return nil, why
    end
    return places
end

return M
