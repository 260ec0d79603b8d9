-- SPDX-License-Identifier: Apache-2.0
--
-- What the KVM specs share: the images made for them and ./sm as a process.

local shell = require "support.shell"
local uv = require "luv"

local M = {}

-- Live VMs of others on this machine are none of a spec's business: it has a
-- runtime folder of its own, which also marks its processes.
local runtime = assert(uv.fs_mkdtemp((os.getenv "XDG_RUNTIME_DIR" or "/tmp") .. "/spec-XXXXXX"))
uv.os_setenv("XDG_RUNTIME_DIR", runtime)

--- A reference to one of the images of support/make_images.lua.
---@param tag string
---@return string
function M.image(tag)
    local dir = os.getenv "SM_SPEC_IMAGES"
    assert(dir, "SM_SPEC_IMAGES names the images; scripts/test makes them")
    return ("oci:%s:%s"):format(dir, tag)
end

--- Run ./sm with a shell-quoted tail; returns exit code, stdout, stderr.
---@param tail string
---@param stdin string? a file
---@return integer code
---@return string out
---@return string err
function M.sm(tail, stdin)
    local dir = shell.tmpdir()
    local _, _, code = os.execute(("./sm %s >%s/out 2>%s/err <%s"):format(tail, dir, dir, stdin or "/dev/null"))
    local function slurp(name)
        local f = assert(io.open(dir .. "/" .. name, "rb"))
        local text = f:read("a")
        f:close()
        return text
    end
    local out, err = slurp "out", slurp "err"
    shell.remove(dir)
    return code, out, err
end

--- Processes, sockets and folders of ours that are left behind.
---@return string[]
function M.leftovers()
    local found = {}
    local p = assert(io.popen(([[
        for p in $(grep -lz '^XDG_RUNTIME_DIR=%s$' /proc/[0-9]*/environ 2>/dev/null); do
            readlink "${p%%environ}exe" 2>/dev/null | grep -E '/(sm|sm-worker)( |$)'
        done
        ls -d %s/sm/* 2>/dev/null
    ]]):format(runtime, runtime)))
    for line in p:lines() do
        found[#found + 1] = line
    end
    p:close()
    return found
end

--- The same, once every process of ours had the time to go.
---@return string[]
function M.settled_leftovers()
    local found
    for _ = 1, 100 do
        found = M.leftovers()
        if #found == 0 then
            break
        end
        uv.sleep(100)
    end
    return found
end

--- What a process maps, from /proc/PID/smaps.
---@param pid integer
---@param guest_bytes integer size of the guest's RAM, which is not counted
---@return { private: integer, files: string[] } private bytes that are not the guest's
function M.mappings(pid, guest_bytes)
    local private, files, guest = 0, {}, false
    for line in io.lines(("/proc/%d/smaps"):format(pid)) do
        local from, to, path = line:match "^(%x+)%-(%x+) %S+ %S+ %S+ %S+ *(.*)$"
        if from then
            guest = tonumber(to, 16) - tonumber(from, 16) >= guest_bytes
            files[#files + 1] = path ~= "" and path or nil
        elseif not guest then
            private = private + 1024 * (tonumber(line:match "^Private_%a+: +(%d+) kB") or 0)
        end
    end
    return { private = private, files = files }
end

return M
