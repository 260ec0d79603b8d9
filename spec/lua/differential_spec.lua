-- SPDX-License-Identifier: Apache-2.0
--
-- Ten images, made by umoci out of Debian's own files and of every oddity a
-- layer can have: our root, read back from the EROFS image that a guest would
-- mount, is `umoci unpack`'s root entry by entry with all metadata, and
-- fsck.erofs finds nothing to say.

local uv = require "luv"
local erofs = require "support.erofs"
local folder = require "support.folder"
local image = require "sm.image"
local ingest = require "support.ingest"
local shell = require "support.shell"

local q = shell.quote

-- A layer is what a script does to the root that the layers below give.
-- package NAME…: the files of installed Debian packages.
local PRELUDE = [[
    package() {
        for d in bin sbin lib lib64; do
            mkdir -p usr/$d; [ -e $d ] || ln -s usr/$d $d # as Debian has them since 12
        done
        dpkg -L "$@" | sort -u | while IFS= read -r f; do
            if [ -L "$f" ] || [ -f "$f" ]; then printf '%s\0' "${f#/}"; fi
        done > "$WORK/list"
        tar -C / --null --files-from="$WORK/list" --xattrs --xattrs-include='*' -cf - | tar --xattrs --xattrs-include='*' -xf -
    }
]]

