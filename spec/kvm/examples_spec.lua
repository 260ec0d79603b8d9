-- SPDX-License-Identifier: Apache-2.0
-- The example scripts, each as a user would run it.

local kernel = require "sm.kernel"
local shell = require "support.shell"
local spec = require "support.vm"

local function sm(tail)
    local code, out, err = spec.sm(tail)
    assert.equal(0, code, err .. out)
    return out
end

-- A kernel by the Multiboot Specification: says its magic and its command line
-- on COM1 and resets.
local MULTIBOOT = [[
    .code32
    .section .text
    .align 4
    .long 0x1badb002, 3, -(0x1badb002 + 3)
    .globl _start
_start:
    cmp $0x2badb002, %eax
    jne 2f
    mov 16(%ebx), %esi
    mov $0x3f8, %dx
1:  lodsb
    test %al, %al
    jz 2f
    out %al, %dx
    jmp 1b
2:  mov $0x602, %dx
    mov $1, %al
    out %al, %dx
    hlt
]]

describe("scripts/examples", function()
    it("bare-metal.lua prints from sixteen-bit code", function()
        assert.equal("hello from ring 0\nthe guest ended: reboot\n", sm "scripts/examples/bare-metal.lua")
    end)

    it("fleet.lua asks many VMs at once", function()
        assert.equal("8 VMs, 8 right answers\n", sm "scripts/examples/fleet.lua 8")
    end)

    it("multiboot.lua loads and enters a kernel", function()
        local dir = shell.tmpdir()
        shell.write(dir .. "/k.S", MULTIBOOT)
        shell.run { "gcc", "-m32", "-c", "-o", dir .. "/k.o", dir .. "/k.S" }
        shell.run { "ld", "-m", "elf_i386", "-Ttext=0x100000", "-o", dir .. "/kernel", dir .. "/k.o" }
        assert.equal("hello multiboot\nthe kernel ended: reboot\n",
            sm(("scripts/examples/multiboot.lua %s/kernel 'hello multiboot\n'"):format(dir)))
        shell.remove(dir)
    end)

    it("linux.lua boots a kernel with primitives alone", function()
        local out = sm(("scripts/examples/linux.lua %s"):format(assert(kernel.find()).path))
        assert.matches("Linux version", out)
        assert.matches("Unable to mount root fs", out)
        assert.matches("the machine ended: %a+, after %d+ exits", out)
    end)

    it("uart.lua is driven by the 8250 driver of an unmodified Linux", function()
        local out = sm(("scripts/examples/uart.lua %s"):format(assert(kernel.find()).path))
        assert.matches("Unable to mount root fs", out)
        assert.matches("the machine ended: %a+; Lua answered %d+ accesses, the guest sent %d+ bytes", out)
    end)

    it("best-of-ten.lua keeps the best of ten copies", function()
        assert.equal("copy 3 is the best: 10\n", sm(("scripts/examples/best-of-ten.lua %s"):format(spec.image "one")))
    end)

    it("faults.lua makes a guest's writes fail", function()
        local out = sm(("scripts/examples/faults.lua %s 7"):format(spec.image "one"))
        local hits = tonumber(out:match "seed 7: (%d+) of %d+ writes failed")
        assert.is_true(hits >= 1, out)
        assert.is_true(out:find ": failed\n" ~= nil or out:find "read%-only now" ~= nil, out)
    end)
end)
