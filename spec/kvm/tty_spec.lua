-- SPDX-License-Identifier: Apache-2.0
--
-- `sm run -it` in a real terminal: tmux plays the user.

local shell = require "support.shell"
local spec = require "support.vm"

local loop = require "sm.loop"
local uv = require "luv"

-- Its socket lies on a file system of this kernel: /tmp is another's in the lab.
uv.os_setenv("TMUX_TMPDIR", os.getenv "XDG_RUNTIME_DIR")

local name = "tty" .. uv.os_getpid()
local saved = os.getenv "XDG_RUNTIME_DIR" .. "/" .. name

local server = 0 -- one for each spec: the last one may still be on its way out

local function tmux(...)
    return shell.run { "tmux", "-L", name .. "-" .. server, "-f", "/dev/null", ... }
end

-- Each line begins with a line break and keeps the spaces at its end: a prompt
-- ends in one.
local function screen()
    return "\n" .. tmux("capture-pane", "-p", "-N", "-t", "s")
end

local function keys(...)
    tmux("send-keys", "-t", "s", ...)
end

-- Look until the screen shows the pattern; a pane has no event to wait for.
local function see(pattern, seconds)
    local limit = loop.now() + (seconds or 120)
    while true do
        local text = screen()
        if text:find(pattern) then
            return text
        end
        assert(loop.now() < limit, "the screen never showed " .. pattern .. ":\n" .. text)
        loop.sleep(0.2)
    end
end

describe("sm run -it", function()
    -- A shell of the user's; what runs in it comes and goes.
    before_each(function()
        server = server + 1
        tmux("new-session", "-d", "-s", "s", "-x", "91", "-y", "27", "bash --norc")
        keys("PS1='host> '; stty -g > " .. saved .. ".before; clear", "Enter")
        see "host> "
    end)

    after_each(function()
        pcall(tmux, "kill-server")
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
        tmux("resize-window", "-t", "s", "-x", "77", "-y", "33")
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
