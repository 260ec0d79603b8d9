-- SPDX-License-Identifier: Apache-2.0
--
-- Many copies of one template alive at once, each of which says its own name; and
-- what one of them costs the host in memory of its own.
--
--   sm spec/soak/clones.lua IMAGE COPIES

local sm = require "sm"
local loop = sm.loop
local image, total = arg[1], tonumber(arg[2])
local AT_ONCE = 4

local function private_kib(pid)
    local f <close> = assert(io.open(("/proc/%d/smaps_rollup"):format(pid)))
    local text = f:read "a"
    return (text:match "Private_Clean: *(%d+)" + 0) + (text:match "Private_Dirty: *(%d+)" + 0)
end

local dir = os.getenv "TMPDIR" or "/tmp" -- a disk of this kernel, and emptied (support/on_lab_disk)
local path = ("%s/clones-%d.sms"):format(dir, require("luv").os_getpid())
local template
do
    local vm <close> = assert(sm.start(image, { memory = "64M" }))
    template = assert(vm:snapshot { path = path })
end

local copies, names, made, answered = {}, {}, 0, 0
local tasks = {}
for t = 1, AT_ONCE do
    tasks[t] = loop.spawn(function()
        while made < total do
            made = made + 1
            local vm = assert(sm.restore(template, { boot_timeout = 600 }))
            copies[#copies + 1] = vm
            local r = assert(vm:exec { argv = { "hostname" }, timeout = 300 })
            local name = r.stdout:gsub("\n", "")
            assert(name == vm.id and not names[name], "another's name: " .. name)
            names[name] = true
            answered = answered + 1
            if answered % 50 == 0 then
                print(answered .. " copies")
            end
        end
    end)
end
for _, task in ipairs(tasks) do
    task:join()
end
local least, sum = math.huge, 0
for _, vm in ipairs(copies) do
    assert(not vm.ending, vm.ending and vm:obituary())
    assert(vm.parts.agent:ping(300))
    local kib = private_kib(vm.parts.worker:pid())
    least, sum = math.min(least, kib), sum + kib
end
print(("%d copies alive at once, each of its own name; private memory of a worker with its guest: %d KiB mean, %d KiB least"):format(
    #copies, sum // #copies, least))
for _, vm in ipairs(copies) do
    vm:close()
end
assert(sm.snapshot.remove(template))
