-- SPDX-License-Identifier: Apache-2.0
--
-- The fetcher of sm.image_core against a real registry, and against a server
-- that breaks every rule of HTTP on request.

local core = require "sm.image_core"
local faulty = require "support.faulty_server"
local registry = require "support.registry"
local shell = require "support.shell"
local uv = require "luv"

local function entries(path)
    local n = 0
    for _ in uv.fs_scandir_next, assert(uv.fs_scandir(path)) do
        n = n + 1
    end
    return n
end

describe("the fetcher", function()
    local dir, f, early -- early: results not asked for yet, by id
    before_each(function()
        dir = shell.tmpdir()
        f, early = core.fetcher { user_agent = "spec/1" }, {}
    end)
    after_each(function()
        f:close()
        shell.remove(dir)
    end)


    -- Results of the given requests, in order; the loop serves meanwhile.
    local function wait(fetcher, ids)
        local function missing()
            for _, id in ipairs(ids) do
                if not early[id] then
                    return true
                end
            end
        end
        local poll = uv.new_poll(fetcher:pollfd())
        poll:start("r", function()
            for r in function() return fetcher:next() end do
                early[r.id] = r
            end
        end)
        while missing() do
            uv.run("once")
        end
        poll:close()
        uv.run("nowait")
        local results = {}
        for i, id in ipairs(ids) do
            results[i], early[id] = early[id], nil
        end
        return table.unpack(results)
    end

    local function get(spec)
        return (wait(f, { assert(f:submit(spec)) }))
    end

    local function header(r, name)
        for _, h in ipairs(r.headers) do
            if h[1]:lower() == name:lower() then
                return h[2]
            end
        end
    end

    local function noise(n)
        local file = assert(io.open("/dev/urandom", "rb"))
        local s = file:read(n)
        file:close()
        return s
    end

    describe("with a real registry", function()
        local reg, base, blob, digest
        setup(function()
            reg = registry.start()
            blob = noise(3000000)
            digest = core.sha256(blob)
        end)
        teardown(function()
            reg:stop()
        end)
        before_each(function()
            base = "http://" .. reg.host .. "/v2/spec/"
        end)

        local function push()
            local r = get { url = base .. "blobs/uploads/", method = "POST", body = "" }
            assert.equal(202, r.status)
            local to = header(r, "Location")
            r = get { url = to .. (to:find("?", 1, true) and "&" or "?") .. "digest=" .. digest, method = "PUT",
                body = blob, headers = { "Content-Type: application/octet-stream" } }
            assert.equal(201, r.status, r.body)
        end

        it("uploads, asks, downloads and resumes", function()
            push()
            local url = base .. "blobs/" .. digest
            local head = get { url = url, method = "HEAD" }
            assert.equal(200, head.status)
            assert.equal(tostring(#blob), header(head, "content-length"))
            assert.equal("", head.body)

            local r = get { url = url, digest = digest }
            assert.is_nil(r.error)
            assert.is_true(r.body == blob)
            assert.equal(digest, r.digest)

            local path = dir .. "/blob"
            r = get { url = url, file = path, size = #blob, digest = digest }
            assert.is_nil(r.error)
            assert.equal(200, r.status)
            assert.is_true(r.file)
            assert.is_nil(r.body)
            assert.equal(#blob, r.bytes)
            assert.is_true(shell.read(path) == blob)

            shell.write(path, blob:sub(1, 1234567))
            r = get { url = url, file = path, size = #blob, digest = digest, offset = 1234567 }
            assert.is_nil(r.error)
            assert.equal(206, r.status)
            assert.equal(digest, r.digest)
            assert.is_true(shell.read(path) == blob)
        end)

        it("tells what the registry says about what is not there", function()
            local path = dir .. "/blob"
            local r = get { url = base .. "blobs/sha256:" .. ("0"):rep(64), file = path, size = 10 }
            assert.is_nil(r.error)
            assert.equal(404, r.status)
            assert.is_false(r.file)
            assert.matches("BLOB_UNKNOWN", r.body)
            assert.is_nil(uv.fs_stat(path))
        end)
    end)

    describe("over TLS", function()
        local reg, keys
        setup(function()
            keys = shell.tmpdir()
            shell.run(("cd %s; openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -days 2 "
                .. "-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"):format(shell.quote(keys)))
            reg = registry.start { tls = { cert = keys .. "/cert", key = keys .. "/key" } }
        end)
        teardown(function()
            reg:stop()
            shell.remove(keys)
        end)

        it("believes the given authority, or anybody when told so, else nobody", function()
            local url = "https://" .. reg.host .. "/v2/"
            assert.equal(200, get { url = url, cafile = keys .. "/cert" }.status)
            assert.equal(200, get { url = url, insecure = true }.status)
            local r = get { url = url }
            assert.matches("certificate", r.error)
            assert.is_false(r.transient)
            assert.equal(0, r.status)
            assert.equal(60, r.curl_code)
        end)
    end)

    describe("with a faulty server", function()
        local server, handler
        before_each(function()
            server = faulty.start(function(req, res)
                handler(req, res)
            end)
        end)
        after_each(function()
            server.stop()
        end)

        local function serve(fn)
            handler = fn
        end

        local body = ("0123456789abcdef"):rep(4096) -- 64 KiB
        local digest = core.sha256(body)

        local function to_file(more)
            local spec = { url = server.url .. "/blob", file = dir .. "/blob", size = #body, digest = digest }
            for k, v in pairs(more or {}) do
                spec[k] = v
            end
            return get(spec)
        end

        local function left()
            return uv.fs_stat(dir .. "/blob") and shell.read(dir .. "/blob")
        end

        it("keeps what came before a hang-up, and resumes it", function()
            serve(function(req, res)
                local from = tonumber((req.headers.range or ""):match("bytes=(%d+)-"))
                if from then
                    res:send(206, { ["Content-Range"] = ("bytes %d-%d/%d"):format(from, #body - 1, #body) },
                        body:sub(from + 1))
                else
                    res:head(200, { ["Content-Length"] = #body })
                    res:write(body:sub(1, 10000))
                    res:finish()
                end
            end)
            local r = to_file()
            assert.is_string(r.error)
            assert.is_true(r.transient)
            assert.equal(10000, r.bytes)
            assert.equal(body:sub(1, 10000), left())
            r = to_file { offset = r.bytes }
            assert.is_nil(r.error)
            assert.equal(206, r.status)
            assert.equal("bytes=10000-", server.requests[2].headers.range)
            assert.is_true(left() == body)
        end)

        it("asks for nothing when the file is whole already, but checks it", function()
            serve(function(_, res)
                res:drop()
            end)
            shell.write(dir .. "/blob", body)
            local r = to_file { offset = #body }
            assert.is_nil(r.error)
            assert.is_true(r.file)
            assert.equal(digest, r.digest)
            shell.write(dir .. "/blob", body:upper())
            r = to_file { offset = #body }
            assert.matches("digest is sha256:%x+, not sha256:%x+", r.error)
            assert.is_false(r.transient)
            assert.is_nil(left())
            assert.equal(0, #server.requests)
        end)

        it("starts over when the server ignores the range", function()
            serve(function(_, res)
                res:send(200, {}, body)
            end)
            shell.write(dir .. "/blob", ("x"):rep(5000))
            local r = to_file { offset = 5000 }
            assert.is_nil(r.error)
            assert.equal(200, r.status)
            assert.is_true(left() == body)
        end)

        it("drops the file when the range is refused", function()
            serve(function(_, res)
                res:send(416, { ["Content-Range"] = "bytes */10" }, "")
            end)
            shell.write(dir .. "/blob", body:sub(1, 5000))
            local r = to_file { offset = 5000 }
            assert.equal(416, r.status)
            assert.matches("refused the range from byte 5000", r.error)
            assert.equal(0, r.bytes)
            assert.is_nil(left())
        end)

        for what, range in pairs {
            ["from elsewhere"] = "bytes 4999-65535/65536", ["of another size"] = "bytes 5000-65535/70000",
            ["that is none"] = "chapters 1-2", ["backwards"] = "bytes 5000-4000/65536",
        } do
            it("refuses a range " .. what, function()
                serve(function(_, res)
                    res:send(206, { ["Content-Range"] = range }, body:sub(5001))
                end)
                shell.write(dir .. "/blob", body:sub(1, 5000))
                local r = to_file { offset = 5000 }
                assert.is_string(r.error)
                assert.is_nil(left())
            end)
        end

        it("refuses partial content nobody asked for", function()
            serve(function(_, res)
                res:send(206, { ["Content-Range"] = "bytes 0-65535/65536" }, body)
            end)
            assert.matches("partial content", to_file().error)
            assert.is_nil(left())
        end)

        it("refuses the wrong digest and leaves nothing", function()
            serve(function(_, res)
                res:send(200, {}, body:upper())
            end)
            local r = to_file()
            assert.matches("digest is sha256:%x+, not sha256:%x+", r.error)
            assert.is_false(r.transient)
            assert.is_nil(left())
            r = get { url = server.url .. "/blob", digest = digest }
            assert.matches("digest is", r.error)
        end)

        it("refuses a sha512 digest that is wrong, and takes one that is right", function()
            serve(function(_, res)
                res:send(200, {}, body)
            end)
            shell.write(dir .. "/x", body)
            local sum = "sha512:" .. shell.run { "sha512sum", dir .. "/x" }:match("%x+")
            assert.equal(sum, to_file({ digest = sum }).digest)
            assert.matches("digest is", to_file({ digest = "sha512:" .. ("0"):rep(128) }).error)
        end)

        it("refuses more than was promised, announced or not", function()
            serve(function(req, res)
                if req.path == "/blob" then
                    res:send(200, {}, body .. "!")
                else
                    res:head(200, {})
                    res:write(body .. "!")
                    res:finish()
                end
            end)
            assert.matches("announces 65537 bytes, not 65536", to_file().error)
            assert.is_nil(left())
            local r = to_file { url = server.url .. "/endless" }
            assert.matches("longer than 65536 bytes", r.error)
            assert.is_false(r.transient)
            assert.is_nil(left())
        end)

        it("refuses less than was promised", function()
            serve(function(_, res)
                res:send(200, {}, body:sub(1, 1000))
            end)
            local r = to_file()
            assert.matches("ends after 1000 of 65536 bytes", r.error)
            assert.is_true(r.transient)
        end)

        it("notices a stall and keeps what came", function()
            serve(function(_, res)
                res:head(200, { ["Content-Length"] = #body })
                res:write(body:sub(1, 10000))
                res:hang()
            end)
            local r = to_file { low_speed = { bytes = 1000000, seconds = 1 } }
            assert.equal(28, r.curl_code)
            assert.is_true(r.transient)
            assert.equal(10000, r.bytes)
            assert.equal(body:sub(1, 10000), left())
        end)

        it("notices a server that never answers", function()
            serve(function(_, res)
                res:hang()
            end)
            local r = get { url = server.url, low_speed = 1 }
            assert.equal(28, r.curl_code)
            assert.equal(0, r.status)
            r = get { url = server.url, timeout = 0.2 }
            assert.equal(28, r.curl_code)
        end)

        it("notices a server that hangs up or talks nonsense", function()
            serve(function(req, res)
                if req.path ~= "/drop" then
                    res.answered = true
                    res:write("SSH-2.0-nonsense\r\n\r\n")
                    res:finish()
                else
                    res:drop()
                end
            end)
            local r = get { url = server.url .. "/drop" }
            assert.is_string(r.error)
            assert.is_true(r.transient)
            assert.is_string(get({ url = server.url .. "/nonsense" }).error)
        end)

        it("does not follow redirects, and leaves the file alone for any other status", function()
            shell.write(dir .. "/blob", body:sub(1, 5000))
            for _, status in ipairs { 301, 302, 307, 401, 403, 404, 429, 500, 503 } do
                serve(function(_, res)
                    res:send(status, { Location = server.url .. "/elsewhere", ["Retry-After"] = "7" }, "because")
                end)
                local r = to_file { offset = 5000, headers = { "Authorization: Bearer secret" } }
                assert.is_nil(r.error)
                assert.equal(status, r.status)
                assert.equal("because", r.body)
                assert.equal("7", header(r, "retry-after"))
                assert.equal(5000, r.bytes == 5000 and r.bytes or #left())
                assert.equal(body:sub(1, 5000), left())
            end
            assert.equal(0, server.count("GET", "/elsewhere"))
        end)

        it("sends the headers given and returns all headers in order", function()
            serve(function(_, res)
                res.answered = true
                res:write("HTTP/1.1 103 Early Hints\r\nLink: early\r\n\r\nHTTP/1.1 401 No\r\n"
                    .. "WWW-Authenticate: Bearer realm=\"a, b\",service=\"x\"\r\nX-One: 1\r\n"
                    .. "www-authenticate:   Basic realm=\"z\"  \r\nX-Empty:\r\nContent-Length: 0\r\n\r\n")
                res:finish()
            end)
            local r = get { url = server.url, headers = { "Accept: a/b, c/d", "X-Test: yes" } }
            assert.same({ { "WWW-Authenticate", 'Bearer realm="a, b",service="x"' }, { "X-One", "1" },
                { "www-authenticate", 'Basic realm="z"' }, { "X-Empty", "" }, { "Content-Length", "0" } },
                r.headers)
            local sent = server.requests[1].headers
            assert.equal("a/b, c/d", sent.accept)
            assert.equal("yes", sent["x-test"])
            assert.equal("spec/1", sent["user-agent"])
            assert.is_nil(sent["accept-encoding"])
        end)

        it("sends bodies, forms by default", function()
            serve(function(_, res)
                res:send(200, {}, "ok")
            end)
            get { url = server.url, body = "grant_type=x" }
            get { url = server.url, method = "PATCH", body = "a\0b", headers = { "Content-Type: text/plain" } }
            get { url = server.url, method = "DELETE" }
            local one, two, three = table.unpack(server.requests)
            assert.equal("POST", one.method)
            assert.equal("application/x-www-form-urlencoded", one.headers["content-type"])
            assert.equal("PATCH", two.method)
            assert.equal("a\0b", two.body)
            assert.equal("text/plain", two.headers["content-type"])
            assert.equal("DELETE", three.method)
        end)

        it("bounds what it keeps in memory", function()
            serve(function(req, res)
                if req.path == "/headers" then
                    local h = {}
                    for i = 1, 2000 do
                        h[i] = "v"
                    end
                    res:send(200, { X = h }, "")
                else
                    res:send(req.path == "/refused" and 404 or 200, {}, body:rep(40))
                end
            end)
            assert.matches("longer than 1000 bytes", get({ url = server.url, limit_bytes = 1000 }).error)
            assert.equal(#body * 40, get({ url = server.url, limit_bytes = #body * 40 }).bytes)
            assert.matches("longer than %d+ bytes", to_file({ url = server.url .. "/refused" }).error)
            assert.matches("too many headers", get({ url = server.url .. "/headers" }).error)
        end)

        it("tells progress, and can be cancelled", function()
            serve(function(_, res)
                res:head(200, { ["Content-Length"] = #body })
                res:write(body:sub(1, 10000))
                res:hang()
            end)
            local id = assert(f:submit { url = server.url, file = dir .. "/blob", size = #body })
            local now, total
            repeat
                uv.run("nowait")
                now, total = f:progress(id)
            until now == 10000
            assert.equal(#body, total)
            assert.is_true(f:cancel(id))
            local r = wait(f, { id })
            assert.equal("cancelled", r.error)
            assert.equal(10000, r.bytes)
            assert.is_nil(f:progress(id))
            assert.is_false(f:cancel(id))
            assert.equal(0, f:pending())
        end)

        it("runs many at once, files no more than allowed", function()
            local running, most, waiting = 0, 0, {}
            serve(function(req, res)
                if req.path == "/small" then
                    return res:send(200, {}, "small")
                end
                running = running + 1
                most = math.max(most, running)
                res:hang() -- the answer comes later
                waiting[#waiting + 1] = function()
                    running = running - 1
                    res:send(200, {}, body)
                end
            end)
            local three <close> = core.fetcher { parallel = 3 }
            local ids = {}
            for i = 1, 20 do
                ids[i] = assert(three:submit { url = server.url .. "/" .. i, file = dir .. "/" .. i,
                    size = #body, digest = digest })
            end
            -- A small request is not stuck behind the files.
            local small = assert(three:submit { url = server.url .. "/small" })
            assert.equal("small", wait(three, { small }).body)
            local timer = uv.new_timer()
            timer:start(1, 1, function()
                for _, go in ipairs(waiting) do
                    go()
                end
                waiting = {}
            end)
            for _, r in ipairs { wait(three, ids) } do
                assert.is_nil(r.error)
                assert.is_true(r.file)
            end
            timer:close()
            uv.run("nowait")
            assert.is_true(most <= 3 and most > 1, most .. " at once of " .. #server.requests)
            assert.equal(20, tonumber(shell.run("ls " .. dir .. " | wc -l")))
        end)

        it("leaks no descriptor and no thread, whatever it is doing when closed", function()
            serve(function(req, res)
                if req.path == "/hang" then
                    res:head(200, { ["Content-Length"] = #body })
                    res:write("x")
                    res:hang()
                else
                    res:send(200, {}, "fine")
                end
            end)
            local function once()
                early = {}
                local one = core.fetcher { parallel = 2 }
                one:submit { url = server.url .. "/hang" }
                for i = 1, 5 do
                    one:submit { url = server.url .. "/hang", file = dir .. "/h" .. i, size = #body }
                end
                local id = one:submit { url = server.url }
                wait(one, { id })
                return one
            end
            once():close()
            collectgarbage()
            local threads, fds = entries("/proc/self/task"), entries("/proc/self/fd")
            for i = 1, 10 do
                local one = once()
                if i % 2 == 0 then
                    one:close()
                end
                one = nil
                collectgarbage()
            end
            -- The server's side of the closed connections goes when it looks.
            local tries = 0
            repeat
                uv.run("nowait")
                tries = tries + 1
            until entries("/proc/self/fd") <= fds or tries > 10000
            assert.is_true(entries("/proc/self/fd") <= fds)
            assert.equal(threads, entries("/proc/self/task"))
        end)

        it("tells a failed write, and removes the file", function()
            serve(function(_, res)
                res:send(200, {}, body)
            end)
            -- The limit makes writes fail as a full disk would.
            local script = dir .. "/script.lua"
            shell.write(script, ([[
                local core = require "sm.image_core"
                local f = core.fetcher()
                f:submit { url = %q, file = %q, size = %d }
                local r
                repeat r = f:next() until r
                io.write(r.error, "|", tostring(r.transient), "|", r.bytes)
            ]]):format(server.url, dir .. "/blob", #body))
            local out, handle
            local pipe = uv.new_pipe()
            handle = uv.spawn("sh", { args = { "-c", "ulimit -f 16; exec lua5.4 " .. script },
                stdio = { nil, pipe, 2 } }, function()
                handle:close()
                handle = nil
            end)
            pipe:read_start(function(_, chunk)
                out = (out or "") .. (chunk or "")
            end)
            while handle do
                uv.run("once")
            end
            uv.run("nowait")
            pipe:close()
            uv.run("nowait")
            assert.matches("File too large|false|0", out, 1, true)
            assert.is_nil(left())
        end)
    end)

    it("speaks http and https only, and takes no credentials in URLs", function()
        for _, url in ipairs { "file:///etc/passwd", "ftp://127.0.0.1/", "gopher://127.0.0.1/", "scp://127.0.0.1/" } do
            local r = get { url = url }
            assert.matches("not supported or disabled", r.error)
            assert.is_false(r.transient)
        end
        assert.is_string(get({ url = "http://user:password@127.0.0.1:1/" }).error)
        assert.is_string(get({ url = "http://" }).error)
    end)

    it("tells a refused connection and an unknown host", function()
        local r = get { url = "http://127.0.0.1:1/" }
        assert.equal(7, r.curl_code)
        assert.is_true(r.transient)
        r = get { url = "http://no-such-host.invalid/" }
        assert.equal(6, r.curl_code)
    end)

    it("refuses misuse", function()
        local function raises(spec, pattern)
            local ok, err = pcall(f.submit, f, spec)
            assert.is_false(ok)
            assert.matches(pattern, err, 1, true)
        end
        raises({}, "field 'url': string expected")
        raises({ url = "x", nope = 1 }, "unknown field 'nope'")
        raises({ url = "x", file = "y" }, "'file' needs 'size' or 'limit_bytes'")
        raises({ url = "x", offset = 1 }, "'offset' needs 'file'")
        raises({ url = "x\0y" }, "zero byte")
        raises({ url = "x", headers = { 1 } }, "list of 'Name: value'")
        raises({ url = "x", low_speed = 0 }, "'low_speed'")
        raises({ url = "x", timeout = -1 }, "'timeout': seconds expected")
        for _, spec in ipairs {
            { url = "x", headers = { "A: b\r\nEvil: yes" } }, { url = "x", headers = { "no colon" } },
            { url = "x", method = "GET /" }, { url = "x", file = "y", size = 1, digest = "sha256:zz" },
        } do
            local id, err, errno = f:submit(spec)
            assert.is_nil(id)
            assert.matches("malformed", err)
            assert.is_number(errno)
        end
        f:close()
        f:close()
        assert.equal("fetcher (closed)", tostring(f))
        assert.has_error(function()
            f:next()
        end, "attempt to use a closed fetcher")
        assert.has_error(function()
            core.fetcher { paralel = 1 }
        end)
    end)
end)
