-- SPDX-License-Identifier: Apache-2.0
--
-- What a VM changed, as a layer: the agent's tar of an overlay's upper folder,
-- laid over the lower layer by our ingest, is what the overlay itself shows,
-- entry by entry; and the image that `commit` makes of it.

local uv = require "luv"
local agents = require "support.agent"
local files = require "sm.files"
local folder = require "support.folder"
local image = require "sm.image"
local images = require "support.images"
local ingest = require "support.ingest"
local json = require "sm.json"
local registry = require "support.registry"
local shell = require "support.shell"

local q = shell.quote

-- An overlay on real folders; nil where one cannot be mounted.
local function overlay(dir)
    shell.run(("cd %s; mkdir lower upper work merged"):format(q(dir)))
    return os.execute(("mount -t overlay overlay -o lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work %s/merged 2>/dev/null")
        :format(dir, dir, dir, q(dir)))
end

describe("the agent's tar of a writable layer", function()
    local w, dir, mounted

    before_each(function()
        w = ingest.new()
        dir = shell.tmpdir()
    end)
    after_each(function()
        if mounted then
            shell.run { "umount", dir .. "/merged" }
            mounted = false
        end
        w:close()
        shell.remove(dir)
    end)

    local function layer_of(path)
        local tar = {}
        agents.with({}, function(a)
            local p = assert(a:spawn { argv = { "layer" }, layer = true, cwd = path })
            while true do
                local piece, err = p:read "stdout"
                assert(not err, err)
                if not piece then
                    break
                end
                tar[#tar + 1] = piece
            end
            local exit = assert(p:wait())
            assert(exit.status == 0, p:read_all "stderr")
        end)
        return table.concat(tar)
    end

    local function same_as_overlay(lower, change)
        shell.run(("mkdir -p %s/lower; cd %s/lower; %s"):format(q(dir), q(dir), lower))
        shell.run(("rm -rf %s/lower.keep; cp -a %s/lower %s/lower.keep; rm -r %s/lower"):format(q(dir), q(dir), q(dir), q(dir)))
        mounted = overlay(dir)
        if not mounted then
            pending("needs to mount an overlay")
            return
        end
        shell.run { "umount", dir .. "/merged" }
        mounted = false
        shell.run(("rm -rf %s/lower %s/work; mkdir %s/work; mv %s/lower.keep %s/lower; "
            .. "mount -t overlay overlay -o lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work %s/merged")
            :format(q(dir), q(dir), q(dir), q(dir), q(dir), dir, dir, dir, q(dir)))
        mounted = true
        shell.run(("cd %s/merged; %s"):format(q(dir), change))
        local tar = layer_of(dir .. "/upper")
        assert.equal(tar, layer_of(dir .. "/upper")) -- the same bytes each time
        local base = w:path("base")
        shell.run(("tar --xattrs --xattrs-include='*' --format=posix -C %s/lower -cf %s ."):format(q(dir), q(base)))
        local tree = w:image { (w:layer(base)), (w:layer(w:file(tar, "layer"))) }
        assert.same({}, ingest.differences(folder.read(dir .. "/merged"), tree))
    end

    it("tells changes, whiteouts, opaque folders and links as the overlay shows them", function()
        same_as_overlay([[mkdir -p a/b opq/deep keep wasdir; for f in a/1 a/b/2 opq/deep/3 opq/4 keep/5 wasdir/6 wasfile gone; do echo $f > $f; done
            ln -s a link; mkfifo pipe; setfattr -n user.k -v 1 keep/5; ln a/1 a/hard]],
            [[rm gone a/b/2 pipe; rm -r opq; mkdir opq; echo new > opq/new; rm -r wasdir; echo file > wasdir
            rm wasfile; mkdir wasfile; echo in > wasfile/in; echo changed > keep/5; setfattr -n user.k -v 2 keep/5
            setfattr -n user.new -v x keep; rm link; ln -s keep link; echo x > x; ln x y; ln x a/z; chmod 700 a
            chown 12:3000000 x; touch -d @1000000000.987654321 y; mkdir -p very/deep/tree; mknod null c 1 3; mkfifo f
            cp /bin/true su; chmod 4755 su; setcap cap_net_raw+ep su; truncate -s 3M sparse; printf e >> sparse
            chmod 1777 .]])
    end)

    it("has room for long names, odd names and thousands of files", function()
        same_as_overlay("mkdir d; echo x > d/x",
            [[n=$(printf '%0200d' 1); mkdir -p $n/$n; echo a > $n/$n/$n; ln -s $n/$n $n/link; ln $n/$n/$n d/hard
            printf b > "$(printf 'caf\303\251')"; printf c > "$(printf 'l\351')"; printf d > 'a b
c'; mkdir many; for i in $(seq 1000); do echo $i > many/$i; done; rm d/x]])
    end)

    it("is empty for an empty folder, an error for none, and skips what is the agent's own", function()
        shell.run(("mkdir -p %s/u/etc; cd %s/u/etc; echo h > hostname; echo h > hosts; echo k > passwd"):format(q(dir), q(dir)))
        local names = shell.run(("tar tf %s"):format(q(w:file(layer_of(dir .. "/u"), "t"))))
        assert.equal("./\netc/\netc/passwd\n", names)
        agents.with({}, function(a)
            local p = assert(a:spawn { argv = { "layer" }, layer = true, cwd = dir .. "/none" })
            assert.equal("", p:read_all "stdout")
            assert.matches("No such file or directory", p:read_all "stderr")
            assert.equal(1, p:wait().status)
        end)
    end)
end)

describe("commit", function()
    local dir, st

    before_each(function()
        dir = shell.tmpdir()
        st = dir .. "/store"
        local layout = images.make(dir .. "/oci")
        images.copy("oci:" .. layout .. ":one", "docker-archive:" .. dir .. "/one.tar:one:v1")
        assert(image.load(dir .. "/one.tar", { store = st }))
        shell.run(("mkdir -p %s/upper/data; echo kept > %s/upper/data/new"):format(q(dir), q(dir)))
    end)
    after_each(function()
        shell.remove(dir)
    end)

    -- A VM as far as commit knows one: its image, and an agent.
    local function with_vm(fn)
        local img <close> = assert(image.pull("one:v1", { store = st, policy = "never" }))
        agents.with({}, function(a)
            fn {
                image = img,
                spawn = function(_, opts)
                    opts.cwd = dir .. "/upper"
                    return a:spawn(opts)
                end,
            }
        end)
    end
    local commit = require("sm.commit").commit

    it("makes an image with one more layer, which runs, is pushed and comes back", function()
        local made
        with_vm(function(vm)
            made = assert(commit(vm, "mine:2", { store = st, message = "why", created_by = "echo kept",
                config = { Cmd = { "/bin/cat", "/data/new" } } }))
        end)
        assert.equal("docker.io/library/mine:2", made.reference)
        local about = assert(image.inspect("mine:2", { store = st }))
        assert.equal(2, #about.manifest.layers)
        assert.equal(made.layer, about.config.rootfs.diff_ids[2])
        assert.same({ "/bin/cat", "/data/new" }, about.config.config.Cmd)
        local step = image.history("mine:2", { store = st })[1]
        assert.equal("echo kept", step.created_by)
        assert.equal("why", step.comment)
        assert.same({}, image.verify { store = st, deep = true }.problems)
        local reg = registry.start()
        assert(image.push("mine:2", { store = st, to = reg.host .. "/mine:2" }))
        images.copy("docker://" .. reg.host .. "/mine:2", "oci:" .. dir .. "/back:2", "--preserve-digests")
        assert.equal(made.digest, json.decode(shell.read(dir .. "/back/index.json")).manifests[1].digest)
        shell.run(("umoci unpack %s --image %s/back:2 %s/bundle"):format(uv.getuid() ~= 0 and "--rootless" or "", q(dir), q(dir)))
        assert.equal("kept\n", shell.read(dir .. "/bundle/rootfs/data/new"))
        reg.stop()
    end)

    it("refuses what it cannot do, in one line, and leaves nothing", function()
        local function refuses(want, got, err)
            assert.is_nil(got)
            assert.truthy(err:find(want, 1, true), err)
            assert.is_nil(err:find("[\r\n]"))
        end
        with_vm(function(vm)
            refuses("lowercase", commit(vm, "UPPER", { store = st }))
            refuses("(limit)", commit(vm, "mine:2", { store = st, limit = 100 }))
            dir = dir .. "/none"
            refuses("could not read its changes", commit(vm, "mine:2", { store = st }))
            dir = dir:gsub("/none$", "")
            assert.error_matches(function()
                commit(vm, "mine:2", { nme = 1 })
            end, 'unknown option "nme"')
        end)
        local img <close> = assert(image.get("oci:" .. dir .. "/oci:multi", { store = st }))
        refuses("not in the image store", commit({ image = img }, "mine:2", { store = st }))
        assert.equal(1, #image.list { store = st })
        assert.same({}, files.list(st .. "/tmp"))
    end)
end)
