-- SPDX-License-Identifier: Apache-2.0
--
-- The REPL: its parts with strings, and as a whole in a real terminal, where
-- tmux plays the user and the machines are the fake backend's.

local lineedit = require "sm.lineedit"
local repl = require "sm.repl"
local shell = require "support.shell"
local show = require "sm.show"
local symbols = require "sm.symbols"
local terminal = require "support.terminal"

describe("the line editor", function()
    local written, editor
    before_each(function()
        written = {}
        editor = lineedit.new {
            write = function(text) written[#written + 1] = text end,
            history = { "first", "second" },
            complete = function(text)
                local all = { "print(", "printf(", "pairs(" }
                local list, word = {}, text:match "%w*$"
                for _, item in ipairs(all) do
                    list[#list + 1] = item:sub(1, #word) == word and item or nil
                end
                return list, #text - #word + 1
            end,
        }
        editor:begin "> "
    end)

    local cases = {
        { "helo\27[Dl\r", "hello", "inserts where the cursor is" },
        { "ab\1x\5y\r", "xaby", "goes to both ends" },
        { "one two\23three\r", "one three", "kills a word" },
        { "abc\21def\25\r", "defabc", "kills a line and yanks it" },
        { "abc\1\11x\r", "x", "kills to the end" },
        { "äöü\127\1\27[3~\r", "ö", "deletes characters, not bytes" },
        { "\27[A\r", "second", "recalls the last line" },
        { "draft\27[A\27[A\27[B\27[B\r", "draft", "comes back from history" },
        { "fir\18\r", "first", "searches history" },
        { "pri\t1)\r", "print1)", "completes what candidates share" },
        { "pa\t)\r", "pairs()", "completes the only candidate" },
        { "a\27[99;99Zb\0\r", "ab", "ignores keys it does not know" },
    }
    for _, case in ipairs(cases) do
        it(case[3], function()
            assert.same({ "line", case[2] }, { editor:feed(case[1]) })
        end)
        it(case[3] .. ", a byte at a time", function()
            for i = 1, #case[1] - 1 do
                assert.is_nil(editor:feed(case[1]:sub(i, i)))
            end
            assert.same({ "line", case[2] }, { editor:feed "\r" })
        end)
    end

    it("tells of ^C and ^D, and gives lines one by one", function()
        assert.equal("interrupt", editor:feed "abc\3")
        editor:begin "> "
        assert.equal("end", editor:feed "\4")
        editor:begin "> "
        assert.same({ "line", "a" }, { editor:feed "a\rb\r" })
        editor:begin "> "
        assert.same({ "line", "b" }, { editor:feed "" })
    end)

    it("keeps the cursor of a long line in view", function()
        editor.columns = 20
        editor:feed(("x"):rep(100) .. "END")
        local last = written[#written]
        assert.matches("END", last)
        assert.is_true(#last:gsub("\27%[[%d]*%a", ""):gsub("\r", "") <= 20)
    end)
end)

describe("what is printed", function()
    it("is readable", function()
        assert.equal('"a\\n\\"b\\""', show.value 'a\n"b"')
        assert.equal('"\\xff\\x00"', show.value "\255\0")
        assert.equal("1048576 (0x100000)", show.value(1 << 20))
        assert.equal('{ 1, 2, name = "x", ["odd key"] = true }', show.value { 1, 2, name = "x", ["odd key"] = true })
        local cycle = {}
        cycle.self = cycle
        assert.equal("{ self = {...} }", show.value(cycle))
        local long = {}
        for i = 1, 1000 do
            long[i] = i
        end
        assert.is_true(#show.value(long) < 1000)
        assert.matches("%.%.%.", show.value(long))
    end)
end)

describe("completion", function()
    local env = setmetatable({ thing = { alpha = 1, beta = print, nested = { deep = 1 } } }, { __index = _G })
    local function names(text)
        return (repl.complete(env, text))
    end
    it("knows globals, fields, methods and keywords", function()
        assert.same({ "thing" }, names "thi")
        assert.same({ "alpha", "beta(", "nested" }, names "x = thing.")
        assert.same({ "beta(" }, names "thing:")
        assert.same({ "deep" }, names "f(thing.nested.")
        assert.same({ "string" }, names "stri")
        assert.same({ "while" }, names "whi")
        assert.same({}, names "nothing.at.all.")
        local file <close> = assert(io.open "/dev/null")
        env.file = file
        assert.same({ "seek(", "setvbuf(" }, names "file:se")
    end)
end)

describe("a kernel's names", function()
    it("come from a System.map", function()
        local path = os.tmpname()
        shell.write(path, "ffffffff81000000 T _text\nffffffff81000040 t secondary\nffffffff82000000 D jiffies\n")
        local s = assert(symbols.load(path))
        assert.equal(0xffffffff81000040, s:find "secondary")
        assert.equal("secondary+0x10", s:name(0xffffffff81000050))
        assert.equal("_text", s:name(0xffffffff81000000))
        assert.is_nil(s:name(5))
        shell.write(path, "not a map\n")
        assert.same({ nil, path .. ": neither an ELF file nor a System.map" }, { symbols.load(path) })
        os.remove(path)
    end)

    it("come from an ELF file's table", function()
        local source, path = os.tmpname() .. ".c", os.tmpname()
        shell.write(source, "int some_variable = 1; int some_function(void) { return some_variable; }\n")
        shell.run { "gcc", "-c", "-o", path, source }
        local s = assert(symbols.load(path))
        assert.equal(0, s:find "some_function")
        shell.write(path, "\127ELF" .. ("\2\1"):rep(40))
        assert.is_nil(symbols.load(path))
        os.remove(path)
        os.remove(source)
    end)
end)

describe("the REPL in a terminal", function()
    local dir, tty
    local function keys(...)
        tty:keys(...)
    end
    local function see(pattern)
        return tty:see(pattern, 20)
    end

    local function begin()
        keys("clear; XDG_STATE_HOME=" .. dir .. " lua5.4 " .. dir .. "/start.lua; echo ended $?", "Enter")
        see "help%(%) tells more%.\n>"
    end

    before_each(function()
        dir = shell.tmpdir()
        local here = assert(require("luv").cwd())
        shell.write(dir .. "/start.lua", ([[
            package.path = %q .. "/lua/?.lua;" .. package.path
            package.cpath = %q .. "/build/fake/?.so;" .. package.cpath
            os.exit(require("sm.repl").run(), true)
        ]]):format(here, here))
        tty = terminal.open(100, 40)
        begin()
    end)

    after_each(function()
        if tty then
            tty:close()
            tty = nil
        end
        shell.remove(dir)
    end)

    it("runs lines, completes names, and takes lines that go on", function()
        keys("1 + 1", "Enter")
        see "\n> 1 %+ 1\n2\n>"
        keys("x = { a = 1 }", "Enter")
        keys("x", "Enter")
        see "\n> x\n{ a = 1 }\n>"
        keys("for i = 1, 2 do", "Enter")
        see "\n>>"
        keys("print('row', i) end", "Enter")
        see "\nrow\t? *1\nrow\t? *2\n>"
        keys("#core.comm", "Tab", ") > 20", "Enter")
        see "> #core%.commands%(%) > 20\ntrue\n>"
        keys("error 'oh no'", "Enter")
        see "oh no"
        keys("x = = 1", "Enter")
        see "unexpected symbol near '='"
        keys("help(worker.methods.read)", "Enter")
        see "Bytes of guest memory"
    end)

    it("keeps its history", function()
        keys("first_line = 1", "Enter")
        keys("quit(7)", "Enter")
        see "\nended 7\nhost>"
        begin()
        keys("Up", "Up")
        see "\n> first_line = 1\n*$"
        keys("C-c", "C-d")
        see "\nended 0\nhost>"
    end)

    it("interrupts Lua, waiting or not, and no machine", function()
        keys("m = core.vm { memory = '1M' } m:write(0x1000, '\\xeb\\xfe') m:enter(0, 'real16', 0x1000) m:start()", "Enter")
        see "m:start%(%)\n>"
        keys("while true do end", "Enter")
        see "true do end\n"
        keys("C-c")
        see "interrupted\n>"
        keys("C-l")
        keys("loop.sleep(1000)", "Enter")
        see "sleep%(1000%)\n"
        keys("C-c")
        see "interrupted\n>"
        keys("m:state().state", "Enter")
        see '"running"\n>'
    end)

    it("shows a machine's events above the line that is typed", function()
        keys("m = core.vm { memory = '1M' } m:add_device { type = 'serial' }", "Enter")
        see "'serial' }\n>"
        keys("on_event(m) and nil", "Enter")
        -- in al,dx of a port that Lua answers when we say so; then prints
        keys("m:write(0x1000, '\\xba\\x00\\x07\\xec\\xba\\xf8\\x03\\xb0A\\xee\\xeb\\xfe') m:enter(0, 'real16', 0x1000)", "Enter")
        keys("gate = m:claim { space = 'pio', base = 0x700, size = 1 } m:start()", "Enter")
        see 'reason = "pio"'
        keys("C-l")
        keys("loop.spawn(function() loop.sleep(1.5) m:answer(0, 1) end) and nil", "Enter")
        keys("half a li")
        local text = see 'type = "console"'
        assert.matches("\n> half a li\n*$", text)
        keys("ne", "C-u")
        keys("m:read_console()", "Enter")
        see '\n"A"\n>'
    end)
end)
