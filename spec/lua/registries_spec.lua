-- SPDX-License-Identifier: Apache-2.0

local reference = require "sm.reference"
local registries = require "sm.registries"
local shell = require "support.shell"

describe("sm.registries", function()
    local dir, env
    before_each(function()
        dir = shell.tmpdir()
        env = { HOME = dir, CONTAINERS_REGISTRIES_CONF = dir .. "/registries.conf" }
        shell.write(env.CONTAINERS_REGISTRIES_CONF, "")
    end)
    after_each(function()
        shell.remove(dir)
    end)

    local function configure(text)
        shell.write(env.CONTAINERS_REGISTRIES_CONF, text)
    end
    local function places(name)
        return registries.places(assert(reference.parse(name)), function(key)
            return env[key]
        end)
    end
    -- The places as text: what is asked, with ! where it may be insecure.
    local function where(name)
        local list = {}
        for i, place in ipairs(assert(places(name))) do
            list[i] = reference.format(place.ref) .. (place.insecure and "!" or "")
        end
        return table.concat(list, " ")
    end
    local function refuses(want, name)
        local found, why = places(name or "a.example/x")
        assert.is_nil(found)
        assert.truthy(why:find(want, 1, true), why)
    end

    it("is the registry itself where nothing is said", function()
        assert.equal("docker.io/library/debian:12", where "debian:12")
        env.CONTAINERS_REGISTRIES_CONF = dir .. "/none"
        assert.equal("docker.io/library/debian:12", where "debian:12")
    end)

    it("asks mirrors first, in their order", function()
        configure [=[
            unqualified-search-registries = ["quay.io"]
            [[registry]]
            location = "docker.io"
            [[registry.mirror]]
            location = "m1.example:5000/hub"
            insecure = true
            [[registry.mirror]]
            location = "m2.example"
        ]=]
        assert.equal("m1.example:5000/hub/library/debian:12! m2.example/library/debian:12 docker.io/library/debian:12",
            where "debian:12")
        local digest = "sha256:" .. ("0"):rep(64)
        assert.equal("m1.example:5000/hub/a/b@" .. digest .. "!", (where("a/b@" .. digest):match "^%S+"))
        assert.equal("quay.io/a/b:1", where "quay.io/a/b:1")
    end)

    it("takes the longest prefix, at a border of the name", function()
        configure [=[
            [[registry]]
            prefix = "r.example/team"
            location = "elsewhere.example/moved"
            [[registry]]
            location = "r.example"
            insecure = true
            [[registry]]
            prefix = "*.corp.example"
            insecure = true
        ]=]
        assert.equal("elsewhere.example/moved/app:1", where "r.example/team/app:1")
        assert.equal("r.example/teams/app:1!", where "r.example/teams/app:1")
        assert.equal("r.example.org/a:1", where "r.example.org/a:1")
        assert.equal("a.corp.example/x:1!", where "a.corp.example/x:1")
        assert.equal("corp.example/x:1", where "corp.example/x:1")
    end)

    it("lets no blocked registry be asked", function()
        configure '[[registry]]\nlocation = "a.example"\nblocked = true\n'
        refuses "a.example is blocked by"
        assert.equal("b.example/x:latest", where "b.example/x")
    end)

    it("reads the user's file and, over it, the folders of more", function()
        env = { HOME = dir, XDG_CONFIG_HOME = dir .. "/config" }
        shell.run { "mkdir", "-p", dir .. "/config/containers/registries.conf.d" }
        local base = dir .. "/config/containers/registries.conf"
        shell.write(base, '[[registry]]\nlocation = "a.example"\n[[registry.mirror]]\nlocation = "m.example"\n'
            .. '[[registry]]\nlocation = "b.example"\ninsecure = true\n')
        shell.write(base .. ".d/10-b.conf", '[[registry]]\nlocation = "b.example"\n')
        shell.write(base .. ".d/20-aliases.conf", '[aliases]\n"x" = "quay.io/x"\n')
        shell.write(base .. ".d/notes", "not = read = at all")
        assert.equal("m.example/x:latest a.example/x:latest", where "a.example/x")
        assert.equal("b.example/x:latest", where "b.example/x")
    end)

    it("says which file is wrong, and how", function()
        configure "[[registry]\n"
        refuses "registries.conf: line 1: "
        configure '[[registry]]\ninsecure = "yes"\nlocation = "a.example"\n'
        refuses "registries.conf: insecure of a [[registry]]: expected a boolean"
        configure "[[registry]]\ninsecure = true\n"
        refuses "a [[registry]] without a location or prefix"
        configure '[[registry]]\nlocation = "a.example"\n[[registry.mirror]]\ninsecure = true\n'
        refuses "a mirror without a location"
        configure '[[registry]]\nlocation = "a.example"\n[[registry.mirror]]\nlocation = "Nota Place"\n'
        refuses 'location "Nota Place"'
        configure 'registry = 1\n'
        refuses "registry is not an array of tables"
    end)

    it("finds certificates by host and port", function()
        local certs = dir .. "/.config/containers/certs.d/a.example:5000"
        shell.run { "mkdir", "-p", certs }
        shell.write(certs .. "/ca.crt", "")
        local place = places("a.example:5000/x")[1]
        assert.equal(certs .. "/ca.crt", place.cafile)
        assert.is_nil(place.certfile)
        assert.is_nil(places("a.example/x")[1].cafile)
        shell.write(certs .. "/client.cert", "")
        refuses("client.cert: its .key is not there", "a.example:5000/x")
        shell.write(certs .. "/client.key", "")
        place = places("a.example:5000/x")[1]
        assert.equal(certs .. "/client.cert", place.certfile)
        assert.equal(certs .. "/client.key", place.keyfile)
        shell.write(certs .. "/second.crt", "")
        refuses("more than one .crt", "a.example:5000/x")
    end)
end)
