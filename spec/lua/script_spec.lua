-- SPDX-License-Identifier: Apache-2.0
--
-- `sm script.lua`, as a process: what the stock interpreter's users expect.

local shell = require "support.shell"

describe("sm as an interpreter", function()
    local dir

    setup(function()
        dir = shell.tmpdir()
    end)

    teardown(function()
        shell.remove(dir)
    end)

    local function sm(tail, stdin)
        shell.write(dir .. "/stdin", stdin or "")
        local _, _, code = os.execute(("./sm %s >%s/out 2>%s/err <%s/stdin"):format(tail, dir, dir, dir))
        return code, shell.read(dir .. "/out"), shell.read(dir .. "/err")
    end

    local function script(text)
        shell.write(dir .. "/script", text)
        return dir .. "/script"
    end

    it("runs a file that says #!, with arg and the varargs set", function()
        local root = shell.run "pwd":gsub("\n", "")
        local path = script("#!" .. root .. "/sm\nprint(arg[0] == '" .. dir .. "/script', arg[1], #arg, ...)\n")
        shell.run { "chmod", "+x", path }
        assert.equal("true\tone\t2\tone\ttwo words\n", shell.run { path, "one", "two words" })
        local code, out = sm(path .. " one two")
        assert.equal(0, code)
        assert.equal("true\tone\t2\tone\ttwo\n", out)
    end)

    it("has arg[-1] and before, as lua has", function()
        local code, out = sm("-e 'x = 1' " .. script "print(arg[-1], arg[-2], arg[-3]:match('sm$'))")
        assert.equal(0, code)
        assert.equal("x = 1\t-e\tsm\n", out)
    end)

    it("takes -e and -l in order, joined or not, and - for standard input", function()
        local code, out = sm("-e 'a = 1' -e'a = a + 1' -l sm -l c=sm.loop -e 'print(a, sm.version ~= nil, c == sm.loop)'")
        assert.equal(0, code)
        assert.equal("2\ttrue\ttrue\n", out)
        code, out = sm("- x y", "#! first line\nprint(arg[0], ...)\n")
        assert.equal(0, code)
        assert.equal("-\tx\ty\n", out)
    end)

    it("shows an error with the script's lines and none of its own", function()
        local path = script "local function f()\n  error('oops')\nend\nlocal function g()\n  f()\nend\ng()\n"
        local code, out, err = sm(path)
        assert.equal(1, code)
        assert.equal("", out)
        assert.matches("^sm: [^\n]*script:2: oops\nstack traceback:\n", err)
        assert.matches("script:5: in ", err)
        assert.matches("script:7: in main chunk", err)
        assert.is_nil(err:find("sm/loop.lua", 1, true), err)
        assert.is_nil(err:find("sm/script.lua", 1, true), err)
    end)

    it("shows an error in a task the same way, and one of syntax in one line", function()
        local code, _, err = sm(script [[
            local loop = require "sm.loop"
            loop.spawn(function()
                loop.sleep(0.001)
                local x = nil
                x.y = 1
            end)
        ]])
        assert.equal(1, code)
        assert.matches("script:5: attempt to index a nil value", err)
        assert.is_nil(err:find("sm/script.lua", 1, true), err)
        code, _, err = sm(script "x = = 1")
        assert.equal(1, code)
        assert.matches("^sm: [^\n]*script:1: unexpected symbol[^\n]*\n$", err)
        code, _, err = sm "-e 'error {}'"
        assert.equal(1, code)
        assert.matches("error object is a table value", err)
        code, _, err = sm [[-e 'error(setmetatable({}, { __tostring = function() return "mine" end }))']]
        assert.equal(1, code)
        assert.equal("sm: mine\n", err)
        assert.equal(1, (sm "-e"))
        assert.equal(1, (sm "-l no-such-module"))
        assert.equal(1, (sm "-e 1 --odd"))
    end)

    it("lets the script choose its exit code, from a task too", function()
        assert.equal(3, (sm "-e 'os.exit(3)'"))
        assert.equal(0, (sm "-e 'os.exit(true)'"))
        assert.equal(1, (sm "-e 'os.exit(false)'"))
        assert.equal(7, (sm(script [[
            local loop = require "sm.loop"
            loop.spawn(function() loop.sleep(0.001) os.exit(7, true) end)
        ]])))
    end)

    it("runs the loop until nothing is left", function()
        local code, out = sm(script [[
            local loop = require "sm.loop"
            loop.spawn(function()
                loop.sleep(0.01)
                print "later"
                loop.spawn(function() loop.sleep(0.01) print "last" end)
            end)
            print "first"
        ]])
        assert.equal(0, code)
        assert.equal("first\nlater\nlast\n", out)
    end)
end)
