-- SPDX-License-Identifier: Apache-2.0
--
-- A small HTTP/1.1 server whose answers a spec scripts, faults included:
-- wrong lengths, truncation, stalls, hang-ups, endless redirects. No package
-- misbehaves on demand, so this one is ours. It lives on the default luv
-- loop of the spec's own process and serves while that loop runs.
--
--   local server = faulty.start(function(req, res)
--       if req.path == "/v2/" then
--           res:send(401, { ["WWW-Authenticate"] = "Basic" }, "")
--       end
--   end)
--   … server.url, server.requests[i].headers.authorization …
--   server.stop()
--
-- Request: method, path (without query), query, target, headers (lowercase
-- keys), body. Response, one of:
--   res:send(status, headers, body)   a whole answer; Content-Length is right
--                                     unless the headers give one
--   res:head(status, headers), res:write(bytes), res:finish()   by hand
--   res:hang()                        keep the connection, say nothing
--   res:drop()                        close at once
-- A handler that answers nothing gets a 404.

local uv = require "luv"

local M = {}

-- A client that hangs up while we write must not end the spec's process.
local sigpipe = uv.new_signal()
sigpipe:start("sigpipe", function() end)
sigpipe:unref()

local Response = {}
Response.__index = Response

local function each_header(headers, fn)
    for name, value in pairs(headers or {}) do
        for _, one in ipairs(type(value) == "table" and value or { value }) do
            fn(name, one)
        end
    end
end

function Response:head(status, headers)
    self.answered = true
    local lines, length = { ("HTTP/1.1 %d Status"):format(status) }, false
    each_header(headers, function(name, value)
        length = length or name:lower() == "content-length"
        lines[#lines + 1] = name .. ": " .. tostring(value)
    end)
    -- Without a length the body ends with the connection.
    lines[#lines + 1] = "Connection: close"
    self:write(table.concat(lines, "\r\n") .. "\r\n\r\n")
end

function Response:write(bytes)
    if not self.socket:is_closing() then
        self.socket:write(bytes)
    end
end

function Response:finish()
    local socket = self.socket
    if not socket:is_closing() then
        socket:shutdown(function()
            if not socket:is_closing() then
                socket:close()
            end
        end)
    end
end

function Response:send(status, headers, body)
    headers = headers or {}
    local has_length
    each_header(headers, function(name)
        has_length = has_length or name:lower() == "content-length"
    end)
    if not has_length then
        local copy = {}
        for k, v in pairs(headers) do
            copy[k] = v
        end
        copy["Content-Length"] = #(body or "")
        headers = copy
    end
    self:head(status, headers)
    if self.request.method ~= "HEAD" then
        self:write(body or "")
    end
    self:finish()
end

function Response:hang()
    self.answered = true
end

function Response:drop()
    self.answered = true
    if not self.socket:is_closing() then
        self.socket:close()
    end
end

local function parse(text)
    local head, rest = text:match("^(.-)\r\n\r\n(.*)$")
    if not head then
        return nil
    end
    local method, target = head:match("^(%u+) (%S+) HTTP/1%.%d")
    local headers = {}
    for name, value in head:gmatch("\r\n([^:\r\n]+):%s*([^\r\n]*)") do
        headers[name:lower()] = value
    end
    if #rest < (tonumber(headers["content-length"]) or 0) then
        return nil
    end
    local path, query = (target or "/"):match("^([^?]*)%??(.*)$")
    return { method = method, target = target, path = path, query = query, headers = headers,
        body = rest }
end

--- Start a server on a free loopback port. `handler(req, res)`; an error in it
--- is kept and raised by `stop`.
---@param handler fun(req: table, res: table)
---@param host string? the address to listen on, 127.0.0.1 by default
---@return table server port, host, url, requests, stop
function M.start(handler, host)
    local listener = uv.new_tcp()
    assert(listener:bind(host or "127.0.0.1", 0))
    local server = { requests = {}, handler = handler }
    local sockets, failure = {}, nil

    local function serve(socket)
        local text = ""
        socket:read_start(function(err, chunk)
            if err or not chunk then
                sockets[socket] = nil
                if not socket:is_closing() then
                    socket:close()
                end
                return
            end
            text = text .. chunk
            if text:byte() == 0x16 then
                -- A TLS greeting: no HTTP server can do anything but hang up.
                sockets[socket] = nil
                socket:close()
                return
            end
            local request = parse(text)
            if not request then
                return
            end
            text = ""
            server.requests[#server.requests + 1] = request
            local res = setmetatable({ socket = socket, request = request }, Response)
            local ok, why = xpcall(server.handler, debug.traceback, request, res)
            if not ok then
                failure = failure or why
                res:drop()
            elseif not res.answered then
                res:send(404, {}, "")
            end
        end)
    end
    assert(listener:listen(64, function(err)
        if not err then
            local socket = uv.new_tcp()
            listener:accept(socket)
            sockets[socket] = true
            serve(socket)
        end
    end))

    server.port = listener:getsockname().port
    server.host = "127.0.0.1:" .. server.port
    server.url = "http://" .. server.host
    -- How many requests had this method and path.
    function server.count(method, path)
        local n = 0
        for _, request in ipairs(server.requests) do
            if request.method == method and request.path == path then
                n = n + 1
            end
        end
        return n
    end
    function server.stop()
        if not listener:is_closing() then
            listener:close()
            for socket in pairs(sockets) do
                if not socket:is_closing() then
                    socket:close()
                end
            end
            uv.run("nowait") -- luv crashes at exit over handles still closing
        end
        if failure then
            error(failure, 0)
        end
    end
    return server
end

return M
