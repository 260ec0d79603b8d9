-- SPDX-License-Identifier: Apache-2.0
--
-- `sm run -it` in a real terminal: tmux plays the user.

local shell = require "support.shell"
local spec = require "support.vm"
local terminal = require "support.terminal"

local uv = require "luv"

local name = "tty" .. uv.os_getpid()
local saved = os.getenv "XDG_RUNTIME_DIR" .. "/" .. name

describe("sm run -it", function()
    local tty
    local function keys(...)
        tty:keys(...)
    end
    local function see(pattern)
        return tty:see(pattern)
    end

    -- A shell of the user's; what runs in it comes and goes.
    before_each(function()
        tty = terminal.open(91, 27)
        keys("stty -g > " .. saved .. ".before; clear", "Enter")
        see "host> "
    end)

    after_each(function()
        tty:close()
        os.remove(saved .. ".before")
        os.remove(saved .. ".after")
    end)

    -- What a killed sm leaves, the next one has swept.
    teardown(function()
        assert.same({}, spec.settled_leftovers())
    end)

    local function run()
        keys(("clear; ./sm run -q -it --name %s %s sh"):format(name, spec.image "one"), "Enter")
        see "/data # "
    end

    -- `stty -g` has everything but the size.
    local function slurp(which)
        return shell.run { "cat", saved .. "." .. which }
    end

    local function is_restored()
        keys("clear; stty -g > " .. saved .. ".after; echo done", "Enter")
        see "\ndone"
        assert.equal(slurp "before", slurp "after")
    end

    it("is a terminal with line editing, a size that follows, and signals", function()
        run()
        keys("stty size", "Enter")
        see "\n27 91"
        keys("echo abx", "BSpace", "c", "Enter")
        see "\nabc"
        tty:tmux("resize-window", "-t", "s", "-x", "77", "-y", "33")
        keys("clear; stty size", "Enter")
        see "33 77"
        keys("sleep 1000", "Enter")
        see "sleep 1000"
        keys "C-c"
        keys("echo code $?", "Enter")
        see "\ncode 130"
        keys "C-d"
        see "host> "
        is_restored()
    end)

    it("gives the terminal back when sm is killed", function()
        run()
        os.execute(("pkill -9 -f '[n]ame %s'"):format(name))
        see "host> "
        is_restored()
    end)

    it("gives the terminal back when the guest crashes", function()
        run()
        keys("echo c > /proc/sysrq-trigger", "Enter")
        see "host> "
        is_restored()
    end)
end)
