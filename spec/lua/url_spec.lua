-- SPDX-License-Identifier: Apache-2.0

local url = require "sm.url"

describe("sm.url", function()
    it("takes addresses apart and puts them together", function()
        local cases = {
            ["https://h/a?b=c#d"] = "https://h/a?b=c",
            ["HTTP://Host:80/x"] = "http://host/x",
            ["https://h:8443"] = "https://h:8443/",
            ["https://[::1]:5000/v2/"] = "https://[::1]:5000/v2/",
            ["https://h?x"] = "https://h/?x",
        }
        for text, want in pairs(cases) do
            assert.equal(want, url.format(assert(url.parse(text))))
        end
    end)

    it("refuses what is not a plain http(s) address", function()
        for _, text in ipairs { "", "h/x", "ftp://h/", "file:///etc/passwd", "https://u:p@h/",
            "https://h:0/", "https://h:70000/", "https://h:x/", "https:///x", "https://h /",
            "https://h\r\nX: y/", "https://[::1/", "gopher://127.0.0.1:6379/_x" } do
            assert.is_nil((url.parse(text)), text)
        end
    end)

    it("resolves relative locations", function()
        local base = assert(url.parse("https://h:444/v2/a/blobs/x?q=1"))
        for text, want in pairs {
            ["https://cdn/y?sig=1"] = "https://cdn/y?sig=1", ["//cdn/y"] = "https://cdn/y",
            ["/y"] = "https://h:444/y", ["y"] = "https://h:444/v2/a/blobs/y",
            ["../y/./z/?k"] = "https://h:444/v2/a/y/z/?k", ["?k"] = "https://h:444/v2/a/blobs/x?k",
            ["../../../../y"] = "https://h:444/y",
        } do
            assert.equal(want, url.format(assert(url.resolve(base, text))))
        end
        assert.is_nil((url.resolve(base, "ftp://h/x")))
    end)

    it("knows what sort of place a host is", function()
        for host, want in pairs {
            ["example.org"] = "name", ["8.8.8.8"] = "public", ["127.0.0.1"] = "loopback",
            ["127.9.9.9"] = "loopback", ["localhost"] = "loopback", ["a.localhost."] = "loopback",
            ["10.0.0.1"] = "private", ["172.16.0.1"] = "private", ["172.32.0.1"] = "public",
            ["192.168.1.1"] = "private", ["100.64.0.1"] = "private",
            ["169.254.169.254"] = "link-local", ["0.0.0.0"] = "unspecified",
            ["224.0.0.1"] = "unspecified", ["2130706433"] = "unspecified",
            ["0x7f.1"] = "unspecified", ["127.1"] = "unspecified", ["1.2.3.4.example"] = "name",
            ["[::1]"] = "loopback", ["[0:0::1]"] = "loopback", ["[::]"] = "unspecified",
            ["[fe80::1]"] = "link-local", ["[fd00::1]"] = "private", ["[2001:db8::1]"] = "public",
            ["[::ffff:127.0.0.1]"] = "loopback", ["[::ffff:7f00:1]"] = "private",
        } do
            assert.equal(want, url.host_kind(host), host)
        end
    end)

    it("escapes queries", function()
        assert.equal("scope=repository%3Aa%2Fb%3Apull&x=%20~", url.query {
            { "scope", "repository:a/b:pull" }, { "x", " ~" } })
    end)
end)
