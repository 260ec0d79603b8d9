-- SPDX-License-Identifier: Apache-2.0

local auth = require "sm.auth"
local loop = require "sm.loop"
local url = require "sm.url"

local function challenges(...)
    local headers = {}
    for i, value in ipairs { ... } do
        headers[i] = { i % 2 == 0 and "www-authenticate" or "WWW-Authenticate", value }
    end
    return auth.parse_challenges(headers)
end

describe("sm.auth challenges", function()
    local cases = {
        { { 'Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push"' },
            { { scheme = "bearer", params = { realm = "https://a/t", service = "s",
                scope = "repository:a/b:pull,push" } } } },
        { { 'Basic realm="x"', 'Bearer realm="y"' },
            { { scheme = "basic", params = { realm = "x" } },
              { scheme = "bearer", params = { realm = "y" } } } },
        { { 'Negotiate, Basic realm="x, y" , Bearer realm=z' },
            { { scheme = "negotiate", params = {} }, { scheme = "basic", params = { realm = "x, y" } },
              { scheme = "bearer", params = { realm = "z" } } } },
        { { 'Negotiate abc+/==, BEARER Realm = "q\\"uote" ,, error="invalid_token"' },
            { { scheme = "negotiate", params = {} },
              { scheme = "bearer", params = { realm = 'q"uote', error = "invalid_token" } } } },
        { { 'Bearer realm="open' }, { { scheme = "bearer", params = {} } } },
        { { 'Bearer realm="a",realm="b"' }, { { scheme = "bearer", params = { realm = "a" } } } },
        { { "" }, {} },
        { { '"junk"' }, {} },
        { { "=x" }, {} },
    }
    for i, case in ipairs(cases) do
        it("case " .. i .. ": " .. case[1][1], function()
            assert.same(case[2], challenges(table.unpack(case[1])))
        end)
    end
    it("survives any bytes", function()
        math.randomseed(7)
        local pieces = { "Bearer", "Basic", " ", ",", "=", '"', "\\", "realm", "\0", "\255", "a" }
        for _ = 1, 3000 do
            local text = {}
            for j = 1, math.random(0, 12) do
                text[j] = pieces[math.random(#pieces)]
            end
            challenges(table.concat(text))
        end
    end)
end)

describe("sm.auth realm", function()
    local function check(registry, realm)
        return auth.check_realm(assert(url.parse(registry)), realm)
    end
    it("takes a public https realm", function()
        assert.truthy(check("https://registry-1.docker.io", "https://auth.docker.io/token"))
        assert.truthy(check("https://10.0.0.5", "https://10.0.0.5/token"))
        assert.truthy(check("http://127.0.0.1:5000", "http://127.0.0.1:5003/token"))
        assert.truthy(check("http://localhost:5000", "http://127.0.0.1:5003/token"))
    end)
    for realm, want in pairs {
        ["http://auth.example/t"] = "is not https",
        ["https://127.0.0.1/t"] = "is a loopback address",
        ["https://localhost:8443/t"] = "is a loopback address",
        ["https://169.254.169.254/latest/meta-data"] = "is a link-local address",
        ["https://10.1.2.3/t"] = "is a private address",
        ["https://192.168.0.1/t"] = "is a private address",
        ["https://[::1]/t"] = "is a loopback address",
        ["https://[fd00::1]/t"] = "is a private address",
        ["https://2130706433/t"] = "is a unspecified address",
        ["file:///etc/passwd"] = "not an http(s) address",
        ["https://u:p@auth.example/"] = "user name",
    } do
        it("refuses " .. realm, function()
            local target, err = check("https://registry.example", realm)
            assert.is_nil(target)
            assert.truthy(err:find(want, 1, true), err)
        end)
    end
    it("refuses the metadata service to a loopback registry, too", function()
        assert.is_nil((check("http://127.0.0.1:5000", "http://169.254.169.254/t")))
    end)
    it("refuses a missing realm", function()
        assert.is_nil((check("https://registry.example", nil)))
    end)
end)

describe("sm.auth tokens", function()
    local requests, answers, creds, lookups, a

    before_each(function()
        requests, answers, creds, lookups = {}, {}, nil, 0
        a = auth.open {
            registry = "reg.example",
            origin = assert(url.parse("https://reg.example")),
            request = function(request)
                requests[#requests + 1] = request
                loop.sleep(0)
                return table.remove(answers, 1)
            end,
            credentials = function()
                lookups = lookups + 1
                return creds
            end,
        }
    end)

    local scope = "repository:a/b:pull"
    local function answer(header, sent)
        return loop.run(function()
            return a:answer({ { "WWW-Authenticate", header } }, scope, "a/b", sent)
        end)
    end
    local bearer = 'Bearer realm="https://auth.example/token?x=1",service="svc"'

    it("fetches one anonymously and keeps it", function()
        answers = { { status = 200, body = '{"token":"T1"}' } }
        assert.equal("Bearer T1", answer(bearer))
        assert.equal("https://auth.example/token?x=1&service=svc&scope=repository%3Aa%2Fb%3Apull",
            url.format(requests[1].url))
        assert.is_nil(requests[1].authorization)
        assert.equal("Bearer T1", loop.run(a.header, a, scope, "a/b"))
        assert.equal(1, #requests)
    end)

    it("sends Basic credentials and the account to the realm", function()
        creds = { username = "al", password = "pw", source = "file" }
        answers = { { status = 200, body = '{"access_token":"T2","expires_in":300}' } }
        assert.equal("Bearer T2", answer(bearer))
        assert.equal("Basic YWw6cHc=", requests[1].authorization)
        assert.truthy(requests[1].url.query:find("account=al", 1, true))
    end)

    it("puts the registry's scope first and forgets a refused token", function()
        answers = { { status = 200, body = '{"token":"T1"}' }, { status = 200, body = '{"token":"T2"}' } }
        assert.equal("Bearer T1", answer(bearer))
        assert.equal("Bearer T2", answer(bearer
            .. ',scope="repository:a/b:pull,push",error="insufficient_scope"', "Bearer T1"))
        assert.truthy(requests[2].url.query:find(
            "scope=repository%3Aa%2Fb%3Apull%2Cpush&scope=repository%3Aa%2Fb%3Apull", 1, true))
    end)

    it("posts an identity token, and falls back to GET", function()
        creds = { username = "u", identity_token = "ID", source = "file" }
        answers = { { status = 200, body = '{"access_token":"T1"}' } }
        assert.equal("Bearer T1", answer(bearer))
        assert.equal("POST", requests[1].method)
        assert.truthy(requests[1].body:find("grant_type=refresh_token&refresh_token=ID", 1, true))
        answers = { { status = 404, body = "" }, { status = 200, body = '{"token":"T2"}' } }
        assert.equal("Bearer T2", answer(bearer, "Bearer T1"))
        assert.is_nil(requests[3].method)
    end)

    it("asks once for many who wait", function()
        answers = { { status = 200, body = '{"token":"T1"}' } }
        local got = {}
        loop.run(function()
            local tasks = {}
            for i = 1, 4 do
                tasks[i] = loop.spawn(function()
                    got[i] = a:answer({ { "www-authenticate", bearer } }, scope, "a/b")
                end)
            end
            for _, task in ipairs(tasks) do
                task:join()
            end
        end)
        assert.same({ "Bearer T1", "Bearer T1", "Bearer T1", "Bearer T1" }, got)
        assert.equal(1, #requests)
        assert.equal(1, lookups)
    end)

    it("refuses a token that is none", function()
        for body, want in pairs { ["{}"] = "no token", ["x"] = "not JSON", ["[]"] = "no token",
            ['{"token":5}'] = "no token", ['{"token":"a\\r\\nX: y"}'] = "no token" } do
            answers = { { status = 200, body = body } }
            local header, err = answer(bearer)
            assert.is_nil(header)
            assert.truthy(err:find(want, 1, true), err)
        end
    end)

    it("says whose credentials were refused", function()
        creds = { username = "al", password = "no", source = "/home/al/config.json" }
        answers = { { status = 401, body = "" } }
        local _, err = answer(bearer)
        assert.equal("reg.example refused the credentials from /home/al/config.json", err)
        _, err = answer('Basic realm="x"', "Basic YWw6bm8=")
        assert.equal("reg.example refused the credentials from /home/al/config.json", err)
    end)

    it("answers Basic, and prefers Bearer to it", function()
        creds = { username = "al", password = "pw", source = "file" }
        assert.equal("Basic YWw6cHc=", answer('Basic realm="x"'))
        answers = { { status = 200, body = '{"token":"T1"}' } }
        assert.equal("Bearer T1", answer('Basic realm="x", ' .. bearer))
    end)

    it("says that a login is needed", function()
        local _, err = answer('Basic realm="x"')
        assert.equal("reg.example wants a login, and no credentials were found", err)
        _, err = answer("Negotiate")
        assert.equal("reg.example wants a login of a kind we do not know", err)
    end)

    it("asks nothing of a hostile realm", function()
        local header, err = answer('Bearer realm="http://169.254.169.254/",service="x"')
        assert.is_nil(header)
        assert.truthy(err:find("refused", 1, true))
        assert.equal(0, #requests)
    end)
end)
