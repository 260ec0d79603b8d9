-- SPDX-License-Identifier: Apache-2.0
--
-- Answers to a registry's 401: challenges parsed (RFC 9110, 11.6.1), Bearer
-- tokens fetched, kept and renewed (distribution-spec token and OAuth2 flows),
-- Basic as the second choice.
--
-- Nothing is sent before it was asked for, credentials are looked up only
-- after a 401, and a token's server (the realm) is a stranger's word: it must
-- be https unless the registry itself is not, and must not point into our own
-- network (see `check_realm`). One token request per scope is in flight,
-- however many downloads wait for it.

local base64 = require "sm.base64"
local json = require "sm.json"
local loop = require "sm.loop"
local url = require "sm.url"

local M = {}

-- Registries may leave the life of a token out, or say nonsense.
local min_life_s = 60
-- Renew a little early: the request still has to travel.
local margin_s = 10
local token_limit_bytes = 64 * 1024
local client_id = "sm"

-- RFC 9110 token characters.
local token_class = "[%w!#$%%&'*+.^_`|~-]"

local function skip(text, at, class)
    return text:find("[^" .. class .. "]", at) or #text + 1
end

-- The value at `at` of an auth-param: a token or a quoted string.
local function parse_value(text, at)
    if text:sub(at, at) ~= '"' then
        local first, last = text:find("^[^%s,\"]+", at)
        if not first then
            return nil, at
        end
        return text:sub(first, last), last + 1
    end
    local out = {}
    at = at + 1
    while at <= #text do
        local c = text:sub(at, at)
        if c == '"' then
            return table.concat(out), at + 1
        elseif c == "\\" then
            at = at + 1
            c = text:sub(at, at)
        end
        out[#out + 1] = c
        at = at + 1
    end
    return nil, at -- an open quote: drop what it holds
end

local function parse_header(text, list)
    local at, challenge = 1, nil
    while true do
        at = skip(text, at, "%s,")
        if at > #text then
            return
        end
        local first, last = text:find("^" .. token_class .. "+", at)
        if not first then
            return -- nonsense from here on
        end
        local word = text:sub(first, last)
        local equals = text:match("^%s*=%s*()", last + 1)
        if challenge and equals then
            local value
            value, at = parse_value(text, equals)
            if value then
                challenge.params[word:lower()] = challenge.params[word:lower()] or value
            end
        else
            challenge = { scheme = word:lower(), params = {} }
            list[#list + 1] = challenge
            at = last + 1
            -- A scheme may carry one token68 in place of parameters (Negotiate).
            local blob = text:match("^ +[%w%-._~+/]+=*()%s*,", at)
                or text:match("^ +[%w%-._~+/]+=*()%s*$", at)
            at = blob or at
        end
    end
end

---@class sm.Challenge
---@field scheme string lowercase
---@field params table<string, string>

--- Every challenge of every WWW-Authenticate header, in order.
---@param headers string[][] {name, value} pairs
---@return sm.Challenge[]
function M.parse_challenges(headers)
    local list = {}
    for _, header in ipairs(headers) do
        if header[1]:lower() == "www-authenticate" then
            parse_header(header[2], list)
        end
    end
    return list
end

--- Whether a token may be asked for at `realm`. Returns it parsed, or nil and
--- why not.
---@param origin sm.Url the registry
---@param realm string?
---@return sm.Url?
---@return string? error
function M.check_realm(origin, realm)
    local target, why = url.parse(realm)
    if not target then
        return nil, "the registry's token realm: " .. why
    end
    local function refuse(reason)
        return nil, ("the registry's token realm %s %s; refused")
            :format(target.scheme .. "://" .. url.authority(target), reason)
    end
    if target.scheme ~= "https" and origin.scheme == "https" then
        return refuse("is not https")
    end
    if target.host == origin.host and (target.port == origin.port
        or url.host_kind(origin.host) == "loopback") then
        return target
    end
    local kind = url.host_kind(target.host)
    if kind == "loopback" and url.host_kind(origin.host) == "loopback" then
        return target
    elseif kind ~= "name" and kind ~= "public" then
        return refuse("is a " .. kind .. " address")
    end
    return target
end

---@class sm.Auth
local Auth = {}
Auth.__index = Auth

--- The authorization of one registry.
--- opts: registry (its name, for messages), origin (sm.Url), request
--- (function{url (sm.Url), method, body, headers, authorization, limit_bytes}
--- → response, err; yields), credentials
--- (function(path) → sm.Credential?, err; yields).
---@param opts table
---@return sm.Auth
function M.open(opts)
    return setmetatable({
        registry = opts.registry,
        origin = opts.origin,
        request = opts.request,
        credentials = opts.credentials,
        tokens = {},  -- key → {value, expires}
        pending = {}, -- key → task that brings it
        known = {},   -- scope → challenge that the registry made for it
        basic = {},   -- scope → header
    }, Auth)
end

-- Let one task do the work for all who ask for the same key. Yields.
local function once(self, key, fn)
    local task = self.pending[key]
    if not task then
        task = loop.spawn(function()
            local value, why = fn()
            self.pending[key] = nil
            return value, why
        end)
        self.pending[key] = task
    end
    return task:join()
end

local function credential_for(self, path)
    local key = "credential " .. path
    if self[key] == nil then
        local cred, why = once(self, key, function()
            return self.credentials(path)
        end)
        if why then
            return nil, why
        end
        self[key] = cred or false
    end
    return self[key] or nil
end

local function basic_header(cred)
    return "Basic " .. base64.encode(cred.username .. ":" .. (cred.password or ""))
end

-- The registry's own words for a scope first: some read only the first one.
local function scopes_of(challenge, scope)
    local list, seen = {}, {}
    for word in ((challenge.params.scope or "") .. " " .. scope):gmatch("%S+") do
        if not seen[word] then
            seen[word] = true
            list[#list + 1] = word
        end
    end
    return list
end

local function read_token(response, realm)
    local where = "token from " .. realm.host
    if response.status ~= 200 then
        return nil, ("%s: status %d"):format(where, response.status)
    end
    local doc, why = json.decode_object(response.body)
    if not doc then
        return nil, where .. ": " .. why
    end
    local token = doc.token or doc.access_token
    if type(token) ~= "string" or token == "" or token:find("[^\x21-\x7e]") then
        return nil, where .. ": the answer holds no token"
    end
    local life = math.max(tonumber(doc.expires_in) or min_life_s, min_life_s)
    return { value = token, expires = loop.now() + life - margin_s }
end

-- The OAuth2 way, with a refresh token. false: this server does not know it.
local function post_token(self, realm, challenge, scopes, cred)
    local form = {
        { "grant_type", "refresh_token" },
        { "refresh_token", cred.identity_token },
        { "client_id", client_id },
        { "scope", table.concat(scopes, " ") },
    }
    if challenge.params.service then
        form[#form + 1] = { "service", challenge.params.service }
    end
    local response, why = self.request {
        url = realm, method = "POST", body = url.query(form), limit_bytes = token_limit_bytes,
        headers = { "Content-Type: application/x-www-form-urlencoded" },
    }
    if not response then
        return nil, why
    end
    local code = response.status
    if code == 400 or code == 401 or code == 404 or code == 405 then
        return false
    end
    return read_token(response, realm)
end

local function get_token(self, realm, challenge, scopes, cred)
    local query = {}
    if challenge.params.service then
        query[1] = { "service", challenge.params.service }
    end
    for _, scope in ipairs(scopes) do
        query[#query + 1] = { "scope", scope }
    end
    local authorization
    if cred and cred.username then
        query[#query + 1] = { "account", cred.username }
        authorization = basic_header {
            username = cred.username, password = cred.password or cred.identity_token,
        }
    end
    local target = { scheme = realm.scheme, host = realm.host, port = realm.port,
        path = realm.path,
        query = (realm.query and realm.query ~= "" and realm.query .. "&" or "")
            .. url.query(query) }
    local response, why = self.request {
        url = target, authorization = authorization, limit_bytes = token_limit_bytes,
    }
    if not response then
        return nil, why
    end
    if response.status == 401 or response.status == 403 then
        if authorization then
            return nil, ("%s refused the credentials from %s"):format(self.registry, cred.source)
        end
        return nil, self.registry .. " wants a login, and no credentials were found"
    end
    return read_token(response, realm)
end

local function fetch_token(self, challenge, scopes, path)
    local realm, why = M.check_realm(self.origin, challenge.params.realm)
    if not realm then
        return nil, why
    end
    local cred
    cred, why = credential_for(self, path)
    if why then
        return nil, why
    end
    if cred and cred.registry_token then
        return { value = cred.registry_token, expires = math.huge }
    end
    if cred and cred.identity_token then
        local token
        token, why = post_token(self, realm, challenge, scopes, cred)
        if token ~= false then
            return token, why
        end
    end
    return get_token(self, realm, challenge, scopes, cred)
end

local function bearer(self, challenge, scope, path)
    local scopes = scopes_of(challenge, scope)
    local key = table.concat({ challenge.params.realm or "", challenge.params.service or "",
        table.concat(scopes, " ") }, "\n")
    local token = self.tokens[key]
    if not token or token.expires <= loop.now() then
        local why
        token, why = once(self, key, function()
            return fetch_token(self, challenge, scopes, path)
        end)
        if not token then
            return nil, why
        end
        self.tokens[key] = token
    end
    return "Bearer " .. token.value
end

--- The Authorization header for a scope, from what is known already, renewed
--- if it ran out; nil if the registry never asked for one. Yields.
---@async
---@param scope string "repository:<path>:pull"
---@param path string
---@return string? header
---@return string? error
function Auth:header(scope, path)
    if self.basic[scope] then
        return self.basic[scope]
    end
    local challenge = self.known[scope]
    if challenge then
        return bearer(self, challenge, scope, path)
    end
end

-- Drop every token that reads as `header`: the registry no longer takes it.
local function forget(self, header)
    for key, token in pairs(self.tokens) do
        if header == "Bearer " .. token.value then
            self.tokens[key] = nil
        end
    end
end

--- Answer a 401. `sent` is the header that was refused, if there was one.
--- Returns the header to try next, or nil and why there is none. Yields.
---@async
---@param headers string[][] of the 401
---@param scope string
---@param path string
---@param sent string?
---@return string? header
---@return string? error
function Auth:answer(headers, scope, path, sent)
    local by_scheme = {}
    for _, challenge in ipairs(M.parse_challenges(headers)) do
        by_scheme[challenge.scheme] = by_scheme[challenge.scheme] or challenge
    end
    if by_scheme.bearer then
        if sent then
            forget(self, sent)
        end
        self.known[scope] = by_scheme.bearer
        return bearer(self, by_scheme.bearer, scope, path)
    end
    if not by_scheme.basic then
        return nil, self.registry .. " wants a login of a kind we do not know"
    end
    local cred, why = credential_for(self, path)
    if not cred then
        return nil, why or self.registry .. " wants a login, and no credentials were found"
    elseif not cred.username then
        return nil, self.registry .. " wants a user name, but there is only a token in "
            .. cred.source
    end
    local header = basic_header(cred)
    if header == sent then
        return nil, ("%s refused the credentials from %s"):format(self.registry, cred.source)
    end
    self.basic[scope] = header
    return header
end

return M
