-- SPDX-License-Identifier: Apache-2.0
--
-- The boot that spec/bench/boot measures: a worker, one serial port, a kernel
-- and an initramfs; the console goes to stdout, and the end is the guest's.
--
--   sm spec/bench/boot.lua KERNEL INITRD CMDLINE

local worker = require "sm.worker"

local kernel, initrd, cmdline = ...
local w = assert(worker.spawn { name = "bench" })
assert(w:call("vm.create", { cpus = 1, memory = 256 << 20 }))
assert(w:call("device.add", { type = "serial" }))
assert(w:call("kernel.load", { kernel = kernel, initrd = initrd, cmdline = cmdline }))
assert(w:call("vm.start", {}))
repeat
    local event = assert(w:next_event())
until event.type == "state" and event.state == "stopped"
io.write(assert(w:call("console.read", {})))
w:close()
