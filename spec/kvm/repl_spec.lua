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
        assert.same({}, spec.settled_leftovers())
    end)

    it("stops at a kernel's symbol, looks around, and lets it go on", function()
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
        -- Every vCPU that opens a file stops there; the event comes above the line.
        line "stops = {}"
        line "vm:on_event(function(e) if e.reason == 'breakpoint' then stops[#stops + 1] = e print('at', s:name(e.pc)) end end)"
        line "b = assert(m:add_breakpoint { address = s:find 'do_sys_openat2' })"
        line "t = loop.spawn(function() return vm:exec { argv = { 'cat', '/etc/hostname' } } end)"
        keys "half"
        local text = see "\nat%s+do_sys_openat2\n"
        assert.matches("\n> half\n*$", text) -- the event did not garble the line
        keys "C-u"
        keys "C-l"
        -- Its registers and its memory: do_sys_openat2(dfd, filename, how).
        line "#stops"
        see "\n1\n> "
        line "('%x'):format(m:regs(0).rip) == ('%x'):format(s:find 'do_sys_openat2')"
        see "\ntrue\n> "
        line "inspect.peek(m, s:find 'linux_banner', 13)"
        see '\n"Linux version"\n> '
        line "inspect.virtqueue(vm, 'blk0').size"
        see "\n%d+\n> "
        -- Waiting Lua is interrupted; the guest stays where it is.
        line "loop.sleep(1000)"
        see "sleep%(1000%)\n"
        keys "C-c"
        see "interrupted\n> "
        line "m:remove_breakpoint(b) m:continue(0)"
        line "t:join().status"
        see "\n0\n> "
        line "vm:close() quit(0)"
        see "host> "
    end)
end)
