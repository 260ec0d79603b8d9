-- SPDX-License-Identifier: Apache-2.0
--
-- Images out of the store: pushed to a real docker-registry and fetched back by
-- skopeo, saved and read by skopeo and umoci: the same digests everywhere.

local uv = require "luv"
local image = require "sm.image"
local images = require "support.images"
local json = require "sm.json"
local registry = require "support.registry"
local shell = require "support.shell"
local tiny = require "support.tiny_image"

local q = shell.quote

describe("images go out:", function()
    local shared, store_dir, digest, layers
    local dir, events

    setup(function()
        shared = shell.tmpdir()
        store_dir = shared .. "/store"
        local layout = images.make(shared .. "/oci")
        -- One layer larger than a chunk of an upload, of bytes that do not pack.
        shell.run(([[cd %s; mkdir big; openssl enc -aes-128-ctr -K 00112233445566778899aabbccddeeff -iv 0 \
            -nosalt </dev/zero 2>/dev/null | head -c 20000000 > big/noise; tar -cf big.tar -C big noise
            umoci raw add-layer --image %s:multi big.tar]]):format(q(shared), q(layout)))
        images.copy("oci:" .. layout .. ":multi", "oci-archive:" .. shared .. "/multi.tar:multi")
        digest = assert(image.load(shared .. "/multi.tar", { store = store_dir }))[1].digest
        assert(image.tag(digest:sub(8), "team/multi:v1", { store = store_dir }))
        layers = image.inspect("team/multi:v1", { store = store_dir }).manifest.layers
    end)
    teardown(function()
        shell.remove(shared)
    end)
    before_each(function()
        dir = shell.tmpdir()
        events = {}
    end)
    after_each(function()
        shell.remove(dir)
    end)

    local function push(text, to, more)
        local opts = { store = store_dir, to = to, retry_delay = 0.01, progress = function(e)
            events[#events + 1] = e
        end }
        for k, v in pairs(more or {}) do
            opts[k] = v
        end
        return image.push(text, opts)
    end
    local function count(phase)
        local n = 0
        for _, e in ipairs(events) do
            n = n + (e.phase == phase and 1 or 0)
        end
        return n
    end
    local function refuses(want, found, err)
        assert.is_nil(found)
        assert.truthy(err:find(want, 1, true), err)
        assert.is_nil(err:find("[\r\n]"))
    end

    it("pushed, and skopeo fetches the same digests back", function()
        local reg = registry.start()
        local pushed = assert(push("team/multi:v1", reg.host .. "/a/multi:v1"))
        assert.equal(digest, pushed.digest)
        assert.equal(#layers + 1, count("done"))
        assert.truthy(count("upload") >= 2) -- the big layer went in chunks
        images.copy("docker://" .. reg.host .. "/a/multi:v1", "oci:" .. dir .. "/back:v1")
        local index = json.decode(shell.read(dir .. "/back/index.json"))
        assert.equal(digest, index.manifests[1].digest)
        for _, layer in ipairs(layers) do
            local path = dir .. "/back/blobs/" .. layer.digest:gsub(":", "/")
            assert.equal(layer.digest:sub(8) .. "  -\n", shell.run("sha256sum < " .. q(path)))
        end
        -- Again: nothing is sent twice.
        events = {}
        assert(push("team/multi:v1", reg.host .. "/a/multi:v2"))
        assert.equal(#layers + 1, count("exists"))
        -- To another repository: taken from the first, which we know by name.
        assert(image.tag("team/multi:v1", reg.host .. "/a/multi:v1", { store = store_dir }))
        events = {}
        assert(push("team/multi:v1", reg.host .. "/b/multi:v1"))
        assert.equal(#layers, count("mounted"))
        -- And we pull our own.
        local img <close> = assert(image.pull(reg.host .. "/b/multi:v1", { store = dir .. "/other" }))
        assert.equal(digest, img.digest)
        assert(image.remove(reg.host .. "/a/multi:v1", { store = store_dir }))
        reg.stop()
    end)

    it("pushed with a login", function()
        shell.run(("htpasswd -Bbn alice s3cret > %s/htpasswd"):format(q(dir)))
        local reg = registry.start { htpasswd = dir .. "/htpasswd" }
        local asked
        local function credentials(host)
            asked = host
            return { username = "alice", password = "s3cret", source = "the spec" }
        end
        refuses("wants a login", push("team/multi:v1", reg.host .. "/a:1", { credentials = function() end }))
        assert(push("team/multi:v1", reg.host .. "/a:1", { credentials = credentials }))
        assert.equal(reg.host, asked)
        reg.stop()
    end)

    it("asks for a token that may push, and keeps it at home", function()
        local seen = {}
        local faulty = require "support.faulty_server"
        local elsewhere = faulty.start(function(req, res)
            seen.elsewhere = req.headers.authorization or "none"
            res:send(req.method == "PUT" and 201 or 202, { Location = "/up" }, "")
        end)
        local server
        server = faulty.start(function(req, res)
            if req.path == "/token" then
                seen.scope = req.query
                res:send(200, {}, '{"token":"t"}')
            elseif req.headers.authorization ~= "Bearer t" then
                res:send(401, { ["WWW-Authenticate"] = ('Bearer realm="%s/token",service="s"'):format(server.url) }, "")
            elseif req.method == "HEAD" then
                res:send(404, {}, "")
            elseif req.method == "POST" then
                res:send(202, { Location = elsewhere.url .. "/upload/1" }, "")
            else
                res:send(201, {}, "")
            end
        end)
        local host = server.url:gsub("^%w+://", "")
        assert(push("team/multi:v1", host .. "/a:1", { credentials = function() end }))
        assert.truthy(seen.scope:find("pull%2Cpush", 1, true) or seen.scope:find("pull,push", 1, true), seen.scope)
        assert.equal("none", seen.elsewhere)
        server.stop()
        elsewhere.stop()
    end)

    it("refused in one line", function()
        refuses("no such image", push("none", "localhost:1/x"))
        refuses("a name and a tag", push("team/multi:v1", "localhost:1/x@" .. digest))
        refuses("cannot reach the registry", push("team/multi:v1", "localhost:1/x"))
        local server = tiny.serve(tiny.make(), function(req, res)
            if req.method == "HEAD" then
                res:send(404, {}, "")
            else
                res:send(403, {}, '{"errors":[{"code":"DENIED","message":"read only"}]}')
            end
            return true
        end)
        refuses("access denied by " .. server.host .. ": read only", push("team/multi:v1", server.host .. "/x"))
        server.stop()
        local asked = 0
        server = tiny.serve(tiny.make(), function(req, res)
            if req.method == "HEAD" then
                res:send(404, {}, "")
            elseif req.path:find("/uploads/") then
                res:send(202, { Location = "http://169.254.169.254/latest" }, "")
            end
            return true
        end)
        refuses("a link-local address, was refused", push("team/multi:v1", server.host .. "/x"))
        server.stop()
        -- Another host's 401 is no reason to tell who we are.
        local elsewhere = tiny.serve(tiny.make(), function(_, res)
            res:send(401, { ["WWW-Authenticate"] = 'Basic realm="x"' }, "")
            return true
        end)
        server = tiny.serve(tiny.make(), function(req, res)
            if req.method == "HEAD" then
                res:send(404, {}, "")
            else
                res:send(202, { Location = "http://" .. elsewhere.host .. "/up" }, "")
            end
            return true
        end)
        refuses("access denied", push("team/multi:v1", server.host .. "/x", { credentials = function()
            asked = asked + 1
        end }))
        assert.equal(0, asked)
        for _, req in ipairs(elsewhere.requests) do
            assert.is_nil(req.headers.authorization)
        end
        server.stop()
        elsewhere.stop()
    end)

    it("saved, and read by skopeo and umoci", function()
        for format, transport in pairs { ["docker-archive"] = "oci-archive", ["oci-archive"] = "oci-archive",
            ["oci-dir"] = "oci" } do
            local out = dir .. "/" .. format
            assert(image.save({ "team/multi:v1" }, out, { store = store_dir, format = format }))
            local about = json.decode(shell.run { "skopeo", "inspect", transport .. ":" .. out .. ":v1" })
            assert.equal(digest, about.Digest)
        end
        -- As Docker reads it: another manifest, the same layers.
        local about = json.decode(shell.run { "skopeo", "inspect", "docker-archive:" .. dir .. "/docker-archive" })
        assert.equal(#layers, #about.Layers)
        shell.run(("umoci unpack %s --image %s/oci-dir:v1 %s/bundle"):format(uv.getuid() ~= 0 and "--rootless" or "",
            q(dir), q(dir)))
        assert.equal("two\n", shell.read(dir .. "/bundle/rootfs/data/changed"))
        -- The same bytes every time, and by a pipe.
        assert(image.save({ "team/multi:v1" }, dir .. "/again", { store = store_dir }))
        local sum = shell.run("sha256sum < " .. q(dir .. "/docker-archive"))
        assert.equal(sum, shell.run("sha256sum < " .. q(dir .. "/again")))
        shell.write(dir .. "/save.lua", ([[assert(require "sm.image".save({ "team/multi:v1" }, 1, { store = %q }))]])
            :format(store_dir))
        assert.equal(sum, shell.run(("lua5.4 %s/save.lua | sha256sum"):format(q(dir))))
        refuses("expected docker-archive", image.save({ "team/multi:v1" }, dir .. "/x", { store = store_dir, format = "zip" }))
        refuses("no such image", image.save({ "none" }, dir .. "/x", { store = store_dir }))
        refuses("is there already", image.save({ "team/multi:v1" }, dir .. "/oci-dir",
            { store = store_dir, format = "oci-dir" }))
        refuses("No such file or directory" and "no such file", image.save({ "team/multi:v1" }, dir .. "/no/x",
            { store = store_dir }))
    end)
end)
