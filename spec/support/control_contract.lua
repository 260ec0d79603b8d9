-- SPDX-License-Identifier: Apache-2.0
--
-- What the owner of a VM can do while it runs: memory, registers, one vCPU
-- held, stepped and let go, breakpoints, devices written in Lua, doorbells.
-- One spec for the userdata and the worker's proxy, on the fake backend
-- (spec/lua/control_spec.lua) and on KVM (spec/kvm/control_spec.lua).

local assert = require "luassert"
local asm = require "support.real16"
local core = require "sm.core"
local leaks = require "support.leaks"
local loop = require "sm.loop"
local sm = require "sm"
local target_of = require "support.core_contract"
local trace = require "sm.trace"
local uv = require "luv"

local M = {}

local describe, it -- busted's, given by the spec

local LIMIT = 120 -- seconds; nothing takes long, but the lab may be busy
local PORT = 0x700
local MMIO = 0xfe000000

local function misuse(pattern, fn, ...)
    local ok, err = pcall(fn, ...)
    assert.is_false(ok)
    assert.matches(pattern, err)
end

local function refused(pattern, res, err, errno)
    assert.is_nil(res)
    assert.matches(pattern, err)
    assert.equal("integer", math.type(errno))
end

local function boot(target, code, cfg)
    local vm = assert(target.vm(cfg or { memory = "1M" }))
    assert(vm:write(0x1000, code))
    assert(vm:enter(0, "real16", 0x1000))
    return vm
end

local function u16(vm, gpa)
    return string.unpack("<I2", assert(vm:read(gpa, 2)))
end

