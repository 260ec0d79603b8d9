-- SPDX-License-Identifier: Apache-2.0
local args = require "sm.cli.args"

local FLAGS = {
    { "interactive", "i", nil, "" },
    { "tty", "t", nil, "" },
    { "memory", "m", "SIZE", "", kind = "size" },
    { "cpus", nil, "N", "", kind = "integer" },
    { "env", "e", "K=V", "", kind = "list" },
    { "read-only", nil, nil, "" },
    { "timeout", nil, "TIME", "", kind = "seconds" },
    { "publish", "p", "P", "", kind = "list", absent = "no network yet" },
}

local function parse(line)
    local argv = {}
    for word in line:gmatch("%S+") do
        argv[#argv + 1] = word
    end
    return args.parse(FLAGS, argv, 1)
end

describe("sm.cli.args", function()
    it("reads sizes and times as people write them", function()
        assert.equal(512 << 20, args.size "512M")
        assert.equal(512 << 20, args.size "512m")
        assert.equal(2 << 30, args.size "2GiB")
        assert.equal(3 << 29, args.size "1.5g")
        assert.equal(4096, args.size "4096")
        for _, bad in ipairs { "", "x", "-1", "1 2", "12Q", "99999999999T" } do
            local n, err = args.size(bad)
            assert.is_nil(n, bad)
            assert.is_string(err)
        end
        assert.equal(0.5, args.seconds "500ms")
        assert.equal(120, args.seconds "2m")
        assert.equal(1.5, args.seconds "1.5")
        assert.is_nil((args.seconds "soon"))
    end)

    it("joins short flags, with a value at the end", function()
        local o, rest = parse "-it -m512M image sh -c ls"
        assert.same({ interactive = true, tty = true, memory = 512 << 20 }, o)
        assert.same({ "image", "sh", "-c", "ls" }, rest)
        assert.same({ memory = 1 << 20 }, (parse "-m 1M x"))
        assert.same({ memory = 1 << 20 }, (parse "-m=1M x"))
        assert.same({ memory = 1 << 20 }, (parse "--memory=1M x"))
    end)

    it("takes flags before and after a verb", function()
        local o, rest = args.parse(FLAGS, { "-i", "start", "--cpus", "2", "name", "-t" }, 1, true)
        assert.same({ interactive = true, cpus = 2 }, o)
        assert.same({ "start", "name", "-t" }, rest)
        o, rest = args.parse(FLAGS, { "start", "--", "-t" }, 1, true)
        assert.same({}, o)
        assert.same({ "start", "-t" }, rest)
    end)

    it("leaves what follows the first word to the command", function()
        local _, rest = parse "--read-only image --cpus 3"
        assert.same({ "image", "--cpus", "3" }, rest)
        _, rest = parse "-- --cpus"
        assert.same({ "--cpus" }, rest)
    end)

    it("collects lists, and lets the last of the others win", function()
        assert.same({ env = { "A=1", "B=2" }, cpus = 4 }, (parse "-e A=1 --cpus 2 --env=B=2 --cpus 4"))
    end)

    it("says what is wrong in one line", function()
        local function err(line)
            local o, e = parse(line)
            assert.is_nil(o, line)
            assert.is_nil(e:find("\n"), e)
            return e
        end
        assert.equal("unknown flag --memroy (did you mean --memory?)", err "--memroy 1")
        assert.equal("unknown flag -x", err "-x")
        assert.equal("unknown flag -x", err "-ix")
        assert.equal("--cpus needs a value: --cpus N", err "--cpus")
        assert.equal("--cpus: 'two' is not a whole number", err "--cpus two")
        assert.equal("--read-only takes no value", err "--read-only=maybe")
        assert.equal("--publish: no network yet", err "-p 80:80")
    end)

    it("lists every flag in the help", function()
        local text = args.help("sm x", "about", FLAGS)
        for _, f in ipairs(FLAGS) do
            assert.truthy(text:find("--" .. f[1], 1, true), f[1])
        end
    end)
end)
