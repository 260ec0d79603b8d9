-- SPDX-License-Identifier: Apache-2.0
--
-- The catalogue of the store: what prune takes and what it leaves, what du
-- counts, what verify finds; and the commands that show it.

local uv = require "luv"
local files = require "sm.files"
local image = require "sm.image"
local images = require "support.images"
local json = require "sm.json"
local loop = require "sm.loop"
local shell = require "support.shell"
local store = require "sm.store"
local tiny = require "support.tiny_image"

local q = shell.quote
local DAY = 24 * 3600

describe("the store", function()
    local shared, archive
    local dir, st

    setup(function()
        shared = shell.tmpdir()
        local layout = images.make(shared .. "/oci")
        images.copy("oci:" .. layout .. ":one", "docker-archive:" .. shared .. "/one.tar:one:v1")
        images.copy("oci:" .. layout .. ":multi", "docker-archive:" .. shared .. "/multi.tar:multi:v1")
        archive = shared .. "/multi.tar"
    end)
    teardown(function()
        shell.remove(shared)
    end)
    before_each(function()
        dir = shell.tmpdir()
        st = assert(store.open(dir .. "/sm"))
        assert(image.load(shared .. "/one.tar", { store = st }))
        assert(image.load(archive, { store = st }))
    end)
    after_each(function()
        shell.remove(dir)
    end)

    local function names()
        local out = {}
        for i, one in ipairs(image.list { store = st }) do
            out[i] = one.reference or "?"
        end
        return table.concat(out, " ")
    end
    local function prune(opts)
        opts = opts or {}
        opts.store = st
        return assert(image.prune(opts))
    end
    local function healthy()
        assert.same({}, image.verify { store = st, deep = true }.problems)
    end
    local one, multi = "docker.io/library/one:v1", "docker.io/library/multi:v1"
    local function digest_of(name)
        return image.inspect(name, { store = st }).digest
    end
    local function age(name, seconds)
        local then_ = os.time() - seconds
        assert(uv.fs_utime(st:image_dir(digest_of(name)) .. "/image.json", then_, then_))
    end

    it("prune takes what nothing names, and nothing else", function()
        assert.same({}, prune().removed)
        shell.write(st.dir .. "/blobs/sha256/" .. ("ab"):rep(32), "orphan")
        shell.write(st:part_path("sha256:" .. ("cd"):rep(32)), "part")
        assert(uv.fs_mkdir(st:layer_dir("sha256:" .. ("ef"):rep(32)), 448))
        assert.truthy(prune().freed >= 512)
        assert.equal(multi .. " " .. one, names())
        assert.is_nil(files.size(st.dir .. "/blobs/sha256/" .. ("ab"):rep(32)))
        assert.same({}, files.list(st.dir .. "/tmp"))
        assert.equal(3, #files.list(st.dir .. "/derived/layers"))
        healthy()
    end)

    it("prune --age and --all take images, the shared layer stays with its last owner", function()
        age(one, 10 * DAY)
        assert.same({ one }, prune { age = 9 * DAY, dry_run = true }.removed)
        assert.equal(multi .. " " .. one, names())
        assert.same({ one }, prune { age = 9 * DAY }.removed)
        assert.equal(multi, names())
        healthy()
        assert.same({ multi }, prune { all = true }.removed)
        assert.same({}, files.list(st.dir .. "/blobs/sha256"))
        assert.same({}, files.list(st.dir .. "/derived/layers"))
        assert.same({}, files.list(st.dir .. "/derived/images"))
    end)

    it("prune --size takes the longest unused first, and no more than it must", function()
        age(multi, 5 * DAY)
        local total = image.usage({ store = st }).total
        assert.same({}, prune { size = total }.removed)
        assert.same({ multi }, prune { size = total - 1 }.removed)
        assert.equal(one, names())
        assert.same({ one }, prune { size = 0 }.removed)
    end)

    it("prune leaves what a VM holds and what a snapshot pinned", function()
        local digest, snapshot = digest_of(multi), dir .. "/snapshot"
        local lease = assert(loop.run(st.lease, st, digest_of(one)))
        assert(uv.fs_mkdir(snapshot, 448))
        assert(loop.run(st.pin, st, snapshot, digest))
        local result = prune { all = true }
        assert.same({}, result.removed)
        assert.equal(2, result.kept_in_use)
        local got, err = image.remove(multi, { store = st })
        assert.is_nil(got)
        assert.truthy(err:find("is needed by " .. snapshot, 1, true), err)
        -- The name may go by force; the parts stay for the snapshot.
        assert(image.remove(multi, { store = st, force = true }))
        prune { all = true }
        assert.truthy(st:image(digest))
        assert.equal(snapshot, st:pinned()[digest])
        -- A snapshot that is gone pins nothing; a VM that is gone holds nothing.
        assert(uv.fs_rmdir(snapshot))
        lease:close()
        assert.same({ one }, prune { all = true }.removed)
        assert.is_nil(st:image(digest))
        assert.same({}, files.list(st.dir .. "/pins"))
        -- And a pin is let go by hand.
        assert(loop.run(st.pin, st, dir, digest))
        assert(st:unpin(dir))
        assert.same({}, st:pinned())
    end)

    it("prune does nothing while a pull is under way, and says so", function()
        local held = assert(loop.run(st.use, st))
        local got, err = image.prune { store = st, all = true }
        assert.is_nil(got)
        assert.truthy(err:find("a pull is under way", 1, true), err)
        held:close()
        assert.equal(multi .. " " .. one, names())
    end)

    it("du counts what images share and what is theirs alone", function()
        local usage = image.usage { store = st }
        local of = {}
        for _, item in ipairs(usage.list) do
            of[item.reference] = item
        end
        assert.equal(of[one].shared, of[multi].shared)
        assert.truthy(of[one].shared > 1000000)
        assert.truthy(of[multi].unique > of[one].unique)
        local disk = tonumber(shell.run(("du -s -B1 --apparent-size %s/blobs | cut -f1"):format(q(st.dir))))
        assert.truthy(math.abs(usage.blobs - disk) < 200000)
        assert.is_nil(of[one].in_use)
        local lease <close> = assert(loop.run(st.lease, st, of[one].digest))
        assert.equal("VM", image.usage({ store = st }).list[1].in_use or image.usage({ store = st }).list[2].in_use)
    end)

    it("verify finds every kind of damage, and repair makes the next pull good", function()
        local about = image.inspect(multi, { store = st })
        local layer, diff_id = about.manifest.layers[2], about.config.rootfs.diff_ids[2]
        local function flip(path, at)
            local bytes = shell.read(path)
            shell.write(path, bytes:sub(1, at - 1) .. string.char(bytes:byte(at) ~ 1) .. bytes:sub(at + 1))
        end
        local damage = {
            { st:blob_path(layer.digest), function(p) flip(p, 1000) end, "another digest" },
            { st:blob_path(layer.digest), function(p) shell.run { "rm", p } end, "missing" },
            { st:blob_path(about.manifest.config.digest), function(p) flip(p, 3) end, "another digest" },
            { st:layer_dir(diff_id), function(p) flip(p .. "/index", 200) end, "do not merge" },
            { st:layer_dir(diff_id), function(p) flip(p .. "/data", 5000) end, "not what its blob gives", true },
            { st:image_dir(about.digest), function(p) flip(p .. "/meta", 1200) end, "not what its layers give" },
            { st:image_dir(about.digest), function(p) shell.run { "truncate", "-s", "1", p .. "/meta" } end,
                "another size" },
        }
        for i, case in ipairs(damage) do
            case[2](case[1])
            local found = image.verify { store = st, deep = case[4] }.problems
            assert.truthy(#found > 0, "damage " .. i)
            local text = {}
            for k, problem in ipairs(found) do
                text[k] = problem.what
            end
            assert.truthy(table.concat(text, "\n"):find(case[3], 1, true), i .. ": " .. table.concat(text, "\n"))
            image.verify { store = st, deep = true, repair = true }
            assert(image.load(archive, { store = st }))
            healthy()
        end
    end)

    it("tells the history of an image", function()
        local steps = assert(image.history(multi, { store = st }))
        assert.equal("umoci raw add-layer", steps[1].created_by)
        local sum = 0
        for _, step in ipairs(steps) do
            sum = sum + step.size
        end
        local want = 0
        for _, layer in ipairs(image.inspect(multi, { store = st }).manifest.layers) do
            want = want + layer.size
        end
        assert.equal(want, sum)
    end)

    it("is seen by the commands", function()
        local env = "XDG_DATA_HOME=" .. q(dir) .. " "
        local function sm(tail)
            local p = assert(io.popen(env .. "./sm " .. tail .. " 2>" .. q(dir .. "/err")))
            local out = p:read("a")
            local _, _, code = p:close()
            return code, out, shell.read(dir .. "/err")
        end
        local code, out, err = sm "images -q"
        assert.equal(0, code)
        assert.equal(2, select(2, out:gsub("sha256:", "")))
        code, out = sm "inspect one:v1"
        local doc = json.decode(out)
        assert.equal(digest_of(one), doc[1].Digest)
        assert.equal("linux", doc[1].Image.os)
        assert.equal(0, (sm("tag one:v1 mine:2")))
        assert.equal(0, (sm("history mine:2")))
        code, out = sm "du"
        assert.equal(0, code)
        assert.truthy(out:find("docker.io/library/mine:2", 1, true))
        assert.equal(0, (sm("save -o " .. q(dir .. "/out.tar") .. " mine:2")))
        code, out = sm "prune -a"
        assert.equal(0, code)
        assert.truthy(out:find("removed " .. one, 1, true), out)
        code, out, err = sm("load --progress json -i " .. q(dir .. "/out.tar"))
        assert.equal("Loaded image: docker.io/library/mine:2\n", out)
        for line in err:gmatch("[^\n]+") do
            assert.truthy(json.decode_object(line), line)
        end
        assert.truthy(err:find('"phase":"done"', 1, true), err)
        -- On a terminal: a line per layer, drawn over; elsewhere none of that.
        assert.equal(0, (sm "prune -a"))
        local drawn = shell.run(("XDG_DATA_HOME=%s script -qec './sm load -i %s/out.tar' /dev/null </dev/null")
            :format(q(dir), dir))
        assert.truthy(drawn:find("\r\27[K", 1, true), drawn)
        assert.equal(0, (sm "prune -a"))
        code, _, err = sm("load -i " .. q(dir .. "/out.tar"))
        assert.equal(0, code)
        assert.is_nil(err:find("\27", 1, true))
        assert.matches("^%x+  ready, %S+ %a+\n$", err)
        assert.equal(0, (sm "prune -a"))
        code, _, err = sm("load -q -i " .. q(dir .. "/out.tar"))
        assert.equal("", err)
        code, out = sm "verify"
        assert.equal(0, code)
        assert.equal("1 images, 3 blobs, 0 problems\n", out)
        shell.write(dir .. "/sm/blobs/sha256/" .. ("0"):rep(64), "bad")
        code, out = sm "verify --repair"
        assert.equal(1, code)
        assert.truthy(out:find("another digest; removed", 1, true), out)
        code, _, err = sm "rmi none"
        assert.equal(1, code)
        assert.equal("sm: rmi: none: no such image in the store\n", err)
        for _, bad in ipairs { "prune --age x", "save", "load -i /nonexistent", "push mine:2 x@y", "tag mine:2",
            "pull --progress x y", "history none", "inspect none" } do
            code, out, err = sm(bad)
            assert.truthy(code ~= 0, bad)
            assert.equal("", out)
            assert.truthy(err:find("^sm: "), bad)
        end
    end)
end)

describe("a script", function()
    local dir, server, what
    before_each(function()
        dir = shell.tmpdir()
        what = tiny.make()
        server = tiny.serve(what)
    end)
    after_each(function()
        server.stop()
        shell.remove(dir)
    end)
    local function pull(name, opts)
        opts.store = opts.store or dir .. "/store"
        opts.retry_delay = 0.01
        return image.pull(name, opts)
    end

    it("resolves in our place, or sends us to a mirror", function()
        local asked
        local img <close> = assert(pull("docker.io/library/app:1", { resolve = function(ref, wanted, default)
            asked = ref.path .. " " .. wanted.os
            return default(server.host .. "/mirror/app:1")
        end }))
        assert.equal("library/app linux", asked)
        assert.equal("docker.io/library/app:1", img.reference)
        assert.equal(what.digest, img.digest)
        assert.equal(1, server.count("GET", "/v2/mirror/app/manifests/1"))
        local no, err = pull("docker.io/library/other:1", { resolve = function()
            return nil, "not from here"
        end })
        assert.is_nil(no)
        assert.equal("not from here", err)
    end)

    it("fetches in our place, and is not believed", function()
        local function fetcher(bytes_of)
            return function(layer, file)
                shell.write(file, bytes_of(what.blobs[layer.digest]))
                return true
            end
        end
        for text, bytes_of in pairs {
            ["another size"] = function(b) return b .. "x" end,
            ["other bytes"] = function(b) return "X" .. b:sub(2) end,
        } do
            local no, err = pull(server.host .. "/app", { fetch = fetcher(bytes_of) })
            assert.is_nil(no)
            assert.truthy(err:find(text, 1, true), err)
        end
        local no, err = pull(server.host .. "/app", { fetch = function() return nil, "cable cut" end })
        assert.is_nil(no)
        assert.truthy(err:find("cable cut", 1, true), err)
        local img <close> = assert(pull(server.host .. "/app", { fetch = fetcher(function(b) return b end) }))
        assert.equal(what.digest, img.digest)
        assert.equal(0, server.count("GET", "/v2/app/blobs/" .. what.layers[1]))
        -- Or lets us do it, and watches.
        local watched = 0
        local again <close> = assert(pull(server.host .. "/app", { store = dir .. "/two",
            fetch = function(_, _, default)
                watched = watched + 1
                return default()
            end }))
        assert.equal(2, watched)
        assert.truthy(again)
    end)

    it("leaves layers out, which makes another image", function()
        local img <close> = assert(pull(server.host .. "/app", { layers = function(layer)
            return layer.index == 1
        end }))
        assert.equal(1, #img.layers)
        assert.equal(what.diff_ids[1], img.layers[1].diff_id)
        assert.is_not.equal(what.digest, img.digest)
        assert.same({}, image.list { store = dir .. "/store" })
        local whole <close> = assert(pull(server.host .. "/app", {}))
        assert.equal(what.digest, whole.digest)
    end)

    it("chooses out of an index", function()
        local arm = tiny.make { architecture = "arm64", layers = { { "arm", "arm" } } }
        local both = tiny.serve(tiny.index { { what, platform = "linux/amd64" }, { arm, platform = "linux/arm64" } })
        local offered
        local img <close> = assert(pull(both.host .. "/app", { choose = function(entries, wanted)
            offered = #entries .. " " .. wanted.architecture
            return entries[2]
        end }))
        assert.truthy(offered:find("^2 "))
        assert.equal(arm.digest, img.digest)
        local no, err = pull(both.host .. "/other", { choose = function() end })
        assert.is_nil(no)
        assert.truthy(err:find("no image for", 1, true), err)
        both.stop()
    end)

    it("verifies, also what is here already", function()
        local img <close> = assert(pull(server.host .. "/app", {}))
        assert.truthy(img)
        local no, err = pull(server.host .. "/app", { verify = function(info)
            return info.config.os ~= "linux", "not today"
        end })
        assert.is_nil(no)
        assert.truthy(err:find("refused by policy: not today", 1, true), err)
    end)

    it("gives credentials", function()
        local asked
        local login = tiny.serve(what, function(req, res)
            if req.headers.authorization ~= "Basic YTpi" then
                res:send(401, { ["WWW-Authenticate"] = 'Basic realm="x"' }, "")
                return true
            end
        end)
        local img <close> = assert(pull(login.host .. "/app", { credentials = function(host, path)
            asked = host .. " " .. path
            return { username = "a", password = "b", source = "a vault" }
        end }))
        assert.equal(login.host .. " app", asked)
        assert.truthy(img)
        login.stop()
    end)
end)
