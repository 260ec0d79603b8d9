-- SPDX-License-Identifier: Apache-2.0
--
-- The two ways of an image into a guest, virtio-blk and virtio-pmem with DAX:
-- every byte of every file is what umoci unpacks; what the guest's page cache
-- holds after reading all of it; and which pages of the host two guests share.

local sm = require "sm"
local spec = require "support.vm"

-- SM_SPEC_KERNEL=stock: Debian's, whose drivers are modules.
local KERNEL = os.getenv "SM_SPEC_KERNEL" or "own"
local MIB = 1 << 20
-- What the agent writes into a root that lacks it.
local OURS = { ["./etc/hostname"] = true, ["./etc/hosts"] = true, ["./etc/resolv.conf"] = true }

local function read_sums(text)
    local sums, n = {}, 0
    for sum, name in text:gmatch("(%x+)  ([^\n]+)\n") do
        sums[name] = sum
        n = n + 1
    end
    return sums, n
end

local function host_sums(tag)
    local f = assert(io.open(os.getenv "SM_SPEC_IMAGES" .. "/" .. tag .. ".sums"))
    local text = f:read("a")
    f:close()
    return read_sums(text)
end

-- Bytes of files of the image store that a process maps: resident, and its
-- proportional share of them.
local function mapped(pid)
    local rss, pss, ours = 0, 0, false
    for line in io.lines(("/proc/%d/smaps"):format(pid)) do
        local path = line:match "^%x+%-%x+ %S+ %S+ %S+ %S+ *(.*)$"
        if path then
            ours = path:find("/derived/", 1, true) ~= nil
        elseif ours then
            rss = rss + 1024 * tonumber(line:match "^Rss: +(%d+) kB" or 0)
            pss = pss + 1024 * tonumber(line:match "^Pss: +(%d+) kB" or 0)
        end
    end
    return rss, pss
end

describe("the image in the guest", function()
    local vms = {}

    teardown(function()
        for _, vm in ipairs(vms) do
            vm:close()
        end
        assert.same({}, spec.leftovers())
    end)

    local function start(rootfs, tag)
        local vm = assert(sm.start(assert(sm.image(spec.image(tag or "wide"))), {
            memory = "192M", rootfs = rootfs, kernel = KERNEL, boot_timeout = 600,
        }))
        vms[#vms + 1] = vm
        return vm
    end
    local function sh(vm, script)
        local r = assert(vm:exec { argv = { "/bin/sh", "-c", script } })
        assert.equal(0, r.status, r.stderr)
        return r.stdout
    end
    local function cached(vm)
        return 1024 * tonumber(sh(vm, "grep ^Cached: /proc/meminfo"):match "%d+")
    end
    local ALL = "cd /; find . -xdev -type f -print0 | xargs -0 sha256sum"

    local function same_files(vm, tag)
        local want, n = host_sums(tag)
        local have = read_sums(sh(vm, ALL))
        assert.is_true(n > 10)
        for name, sum in pairs(want) do
            assert.equal(sum, have[name], name)
        end
        for name in pairs(have) do
            assert.is_true(want[name] ~= nil or OURS[name] == true, name)
        end
        return n
    end

    local on_blk
    it("on virtio-blk: every file as the host has it, and a page cache that holds it", function()
        local vm = start "blk"
        local before = cached(vm)
        assert.is_true(same_files(vm, "wide") > 256)
        on_blk = cached(vm) - before
        assert.is_true(on_blk > 24 * MIB, on_blk)
        assert.equal(0, (mapped(vm.parts.worker:pid())))
        vm:close()
    end)

    it("on virtio-pmem: the same files, and almost no page cache", function()
        local vm = start "pmem"
        assert.matches("DAX enabled", sh(vm, "dmesg | grep -i erofs"))
        local before = cached(vm)
        same_files(vm, "wide")
        local held = cached(vm) - before
        io.stderr:write(("page cache after reading the root: blk %d KiB, pmem %d KiB\n"):format(on_blk >> 10, held >> 10))
        assert.is_true(held < 2 * MIB, held)
        assert.is_true(held * 8 < on_blk)

        -- Another guest of the same image: the same pages of the host.
        local other = start "pmem"
        sh(other, "cat /wide/noise >/dev/null")
        sh(vm, "cat /wide/noise >/dev/null")
        local rss, pss = mapped(vm.parts.worker:pid())
        local rss2, pss2 = mapped(other.parts.worker:pid())
        io.stderr:write(("mapped by two guests: %d and %d KiB, their shares %d and %d KiB: %d KiB shared\n"):format(
            rss >> 10, rss2 >> 10, pss >> 10, pss2 >> 10, rss + rss2 - pss - pss2 >> 10))
        assert.is_true(rss >= 24 * MIB and rss2 >= 24 * MIB)
        -- Each pays half of what both have.
        assert.is_true(rss + rss2 - pss - pss2 >= 24 * MIB)
    end)

    it("on virtio-pmem: a file that is written to is the guest's own", function()
        local vm = vms[2]
        local function sums()
            local out = {}
            for i, extent in ipairs(vm.image.extents) do
                out[i] = assert(require "sm.image_core".sha256 { file = extent.path })
            end
            return out
        end
        local before = sums()
        assert.equal("two\nx\n", sh(vm, "cat /data/changed; echo x > /data/changed; cat /data/changed"))
        sh(vm, "dd if=/dev/zero of=/wide/noise bs=4096 count=100 conv=notrunc 2>/dev/null; sync")
        assert.same(before, sums())
        assert.equal("two\n", sh(vms[3], "cat /data/changed"))
    end)

    it("by flag", function()
        local code, out, err = spec.sm("run -q --rootfs pmem --kernel " .. KERNEL .. " " .. spec.image "one"
            .. " sh -c 'ls /sys/block | grep pmem; head -n 1 /etc/passwd'")
        assert.equal("", err)
        assert.equal(0, code)
        assert.equal("pmem0\nroot:x:0:0:root:/root:/bin/sh\n", out)
        code, _, err = spec.sm("run -q --rootfs disk " .. spec.image "one" .. " true")
        assert.equal(125, code)
        assert.equal("sm: run: rootfs: expected blk or pmem\n", err)
    end)
end)
