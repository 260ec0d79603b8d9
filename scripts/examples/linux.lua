-- SPDX-License-Identifier: Apache-2.0
-- A Linux boot written with primitives alone: memory, a serial port, a kernel,
-- and a loop over events. No image, no agent; the kernel's console comes out.
--
--   sm scripts/examples/linux.lua [KERNEL [INITRD [CMDLINE]]]

local core = require "sm.core"

local kernel, initrd, cmdline = ...
if not kernel then
    kernel = assert(require("sm.kernel").find()).path
end

local vm <close> = assert(core.vm { cpus = 1, memory = "128M" })
assert(vm:add_device { type = "serial" })
assert(vm:add_device { type = "rng" })
assert(vm:load_kernel {
    kernel = kernel,
    initrd = initrd,
    -- panic=-1: reboot at once, which ends the machine
    cmdline = cmdline or "console=ttyS0 panic=-1 reboot=a",
})
assert(vm:start())

local ending
repeat
    local event = assert(vm:next_event(600))
    if event.type == "console" then
        io.write(vm:read_console())
    elseif event.state == "stopped" then
        ending = event
    end
until ending
io.write(vm:read_console())
local exits = 0
for _, cpu in ipairs(vm:stats().vcpus) do
    exits = exits + cpu.exits
end
print(("the machine ended: %s, after %d exits"):format(ending.reason, exits))
