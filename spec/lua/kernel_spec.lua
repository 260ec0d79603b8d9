-- SPDX-License-Identifier: Apache-2.0
local uv = require "luv"
local shell = require "support.shell"

local kernel = require "sm.kernel"
local q, read, write, list = shell.quote, shell.read, shell.write, shell.list

local dir, real_cache

local function note(name, kind, desc)
    local function padded(s)
        return s .. ("\0"):rep(-#s & 3)
    end
    return string.pack("<I4I4I4", #name, #desc, kind) .. padded(name) .. padded(desc)
end

local PVH_NOTE = note("GNU\0", 3, "0123456789abcdefghij") .. note("Xen\0", 18, "\0\0\0\1\0\0\0\0")

-- A small ELF file with one PT_LOAD and one PT_NOTE segment; `change` edits
-- the values before they are written.
local function elf(change)
    local e = { class = 2, type = 2, machine = 62, phoff = 64, phentsize = 56, phnum = 2, notes = PVH_NOTE,
        body = ("kernel text "):rep(9000) }
    if change then
        change(e)
    end
    local notes_at = 64 + 2 * 56
    local body_at = notes_at + #e.notes
    local function segment(kind, offset, size)
        return string.pack("<I4I4I8I8I8I8I8I8", kind, 5, offset, 0x1000000, 0x1000000, size, size, 4096)
    end
    return "\x7fELF" .. string.char(e.class, 1, 1) .. ("\0"):rep(9)
        .. string.pack("<I2I2I4I8I8I8I4I2I2I2I2I2I2", e.type, e.machine, 1, 0x1000000, e.phoff, 0, 0,
            64, e.phentsize, e.phnum, 0, 0, 0)
        .. segment(1, e.load_offset or body_at, e.load_size or #e.body)
        .. segment(4, notes_at, #e.notes) .. e.notes .. e.body
end

-- What the kernel's own build appends: the unpacked length, except for gzip.
local COMPRESSORS = {
    gzip = "gzip -9n",
    xz = "xz --check=crc32 --x86 --lzma2=dict=8MiB -c",
    lzma = "xz --format=lzma -9 -c",
    bzip2 = "bzip2 -9",
    lz4 = "lz4 -l -9 -q -c",
    zstd = "zstd -q -19 -c",
}

local function compress(data, format)
    local input = write(dir .. "/payload", data)
    local out = shell.run(COMPRESSORS[format] .. " < " .. q(input))
    return format == "gzip" and out or out .. string.pack("<I4", #data)
end

-- A bzImage around a payload: boot sector, one set-up sector, a stand-in for
-- the decompressor, the payload, and a tail.
local function bzimage(payload, change)
    local b = { flag = "\x55\xaa", magic = "HdrS", version = 0x020f, sects = 1, offset = 100, length = #payload,
        release = "6.1.0-spec" }
    if change then
        change(b)
    end
    local setup = ("\0"):rep(0x1f1) .. string.char(b.sects) .. ("\0"):rep(0x1fe - 0x1f2) .. b.flag
        .. "\xeb\x6a" .. b.magic .. string.pack("<I2", b.version)
    setup = setup .. ("\0"):rep(0x20e - #setup) .. string.pack("<I2", 0x280 - 0x200)
    setup = setup .. ("\0"):rep(0x248 - #setup) .. string.pack("<I4I4", b.offset, b.length)
    setup = setup .. ("\0"):rep(0x280 - #setup) .. b.release .. " (spec) #1\0"
    setup = setup .. ("\0"):rep(1024 - #setup)
    return setup .. ("d"):rep(100) .. payload .. ("t"):rep(300)
end

-- Everything below the cache that is no folder of ours.
local function leftovers()
    return list(dir .. "/cache/kernel/unpacked")
end

local function kernel_folder(name, files)
    local path = dir .. "/cache/kernel/" .. name .. "-1"
    shell.run { "mkdir", "-p", path .. "/modules" }
    for file, data in pairs(files) do
        write(path .. "/" .. file, data)
    end
    assert(uv.fs_symlink(name .. "-1", dir .. "/cache/kernel/" .. name))
    return path
end

describe("sm.kernel", function()
    before_each(function()
        dir = shell.tmpdir()
        real_cache = os.getenv("SM_CACHE")
        uv.os_setenv("SM_CACHE", dir .. "/cache")
    end)

    after_each(function()
        if real_cache then
            uv.os_setenv("SM_CACHE", real_cache)
        else
            uv.os_unsetenv("SM_CACHE")
        end
        shell.remove(dir)
    end)

    it("says how to get a kernel when there is none", function()
        local k, err = kernel.find()
        assert.is_nil(k)
        assert.matches("no guest kernel", err)
        assert.matches("make kernel", err, 1, true)
        k, err = kernel.find("own")
        assert.is_nil(k)
        assert.matches("make kernel", err, 1, true)
        k, err = kernel.find("stock")
        assert.is_nil(k)
        assert.matches("scripts/stock-kernel", err, 1, true)
    end)

    it("takes a vmlinux with a PVH entry as it is", function()
        local path = write(dir .. "/vmlinux", elf())
        local k = assert(kernel.find(path))
        assert.equal(path, k.path)
        assert.equal("path", k.source)
        assert.same({}, k.initrd_modules)
        assert.is_nil(uv.fs_stat(dir .. "/cache"))
    end)

    it("prefers our own kernel to the stock one, and tells both", function()
        kernel_folder("stock", { vmlinux = elf(), info = "release=6.1.0-stock\n",
            ["modules/order"] = "a.ko\nb-c.ko\n", ["modules/extra"] = "d.ko\n" })
        local k = assert(kernel.find())
        assert.equal("stock", k.source)
        assert.equal("6.1.0-stock", k.version)
        local base = uv.fs_realpath(dir) .. "/cache/kernel/stock-1/modules/"
        assert.same({ { name = "a.ko", path = base .. "a.ko" }, { name = "b-c.ko", path = base .. "b-c.ko" } },
            k.initrd_modules)
        assert.same({ { name = "d.ko", path = base .. "d.ko" } }, k.extra_modules)

        kernel_folder("current", { vmlinux = elf(), info = "release=6.1.1-sm\nrecipe=1\n" })
        k = assert(kernel.find())
        assert.equal("own", k.source)
        assert.equal("6.1.1-sm", k.version)
        assert.same({}, k.initrd_modules)
        assert.equal("stock", assert(kernel.find("stock")).source)
    end)

    it("takes a kernel folder by its path", function()
        local path = kernel_folder("mine", { vmlinux = elf(), ["modules/order"] = "x.ko\n" })
        local k = assert(kernel.find(path))
        assert.equal("path", k.source)
        assert.equal("x.ko", k.initrd_modules[1].name)
        assert.equal("x.ko", assert(kernel.find(path .. "/vmlinux")).initrd_modules[1].name)
    end)

    it("refuses a module list that points elsewhere", function()
        kernel_folder("stock", { vmlinux = elf(), ["modules/order"] = "../../../etc/passwd\n" })
        local k, err = kernel.find("stock")
        assert.is_nil(k)
        assert.matches("bad module name", err)
    end)

    it("is misused with anything but a string", function()
        assert.has_error(function()
            kernel.find(42)
        end, "kernel.find: a string or nil expected, got number")
    end)

    describe("refuses, in one line and leaving nothing,", function()
        local function cut(bytes)
            return function()
                return elf():sub(1, bytes)
            end
        end
        local files = {
            ["an empty file"] = { function() return "" end, "it is empty" },
            ["a text"] = { function() return "#!/bin/sh\n" end, "neither an ELF file nor a bzImage" },
            ["a long text"] = { function() return ("x"):rep(5000) end, "neither an ELF file nor a bzImage" },
            ["an ELF header cut short"] = { cut(40), "cut inside the ELF header" },
            ["program headers cut short"] = { cut(100), "cut inside its program headers" },
            ["an ELF file cut short"] = { cut(4000), "a segment lies outside the file" },
            ["another machine's"] = { function() return elf(function(e) e.machine = 183 end) end, "not for x86_64" },
            ["a 32-bit ELF file"] = { function() return elf(function(e) e.class = 1 end) end, "not for x86_64" },
            ["a module"] = { function() return elf(function(e) e.type = 1 end) end, "not an executable" },
            ["a program"] = { function()
                return elf(function(e) e.notes = note("GNU\0", 3, "0123456789abcdefghij") end)
            end, "no PVH entry" },
            ["a note that ends outside"] = { function()
                return elf(function(e) e.notes = string.pack("<I4I4I4", 4, 0xfffffff0, 18) .. "Xen\0" end)
            end, "no PVH entry" },
            ["a note whose name is huge"] = { function()
                return elf(function(e) e.notes = string.pack("<I4I4I4", 0xffffffff, 8, 18) .. "Xen\0" end)
            end, "no PVH entry" },
            ["headers far away"] = { function() return elf(function(e) e.phoff = -1 end) end,
                "cut inside its program headers" },
            ["headers just past the end"] = { function() return elf(function(e) e.phoff = 1 << 62 end) end,
                "cut inside its program headers" },
            ["no headers"] = { function() return elf(function(e) e.phnum = 0 end) end, "make no sense" },
            ["too many headers"] = { function() return elf(function(e) e.phnum = 65535 end) end, "make no sense" },
            ["a segment that wraps"] = { function()
                return elf(function(e) e.load_offset, e.load_size = -4096, 8192 end)
            end, "a segment lies outside the file" },
        }
        for what, case in pairs(files) do
            it(what, function()
                local path = write(dir .. "/file", case[1]())
                local k, err = kernel.find(path)
                assert.is_nil(k)
                assert.matches(path .. ": not a kernel: ", err, 1, true)
                assert.matches(case[2], err, 1, true)
                assert.is_nil(err:find("\n"))
                assert.same({}, leftovers())
            end)
        end

        it("what is not there, or no file", function()
            local k, err = kernel.find(dir .. "/nothing")
            assert.is_nil(k)
            assert.matches(dir .. "/nothing: no such file or directory", err, 1, true)
            k, err = kernel.find(dir)
            assert.is_nil(k)
            assert.matches("holds neither vmlinux nor bzImage", err)
            k, err = kernel.find("/dev/null")
            assert.is_nil(k)
            assert.matches("not a regular file", err)
            k, err = kernel.find("")
            assert.is_nil(k)
            assert.matches("the path is empty", err)
        end)
    end)

    for format in pairs(COMPRESSORS) do
        it("unpacks a bzImage compressed with " .. format .. ", once", function()
            local path = write(dir .. "/vmlinuz", bzimage(compress(elf(), format)))
            local k = assert(kernel.find(path))
            assert.equal(elf(), read(k.path))
            assert.equal("6.1.0-spec", k.version)
            assert.equal(1, #leftovers())
            local before = uv.fs_stat(k.path)
            assert.equal(k.path, assert(kernel.find(path)).path)
            assert.same(before, uv.fs_stat(k.path))
        end)
    end

    it("unpacks a changed file anew", function()
        local path = write(dir .. "/vmlinuz", bzimage(compress(elf(), "gzip")))
        local first = assert(kernel.find(path))
        local other = elf(function(e)
            e.body = e.body .. "changed"
        end)
        write(path, bzimage(compress(other, "gzip")))
        local second = assert(kernel.find(path))
        assert.not_equal(first.path, second.path)
        assert.equal(other, read(second.path))
    end)

    it("takes the relocations that follow the kernel in its payload", function()
        local payload = elf() .. ("\1\2\3\4"):rep(5000)
        local k = assert(kernel.find(write(dir .. "/vmlinuz", bzimage(compress(payload, "zstd")))))
        assert.equal(payload, read(k.path))
    end)

    it("unpacks a cached bzImage beside itself", function()
        local folder = kernel_folder("stock", { bzImage = bzimage(compress(elf(), "lz4")), info = "release=r\n" })
        local k = assert(kernel.find())
        assert.equal(uv.fs_realpath(folder) .. "/vmlinux", k.path)
        assert.same({ "bzImage", "info", "modules", "vmlinux" }, list(folder))
    end)

    describe("refuses a bzImage, leaving nothing,", function()
        local function gz()
            return compress(elf(), "gzip")
        end
        local cases = {
            ["cut inside its header"] = { function() return bzimage(gz()):sub(1, 0x210) end, "not a kernel" },
            ["cut inside its payload"] = { function() return bzimage(gz()):sub(1, 1300) end, "its payload ends at byte" },
            ["with the wrong boot flag"] = { function()
                return bzimage(gz(), function(b) b.flag = "\0\0" end)
            end, "not a kernel" },
            ["with the wrong magic"] = { function()
                return bzimage(gz(), function(b) b.magic = "HdrX" end)
            end, "neither an ELF file nor a bzImage" },
            ["of an old protocol"] = { function()
                return bzimage(gz(), function(b) b.version = 0x0207 end)
            end, "boot protocol 2.07" },
            ["without a payload"] = { function()
                return bzimage(gz(), function(b) b.length = 0 end)
            end, "no compressed payload" },
            ["whose payload length overflows"] = { function()
                return bzimage(gz(), function(b) b.length = 0xffffffff end)
            end, "its payload ends at byte" },
            ["whose payload offset overflows"] = { function()
                return bzimage(gz(), function(b) b.offset = 0xffffffff end)
            end, "its payload ends at byte" },
            ["whose offset and length wrap together"] = { function()
                return bzimage(gz(), function(b) b.offset, b.length = 0xfffffc00, 0x800 end)
            end, "its payload ends at byte" },
            ["whose set-up claims 255 sectors"] = { function()
                return bzimage(gz(), function(b) b.sects = 255 end)
            end, "its payload ends at byte" },
            ["of no known compressor"] = { function()
                return bzimage(("z"):rep(5000) .. string.pack("<I4", 5000))
            end, "its payload is no ELF file" },
            ["with damage inside"] = { function()
                local p = gz()
                local at = #p // 2
                return bzimage(p:sub(1, at) .. ("\xff"):rep(64) .. p:sub(at + 65))
            end, "damaged kernel" },
            ["that claims gigabytes"] = { function()
                local p = gz()
                return bzimage(p:sub(1, -5) .. string.pack("<I4", 0xf0000000))
            end, "it claims to unpack to" },
            ["that unpacks to more than it claims"] = { function()
                local p = compress(elf(), "zstd")
                return bzimage(p:sub(1, -5) .. string.pack("<I4", 5000))
            end, "it unpacks to more" },
            ["that unpacks to less than it claims"] = { function()
                local p = compress(elf(), "zstd")
                return bzimage(p:sub(1, -5) .. string.pack("<I4", 500000))
            end, "it unpacks to less" },
            ["that holds no ELF file"] = { function()
                return bzimage(compress(("text "):rep(5000), "xz"))
            end, "its payload is no ELF file" },
            ["that holds a program"] = { function()
                return bzimage(compress(elf(function(e) e.notes = note("GNU\0", 3, "xxxx") end), "xz"))
            end, "no PVH entry" },
        }
        for what, case in pairs(cases) do
            it(what, function()
                local path = write(dir .. "/vmlinuz", case[1]())
                local k, err = kernel.find(path)
                assert.is_nil(k)
                assert.matches(path, err, 1, true)
                assert.matches(case[2], err, 1, true)
                assert.is_nil(err:find("\n"))
                assert.same({}, leftovers())
            end)
        end

        it("that is a bomb, without filling the disk", function()
            -- 300 MB of zeroes behind an ELF magic, in a claim of 1 MB.
            local payload = shell.run("{ printf '\\177ELF'; head -c 300000000 /dev/zero; } | zstd -q -c")
            local path = write(dir .. "/vmlinuz", bzimage(payload .. string.pack("<I4", 1 << 20)))
            local k, err = kernel.find(path)
            assert.is_nil(k)
            assert.matches("it unpacks to more", err)
            assert.same({}, leftovers())
        end)
    end)

    it("says so when the cache cannot be written", function()
        write(dir .. "/cache", "in the way")
        local k, err = kernel.find(write(dir .. "/vmlinuz", bzimage(compress(elf(), "gzip"))))
        assert.is_nil(k)
        assert.matches("cache", err)
    end)

    -- The kernels of this machine, where they are: readelf is the judge.
    for _, name in ipairs { "own", "stock" } do
        it("finds the real " .. name .. " kernel, when it is cached", function()
            if real_cache then
                uv.os_setenv("SM_CACHE", real_cache)
            else
                uv.os_unsetenv("SM_CACHE")
            end
            local k, err = kernel.find(name)
            if not k then
                assert.matches("no " .. name .. " kernel", err)
                return
            end
            assert.matches("Advanced Micro Devices X86%-64", shell.run { "readelf", "-h", k.path })
            assert.matches("Xen +0x00000008%s+Unknown note type: %(0x00000012%)", shell.run { "readelf", "-n", k.path })
            assert.matches("^%d+%.%d+", k.version)
            for _, module in ipairs(k.initrd_modules) do
                assert.equal("file", uv.fs_stat(module.path).type)
            end
        end)
    end
end)
