-- SPDX-License-Identifier: Apache-2.0
--
-- sm doctor: what this machine can do, what is missing, and how to get it.
-- Exit code 0 when `sm run` can work, 1 when something it needs is missing.

local uv = require "luv"
local paths = require "sm.paths"

local rows, bad

local function row(state, what, detail)
    rows[#rows + 1] = { state, what, detail }
    bad = bad or state == "no"
end

-- By errno of the probe.
local KVM_HELP = {
    [2] = "no /dev/kvm here: no virtualisation, or the module is not loaded (modprobe kvm_amd or kvm_intel)",
    [13] = "/dev/kvm is there, but not for you: usermod -aG kvm USER, and log in again",
    [95] = "/dev/kvm is too old: Linux 5.4 or newer is needed",
}

local function check_kvm()
    local info, err, errno = require("sm.core").probe()
    if not info then
        row("no", "kvm", KVM_HELP[errno] or err)
    elseif not info.hardware then
        row("no", "kvm", "/dev/kvm is there, but the CPU has no virtualisation (vmx, svm) behind it: guests would be "
            .. "interpreted, a thousand times too slow; use a machine with it, or scripts/with-kvm")
    else
        row("ok", "kvm", ("%s, up to %d virtual CPUs"):format(info.backend, info.max_vcpus))
    end
end

local function check_kernel()
    local kernel = require "sm.kernel"
    local any
    for _, source in ipairs { "own", "stock" } do
        local found = kernel.find(source)
        if found then
            row("ok", "kernel", ("%s: %s"):format(source, found.version or found.path))
            any = true
        end
    end
    if not any then
        row("no", "kernel", "no guest kernel yet: `make kernel` builds ours (minutes), scripts/stock-kernel fetches Debian's")
    end
end

local function check_tools()
    for _, tool in ipairs { { "mke2fs", "/sbin/mke2fs", "apt-get install e2fsprogs" } } do
        if uv.fs_stat(tool[2]) then
            row("ok", tool[1], tool[2])
        else
            row("no", tool[1], "missing: " .. tool[3])
        end
    end
end

local function check_folders()
    for _, name in ipairs { "data", "cache", "runtime" } do
        local dir = paths[name]()
        local ok, err = paths.make(dir)
        if ok and uv.fs_access(dir, "W") then
            row("ok", name, dir)
        else
            row("no", name, err or (dir .. ": not writable"))
        end
    end
end

local function check_host()
    local memory = uv.get_total_memory()
    row("ok", "host", ("%s, %d CPUs, %d MiB"):format(uv.os_uname().release, uv.available_parallelism and
        uv.available_parallelism() or #uv.cpu_info(), memory >> 20))
    local f = io.open("/sys/module/kvm/parameters/nx_huge_pages")
    if f then
        local v = f:read("l")
        f:close()
        if v and v ~= "never" and v ~= "N" then
            row("--", "nx_huge_pages", "is on: creating a VM may cost tens of ms in a cgroup; kvm.nx_huge_pages=never if the CPU allows")
        end
    end
end

return {
    usage = "sm doctor",
    about = "Tell what this machine can do, what is missing, and how to get it.",
    flags = {},
    max = 0,
    run = function()
        rows, bad = {}, false
        for _, check in ipairs { check_host, check_kvm, check_kernel, check_tools, check_folders } do
            local ok, err = pcall(check)
            if not ok then
                row("no", "internal", tostring(err):match("[^\n]+"))
            end
        end
        for _, r in ipairs(rows) do
            print(("%-3s %-14s %s"):format(r[1], r[2], r[3]))
        end
        return bad and 1 or 0
    end,
}