-- Serve events until a condition holds; returns the events nobody served.
local function serve_until(vm, done)
    local seen, deadline = {}, loop.now() + LIMIT
    while not done() do
        assert(loop.now() < deadline, "the guest did not come that far")
        local event = vm:next_event(0.05)
        seen[#seen + 1] = event
    end
    return seen
end

-- The next exit event.
local function next_exit(vm)
    while true do
        local event, err = vm:next_event(LIMIT)
        assert(event, err)
        if event.type == "exit" then
            return event
        end
        assert.not_equal("stopped", event.state, event.detail)
    end
end

local function memory(target)
    it("finds patterns in memory", function()
        local vm <close> = assert(target.vm { memory = "1M" })
        assert(vm:map { gpa = 0x200000, size = "64K" })
        for _, at in ipairs { 0x10, 0x13, 0xffffc, 0x200ffe } do
            assert(vm:write(at, "abca"))
        end
        assert.same({ 0x10, 0x13, 0xffffc, 0x200ffe }, vm:search("abca"))
        assert.same({ 0x10, 0x13 }, vm:search { pattern = "abca", max = 2 })
        assert.same({ 0x13, 0xffffc }, vm:search("abca", 0x11, 0xfffff - 0x10))
        assert.same({}, vm:search("nowhere"))
        misuse("memory%.search: pattern: expected at least one byte", vm.search, vm, "")
    end)

    it("makes a region read-only and writable again", function()
        local vm <close> = boot(target, asm.ax(0) .. asm.ds(0x2000) .. "\x40" .. asm.store16(0) .. "\xeb\xfa",
            { memory = "64K" })
        assert(vm:map { gpa = 0x20000, size = 4096 })
        assert(vm:map { gpa = 0x30000, size = 4096 })
        assert(vm:unmap(0x30000))
        refused("no memory", vm:read(0x30000, 1))
        assert(vm:start())
        serve_until(vm, function() return u16(vm, 0x20000) ~= 0 end)
        assert(vm:pause())
        assert(vm:protect(0x20000, true))
        refused("no memory", vm:write(0x20000, "x"))
        local before = u16(vm, 0x20000)
        assert(vm:resume())
        local exits = vm:stats().vcpus[1].mmio
        serve_until(vm, function() return vm:stats().vcpus[1].mmio > exits + 3 end)
        assert.equal(before, u16(vm, 0x20000))
        assert(vm:pause())
        assert(vm:protect(0x20000, false))
        assert(vm:resume())
        serve_until(vm, function() return u16(vm, 0x20000) ~= before end)
        refused("no region begins there", vm:call("memory.dirty", { gpa = 0x20001 }))
    end)

    it("tells which pages a vCPU wrote", function()
        local vm <close> = boot(target, asm.ds(0x2000) .. asm.ax(7) .. asm.store16(0x10)
            .. asm.store16(0x1010) .. asm.store16(0x4010) .. asm.forever, { memory = "1M" })
        refused("not logged", vm:dirty(0))
        assert(vm:log_dirty(0, true))
        vm:dirty(0)
        assert(vm:start())
        serve_until(vm, function() return u16(vm, 0x24010) == 7 end)
        local pages = {}
        for _, run in ipairs(assert(vm:dirty(0))) do
            for gpa = run.gpa, run.gpa + run.size - 1, 4096 do
                pages[gpa] = true
            end
        end
        assert.is_true(pages[0x20000])
        assert.is_true(pages[0x21000])
        assert.is_true(pages[0x24000])
        assert.is_nil(pages[0x22000])
        assert.same({}, vm:dirty(0))
    end)

    it("shares memory with a file", function()
        -- On a file system whose mappings and reads agree: not every one's do.
        local path = ("/dev/shm/sm-spec-%d"):format(uv.os_getpid())
        local file = assert(io.open(path, "w+b"))
        file:write(("\0"):rep(4096))
        file:flush()
        local vm <close> = boot(target, asm.ds(0x2000) .. asm.ax(0x4241) .. asm.store16(0) .. asm.forever)
        assert(vm:map { gpa = 0x400000, size = 4096, kind = "shared", path = path })
        os.remove(path)
        assert(vm:write(0x400000, "seen by all"))
        file:seek "set"
        assert.equal("seen by all", file:read(11))
        file:close()
    end)
end

local function registers(target)
    it("has the FPU's registers and MSRs by name", function()
        local vm <close> = boot(target, asm.forever)
        local all = assert(vm:regs())
        for _, name in ipairs { "fcw", "mxcsr", "st0", "st7_high", "xmm0", "xmm15_high", "rax", "efer" } do
            assert.equal("integer", math.type(all[name]), name)
        end
        local values = {
            xmm3 = 0x1122334455667788, xmm3_high = -2, st2 = -1, st2_high = 0x3fff,
            ["msr:lstar"] = 0x1234, ["msr:c0000081"] = 0x10,
        }
        local cpu = vm:vcpu(0)
        assert(cpu:set(values))
        local names = { "msr:star" }
        for name in pairs(values) do
            names[#names + 1] = name
        end
        local got = assert(cpu:get(names))
        assert.equal(0x10, got["msr:star"])
        got["msr:star"] = nil
        assert.same(values, got)
        misuse("no register named 'msr:nonsense'", vm.regs, vm, 0, { "msr:nonsense" })
        misuse("no register named 'xmm16'", vm.regs, vm, 0, { "xmm16" })
    end)

    it("translates addresses as the vCPU does", function()
        local vm <close> = boot(target, asm.forever)
        assert.equal(0x1234, vm:vcpu(0):translate(0x1234))
    end)
end

local function run_control(target)
    it("steps one instruction at a time, from the first", function()
        local code = { asm.ax(1), "\x40", asm.store16(0x2000), "\x90", asm.out(0x80, 5), asm.forever }
        local vm <close> = boot(target, table.concat(code))
        local cpu = vm:vcpu(0)
        assert(cpu:hold())
        assert(vm:start())
        local at, steps, ends = 0x1000, 0, {}
        for _, len in ipairs { 3, 1, 3, 1, 3, 2, 1 } do
            at = at + len
            ends[at] = true
        end
        local pc = 0x1000
        while pc ~= at do
            assert(cpu:step())
            local exit = next_exit(vm)
            assert.equal("step", exit.reason)
            assert.equal(0, exit.vcpu)
            assert.is_true(ends[exit.pc] and exit.pc > pc)
            assert.equal(exit.pc, cpu:get { "rip" }.rip)
            pc, steps = exit.pc, steps + 1
        end
        -- Emulated hardware loses a trap now and then: two instructions at once.
        assert.is_true(steps == 7 or target.loses_steps and steps >= 4)
        assert.equal(2, u16(vm, 0x2000))
        for _ = 1, 100 do
            assert(cpu:step())
            assert.equal(at, next_exit(vm).pc)
        end
        assert(vm:write(at, "\x90" .. asm.store16(0x2002) .. asm.forever))
        assert(cpu:continue())
        serve_until(vm, function() return u16(vm, 0x2002) ~= 0 end)
        refused("not held", cpu:continue())
        refused("not held", cpu:step())
    end)

    it("holds one vCPU and lets it go, whatever the VM does meanwhile", function()
        local vm <close> = boot(target, asm.ax(0) .. asm.count(0x2000))
        local cpu = vm:vcpu(0)
        assert(vm:start())
        serve_until(vm, function() return u16(vm, 0x2000) ~= 0 end)
        for _ = 1, 10 do
            assert(cpu:hold())
            local count = u16(vm, 0x2000)
            assert(vm:pause())
            assert(vm:resume())
            assert.equal("running", vm:state().state)
            assert.equal(count, u16(vm, 0x2000))
            assert(cpu:continue())
            serve_until(vm, function() return u16(vm, 0x2000) ~= count end)
        end
        assert(cpu:hold())
        assert(vm:kill())
        assert.equal("stopped", vm:state().state)
    end)

    it("names its parts", function()
        local vm = boot(target, asm.forever)
        local cpu, line = vm:vcpu(0), vm:line(5)
        assert.equal("vcpu 0", tostring(cpu))
        assert.equal("line 5", tostring(line))
        assert.is_true(cpu == vm:vcpu(0))
        assert.is_true(line ~= vm:line(6))
        assert(line:set())
        assert(line:set(true))
        assert(line:set(false))
        misuse("irq%.set: level: expected true or false", line.set, line, 1)
        vm:close()
        assert.equal("vcpu 0 (closed)", tostring(cpu))
        misuse("attempt to use a closed vm", cpu.get, cpu)
        misuse("attempt to use a closed vm", vm.vcpu, vm, 0)
    end)
end

-- What a breakpoint of one kind does; `probe` tells whether this machine has it.
local function breakpoints(target, probe)
    local function program()
        -- 0x1000: mov ax,0; 0x1003: inc ax; 0x1004: mov [0x2000],ax; 0x1007: jmp 0x1003
        return asm.ax(0) .. asm.count(0x2000)
    end

    for _, kind in ipairs { "hardware", "software" } do
        it(("stops at a %s breakpoint, each time, and passes it when told to go on"):format(kind), function()
            if not probe(target, kind) then
                return -- said by the probe's own spec
            end
            local vm <close> = boot(target, program())
            local id = assert(vm:add_breakpoint { address = 0x1004, kind = kind })
            assert(vm:start())
            for n = 1, 10 do
                local exit = next_exit(vm)
                assert.equal("breakpoint", exit.reason)
                assert.equal(id, exit.breakpoint)
                assert.equal(0x1004, exit.pc)
                assert.equal(n, vm:regs(0, { "rax" }).rax & 0xffff)
                assert.equal(n - 1, u16(vm, 0x2000))
                assert(vm:continue(0))
            end
            next_exit(vm)
            assert(vm:step(0))
            local exit = next_exit(vm)
            assert.equal("step", exit.reason)
            assert.equal(0x1007, exit.pc)
            assert(vm:remove_breakpoint(id))
            assert.equal(asm.store16(0x2000), vm:read(0x1004, 3))
            local count = u16(vm, 0x2000)
            assert(vm:continue(0))
            serve_until(vm, function() return u16(vm, 0x2000) > count + 20 end)
            refused("no such breakpoint", vm:remove_breakpoint(id))
        end)
    end

    it("stops after a write to watched data", function()
        if not probe(target, "watch") then
            return
        end
        local vm <close> = boot(target, program())
        local id = assert(vm:add_breakpoint { address = 0x2000, kind = "watch", len = 2 })
        assert(vm:start())
        for n = 1, 5 do
            local exit = next_exit(vm)
            assert.equal("watchpoint", exit.reason)
            assert.equal(id, exit.breakpoint)
            assert.equal(0x1007, exit.pc)
            assert.equal(n, u16(vm, 0x2000))
            assert(vm:continue(0))
        end
    end)

    it("sets and removes breakpoints while the guest runs", function()
        local vm <close> = boot(target, program())
        assert(vm:start())
        for _ = 1, 20 do
            local id = assert(vm:add_breakpoint { address = 0x9000, kind = "hardware" })
            assert(vm:remove_breakpoint(id))
        end
        local count = u16(vm, 0x2000)
        serve_until(vm, function() return u16(vm, 0x2000) ~= count end)
    end)

    it("refuses breakpoints that cannot be", function()
        local vm <close> = boot(target, program())
        refused("multiple of it", vm:add_breakpoint { address = 0x2001, kind = "watch", len = 2 })
        refused("multiple of it", vm:add_breakpoint { address = 0x2000, kind = "watch", len = 3 })
        misuse("len, read: go with kind 'watch'", vm.add_breakpoint, vm, { address = 1, len = 2 })
        for i = 1, 4 do
            assert(vm:add_breakpoint { address = i, kind = "hardware" })
        end
        refused("no more of this kind", vm:add_breakpoint { address = 5 })
        refused("0x1: there is one already", vm:add_breakpoint { address = 1 })
    end)
end

local function devices(target)
    it("has its accesses answered by Lua", function()
        local vm <close> = boot(target, asm.out(PORT + 1, 0x41) .. asm.in8(PORT + 2) .. asm.store16(0x2000)
            .. asm.in32(PORT) .. asm.store32(0x2004) .. asm.ax(1) .. asm.store16(0x2010) .. asm.forever)
        local seen = {}
        local device = assert(vm:device {
            space = "pio", base = PORT, size = 8,
            read = function(offset, len)
                seen[#seen + 1] = ("read %d %d"):format(offset, len)
                return len == 1 and 0x77 or 0x11223344
            end,
            write = function(offset, value, len)
                seen[#seen + 1] = ("write %d %d %x"):format(offset, len, value)
            end,
        })
        assert.matches("^device %(claim %d+%)$", tostring(device))
        assert(vm:start())
        local other = serve_until(vm, function() return u16(vm, 0x2010) == 1 end)
        for _, event in ipairs(other) do
            assert.equal("state", event.type)
        end
        assert.same({ "write 1 1 41", "read 2 1", "read 0 4" }, seen)
        assert.equal(0x77, u16(vm, 0x2000) & 0xff)
        assert.equal(0x11223344, (string.unpack("<I4", vm:read(0x2004, 4))))
        assert.equal(3, vm:stats().vcpus[1].parked)
    end)

    it("gives the bus default and a report when a handler dies", function()
        local vm <close> = boot(target, asm.ax(0) .. asm.in8(PORT) .. asm.store16(0x2000) .. asm.out(PORT, 1)
            .. asm.ax(0) .. asm.in8(PORT + 1) .. asm.store16(0x2002)
            .. asm.ax(1) .. asm.store16(0x2010) .. asm.forever)
        assert(vm:device {
            space = "pio", base = PORT, size = 2,
            read = function(offset)
                return offset == 0 and error "on purpose" or "text"
            end,
            write = function()
                error { "a table" }
            end,
        })
        assert(vm:start())
        local reports = {}
        for _, event in ipairs(serve_until(vm, function() return u16(vm, 0x2010) == 1 end)) do
            if event.type == "device" then
                assert.equal(0, event.vcpu)
                reports[#reports + 1] = event.error
            end
        end
        while #reports < 3 do
            local event = assert(vm:next_event(LIMIT))
            reports[#reports + 1] = event.type == "device" and event.error or nil
        end
        assert.matches("on purpose", reports[1])
        assert.matches("table", reports[2])
        assert.matches("returned a string, not an integer", reports[3])
        assert.equal(0x00ff, u16(vm, 0x2000))
        assert.equal(0x00ff, u16(vm, 0x2002))
    end)

    it("goes on with the bus default when a device is closed, waiting or not", function()
        local vm <close> = boot(target, asm.ax(0) .. asm.in8(PORT) .. asm.store16(0x2000) .. asm.in8(PORT)
            .. asm.ax(1) .. asm.store16(0x2010) .. asm.forever)
        local claim = assert(vm:claim { space = "pio", base = PORT, size = 1 })
        assert(vm:start())
        local exit = next_exit(vm)
        assert.same({
            type = "exit", reason = "pio", vcpu = 0, claim = claim, address = PORT, offset = 0,
            len = 1, write = false,
        }, exit)
        refused("waits for an answer", vm:hold(0))
        refused("vm%.pause: Device or resource busy", vm:pause())
        refused("vcpu%.get: ", vm:regs(0, { "rip" }))
        assert(vm:release(claim))
        refused("no such claim", vm:release(claim))
        serve_until(vm, function() return u16(vm, 0x2010) == 1 end)
        assert.equal(0x00ff, u16(vm, 0x2000))
        refused("waits for no answer", vm:answer(0, 1))
    end)

    it("lets the owner answer when it likes", function()
        local vm <close> = boot(target, asm.ds(0xf000) .. asm.load16(4) .. asm.store16(6) .. asm.ds(0)
            .. asm.store16(0x2000) .. asm.forever, { memory = "64K" })
        local claim = assert(vm:claim { space = "mmio", base = 0xf0000, size = 16 })
        assert(vm:start())
        assert.same({
            type = "exit", reason = "mmio", vcpu = 0, claim = claim, address = 0xf0004, offset = 4,
            len = 2, write = false,
        }, next_exit(vm))
        local event = vm:next_event(0.02)
        while event do
            assert.equal("state", event.type)
            event = vm:next_event(0.02)
        end
        assert(vm:vcpu(0):answer(0x4321))
        local exit = next_exit(vm)
        assert.is_true(exit.write)
        assert.equal(0x4321, exit.value)
        assert(vm:answer(0))
        serve_until(vm, function() return u16(vm, 0x2000) == 0x4321 end)
    end)

    it("ends with an access unanswered, killed or closed", leaks.free(function()
        for _, how in ipairs { "kill", "close" } do
            local vm <close> = boot(target, asm.in8(PORT) .. asm.forever)
            assert(vm:claim { space = "pio", base = PORT, size = 1 })
            assert(vm:start())
            next_exit(vm)
            vm[how](vm)
            if how == "kill" then
                assert.equal("killed", vm:state().reason)
                assert.equal("integer", math.type(vm:regs(0, { "rip" }).rip))
            end
        end
    end))

    it("pauses, holds and reads registers while the guest hammers a device", function()
        local vm <close> = boot(target, "\xba" .. string.pack("<I2", PORT) .. "\xec\xeb\xfd")
        local reads = 0
        assert(vm:device {
            space = "pio", base = PORT, size = 1,
            read = function()
                reads = reads + 1
                return 0
            end,
        })
        assert(vm:start())
        for _ = 1, 10 do
            local before = reads
            serve_until(vm, function() return reads > before + 3 end)
            assert(vm:pause())
            assert(vm:resume())
            assert.equal("integer", math.type(assert(vm:regs(0, { "rip" })).rip))
            assert(vm:hold(0))
            assert(vm:continue(0))
        end
    end)

    it("is driven by a handler that uses the VM", function()
        local vm <close> = boot(target, asm.out(PORT, 9) .. asm.ax(1) .. asm.store16(0x2010) .. asm.forever)
        local text
        local device <close> = assert(vm:device {
            space = "pio", base = PORT, size = 1,
            write = function(_, value)
                assert(vm:line(5):set())
                assert(vm:write(0x3000, ("written %d"):format(value)))
                text = vm:read(0x3000, 9)
            end,
        })
        assert(vm:start())
        serve_until(vm, function() return u16(vm, 0x2010) == 1 end)
        assert.equal("written 9", text)
    end)

    it("may be closed by its own handler, with the VM", leaks.free(function()
        local vm = boot(target, asm.out(PORT, 9) .. asm.forever)
        assert(vm:device {
            space = "pio", base = PORT, size = 1,
            write = function()
                vm:close()
            end,
        })
        assert(vm:start())
        local deadline = loop.now() + LIMIT
        while tostring(vm) ~= "vm (closed)" do
            assert(loop.now() < deadline)
            pcall(vm.next_event, vm, 0.05)
        end
    end))

    it("refuses ranges that are taken, and devices that make no sense", function()
        local vm <close> = boot(target, asm.forever)
        refused("something owns part of this range already", vm:claim { space = "pio", base = 0x604 - 4, size = 1 })
        misuse("ports end at 0xffff", vm.claim, vm, { space = "pio", base = 0xffff, size = 2 })
        misuse("space: expected one of mmio|pio", vm.claim, vm, { space = "io", base = 0, size = 1 })
        refused("wraps", vm:claim { space = "mmio", base = -1, size = 2 })
        misuse("vm%.device: read: expected a function, got string", vm.device, vm,
            { space = "pio", base = PORT, size = 1, read = "x" })
        misuse("table expected", vm.device, vm, 1)
        misuse("unknown key 'reed'", vm.device, vm, { space = "pio", base = PORT, size = 1, reed = 1 })
        local claim = assert(vm:claim { space = "pio", base = PORT, size = 1 })
        refused("already", vm:claim { space = "pio", base = PORT, size = 1 })
        assert(vm:release(claim))
        assert.equal(claim, vm:claim { space = "pio", base = PORT, size = 1 })
        assert(vm:start())
        misuse("not while the VM is running", vm.claim, vm, { space = "pio", base = 0x9000, size = 1 })
    end)
end

local function doorbells(target)
    it("counts doorbells without an exit", function()
        local vm <close> = boot(target, asm.ds(0x8000) .. asm.ax(3) .. asm.store16(0x10) .. asm.store16(0x10)
            .. asm.ax(4) .. asm.store16(0x10) .. asm.ds(0) .. asm.store16(0x2000) .. asm.forever, { memory = "64K" })
        local id = assert(vm:add_doorbell { gpa = 0x80010, len = 2, value = 3 })
        refused("there is one already", vm:add_doorbell { gpa = 0x80010, len = 2, value = 3 })
        misuse("len: 1, 2, 4 or 8", vm.add_doorbell, vm, { gpa = 0, len = 2 })
        assert(vm:start())
        local rung, deadline = 0, loop.now() + LIMIT
        while rung < 2 do
            assert(loop.now() < deadline)
            local event = assert(vm:next_event(LIMIT))
            if event.type == "doorbell" then
                assert.equal(id, event.doorbell)
                rung = rung + event.count
            end
        end
        assert.equal(2, rung)
        serve_until(vm, function() return u16(vm, 0x2000) == 4 end)
        assert.equal(1, vm:stats().vcpus[1].mmio)
        assert(vm:remove_doorbell(id))
        refused("no such doorbell", vm:remove_doorbell(id))
    end)
end

local function traces(target)
    it("traces exits, chosen by address, and sums them up", function()
        local vm <close> = boot(target, asm.out(0x80, 1) .. asm.out(0x81, 2) .. asm.in8(0x82) .. asm.out(0x80, 3)
            .. asm.ax(1) .. asm.store16(0x2010) .. asm.forever)
        assert(vm:trace { exits = true, first = 0x80, last = 0x81 })
        assert(vm:start())
        local seen = {}
        for _, event in ipairs(serve_until(vm, function() return u16(vm, 0x2010) == 1 end)) do
            seen[#seen + 1] = event.type == "trace" and event or nil
        end
        while #seen < 3 do
            local event = assert(vm:next_event(LIMIT))
            seen[#seen + 1] = event.type == "trace" and event or nil
        end
        for i, wanted in ipairs { { 0x80, 1 }, { 0x81, 2 }, { 0x80, 3 } } do
            assert.equal("exit", seen[i].kind)
            assert.equal("pio", seen[i].what)
            assert.is_true(seen[i].write)
            assert.equal(wanted[1], seen[i].address)
            assert.equal(wanted[2], seen[i].value)
            assert.is_true(seen[i].duration_ns >= 0)
        end
        seen.seconds = 1
        local rows = trace.group(seen)
        assert.equal(2, #rows)
        assert.matches("3 exits to the VMM in 1%.00 s", trace.summary(seen))
        assert.matches("pio write 0x80%s+2%s+66%.7%%", trace.summary(seen))
        assert(vm:trace {})
    end)

    it("tells what a trace lost, after what it kept", function()
        -- out dx,al; inc ax; jmp: for ever, far faster than anybody reads
        local vm <close> = boot(target, "\xba\x80\x00\xee\x40\xeb\xfc")
        assert(vm:start())
        assert(vm:trace { exits = true })
        local exits = vm:stats().vcpus[1].exits
        local deadline = loop.now() + LIMIT
        while vm:stats().vcpus[1].exits < exits + 6000 do
            assert(loop.now() < deadline)
            loop.sleep(0.005)
        end
        assert(vm:trace {})
        local kept, lost, last = 0, 0, nil
        repeat
            local event = vm:next_event(0.2)
            if event and event.type == "trace" then
                assert.is_true(not last or event.time_ns >= last)
                kept, last = kept + 1, event.time_ns
            elseif event and event.type == "lost" then
                assert.equal("trace", event.source)
                lost = lost + event.count
            end
        until not event
        -- None is missing; and where nobody read meanwhile, the ring ran over.
        assert.is_true(kept >= 4096 and kept + lost >= 6000, ("kept %d, lost %d"):format(kept, lost))
        assert.is_true(lost > 0 or target.reads_ahead)
    end)

    it("has every counter in one table", function()
        local vm <close> = assert(target.vm { memory = "1M", cpus = 2 })
        assert(vm:add_device { type = "rng" })
        local stats = assert(sm.stats(vm))
        assert.equal(2, #stats.vcpus)
        assert.equal(1 << 20, stats.ram_bytes)
        assert.equal("rng0", stats.devices[1].name)
        assert.equal(0, stats.devices[1].requests)
        assert.equal(0xd0000000, stats.devices[1].gpa)
        assert.same({ ready = false, size = 0, desc = 0, avail = 0, used = 0 }, vm:devices()[1].queues[1])
    end)

    it("takes rules for faults and refuses nonsense", function()
        local vm <close> = assert(target.vm { memory = "1M" })
        refused("there is no blk0", vm:add_fault { disk = 0, action = "fail" })
        assert(vm:add_device { type = "blk", readonly = true, extents = { { path = "/proc/self/exe" } } })
        local id = assert(vm:add_fault { disk = 0, action = "fail", operation = "read", probability = 0.5, seed = 7 })
        assert.same({
            { disk = 0, fault = id, operation = "read", action = "fail", matched = 0, hits = 0 },
        }, vm:faults())
        misuse("probability: expected a number from 0 to 1, got 1%.5", vm.add_fault, vm,
            { disk = 0, action = "fail", probability = 1.5 })
        misuse("delay_ms: goes with action 'delay'", vm.add_fault, vm, { disk = 0, action = "delay" })
        misuse("silent: goes with action 'tear'", vm.add_fault, vm, { disk = 0, action = "fail", silent = true })
        misuse("last: expected at least first", vm.add_fault, vm, { disk = 0, action = "fail", first = 2, last = 1 })
        refused("the VM has no vsock", vm:vsock_fault("reset"))
        assert(vm:remove_fault(0, id))
        refused("no such fault", vm:remove_fault(0, id))
    end)

    it("stops the guest's clock and lets it go on", function()
        local vm <close> = boot(target, asm.forever)
        misuse("not while the VM is created", vm.clock_fault, vm, "stop")
        assert(vm:start())
        refused("the clock is going", vm:clock_fault "go")
        assert(vm:clock_fault "stop")
        refused("the clock is stopped already", vm:clock_fault "stop")
        assert(vm:pause())
        assert(vm:clock_fault "go")
        assert(vm:clock_fault "stop")
        assert(vm:resume())
        assert(vm:kill())
    end)
end

local function gives_back(target)
    it("leaves nothing behind, in whatever order things are closed", leaks.free(function()
        for _, order in ipairs { "vm first", "device first", "neither" } do
            local vm = boot(target, asm.in8(PORT) .. asm.forever)
            local device = assert(vm:device { space = "pio", base = PORT, size = 1 })
            assert(vm:add_doorbell { gpa = MMIO })
            assert(vm:add_breakpoint { address = 0x1234 })
            local cpu = vm:vcpu(0)
            assert(vm:start())
            if order == "vm first" then
                vm:close()
                device:close()
                assert.equal("device (closed)", tostring(device))
            elseif order == "device first" then
                device:close()
                device:close()
                vm:close()
            end
            vm, device, cpu = nil, nil, nil
            local _ = cpu
            collectgarbage()
            collectgarbage()
        end
    end))

    it("bears a collector that runs all the time, with devices", leaks.free(function()
        debug.sethook(function() collectgarbage() end, "", 50)
        local ok, err = pcall(function()
            local vm <close> = boot(target, asm.in8(PORT) .. asm.store16(0x2000) .. asm.out(PORT, 1)
                .. asm.ax(1) .. asm.store16(0x2010) .. asm.forever)
            local device <close> = assert(vm:device {
                space = "pio", base = PORT, size = 1,
                read = function() return 0x42 end,
                write = function() error "on purpose" end,
            })
            assert(vm:start())
            serve_until(vm, function() return u16(vm, 0x2010) == 1 end)
            assert.equal(0x42, u16(vm, 0x2000) & 0xff)
        end)
        debug.sethook()
        assert(ok, err)
    end))

    it("is flat in memory and descriptors over many lives", leaks.free(function()
        local function life()
            local vm <close> = boot(target, asm.in8(PORT) .. asm.forever)
            assert(vm:device { space = "pio", base = PORT, size = 1 })
            assert(vm:start())
            assert(vm:vcpu(0):get { "rip" })
        end
        local cycles = math.tointeger(os.getenv "SM_SPEC_CYCLES") or target.cycles
        local warm = math.max(5, cycles // 10)
        for _ = 1, warm do
            life()
        end
        collectgarbage()
        local before = uv.resident_set_memory()
        for _ = 1, cycles do
            life()
        end
        collectgarbage()
        local grown = uv.resident_set_memory() - before
        -- A sanitizer keeps what was freed for a while.
        local allowed = os.getenv "SM_SPEC_SANITIZER" and 64 << 20 or 2 << 20
        assert.is_true(grown < allowed, ("grown by %d KiB in %d lives"):format(grown >> 10, cycles))
    end))
end

--- Describe the contract for one target.
---@param target table one of core_contract's
---@param env table the spec's own environment
---@param probe fun(target: table, kind: string): boolean whether breakpoints of a kind work here
function M.describe(target, env, probe)
    describe, it = env.describe, env.it
    describe("a VM " .. target.name, function()
        memory(target)
        registers(target)
        run_control(target)
        breakpoints(target, probe)
        devices(target)
        doorbells(target)
        traces(target)
        gives_back(target)
    end)
end

M.targets = target_of.targets
M.core = core

return M
