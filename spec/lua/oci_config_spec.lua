-- SPDX-License-Identifier: Apache-2.0
--
-- The image specification's rules and Docker's habits, one row each.

local oci_config = require "sm.oci_config"
local shell = require "support.shell"

local path = "PATH=" .. oci_config.default_path

local host = { HOSTVAR = "from-host", EMPTY = "" }
local function lookup(name)
    return host[name]
end

-- name, image's config, overrides, what must come out (only the named keys)
local cases = {
    { "Cmd alone", { Cmd = { "sh", "-c", "x" } }, {}, { argv = { "sh", "-c", "x" } } },
    { "Entrypoint alone", { Entrypoint = { "/e" } }, {}, { argv = { "/e" } } },
    { "Entrypoint then Cmd", { Entrypoint = { "/e", "a" }, Cmd = { "b" } }, {},
        { argv = { "/e", "a", "b" } } },
    { "a command replaces Cmd", { Entrypoint = { "/e" }, Cmd = { "b" } }, { cmd = { "c", "d" } },
        { argv = { "/e", "c", "d" } } },
    { "an empty command does not", { Entrypoint = { "/e" }, Cmd = { "b" } }, { cmd = {} },
        { argv = { "/e", "b" } } },
    { "an entrypoint clears Cmd", { Entrypoint = { "/e" }, Cmd = { "b" } }, { entrypoint = "/x" },
        { argv = { "/x" } } },
    { "an entrypoint and a command", { Entrypoint = { "/e" }, Cmd = { "b" } },
        { entrypoint = "/x", cmd = { "c" } }, { argv = { "/x", "c" } } },
    { "an entrypoint string is one word", {}, { entrypoint = "/x y" }, { argv = { "/x y" } } },
    { "an entrypoint list", {}, { entrypoint = { "/x", "y" } }, { argv = { "/x", "y" } } },
    { "an empty entrypoint resets it", { Entrypoint = { "/e" }, Cmd = { "b" } },
        { entrypoint = "", cmd = { "c" } }, { argv = { "c" } } },
    { "empty words are kept", { Cmd = { "echo", "" } }, {}, { argv = { "echo", "" } } },

    { "a default PATH", { Cmd = { "x" } }, {}, { env = { path } } },
    { "the image's PATH wins", { Cmd = { "x" }, Env = { "A=1", "PATH=/p" } }, {},
        { env = { "PATH=/p", "A=1" } } },
    { "overrides win in place", { Cmd = { "x" }, Env = { "A=1", "B=2" } },
        { env = { "A=9", "C=3" } }, { env = { path, "A=9", "B=2", "C=3" } } },
    { "the last of two wins", { Cmd = { "x" } }, { env = { "A=1", "A=2" } },
        { env = { path, "A=2" } } },
    { "a value may hold =", { Cmd = { "x" } }, { env = { "A=b=c" } }, { env = { path, "A=b=c" } } },
    { "an empty value stays", { Cmd = { "x" }, Env = { "A=" } }, {}, { env = { path, "A=" } } },
    { "a name alone takes the host's", { Cmd = { "x" } }, { env = { "HOSTVAR", "EMPTY" } },
        { env = { path, "HOSTVAR=from-host", "EMPTY=" } } },
    { "a name the host lacks is taken away", { Cmd = { "x" }, Env = { "A=1" } }, { env = { "A" } },
        { env = { path } } },
    { "a map of overrides", { Cmd = { "x" }, Env = { "A=1" } },
        { env = { A = false, HOSTVAR = 5, C = "c" } }, { env = { path, "C=c", "HOSTVAR=5" } } },
    { "TERM with a terminal", { Cmd = { "x" } }, { tty = true }, { env = { path, "TERM=xterm" } } },
    { "the image's TERM wins", { Cmd = { "x" }, Env = { "TERM=vt100" } }, { tty = true },
        { env = { path, "TERM=vt100" } } },
    { "HOSTNAME", { Cmd = { "x" } }, { hostname = "box" },
        { env = { path, "HOSTNAME=box" }, hostname = "box" } },
    { "an Env entry without = means nothing", { Cmd = { "x" }, Env = { "HOSTVAR", "=x" } }, {},
        { env = { path } } },

    { "/ by default", { Cmd = { "x" } }, {}, { cwd = "/" } },
    { "WorkingDir", { Cmd = { "x" }, WorkingDir = "/w" }, {}, { cwd = "/w" } },
    { "a relative WorkingDir is below /", { Cmd = { "x" }, WorkingDir = "w" }, {}, { cwd = "/w" } },
    { "an empty WorkingDir", { Cmd = { "x" }, WorkingDir = "" }, {}, { cwd = "/" } },
    { "workdir wins", { Cmd = { "x" }, WorkingDir = "/w" }, { workdir = "/o" }, { cwd = "/o" } },

    { "root by default", { Cmd = { "x" } }, {}, { user = "0" } },
    { "an empty User", { Cmd = { "x" }, User = "" }, {}, { user = "0" } },
    { "User", { Cmd = { "x" }, User = "web:extra" }, {}, { user = "web:extra" } },
    { "user wins", { Cmd = { "x" }, User = "web" }, { user = "1000:5" }, { user = "1000:5" } },

    { "SIGTERM by default", { Cmd = { "x" } }, {}, { stop_signal = 15 } },
    { "StopSignal by name", { Cmd = { "x" }, StopSignal = "SIGQUIT" }, {}, { stop_signal = 3 } },
    { "StopSignal by number", { Cmd = { "x" }, StopSignal = "9" }, {}, { stop_signal = 9 } },
    { "StopSignal real-time", { Cmd = { "x" }, StopSignal = "SIGRTMIN+3" }, {},
        { stop_signal = 37 } },
    { "stop_signal wins", { Cmd = { "x" }, StopSignal = "SIGQUIT" }, { stop_signal = "INT" },
        { stop_signal = 2 } },

    { "volumes and ports, sorted", { Cmd = { "x" }, Volumes = { ["/b"] = {}, ["/a"] = {} },
        ExposedPorts = { ["80/tcp"] = {} } }, {}, { volumes = { "/a", "/b" }, ports = { "80/tcp" } } },
}

