-- SPDX-License-Identifier: Apache-2.0
--
-- A machine that was booted to its init is saved by sm and by QEMU (a migration
-- into a file) RUNS times, whole and while it runs (how long does it stand still?), and
-- each of them makes it again RUNS times, in turn: from the start of a process to a
-- guest that runs, and to the first letter it says; of sm also from a program that runs
-- already, as one that embeds it does (QEMU has but its process to compare with). The
-- saved machines and sm itself lie in $XDG_RUNTIME_DIR, a tmpfs: in the lab the
-- tree is on a 9p that caches nothing, which QEMU's program is not. In the counting
-- lab a nanosecond is an instruction.
--
--   sm spec/bench/restore.lua KERNEL INITRD [RUNS]
--   sm spec/bench/restore.lua --again FILE      (the part of it that is measured)

local json = require "sm.json"
local loop = require "sm.loop"
local uv = require "luv"
local worker = require "sm.worker"

local MEMORY = 256 << 20
local CMDLINE = "console=ttyS0 panic=-1 quiet mitigations=off reboot=t stay"
local QEMU = { "-accel", "kvm", "-cpu", "host", "-M", "microvm,rtc=on", "-m", "256", "-nodefaults", "-no-user-config",
    "-display", "none", "-serial", "stdio", "-no-reboot" }

-- ------------------------------------------------------------------- sm

-- Console output until it matches. Yields.
local function hear(w, pattern)
    local text = ""
    repeat
        local event = assert(w:next_event())
        assert(event.state ~= "stopped", event.reason)
        if event.type == "console" then
            text = text .. assert(w:call("console.read", {}))
        end
    until text:find(pattern)
end

