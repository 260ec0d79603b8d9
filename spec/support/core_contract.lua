-- SPDX-License-Identifier: Apache-2.0
--
-- What a VM of sm.core does, wherever it lives: this spec runs against the
-- in-process userdata and against the worker's proxy, on the fake backend
-- (spec/lua/core_spec.lua) and on KVM (spec/soak/core_spec.lua).

local assert = require "luassert"
local asm = require "support.real16"
local core = require "sm.core"
local leaks = require "support.leaks"
local loop = require "sm.loop"
local shell = require "support.shell"
local worker = require "sm.worker"

local M = {}

local describe, it -- busted's, given by the spec: it keeps them from modules

local COM1 = 0x3f8
local LIMIT = 30 -- seconds; nothing here takes long, but the lab is slow

--- Both homes of a VM: a name, a constructor, and a wait for the next event.
M.targets = {
    {
        name = "in process",
        vm = core.vm,
        next_event = function(vm)
            local event = vm:next()
            while not event do
                assert(loop.readable(vm:pollfd(), LIMIT))
                event = vm:next()
            end
            return event
        end,
    },
    {
        name = "in a worker",
        reads_ahead = true, -- a call in flight takes the events that come meanwhile
        vm = worker.vm,
        next_event = function(vm)
            return assert(vm:next_event(LIMIT))
        end,
    },
}

--- Wait for an event of a kind; what comes before it is dropped.
local function wait_for(target, vm, wanted)
    while true do
        local event = target.next_event(vm)
        local fits = true
        for key, value in pairs(wanted) do
            fits = fits and event[key] == value
        end
        if fits then
            return event
        end
    end
end

--- A VM with 1 MiB of RAM that begins with a program at 0x1000.
local function boot(target, code, cfg)
    local vm = assert(target.vm(cfg or { memory = "1M" }))
    assert(vm:write(0x1000, code))
    assert(vm:enter(0, "real16", 0x1000))
    return vm
end

local function u16(vm, gpa)
    return string.unpack("<I2", assert(vm:read(gpa, 2)))
end

local function u32(vm, gpa)
    return string.unpack("<I4", assert(vm:read(gpa, 4)))
end

-- Wait until a word of guest memory holds a value.
local function until_u16(vm, gpa, wanted)
    local deadline = loop.now() + LIMIT
    while u16(vm, gpa) ~= wanted do
        assert(loop.now() < deadline, "the guest did not come that far")
        loop.sleep(0.001)
    end
end

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

