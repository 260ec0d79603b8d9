-- SPDX-License-Identifier: Apache-2.0
--
-- A real docker-registry on a free loopback port, with a configuration and a
-- data folder of its own; never the package's configuration, which listens on
-- every address. The registry picks its port itself and says so in its log,
-- so two specs at once cannot collide. It dies with the process that
-- started it.

local uv = require "luv"
local shell = require "support.shell"

local M = {}

---@class support.Registry
---@field port integer
---@field host string "127.0.0.1:<port>"
---@field dir string its folder; `dir/data` is the storage
---@field stop fun(self: support.Registry)

local function config(dir, opts)
    local lines = {
        "version: 0.1",
        "log: {level: info, accesslog: {disabled: true}}",
        ("storage: {delete: {enabled: true}, filesystem: {rootdirectory: %s}}")
            :format(opts.data or dir .. "/data"),
        ("http: {addr: 127.0.0.1:0, secret: spec%s}"):format(opts.tls
            and (", tls: {certificate: %s, key: %s}"):format(opts.tls.cert, opts.tls.key) or ""),
    }
    if opts.tls and opts.tls.clients then
        lines[#lines] = lines[#lines]:gsub("}}$", (", clientcas: [%s]}}"):format(opts.tls.clients))
    end
    if opts.htpasswd then
        lines[#lines + 1] = ("auth: {htpasswd: {realm: spec, path: %s}}"):format(opts.htpasswd)
    end
    if opts.token then
        lines[#lines + 1] = ("auth: {token: {realm: %q, service: %q, issuer: %q, rootcertbundle: %s}}")
            :format(opts.token.realm, opts.token.service, opts.token.issuer, opts.token.bundle)
    end
    if opts.redirect then
        lines[#lines + 1] = ("middleware: {storage: [{name: redirect, options: {baseurl: %q}}]}")
            :format(opts.redirect)
    end
    return table.concat(lines, "\n") .. "\n"
end

--- Start a registry and wait until it listens.
--- opts: data (share another registry's storage), htpasswd (file), token
--- {realm, service, issuer, bundle}, redirect (base URL), tls {cert, key,
--- clients (authority of the clients it lets in)}.
---@param opts table?
---@return support.Registry
function M.start(opts)
    opts = opts or {}
    local dir = shell.tmpdir()
    shell.write(dir .. "/config.yml", config(dir, opts))
    local log = dir .. "/log"
    local fd = assert(uv.fs_open(log, "a", 384))
    local exited
    local process = uv.spawn("setpriv", {
        args = { "--pdeathsig", "KILL", "docker-registry", "serve", dir .. "/config.yml" },
        stdio = { nil, fd, fd },
        -- The package's daemon would otherwise export traces and read settings.
        env = { "PATH=" .. os.getenv("PATH"), "HOME=" .. dir, "OTEL_TRACES_EXPORTER=none" },
    }, function(code)
        exited = code
    end)
    assert(process, "cannot start docker-registry: is it installed?")
    uv.fs_close(fd)

    local port
    local function look()
        port = shell.read(log):match("listening on 127%.0%.0%.1:(%d+)")
    end
    local watch = uv.new_fs_event()
    watch:start(log, {}, look)
    look()
    while not port and not exited do
        uv.run("once")
    end
    watch:close()
    uv.run("nowait") -- luv crashes at exit over a handle that is still closing
    if exited then
        error("docker-registry ended: " .. shell.read(log))
    end

    local self = { port = math.tointeger(tonumber(port)), host = "127.0.0.1:" .. port, dir = dir }
    function self.stop()
        if process then
            process:kill("sigkill")
            while not exited do
                uv.run("once")
            end
            process:close()
            uv.run("nowait")
            process = nil
            shell.remove(dir)
        end
    end
    return self
end

return M
