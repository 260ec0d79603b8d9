-- SPDX-License-Identifier: Apache-2.0
--
-- Finding a guest kernel and making it ready to load.
--
-- A VM loads an ELF vmlinux by its PVH entry (a note in the file; Linux
-- include/xen/interface/elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY). Kernels come
-- from three places: ours (scripts/kernel), Debian's (scripts/stock-kernel),
-- both as folders in the cache, or a file the user names. A bzImage is
-- unpacked on the host once: beside itself in a cache folder, else to
-- <cache>/kernel/unpacked, under a name made of the file's identity, so the
-- next run does not even read it.
--
-- A kernel folder: vmlinux or bzImage, `info` (key=value lines), and for a
-- kernel with drivers as modules modules/<name>.ko, modules/order (insertion
-- order of those every guest needs), modules/extra (others, to follow those).
--
-- The file is a stranger's: every offset is checked against its length, and
-- what is no kernel gets one line that says so.

local uv = require "luv"
local paths = require "sm.paths"

local M = {}

local NOTE_PHYS32_ENTRY = 18
local PT_LOAD, PT_NOTE = 1, 4
local EM_X86_64 = 62
-- More than any kernel has; bounds what a file can make us read.
local MAX_PROGRAM_HEADERS, MAX_NOTE_BYTES, MAX_TEXT_BYTES = 64, 1 << 20, 1 << 20

---@class sm.Kernel
---@field path string a vmlinux ELF file with a PVH entry
---@field initrd_modules {name: string, path: string}[] to insert, in this order
---@field extra_modules {name: string, path: string}[] for some machines, after those
---@field version string? the release, as `uname -r` tells it
---@field source "own"|"stock"|"path"

local function not_a_kernel(path, why)
    return nil, ("%s: not a kernel: %s"):format(path, why)
end

-- Exactly `bytes` at `offset`, or nil.
local function read_at(fd, offset, bytes)
    local data = uv.fs_read(fd, bytes, offset)
    return data and #data == bytes and data or nil
end

-- A small text file, whole, or nil.
local function read_text(path)
    local file = io.open(path, "rb")
    local text = file and file:read(MAX_TEXT_BYTES)
    if file then
        file:close()
    end
    return text
end

-- Whether the notes hold the PVH entry. ELF: namesz, descsz, type, name
-- padded to 4, description padded to 4.
local function has_pvh_note(notes)
    local pos = 1
    while pos + 12 <= #notes + 1 do
        local namesz, descsz, kind = string.unpack("<I4I4I4", notes, pos)
        local name = pos + 12
        local desc = name + (namesz + 3 & ~3)
        local following = desc + (descsz + 3 & ~3)
        if desc + descsz > #notes + 1 then
            return false
        end
        if kind == NOTE_PHYS32_ENTRY and descsz >= 4
            and notes:sub(name, name + namesz - 1) == "Xen\0" then
            return true
        end
        pos = following
    end
    return false
end

local function check_elf(path, fd, size)
    local header = read_at(fd, 0, 64)
    if not header then
        return not_a_kernel(path, "cut inside the ELF header")
    end
    local class, data = header:byte(5, 6)
    local kind, machine = string.unpack("<I2I2", header, 17)
    local phoff = string.unpack("<I8", header, 33)
    local phentsize, phnum = string.unpack("<I2I2", header, 55)
    if class ~= 2 or data ~= 1 or machine ~= EM_X86_64 then
        return not_a_kernel(path, "an ELF file, but not for x86_64")
    elseif kind ~= 2 and kind ~= 3 then
        return not_a_kernel(path, "an ELF file, but not an executable (a module?)")
    elseif phentsize ~= 56 or phnum == 0 or phnum > MAX_PROGRAM_HEADERS then
        return not_a_kernel(path, "its program headers make no sense")
    end
    local table_bytes = phentsize * phnum
    local headers = phoff >= 0 and phoff <= size - table_bytes and read_at(fd, phoff, table_bytes)
    if not headers then
        return not_a_kernel(path, "cut inside its program headers")
    end
    local pvh = false
    for i = 0, phnum - 1 do
        local p_type, _, offset, _, _, filesz = string.unpack("<I4I4I8I8I8I8", headers, i * 56 + 1)
        if p_type == PT_LOAD or p_type == PT_NOTE then
            if offset < 0 or filesz < 0 or filesz > size or offset > size - filesz then
                return not_a_kernel(path, "a segment lies outside the file (cut short?)")
            end
        end
        if p_type == PT_NOTE and not pvh and filesz <= MAX_NOTE_BYTES then
            local notes = filesz > 0 and read_at(fd, offset, filesz)
            pvh = notes and has_pvh_note(notes) or false
        end
    end
    if not pvh then
        return not_a_kernel(path, "no PVH entry note (a program, or Linux without CONFIG_PVH)")
    end
    return true
end

-- The kind of a file: "elf" (checked) or "bzImage"; and its identity.
local function inspect(path)
    local fd, err = uv.fs_open(path, "r", 0)
    if not fd then
        return nil, ("%s: %s"):format(path, (err:gsub("^%u+: ", ""):gsub(": .*$", "")))
    end
    local stat = uv.fs_fstat(fd)
    local kind, why
    if stat.type ~= "file" then
        kind, why = not_a_kernel(path, "not a regular file")
    else
        local head = uv.fs_read(fd, 0x206, 0) or ""
        if head:sub(1, 4) == "\x7fELF" then
            kind, why = check_elf(path, fd, stat.size)
            kind = kind and "elf"
        elseif head:sub(0x203, 0x206) == "HdrS" then
            kind = "bzImage"
        elseif #head == 0 then
            kind, why = not_a_kernel(path, "it is empty")
        else
            kind, why = not_a_kernel(path, "neither an ELF file nor a bzImage")
        end
    end
    uv.fs_close(fd)
    return kind, why, stat