if arg[1] == "--again" then
    local w
    local times = { uv.hrtime() } -- of a program that runs already
    local function call(name, args)
        assert(w:call(name, args))
        times[#times + 1] = uv.hrtime() - times[1]
    end
    w = assert(worker.spawn { name = "again" })
    call("vm.create", { cpus = 1 })
    call("device.add", { type = "serial" })
    call("snapshot.load", { path = arg[2] })
    call("vm.start", {})
    print "running"
    io.stdout:flush()
    hear(w, "t")
    times[#times + 1] = uv.hrtime() - times[1]
    print("times " .. table.concat(times, " ", 2))
    print "speaks"
    io.stdout:flush()
    w:close()
    return
end

local kernel, initrd, runs = arg[1], arg[2], tonumber(arg[3] or 5)
local dir = assert(uv.fs_mkdtemp((os.getenv "XDG_RUNTIME_DIR" or "/tmp") .. "/bench-XXXXXX"))
local saved = { sm = dir .. "/sm.sms", qemu = dir .. "/qemu.state" }

local function stands_still(fn)
    local began = uv.hrtime()
    fn()
    return uv.hrtime() - began
end

local function save_sm()
    local w = assert(worker.spawn { name = "bench" })
    assert(w:call("vm.create", { cpus = 1, memory = MEMORY }))
    assert(w:call("device.add", { type = "serial" }))
    assert(w:call("kernel.load", { kernel = kernel, initrd = initrd, cmdline = CMDLINE }))
    assert(w:call("vm.start", {}))
    hear(w, "init at .*t")
    local whole, live = {}, {}
    for i = 1, runs do
        os.remove(saved.sm)
        assert(w:call("snapshot.begin", { path = saved.sm, live = true }))
        repeat
            local left = assert(w:call("snapshot.copy", {}))
        until left == 0
        live[i] = stands_still(function()
            assert(w:call("vm.pause", {}))
            assert(w:call("snapshot.capture", {}))
            assert(w:call("vm.resume", {}))
        end)
        assert(w:call("snapshot.finish", { meta = "", sync = false }))
        os.remove(saved.sm)
        whole[i] = stands_still(function()
            assert(w:call("vm.pause", {}))
            assert(w:call("snapshot.save", { path = saved.sm, meta = "", sync = false }))
            assert(w:call("vm.resume", {}))
        end)
    end
    w:close()
    return whole, live
end

-- ------------------------------------------------------------- processes

-- sm where it is cached like any installed program, with all that it loads: the lab's
-- files are the host's, and to ask for one that is not there is to wait.
local function install()
    assert(os.execute(("mkdir %s/build && cp -rp sm lua spec/bench/restore.lua %s/ && cp -rL build/sm build/sm-worker %s %s %s/build/"):format(
        dir, dir, package.searchpath("luv", package.cpath), package.searchpath("cjson", package.cpath), dir)))
    assert(os.execute(("lua5.4 scripts/compile-lua lua %s/build/luac %s/lua"):format(dir, dir)))
    uv.os_setenv("LUA_PATH", dir .. "/lua/?.lua")
    uv.os_setenv("LUA_CPATH", dir .. "/build/?.so")
end

-- A process whose output is waited for. Yields where it waits.
local function spawn(path, args)
    local out, self = uv.new_pipe(), { text = "", began = uv.hrtime() }
    local waiting
    self.handle = assert(uv.spawn(path, { args = args, stdio = { nil, out, 2 } }, loop.guard(function()
        self.gone = true
        self.handle:close()
        if waiting then
            waiting(true)
        end
    end)))
    out:read_start(loop.guard(function(_, chunk)
        self.text = self.text .. (chunk or "")
        if not chunk then
            out:close()
        elseif waiting then
            waiting(true)
        end
    end))
    function self.wait(done)
        while not done(self) do
            loop.await(function(settle)
                waiting = settle
            end)
            waiting = nil
        end
        return uv.hrtime() - self.began
    end
    return self
end

local function says(pattern)
    return function(process)
        assert(not process.gone or process.text:find(pattern), "it ended: " .. process.text)
        return process.text:find(pattern)
    end
end

local function gone(process)
    return process.gone
end

-- ------------------------------------------------------------------ QEMU

-- Its monitor, once it listens. Yields.
local function monitor(path)
    local pipe, self = nil, { text = "" }
    repeat
        local ok = loop.await(function(settle)
            pipe = uv.new_pipe()
            pipe:connect(path, loop.guard(function(err)
                settle(not err)
            end))
        end)
        if not ok then
            pipe:close()
            loop.sleep(0.002)
        end
    until ok
    local waiting
    pipe:read_start(loop.guard(function(_, chunk)
        self.text = self.text .. (chunk or "")
        if waiting then
            waiting(true)
        end
    end))
    function self.expect(pattern)
        while not self.text:find(pattern) do
            loop.await(function(settle)
                waiting = settle
            end)
            waiting = nil
        end
    end
    function self.tell(command, arguments)
        self.text = ""
        pipe:write(json.encode { execute = command, arguments = arguments } .. "\n")
        self.expect '"return"'
        return self.text
    end
    self.expect '"QMP"'
    self.tell "qmp_capabilities"
    return self
end

local function qemu(more)
    local path = ("%s/qmp-%d"):format(dir, uv.hrtime())
    local args = table.move(QEMU, 1, #QEMU, 1, { })
    table.move({ "-kernel", kernel, "-initrd", initrd, "-append", CMDLINE,
        "-qmp", "unix:" .. path .. ",server=on,wait=off" }, 1, 8, #args + 1, args)
    return spawn("qemu-system-x86_64", table.move(more or {}, 1, #(more or {}), #args + 1, args)), path
end

local function save_qemu()
    local process, path = qemu()
    process.wait(says "init at .*t")
    local m = monitor(path)
    m.tell("migrate-set-parameters", { ["max-bandwidth"] = 1 << 40 }) -- none of the waiting it is made for
    local function migrate()
        local status
        m.tell("migrate", { uri = "exec:cat > " .. saved.qemu })
        repeat
            loop.sleep(0.002)
            status = m.tell "query-migrate"
            assert(not status:find '"failed"', status)
        until status:find '"completed"'
        return status
    end
    local whole, live = {}, {}
    for i = 1, runs do
        live[i] = tonumber(migrate():match '"downtime": *(%d+)') * 1000000 -- its own word, in ms
        m.tell "cont"
        whole[i] = stands_still(function()
            m.tell "stop"
            migrate()
            m.tell "cont"
        end)
    end
    m.tell "stop"
    migrate() -- as the copies expect it
    m.tell "quit"
    process.wait(gone)
    return whole, live
end

-- The source was stopped, so the copy has to be told to go on.
local function again_qemu()
    local process, path = qemu { "-incoming", "exec:cat " .. saved.qemu }
    local m = monitor(path)
    repeat
        local status = m.tell "query-status"
        if status:find '"inmigrate"' then
            loop.sleep(0.001)
        end
    until not status:find '"inmigrate"'
    m.tell "cont"
    local running = uv.hrtime() - process.began
    local speaks = process.wait(says "t")
    m.tell "quit"
    process.wait(gone)
    return running, speaks
end

local function again_sm()
    local process = spawn(dir .. "/sm", { dir .. "/restore.lua", "--again", saved.sm })
    local running = process.wait(says "running")
    local speaks = process.wait(says "speaks")
    process.wait(gone)
    local times = {}
    for t in process.text:match("times (%C+)"):gmatch "%S+" do
        times[#times + 1] = tonumber(t)
    end
    return running, speaks, times
end

-- ---------------------------------------------------------------- results

-- The least: the counting lab's clock jumps ahead while everybody waits for a disk.
local function least(list)
    return math.min(table.unpack(list))
end

local sm_whole, sm_live = save_sm()
local qemu_whole, qemu_live = save_qemu()
install()
local running, speaks = { sm = {}, qemu = {} }, { sm = {}, qemu = {} }
local steps = { {}, {}, {}, {}, {} }
for i = 1, runs do
    local times
    running.sm[i], speaks.sm[i], times = again_sm()
    for k, list in ipairs(steps) do
        list[i] = times[k]
    end
    running.qemu[i], speaks.qemu[i] = again_qemu()
end
print(("%-56s %12s %12s %8s"):format("a 256 MiB machine, least of " .. runs, "sm", "QEMU", "ratio"))
local function row(what, a, b)
    print(("%-56s %12.0f %12.0f %8.3f"):format(what .. ", us", a / 1000, b / 1000, a / b))
end
row("stands still while saved whole", least(sm_whole), least(qemu_whole))
row("… copied while it runs", least(sm_live), least(qemu_live))
row("start of the process to a guest that runs", least(running.sm), least(running.qemu))
row("… to its first letter", least(speaks.sm), least(speaks.qemu))
row("from a program that runs already to a guest that runs", least(steps[4]), least(running.qemu))
row("… from snapshot.load to its answer", least(steps[3]) - least(steps[2]), least(running.qemu))
row("… from snapshot.load to a guest that runs", least(steps[4]) - least(steps[2]), least(running.qemu))
row("… from snapshot.load to its first letter", least(steps[5]) - least(steps[2]), least(speaks.qemu))
os.execute("rm -rf " .. dir)
