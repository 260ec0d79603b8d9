-- SPDX-License-Identifier: Apache-2.0
--
-- The REPL, in a real terminal, at work on a real guest: what a person does who
-- wants to know what a kernel is at.

local kernel = require "sm.kernel"
local spec = require "support.vm"
local terminal = require "support.terminal"

describe("the REPL on a running guest", function()
    local tty
    local function keys(...)
        tty:keys(...)
    end
    local function line(text)
        tty:tmux("send-keys", "-t", "s", "-l", text)
        keys "Enter"
    end
    local function see(pattern)
        return tty:see(pattern, 120)
    end

    after_each(function()
        tty:close()
    end)

    it("holds it, says where it is by the kernel's symbols, steps, looks around, lets it go on", function()
        local own = kernel.find "own"
        assert(own, "our kernel, whose symbols are known, is not there")
        tty = terminal.open(110, 50)
        line "./sm"
        see "help%(%) tells more%.\n>"
        line(("vm = assert(sm.start(%q, { kernel = 'own', memory = '160M', boot_timeout = 600 }))"):format(spec.image "one"))
        see "600 }%)%)\n> "
        line(("m = vm:machine() s = assert(symbols.load(%q))"):format(own.path))
        see "vmlinux\"%)%)\n> "
        keys "C-l"
        -- Where it is, by name; it is held there.
        line "m:hold(0)"
        see "\ntrue\n> "
        line "s:name(m:regs(0).rip)"
        see '\n"[%a_][%w_.]*%+?%w*"\n> '
        -- One instruction further, told above the line that is being typed. (A
        -- breakpoint would be told likewise; nested emulation has none, as
        -- control_spec finds out.)
        line "vm:on_event(function(e) print('now at', e.reason, s:name(e.pc)) end)"
        see "\nnil\n> "
        line "loop.spawn(function() loop.sleep(3) m:step(0) end) and nil"
        keys "half a li"
        local text = see "\nnow at%s+step%s+[%a_]"
        assert.matches("\n> half a li\n*$", text)
        keys "C-u"
        -- Its memory by its own names, and a device's queue.
        line "inspect.peek(m, s:find 'linux_banner', 13)"
        see '\n"Linux version"\n> '
        line "inspect.virtqueue(vm, 'blk0').size"
        see "\n%d+\n> "
        -- Waiting Lua is interrupted; the guest stays where it is.
        line "loop.sleep(1000)"
        see "sleep%(1000%)\n"
        keys "C-c"
        see "interrupted\n> "
        line "m:continue(0)"
        line "vm:exec { argv = { 'cat', '/etc/hostname' } }.status"
        see "\n0\n> "
        line "vm:close() quit(0)"
        see "host> "
        assert.same({}, spec.settled_leftovers())
    end)
end)