local function runs_programs(target)
    it("runs a program that prints, and hands out what it printed", function()
        local vm <close> = boot(target, asm.print(COM1, "hello") .. asm.halt)
        assert(vm:add_device { type = "serial" })
        assert.equal("", vm:read_console())
        assert(vm:start())
        local text = ""
        while #text < 5 do
            wait_for(target, vm, { type = "console" })
            text = text .. vm:read_console()
        end
        assert.equal("hello", text)
        assert.equal("", vm:read_console())
    end)

    it("hands out at most as many console bytes as asked for, and tells of the rest", function()
        local vm <close> = boot(target, asm.print(COM1, "hello") .. asm.store16(0x2000) .. asm.forever)
        assert(vm:add_device { type = "serial" })
        assert(vm:start())
        until_u16(vm, 0x2000, ("o"):byte())
        wait_for(target, vm, { type = "console" })
        assert.equal("he", vm:read_console(2))
        wait_for(target, vm, { type = "console" })
        assert.equal("llo", vm:read_console(100))
    end)

    it("answers an access that nobody owns with all ones", function()
        local vm <close> = boot(target, asm.ax(0) .. asm.in8(0x9999) .. asm.store16(0x2000)
            .. asm.in32(0x9999) .. asm.store32(0x2004)
            .. asm.ds(0xf000) .. asm.load32(0x10) .. asm.ds(0) .. asm.store32(0x2008)
            .. asm.ax(0xd00e) .. asm.store16(0x200c) .. asm.forever, { memory = "64K" })
        assert(vm:start())
        until_u16(vm, 0x200c, 0xd00e)
        assert.equal(0x00ff, u16(vm, 0x2000))
        assert.equal(0xffffffff, u32(vm, 0x2004))
        assert.equal(0xffffffff, u32(vm, 0x2008))
        local stats = assert(vm:stats()).vcpus[1]
        assert.is_true(stats.exits >= 3)
        assert.equal(3, stats.unclaimed)
        assert.equal(1, stats.mmio)
    end)

    it("keeps the guest from writing read-only memory", function()
        local vm <close> = boot(target, asm.ax(0x1234) .. asm.ds(0x2000) .. asm.store16(0)
            .. asm.load16(0) .. asm.ds(0) .. asm.store16(0x2000)
            .. asm.ax(1) .. asm.store16(0x2002) .. asm.forever, { memory = "64K" })
        assert(vm:map { gpa = 0x20000, size = 4096, readonly = true })
        assert(vm:start())
        until_u16(vm, 0x2002, 1)
        assert.equal(0, u16(vm, 0x20000))
        assert.equal(0, u16(vm, 0x2000))
    end)

    it("pauses between two instructions and goes on", function()
        local vm <close> = boot(target, asm.ax(0) .. asm.count(0x2000))
        assert(vm:start())
        local deadline = loop.now() + LIMIT
        while u16(vm, 0x2000) == 0 do
            assert(loop.now() < deadline)
        end
        for _ = 1, 20 do
            assert(vm:pause())
            assert.equal("paused", vm:state().state)
            local count, ax = u16(vm, 0x2000), vm:regs(0, { "rax" }).rax & 0xffff
            assert.is_true(ax == count or ax == (count + 1) & 0xffff)
            assert.equal(count, u16(vm, 0x2000))
            assert(vm:resume())
        end
        local count = u16(vm, 0x2000)
        while u16(vm, 0x2000) == count do
            assert(loop.now() < deadline)
        end
    end)

    it("reads and sets registers by name, stopped, paused and running", function()
        local vm <close> = boot(target, asm.ax(0x1234) .. asm.store16(0x2000) .. asm.forever)
        assert(vm:set_regs(0, { rcx = 0x55, r9 = -1 }))
        local all = assert(vm:regs())
        assert.equal(0x55, all.rcx)
        assert.equal(-1, all.r9)
        assert.equal(0x1000, all.rip)
        assert.equal("integer", math.type(all.cr0))
        assert(vm:start())
        until_u16(vm, 0x2000, 0x1234)
        assert.same({ rax = 0x1234, rcx = 0x55 }, vm:regs(0, { "rax", "rcx" }))
        assert(vm:write(0x3000, asm.store16(0x2002) .. asm.forever))
        assert(vm:pause())
        assert(vm:set_regs(0, { rip = 0x3000, rax = 0x4321 }))
        assert(vm:resume())
        until_u16(vm, 0x2002, 0x4321)
        assert(vm:kill())
        assert.equal(0x4321, vm:regs(0, { "rax" }).rax)
    end)
end

