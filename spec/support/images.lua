-- SPDX-License-Identifier: Apache-2.0
--
-- Small real images for specs, made with umoci and pushed with skopeo: the
-- tools other people use, so that our own code is not its own judge.

local uv = require "luv"
local shell = require "support.shell"

local M = {}

local q = shell.quote

-- The folder changes of each layer of the image `multi`, as shell scripts run
-- inside the unpacked root. What they exercise is said beside them.
local layers = {
    -- A whole small system.
    [[
    mkdir -p bin etc data/opaque data/kept tmp usr/share/doc root
    cp "$BUSYBOX" bin/busybox
    for applet in sh ls cat echo env id pwd true false sleep sha256sum uname head tail wc stat \
        mount ps kill test mkdir rm cp dd seq yes date hostname readlink find grep sort touch \
        stty tty vi chmod chown ln mv df free nproc printf tr xargs od md5sum sync ip; do
        ln -s busybox bin/$applet
    done
    printf 'root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000:web:/data:/bin/sh\n' > etc/passwd
    printf 'root:x:0:\nweb:x:1000:\nextra:x:2000:web\n' > etc/group
    printf 'NAME="spec multi"\nID=spec\n' > etc/os-release
    echo one > data/gone
    echo one > data/changed
    echo one > data/opaque/lower
    echo one > data/kept/lower
    mkdir data/wasdir; echo one > data/wasdir/child
    chmod 1777 tmp
    ]],
    -- A whiteout, a change, a hard link, a setuid bit, an xattr, a symlink,
    -- a folder that becomes a file, a big and an empty file, odd names.
    [[
    rm data/gone
    echo two > data/changed
    ln data/changed data/hardlink
    cp bin/busybox bin/su; chmod 4755 bin/su
    setfattr -n user.spec -v yes data/kept/lower
    rm -r data/wasdir; echo file > data/wasdir
    ln -s ../changed data/kept/link
    seq 1 200000 > data/big
    : > data/empty
    echo odd > 'data/a name with spaces'
    echo utf8 > 'data/n'"$(printf '\303\251')"'me'
    ]],
}

--- Build an OCI layout at `dir` with tags:
---   `one`    one layer, a working busybox system
---   `multi`  three layers: whiteout, opaque folder, hard link, setuid, xattr…
--- `multi` has Entrypoint none, Cmd {"/bin/sh"}, Env, User none, WorkingDir /data.
---@param dir string a folder that does not exist yet
---@return string dir
function M.make(dir)
    local work = shell.tmpdir()
    local rootless = uv.getuid() ~= 0 and "--rootless" or ""
    local busybox = os.getenv("SM_SPEC_BUSYBOX") or "/bin/busybox"
    local function step(script, tag, into)
        shell.run(("cd %s; umoci unpack %s --image %s:%s b%s; cd b%s/rootfs; BUSYBOX=%s; %s\n"
            .. "cd %s; umoci repack --image %s:%s b%s; rm -rf b%s")
            :format(q(work), rootless, q(dir), tag, into, into, q(busybox), script,
                q(work), q(dir), into, into, into))
    end
    shell.run(("umoci init --layout %s; umoci new --image %s:empty"):format(q(dir), q(dir)))
    step(layers[1], "empty", "one")
    shell.run(("umoci config --image %s:one --config.cmd /bin/sh --config.env "
        .. "PATH=/usr/local/bin:/usr/bin:/bin --config.env SPEC=yes --config.workingdir /data")
        :format(q(dir)))
    step(layers[2], "one", "multi")
    -- An opaque folder: umoci writes plain whiteouts, so this layer is by hand.
    shell.run(("mkdir -p %s/o/data/opaque; cd %s; : > o/data/opaque/.wh..wh..opq; "
        .. "echo three > o/data/opaque/upper; tar --owner=0 --group=0 -cf opaque.tar -C o data; "
        .. "umoci raw add-layer --image %s:multi opaque.tar; umoci rm --image %s:empty; "
        .. "umoci gc --layout %s"):format(q(work), q(work), q(dir), q(dir), q(dir)))
    shell.remove(work)
    return dir
end

--- Copy between places skopeo knows ("oci:DIR:TAG", "docker://HOST/NAME:TAG").
--- Extra arguments go in front, e.g. "--format", "v2s2".
---@param from string
---@param to string
function M.copy(from, to, ...)
    local words = { "skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false",
        "--dest-tls-verify=false", ... }
    words[#words + 1] = from
    words[#words + 1] = to
    shell.run(words)
end

return M
