-- SPDX-License-Identifier: Apache-2.0
local uv = require "luv"
local shell = require "support.shell"

local initramfs = require "sm.initramfs"
local q, read, write = shell.quote, shell.read, shell.write

local dir, real_cache

-- The archive as GNU cpio sees it: path -> "mode owner size-or-device".
local function listing(path)
    local entries, count = {}, 0
    for line in shell.run("TZ=UTC LC_ALL=C cpio -itv --quiet < " .. q(path)):gmatch("[^\n]+") do
        local mode, user, group, rest = line:match("^(%S+)%s+%d+%s+(%S+)%s+(%S+)%s+(.*)$")
        local what, name = rest:match("^(.-)%s+Jan%s+1%s+1970 (.*)$")
        assert(name, "an entry with a time: " .. line)
        assert.is_nil(entries[name])
        assert.equal("root root", user .. " " .. group)
        entries[name] = mode .. " " .. what:gsub("%s", "")
        count = count + 1
    end
    return entries, count
end

local function cached()
    return shell.list(dir .. "/cache/initramfs")
end

describe("sm.initramfs", function()
    local init

    before_each(function()
        dir = shell.tmpdir()
        real_cache = os.getenv("SM_CACHE")
        uv.os_setenv("SM_CACHE", dir .. "/cache")
        init = write(dir .. "/agent", "#!agent\n" .. ("x"):rep(1001))
    end)

    after_each(function()
        if real_cache then
            uv.os_setenv("SM_CACHE", real_cache)
        else
            uv.os_unsetenv("SM_CACHE")
        end
        shell.remove(dir)
    end)

    it("makes the least a kernel needs", function()
        local path = assert(initramfs.build { init = init })
        local entries = listing(path)
        assert.same({
            dev = "drwxr-xr-x 0",
            ["dev/console"] = "crw------- 5,1",
            init = "-rwxr-xr-x 1009",
            proc = "drwxr-xr-x 0",
            sys = "drwxr-xr-x 0",
        }, entries)
        assert.equal(0, #read(path) % 512)
    end)

    it("carries modules in their order, files, folders and links", function()
        local a, b = write(dir .. "/a.ko", ("a"):rep(4095)), write(dir .. "/b.ko", ("b"):rep(4097))
        local path = assert(initramfs.build {
            init = init,
            modules = { { name = "zz.ko", path = b }, { name = "aa.ko", path = a } },
            files = {
                { path = "/etc/deep/er/file", data = "data\0with\nbytes" },
                { path = "/bin/tool", source = a, mode = tonumber("4755", 8) },
                { path = "/sbin", link = "bin" },
                { path = "tmp", dir = true, mode = tonumber("1777", 8) },
                { path = "/etc", dir = true, mode = tonumber("700", 8) },
                { path = "/empty", data = "" },
            },
        })
        local entries = listing(path)
        assert.equal("-rw-r--r-- 4097", entries["modules/zz.ko"])
        assert.equal("drwx------ 0", entries["etc"])
        assert.equal("drwxr-xr-x 0", entries["etc/deep/er"])
        assert.equal("-rwsr-xr-x 4095", entries["bin/tool"])
        assert.equal("lrwxrwxrwx 3", entries["sbin -> bin"])
        assert.equal("drwxrwxrwt 0", entries["tmp"])
        assert.equal("-rw-r--r-- 0", entries["empty"])

        local out = dir .. "/out"
        shell.run("mkdir " .. q(out) .. "; cd " .. q(out)
            .. "; cpio -i --quiet --no-absolute-filenames '[!d]*' 'd[!e]*' < " .. q(path))
        assert.equal("/modules/zz.ko\n/modules/aa.ko\n", read(out .. "/modules/order"))
        assert.equal(read(a), read(out .. "/modules/aa.ko"))
        assert.equal(read(b), read(out .. "/modules/zz.ko"))
        assert.equal(read(init), read(out .. "/init"))
        assert.equal("data\0with\nbytes", read(out .. "/etc/deep/er/file"))
    end)

    it("lists every folder before what is in it", function()
        local path = assert(initramfs.build { init = init, files = {
            { path = "/a/b", data = "1" }, { path = "/a-b", data = "2" }, { path = "/a/b.c", data = "3" },
            { path = "/a b/c", data = "4" },
        } })
        local seen = { ["."] = true }
        for name in shell.run("cpio -it --quiet < " .. q(path)):gmatch("[^\n]+") do
            assert.is_true(seen[name:match("^(.*)/[^/]*$") or "."], name)
            seen[name] = true
        end
    end)

    it("depends on contents alone: same bytes, same name, one file", function()
        local spec = { init = init, files = { { path = "/b", data = "b" }, { path = "/a", data = "a" } } }
        local first = assert(initramfs.build(spec))
        local bytes = read(first)
        local stat = uv.fs_stat(first)
        assert.equal(first, assert(initramfs.build(spec)))
        assert.same(stat, uv.fs_stat(first))

        -- Another file of the same contents, another time, another order.
        local other = write(dir .. "/elsewhere", read(init))
        assert(uv.fs_utime(other, 1, 1))
        os.remove(first)
        local second = assert(initramfs.build { init = other,
            files = { { path = "a", data = "a" }, { path = "//b", data = "b" } } })
        assert.equal(first, second)
        assert.equal(bytes, read(second))
        assert.equal(1, #cached())
    end)

    it("names other contents otherwise", function()
        local names = {}
        local specs = {
            { init = init },
            { init = write(dir .. "/init2", "other") },
            { init = init, files = { { path = "/x", data = "1" } } },
            { init = init, files = { { path = "/x", data = "2" } } },
            { init = init, files = { { path = "/y", data = "1" } } },
            { init = init, files = { { path = "/x", link = "1" } } },
            { init = init, files = { { path = "/x", data = "1", mode = 0 } } },
            { init = init, files = { { path = "/x", dir = true } } },
            { init = init, modules = { { name = "x", path = init } } },
        }
        for _, spec in ipairs(specs) do
            local path = assert(initramfs.build(spec))
            assert.is_nil(names[path])
            names[path] = true
        end
    end)

    it("streams big files", function()
        local big = dir .. "/big"
        shell.run { "truncate", "-s", "96M", big }
        local function peak_kib()
            return tonumber(read("/proc/self/status"):match("VmHWM:%s*(%d+)"))
        end
        assert(initramfs.build { init = init })
        collectgarbage()
        local before = peak_kib()
        local path = assert(initramfs.build { init = init, files = { { path = "/big", source = big } } })
        -- ASan keeps what was freed.
        if os.getenv "SM_SPEC_SANITIZER" ~= "asan" then
            assert.is_true(peak_kib() - before < 32 * 1024)
        end
        assert.equal("-rw-r--r-- " .. (96 << 20), (listing(path))["big"])
    end)

    it("is safe for many builders at once", function()
        local script = [[
            local path = assert(require("sm.initramfs").build { init = arg[1],
                files = { { path = "/big", source = arg[2] } } })
            io.write(path)]]
        local big = dir .. "/big"
        shell.run { "truncate", "-s", "8M", big }
        write(dir .. "/build.lua", script)
        local one = ("lua5.4 %s %s %s"):format(q(dir .. "/build.lua"), q(init), q(big))
        local out = shell.run(("for i in 1 2 3 4; do %s > %s/out.$i & done; wait; cat %s/out.*")
            :format(one, q(dir), q(dir)))
        assert.equal(1, #cached())
        local path = dir .. "/cache/initramfs/" .. cached()[1]
        assert.equal(path:rep(4), out)
        assert.equal("-rw-r--r-- " .. (8 << 20), (listing(path))["big"])
    end)

    it("tells what the host refuses, leaving nothing", function()
        local path, err = initramfs.build { init = dir .. "/missing" }
        assert.is_nil(path)
        assert.matches("missing", err)
        path, err = initramfs.build { init = dir }
        assert.is_nil(path)
        assert.matches("not a regular file", err)
        path, err = initramfs.build { init = init, modules = { { name = "m.ko", path = dir .. "/none.ko" } } }
        assert.is_nil(path)
        assert.matches("none.ko", err)
        assert.same({}, cached())

        write(dir .. "/cache", "in the way")
        path, err = initramfs.build { init = init }
        assert.is_nil(path)
        assert.matches("cache", err)
    end)

    it("refuses misuse by name", function()
        local function misuse(spec, what)
            local ok, err = pcall(initramfs.build, spec)
            assert.is_false(ok)
            assert.matches(what, err, 1, true)
        end
        misuse(nil, "a table expected")
        misuse({}, "init: the path of a file expected")
        misuse({ init = init, module = {} }, 'unknown key "module"')
        misuse({ init = init, files = { { path = "/x", text = "" } } }, 'unknown key "text"')
        misuse({ init = init, files = { { path = "/x" } } }, "has no contents")
        misuse({ init = init, files = { { path = "/a/../b", data = "" } } }, 'bad path "/a/../b"')
        misuse({ init = init, files = { { path = "/", data = "" } } }, 'bad path "/"')
        misuse({ init = init, files = { { path = "/init", data = "" } } }, '"init" is there twice')
        misuse({ init = init, files = { { path = "/init/x", data = "" } } }, "which is no folder")
        misuse({ init = init, modules = { { name = "../m.ko", path = init } } }, "bad path")
    end)
end)
