-- SPDX-License-Identifier: Apache-2.0

local reference = require "sm.reference"

local hex64 = ("0123456789abcdef"):rep(4)
local sha256 = "sha256:" .. hex64

describe("sm.reference", function()
    -- text → registry, host, path, tag, digest
    local good = {
        { "alpine", "docker.io", "registry-1.docker.io", "library/alpine", "latest" },
        { "alpine:3.19", "docker.io", "registry-1.docker.io", "library/alpine", "3.19" },
        { "user/app", "docker.io", "registry-1.docker.io", "user/app", "latest" },
        { "docker.io/alpine", "docker.io", "registry-1.docker.io", "library/alpine", "latest" },
        { "index.docker.io/a/b:T_1", "docker.io", "registry-1.docker.io", "a/b", "T_1" },
        { "quay.io/a/b/c", "quay.io", "quay.io", "a/b/c", "latest" },
        { "localhost/x", "localhost", "localhost", "x", "latest" },
        { "localhost:5000/x:y", "localhost:5000", "localhost:5000", "x", "y" },
        { "127.0.0.1:5000/x", "127.0.0.1:5000", "127.0.0.1:5000", "x", "latest" },
        { "[::1]:5000/x", "[::1]:5000", "[::1]:5000", "x", "latest" },
        { "Registry.Example/x", "registry.example", "registry.example", "x", "latest" },
        { "h:80/a__b/c---d/e.f_g", "h:80", "h:80", "a__b/c---d/e.f_g", "latest" },
        { "alpine@" .. sha256, "docker.io", "registry-1.docker.io", "library/alpine", nil, sha256 },
        { "alpine:3@" .. sha256, "docker.io", "registry-1.docker.io", "library/alpine", "3", sha256 },
        { "localhost:5000/x@sha512:" .. hex64 .. hex64, "localhost:5000", "localhost:5000", "x",
            nil, "sha512:" .. hex64 .. hex64 },
        { "a:" .. ("t"):rep(128), "docker.io", "registry-1.docker.io", "library/a", ("t"):rep(128) },
    }
    for _, case in ipairs(good) do
        it("accepts " .. case[1]:sub(1, 60), function()
            local ref = assert(reference.parse(case[1]))
            assert.same({
                registry = case[2], host = case[3], path = case[4], tag = case[5], digest = case[6],
            }, ref)
        end)
    end

    -- text → what the error must say
    local bad = {
        { "", "empty" },
        { " alpine", "white space" },
        { "al pine", "white space" },
        { "alpine\n", "white space" },
        { "docker://alpine", "without a scheme" },
        { "Alpine", "lowercase" },
        { "quay.io/Team/App", "lowercase: \"team/app\"" },
        { "alpine:", "not a tag" },
        { "alpine:.x", "not a tag" },
        { "alpine:-x", "not a tag" },
        { "a:" .. ("t"):rep(129), "not a tag" },
        { "alpine@sha256:abc", "64 lowercase hex" },
        { "alpine@sha256:" .. hex64:upper(), "64 lowercase hex" },
        { "alpine@md5:" .. hex64, "not supported" },
        { "alpine@" .. hex64, "expected algorithm:hex" },
        { "alpine@sha256:" .. hex64 .. "@sha256:" .. hex64, "expected algorithm:hex" },
        { "alpine@sha256:../../../etc/passwd", "64 lowercase hex" },
        { "quay.io/", "name is missing" },
        { "quay.io//x", "empty component" },
        { "quay.io/x/", "empty component" },
        { "/x", "empty component" },
        { "../x", "host name" },
        { "quay.io/../x", "component" },
        { "quay.io/a..b", "component" },
        { "quay.io/a___b", "component" },
        { "quay.io/-a", "component" },
        { "quay.io/a_", "component" },
        { "quay.io/a$b", "component" },
        { "quay.io:0/a", "not a port" },
        { "quay.io:65536/a", "not a port" },
        { "quay.io:x/a", "not a port" },
        { "-bad.example/a", "host name" },
        { "bad..example/a", "host name" },
        { "user@host.example/a", "expected algorithm:hex" },
        { hex64, "an id, not a name" },
        { "quay.io/" .. ("a"):rep(250), "255" },
    }
    for _, case in ipairs(bad) do
        it(("refuses %q"):format(case[1]:sub(1, 60)), function()
            local ref, err = reference.parse(case[1])
            assert.is_nil(ref)
            assert.truthy(err:find(case[2], 1, true), err)
            assert.is_nil(err:find("\n.*\n"))
        end)
    end

    it("refuses what is not a string", function()
        assert.is_nil((reference.parse(nil)))
        assert.is_nil((reference.parse({})))
    end)

    it("formats the full and the short name", function()
        local cases = {
            ["alpine"] = { "docker.io/library/alpine:latest", "alpine:latest" },
            ["user/app:1"] = { "docker.io/user/app:1", "user/app:1" },
            ["quay.io/a/b"] = { "quay.io/a/b:latest", "quay.io/a/b:latest" },
            ["alpine:3@" .. sha256] = { "docker.io/library/alpine@" .. sha256, "alpine@" .. sha256 },
        }
        for text, want in pairs(cases) do
            local ref = assert(reference.parse(text))
            assert.equal(want[1], reference.format(ref))
            assert.equal(want[2], reference.familiar(ref))
            -- A full name means itself.
            assert.equal(want[1], reference.format(assert(reference.parse(want[1]))))
        end
    end)
end)
