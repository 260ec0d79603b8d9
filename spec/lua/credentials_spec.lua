-- SPDX-License-Identifier: Apache-2.0

local uv = require "luv"
local base64 = require "sm.base64"
local credentials = require "sm.credentials"
local shell = require "support.shell"

describe("sm.base64", function()
    it("knows the RFC's vectors both ways", function()
        local vectors = { [""] = "", f = "Zg==", fo = "Zm8=", foo = "Zm9v", foob = "Zm9vYg==",
            fooba = "Zm9vYmE=", foobar = "Zm9vYmFy", ["\0\255\254"] = "AP/+" }
        for plain, coded in pairs(vectors) do
            assert.equal(coded, base64.encode(plain))
            assert.equal(plain, base64.decode(coded))
            assert.equal(plain, base64.decode((coded:gsub("=", ""))))
        end
    end)
    it("refuses what is not base64", function()
        assert.is_nil(base64.decode("a"))
        assert.is_nil(base64.decode("ab-d"))
    end)
end)

describe("sm.credentials", function()
    local dir, env, path_before

    before_each(function()
        dir = shell.tmpdir()
        shell.run { "mkdir", "-p", dir .. "/run/containers", dir .. "/home/.docker",
            dir .. "/home/.config/containers", dir .. "/bin" }
        env = { HOME = dir .. "/home", XDG_RUNTIME_DIR = dir .. "/run" }
        path_before = os.getenv("PATH")
        uv.os_setenv("PATH", dir .. "/bin:" .. path_before)
    end)
    after_each(function()
        uv.os_setenv("PATH", path_before)
        shell.remove(dir)
    end)

    local function find(registry, repository)
        return credentials.find(registry, repository, function(name)
            return env[name]
        end)
    end
    local function auth(user, password)
        return ('{"auth":"%s"}'):format(base64.encode(user .. ":" .. password))
    end
    local function docker(text)
        shell.write(dir .. "/home/.docker/config.json", text)
    end
    local function helper(name, script)
        local path = dir .. "/bin/docker-credential-" .. name
        shell.write(path, "#!/bin/sh\n" .. script .. "\n")
        shell.run { "chmod", "755", path }
    end

    it("is anonymous without files", function()
        local cred, err = find("quay.io", "a/b")
        assert.is_nil(cred)
        assert.is_nil(err)
    end)

    it("asks the files in order, and the first that knows wins", function()
        docker(('{"auths":{"r":%s,"only":%s}}'):format(auth("docker", "p"), auth("last", "p")))
        shell.write(dir .. "/home/.config/containers/auth.json",
            ('{"auths":{"r":%s}}'):format(auth("config", "p")))
        assert.equal("config", find("r").username)
        shell.write(dir .. "/run/containers/auth.json",
            ('{"auths":{"r":%s}}'):format(auth("runtime", "p")))
        assert.equal("runtime", find("r").username)
        env.REGISTRY_AUTH_FILE = dir .. "/explicit.json"
        shell.write(env.REGISTRY_AUTH_FILE, ('{"auths":{"r":%s}}'):format(auth("explicit", "p:q")))
        local cred = find("r")
        assert.equal("explicit", cred.username)
        assert.equal("p:q", cred.password)
        assert.equal("last", find("only").username)
    end)

    it("honours DOCKER_CONFIG", function()
        docker(('{"auths":{"r":%s}}'):format(auth("home", "p")))
        env.DOCKER_CONFIG = dir
        shell.write(dir .. "/config.json", ('{"auths":{"r":%s}}'):format(auth("moved", "p")))
        assert.equal("moved", find("r").username)
    end)

    it("prefers the longest key", function()
        docker(('{"auths":{"r":%s,"r/team":%s,"r/team/app":%s}}')
            :format(auth("host", "p"), auth("team", "p"), auth("app", "p")))
        assert.equal("app", find("r", "team/app").username)
        assert.equal("team", find("r", "team/other").username)
        assert.equal("host", find("r", "teams").username)
    end)

    it("knows Docker Hub's and legacy keys", function()
        docker(('{"auths":{"https://index.docker.io/v1/":%s,"https://old:5000/v2/":%s}}')
            :format(auth("hub", "p"), auth("old", "p")))
        assert.equal("hub", find("docker.io", "library/alpine").username)
        assert.equal("old", find("old:5000", "x").username)
        assert.is_nil((find("old", "x")))
    end)

    it("reads identity tokens and plain fields", function()
        docker('{"auths":{"a":{"identitytoken":"tok"},"b":{"username":"u","password":"p"}}}')
        assert.equal("tok", find("a").identity_token)
        assert.equal("u", find("b").username)
    end)

    it("asks a host's helper, with the host on stdin", function()
        helper("one", [[read s; echo "{\"ServerURL\":\"$s\",\"Username\":\"u-$s\",\"Secret\":\"s\"}"]])
        docker(('{"credHelpers":{"r:5000":"one"},"auths":{"r:5000":%s}}'):format(auth("plain", "p")))
        local cred = find("r:5000", "x")
        assert.equal("u-r:5000", cred.username)
        assert.equal("docker-credential-one", cred.source)
    end)

    it("asks credsStore, and takes <token> as an identity token", function()
        helper("store", [[read s; case $s in known) echo '{"Username":"<token>","Secret":"t"}';;
            *) echo "credentials not found in native keychain"; exit 1;; esac]])
        docker(('{"credsStore":"store","auths":{"known":{},"other":%s}}'):format(auth("plain", "p")))
        assert.equal("t", find("known").identity_token)
        assert.equal("plain", find("other").username)
        assert.is_nil((find("third")))
    end)

    it("says what is wrong with a helper", function()
        helper("bad", "echo 'vault is locked'; exit 2")
        helper("junk", "echo junk")
        helper("endless", "while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done")
        for name, want in pairs {
            bad = "vault is locked", junk = "not JSON", endless = "failed",
            missing = "docker%-credential%-missing: ENOENT", ["../evil"] = "not a credential helper",
        } do
            docker(('{"credsStore":"%s"}'):format(name))
            local cred, err = find("r")
            assert.is_nil(cred)
            assert.truthy(err:find(want), err)
        end
    end)

    it("refuses a file it cannot understand", function()
        for text, want in pairs {
            ["{"] = "not JSON", ["[1]"] = "not a JSON object", ['{"auths":[1]}'] = "auths is not",
            ['{"auths":{"r":5}}'] = "not an object", ['{"auths":{"r":{"auth":"????"}}}'] = "base64",
            ['{"auths":{"r":{"username":"a\\r\\nX: y","password":"p"}}}'] = "one line",
        } do
            docker(text)
            local cred, err = find("r")
            assert.is_nil(cred)
            assert.truthy(err:find(want, 1, true), err)
        end
    end)
end)
