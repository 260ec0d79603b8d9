-- SPDX-License-Identifier: Apache-2.0
--
-- Pulls against a real docker-registry, with images that umoci made and skopeo
-- pushed; and what must hold when disks fill, stores rot and processes die.

local uv = require "luv"
local core = require "sm.image_core"
local files = require "sm.files"
local image = require "sm.image"
local json = require "sm.json"
local loop = require "sm.loop"
local child = require "support.child"
local images = require "support.images"
local registry = require "support.registry"
local shell = require "support.shell"
local tiny = require "support.tiny_image"

local q = shell.quote

describe("sm.image", function()
    local shared, layout, reg -- made once
    local dir, store_dir      -- of one test
    local events

    setup(function()
        shared = shell.tmpdir()
        layout = images.make(shared .. "/oci")
        reg = registry.start()
        images.copy("oci:" .. layout .. ":multi", "docker://" .. reg.host .. "/team/multi:v1")
        images.copy("oci:" .. layout .. ":one", "docker://" .. reg.host .. "/team/one:v1")
        images.copy("oci:" .. layout .. ":multi", "docker://" .. reg.host .. "/team/multi:v2s2",
            "--format", "v2s2")
    end)
    teardown(function()
        reg.stop()
        shell.remove(shared)
    end)
    before_each(function()
        dir = shell.tmpdir()
        store_dir = dir .. "/store"
        events = {}
    end)
    after_each(function()
        shell.remove(dir)
    end)

    local function options(more)
        local opts = { store = store_dir, retry_delay = 0.01, progress = function(event)
            events[#events + 1] = event
        end }
        for k, v in pairs(more or {}) do
            opts[k] = v
        end
        return opts
    end
    local function pull(ref, more)
        return image.pull(ref, options(more))
    end
    local function phases(phase)
        local n = 0
        for _, event in ipairs(events) do
            if event.type == "layer" and event.phase == phase then
                n = n + 1
            end
        end
        return n
    end
    local function refuses(want, found, err)
        assert.is_nil(found)
        assert.truthy(err:find(want, 1, true), err)
        assert.is_nil(err:find("[\r\n]"))
    end
    -- The root device as one file, for fsck.erofs.
    local function device(img)
        local out = dir .. "/device"
        local script = { ": > " .. q(out) }
        for _, extent in ipairs(img.extents) do
            assert.equal(0, extent.offset)
            assert.equal(extent.length, files.size(extent.path))
            script[#script + 1] = ("cat %s >> %s"):format(q(extent.path), q(out))
        end
        shell.run(table.concat(script, "\n"))
        assert.equal(img.size, files.size(out))
        return out
    end
    -- Every blob has its digest, nothing unfinished is about.
    local function check_store()
        for _, entry in ipairs(files.list(store_dir .. "/blobs/sha256")) do
            assert.equal("sha256:" .. entry.name,
                core.sha256 { file = store_dir .. "/blobs/sha256/" .. entry.name })
        end
        assert.same({}, files.list(store_dir .. "/tmp"))
    end

    it("pulls an image that skopeo reads and fsck.erofs accepts", function()
        local ref = reg.host .. "/team/multi:v1"
        local img = assert(pull(ref))
        assert.equal(ref, img.reference)
        assert.same({ "/bin/sh" }, img.config.config.Cmd)
        assert.equal("/data", img.config.config.WorkingDir)
        assert.equal(3, #img.layers)
        assert.equal(3, phases("done"))
        shell.run { "fsck.erofs", device(img) }
        local theirs = shell.run { "skopeo", "inspect", "--tls-verify=false", "--format",
            "{{.Digest}}", "docker://" .. ref }:gsub("%s+$", "")
        assert.equal(theirs, img.digest)
        local ours = json.decode(shell.run { "skopeo", "inspect", "oci:" .. store_dir .. ":" .. ref })
        assert.equal(theirs, ours.Digest)
        assert.equal(img.layers[1].digest, ours.Layers[1])
        check_store()
    end)

    it("pulls Docker's media types to the same root", function()
        local a <close> = assert(pull(reg.host .. "/team/multi:v1"))
        local one = core.sha256 { file = a.extents[1].path }
        local b <close> = assert(pull(reg.host .. "/team/multi:v2s2"))
        assert.is_not.equal(a.digest, b.digest)
        assert.equal(one, core.sha256 { file = b.extents[1].path })
    end)

    it("fetches and converts only what is new", function()
        local a <close> = assert(pull(reg.host .. "/team/one:v1"))
        assert.truthy(a)
        events = {}
        local b <close> = assert(pull(reg.host .. "/team/multi:v1"))
        assert.equal(1, phases("exists"))
        assert.equal(2, phases("done"))
        assert.truthy(b)
    end)

    it("needs no network for what is there", function()
        local private = registry.start { data = reg.dir .. "/data" }
        local ref = private.host .. "/team/one:v1"
        local first = assert(pull(ref))
        private.stop()
        events = {}
        local again <close> = assert(pull(ref))
        assert.same({}, events)
        assert.same(first.extents, again.extents)
        local never <close> = assert(pull(ref, { policy = "never" }))
        local by_digest <close> = assert(pull(private.host .. "/team/one@" .. first.digest))
        assert.equal(first.digest, never.digest)
        assert.equal(first.digest, by_digest.digest)
        refuses("cannot reach the registry", pull(ref, { policy = "always" }))
        refuses("pulling was forbidden", pull(private.host .. "/team/x", { policy = "never" }))
        refuses("cannot reach the registry", pull(private.host .. "/team/x"))
    end)

    it("follows a tag that moves, when asked", function()
        local server
        local old, new = tiny.make(), tiny.make { layers = { { "new", "new" } } }
        local current = old
        server = tiny.serve(old, function(_, res, kind, what)
            local head = { ["Content-Type"] = current.type, ["Docker-Content-Digest"] = current.digest }
            if kind == "manifest" then
                res:send(200, head, current.manifest)
                return true
            elseif current.blobs[what] then
                res:send(200, {}, current.blobs[what])
                return true
            end
        end)
        local ref = server.host .. "/app:latest"
        local function digest(policy)
            local img <close> = assert(pull(ref, { policy = policy }))
            return img.digest
        end
        assert.equal(old.digest, digest("missing"))
        local before = #server.requests
        assert.equal(old.digest, digest("always"))
        -- One HEAD (after looking for https) is all it takes.
        assert.equal(1, server.count("HEAD", "/v2/app/manifests/latest"))
        assert.truthy(#server.requests - before <= 2)
        current = new
        assert.equal(old.digest, digest("missing"))
        assert.equal(new.digest, digest("always"))
        assert.equal(1, #image.list(options()))
        server.stop()
    end)

    it("lists, inspects and removes", function()
        local ref = reg.host .. "/team/one:v1"
        local img = assert(pull(ref))
        local list = assert(image.list(options()))
        assert.equal(1, #list)
        assert.equal(ref, list[1].reference)
        assert.equal(img.digest, list[1].digest)
        assert.equal("linux/amd64", list[1].platform)
        assert.is_true(list[1].ready)
        assert.truthy(list[1].size > 100000)
        local about = assert(image.inspect(ref, options()))
        assert.equal(img.digest, about.digest)
        assert.same({ "/bin/sh" }, about.config.config.Cmd)
        assert.equal(list[1].id, about.manifest.config.digest)
        refuses("is in use by a running VM", image.remove(ref, options()))
        img:close()
        refuses("no such image", image.remove(reg.host .. "/team/other", options()))
        assert(image.remove(list[1].id:sub(8, 19), options()))
        assert.same({}, image.list(options()))
        assert.same({}, files.list(store_dir .. "/derived/layers"))
        assert.same({}, files.list(store_dir .. "/derived/images"))
        check_store()
    end)

    it("keeps what another image shares", function()
        local one = assert(pull(reg.host .. "/team/one:v1"))
        local multi = assert(pull(reg.host .. "/team/multi:v1"))
        one:close()
        assert(image.remove(reg.host .. "/team/one:v1", options()))
        shell.run { "fsck.erofs", device(multi) }
        multi:close()
        local again <close> = assert(pull(reg.host .. "/team/multi:v1", { policy = "never" }))
        assert.equal(multi.digest, again.digest)
    end)

    it("opens an OCI layout folder", function()
        local img = assert(image.get("oci:" .. layout .. ":multi", options()))
        assert.equal("oci:" .. layout .. ":multi", img.reference)
        shell.run { "fsck.erofs", device(img) }
        local again <close> = assert(image.get(layout .. ":multi", options()))
        assert.same(img.extents, again.extents)
        refuses("holds 2 images; name one", image.get(layout, options()))
        refuses('no image named "x"', image.get("oci:" .. layout .. ":x", options()))
        refuses("not an OCI image layout", image.get("oci:" .. dir, options()))
        refuses("no such file or folder", image.get(dir .. "/none", options()))
        assert.same({}, image.list(options()))
    end)

    it("refuses a layout that lies", function()
        local broken = dir .. "/broken"
        shell.run(("umoci init --layout %s"):format(q(broken)))
        shell.run { "skopeo", "copy", "-q", "oci:" .. layout .. ":one", "oci:" .. broken .. ":one" }
        for i, entry in ipairs(files.list(broken .. "/blobs/sha256")) do
            local path = broken .. "/blobs/sha256/" .. entry.name
            local good = shell.read(path)
            for _, bad in ipairs { "X" .. good:sub(2), good:sub(1, #good // 2) } do
                store_dir = dir .. "/store" .. i .. #bad
                shell.write(path, bad)
                local img, err = image.get("oci:" .. broken .. ":one", options())
                assert.is_nil(img)
                assert.is_nil(err:find("\n"))
            end
            shell.write(path, good)
        end
        local img <close> = assert(image.get("oci:" .. broken .. ":one", options()))
        assert.truthy(img)
    end)

    it("asks a verifier, who may refuse", function()
        local seen
        local ref = reg.host .. "/team/one:v1"
        refuses("refused by policy: not signed", pull(ref, { verify = function(info)
            seen = info
            return false, "not signed"
        end }))
        assert.equal(ref, seen.reference)
        assert.equal("linux", seen.config.os)
        assert.same({}, image.list(options()))
        assert.equal(0, phases("download"))
    end)

    it("refuses what it does not know, by name", function()
        assert.error_matches(function()
            image.pull("x", { progres = print })
        end, 'unknown option "progres"')
        assert.error_matches(function()
            image.pull("x", { policy = "often" })
        end, 'policy "often"')
        refuses("not a platform", pull("x", { platform = "a/b/c/d" }))
        refuses("lowercase", pull("UPPER"))
        refuses("not found", pull(reg.host .. "/team/none"))
        refuses("no image for", (function()
            local server = tiny.serve(tiny.index { { tiny.make(), platform = "linux/s390x" } })
            local img, err = pull(server.host .. "/x")
            server.stop()
            return img, err
        end)())
    end)

    describe("with a login", function()
        local saved
        before_each(function()
            saved = os.getenv("REGISTRY_AUTH_FILE")
            uv.os_setenv("REGISTRY_AUTH_FILE", dir .. "/auth.json")
        end)
        after_each(function()
            if saved then
                uv.os_setenv("REGISTRY_AUTH_FILE", saved)
            else
                uv.os_unsetenv("REGISTRY_AUTH_FILE")
            end
        end)
        local function login(host, user, password)
            shell.write(dir .. "/auth.json", ('{"auths":{"%s":{"username":"%s","password":"%s"}}}')
                :format(host, user, password))
        end

        it("by Basic", function()
            shell.run(("htpasswd -Bbn alice s3cret > %s/htpasswd"):format(q(dir)))
            local private = registry.start { data = reg.dir .. "/data", htpasswd = dir .. "/htpasswd" }
            local ref = private.host .. "/team/one:v1"
            refuses("wants a login, and no credentials were found", pull(ref))
            login(private.host, "alice", "wrong")
            refuses("refused the credentials from " .. dir .. "/auth.json", pull(ref))
            login(private.host, "alice", "s3cret")
            local img <close> = assert(pull(ref))
            assert.truthy(img)
            private.stop()
        end)

        -- A server of tokens that a real registry checks: signed, for alice only.
        -- `life` is how long the registry takes them; it forgives 60 s.
        local function token_server(life)
            local base64 = require "sm.base64"
            local faulty = require "support.faulty_server"
            shell.run(("cd %s; openssl req -x509 -newkey rsa:2048 -nodes -keyout k.pem -out c.pem "
                .. "-subj /CN=spec -days 2"):format(q(dir)))
            local function url64(bytes)
                return (base64.encode(bytes):gsub("[+/=]", { ["+"] = "-", ["/"] = "_", ["="] = "" }))
            end
            local der = base64.encode(shell.run(("openssl x509 -in %s/c.pem -outform DER"):format(q(dir))))
            local server
            server = faulty.start(function(req, res)
                server.asked[#server.asked + 1] = req
                local name = req.query:match("scope=repository%%3A(.-)%%3Apull"):gsub("%%2F", "/")
                local allowed = req.headers.authorization == "Basic YWxpY2U6czNjcmV0"
                local now = os.time()
                server.good_until = now + life
                local head = url64(('{"typ":"JWT","alg":"RS256","x5c":["%s"]}'):format(der))
                local claims = url64(('{"iss":"spec","sub":"","aud":"spec","exp":%d,"nbf":%d,"iat":%d,'
                    .. '"jti":"%d","access":[%s]}'):format(now + life - 60, now - 100, now, #server.asked, allowed
                    and ('{"type":"repository","name":"%s","actions":["pull"]}'):format(name) or ""))
                shell.write(dir .. "/tbs", head .. "." .. claims)
                local signature = shell.run(("openssl dgst -sha256 -sign %s/k.pem %s/tbs")
                    :format(q(dir), q(dir)))
                res:send(200, {}, ('{"token":"%s.%s.%s"}'):format(head, claims, url64(signature)))
            end)
            server.asked = {}
            return server, registry.start { data = reg.dir .. "/data", token = {
                realm = server.url .. "/token", service = "spec", issuer = "spec",
                bundle = dir .. "/c.pem" } }
        end

        it("by Bearer, with tokens the registry itself checks", function()
            local tokens, private = token_server(360)
            local ref = private.host .. "/team/multi:v1"
            local img, err = pull(ref)
            assert.is_nil(img)
            assert.truthy(err:find(private.host, 1, true), err)
            login(private.host, "alice", "s3cret")
            tokens.asked = {}
            local good <close> = assert(pull(ref))
            assert.truthy(good)
            assert.equal(1, #tokens.asked)
            private.stop()
            tokens.stop()
        end)

        it("by Bearer, with a token that runs out in the middle of the pull", function()
            local tokens, private = token_server(4)
            login(private.host, "alice", "s3cret")
            local waited = false
            local good <close> = assert(pull(private.host .. "/team/multi:v1", { fetch = function(_, _, default)
                -- We still believe in it; the registry no longer does.
                while os.time() <= tokens.good_until and not waited do
                    loop.sleep(0.1)
                end
                waited = true
                return default()
            end }))
            assert.truthy(#tokens.asked >= 2, #tokens.asked)
            assert.truthy(good)
            check_store()
            private.stop()
            tokens.stop()
        end)

        it("by Basic, sent to another host for the blobs, with ranges and without the login", function()
            local faulty = require "support.faulty_server"
            shell.run(("htpasswd -Bbn alice s3cret > %s/htpasswd"):format(q(dir)))
            local seen, resumed = {}, 0
            local elsewhere = faulty.start(function(req, res)
                local bytes = shell.read(reg.dir .. "/data" .. req.path)
                seen[req.path] = (seen[req.path] or 0) + 1
                assert(not req.headers.authorization)
                if seen[req.path] == 1 and #bytes > 100000 then
                    res:head(200, { ["Content-Length"] = #bytes })
                    res:write(bytes:sub(1, #bytes // 2))
                    res:finish()
                else
                    resumed = resumed + (req.headers.range and 1 or 0)
                    tiny.send_blob(req, res, bytes)
                end
            end)
            local private = registry.start { data = reg.dir .. "/data", htpasswd = dir .. "/htpasswd",
                redirect = elsewhere.url:gsub("127%.0%.0%.1", "localhost") }
            login(private.host, "alice", "s3cret")
            local good <close> = assert(pull(private.host .. "/team/multi:v1"))
            assert.truthy(good)
            assert.truthy(resumed >= 2, resumed) -- each of the large layers
            for _, req in ipairs(elsewhere.requests) do
                assert.is_nil(req.headers.authorization)
            end
            check_store()
            private.stop()
            elsewhere.stop()
        end)
    end)

    it("speaks TLS, believes the given authority only, and stays there", function()
        shell.run(("cd %s; openssl req -x509 -newkey rsa:2048 -nodes -keyout k.pem -out c.pem "
            .. "-subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -days 2")
            :format(q(dir)))
        local tls = { cert = dir .. "/c.pem", key = dir .. "/k.pem" }
        local secure = registry.start { data = reg.dir .. "/data", tls = tls }
        local img <close> = assert(pull(secure.host .. "/team/one:v1", { cafile = tls.cert }))
        assert.truthy(img)
        local other = registry.start { data = reg.dir .. "/data", tls = tls,
            redirect = "http://" .. reg.host }
        refuses("away from https, was refused",
            pull(other.host .. "/team/multi:v1", { cafile = tls.cert }))
        shell.run(("cd %s; openssl req -x509 -newkey rsa:2048 -nodes -keyout k2.pem -out c2.pem "
            .. "-subj /CN=x -days 2"):format(q(dir)))
        local wrong, err = pull(secure.host .. "/team/multi:v1", { cafile = dir .. "/c2.pem" })
        assert.is_nil(wrong)
        assert.truthy(err:lower():find("certificate", 1, true), err)
        secure.stop()
        other.stop()
    end)

    describe("asks where the machine's configuration says:", function()
        local function configure(text)
            shell.write(dir .. "/registries.conf", text)
            uv.os_setenv("CONTAINERS_REGISTRIES_CONF", dir .. "/registries.conf")
        end
        local config_home
        before_each(function()
            config_home = os.getenv "XDG_CONFIG_HOME"
        end)
        after_each(function()
            uv.os_unsetenv "CONTAINERS_REGISTRIES_CONF"
            if config_home then
                uv.os_setenv("XDG_CONFIG_HOME", config_home)
            else
                uv.os_unsetenv "XDG_CONFIG_HOME"
            end
        end)

        it("a mirror first, the next when it fails, the registry last", function()
            local retries = {}
            local function watch(e)
                retries[#retries + 1] = e.type == "retry" and e.place or nil
            end
            local dead = registry.start()
            dead.stop()
            configure(([=[
                [[registry]]
                location = "r.invalid"
                [[registry.mirror]]
                location = "%s"
                [[registry.mirror]]
                location = "%s"
            ]=]):format(dead.host, reg.host))
            local img <close> = assert(pull("r.invalid/team/multi:v1", { progress = watch }))
            assert.equal("r.invalid/team/multi:v1", img.reference)
            assert.same({ reg.host }, retries) -- the dead one was asked once, not once a layer
            refuses("cannot reach the registry r.invalid", pull("r.invalid/team/none:v1"))
            check_store()
        end)

        it("another location, and not where it is blocked", function()
            configure(('[[registry]]\nprefix = "r.invalid/a"\nlocation = "%s/team"\n'
                .. '[[registry]]\nlocation = "b.invalid"\nblocked = true\n'):format(reg.host))
            local img <close> = assert(pull "r.invalid/a/one:v1")
            assert.equal("r.invalid/a/one:v1", img.reference)
            refuses("b.invalid/x:latest: b.invalid is blocked by", pull "b.invalid/x")
        end)

        it("as whom it says, believing the authority it names", function()
            local ca = dir .. "/certs"
            shell.run(([[mkdir -p %s; cd %s
                openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=ca -days 2
                for who in server client; do
                    openssl req -newkey rsa:2048 -nodes -keyout $who.key -out $who.csr -subj /CN=$who
                    printf 'subjectAltName=IP:127.0.0.1\n' > ext
                    openssl x509 -req -in $who.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
                        -extfile ext -out $who.pem
                done]]):format(q(ca), q(ca)))
            local strict = registry.start { data = reg.dir .. "/data",
                tls = { cert = ca .. "/server.pem", key = ca .. "/server.key", clients = ca .. "/ca.pem" } }
            uv.os_setenv("XDG_CONFIG_HOME", dir .. "/config")
            local certs = ("%s/config/containers/certs.d/%s"):format(dir, strict.host)
            shell.run { "mkdir", "-p", certs }
            shell.run { "cp", ca .. "/ca.pem", certs .. "/ca.crt" }
            local stranger, why = pull(strict.host .. "/team/one:v1")
            shell.run { "cp", ca .. "/client.pem", certs .. "/me.cert" }
            shell.run { "cp", ca .. "/client.key", certs .. "/me.key" }
            local img <close> = assert(pull(strict.host .. "/team/one:v1"))
            strict.stop()
            -- The server's alert may come before or after it hangs up: no certain words.
            refuses(strict.host .. "/team/one:v1: ", stranger, why)
            assert.truthy(img)
        end)
    end)

    it("does the work once for many at once", function()
        local what = tiny.make()
        local server = tiny.serve(what)
        loop.run(function()
            local children = {}
            for i = 1, 10 do
                children[i] = child.lua(([[
                    local img = assert(require "sm.image".pull(%q, { store = %q }))
                    print(img.digest)]]):format(server.host .. "/app", store_dir))
            end
            for _, other in ipairs(children) do
                local code, _, text = other:wait()
                assert.equal(0, code, text)
                assert.equal(what.digest .. "\n", text)
            end
        end)
        for _, digest in ipairs(what.layers) do
            assert.equal(1, server.count("GET", "/v2/app/blobs/" .. digest))
        end
        server.stop()
        check_store()
    end)

    it("recovers from kill -9 at any point of pull, commit, prune and rmi", function()
        local ref = reg.host .. "/team/multi:v1"
        local function run(milliseconds, code)
            loop.run(function()
                local other = child.lua(code)
                if milliseconds then
                    loop.sleep(milliseconds / 1000)
                    other:kill()
                end
                other:wait()
            end)
        end
        shell.run(("mkdir -p %s/upper; seq 200000 > %s/upper/new"):format(q(dir), q(dir)))
        local works = {
            ([[require "sm.image".pull(%q, { store = %q })]]):format(ref, store_dir),
            ([[require "sm.image".remove(%q, { store = %q })]]):format(ref, store_dir),
            ([[require "sm.image".prune { store = %q, all = true }]]):format(store_dir),
            ([[local img <close> = assert(require "sm.image".pull(%q, { store = %q }))
               require "support.agent".with({}, function(a)
                   require "sm.commit".commit({ image = img, spawn = function(_, opts)
                       opts.cwd = %q
                       return a:spawn(opts)
                   end }, "mine:" .. math.random(3), { store = %q })
               end)]]):format(ref, store_dir, dir .. "/upper", store_dir),
        }
        math.randomseed(os.time())
        local rounds = tonumber(os.getenv("SM_SPEC_KILLS") or "") or 12
        for round = 1, rounds do
            -- A pull or a commit before what takes away, so that there is something.
            local work = works[({ 1, 4, 3, 4, 1, 2 })[round % 6 + 1]]
            run(math.random(5, 400), work)
            assert(image.list(options()))
            assert.same({}, image.verify { store = store_dir }.problems, "round " .. round)
        end
        local img = assert(pull(ref))
        shell.run { "fsck.erofs", device(img) }
        run(nil, works[4]) -- whole, this time
        assert.same({}, image.verify { store = store_dir, deep = true }.problems)
        img:close()
        -- A remover who was killed leaves blobs that nobody names; collecting
        -- them and all else leaves an empty store.
        assert(image.prune { store = store_dir, all = true })
        assert.same({}, files.list(store_dir .. "/blobs/sha256"))
        assert.same({}, files.list(store_dir .. "/derived/layers"))
        check_store()
    end)

    describe("damage", function()
        local ref
        before_each(function()
            ref = reg.host .. "/team/multi:v1"
        end)
        local function healthy()
            local img <close> = assert(pull(ref))
            shell.run { "fsck.erofs", device(img) }
            return img
        end
        it("of derived files is repaired from the blobs", function()
            local img = healthy()
            for i, extent in ipairs(img.extents) do
                local steps = { { "truncate", "-s", "4096", extent.path }, { "rm", extent.path } }
                for _, step in ipairs(steps) do
                    shell.run(step)
                    events = {}
                    assert.same(img.extents, healthy().extents)
                    assert.equal(0, phases("download"), "extent " .. i)
                end
            end
            shell.write(store_dir .. "/derived/images/" .. img.digest:gsub(":", "-") .. "/image.json", "{")
            healthy()
            shell.run { "rm", "-r", store_dir .. "/derived" }
            healthy()
        end)
        it("of blobs is repaired from the registry", function()
            local img = healthy()
            for _, layer in ipairs(img.layers) do
                local blob = store_dir .. "/blobs/sha256/" .. layer.digest:sub(8)
                local good = shell.read(blob)
                for _, bad in ipairs { good:sub(1, 100), "X" .. good:sub(2) } do
                    shell.write(blob, bad)
                    shell.run { "rm", "-r", store_dir .. "/derived/layers/"
                        .. layer.diff_id:gsub(":", "-") }
                    assert.same(img.extents, healthy().extents)
                    assert.equal(good, shell.read(blob))
                end
            end
            shell.write(store_dir .. "/blobs/sha256/" .. img.digest:sub(8), "{")
            shell.run { "rm", "-r", store_dir .. "/derived/images" }
            healthy()
        end)
        it("of the index is told in one line", function()
            healthy()
            shell.write(store_dir .. "/index.json", "junk")
            refuses("the image store is damaged: " .. store_dir .. "/index.json is not JSON",
                pull(ref))
            refuses("move " .. store_dir .. " away", image.list(options()))
        end)
    end)

    it("says that the disk is full, leaves nothing half-made, and goes on", function()
        store_dir = dir .. "/small"
        assert(uv.fs_mkdir(store_dir, tonumber("700", 8)))
        if not os.execute(("mount -t tmpfs -o size=3m sm-spec %s 2>/dev/null"):format(q(store_dir))) then
            pending("needs to mount a tmpfs")
            return
        end
        local ok, why = pcall(function()
            local ref = reg.host .. "/team/multi:v1"
            refuses("No space left on device", pull(ref))
            assert.same({}, files.list(store_dir .. "/derived/images"))
            assert.same({}, image.list(options()))
            shell.run { "mount", "-o", "remount,size=64m", store_dir }
            local img <close> = assert(pull(ref))
            shell.run { "fsck.erofs", device(img) }
            check_store()
        end)
        shell.run { "umount", store_dir }
        assert.is_true(ok, why)
    end)

    it("can be cancelled, and leaves no lock", function()
        local what = tiny.make()
        local server = tiny.serve(what, function(_, res, kind, digest)
            if kind == "blob" and digest == what.layers[1] then
                res:hang()
                return true
            end
        end)
        loop.run(function()
            local task = loop.spawn(image.pull, server.host .. "/app", options())
            while server.count("GET", "/v2/app/blobs/" .. what.layers[1]) == 0 do
                loop.sleep(0.01)
            end
            task:cancel()
        end)
        server.stop()
        server = tiny.serve(what)
        local img <close> = assert(pull(server.host .. "/app"))
        assert.equal(what.digest, img.digest)
        server.stop()
    end)

    it("reports the first error of a layer and ends the others", function()
        local what = tiny.make { layers = { { "a", "a" }, { "b", "b" }, { "c", "c" } } }
        local server = tiny.serve(what, function(_, res, kind, digest)
            if kind == "blob" and digest == what.layers[2] then
                res:send(200, {}, ("x"):rep(#what.blobs[digest]))
                return true
            elseif kind == "blob" and digest == what.layers[3] then
                res:hang()
                return true
            end
        end)
        refuses("layer " .. what.layers[2], pull(server.host .. "/app"))
        assert.same({}, image.list(options()))
        server.stop()
    end)

    it("refuses a layer that is not what its config says", function()
        local good, other = tiny.make { layers = { { "a", "a" } } }, tiny.make { layers = { { "b", "b" } } }
        local lying = tiny.make { layers = { { "a", "a" } },
            config = { rootfs = { type = "layers", diff_ids = other.diff_ids } } }
        local server = tiny.serve(lying)
        refuses("diffID is " .. good.diff_ids[1], pull(server.host .. "/app"))
        assert.same({}, files.list(store_dir .. "/derived/layers"))
        server.stop()
    end)
end)
