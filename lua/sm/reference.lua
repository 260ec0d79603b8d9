-- SPDX-License-Identifier: Apache-2.0
--
-- Image references: `[host[:port]/]path[:tag][@digest]`, parsed once, into a
-- table that the rest of the image side works with. Docker's conventions fill
-- what is missing: no host is docker.io, a one-word path there is below
-- `library/`, no tag and no digest is `latest`. A digest wins over a tag.
--
-- Grammar: OCI distribution-spec ("pull", names and tags), image-spec
-- (descriptor digests). Nothing here touches the network or the disk.

local M = {}

---@class sm.Reference
---@field registry string host[:port] as people write it, "docker.io" for the default
---@field host string host[:port] to talk to
---@field path string repository, e.g. "library/alpine"
---@field tag string?
---@field digest string? "algorithm:hex"

M.default_registry = "docker.io"
M.default_tag = "latest"

-- Where the API of a registry lives when that is not the name people write.
local api_hosts = { ["docker.io"] = "registry-1.docker.io" }
local aliases = { ["index.docker.io"] = "docker.io" }

-- Hex digits of each digest algorithm we can check.
local digest_digits = { sha256 = 64, sha512 = 128 }

--- Check a digest before it becomes part of any path or address.
--- Returns algorithm and hex digits, or nil and what is wrong.
---@param text any
---@return string? algorithm
---@return string hex_or_error
function M.parse_digest(text)
    if type(text) ~= "string" then
        return nil, "a digest is missing"
    end
    local algorithm, hex = text:match("^([^:]+):([^:]*)$")
    if not algorithm then
        return nil, ("invalid digest %q: expected algorithm:hex"):format(text)
    end
    local digits = digest_digits[algorithm]
    if not digits then
        return nil, ("digest %q: algorithm not supported, expected sha256 or sha512"):format(text)
    end
    if #hex ~= digits or hex:find("[^0-9a-f]") then
        return nil, ("invalid digest %q: %s has %d lowercase hex digits")
            :format(text, algorithm, digits)
    end
    return algorithm, hex
end

--- A digest as one file name, "sha256-ab…". It was checked when it came in, and is
--- checked again here, because this is where it becomes a path.
---@param digest string
---@return string
function M.file_name(digest)
    local algorithm, hex = assert(M.parse_digest(digest))
    return algorithm .. "-" .. hex
end

-- One path component: [a-z0-9]+ joined by ".", "_", "__" or any number of "-".
local function component_ok(text)
    if not text:find("^[a-z0-9]") or not text:find("[a-z0-9]$") or text:find("[^a-z0-9._-]") then
        return false
    end
    for run in text:gmatch("[._-]+") do
        if not (run == "." or run == "_" or run == "__" or run:find("^%-+$")) then
            return false
        end
    end
    return true
end

local function check_host(host)
    local name, port = host:match("^(%[[%x:.]+%])(.*)$")
    if not name then
        name, port = host:match("^([^:]*)(.*)$")
        for label in (name .. "."):gmatch("([^.]*)%.") do
            if not label:find("^%w[%w-]*$") or label:find("%-$") then
                return ("%q is not a host name"):format(name)
            end
        end
    end
    if port ~= "" then
        local number = tonumber(port:match("^:(%d+)$"))
        if not number or number < 1 or number > 65535 then
            return ("%q is not a port"):format(port:gsub("^:", ""))
        end
    end
end

local function check_path(path)
    if path == "" then
        return "the repository name is missing"
    end
    if path:find("%u") then
        return ("the repository name must be lowercase: %q"):format(path:lower())
    end
    for part in (path .. "/"):gmatch("([^/]*)/") do
        if part == "" then
            return "the repository name has an empty component"
        end
        if not component_ok(part) then
            return ("%q is not a repository name component "
                .. "(a-z and 0-9, separated by one of . _ __ -)"):format(part)
        end
    end
end

-- The first component is a host if it looks like one (Docker's rule).
local function split_host(rest)
    local first, path = rest:match("^([^/]*)/(.*)$")
    if first and (first:find("[.:%u]") or first == "localhost") then
        return aliases[first:lower()] or first:lower(), path
    end
    return M.default_registry, rest
end

local function parse(text)
    local rest, digest = text, nil
    local at = rest:find("@", 1, true)
    if at then
        rest, digest = rest:sub(1, at - 1), rest:sub(at + 1)
        local algorithm, why = M.parse_digest(digest)
        if not algorithm then
            return nil, why
        end
    end

    local tag
    local before, after = rest:match("^(.*):([^:/]*)$")
    if before then
        rest, tag = before, after
        if not tag:find("^[%w_][%w._-]*$") or #tag > 128 then
            return nil, ("%q is not a tag (letters, digits, _ . -, at most 128)"):format(tag)
        end
    end

    local registry, path = split_host(rest)
    local why = check_host(registry) or check_path(path)
    if why then
        return nil, why
    end
    if registry == M.default_registry and not path:find("/", 1, true) then
        if #path == 64 and not path:find("%X") then
            return nil, "64 hex digits alone are an id, not a name; write NAME@sha256:DIGITS"
        end
        path = "library/" .. path
    end
    if #registry + 1 + #path > 255 then
        return nil, "the name is longer than 255 characters"
    end
    if not tag and not digest then
        tag = M.default_tag
    end
    return {
        registry = registry,
        host = api_hosts[registry] or registry,
        path = path,
        tag = tag,
        digest = digest,
    }
end

--- Parse what a person wrote. Returns the reference, or nil and one line that
--- says what is wrong.
---@param text string
---@return sm.Reference?
---@return string? error
function M.parse(text)
    if type(text) ~= "string" or text == "" then
        return nil, "invalid reference: empty"
    end
    if text:find("[%s%c]") then
        return nil, ("invalid reference %q: it holds white space"):format(text)
    end
    if text:find("://", 1, true) then
        return nil, ("invalid reference %q: write HOST/NAME:TAG, without a scheme"):format(text)
    end
    local ref, why = parse(text)
    if not ref then
        return nil, ("invalid reference %q: %s"):format(text, why)
    end
    return ref
end

--- The full name, with nothing left to convention:
--- "docker.io/library/alpine:latest". With a digest the tag is dropped, since
--- the digest decides.
---@param ref sm.Reference
---@return string
function M.format(ref)
    local name = ref.registry .. "/" .. ref.path
    if ref.digest then
        return name .. "@" .. ref.digest
    end
    return name .. ":" .. ref.tag
end

--- The short name people know: "alpine:latest".
---@param ref sm.Reference
---@return string
function M.familiar(ref)
    local text = M.format(ref)
    if ref.registry == M.default_registry then
        text = text:sub(#M.default_registry + 2):gsub("^library/", "", 1)
    end
    return text
end

return M
