-- SPDX-License-Identifier: Apache-2.0
--
-- Users, groups and bare images: the agent inside a made-up root folder that
-- holds one static program and, at most, a passwd and a group file. Needs root
-- (chroot, setuid); without it these specs are pending.

local support = require "support.agent"

-- Prints who and where it is; "read PATH" opens a file, "write PATH" writes it.
local PROGRAM = [[
#define _GNU_SOURCE
#include <fcntl.h>
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    if (argc > 2) {
        int fd = open(argv[2], strcmp(argv[1], "read") ? O_WRONLY : O_RDONLY);
        return fd < 0 ? 1 : write(1, "opened\n", 7) == 7 ? 0 : 2;
    }
    gid_t groups[300];
    int n = getgroups(300, groups);
    char cwd[4096];
    printf("uid=%d gid=%d groups=", (int)getuid(), (int)getgid());
    for (int i = 0; i < n; i++)
        printf("%s%d", i ? "," : "", (int)groups[i]);
    printf(" home=%s cwd=%s\n", getenv("HOME"), getcwd(cwd, sizeof(cwd)));
    return 0;
}
]]

local PASSWD = [[
root:x:0:0:root:/root:/bin/sh
# a comment
broken line
daemon:x:1:1::/usr/sbin:/none
app:x:1000:1000:App,,,:/srv/app:/bin/sh
nogroup:x:1001:4242::/nowhere:/bin/sh
longid:x:99999999999:1::/x:
1234:x:777:777::/numeric:
nohome:x:1002:1002:::
last:x:1003:1003::/last]] -- no newline at the end

local GROUP = [[
root:x:0:
daemon:x:1:
adm:x:4:app,other
app:x:1000:
docker:x:998:root,app
wheel:x:10:appx,xapp
audio:x:29:nogroup]]

