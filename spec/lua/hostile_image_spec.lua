-- SPDX-License-Identifier: Apache-2.0
--
-- Hostile layers: each is contained or refused with one line, and a refusal
-- leaves nothing. Hostile indexes: never more than an error.

local core = require "sm.image_core"
local ingest = require "support.ingest"
local shell = require "support.shell"
local tar = require "support.tar"

local q = shell.quote

describe("a hostile layer", function()
    local w
    before_each(function()
        w = ingest.new()
    end)
    after_each(function()
        w:close()
    end)

    -- Must fail with one clear line and leave an empty folder.
    local function refused(blob, pattern, options)
        local r, err, out = w:ingest(blob, options)
        assert.is_nil(r)
        assert.matches(pattern, err)
        assert.is_nil(err:find("[%c]"), "control characters in: " .. err)
        assert.is_true(#err < 400)
        assert.equal("", shell.run { "ls", "-A", out })
        return err
    end

    local function names(...)
        local layers = {}
        for i, entries in ipairs { ... } do
            layers[i] = w:layer(entries)
        end
        return ingest.names((w:image(layers)))
    end

    describe("is contained:", function()
        it("a link out of the root, then a file through it", function()
            assert.same({ "etc/", "etc/evil", "l@../../../etc" },
                names { { "l", link = "../../../etc" }, { "l/evil", data = "x" } })
            assert.same({ "etc/", "etc/evil", "l@/etc" },
                names { { "l", link = "/etc" }, { "l/evil", data = "x" } })
        end)

        it("names with ..", function()
            assert.same({ "evil" }, names { { "../../../../evil", data = "x" } })
            assert.same({ "a/", "a/b/", "evil" }, names { "a/b/", { "a/b/../../../../evil", data = "x" } })
        end)

        it("absolute names", function()
            assert.same({ "etc/", "etc/passwd" }, names { { "/etc/passwd", data = "x" } })
            assert.same({ "etc/", "etc/passwd" }, names { { "//etc//./passwd", data = "x" } })
        end)

        it("the root as a link, and a file through it", function()
            -- libarchive gives the name "/" as "."; a root that is no folder is refused.
            refused({ { "/", link = "/tmp" }, { "evil", data = "x" } }, "root is not a directory")
            refused({ { "./", link = "/tmp" } }, "root is not a directory")
        end)

        it("folders and files that take each other's place", function()
            assert.same({ "x/", "x/y" }, names { { "x", data = "f" }, "x/", { "x/y", data = "f" } })
            assert.same({ "x" }, names { "x/", { "x/y", data = "f" }, { "x", data = "f" } })
            assert.same({ "x@y" }, names { "x/", { "x/y", data = "f" }, { "x", link = "y" } })
            assert.same({ "x/" }, names { { "x", link = "x" }, "x/" })
        end)

        it("a whiteout of the parent, of the root, of itself", function()
            refused({ ".wh." }, "entry '%.wh%.': invalid whiteout")
            refused({ ".wh.." }, "invalid whiteout")
            refused({ "d/", "d/.wh..." }, "invalid whiteout")
            assert.same({ "f" }, names({ "f" }, { ".wh..wh.f" }))
            assert.same({ "f" }, names({ "f" }, { ".wh.f/../.wh.g" }))
        end)

        it("thousands of times the same name", function()
            local entries = {}
            for i = 1, 20000 do
                entries[i] = { i % 3 == 0 and "x/" or "x", link = i % 3 == 1 and "y" or nil }
            end
            local layer, r = w:layer(entries)
            assert.equal(20000, r.entries)
            assert.equal(1, r.inodes)
            assert.same({ "x" }, ingest.names((w:image { layer })))
        end)

        it("contents that say they are a file system", function()
            local t = w:image { (w:layer { { "f", data = ("\xe2\xe1\xf5\xe0"):rep(4000) } }) }
            assert.equal(16000, t.f.size)
        end)
    end)

    describe("is refused:", function()
        it("a file below a file", function()
            refused({ { "x", data = "f" }, { "x/y", data = "f" } }, "entry 'x/y': a parent is not a directory")
            refused({ { "x", fifo = true }, "x/y/" }, "a parent is not a directory")
        end)

        it("a root that is a file", function()
            refused({ { ".", data = "x" } }, "entry '.': the root is not a directory")
            refused({ { "x/", type = "0", data = "x" }, "y" }, ".")
        end)

        it("links in circles", function()
            refused({ { "a", link = "b" }, { "b", link = "a" }, { "a/f", data = "x" } },
                "entry 'a/f': too many levels of symbolic links")
            refused({ { "a", link = "a/a" }, { "a/f", data = "x" } }, "symbolic links")
        end)

        it("a maze of links", function()
            local entries = { "d/" }
            for i = 1, 60 do
                entries[#entries + 1] = { "d/l" .. i, link = ("l%d/../l%d"):format(i - 1, i - 1) }
            end
            entries[#entries + 1] = { "d/l60/f", data = "x" }
            refused(entries, "symbolic links")
            local long = { "t/" }
            for i = 1, 45 do
                long[#long + 1] = { "t" .. i, link = ("t/../"):rep(700) .. "t" .. i - 1 }
            end
            long[#long + 1] = { "t45/f", data = "x" }
            refused(long, "symbolic links")
        end)

        it("hard links to nothing, when the layers are merged", function()
            for _, target in ipairs { "etc/shadow", "/etc/shadow", "../../../etc/shadow", "self" } do
                local layer = w:layer { { "self", hard = target } }
                local out = w:path("meta")
                local r, err = core.merge { layers = { layer }, out = out }
                assert.is_nil(r)
                assert.matches("^layer 1: hard link 'self' has no target '[%w/]+'$", err)
                assert.is_false(os.rename(out, out) == true)
            end
        end)

        it("hard links to folders", function()
            refused({ "d/", { "h", hard = "d" } }, "hard link to a directory")
            refused({ { "h", hard = "." } }, "hard link to or as the root")
            local a, b = w:layer { "d/" }, w:layer { { "h", hard = "d" } }
            local r, err = core.merge { layers = { a, b }, out = w:path("meta") }
            assert.is_nil(r)
            assert.matches("layer 2: hard link 'h' to a directory", err)
        end)

        it("names and paths that are too long", function()
            refused({ { ("n"):rep(256), data = "x" } }, "longer than 255 bytes")
            refused({ { ("d/"):rep(3000) .. "f", data = "x" } }, "path is longer than 4095 bytes")
            refused({ { "l", link = ("x"):rep(5000) } }, "target of 5000 bytes")
        end)

        it("folders that are nested too deep", function()
            refused({ { ("d/"):rep(1500) .. "f", data = "x" } }, "1024 nested directories %(limit depth%)")
            -- A link makes a short name deep.
            refused({ { "l", link = ("d/"):rep(1000) .. "d" }, { "l/a/", }, { "m", link = "l/" .. ("e/"):rep(30) },
                "m/f/" }, "limit depth")
            refused({ "a/b/c/" }, "2 nested directories", { limits = { depth = 2 } })
        end)

        it("owners, devices and sizes out of range", function()
            refused({ { "f", pax = { uid = "4294967295" } } }, "owner 4294967295:0 is out of range")
            refused({ { "f", pax = { gid = "99999999999" } } }, "out of range")
            refused({ { "f", dev = { "c", 4096, 0 } } }, "device 4096:0 is out of range")
            refused({ { "f", pax = { size = "4611686018427387904" } } }, "limit bytes")
        end)

        it("attributes that are too many or too large", function()
            refused({ { "f", xattr = { ["user.x"] = ("v"):rep(65536) } } }, "65536 bytes, 65535 allowed")
            local many = {}
            for i = 1, 300 do
                many["user." .. i] = "x"
            end
            refused({ { "f", xattr = many } }, "more than 256 extended attributes")
            refused({ { "f", xattr = { ["user.a"] = ("v"):rep(40000), ["user.b"] = ("v"):rep(40000) } } },
                "extended attributes have %d+ bytes, 65536 allowed")
            local entries = {}
            for i = 1, 3 do
                entries[i] = { "f" .. i, xattr = { ["user.a"] = ("v"):rep(500) } }
            end
            refused(entries, "limit xattr_bytes", { limits = { xattr_bytes = 1000 } })
        end)

        it("bombs: bytes, entries, ratio", function()
            refused({ { "a", data = ("x"):rep(600) }, { "b", data = ("x"):rep(600) } },
                "more than 1000 bytes %(limit bytes%)", { limits = { bytes = 1000 } })
            refused({ "a", "b", "c", "d" }, "more than 3 entries %(limit entries%)", { limits = { entries = 3 } })
            -- 1 TiB in a sparse file of a hundred bytes: the holes count.
            refused({ { "s", data = "1\n0\n0\n" .. ("\0"):rep(506), pax = { ["GNU.sparse.major"] = "1",
                ["GNU.sparse.minor"] = "0", ["GNU.sparse.name"] = "s",
                ["GNU.sparse.realsize"] = "1099511627776" } } }, "limit bytes")
            local bomb = w:path("bomb")
            shell.run(("head -c 3000000000 /dev/zero | zstd -q > %s"):format(q(bomb)))
            refused(bomb, "expands more than 2000 times %(limit ratio%)")
        end)

        it("implicit folders without end", function()
            -- One entry of 4000 bytes makes a thousand names; the limit counts names.
            local entries = {}
            for i = 1, 20 do
                entries[i] = { ("%02d/"):format(i) .. ("d/"):rep(900) .. "f" }
            end
            refused(entries, "limit entries", { limits = { entries = 5000 } })
        end)

        it("a truncated archive, at any point", function()
            local text = tar.make { "d/", { "d/f", data = ("x"):rep(3000), xattr = { ["user.a"] = "b" } },
                { "l", link = "d/f" } }
            local id = core.sha256(text)
            for cut = 1, #text - 1, 97 do
                refused(w:file(text:sub(1, cut)), ".", { diff_id = id })
            end
        end)

        it("a truncated or damaged compressed stream, at any point", function()
            local plain = w:file(tar.make { { "f", data = shell.read("/proc/self/maps"):rep(20) } }, "plain.tar")
            for _, command in ipairs { "gzip", "zstd -q" } do
                local whole = shell.run(("%s < %s"):format(command, q(plain)))
                local id = core.sha256 { file = plain }
                for cut = 1, #whole - 1, #whole // 23 do
                    refused(w:file(whole:sub(1, cut)), ".", { diff_id = id })
                    local flipped = whole:sub(1, cut - 1) .. string.char(whole:byte(cut) ~ 0x55) .. whole:sub(cut + 1)
                    local r, err, out = w:ingest(w:file(flipped), { diff_id = id })
                    -- A bit that carries no data (a time, a flag) may change.
                    if r then
                        assert.equal(id, r.diff_id)
                    else
                        assert.is_string(err)
                        assert.equal("", shell.run { "ls", "-A", out })
                    end
                end
                refused(w:file(whole:sub(1, #whole - 1)), "stream ends early", { diff_id = id })
            end
        end)

        it("the wrong diffID", function()
            local want = "sha256:" .. ("0"):rep(64)
            local err = refused({ "f" }, "^diffID is sha256:%x+, the image says sha256:0+$", { diff_id = want })
            assert.is_truthy(err)
            local job, text = core.ingest { blob = "x", out = "y", diff_id = "sha256:../../etc" }
            assert.is_nil(job)
            assert.matches("malformed", text)
        end)

        it("what is no tar", function()
            refused(w:file(("garbage "):rep(1000)), "not a tar archive")
            refused(w:file("x"), "not a tar archive")
            local script = "%s < /proc/self/maps > %s"
            for name, command in pairs { xz = "xz", bzip2 = "bzip2", lz4 = "lz4 -q" } do
                if shell.has(command:match("%S+")) then
                    local blob = w:path("blob")
                    shell.run(script:format(command, q(blob)))
                    refused(blob, name .. " compression is not supported")
                end
            end
            refused(w.dir, "not a regular file")
            refused(w.dir .. "/nothing", "No such file")
            refused("/dev/null", "not a regular file")
        end)

        it("a folder that is already used", function()
            local layer = w:layer { "f" }
            local before = shell.read(layer .. "/index")
            local job <close> = core.ingest { blob = w:file(tar.make { "g" }), out = layer }
            local r, err = job:result()
            assert.is_nil(r)
            assert.matches("File exists", err)
            assert.equal(before, shell.read(layer .. "/index"))
        end)

        it("a full disk", function()
            -- A limit on file size makes writes fail as a full disk would.
            local out = w:path("out")
            local blob = w:file(tar.make { { "f", data = shell.read("/proc/self/maps"):rep(200) } })
            local script = w:file(([[
                local core = require "sm.image_core"
                io.write((select(2, core.ingest { blob = %q, out = %q }:result())))
            ]]):format(blob, out), "script.lua")
            assert.equal("entry 'f': writing data: File too large",
                shell.run(("mkdir %s; ulimit -f 64; exec lua5.4 %s"):format(q(out), q(script))))
            assert.equal("", shell.run { "ls", "-A", out })
            local layer = w:layer { "f" }
            script = w:file(([[
                local core = require "sm.image_core"
                io.write((select(2, core.merge { layers = { %q }, out = %q })))
            ]]):format(layer, out .. "/meta"), "script.lua")
            assert.equal("writing the image: File too large",
                shell.run(("ulimit -f 1; exec lua5.4 %s"):format(q(script))))
            assert.equal("", shell.run { "ls", "-A", out })
        end)
    end)

    describe("index", function()
        local function merge(layer)
            local out = w:path("meta")
            local r, err = core.merge { layers = { layer }, out = out }
            assert.is_true(r ~= nil or not os.rename(out, out))
            return r, err
        end

        it("that is damaged anywhere is an error", function()
            local layer = w:layer { "d/", { "d/f", data = "x", xattr = { ["user.a"] = "b" } }, { "l", link = "d" },
                ".wh.x", { "h", hard = "d/f" } }
            local path = layer .. "/index"
            local good = shell.read(path)
            assert(merge(layer))
            for i = 1, #good do
                shell.write(path, good:sub(1, i - 1) .. string.char(good:byte(i) ~ 1) .. good:sub(i + 1))
                local r, err = merge(layer)
                assert.is_nil(r, "byte " .. i)
                assert.matches("index", err)
            end
            for i = 0, #good - 1, 7 do
                shell.write(path, good:sub(1, i))
                assert.is_nil((merge(layer)))
            end
            shell.write(path, good .. "\0")
            assert.is_nil((merge(layer)))
            shell.write(path, (good:gsub("^(........)....", "%1\2\0\0\0")))
            assert.matches("version 2, not 1", select(2, merge(layer)))
        end)

        it("without its data, or with data of another length, is an error", function()
            local layer = w:layer { { "f", data = "x" } }
            shell.run { "truncate", "-s", "-1", layer .. "/data" }
            assert.matches("has 2097151 bytes, its index says 2097152", select(2, merge(layer)))
            os.remove(layer .. "/data")
            assert.matches("No such file", select(2, merge(layer)))
            os.remove(layer .. "/index")
            assert.matches("index: No such file", select(2, merge(layer)))
        end)

        it("is not overwritten by a merge", function()
            local layer = w:layer { "f" }
            local r, err = core.merge { layers = { layer }, out = layer .. "/index" }
            assert.is_nil(r)
            assert.matches("File exists", err)
            assert(merge(layer))
        end)
    end)
end)
