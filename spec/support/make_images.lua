-- SPDX-License-Identifier: Apache-2.0
--
-- Make the images the KVM specs run, once, outside the lab (the tools are slow
-- in it): lua5.4 spec/support/make_images.lua DIR
--
--   one, multi   see support/images.lua
--   static       a single static binary, no shell, no /etc
--   wide         `multi` with 24 MiB of noise in one file and 1 MiB in 256
--   serve        `one` with nginx (configured, pages in /www), wrk and iperf3
--   config       `one` with Entrypoint, Cmd, Env, User and WorkingDir set
--
-- DIR/debian/oci, tag demo: Debian, as `make demo` has it, with wget, ping and getent.
--
-- DIR/peer.cpio: an initramfs with busybox, for a guest of another VMM that serves
-- /numbers at the address that its command line names.
--
-- Beside them, DIR/one.tar: `one` as `docker save` has it, named one:v1; and
-- DIR/<tag>.sums: what `sha256sum` says of every file of `multi`
-- and `wide` as umoci unpacks them.

local images = require "support.images"
local shell = require "support.shell"

local dir = assert(arg[1], "usage: make_images.lua DIR")
local q = shell.quote
images.make(dir)
local work = shell.tmpdir()
shell.run(([[
set -e
cd %s
cat > hello.c <<'C'
#include <stdio.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    printf("static %%d %%d\n", argc, (int)getuid());
    return argc > 1 ? 3 : 0;
}
C
musl-gcc -static -Os -o hello hello.c
umoci new --image %s:static
umoci insert --image %s:static hello /hello
umoci config --image %s:static --config.entrypoint /hello
umoci config --image %s:one --tag config --config.entrypoint /bin/echo --config.entrypoint entry \
    --config.cmd default --config.env FROM=image --config.user web --config.workingdir /made/here
]]):format(q(work), q(dir), q(dir), q(dir), q(dir)))
images.copy("oci:" .. dir .. ":one", "docker-archive:" .. dir .. "/one.tar:one:v1")
shell.run(([[
set -e
cd %s
noise() { openssl enc -aes-128-ctr -K 00112233445566778899aabbccddeeff -iv "$1" -nosalt </dev/zero 2>/dev/null | head -c "$2"; }
mkdir -p wide/wide/many
noise 1 25165824 > wide/wide/noise
for i in $(seq 256); do noise $((i + 1)) 4096 > wide/wide/many/$i; done
tar --owner=0 --group=0 --numeric-owner --mtime=@0 --sort=name -cf wide.tar -C wide wide
umoci raw add-layer --image %s:multi --tag wide wide.tar
rootless=; [ "$(id -u)" = 0 ] || rootless=--rootless
for tag in multi wide; do
    umoci unpack $rootless --image %s:$tag b-$tag
    (cd b-$tag/rootfs && find . -type f -print0 | sort -z | xargs -0 sha256sum) > %s/$tag.sums
done
]]):format(q(work), q(dir), q(dir), q(dir)))
shell.run(([[
set -e
cd %s
mkdir -p serve/etc/nginx serve/run serve/www serve/var/lib/nginx serve/var/log/nginx serve/usr/share/nginx
for p in nginx wrk iperf3; do
    cp --parents -L "$(command -v $p)" serve/
    ldd "$(command -v $p)" | grep -o '/[^ ]*' | xargs -I '{}' cp --parents -L '{}' serve/
done
seq 1000 > serve/www/page
cat > serve/etc/nginx/nginx.conf <<'C'
user root;
worker_processes 1;
error_log stderr crit;
events { }
http { access_log off; server { listen 80 backlog=1024; listen [::]:80 backlog=1024; root /www; } }
C
tar --owner=0 --group=0 --numeric-owner --mtime=@0 --sort=name -cf serve.tar -C serve .
umoci raw add-layer --image %s:one --tag serve serve.tar
]]):format(q(work), q(dir)))
shell.run(([[
set -e
cd %s
mkdir -p peer/bin peer/proc peer/sys peer/dev peer/www
cp "$(command -v busybox)" peer/bin/busybox
for a in sh mount ip httpd seq sleep cat; do ln -s busybox peer/bin/$a; done
cat > peer/init <<'C'
#!/bin/sh
mount -t proc proc /proc; mount -t devtmpfs dev /dev 2>/dev/null
for word in $(cat /proc/cmdline); do case $word in address=*) address=${word#address=} ;; esac; done
ip link set lo up; ip addr add $address dev eth0; ip link set eth0 up
seq 1 200000 > /www/numbers
echo ready
httpd -f -p 80 -h /www
C
chmod +x peer/init
(cd peer && find . | cpio --quiet -o -H newc) > %s/peer.cpio
]]):format(q(work), q(dir)))
shell.run(("scripts/demo-image %s/debian wget libgnutls30 libhogweed6 libnettle8 libp11-kit0 libtasn1-6 libunistring2 "
    .. "libidn2-0 libffi8 zlib1g libpsl5 iputils-ping libc-bin 2>&1"):format(q(dir)))
shell.remove(work)