local IMAGES = {
    { "debian packages, one layer", [[package coreutils grep sed]] },
    { "debian packages in three layers, setuid and links", [[package base-files libc6]],
        [[package login passwd mount]],
        [[package perl-base; rm -rf usr/share/doc usr/share/man; rm -f bin/mount]] },
    { "thousands of files", [[package tzdata; mkdir -p many; cd many
        for d in $(seq 20); do mkdir $d; for f in $(seq 60); do echo $d $f > $d/$f; done; done]],
        [[rm -rf many/7 many/8; rm many/9/*5; echo new > many/9/55; mv many/10 many/moved]] },
    { "whiteouts of every kind", [[mkdir -p a/b/c d/e f g; for n in a/1 a/b/2 a/b/c/3 d/e/4 f/5 g/6; do echo $n > $n; done
        ln -s f link; mkfifo pipe]],
        [[rm a/1; rm -r a/b/c; rm -r d; rm link pipe; rm -r f]],
        [[mkdir d; echo back > d/back; mkdir -p a/b/c; echo again > a/b/c/3; echo file > f]] },
    { "folders become files and back", [[mkdir -p x/y z; echo 1 > x/y/1; echo w > w; ln -s z v]],
        [[rm -r x; echo file > x; rm w; mkdir w; echo in > w/in; rm v; mkdir v; echo v > v/v]],
        [[rm x; ln -s w x; rm -r w; mkfifo w; rm -r v]] },
    { "hard links within and across layers", [[mkdir a b; echo one > a/1; ln a/1 a/2; ln a/1 b/3; echo two > b/4]],
        [[ln b/4 a/5; rm a/1; ln a/2 b/6]],
        [[echo changed > a/new; ln a/new b/new; rm b/3]] },
    { "capabilities and extended attributes", [[mkdir bin; cp /bin/true bin/ping; setcap cap_net_raw+ep bin/ping
        cp /bin/true bin/both; setcap cap_net_bind_service,cap_sys_time=eip bin/both
        setfattr -n user.text -v 'a value' bin; setfattr -n user.binary -v 0x00ff0a bin/ping
        echo x > plain; for i in $(seq 20); do setfattr -n user.k$i -v $(printf "%0$((i * 9))d" $i) plain; done]],
        [[setfattr -x user.text bin; setfattr -n user.new -v 1 bin; setcap -r bin/both; setcap cap_chown+ep bin/ping]] },
    { "devices, fifos, modes and owners", [[mkdir dev; mknod dev/null c 1 3; mknod dev/sda b 8 0; mknod dev/big c 300 70000
        mkfifo -m 640 dev/fifo; for m in 0000 0111 1777 2755 4711 6755; do echo > f$m; chown 1:2 f$m; chmod $m f$m; mkdir d$m; chmod $m d$m; done
        chown 65534:100000 f0000; chown -h 4000000000:7 dev; ln -s nowhere dangling; chown -h 5:6 dangling]],
        [[chown 9:9 f0111; chmod 600 f6755; rm dev/sda; mknod dev/sda c 8 1]] },
    { "sparse, empty, large and odd-sized files", [[truncate -s 0 empty; truncate -s 64M hole; truncate -s 20M ends; printf x | dd of=ends bs=1 seek=20971519 conv=notrunc 2>/dev/null
        for n in 1 4095 4096 4097 8191 8192 12289 1048575 1048577; do head -c $n /usr/bin/perl > s$n; done
        dd if=/usr/bin/perl of=middle bs=4096 count=10 seek=1000 2>/dev/null; truncate -s 9M middle]],
        [[printf y | dd of=hole bs=1 seek=33554432 conv=notrunc 2>/dev/null; rm ends]] },
    { "odd names, deep trees, links through links", [[printf a > "$(printf 'caf\303\251')"; printf b > "$(printf 'latin\351')"; printf c > ' lead'; printf d > 'trail '
        printf e > "$(printf 'tab\there')"; printf f > "$(printf 'q\"uo\\te')"; printf g > "$(printf '%0255d' 1)"; printf h > -dash; printf i > '*'
        d=.; for i in $(seq 60); do d=$d/level$i; done; mkdir -p "$d"; echo deep > "$d/deep"
        mkdir real; echo r > real/r; ln -s real one; ln -s one two; ln -s two/r three; ln -s ../../../../etc/passwd up; ln -s "$(printf '%01000d' 7)" long; touch .hidden ...]],
        [[rm two; ln -s real two; echo more > real/more]] },
}

describe("our root is umoci's root:", function()
    local dir, layout, began

    setup(function()
        assert(uv.getuid() == 0, "umoci keeps owners and devices for root only")
        dir = shell.tmpdir()
        layout = dir .. "/oci"
        shell.run { "umoci", "init", "--layout", layout }
    end)
    teardown(function()
        shell.remove(dir)
    end)

    -- Old times, so that what umoci itself touches while it unpacks shows.
    local AGE = "find . -depth -newermt @1700000000 -exec touch -h -d @1600000000.123456789 {} +; touch -d @1600000000 ."

    local function make(tag, layers)
        shell.run(("umoci new --image %s:%s"):format(q(layout), tag))
        for i, script in ipairs(layers) do
            local b = ("%s/b-%s-%d"):format(dir, tag, i)
            shell.run(("export WORK=%s; umoci unpack --image %s:%s %s; cd %s/rootfs\n%s\n(%s)\ncd %s/rootfs; %s\n"
                .. "cd /; umoci repack --image %s:%s %s; rm -rf %s"):format(q(dir), q(layout), tag, q(b), q(b), PRELUDE,
                script, q(b), AGE, q(layout), tag, q(b), q(b)))
        end
    end

    -- umoci stamps folders that it removed something from, and the root, with
    -- the time of now; the layers' own time is the one that counts.
    local function forgive(want, have)
        for name, e in pairs(want) do
            if e.type == "d" and e.mtime >= began and have[name] then
                e.mtime, e.mtime_ns = have[name].mtime, have[name].mtime_ns
            end
        end
    end

    for n, case in ipairs(IMAGES) do
        it(case[1], function()
            local tag = "i" .. n
            make(tag, table.move(case, 2, #case, 1, {}))
            began = os.time()
            local bundle, device = dir .. "/bundle-" .. tag, dir .. "/device-" .. tag
            shell.run { "umoci", "unpack", "--image", layout .. ":" .. tag, bundle }
            local img <close> = assert(image.get("oci:" .. layout .. ":" .. tag, { store = dir .. "/store" }))
            assert.equal(#case - 1, #img.layers)
            for _, extent in ipairs(img.extents) do
                shell.run(("cp --sparse=always %s %s.part; cat %s.part >> %s; rm %s.part"):format(q(extent.path),
                    q(device), q(device), q(device), q(device)))
            end
            shell.run { "fsck.erofs", device }
            local have, close = erofs.read(device)
            local want = folder.read(bundle .. "/rootfs")
            forgive(want, have)
            assert.same({}, ingest.differences(want, have))
            close()
            shell.run { "rm", "-rf", bundle, device }
        end)
    end
end)