describe("the agent: users in the image", function()
    if not support.is_root() then
        pending("needs root", function() end)
        return
    end

    local root, bare

    setup(function()
        root, bare = support.folder(), support.folder()
        local source = root.path .. "/id.c"
        local file = assert(io.open(source, "w"))
        file:write(PROGRAM)
        file:close()
        assert(os.execute(("musl-gcc -static -Os -o %s/id %s"):format(bare.path, source)))
        assert(os.execute(("chmod 755 %s %s; mkdir %s/etc; cp %s/id %s/id"):format(
            root.path, bare.path, root.path, bare.path, root.path)))
        for name, text in pairs({ passwd = PASSWD, group = GROUP }) do
            local out = assert(io.open(root.path .. "/etc/" .. name, "w"))
            out:write(text)
            out:close()
        end
    end)

    teardown(function()
        getmetatable(root).__close(root)
        getmetatable(bare).__close(bare)
    end)

    local function who(a, user, opts)
        opts = opts or {}
        opts.argv, opts.user = { "/id" }, user
        local r, err, failure = a:exec(opts)
        return r and r.stdout:gsub("\n$", ""), err, failure
    end

    it("follows the image specification's table", function()
        support.with({ root = root.path }, function(a)
            for _, case in ipairs({
                { nil, "uid=0 gid=0 groups=998 home=/root cwd=/" },
                { "root", "uid=0 gid=0 groups=998 home=/root cwd=/" },
                { "0", "uid=0 gid=0 groups=998 home=/root cwd=/" },
                { "app", "uid=1000 gid=1000 groups=4,998 home=/srv/app cwd=/" },
                { "1000", "uid=1000 gid=1000 groups=4,998 home=/srv/app cwd=/" },
                -- With a group, only that one applies.
                { "app:adm", "uid=1000 gid=4 groups= home=/srv/app cwd=/" },
                { "app:77", "uid=1000 gid=77 groups= home=/srv/app cwd=/" },
                { "1000:daemon", "uid=1000 gid=1 groups= home=/srv/app cwd=/" },
                -- Not listed: any number will do, no name will.
                { "4321", "uid=4321 gid=0 groups= home=/ cwd=/" },
                { "4321:8765", "uid=4321 gid=8765 groups= home=/ cwd=/" },
                -- A number is an id even if a user has it as its name.
                { "1234", "uid=1234 gid=0 groups= home=/ cwd=/" },
                { "nogroup", "uid=1001 gid=4242 groups=29 home=/nowhere cwd=/" },
                { "nohome", "uid=1002 gid=1002 groups= home=/ cwd=/" },
                { "last", "uid=1003 gid=1003 groups= home=/last cwd=/" },
                { "app:", "uid=1000 gid=1000 groups=4,998 home=/srv/app cwd=/" },
                { ":adm", "uid=0 gid=4 groups= home=/root cwd=/" },
            }) do
                assert.equal(case[2], (who(a, case[1])), tostring(case[1]))
            end
        end)
    end)

    it("refuses who is not there", function()
        support.with({ root = root.path }, function(a)
            for _, user in ipairs({
                "ghost", "app:ghosts", "longid", "99999999999", "4294967295", "app:4294967295",
                "app:adm:adm", "-1", "broken line",
            }) do
                local out, err, failure = who(a, user)
                assert.is_nil(out, user)
                assert.equal("user", failure.stage, user)
                assert.equal(126, failure.status)
                assert.matches("^exec: ", err)
            end
        end)
    end)

    it("adds groups, enters and makes folders the user may not", function()
        support.with({ root = root.path }, function(a)
            assert.equal("uid=1000 gid=1000 groups=4,55,66,998 home=/srv/app cwd=/made/here",
                (who(a, "app", { groups = { 55, 66 }, cwd = "/made/here" })))
            assert.equal("uid=1000 gid=1000 groups=4,998 home=/given cwd=/",
                (who(a, "app", { env = { HOME = "/given" } })))
        end)
    end)

    it("lets the user open its own /dev/stdout, which many images log to", function()
        support.with(nil, function(a)
            assert(os.execute("chmod 711 " .. root.path))
            local r = assert(a:exec { argv = { bare.path .. "/id", "write", "/dev/stdout" },
                user = "65534:65534" })
            assert.equal("opened\n", r.stdout)
            r = assert(a:exec { argv = { bare.path .. "/id", "write", "/dev/stderr" },
                user = "65534:65534" })
            assert.equal(0, r.status)
        end)
    end)

    it("runs in an image of one static program and nothing else", function()
        support.with({ root = bare.path }, function(a)
            assert.equal("uid=0 gid=0 groups= home=/ cwd=/", (who(a, nil)))
            assert.equal("uid=5 gid=0 groups= home=/ cwd=/deep/er", (who(a, "5", { cwd = "/deep/er" })))
            local _, _, failure = who(a, "app")
            assert.equal("user", failure.stage)
            local none, err = a:exec { argv = { "sh" } }
            assert.is_nil(none)
            assert.matches("sh: no such file", err)
            local info = assert(a:write_file("/etc/motd", "hello", { uid = 5, gid = 6, mode = 384 }))
            assert.same({ 5, 6, 384 }, { info.uid, info.gid, info.mode })
            assert.equal("hello", (a:read_file("/etc/motd")))
        end)
    end)

    it("as PID 1 of a namespace it ends everything, orphans included", function()
        support.with({ prefix = { "unshare", "--fork", "--pid", "--mount-proc" } }, function(a)
            local dir <close> = support.folder()
            -- Orphans: one that goes at SIGTERM, one that must be killed.
            local p = assert(a:spawn { main = true, argv = { "sh", "-c",
                "(setsid sleep 60 &); (setsid sh -c 'trap : TERM; echo ready; while :; do sleep 60; done' &); " ..
                "read line; exit 6" }, stdin = true })
            assert.equal("ready\n", p:read("stdout", 10))
            p:close_stdin()
            local bye = assert(a:wait_goodbye(20))
            assert.same({ "exited", 6 }, { bye.reason, bye.code })
        end)
    end)

    it("as PID 1 of a namespace it reaps orphans while it runs", function()
        support.with({ prefix = { "unshare", "--fork", "--pid", "--mount-proc" } }, function(a)
            -- Each orphan tells that it ran by the pipe's end of file.
            assert(a:exec { argv = { "sh", "-c", "for i in 1 2 3 4 5 6 7 8; do (true &) ; done" } })
            local r
            for _ = 1, 100 do
                r = assert(a:exec { argv = { "sh", "-c", "cat /proc/[0-9]*/stat | grep -c ') Z '" } })
                if r.stdout == "0\n" then
                    break
                end
            end
            assert.equal("0\n", r.stdout)
        end)
    end)
end)