local function says_how_it_ended(target)
    local endings = {
        { "poweroff", "the sleep control register", asm.out(0x600, 5 << 2 | 1 << 5) },
        { "reboot", "the reset register", asm.out(0x602, 1) },
        { "reboot", "port 0xcf9", asm.out(0xcf9, 6) },
        { "reboot", "the keyboard controller", asm.out(0x64, 0xfe) },
        { "panic", "pvpanic", asm.out(0x505, 1) },
        { "crash", "a triple fault", asm.triple_fault(0x3000) },
    }
    for _, ending in ipairs(endings) do
        it(("says %s after %s"):format(ending[1], ending[2]), function()
            local vm <close> = boot(target, asm.ax(0x77) .. asm.store16(0x2000) .. ending[3] .. asm.halt)
            assert(vm:start())
            local event = wait_for(target, vm, { type = "state", state = "stopped" })
            assert.equal(ending[1], event.reason)
            assert.is_string(event.detail)
            local state = vm:state()
            assert.equal("stopped", state.state)
            assert.equal(ending[1], state.reason)
            assert.equal(0x77, u16(vm, 0x2000))
            assert.equal("integer", math.type(vm:regs(0, { "rip" }).rip))
            refused("has stopped", vm:resume())
        end)
    end

    it("is killed by its owner, once", function()
        local vm <close> = boot(target, asm.forever)
        assert(vm:start())
        assert(vm:kill("enough"))
        assert(vm:kill())
        local event = wait_for(target, vm, { type = "state", state = "stopped" })
        assert.equal("killed", event.reason)
        assert.equal("enough", event.detail)
        assert.is_nil(vm:next())
    end)
end

