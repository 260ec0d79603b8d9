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
local files = require "sm.files"
local reference = require "sm.reference"
local toml = require "sm.toml"

local M = {}

---@class sm.Place one place where a repository is
---@field ref sm.Reference what to ask for there
---@field insecure boolean plain HTTP and unchecked certificates are allowed
---@field cafile string?
---@field certfile string?
---@field keyfile string?

local function config_home(getenv)
    local home = getenv "HOME"
    local dir = getenv "XDG_CONFIG_HOME"
    return dir and dir ~= "" and dir or home and home .. "/.config" or nil
end

-- The files in a folder whose names end so, in order.
local function ending(dir, suffix)
    local out = {}
    for _, entry in ipairs(files.list(dir)) do
        if entry.name:sub(-#suffix) == suffix then
            out[#out + 1] = dir .. "/" .. entry.name
        end
    end
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
        for _, path in ipairs(ending(base .. ".d", ".conf")) do
            list[#list + 1] = path
        end
    end
    return list
end

-- Any kind of file will do, /dev/null too: by that a configuration is switched off.
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

-- The entry with the longest prefix that covers the name, and how much it covers.
local function best(by_prefix, name)
    local found, covered, length = nil, 0, 0
    for prefix, entry in pairs(by_prefix) do
        local n = covers(prefix, name)
        if n and #prefix > length then
            found, covered, length = entry, n, #prefix
        end
    end
    return found, covered
end

-- Adds what certs.d has for the place's host.
local function certificates(place, getenv)
    local host = place.ref.host
    local own = config_home(getenv)
    for _, base in ipairs { own and own .. "/containers" or "/etc/containers", "/etc/containers", "/etc/docker" } do
        local dir = ("%s/certs.d/%s"):format(base, host)
        local crt, cert = ending(dir, ".crt"), ending(dir, ".cert")
        if #crt > 1 then
            return ("%s: more than one .crt; put them into one file"):format(dir)
        end
        place.cafile = place.cafile or crt[1]
        if cert[1] and not place.certfile then
            place.certfile = cert[1]
            place.keyfile = place.certfile:gsub("%.cert$", ".key")
            if not uv.fs_stat(place.keyfile) then
                return ("%s: its .key is not there"):format(place.certfile)
            end
        end
    end
end

-- What an entry says to ask, best first: {location (nil: where the name says), insecure}.
local function candidates(entry)
    local out = {}
    for _, mirror in ipairs(entry.mirror or {}) do
        out[#out + 1] = { location = mirror.location, insecure = mirror.insecure }
    end
    -- A wildcard prefix says what is meant, not where it is.
    local elsewhere = entry.location ~= (entry.prefix or entry.location)
    out[#out + 1] = { location = elsewhere and entry.location or nil, insecure = entry.insecure }
    return out
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
    local entry, covered = best(by_prefix, name)
    if entry and entry.blocked then
        return nil, ("%s is blocked by %s"):format(ref.registry, entry.source)
    end
    local places = {}
    for i, candidate in ipairs(candidates(entry or {})) do
        local other = ref
        if candidate.location then
            other, why = moved(ref, candidate.location, name:sub(covered + 1))
            if not other then
                return nil, ("%s: %s"):format(entry.source, why)
            end
        end
        places[i] = { ref = other, insecure = candidate.insecure or false }
        why = certificates(places[i], getenv)
        if why then
            return nil, why
        end
    end
    return places
end

return M