-- name, image's config, overrides, what the error says
local refused = {
    { "no command at all", {}, {}, "no command" },
    { "an entrypoint taken away", { Entrypoint = { "/e" }, Cmd = { "b" } }, { entrypoint = "" },
        "no command" },
    { "an empty first word", { Cmd = { "" } }, {}, "first word is empty" },
    { "Cmd as text", { Cmd = "sh" }, {}, "Cmd must be a list" },
    { "Entrypoint with a number", { Entrypoint = { 1 } }, {}, "Entrypoint must be a list" },
    { "Env as an object", { Cmd = { "x" }, Env = { A = "1" } }, {}, "Env must be a list" },
    { "a NUL in Cmd", { Cmd = { "a\0b" } }, {}, "NUL" },
    { "a NUL in Env", { Cmd = { "x" }, Env = { "A=\0" } }, {}, "NUL" },
    { "WorkingDir as a number", { Cmd = { "x" }, WorkingDir = 5 }, {}, "working directory" },
    { "a relative workdir", { Cmd = { "x" } }, { workdir = "w" }, "not an absolute path" },
    { "User as a list", { Cmd = { "x" }, User = {} }, {}, "the user" },
    { "a newline in User", { Cmd = { "x" }, User = "a\nb" }, {}, "the user" },
    { "an unknown signal", { Cmd = { "x" }, StopSignal = "SIGFOO" }, {}, "unknown signal" },
    { "signal 0", { Cmd = { "x" }, StopSignal = "0" }, {}, "unknown signal" },
    { "signal 65", { Cmd = { "x" } }, { stop_signal = 65 }, "unknown signal" },
    { "RTMAX+1", { Cmd = { "x" } }, { stop_signal = "RTMAX+1" }, "unknown signal" },
    { "a nameless variable", { Cmd = { "x" } }, { env = { "=x" } }, "name is missing" },
    { "a bad hostname", { Cmd = { "x" } }, { hostname = "a b" }, "host name" },
    { "a long hostname", { Cmd = { "x" } }, { hostname = ("a"):rep(65) }, "host name" },
}

