-- SPDX-License-Identifier: Apache-2.0
--
-- The registry client against scripted faults: each one gets the right retry
-- or one clear error, and no credential goes where it was not meant to.

local files = require "sm.files"
local http = require "sm.registry_http"
local loop = require "sm.loop"
local platform = require "sm.platform"
local reference = require "sm.reference"
local registry = require "sm.registry"
local faulty = require "support.faulty_server"
local shell = require "support.shell"
local tiny = require "support.tiny_image"

describe("sm.registry", function()
    local dir, image, servers, creds, events
    local wanted = assert(platform.parse("linux/amd64"))

    setup(function()
        image = tiny.make()
    end)
    before_each(function()
        dir, servers, creds, events = shell.tmpdir(), {}, nil, {}
    end)
    after_each(function()
        for _, server in ipairs(servers) do
            server.stop()
        end
        shell.remove(dir)
    end)

    local function serve(what, before)
        local server = tiny.serve(what or image, before)
        table.insert(servers, 1, server)
        return server
    end

    local function client(server, name)
        local ref = assert(reference.parse(server.host .. "/" .. (name or "team/app:v1")))
        return registry.open(ref, {
            retry_delay = 0.01,
            credentials = function()
                return creds
            end,
            notify = function(event)
                events[#events + 1] = event
            end,
        })
    end

    -- Run fn(client) and let go of it.
    local function with(server, fn, name)
        return loop.run(function()
            local c <close> = client(server, name)
            return fn(c)
        end)
    end
    local function resolve(server, name)
        return with(server, function(c)
            return c:resolve(wanted)
        end, name)
    end
    local function fetch_blob(server, digest)
        local file = dir .. "/blob"
        local ok, err = with(server, function(c)
            return c:blob({ digest = digest, size = #image.blobs[digest] }, file)
        end)
        return ok, err, file
    end
    local function refuses(want, found, err)
        assert.is_nil(found)
        assert.truthy(err:find(want, 1, true), err)
        assert.is_nil(err:find("[\r\n]"))
    end

    it("resolves a tag and fetches a blob", function()
        local server = serve()
        local found = assert(resolve(server))
        assert.equal(image.digest, found.digest)
        assert.equal(image.manifest, found.bytes)
        assert.same({ "/hello" }, found.config.config.Cmd)
        local ok, err, file = fetch_blob(server, image.layers[1])
        assert.is_true(ok, err)
        assert.equal(image.blobs[image.layers[1]], shell.read(file))
        -- All four kinds are asked for: docker-registry says 404 otherwise.
        local accept = server.requests[1].headers.accept
        for _, word in ipairs { "oci.image.index", "manifest.list", "oci.image.manifest",
            "manifest.v2" } do
            assert.truthy(accept:find(word, 1, true))
        end
    end)

    it("resolves a digest", function()
        local server = serve()
        assert.equal(image.digest, assert(resolve(server, "a@" .. image.digest)).digest)
    end)

    describe("authorization", function()
        local function bearer(server, req, extra)
            return ('Bearer realm="%s/token",service="spec",scope="repository:%s:pull"%s')
                :format(server.url, req.path:match("^/v2/(.-)/%l+/[^/]+$") or "x", extra or "")
        end
        -- A registry that wants the newest of the tokens it gave out.
        local function guarded(before)
            local state = { given = 0 }
            state.server = serve(image, function(req, res, kind, what)
                if before and before(req, res, kind, what, state) then
                    return true
                elseif req.path == "/token" then
                    state.given = state.given + 1
                    state.token_request = req
                    res:send(200, {}, ('{"token":"T%d","expires_in":300}'):format(state.given))
                    return true
                elseif kind ~= "other" and req.headers.authorization ~= "Bearer T" .. state.given
                    or state.given == 0 then
                    res:send(401, { ["WWW-Authenticate"] = bearer(state.server, req) }, "")
                    return true
                end
            end)
            return state
        end

        it("gets a token anonymously, once", function()
            local state = guarded()
            assert(resolve(state.server))
            assert.equal(1, state.given)
            assert.truthy(state.token_request.query:find("scope=repository%3Ateam%2Fapp%3Apull", 1, true))
            assert.is_nil(state.token_request.headers.authorization)
        end)

        it("sends credentials to the realm only", function()
            creds = { username = "al", password = "pw", source = "spec" }
            local state = guarded()
            assert(resolve(state.server))
            assert.equal("Basic YWw6cHc=", state.token_request.headers.authorization)
            for _, req in ipairs(state.server.requests) do
                if req.path ~= "/token" and req.headers.authorization then
                    assert.truthy(req.headers.authorization:find("^Bearer "))
                end
            end
        end)

        it("renews a token that expires in the middle", function()
            local expired = false
            local state = guarded(function(_, _, kind, _, state)
                if kind == "blob" and not expired then
                    expired = true
                    state.given = state.given + 1 -- what was given out counts no more
                end
            end)
            assert(resolve(state.server))
            assert.equal(3, state.given)
        end)

        it("gives up on an endless 401", function()
            local server
            server = serve(image, function(req, res)
                if req.path == "/token" then
                    res:send(200, {}, '{"token":"x"}')
                else
                    res:send(401, { ["WWW-Authenticate"] = bearer(server, req) }, "")
                end
                return true
            end)
            refuses("does not accept the token it gave us", resolve(server))
            assert.truthy(#server.requests < 10)
        end)

        it("asks for what insufficient_scope says", function()
            local state = guarded(function(req, res, kind, _, state)
                if kind == "manifest" and req.headers.authorization == "Bearer T1" then
                    res:send(401, { ["WWW-Authenticate"] = ('Bearer realm="%s/token",'
                        .. 'scope="repository:team/app:pull,push",error="insufficient_scope"')
                        :format(state.server.url) }, "")
                    return true
                end
            end)
            assert(resolve(state.server))
            assert.equal(2, state.given)
            assert.truthy(state.token_request.query:find("scope=repository%3Ateam%2Fapp%3Apull%2Cpush", 1, true))
        end)

        it("uses Basic", function()
            local server = serve(image, function(req, res)
                if req.headers.authorization ~= "Basic YWw6cHc=" then
                    res:send(401, { ["WWW-Authenticate"] = 'Basic realm="x"' }, "")
                    return true
                end
            end)
            refuses("wants a login", resolve(server))
            creds = { username = "al", password = "no", source = "the spec" }
            refuses("refused the credentials from the spec", resolve(server))
            creds = { username = "al", password = "pw", source = "the spec" }
            assert(resolve(server))
        end)

        it("does not follow a hostile realm", function()
            for _, realm in ipairs { "http://169.254.169.254/latest/", "http://10.0.0.1/",
                "file:///etc/passwd", "gopher://127.0.0.1/" } do
                local server = serve(image, function(_, res)
                    res:send(401, { ["WWW-Authenticate"] = ('Bearer realm="%s"'):format(realm) }, "")
                    return true
                end)
                refuses("token realm", resolve(server))
            end
        end)

        it("refuses a huge token answer", function()
            local server
            server = serve(image, function(req, res)
                if req.path == "/token" then
                    res:send(200, {}, '{"token":"' .. ("x"):rep(200000) .. '"}')
                else
                    res:send(401, { ["WWW-Authenticate"] = bearer(server, req) }, "")
                end
                return true
            end)
            refuses("longer than 65536", resolve(server))
        end)
    end)

    describe("redirects", function()
        it("follows to another host, without credentials", function()
            creds = { username = "al", password = "pw", source = "spec" }
            local cdn = serve(image)
            local server = serve(image, function(req, res, kind)
                if not req.headers.authorization then
                    res:send(401, { ["WWW-Authenticate"] = 'Basic realm="x"' }, "")
                    return true
                elseif kind == "blob" then
                    res:send(307, { Location = cdn.url:gsub("127%.0%.0%.1", "localhost") .. req.path
                        .. "?sig=1" }, "")
                    return true
                end
            end)
            assert(resolve(server))
            assert.is_true((fetch_blob(server, image.layers[1])))
            assert.equal(2, #cdn.requests)
            for _, req in ipairs(cdn.requests) do
                assert.is_nil(req.headers.authorization)
                assert.equal("sig=1", req.query)
            end
        end)

        it("does not answer a 401 of the target", function()
            creds = { username = "al", password = "pw", source = "spec" }
            local cdn = serve(image, function(_, res)
                res:send(401, { ["WWW-Authenticate"] = 'Basic realm="x"' }, "")
                return true
            end)
            local server = serve(image, function(req, res, kind)
                if kind == "manifest" then
                    res:send(302, { Location = cdn.url .. req.path }, "")
                    return true
                end
            end)
            refuses("access denied", resolve(server))
            assert.equal(1, #cdn.requests)
        end)

        it("keeps the token on the way within the registry", function()
            creds = { username = "al", password = "pw", source = "spec" }
            local server = serve(image, function(req, res, kind)
                if not req.headers.authorization then
                    res:send(401, { ["WWW-Authenticate"] = 'Basic realm="x"' }, "")
                    return true
                elseif kind == "manifest" and not req.path:find("^/v2/moved") then
                    res:send(301, { Location = req.path:gsub("^/v2/", "/v2/moved/") }, "")
                    return true
                end
            end)
            assert(resolve(server))
        end)

        for location, want in pairs {
            ["http://169.254.169.254/x"] = "a link-local address, was refused",
            ["http://0.0.0.0/x"] = "a unspecified address, was refused",
            ["ftp://127.0.0.1/x"] = "redirect to nowhere",
            ["http://u:p@127.0.0.1/x"] = "user name",
            ["/v2/loop/manifests/v1"] = "more than 10 redirects",
        } do
            it("refuses " .. location, function()
                local server = serve(image, function(_, res)
                    res:send(302, { Location = location }, "")
                    return true
                end)
                refuses(want, resolve(server))
                assert.truthy(#server.requests <= 11)
            end)
        end

        it("refuses one without Location", function()
            local server = serve(image, function(_, res)
                res:send(302, {}, "")
                return true
            end)
            refuses("without a Location", resolve(server))
        end)
    end)

    describe("retries", function()
        -- Answer the first n manifest requests with a status.
        local function failing(n, status, headers, body)
            local left = n
            return serve(image, function(_, res, kind)
                if kind == "manifest" and left > 0 then
                    left = left - 1
                    res:send(status, headers or {}, body or "")
                    return true
                end
            end)
        end
        it("tries 5xx, 408 and 429 again", function()
            for _, status in ipairs { 500, 502, 503, 408, 429 } do
                assert(resolve(failing(2, status)))
            end
            assert.equal("retry", events[1].type)
            assert.equal(10, #events)
        end)
        it("waits as long as Retry-After says", function()
            assert(resolve(failing(1, 429, { ["Retry-After"] = "1" })))
            assert.equal(1, events[1].delay)
        end)
        it("does not wait for hours", function()
            local server = failing(9, 429, { ["Retry-After"] = "7200" },
                '{"errors":[{"code":"TOOMANYREQUESTS","message":"pull rate limit"}]}')
            refuses("too many requests (429), pull rate limit, try again in 7200 s", resolve(server))
            assert.equal(0, #events)
        end)
        it("ends after five tries", function()
            local server = failing(99, 503, {}, '{"errors":[{"message":"down for\\nnow"}]}')
            refuses("answered 503: down for now", resolve(server))
            assert.equal(5, server.count("GET", "/v2/team/app/manifests/v1"))
        end)
        it("does not repeat what will not change", function()
            for status, want in pairs { [404] = "not found", [403] = "access denied",
                [400] = "answered 400", [501] = "answered 501" } do
                local server = failing(99, status)
                refuses(want, resolve(server))
                assert.equal(1, server.count("GET", "/v2/team/app/manifests/v1"))
            end
        end)
        it("tries a dropped connection again", function()
            local left = 2
            local server = serve(image, function(_, res, kind)
                if kind == "manifest" and left > 0 then
                    left = left - 1
                    res:drop()
                    return true
                end
            end)
            assert(resolve(server))
        end)
        it("says at once that nobody is there", function()
            local server = serve()
            server.stop()
            refuses("cannot reach the registry", resolve(server))
            assert.equal(0, #events)
        end)
    end)

    describe("blobs", function()
        local digest, bytes
        setup(function()
            -- Big enough to be cut in pieces.
            local text = {}
            math.randomseed(1)
            for i = 1, 60000 do
                text[i] = ("%x"):format(math.random(0))
            end
            image = tiny.make { layers = { { "big", table.concat(text) }, { "b", "b" } } }
            digest = image.layers[1]
            bytes = image.blobs[digest]
        end)

        it("resumes a body that breaks off", function()
            local cut = #bytes // 3
            local server = serve(image, function(req, res, kind)
                if kind == "blob" and not req.headers.range then
                    res:send(200, { ["Content-Length"] = #bytes }, bytes:sub(1, cut))
                    return true
                end
            end)
            local ok, err, file = fetch_blob(server, digest)
            assert.is_true(ok, err)
            assert.equal(bytes, shell.read(file))
            assert.equal("bytes=" .. cut .. "-", server.requests[2].headers.range)
        end)
        it("resumes what an earlier run left", function()
            shell.write(dir .. "/blob", bytes:sub(1, 1000))
            local server = serve()
            assert.is_true((fetch_blob(server, digest)))
            assert.equal("bytes=1000-", server.requests[1].headers.range)
            assert.equal(bytes, shell.read(dir .. "/blob"))
        end)
        it("starts over when the server does no ranges", function()
            shell.write(dir .. "/blob", ("x"):rep(1000))
            local server = serve(image, function(req)
                req.headers.range = nil
            end)
            assert.is_true((fetch_blob(server, digest)))
            assert.equal(bytes, shell.read(dir .. "/blob"))
        end)
        it("starts over when what was left is bad", function()
            for _, left in ipairs { ("x"):rep(1000), bytes .. "x", ("x"):rep(#bytes) } do
                shell.write(dir .. "/blob", left)
                local ok, err = fetch_blob(serve(), digest)
                assert.is_true(ok, err)
                assert.equal(bytes, shell.read(dir .. "/blob"))
            end
        end)
        it("starts over after a 416", function()
            shell.write(dir .. "/blob", bytes:sub(1, 1000))
            local server = serve(image, function(req, res, kind)
                if kind == "blob" and req.headers.range then
                    res:send(416, {}, "")
                    return true
                end
            end)
            local ok, err = fetch_blob(server, digest)
            assert.is_true(ok, err)
        end)
        it("gives up when every body breaks off", function()
            local server = serve(image, function(_, res, kind)
                if kind == "blob" then
                    res:send(200, { ["Content-Length"] = #bytes }, bytes:sub(1, 10))
                    return true
                end
            end)
            refuses("layer " .. digest, fetch_blob(server, digest))
            assert.equal(5, #server.requests)
        end)
        it("refuses wrong bytes, and keeps none", function()
            local server = serve(image, function(_, res, kind)
                if kind == "blob" then
                    res:send(200, {}, ("x"):rep(#bytes))
                    return true
                end
            end)
            refuses("digest is", fetch_blob(server, digest))
            assert.equal(1, #server.requests)
            assert.is_nil(files.size(dir .. "/blob"))
        end)
        it("refuses a body that is too long", function()
            local server = serve(image, function(_, res, kind)
                if kind == "blob" then
                    res:head(200, {})
                    res:write(bytes .. "more")
                    res:finish()
                    return true
                end
            end)
            refuses("longer than", fetch_blob(server, digest))
            assert.is_nil(files.size(dir .. "/blob"))
        end)
        it("takes foreign layers from https only", function()
            local server = serve(image, function(_, res, kind)
                if kind == "blob" then
                    res:send(404, {}, "")
                    return true
                end
            end)
            local ok, err = with(server, function(c)
                return c:blob({ digest = digest, size = #bytes,
                    urls = { server.url .. "/x", "https://127.0.0.1/x", "https://10.0.0.1/x" } },
                    dir .. "/blob")
            end)
            refuses("none of its addresses is usable", ok, err)
            assert.equal(1, #server.requests)
        end)
    end)

    describe("manifests", function()
        -- A registry whose manifest is these bytes.
        local function lying(bytes, content_type, headers)
            return serve(image, function(_, res, kind)
                if kind == "manifest" then
                    headers = headers or {}
                    headers["Content-Type"] = content_type or tiny.manifest_type
                    res:send(200, headers, bytes)
                    return true
                end
            end)
        end
        it("refuses a huge one", function()
            refuses("longer than 4194304", resolve(lying((" "):rep(5 << 20))))
        end)
        it("refuses one of another digest", function()
            refuses("digest is", resolve(lying(image.manifest .. " "), "a@" .. image.digest))
        end)
        it("does not believe Docker-Content-Digest", function()
            local found = assert(resolve(lying(image.manifest, nil,
                { ["Docker-Content-Digest"] = "sha256:" .. ("0"):rep(64) })))
            assert.equal(image.digest, found.digest)
        end)
        it("refuses a type that is not its own", function()
            refuses("calls itself", resolve(lying(image.manifest, tiny.index_type)))
        end)
        it("refuses schema 1 and artefacts by name", function()
            refuses("schema 1", resolve(lying('{"schemaVersion":1}',
                "application/vnd.docker.distribution.manifest.v1+prettyjws")))
            local chart = tiny.make { manifest = { artifactType = "application/vnd.helm" } }
            refuses("artefact", resolve(serve(chart)))
        end)
        it("refuses HTML", function()
            refuses("not JSON", resolve(lying("<html>log in here</html>", "text/html")))
        end)
        it("refuses a config that is not what was named", function()
            local server = serve(image, function(_, res, kind, what)
                if kind == "blob" and what ~= image.layers[1] then
                    res:send(200, {}, '{"os":"linux"}')
                    return true
                end
            end)
            refuses("digest is", resolve(server))
        end)
    end)

    describe("indexes", function()
        local arm = tiny.make { architecture = "arm64" }
        local amd = tiny.make {}
        it("chooses the platform", function()
            local index = tiny.index { { arm, platform = "linux/arm64/v8" },
                { amd, platform = "linux/amd64" } }
            local found = assert(resolve(serve(index)))
            assert.equal(amd.digest, found.digest)
            assert.equal(index.digest, found.source_digest)
        end)
        it("says what there is", function()
            refuses("no image for linux/amd64; there is linux/arm64/v8",
                resolve(serve(tiny.index { { arm, platform = "linux/arm64/v8" },
                    { amd, platform = "unknown/unknown" } })))
        end)
        it("goes through nested ones, but not for ever", function()
            local nested = amd
            for _ = 1, 4 do
                nested = tiny.index { { nested, platform = "linux/amd64" } }
            end
            assert.equal(amd.digest, assert(resolve(serve(nested))).digest)
            nested = tiny.index { { nested, platform = "linux/amd64" } }
            refuses("nested deeper than 4", resolve(serve(nested)))
        end)
        it("looks into entries without a platform", function()
            local found = assert(resolve(serve(tiny.index { { arm }, { amd } })))
            assert.equal(amd.digest, found.digest)
        end)
        it("refuses an image that lies about its platform", function()
            refuses("it is for linux/arm64, not for linux/amd64",
                resolve(serve(tiny.index { { arm, platform = "linux/amd64" } })))
            refuses("it is for linux/arm64", resolve(serve(arm)))
        end)
    end)

    it("reads Retry-After as seconds or as a date", function()
        assert.equal(120, http.retry_after("120"))
        assert.equal(10, http.retry_after("Wed, 21 Oct 2015 07:28:00 GMT", 1445412470))
        assert.equal(0, http.retry_after("Wed, 21 Oct 2015 07:28:00 GMT", 1445412490))
        assert.is_nil(http.retry_after("soon"))
        assert.is_nil(http.retry_after(nil))
    end)

    it("refuses an unknown option by name", function()
        assert.error_matches(function()
            registry.open(assert(reference.parse("a")), { insecur = true })
        end, 'unknown option "insecur"')
    end)

    it("serves many tasks over one client", function()
        local server = serve()
        loop.run(function()
            local c <close> = client(server)
            local tasks = {}
            for i = 1, 8 do
                tasks[i] = loop.spawn(function()
                    return assert(c:resolve(wanted)).digest
                end)
            end
            for _, task in ipairs(tasks) do
                assert.equal(image.digest, task:join())
            end
        end)
    end)

    it("can stand servers that hang up while it leaves", function()
        local server = faulty.start(function(_, res)
            res:hang()
        end)
        table.insert(servers, server)
        loop.run(function()
            local c <close> = client(server)
            local task = loop.spawn(c.resolve, c, wanted)
            loop.sleep(0.05)
            task:cancel()
        end)
    end)
end)
