-- SPDX-License-Identifier: Apache-2.0
--
-- Make the images the KVM specs run, once, outside the lab (the tools are slow
-- in it): lua5.4 spec/support/make_images.lua DIR
--
--   one, multi   see support/images.lua
--   static       a single static binary, no shell, no /etc
--   config       `one` with Entrypoint, Cmd, Env, User and WorkingDir set

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
shell.remove(work)
