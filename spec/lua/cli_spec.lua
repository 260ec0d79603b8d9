-- SPDX-License-Identifier: Apache-2.0
--
-- The command line from outside: ./sm as a process, no VM.

local function sh(command)
    local out = os.tmpname()
    local err = os.tmpname()
    local _, _, code = os.execute(("%s >%s 2>%s </dev/null"):format(command, out, err))
    local function slurp(path)
        local f = assert(io.open(path, "rb"))
        local text = f:read("a")
        f:close()
        os.remove(path)
        return text
    end
    return code, slurp(out), slurp(err)
end

local function write(text)
    local path = os.tmpname() .. ".lua"
    local f = assert(io.open(path, "w"))
    f:write(text)
    f:close()
    return path
end

describe("sm, the command line", function()
    it("prints its version and its help", function()
        local code, out = sh "./sm version"
        assert.equal(0, code)
        assert.matches("^sm %d+%.%d+%.%d+\n$", out)
        code, out = sh "./sm --help"
        assert.equal(0, code)
        for _, c in ipairs { "run", "pull", "images", "rmi", "doctor", "version" } do
            assert.matches("\n  " .. c .. " ", out)
            local c_code, c_out = sh("./sm " .. c .. " --help")
            assert.equal(0, c_code, c)
            assert.matches("^usage: sm " .. c, c_out)
        end
    end)

    it("tells what it did not understand, in one line, with 125", function()
        local code, out, err = sh "./sm rum"
        assert.equal(125, code)
        assert.equal("", out)
        assert.matches("unknown command 'rum' %(did you mean 'run'%?%)", err)
        code, _, err = sh "./sm run --memroy 1 image"
        assert.equal(125, code)
        assert.matches("unknown flag %-%-memroy %(did you mean %-%-memory%?%)", err)
        code, _, err = sh "./sm run"
        assert.equal(125, code)
        assert.matches("needs an image", err)
        code, _, err = sh "./sm version now"
        assert.equal(125, code)
        assert.matches("too many arguments: 'now'", err)
    end)

    it("says in one line what is wrong with a pool or a snapshot", function()
        for command, words in pairs {
            ["pool"] = "needs start, run, ls, stats or stop",
            ["pool begin x"] = "no such action: 'begin'",
            ["pool start x"] = "needs a name and an image",
            ["pool start ../x nowhere"] = "name: expected letters",
            ["pool run x"] = "needs the name of a pool and a command",
            ["pool run nowhere true"] = "no pool named 'nowhere'",
            ["pool stats nowhere"] = "no pool named 'nowhere'",
            ["snapshot flatten"] = "needs a name",
            ["snapshot melt x"] = "no such action: 'melt'",
        } do
            local code, out, err = sh("./sm " .. command)
            assert.equal(125, code, command)
            assert.equal("", out)
            assert.matches(words, err)
            assert.matches("^sm: [^\n]+\n", err)
        end
    end)

    it("refuses absurd machines before it fetches anything", function()
        for _, case in ipairs {
            { "--memory 1000000G", "more than" },
            { "--memory 1M", "too little" },
            { "--cpus 0", "expected 1 to" },
            { "--cpus 1000", "expected 1 to" },
            { "--name a/b", "name: expected" },
            { "--pull sometimes", "expected missing, always or never" },
            { "-t", "wants a terminal" },
        } do
            local code, out, err = sh("./sm run " .. case[1] .. " 127.0.0.1:1/none")
            assert.equal(125, code, case[1])
            assert.equal("", out)
            assert.truthy(err:find(case[2], 1, true), err)
            assert.matches("^sm: [^\n]+\n", err)
        end
    end)

    it("runs a script with arg set and its exit code kept", function()
        local path = write [[
            assert(arg[0]:match("%.lua$"))
            local a, b = ...
            print(a, b, #arg, require("sm").version ~= nil)
            os.exit(3)
        ]]
        local code, out = sh("./sm " .. path .. " one two")
        os.remove(path)
        assert.equal(3, code)
        assert.equal("one\ttwo\t2\ttrue\n", out)
    end)

    it("shows a script's error with its own lines", function()
        local path = write "local function f()\n  error('oops')\nend\nf()\n"
        local code, _, err = sh("./sm " .. path)
        os.remove(path)
        assert.equal(1, code)
        assert.matches(":2: oops", err)
        assert.matches(":4: in ", err)
    end)

    it("waits for a script's tasks before it ends", function()
        local path = write [[
            local loop = require "sm.loop"
            loop.spawn(function() loop.sleep(0.01) print "late" end)
            print "early"
        ]]
        local code, out = sh("./sm " .. path)
        os.remove(path)
        assert.equal(0, code)
        assert.equal("early\nlate\n", out)
    end)
end)
