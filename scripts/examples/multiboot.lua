-- SPDX-License-Identifier: Apache-2.0
-- A multiboot loader in Lua: reads a 32-bit ELF kernel, puts its segments into
-- guest memory, writes the information block and enters it, all by the
-- Multiboot Specification 0.6.96. The console is COM1.
--
--   sm scripts/examples/multiboot.lua KERNEL [COMMAND LINE]

local core = require "sm.core"

local HEADER_MAGIC, LOADER_MAGIC = 0x1badb002, 0x2badb002
local INFO, CMDLINE = 0x9000, 0x9100

-- The multiboot header lies in the first 8 KiB, aligned to 4; its sum is zero.
local function has_header(image)
    for at = 1, math.min(#image, 8192) - 11, 4 do
        local magic, flags, checksum = string.unpack("<I4I4I4", image, at)
        if magic == HEADER_MAGIC and (magic + flags + checksum) & 0xffffffff == 0 then
            return true
        end
    end
    return false
end

-- Put every loadable segment where it belongs; returns the entry point.
local function load_elf(vm, image)
    assert(#image >= 52 and image:sub(1, 5) == "\127ELF\1", "not a 32-bit ELF file")
    local entry, phoff = string.unpack("<I4I4", image, 25)
    local size, count = string.unpack("<I2I2", image, 43)
    for i = 0, count - 1 do
        local kind, offset, _, paddr, filesz, memsz = string.unpack("<I4I4I4I4I4I4", image, phoff + i * size + 1)
        if kind == 1 and memsz > 0 then
            assert(filesz <= memsz and offset + filesz <= #image, "a segment leaves the file")
            assert(vm:write(paddr, image:sub(offset + 1, offset + filesz) .. ("\0"):rep(memsz - filesz)))
        end
    end
    return entry
end

local path, cmdline = ...
local file = assert(io.open(assert(path, "which kernel?"), "rb"))
local image = file:read "a"
file:close()
assert(has_header(image), path .. ": no multiboot header")

local memory = 16 << 20
local vm <close> = assert(core.vm { memory = memory })
assert(vm:add_device { type = "serial" })
local entry = load_elf(vm, image)
assert(vm:write(CMDLINE, (cmdline or "") .. "\0"))
-- flags: memory sizes (bit 0) and a command line (bit 2)
assert(vm:write(INFO, string.pack("<I4I4I4I4I4", 5, 640, (memory >> 10) - 1024, 0, CMDLINE)))
-- What multiboot asks for is what a PVH kernel gets: 32-bit flat protected
-- mode, paging off, EBX = the block; EAX is ours to set.
local cpu = vm:vcpu(0)
assert(cpu:enter("pvh", entry, INFO))
assert(cpu:set { rax = LOADER_MAGIC })
assert(vm:start())
local ending
repeat
    local event = assert(vm:next_event(60))
    ending = event.state == "stopped" and event
until ending
io.write(vm:read_console())
print("the kernel ended: " .. ending.reason)
