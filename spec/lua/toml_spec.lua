-- SPDX-License-Identifier: Apache-2.0

local toml = require "sm.toml"

describe("sm.toml", function()
    it("reads what configuration files are made of", function()
        assert.same({
            title = "a \"b\"\t\u{e9}", literal = [[C:\x]], n = -1200, float = 1.5, yes = true, no = false,
            list = { "a", { 1, 2 }, "b" },
            inline = { x = 1, y = { z = "w" } },
            server = { ["10.0.0.1"] = { port = 80 }, deep = { er = "v" } },
            registry = {
                { prefix = "a", mirror = { { location = "m1" }, { location = "m2", insecure = true } } },
                { prefix = "b", options = { x = 1 } },
            },
        }, toml.decode [==[
# a comment
title = "a \"b\"\t\u00e9"   # another
literal = 'C:\x'
n = -1_200
float = 1.5
yes = true
no = false
list = [
  "a", [1, 2], # inside
  "b",
]
inline = { x = 1, y.z = "w" }

[server."10.0.0.1"]
port = 80
[server.deep]
er = "v"

[[registry]]
prefix = "a"
[[registry.mirror]]
location = "m1"
[[registry.mirror]]
location = "m2"
insecure = true
[[registry]]
prefix = "b"
[registry.options]
x = 1
]==])
    end)

    it("reads an empty document, and one with CR LF", function()
        assert.same({}, toml.decode "")
        assert.same({ a = 1, b = { c = 2 } }, toml.decode "a = 1\r\n[b]\r\nc = 2\r\n")
    end)

    it("refuses with the line what is wrong or not read", function()
        for text, want in pairs {
            ["a = 1\nb"] = "line 2: expected =",
            ["a = "] = "line 1: expected a value",
            ["a = 1 2"] = "line 1: something is left over",
            ["a = 1\na = 2"] = "line 2: a is there twice",
            ['a = "x'] = "line 1: a string does not end",
            ['a = "x\ny"'] = "line 1: a string does not end",
            ['a = "\\q"'] = "the escape \\q is not known",
            ['a = """x"""'] = "multi-line strings are not read",
            ["a = 1979-05-27"] = "is not a value that is read here",
            ["a = 012"] = "is not a value that is read here",
            ["a = [1 2]"] = "expected , or ]",
            ["a = [1"] = "expected , or ]",
            ["a = {b = 1"] = "expected , or }",
            ["[a"] = "a [header] does not end",
            ["a = 1\n[a]"] = "line 2: a is not a table",
            ["a = [1]\n[[a]]"] = "line 2: a is not an array of tables",
            ["a = {}\n[a.b]"] = "line 2: a is not a table",
            ["= 1"] = "expected a key",
            ["a = " .. ("["):rep(100)] = "nested too deeply",
        } do
            local doc, why = toml.decode(text)
            assert.is_nil(doc, text)
            assert.truthy(why:find(want, 1, true), ("%s: %s"):format(text, why))
        end
    end)
end)
