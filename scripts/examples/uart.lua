-- SPDX-License-Identifier: Apache-2.0
-- A device in a page: a 16550A serial port written in Lua, which the 8250
-- driver of an unmodified Linux probes, sets up and prints through.
--
--   sm scripts/examples/uart.lua [KERNEL [INITRD [CMDLINE]]]

local core = require "sm.core"

local kernel, initrd, cmdline = ...
kernel = kernel or assert(require("sm.kernel").find()).path

local vm <close> = assert(core.vm { memory = "128M" })
local IRQ = vm:line(4)

-- Registers by offset, as in the PC16550D data sheet, table II.
local uart = { ier = 0, lcr = 0, mcr = 0, scr = 0, fcr = 0, divisor = 0, thr_pending = false }
local THR_EMPTY, LINE_IDLE = 0x20, 0x40
local output = {}

function uart.divisor_latch()
    return uart.lcr & 0x80 ~= 0
end

-- The transmitter is always empty: its interrupt comes as soon as it is wanted.
function uart.update_irq()
    if uart.thr_pending and uart.ier & 2 ~= 0 and uart.mcr & 8 ~= 0 then
        assert(IRQ:set())
    end
end

function uart.transmit(byte)
    if uart.mcr & 0x10 == 0 then -- not in loopback
        output[#output + 1] = string.char(byte)
        io.write(output[#output])
    end
    uart.thr_pending = true
    uart.update_irq()
end

local function read(offset)
    if offset == 0 then
        return uart.divisor_latch() and uart.divisor & 0xff or 0
    elseif offset == 1 then
        return uart.divisor_latch() and uart.divisor >> 8 or uart.ier
    elseif offset == 2 then -- IIR: reading it takes the interrupt back
        local fifo = uart.fcr & 1 ~= 0 and 0xc0 or 0
        if uart.thr_pending and uart.ier & 2 ~= 0 then
            uart.thr_pending = false
            return fifo | 2
        end
        return fifo | 1
    elseif offset == 3 then
        return uart.lcr
    elseif offset == 4 then
        return uart.mcr
    elseif offset == 5 then
        return THR_EMPTY | LINE_IDLE
    elseif offset == 6 then -- MSR; in loopback it mirrors MCR
        local m = uart.mcr
        return m & 0x10 ~= 0 and ((m & 1) << 5 | (m & 2) << 3 | (m & 12) << 4) or 0xb0
    end
    return uart.scr
end

local function write(offset, value)
    if offset == 0 then
        if uart.divisor_latch() then
            uart.divisor = uart.divisor & 0xff00 | value
        else
            uart.transmit(value)
        end
    elseif offset == 1 then
        if uart.divisor_latch() then
            uart.divisor = uart.divisor & 0xff | value << 8
        else
            uart.ier, uart.thr_pending = value & 15, true
            uart.update_irq()
        end
    elseif offset == 2 then
        uart.fcr = value
    elseif offset == 3 then
        uart.lcr = value
    elseif offset == 4 then
        uart.mcr = value & 31
    elseif offset == 7 then
        uart.scr = value
    end
end

io.stdout:setvbuf "line"
assert(vm:device { space = "pio", base = 0x3f8, size = 8, read = read, write = write })
assert(vm:load_kernel {
    kernel = kernel, initrd = initrd,
    cmdline = cmdline or "console=ttyS0 panic=-1 reboot=a quiet",
})
assert(vm:start())
local ending
repeat
    local event = assert(vm:next_event(600))
    if event.type == "device" then
        error("the device died: " .. event.error)
    end
    ending = event.state == "stopped" and event
until ending
print(("the machine ended: %s; Lua answered %d accesses, the guest sent %d bytes"):format(
    ending.reason, vm:stats().vcpus[1].parked, #output))
