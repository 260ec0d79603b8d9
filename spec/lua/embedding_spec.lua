-- SPDX-License-Identifier: Apache-2.0
--
-- Inside other programs: several Lua states in several threads, a loop that is
-- not ours, and nothing taken from the host. With the fake backend; spec/kvm has
-- the same with guests.

local shell = require "support.shell"

local root = shell.run "pwd":gsub("\n", "")

local function host(san, threads, rounds)
    local build = "build" .. (san and "/" .. san or "")
    local flags = san and "SAN=" .. san or ""
    shell.run(("make -s -j2 %s %s/fake/sm/core.so %s/fake/sm-worker %s/host"):format(flags, build, build, build))
    -- The interpreter, luv and libuv are the system's: what they leave behind at
    -- the end of a thread is theirs.
    return shell.run(("ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=report_signal_unsafe=0:suppressions=%s/spec/host/tsan.supp LUA_PATH='%s/lua/?.lua;;' "
        .. "LUA_CPATH='%s/%s/fake/?.so;;' timeout 300 %s/host %d spec/host/machines.lua %d 2>&1")
        :format(root, root, root, build, build, threads, rounds))
end

describe("embedded", function()
    it("takes no signal, handler, mask, global, output or exit from the host", function()
        assert.equal("ok\n", host(nil, 1, 3))
    end)

    it("serves three Lua states in three threads, four VMs each", function()
        assert.equal("ok\n", host(nil, 3, 5))
    end)

    it("does so under ASan", function()
        assert.equal("ok\n", host("asan", 3, 2))
    end)

    it("does so under TSan", function()
        assert.equal("ok\n", host("tsan", 3, 2))
    end)
end)

describe("under other loops, the same", function()
    local function lua(driver)
        shell.run "make -s build/fake/sm/core.so build/fake/sm-worker"
        return shell.run(("LUA_PATH='%s/lua/?.lua;;' LUA_CPATH='%s/build/fake/?.so;;' timeout 300 %s spec/host/machines.lua 2")
            :format(root, root, driver))
    end

    it("works with luv's, which the host runs", function()
        assert.equal("ok\n", lua "lua5.4 spec/host/luv.lua")
    end)

    it("works with cqueues", function()
        assert.equal("ok\n", lua "lua5.4 spec/host/cqueues.lua")
    end)

    it("works inside Prosody, whose signals go on working", function()
        assert.equal("ok\nended in order\n", lua "spec/host/prosody/run")
    end)
end)

-- Everything is found below a prefix, by stock lua5.4, from another folder.
local function is_usable(prefix)
    local env = "cd / && env -u LUA_PATH -u LUA_CPATH -u SM_WORKER -u SM_NET -u SM_INIT "
    assert.equal("true\n", shell.run(("%s LUA_PATH='%s/share/lua/5.4/?.lua;;' LUA_CPATH='%s/lib/lua/5.4/?.so;;' lua5.4 -e %s")
        :format(env, prefix, prefix, shell.quote [[
            local sm = require "sm"
            require "sm.image_core"
            local w <close> = assert(require("sm.worker").spawn {})
            assert(w:call("vm.create", { cpus = 1 }) or true)
            assert(require("sm.machine").guest_init())
            print(sm.version ~= nil)
        ]])))
    assert.matches("^sm %d", shell.run(env .. prefix .. "/bin/sm version"))
end

describe("make install", function()
    it("puts the modules where stock Lua finds them, and they find the rest", function()
        local dir = shell.tmpdir()
        shell.run(("make -s install DESTDIR=%s PREFIX=/usr/local >/dev/null"):format(dir))
        local prefix = dir .. "/usr/local"
        is_usable(prefix)
        for _, name in ipairs { "sm-worker", "sm-net", "init" } do
            shell.run("test -x " .. prefix .. "/libexec/sm/" .. name)
        end
        -- A stranger's tree: nothing of this one is needed.
        assert.equal("", shell.run(("grep -rlF %s %s --include=*.lua || true"):format(shell.quote(root), dir)))
        shell.remove(dir)
    end)

    -- Compiled modules stand in for their sources only while they are known to be the same.
    describe("compiles the modules, and sm", function()
        local dir, source, compiled

        setup(function()
            dir = shell.tmpdir()
            shell.run(("make -s install PREFIX=%s >/dev/null"):format(dir))
            source, compiled = dir .. "/share/lua/5.4/sm/version.lua", dir .. "/libexec/sm/luac/sm/version.luac"
        end)

        teardown(function()
            shell.remove(dir)
        end)

        local function version()
            return shell.run(dir .. "/bin/sm version"):match "^sm (%S+)"
        end

        -- A compiled form that differs from the source, so that one sees which was taken.
        before_each(function()
            shell.write(source, 'return "from-source"')
            shell.write(compiled, string.dump(load('return "compiled"', ("@%s/bin/../share/lua/5.4/sm/version.lua"):format(dir))))
            shell.run(("touch -r %s %s"):format(source, compiled))
        end)

        it("takes one that has its source's name and time", function()
            assert.equal("compiled", version())
        end)

        it("reads the source once it is edited, also if it looks older", function()
            for _, time in ipairs { "2001-01-01", "2101-01-01" } do
                shell.run(("touch -d %s %s"):format(time, source))
                assert.equal("from-source", version())
            end
        end)

        it("reads the source where the other is of another file, broken, or away", function()
            for _, code in ipairs { string.dump(load('return "moved"', "@/elsewhere/version.lua")),
                string.dump(load('return "stripped"'), true), "\27Lua", 'return "text"', "" } do
                shell.write(compiled, code)
                shell.run(("touch -r %s %s"):format(source, compiled))
                assert.equal("from-source", version())
            end
            os.remove(compiled)
            assert.equal("from-source", version())
        end)

        it("takes what the user put before it on the path", function()
            local mine = dir .. "/mine/sm"
            shell.run("mkdir -p " .. mine)
            shell.write(mine .. "/version.lua", 'return "mine"')
            shell.write(dir .. "/x.lua", ([[package.path = "%s/mine/?.lua;" .. package.path; print((require "sm.version"))]]):format(dir))
            assert.equal("mine\n", shell.run(("%s/bin/sm %s/x.lua"):format(dir, dir)))
        end)
    end)

    it("is what the rockspec asks for, by LuaRocks itself, without a network", function()
        local tree = shell.tmpdir()
        shell.run(("luarocks --lua-version 5.4 --tree %s make --deps-mode none sm-scm-1.rockspec >/dev/null 2>&1")
            :format(tree))
        is_usable(tree)
        shell.remove(tree)
    end)
end)
