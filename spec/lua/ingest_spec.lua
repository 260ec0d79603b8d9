-- SPDX-License-Identifier: Apache-2.0
--
-- Layers into images: formats, fidelity against the trees that tar and umoci
-- unpack, the rules of whiteouts and links. Hostile input: hostile_spec.lua.

local core = require "sm.image_core"
local folder = require "support.folder"
local ingest = require "support.ingest"
local shell = require "support.shell"
local tar = require "support.tar"
local uv = require "luv"

local q = shell.quote

describe("ingest", function()
    local w
    before_each(function()
        w = ingest.new()
    end)
    after_each(function()
        w:close()
    end)

    local function bytes(layer)
        return shell.read(layer .. "/index") .. shell.read(layer .. "/data")
    end

    describe("of formats", function()
        local plain
        before_each(function()
            local root = w:path("root")
            shell.run(("mkdir %s; cd %s; seq 1 100000 > numbers; head -c 300000 /dev/urandom > noise; "
                .. "mkdir d; echo hi > d/file"):format(q(root), q(root)))
            plain = w:path("plain.tar")
            shell.run(("tar -C %s -cf %s ."):format(q(root), q(plain)))
        end)

        it("gives the same bytes for plain, gzip and zstd, however framed", function()
            local want, result = w:layer(plain, { diff_id = core.sha256 { file = plain } })
            assert.equal("plain", result.format)
            assert.equal("sha256:" .. shell.run { "sha256sum", plain }:match("%x+"), result.diff_id)
            local variants = {
                gzip = "gzip -1 < %s", gzip_best = "gzip -9 < %s",
                gzip_members = "head -c 200000 %s | gzip; tail -c +200001 %s | gzip -9",
                gzip_garbage = "gzip < %s; printf trailing",
                gzip_zeros = "gzip < %s; head -c 1000 /dev/zero",
                gzip_empty_member = "gzip < /dev/null; gzip < %s; gzip < /dev/null",
                gzip_named = "cat %s > t.tar; gzip -c t.tar; rm t.tar",
                zstd = "zstd -q < %s", zstd_best = "zstd -q -19 < %s",
                zstd_frames = "head -c 200000 %s | zstd -q; tail -c +200001 %s | zstd -q -5",
                zstd_skippable = "printf '\\120\\052\\115\\030\\003\\000\\000\\000abc'; zstd -q < %s; "
                    .. "printf '\\137\\052\\115\\030\\001\\000\\000\\000x'",
            }
            for name, command in pairs(variants) do
                local blob = w:path(name)
                shell.run(("cd %s; { %s; } > %s"):format(q(w.dir), command:gsub("%%s", (q(plain):gsub("%%", "%%%%"))),
                    q(blob)))
                local layer, r = w:layer(blob, { diff_id = result.diff_id })
                assert.equal(name:match("^%a+"), r.format)
                assert.is_true(bytes(layer) == bytes(want), name .. " gives other bytes")
            end
        end)

        it("does not believe the media type", function()
            local blob = w:path("blob")
            shell.run(("zstd -q < %s > %s"):format(q(plain), q(blob)))
            local _, r = w:layer(blob, { media = "application/vnd.oci.image.layer.v1.tar+gzip" })
            assert.equal("zstd", r.format)
        end)

        it("supports sha512 diffIDs", function()
            local want = "sha512:" .. shell.run { "sha512sum", plain }:match("%x+")
            local _, r = w:layer(plain, { diff_id = want })
            assert.equal(want, r.diff_id)
        end)

        it("takes empty layers", function()
            for _, blob in ipairs { "", ("\0"):rep(1024), ("\0"):rep(10240) } do
                local layer, r = w:layer(w:file(blob))
                assert.equal(0, r.entries)
                assert.equal(0, r.data_bytes)
                assert.same({}, ingest.names((w:image { layer })))
            end
        end)

        it("hashes what follows the archive's end", function()
            local text = tar.make { "a" } .. ("\0"):rep(512 * 7)
            local _, r = w:layer(w:file(text))
            assert.equal(core.sha256(text), r.diff_id)
        end)

        it("takes an archive without its last padding, as umoci insert writes it", function()
            local text = tar.make { "d/", { "d/f", data = ("x"):rep(700) } }
            text = text:match("^(.-)%z*$") -- ends with the file's last byte
            assert.is_true(#text % 512 ~= 0)
            local layer, r = w:layer(w:file(text), { diff_id = core.sha256(text) })
            assert.equal(#text, r.tar_bytes)
            assert.same({ "d/", "d/f" }, ingest.names((w:image { layer })))
        end)

        it("makes the same image in every locale and at any time", function()
            local blob = w:file(tar.make {
                { "n\u{e9}", data = "composed" }, { "ne\u{301}", data = "decomposed" },
                { "long/" .. ("e\u{301}"):rep(60), data = "pax", pax = { comment = "x" } },
                { "raw", pax = { path = "latin-\xe9" }, data = "not utf-8" },
                { "hard", hard = "long/" .. ("e\u{301}"):rep(60) },
                { "soft", link = ("e\u{301}"):rep(60) },
            })
            local script = w:file(([[
                local core = require "sm.image_core"
                os.setlocale(arg[1])
                local job = core.ingest { blob = %q, out = arg[2] }
                assert(job:result())
            ]]):format(blob), "run.lua")
            local first
            for _, locale in ipairs { "C", "C.UTF-8", "POSIX" } do
                local out = w:path("out")
                shell.run(("mkdir %s; LC_ALL=%s lua5.4 %s %s %s"):format(q(out), locale, q(script), locale,
                    q(out)))
                first = first or bytes(out)
                assert.is_true(first == bytes(out), locale)
            end
            local tree = w:image { (w:layer(blob)) }
            assert.equal("composed", tree["n\u{e9}"].data())
            assert.equal("decomposed", tree["ne\u{301}"].data())
            assert.equal("pax", tree["long/" .. ("e\u{301}"):rep(60)].data())
            assert.equal("not utf-8", tree["latin-\xe9"].data())
            assert.equal(tree.hard.nid, tree["long/" .. ("e\u{301}"):rep(60)].nid)
            assert.equal(("e\u{301}"):rep(60), tree.soft.target)
        end)
    end)

    describe("of real trees", function()
        -- Everything a file system can hold that a tar can carry.
        local script = [[
            mkdir -p d/deep/er/still empty .hidden ' ' many
            echo hello > d/file; chmod 640 d/file; chown 12:34 d/file
            echo big id > d/bigid; chown 3000000000:4000000000 d/bigid
            : > d/nothing
            head -c 4096 /dev/urandom > d/block; head -c 4097 /dev/urandom > d/block1
            head -c 3000000 /dev/urandom > d/large
            truncate -s 9000000 d/sparse; printf x | dd of=d/sparse bs=1 seek=5000001 conv=notrunc status=none
            truncate -s 3000000 d/allhole
            ln d/file d/hard; ln d/file d/deep/hard; ln -s ../file d/deep/soft; ln -s /abs/olute d/abs
            ln -s nowhere d/tohard; ln d/tohard d/hardsoft 2>/dev/null || :
            ln -s "$(printf '%04000d' 7)" d/longlink
            mkfifo d/fifo; mknod d/char c 1 3; mknod d/block-dev b 259 1048575; mknod d/zero c 0 0
            chmod 4755 d/block; chmod 2755 d/deep; chmod 1777 empty; chmod 000 d/block1
            touch -d '1969-01-01 00:00:00 UTC' d/old; touch -d '2100-01-01 00:00:00.123456789 UTC' d/future
            touch "$(printf 'new\nline')" "$(printf 'quote\"back\\\\slash')" "$(printf '\377\376')" -- '-dash' '+plus' '...' '..x'
            touch "$(printf '%0255d' 1)"
            for i in $(seq 1 3000); do echo $i > "many/file number $i"; done
            setfattr -n user.one -v 1 d/file; setfattr -n user.empty d/file; setfattr -n user.dir -v x d
            setfattr -n trusted.t -v "$(head -c 3000 /dev/zero | tr '\0' v)" d/nothing
            setcap cap_net_raw+ep d/large
        ]]

        local function make(commands)
            local root = w:path("root")
            shell.run(("mkdir %s; cd %s; %s"):format(q(root), q(root), commands))
            return root
        end

        for _, form in ipairs { "--format=posix", "--format=posix --sparse" } do
            it("keeps every entry and all metadata, tar " .. form, function()
                local root = make(script)
                local blob = w:path("blob")
                shell.run(("tar -C %s --xattrs --xattrs-include='*' %s -cf %s ."):format(q(root), form, q(blob)))
                local layer = w:layer(blob)
                local tree = w:image { layer }
                assert.same({}, ingest.differences(folder.read(root), tree))
                assert.equal(0xc0, tree["d/block-dev"].minor & 0xc0)
                -- Holes stay holes: the data takes no more room than the tree did.
                local used = tonumber(shell.run { "stat", "-c", "%b", layer .. "/data" }) * 512
                assert.is_true(used < 24e6, "the data blob takes " .. used .. " bytes")
            end)
        end

        it("agrees with the extraction of fsck.erofs", function()
            local root = make [[
                mkdir -p a/b; seq 1 30000 > a/numbers; echo x > a/b/x; ln -s ../numbers a/b/l
                for i in $(seq 1 1000); do echo $i > "a/b/$i"; done; mkfifo a/p; touch -d @12345 a/b a
            ]]
            local blob = w:path("blob")
            shell.run(("tar -C %s -cf %s ."):format(q(root), q(blob)))
            local _, device = w:image { (w:layer(blob)) }
            local out = w:path("extracted")
            shell.run { "fsck.erofs", "--extract=" .. out, device }
            local a, b = folder.read(root), folder.read(out)
            for _, t in ipairs { a, b } do
                for _, e in pairs(t) do
                    e.nid, e.nlink, e.size, e.mtime_ns = nil, nil, e.type == "f" and e.size or nil, nil
                end
            end
            assert.same(a, b)
        end)

        it("agrees with tar in GNU, ustar and old formats", function()
            local root = make [[
                mkdir -p a/b; echo x > a/b/x; ln a/b/x a/y; ln -s b a/l; mkfifo a/p
                touch a/"$(printf '%0120d' 1)"; touch -d @1000000000 a/b a . a/*
            ]]
            for _, form in ipairs { "gnu", "oldgnu", "posix" } do
                local blob = w:path("blob")
                shell.run(("tar -C %s --format=%s -cf %s ."):format(q(root), form, q(blob)))
                local tree = w:image { (w:layer(blob)) }
                local want = folder.read(root)
                for _, e in pairs(want) do
                    e.mtime_ns = 0
                end
                for _, e in pairs(tree) do
                    e.mtime_ns = 0
                end
                assert.same({}, ingest.differences(want, tree))
            end
        end)

        it("agrees with umoci on a layered image", function()
            local layout = w:path("oci")
            local steps = {
                [[mkdir -p bin data/opq data/keep usr/lib; echo 1 > bin/sh; echo one > data/gone; echo one > data/changed
                  echo low > data/opq/low; echo low > data/keep/low; mkdir data/wasdir; echo c > data/wasdir/c
                  ln -s usr/lib lib; echo so > usr/lib/so; ln bin/sh bin/ash; echo f > data/wasfile
                  setfattr -n user.k -v 1 data/keep/low; mkfifo data/pipe; mknod data/null c 1 3]],
                [[rm data/gone data/pipe; echo two > data/changed; ln data/changed data/hard; rm -r data/wasdir
                  echo file > data/wasdir; rm data/wasfile; mkdir data/wasfile; echo n > data/wasfile/n
                  rm -r data/opq; mkdir data/opq; echo new > data/opq/new; chmod 700 data/keep
                  cp bin/sh bin/su; chmod 4755 bin/su; setcap cap_net_raw+ep bin/su; rm bin/ash]],
                [[rm -r data/opq; echo file > data/opq; echo three > data/keep/three; chown -h 5:6 lib
                  setfattr -n user.k -v 2 data/keep/low; touch -d @77 usr; rm data/hard]],
            }
            shell.run(("umoci init --layout %s; umoci new --image %s:x"):format(q(layout), q(layout)))
            for i, step in ipairs(steps) do
                local b = w:path("bundle" .. i)
                shell.run(("umoci unpack --image %s:x %s; (cd %s/rootfs; %s); umoci repack --image %s:x %s")
                    :format(q(layout), q(b), q(b), step, q(layout), q(b)))
            end
            local bundle = w:path("bundle")
            shell.run { "umoci", "unpack", "--image", layout .. ":x", bundle }
            local function blob(digest)
                return layout .. "/blobs/" .. digest:gsub(":", "/")
            end
            local function jq(filter, file)
                return shell.run { "jq", "-r", filter, file }
            end
            local manifest = blob(jq(".manifests[0].digest", layout .. "/index.json"):match("%S+"))
            local config = blob(jq(".config.digest", manifest):match("%S+"))
            local diff_ids, layers = {}, {}
            for id in jq(".rootfs.diff_ids[]", config):gmatch("%S+") do
                diff_ids[#diff_ids + 1] = id
            end
            for digest in jq(".layers[].digest", manifest):gmatch("%S+") do
                layers[#layers + 1] = w:layer(blob(digest), { diff_id = diff_ids[#layers + 1] })
            end
            assert.equal(3, #layers)
            local tree, want = w:image(layers), folder.read(bundle .. "/rootfs")
            -- umoci stamps the root, and folders it removed something from, with now.
            for name, e in pairs(want) do
                if e.type == "d" and e.mtime > 1e9 then
                    e.mtime, e.mtime_ns = tree[name].mtime, tree[name].mtime_ns
                end
            end
            assert.same({}, ingest.differences(want, tree))
        end)
    end)

    describe("of several layers", function()
        local d = "d/"
        -- Layers, lowest first, and what must come out.
        local cases = {
            ["a whiteout removes a file, a link and a folder"] = {
                { d, "d/f", { "d/l", link = "x" }, "d/sub/", "d/sub/f", "d/stays" },
                { "d/.wh.f", "d/.wh.l", "d/.wh.sub" },
                "d/", "d/stays",
            },
            ["a whiteout is a name, whatever its type"] = {
                { d, "d/a", "d/b", "d/c", "d/e", "d/keep" },
                { "d/keep", { "d/.wh.a", hard = "d/keep" }, { "d/.wh.b", link = "keep" }, "d/.wh.c/",
                    { "d/.wh.e", dev = { "c", 0, 0 } } },
                "d/", "d/keep",
            },
            ["a whiteout of nothing makes nothing"] = {
                { d }, { "d/.wh.none", "no/such/.wh.place", ".wh.root" }, "d/",
            },
            ["a whiteout spares its own layer, before and after"] = {
                { d, { "d/x", data = "old" }, { "d/y", data = "old" } },
                { "d/x", "d/.wh.x", "d/.wh.y", "d/y" },
                "d/", "d/x", "d/y",
            },
            ["a whiteout and a folder of the same name replace the folder"] = {
                { d, "d/s/", "d/s/old" }, { "d/.wh.s", "d/s/", "d/s/new" }, "d/", "d/s/", "d/s/new",
            },
            ["a whiteout after the folder of the same name does so too"] = {
                { d, "d/s/", "d/s/old" }, { "d/s/", "d/s/new", "d/.wh.s" }, "d/", "d/s/", "d/s/new",
            },
            ["a whiteout in a middle layer, a return in the next"] = {
                { "f" }, { ".wh.f" }, { { "f", data = "3" } }, "f",
            },
            ["an opaque folder hides what is below, in any order"] = {
                { d, "d/old", "d/sub/", "d/sub/old" }, { d, "d/new", "d/.wh..wh..opq", "d/late" },
                "d/", "d/late", "d/new",
            },
            ["an opaque mark needs no entry of its folder"] = {
                { d, "d/old" }, { "d/.wh..wh..opq" }, "d/",
            },
            ["an opaque mark of nothing makes nothing"] = { { "f" }, { "no/.wh..wh..opq" }, "f" },
            ["an opaque root hides everything"] = { { d, "d/f", "g" }, { ".wh..wh..opq", "new" }, "new" },
            ["a whiteout below what became a file means nothing"] = {
                { "o/", "o/f" }, { { "o", data = "file" }, "o/.wh.f", "o/.wh..wh..opq" }, "o",
            },
            ["a whiteout below what will become a file means nothing"] = {
                { "o/", "o/f" }, { "o/.wh.f", { "o", data = "file" } }, "o",
            },
            ["AUFS's own names are ignored with what is below"] = {
                { "f" }, { ".wh..wh.plnk/", ".wh..wh.plnk/1.2", ".wh..wh.orph/", ".wh..wh.orph/x",
                    ".wh..wh.aufs", "d/.wh..wh.x" }, "f",
            },
            ["hard links into AUFS's plnk folder work"] = {
                { ".wh..wh.plnk/", { ".wh..wh.plnk/1.2", data = "x" }, { "a", hard = ".wh..wh.plnk/1.2" },
                    { "b", hard = "/.wh..wh.plnk/1.2" } }, "a", "b",
            },
            ["a whiteout's name as a folder is ignored"] = {
                { "f/", "f/x" }, { ".wh.g/", ".wh.g/y", "f/.wh.q/r" }, "f/", "f/x",
            },
            ["a folder over a folder keeps the children"] = {
                { d, "d/f" }, { { d, mode = 448 } }, "d/", "d/f",
            },
            ["a file over a folder drops the subtree"] = { { d, "d/f", "d/s/", "d/s/g" }, { "d" }, "d" },
            ["a folder over a file"] = { { "d" }, { d, "d/f" }, "d/", "d/f" },
            ["a link over a folder"] = { { d, "d/f" }, { { "d", link = "e" } }, "d@e" },
            ["a missing parent inherits the lower folder"] = { { d, "d/f" }, { "d/g" }, "d/", "d/f", "d/g" },
            ["a missing parent over a lower link replaces it"] = {
                { "real/", "real/f", { "l", link = "real" } }, { "l/g" }, "l/", "l/g", "real/", "real/f",
            },
            ["a missing parent over a lower file replaces it"] = { { "p" }, { "p/f" }, "p/", "p/f" },
            ["a parent that is a link of this layer is followed"] = {
                { "real/", { "l", link = "real" }, "l/f", { "abs", link = "/real/../real" }, "abs/g",
                    "r2/", { "r2/up", link = "../real" }, "r2/up/h" },
                "abs@/real/../real", "l@real", "r2/", "r2/up@../real", "real/", "real/f", "real/g", "real/h",
            },
            ["a link of this layer leads into a lower folder"] = {
                { "real/", "real/f" }, { { "l", link = "real" }, "l/g", "l/.wh.f" },
                "l@real", "real/", "real/g",
            },
            ["the last of equal names wins"] = {
                { { "f", data = "1" }, { "f", link = "x" }, { "f", data = "22" }, d, "d/x", "d/" },
                "d/", "d/x", "f",
            },
            ["names are cleaned and cannot leave the root"] = {
                { "./a", "/b", "//c//", "x/../e", "../../f", "./././g", "y/./h", "y//i" },
                "a", "b", "c/", "e", "f", "g", "y/", "y/h", "y/i",
            },
            ["a hard link to a lower layer"] = {
                { d, { "d/f", data = "low" } }, { { "h", hard = "d/f" }, { "d/i", hard = "/d/f" } },
                "d/", "d/f", "d/i", "h",
            },
            ["a hard link to what the same layer removes below"] = {
                { d, { "d/f", data = "low" } }, { "d/.wh.f", { "d/g", hard = "d/f" } }, "d/", "d/g",
            },
            ["a hard link through a lower link"] = {
                { d, "d/f", { "l", link = "d" } }, { { "h", hard = "l/f" } }, "d/", "d/f", "h", "l@d",
            },
            ["a hard link whose target comes later"] = {
                { { "h", hard = "f" }, { "i", hard = "h" }, { "f", data = "x" } }, "f", "h", "i",
            },
            ["a hard link to itself, over the lower file"] = {
                { { "f", data = "low" } }, { { "f", hard = "f" } }, "f",
            },
            ["a hard link to a link"] = { { { "l", link = "t" }, { "m", hard = "l" } }, "l@t", "m@t" },
        }
        for name, case in pairs(cases) do
            it(name, function()
                local layers, want = {}, {}
                for _, x in ipairs(case) do
                    if type(x) == "table" then
                        layers[#layers + 1] = w:layer(x)
                    else
                        want[#want + 1] = x
                    end
                end
                assert.same(want, ingest.names((w:image(layers))))
            end)
        end

        it("takes contents and attributes from the right layer", function()
            local a = w:layer { { "d/", mode = 448, uid = 7, mtime = 70, xattr = { ["user.a"] = "1" } },
                { "d/f", data = "old" }, { "d/h", hard = "d/f" }, { "k", data = "kept" } }
            local b = w:layer { { "d/f", data = "new!" }, { "n", hard = "k" } }
            local c = w:layer { { "d/", mode = 511, uid = 8, mtime = 80 }, { "./", mode = 457, mtime = 5 } }
            local t = w:image { a, b }
            assert.equal("new!", t["d/f"].data())
            assert.equal("old", t["d/h"].data())
            assert.equal(1, t["d/h"].nlink)
            assert.equal("kept", t.n.data())
            assert.equal(t.n.nid, t.k.nid)
            assert.equal(448, t.d.mode) -- inherited by the implicit folder of b
            assert.equal(7, t.d.uid)
            assert.same({ ["user.a"] = "1" }, t.d.xattrs)
            assert.equal(493, t[""].mode)
            t = w:image { a, b, c }
            assert.equal(511, t.d.mode)
            assert.equal(80, t.d.mtime)
            assert.same({}, t.d.xattrs)
            assert.equal(457, t[""].mode)
            assert.equal("new!", t["d/f"].data())
        end)

        it("counts links again after whiteouts", function()
            local a = w:layer { { "f", data = "x" }, { "g", hard = "f" }, { "h", hard = "f" } }
            local t = w:image { a, (w:layer { ".wh.g" }) }
            assert.equal(2, t.f.nlink)
            assert.equal(t.f.nid, t.h.nid)
        end)

        it("makes the same image every time", function()
            local a, b = w:layer { "a/", "a/x" }, w:layer { "b/", "b/y", "a/.wh.x" }
            local one, two = w:path("one"), w:path("two")
            assert(core.merge { layers = { a, b }, out = one })
            assert(core.merge { layers = { a, b }, out = two })
            assert.is_true(shell.read(one) == shell.read(two))
        end)

        it("takes the same layer twice, and no layer at all", function()
            local a = w:layer { "a/", { "a/x", data = "1" } }
            assert.same({ "a/", "a/x" }, ingest.names((w:image { a, a })))
            assert.same({}, ingest.names((w:image {})))
        end)

        it("strips what would talk to the guest's overlay, and what no image can hold", function()
            local layer, r = w:layer { { "f", data = "x", xattr = { ["trusted.overlay.opaque"] = "y",
                ["user.overlay.whiteout"] = "y", ["user.overlayed"] = "stays", ["com.apple.x"] = "y",
                ["system.nfs4_acl"] = "y", ["user."] = "y",
                ["system.posix_acl_access"] = "\2\0\0\0\1\0\7\0\255\255\255\255" } } }
            assert.equal(5, r.ignored)
            assert.same({ ["user.overlayed"] = "stays",
                ["system.posix_acl_access"] = "\2\0\0\0\1\0\7\0\255\255\255\255" },
                w:image({ layer }).f.xattrs)
        end)

        it("keeps large attributes, beside inline data and across blocks", function()
            local big = ("v"):rep(60000)
            local t = w:image { (w:layer {
                { "d/", xattr = { ["user.big"] = big } }, "d/f",
                { "l", link = "target", xattr = { ["trusted.big"] = big } },
                { "m", link = ("t"):rep(4000), xattr = { ["trusted.small"] = ("x"):rep(100) } },
            }) }
            assert.equal(big, t.d.xattrs["user.big"])
            assert.equal(big, t.l.xattrs["trusted.big"])
            assert.equal("target", t.l.target)
            assert.equal(("t"):rep(4000), t.m.target)
        end)

        it("sorts names around the dots, in folders of many blocks", function()
            local entries, want = { "d/" }, { "d/" }
            for i = 1, 2000 do
                entries[#entries + 1] = ("d/%s%04d%s"):format(i % 2 == 0 and "+" or "z", i, ("n"):rep(i % 200))
                want[#want + 1] = entries[#entries]
            end
            table.sort(want)
            assert.same(want, ingest.names((w:image { (w:layer(entries)) })))
        end)
    end)

    describe("as a job", function()
        local blob
        before_each(function()
            blob = w:file(tar.make { "a/", { "a/f", data = ("x"):rep(100000) } })
        end)

        local function start(more)
            local out = w:path("out")
            shell.run { "mkdir", out }
            local cfg = { blob = blob, out = out }
            for k, v in pairs(more or {}) do
                cfg[k] = v
            end
            return assert(core.ingest(cfg)), out
        end

        it("is waitable in an event loop", function()
            local job <close> = start()
            assert.equal("r", job:events())
            assert.is_nil(job:timeout())
            local poll = uv.new_poll(job:pollfd())
            local seen
            poll:start("r", function()
                seen = job:done()
                poll:stop()
                poll:close()
            end)
            uv.run()
            assert.is_true(seen)
            assert.equal(2, job:result().entries)
            assert.equal(2, job:result().entries)
            local now, total = job:progress()
            assert.equal(total, now)
            assert.equal(uv.fs_stat(blob).size, total)
        end)

        it("can be closed at any time, and tells that it is closed", function()
            for _ = 1, 50 do
                local job, out = start()
                job:close()
                job:close()
                assert.equal("image job (closed)", tostring(job))
                assert.has_error(function()
                    job:result()
                end, "attempt to use a closed job")
                shell.run { "rm", "-r", out }
            end
        end)

        it("leaves nothing when it is cancelled", function()
            -- Gigabytes of holes: the work cannot end before it is cancelled.
            blob = w:path("huge")
            shell.run { "truncate", "-s", "64G", blob }
            local job, out = start()
            job:cancel()
            local r, err, errno = job:result()
            assert.is_nil(r)
            assert.equal("cancelled", err)
            assert.is_true(errno > 0)
            assert.equal("", shell.run { "ls", out })
        end)

        it("refuses unknown fields and wrong types", function()
            local function bad(cfg, pattern)
                local ok, err = pcall(core.ingest, cfg)
                assert.is_false(ok)
                assert.matches(pattern, err)
            end
            bad({ blob = "x", out = "y", blub = 1 }, "unknown field 'blub'")
            bad({ out = "y" }, "field 'blob': string expected")
            bad({ blob = "a\0b", out = "y" }, "zero byte")
            bad({ blob = "x", out = "y", limits = { byte = 1 } }, "unknown field 'byte'")
            bad({ blob = "x", out = "y", limits = { bytes = 0 } }, "'bytes': integer from 1")
            assert.has_error(function()
                core.merge { layers = { 1 }, out = "x" }
            end)
        end)

        it("merges as a job too", function()
            local layer = w:layer(blob)
            local job <close> = assert(core.merge { layers = { layer }, out = w:path("m"), async = true })
            assert.equal(3, job:result().inodes)
        end)
    end)

    it("hashes files and bytes", function()
        local path = w:file("hello")
        local want = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
        assert.equal(want, core.sha256("hello"))
        assert.equal(want, core.sha256 { file = path })
        local job <close> = core.digest { file = path, algorithm = "sha512" }
        assert.equal("sha512:" .. shell.run { "sha512sum", path }:match("%x+"), job:result().digest)
        local r, err, errno = core.sha256 { file = path .. "no" }
        assert.is_nil(r)
        assert.matches("No such file", err)
        assert.equal(2, errno)
        assert.is_true(core.valid_digest(want))
        for _, bad in ipairs { "", "sha256:", "sha256:ABC", want .. "0", want:upper(), "md5:" .. ("0"):rep(32),
            "sha256:../" .. ("0"):rep(61), want .. "\0" } do
            assert.is_false(core.valid_digest(bad))
        end
    end)
end)