local function guards_memory(target)
    it("copies memory in and out, 8 MiB at once", function()
        local vm <close> = assert(target.vm { memory = "16M" })
        local data = ("0123456789abcdef"):rep(512 * 1024)
        assert(vm:write(0x100000, data))
        assert.is_true(vm:read(0x100000, #data) == data)
        misuse("memory%.read: len: expected an integer from 1 to 8388608", vm.read, vm, 0, #data + 1)
    end)

    it("refuses what lies outside, and copies nothing then", function()
        local vm <close> = assert(target.vm { memory = "64K" })
        refused("memory%.read: 0xffff %+ 2: no memory", vm:read(0xffff, 2))
        refused("no memory", vm:write(0xfff8, ("x"):rep(16)))
        assert.equal(("\0"):rep(8), vm:read(0xfff8, 8))
        refused("no memory", vm:read(-1, 1))
        refused("no memory", vm:read(-8, 16))
    end)

    it("maps regions and lists them", function()
        local file = os.tmpname()
        shell.write(file, ("f"):rep(8192))
        local vm <close> = assert(target.vm {})
        assert.same({}, vm:regions())
        assert(vm:map { gpa = 0x10000, size = "64K", kind = "shared" })
        assert(vm:map { gpa = 0x100000, size = 4096, kind = "file", path = file, offset = 4096 })
        os.remove(file)
        assert.same({
            { gpa = 0x10000, size = 65536, kind = "shared", readonly = false, device = false },
            { gpa = 0x100000, size = 4096, kind = "file", readonly = false, device = false },
        }, vm:regions())
        assert.equal("ffff", vm:read(0x100ffc, 4))
        refused("already", vm:map { gpa = 0x18000, size = 4096 })
        refused("whole pages", vm:map { gpa = 0x80001, size = 4096 })
        refused("whole pages", vm:map { gpa = -4096, size = 8192 })
        refused("No such file", vm:map { gpa = 0, size = 4096, kind = "file", path = "/nonexistent" })
        refused("not a regular file", vm:map { gpa = 0, size = 4096, kind = "file", path = "/" })
        misuse("path: goes with kind 'file'", vm.map, vm, { gpa = 0, size = 4096, kind = "file" })
    end)

    it("does not map a file beyond its end", function()
        local file <close> = setmetatable({ name = os.tmpname() }, { __close = function(f)
            os.remove(f.name)
        end })
        shell.write(file.name, "short")
        local vm <close> = assert(target.vm {})
        assert(vm:map { gpa = 0, size = 4096, kind = "file", path = file.name })
        refused("shorter", vm:map { gpa = 4096, size = 8192, kind = "file", path = file.name })
    end)
end

local function refuses_misuse(target)
    it("names the argument and what was expected", function()
        local vm <close> = assert(target.vm { memory = "64K" })
        misuse("memory%.read: gpa: expected an integer, got 'x'", vm.read, vm, "x", 1)
        misuse("memory%.read: gpa: expected an integer, got 1%.5", vm.read, vm, 1.5, 1)
        misuse("memory%.read: len: missing %(how many bytes", vm.read, vm, 0)
        misuse("memory%.read: len: expected an integer from 1 to", vm.read, vm, 0, 0)
        misuse("memory%.read: too many arguments", vm.read, vm, 0, 1, 2)
        misuse("memory%.read: unknown key 'foo' %(known: gpa, len%)", vm.read, vm,
            { gpa = 0, len = 1, foo = 1 })
        misuse("memory%.write: cannot pack a function", vm.write, vm, 0, print)
        misuse("memory%.map: kind: expected one of anon|shared|file, got 'swap'", vm.map, vm,
            { gpa = 0, size = 4096, kind = "swap" })
        misuse("memory%.map: size: expected a size in bytes", vm.map, vm, { gpa = 0, size = "12X" })
        misuse("vcpu%.get: vcpu: expected less than 1, got 1", vm.regs, vm, 1)
        misuse("vcpu%.get: names: no register named 'rzx'", vm.regs, vm, 0, { "rzx" })
        misuse("vcpu%.set: values%.rax: expected an integer", vm.set_regs, vm, 0, { rax = "1" })
        misuse("device%.add: type: expected one of serial", vm.add_device, vm, { type = "floppy" })
        misuse("device%.add: type: expected one of", vm.add_device, vm, {})
        misuse("device%.add: extents%[2%]%.path: missing", vm.add_device, vm,
            { type = "blk", extents = { { path = "/dev/zero" }, {} } })
        misuse("device%.add: extents%[1%]%.unknown key 'pth'", vm.add_device, vm,
            { type = "blk", extents = { { pth = "/dev/zero" } } })
        misuse("no command named 'vm%.fly'", vm.call, vm, "vm.fly")
        misuse("table expected", vm.call, vm, "vm.state", 1)
    end)

    it("takes integers that floats happen to be, and sizes with a unit", function()
        local vm <close> = assert(target.vm { cpus = 1.0, memory = "64k" })
        assert.equal("\0", vm:read(16.0, 1.0))
        assert.equal(65536, vm:stats().ram_bytes)
    end)

    it("refuses an absurd machine in one line", function()
        misuse("vm%.create: cpus: expected an integer from 1 to", target.vm, { cpus = 0 })
        misuse("vm%.create: cpus: expected an integer from 1 to", target.vm, { cpus = 100000 })
        misuse("vm%.create: memory: expected a size", target.vm, { memory = "999999T" })
        misuse("vm%.create: unknown key 'mem'", target.vm, { mem = 1 })
        refused("vm%.create: ", target.vm { memory = 4097 })
    end)

    it("refuses what the state does not allow", function()
        local vm <close> = boot(target, asm.forever)
        misuse("vm%.pause: not while the VM is created", vm.pause, vm)
        assert(vm:start())
        misuse("vm%.start: not while the VM is running", vm.start, vm)
        misuse("device%.add: not while the VM is running", vm.add_device, vm, { type = "serial" })
        misuse("vm%.create: not while", vm.call, vm, "vm.create", {})
        assert(vm:kill())
        refused("vm%.pause: the VM has stopped %(killed%)", vm:pause())
    end)

    it("refuses files that are not what they should be", function()
        local vm <close> = assert(target.vm { memory = "16M" })
        refused("kernel%.load: .*/nonexistent", vm:load_kernel { kernel = "/nonexistent" })
        refused("kernel%.load: ", vm:load_kernel { kernel = "/etc/passwd" })
        refused("device%.add: blk: ", vm:add_device {
            type = "blk", readonly = true, extents = { { path = "/nonexistent" } },
        })
        misuse("overlay: not with readonly", vm.add_device, vm, {
            type = "blk", readonly = true, overlay = "/tmp/x", extents = { { path = "/etc/passwd" } },
        })
    end)

    it("drives interrupt lines within reason", function()
        local vm <close> = assert(target.vm { memory = "64K" })
        assert(vm:irq(5, true))
        assert(vm:irq(5, false))
        assert(vm:irq(9))
        misuse("irq%.set: gsi: expected an integer from 0 to", vm.irq, vm, 1 << 20)
    end)

    it("is unusable when closed, and may be closed twice", function()
        local vm = assert(target.vm {})
        vm:close()
        vm:close()
        assert.equal("vm (closed)", tostring(vm))
        misuse("closed vm", vm.state, vm)
        misuse("closed vm", vm.next, vm)
        misuse("closed vm", vm.pollfd, vm)
        misuse("closed vm", vm.call, vm, "vm.state")
    end)
end

local function gives_back(target)
    it("leaves nothing behind, closed in any state", leaks.free(function()
        for _, stage in ipairs { "created", "running", "paused", "stopped" } do
            local vm <close> = boot(target, asm.print(COM1, "x") .. asm.forever)
            assert(vm:add_device { type = "serial" })
            assert(vm:add_device { type = "rng" })
            vm:pollfd()
            if stage ~= "created" then
                assert(vm:start())
            end
            if stage == "paused" then
                assert(vm:pause())
            elseif stage == "stopped" then
                assert(vm:kill())
            end
            assert.equal(stage, vm:state().state)
        end
    end))

    it("leaves nothing behind when it cannot be made", leaks.free(function()
        for _ = 1, 3 do
            refused("vm.create", target.vm { memory = 4097 })
            pcall(target.vm, { mem = 1 })
        end
    end))

    it("leaves nothing behind when it is forgotten", leaks.free(function()
        do
            local vm = boot(target, asm.forever)
            assert(vm:start())
        end
        collectgarbage()
        collectgarbage()
    end))

    it("leaves nothing behind when its task is cancelled or fails", leaks.free(function()
        loop.run(function()
            local running = false
            local waiting = loop.spawn(function()
                local vm <close> = boot(target, asm.forever)
                assert(vm:start())
                running = true
                target.next_event(vm)
                target.next_event(vm)
            end)
            while not running do
                loop.sleep(0.001)
            end
            waiting:cancel()
            local failing = loop.spawn(function()
                local vm <close> = boot(target, asm.forever)
                assert(vm:start())
                error("on purpose")
            end)
            misuse("on purpose", failing.join, failing)
        end)
    end))

    it("runs many at once, a task each", leaks.free(function()
        loop.run(function()
            local tasks = {}
            for i = 1, 8 do
                tasks[i] = loop.spawn(function()
                    local vm <close> = boot(target, asm.print(COM1, ("%d"):format(i)) .. asm.out(0x602, 1))
                    assert(vm:add_device { type = "serial" })
                    assert(vm:start())
                    wait_for(target, vm, { type = "state", state = "stopped" })
                    return vm:read_console()
                end)
            end
            for i, task in ipairs(tasks) do
                assert.equal(tostring(i), task:join(LIMIT))
            end
        end)
    end))

    it("bears a collector that runs all the time", leaks.free(function()
        local steps = 0
        debug.sethook(function()
            steps = steps + 1
            collectgarbage()
        end, "", 20)
        local ok, err = pcall(function()
            local vm <close> = boot(target, asm.print(COM1, "gc") .. asm.out(0x602, 1))
            assert(vm:add_device { type = "serial" })
            assert(vm:start())
            assert.equal("reboot", wait_for(target, vm, { type = "state", state = "stopped" }).reason)
            assert.equal("gc", vm:read_console())
            assert.equal(0x1000, #vm:read(0, 0x1000))
            assert.is_table(vm:stats().vcpus)
        end)
        debug.sethook()
        assert(ok, err)
        assert.is_true(steps > 3)
    end))
end

local function saves_and_loads(target)
    local function saved(dir)
        local vm = boot(target, asm.print(COM1, "hello") .. asm.store16(0x2000) .. asm.forever)
        assert(vm:add_device { type = "serial" })
        assert(vm:start())
        until_u16(vm, 0x2000, ("o"):byte())
        wait_for(target, vm, { type = "console" })
        assert.equal("hello", vm:read_console())
        assert(vm:write(0x3000, "only in RAM"))
        assert(vm:pause())
        local result = assert(vm:save { path = dir .. "/a", meta = "its owner's words" })
        return vm, result
    end

    it("is saved, goes on, and comes back as a copy, lazily and eagerly", leaks.free(function()
        local dir = shell.tmpdir()
        local vm <close>, result = saved(dir)
        assert.equal(1 << 20, result.ram_bytes)
        assert.matches("^%x+$", result.id)
        assert(vm:resume())
        for _, eager in ipairs { false, true } do
            local copy <close> = assert(target.vm {})
            assert(copy:add_device { type = "serial" })
            assert.equal(result.id, assert(copy:load { path = dir .. "/a", eager = eager }).id)
            assert(copy:start())
            assert.equal("only in RAM", copy:read(0x3000, 11))
            assert(copy:write(0x3000, "of the copy"))
            assert.equal("only in RAM", vm:read(0x3000, 11))
            assert(copy:pause())
            assert.equal(vm:regs(0, { "rip" }).rip, copy:regs(0, { "rip" }).rip)
        end
        shell.remove(dir)
    end))

    it("says what a snapshot is", function()
        local dir = shell.tmpdir()
        do
            local vm <close> = saved(dir)
            assert.equal(1, vm:stats().vcpus and #vm:stats().vcpus)
        end
        local info = assert(core.snapshot(dir .. "/a", true))
        assert.equal("its owner's words", info.meta)
        assert.equal(1, info.cpus)
        assert.equal(1 << 20, info.ram_bytes)
        refused("this is no snapshot", core.snapshot "/etc/passwd")
        refused("No such file", core.snapshot "/nonexistent/x")
        shell.remove(dir)
    end)

    it("refuses to save over anything, and leaves nothing half-made", function()
        local dir = shell.tmpdir()
        local vm <close> = saved(dir)
        refused("snapshot%.save: .*/a: it is not an empty file", vm:save { path = dir .. "/a" })
        refused("snapshot%.save: /nonexistent/x: [Nn]o such file", vm:save { path = "/nonexistent/x" })
        assert(vm:resume())
        misuse("not while the VM is running", vm.save, vm, { path = dir .. "/b" })
        assert.is_nil(io.open(dir .. "/b"))
        shell.remove(dir)
    end)

    it("refuses to be loaded with what does not fit, and then never runs", function()
        local dir = shell.tmpdir()
        do
            local _ <close> = saved(dir)
        end
        local bare <close> = assert(target.vm {})
        refused("4 devices, this machine 3", bare:load { path = dir .. "/a" })
        refused("has stopped", bare:start())
        local other <close> = assert(target.vm { cpus = 2 })
        assert(other:add_device { type = "serial" })
        refused("it has 1 vCPUs, this machine 2", other:load { path = dir .. "/a" })
        local full <close> = assert(target.vm { memory = "1M" })
        refused("memory of its own", full:load { path = dir .. "/a" })
        local none <close> = assert(target.vm {})
        refused("this is no snapshot", none:load { path = "/etc/passwd" })
        shell.remove(dir)
    end)
end

--- Describe the contract for one target.
---@param target table one of M.targets
---@param env table the spec's own environment
function M.describe(target, env)
    describe, it = env.describe, env.it
    describe("a VM " .. target.name, function()
        runs_programs(target)
        says_how_it_ended(target)
        guards_memory(target)
        refuses_misuse(target)
        gives_back(target)
        saves_and_loads(target)
    end)
end

return M