end

-- The release in a bzImage's header (boot protocol: kernel_version), or nil.
local function bzimage_release(path)
    local file = io.open(path, "rb")
    local head = file and file:read(32 << 10)
    if file then
        file:close()
    end
    if not head or #head < 0x210 then
        return nil
    end
    local at = string.unpack("<I2", head, 0x20f)
    return at ~= 0 and head:match("^[%w.+~_-]+", at + 0x201) or nil
end

local function unpack_to(bzimage, out)
    local core = require "sm.image_core"
    local ok, err = core.unpack_kernel(bzimage, out)
    if not ok then
        return nil, err
    end
    -- The payload is as strange as the file it came in.
    ok, err = inspect(out)
    if not ok then
        uv.fs_unlink(out)
        return nil, (err:gsub("^" .. out:gsub("%p", "%%%0"), (bzimage:gsub("%%", "%%%%"))))
    end
    return out
end

-- The vmlinux of a file, unpacked where that is needed.
local function prepare(path, beside)
    local kind, err, stat = inspect(path)
    if kind ~= "bzImage" then
        return kind and path, err
    end
    local out = beside
    if not out then
        local dir = paths.cache() .. "/kernel/unpacked"
        local ok
        ok, err = paths.make(dir)
        if not ok then
            return nil, err
        end
        local id = ("%s\0%d\0%d\0%d\0%d.%d\0%d.%d"):format(uv.fs_realpath(path), stat.dev, stat.ino,
            stat.size, stat.mtime.sec, stat.mtime.nsec, stat.ctime.sec, stat.ctime.nsec)
        local name = require "sm.image_core".sha256(id):match("%x+$")
        out = ("%s/%s.vmlinux"):format(dir, name)
    end
    if uv.fs_stat(out) then
        return out
    end
    return unpack_to(path, out)
end

local function module_list(dir, name)
    local list = {}
    for line in (read_text(dir .. "/modules/" .. name) or ""):gmatch("[^\n]+") do
        if not line:match("^[%w_.-]+%.ko$") then
            return nil, ("%s/modules/%s: bad module name %q"):format(dir, name, line)
        end
        list[#list + 1] = { name = line, path = dir .. "/modules/" .. line }
    end
    return list
end

local function with_modules(kernel, dir)
    local err
    kernel.initrd_modules, err = module_list(dir, "order")
    if kernel.initrd_modules then
        kernel.extra_modules, err = module_list(dir, "extra")
    end
    if err then
        return nil, err
    end
    return kernel
end

-- A kernel folder, or nil when there is none (no error) or a broken one.
local function from_folder(dir, source)
    dir = uv.fs_realpath(dir)
    if not dir then
        return nil
    end
    local info = read_text(dir .. "/info") or ""
    local kernel = { source = source, version = info:match("release=([^\n]+)") }
    local err
    if uv.fs_stat(dir .. "/vmlinux") then
        kernel.path, err = prepare(dir .. "/vmlinux")
    elseif uv.fs_stat(dir .. "/bzImage") then
        kernel.path, err = prepare(dir .. "/bzImage", dir .. "/vmlinux")
    else
        return nil, dir .. ": holds neither vmlinux nor bzImage"
    end
    if not kernel.path then
        return nil, err
    end
    return with_modules(kernel, dir)
end

local function from_file(path)
    local kernel = { source = "path", version = bzimage_release(path) }
    local err
    kernel.path, err = prepare(path)
    if not kernel.path then
        return nil, err
    end
    -- A kernel out of a kernel folder keeps its drivers.
    return with_modules(kernel, path:match("^(.*)/[^/]*$") or ".")
end

local CACHED = {
    { name = "own", folder = "current", make = "`make kernel` builds it" },
    { name = "stock", folder = "stock", make = "`scripts/stock-kernel` fetches it" },
}

--- Find a kernel. `spec` is nil (ours if it is built, else Debian's if it is
--- fetched), "own", "stock", or the path of a vmlinux, a bzImage or a kernel
--- folder (a file called "own" is "./own").
---@param spec string?
---@return sm.Kernel? kernel
---@return string? err
function M.find(spec)
    if spec ~= nil and type(spec) ~= "string" then
        error("kernel.find: a string or nil expected, got " .. type(spec), 2)
    end
    local known = false
    for _, cached in ipairs(CACHED) do
        if spec == nil or spec == cached.name then
            known = true
            local kernel, err = from_folder(paths.cache() .. "/kernel/" .. cached.folder, cached.name)
            if kernel or err then
                return kernel, err
            elseif spec then
                return nil, ("no %s kernel: %s"):format(spec, cached.make)
            end
        end
    end
    if known then
        return nil, "no guest kernel: `make kernel` builds ours, `scripts/stock-kernel` fetches Debian's"
    elseif spec == "" or spec:find("\0", 1, true) then
        return nil, "kernel: the path is empty or holds a NUL"
    end
    local stat = uv.fs_stat(spec)
    if stat and stat.type == "directory" then
        return from_folder(spec, "path")
    end
    return from_file(spec)
end

return M