describe("sm.oci_config.resolve", function()
    for _, case in ipairs(cases) do
        it(case[1], function()
            local over = { lookup = lookup }
            for k, v in pairs(case[3]) do
                over[k] = v
            end
            local out = assert(oci_config.resolve({ config = case[2] }, over))
            for key, want in pairs(case[4]) do
                assert.same(want, out[key])
            end
        end)
    end
    for _, case in ipairs(refused) do
        it("refuses " .. case[1], function()
            local out, err = oci_config.resolve({ config = case[2] }, case[3])
            assert.is_nil(out)
            assert.truthy(err:find(case[4], 1, true), err)
        end)
    end

    it("takes files of variables, below the given ones", function()
        local dir = shell.tmpdir()
        shell.write(dir .. "/a", "A=file\nB=file\nHOSTVAR\n")
        shell.write(dir .. "/b", "B=later\n")
        local out = assert(oci_config.resolve({ config = { Cmd = { "x" }, Env = { "A=image" } } },
            { env_file = { dir .. "/a", dir .. "/b" }, env = { "A=given" }, lookup = lookup }))
        assert.same({ path, "A=given", "B=later", "HOSTVAR=from-host" }, out.env)
        shell.write(dir .. "/a", "A=1\nA B\n")
        local none, err = oci_config.resolve({}, { cmd = { "x" }, env_file = dir .. "/a" })
        assert.is_nil(none)
        assert.equal(("env file %s/a: line 2: white space in the variable's name \"A B\""):format(dir), err)
        none, err = oci_config.resolve({}, { cmd = { "x" }, env_file = dir .. "/none" })
        assert.is_nil(none)
        assert.equal(("env file %s/none: no such file or directory"):format(dir), err)
        shell.remove(dir)
    end)

    it("takes a document without a config", function()
        assert.same({ "x" }, assert(oci_config.resolve({}, { cmd = { "x" } })).argv)
    end)

    it("refuses an unknown override by name", function()
        assert.has_error(function()
            oci_config.resolve({}, { comand = { "x" } })
        end, 'unknown override "comand"')
        assert.error_matches(function()
            oci_config.resolve({}, { workdir = 5 })
        end, "override workdir: expected a string")
    end)

    it("leaves the image's tables alone", function()
        local config = { Entrypoint = { "/e" }, Cmd = { "c" }, Env = { "A=1" } }
        oci_config.resolve({ config = config }, { cmd = { "x" }, env = { "A=2" } })
        assert.same({ Entrypoint = { "/e" }, Cmd = { "c" }, Env = { "A=1" } }, config)
    end)
end)

describe("sm.oci_config.parse_env_file", function()
    it("reads lines as Docker does", function()
        local text = "\xEF\xBB\xBFA=1\n\n# comment\n  B = two words \r\nC=#not a comment\n"
            .. "D=\"quoted\"\nHOSTVAR\nMISSING\nE=\nF=a=b"
        text = text:gsub("B = ", "B= ")
        assert.same({ "A=1", "B= two words ", "C=#not a comment", 'D="quoted"',
            "HOSTVAR=from-host", "E=", "F=a=b" }, assert(oci_config.parse_env_file(text, lookup)))
    end)
    for _, case in ipairs {
        { "A=1\n=x\n", "line 2: the variable's name is missing" },
        { "A B=1\n", "line 1: white space in the variable's name \"A B\"" },
        { "A =1\n", "line 1: white space" },
        { "A=\xff\n", "line 1: not UTF-8" },
        { "A=\0\n", "line 1: not UTF-8" },
    } do
        it(("refuses %q"):format(case[1]), function()
            local list, err = oci_config.parse_env_file(case[1], lookup)
            assert.is_nil(list)
            assert.truthy(err:find(case[2], 1, true), err)
        end)
    end
end)
