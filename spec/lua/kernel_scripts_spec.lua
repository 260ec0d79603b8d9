-- SPDX-License-Identifier: Apache-2.0
--
-- scripts/kernel and scripts/stock-kernel on stand-in packages: apt is a
-- script that hands out packages made here, the kernel's source a Makefile
-- with the same targets. What is judged is the scripts' own work.
local uv = require "luv"
local shell = require "support.shell"

local q, read, write = shell.quote, shell.read, shell.write
local root = uv.cwd()
local dir

-- Everything in the kernel cache, hidden names too, but for the lock files.
local function cached()
    return shell.run("cd " .. q(dir .. "/cache/kernel") .. " 2>/dev/null && ls -A | grep -v 'lock$' | sort || true")
end

local function lines(path)
    local file = io.open(path)
    local n = 0
    if file then
        for _ in file:lines() do
            n = n + 1
        end
        file:close()
    end
    return n
end

-- Run a script with our apt; returns stdout, stderr and the exit code.
local function run(script, env)
    local command = ("cd %s; env PATH=%s SM_CACHE=%s %s %s >%s/out 2>%s/err"):format(q(root),
        q(dir .. "/bin:" .. os.getenv("PATH")), q(dir .. "/cache"), env or "", q(script), q(dir), q(dir))
    local _, _, code = os.execute(command)
    return (read(dir .. "/out"):gsub("\n$", "")), read(dir .. "/err"), code
end

-- apt-cache and apt-get that know one version of the packages in debs/.
local function fake_apt(depends)
    shell.run { "mkdir", "-p", dir .. "/bin", dir .. "/debs" }
    write(dir .. "/bin/apt-cache", ([[#!/bin/sh
case $1 in
policy) [ -e %s/debs/$2 ] && printf '%%s:\n  Installed: (none)\n  Candidate: 1.2-3\n' "$2" ;;
depends) printf '%%s\n%s' "$2" ;;
esac
]]):format(q(dir), depends and "  Depends: " .. depends .. "\\n" or ""), "755")
    write(dir .. "/bin/apt-get", ([[#!/bin/sh
for last; do :; done
echo "$*" >> %s/calls
case "$*" in
*download*) cp %s/debs/${last%%%%=*} ./${last%%%%=*}.deb ;;
*update*) ;;
*) echo "apt-get: $*" >&2; exit 100 ;;
esac
]]):format(q(dir), q(dir)), "755")
end

local function make_deb(name)
    shell.run(([[
        mkdir -p %s/tree/DEBIAN
        printf 'Package: %s\nVersion: 1.2-3\nArchitecture: all\nMaintainer: spec <spec@localhost>\nDescription: spec\n' \
            > %s/tree/DEBIAN/control
        dpkg-deb -Znone --build %s/tree %s/debs/%s >&2
    ]]):format(q(dir), name, q(dir), q(dir), q(dir), name))
end

describe("scripts/stock-kernel", function()
    local package = "linux-image-6.9-cloud"

    -- A package whose modules name what they depend on, as real ones do.
    local function stock_package(modules)
        fake_apt(package)
        local tree = dir .. "/tree"
        local at = tree .. "/lib/modules/6.9-cloud/kernel"
        shell.run { "mkdir", "-p", tree .. "/boot", at .. "/drivers/deep" }
        write(tree .. "/boot/vmlinuz-6.9-cloud", "bzimage")
        write(tree .. "/boot/config-6.9-cloud", "CONFIG_X=y\n")
        write(tree .. "/lib/modules/6.9-cloud/modules.builtin", "kernel/fs/overlay.ko\n")
        for name, depends in pairs(modules) do
            write(at .. "/drivers/deep/" .. name .. ".ko", "ELF\0license=GPL\0depends=" .. depends .. "\0name=x\0")
        end
        make_deb(package)
    end
    local MODULES = {
        virtio_ring = "", virtio = "virtio_ring", virtio_mmio = "virtio,virtio_ring", virtio_blk = "virtio,virtio_ring",
        ["virtio-rng"] = "virtio", vsock = "", vmw_vsock_virtio_transport = "virtio,vsock", libcrc32c = "",
        erofs = "libcrc32c", fuse = "", virtiofs = "fuse,virtio", unwanted = "virtio",
    }

    before_each(function()
        dir = shell.tmpdir()
    end)
    after_each(function()
        shell.remove(dir)
    end)

    it("takes kernel and modules out of the package, in the order of insertion", function()
        stock_package(MODULES)
        local out, err, code = run("scripts/stock-kernel")
        assert.equal(0, code, err)
        assert.equal("bzimage", read(out .. "/bzImage"))
        assert.equal("virtio_ring.ko\nvirtio.ko\nvirtio_mmio.ko\nvirtio_blk.ko\nvirtio-rng.ko\nvsock.ko\n"
            .. "vmw_vsock_virtio_transport.ko\nlibcrc32c.ko\nerofs.ko\n", read(out .. "/modules/order"))
        assert.equal("fuse.ko\nvirtiofs.ko\n", read(out .. "/modules/extra"))
        assert.is_nil(uv.fs_stat(out .. "/modules/unwanted.ko"))
        local info = read(out .. "/info")
        assert.matches("release=6.9-cloud\n", info, 1, true)
        assert.matches("absent=virtio_console pvpanic-mmio", info, 1, true)
        assert.equal(out, uv.fs_realpath(dir .. "/cache/kernel/stock"))
        assert.equal(2, select(2, cached():gsub("\n", "")))
    end)

    it("fetches once, also for two callers at once", function()
        stock_package(MODULES)
        local command = ("PATH=%s SM_CACHE=%s scripts/stock-kernel"):format(q(dir .. "/bin:" .. os.getenv("PATH")),
            q(dir .. "/cache"))
        local out = shell.run(("cd %s; for i in 1 2 3; do %s > %s/out.$i & done; wait; cat %s/out.*")
            :format(q(root), command, q(dir), q(dir)))
        local first = out:match("^[^\n]+\n")
        assert.equal(first:rep(3), out)
        assert.equal(1, lines(dir .. "/calls"))
        assert.equal(first, run("scripts/stock-kernel") .. "\n")
        assert.equal(1, lines(dir .. "/calls"))
    end)

    it("refuses a kernel without a driver that every guest needs, leaving nothing", function()
        local modules = {}
        for name, depends in pairs(MODULES) do
            modules[name] = name ~= "erofs" and depends or nil
        end
        stock_package(modules)
        local _, err, code = run("scripts/stock-kernel")
        assert.equal(1, code)
        assert.matches(package .. " 1.2-3 has no erofs", err, 1, true)
        assert.equal("", cached())
    end)

    it("says that apt has no such kernel", function()
        fake_apt(nil)
        local _, err, code = run("scripts/stock-kernel")
        assert.equal(1, code)
        assert.matches("apt has no linux%-image%-cloud", err)
        assert.equal("", cached())
    end)

    it("leaves nothing when the download fails", function()
        stock_package(MODULES)
        write(dir .. "/bin/apt-get", "#!/bin/sh\nexit 100\n", "755")
        local _, err, code = run("scripts/stock-kernel")
        assert.equal(1, code)
        assert.matches("cannot download", err)
        assert.equal("", cached())
    end)
end)

describe("scripts/kernel", function()
    -- The old side of each file of scripts/kernel.patch.
    local function write_what_the_patch_changes(src)
        local file
        for line in io.lines("scripts/kernel.patch") do
            local name = line:match("^%-%-%- a/(%S+)")
            if name then
                shell.run { "mkdir", "-p", src .. "/" .. name:match("^(.*)/") }
                if file then
                    file:close()
                end
                file = assert(io.open(src .. "/" .. name, "w"))
            elseif file and line:match("^[ -]") then
                file:write(line:sub(2), "\n")
            end
        end
        file:close()
    end

    -- A source package whose Makefile configures (dropping the symbols in
    -- `drops`) and builds (unless `broken`) like the kernel's.
    local function source_package(o)
        fake_apt()
        shell.run("rm -rf " .. q(dir .. "/tree") .. " " .. q(dir .. "/src"))
        local src = dir .. "/src/linux-source-6.1"
        shell.run { "mkdir", "-p", src, dir .. "/tree/usr/src" }
        if not o.unpatchable then
            write_what_the_patch_changes(src)
        end
        write(src .. "/Makefile", ([[
allnoconfig:
	mkdir -p $(O)
	grep -vE '%s' $(KCONFIG_ALLCONFIG) | grep -v '=n$$' > $(O)/.config
bzImage: vmlinux
vmlinux:
	%s
	mkdir -p $(O)/include/config $(O)/arch/x86/boot
	echo 6.1-spec > $(O)/include/config/kernel.release
	env | grep KBUILD | sort > $(O)/vmlinux
	cp $(O)/vmlinux $(O)/System.map
	cp $(O)/vmlinux $(O)/arch/x86/boot/bzImage
]]):format(o.drops or "^$$", o.broken and "echo no such header >&2; exit 1" or "true"))
        shell.run { "tar", "-C", dir .. "/src", "-cJf", dir .. "/tree/usr/src/linux-source-6.1.tar.xz", "linux-source-6.1" }
        make_deb("linux-source-6.1")
    end

    -- The tools scripts/kernel would install are not what is judged here.
    local function with_tools()
        write(dir .. "/bin/dpkg-query", "#!/bin/sh\nprintf installed\n", "755")
    end

    before_each(function()
        dir = shell.tmpdir()
        if shell.run("dpkg --print-architecture") ~= "amd64\n" then
            pending("scripts/kernel.config is for x86_64")
        end
    end)
    after_each(function()
        shell.remove(dir)
    end)

    it("builds once and publishes what a guest needs", function()
        source_package {}
        with_tools()
        local out, err, code = run("scripts/kernel")
        assert.equal(0, code, err)
        assert.equal("System.map\nbzImage\nconfig\ninfo\nvmlinux\n", shell.run("LC_ALL=C ls " .. q(out)))
        assert.equal(out, uv.fs_realpath(dir .. "/cache/kernel/current"))
        local info = read(out .. "/info")
        assert.matches("release=6.1-spec\n", info, 1, true)
        assert.matches("version=1.2-3\n", info, 1, true)
        -- Nothing of this machine's user, name or clock.
        local built = read(out .. "/vmlinux")
        assert.matches("KBUILD_BUILD_HOST=sm\n", built, 1, true)
        assert.matches("KBUILD_BUILD_TIMESTAMP=Thu Jan  1 00:00:00 UTC 1970\n", built, 1, true)
        assert.equal(2, select(2, cached():gsub("\n", "")))

        local calls = lines(dir .. "/calls")
        assert.equal(out, (run("scripts/kernel")))
        assert.equal(calls, lines(dir .. "/calls"))
    end)

    it("builds once for two callers at once", function()
        source_package {}
        with_tools()
        local command = ("PATH=%s SM_CACHE=%s scripts/kernel"):format(q(dir .. "/bin:" .. os.getenv("PATH")),
            q(dir .. "/cache"))
        local out = shell.run(("cd %s; for i in 1 2; do %s > %s/out.$i & done; wait; cat %s/out.*")
            :format(q(root), command, q(dir), q(dir)))
        local first = out:match("^[^\n]+\n")
        assert.equal(first:rep(2), out)
        assert.equal(1, lines(dir .. "/calls"))
    end)

    it("names each wish the kernel's configuration drops", function()
        source_package { drops = "^(CONFIG_PVH|CONFIG_VMGENID)=" }
        with_tools()
        local _, err, code = run("scripts/kernel")
        assert.equal(1, code)
        assert.matches("CONFIG_PVH: wanted y, got n", err, 1, true)
        assert.matches("CONFIG_VMGENID: wanted y, got n", err, 1, true)
        assert.is_nil(err:find("CONFIG_PCI", 1, true))
        assert.equal("", cached())
    end)

    it("shows why a build failed, leaving nothing", function()
        source_package { broken = true }
        with_tools()
        local _, err, code = run("scripts/kernel")
        assert.equal(1, code)
        assert.matches("no such header", err)
        assert.matches("the build failed", err)
        assert.equal("", cached())
    end)

    it("refuses a source its patch does not fit, leaving nothing", function()
        source_package { unpatchable = true }
        with_tools()
        local _, err, code = run("scripts/kernel")
        assert.equal(1, code)
        assert.matches("kernel.patch does not fit linux-source-6.1 1.2-3", err, 1, true)
        assert.equal("", cached())
    end)

    it("says what it cannot install", function()
        source_package {}
        write(dir .. "/bin/dpkg-query", "#!/bin/sh\ncase \"$*\" in *flex*|*bison*) exit 1;; esac\nprintf installed\n", "755")
        write(dir .. "/bin/sudo", "#!/bin/sh\nexit 1\n", "755")
        local _, err, code = run("scripts/kernel")
        assert.equal(1, code)
        assert.matches("installing: flex bison\n", err, 1, true)
        assert.matches("cannot install flex bison", err, 1, true)
        assert.equal("", cached())
    end)

    it("has a configuration without contradictions", function()
        local seen = {}
        for line in io.lines("scripts/kernel.config") do
            local name = line:match("^(CONFIG_[%w_]+)=")
            if name then
                assert.is_nil(seen[name], name .. " is there twice")
                seen[name] = true
            end
        end
        for _, name in ipairs { "PVH", "ACPI", "VIRTIO_MMIO", "VIRTIO_BLK", "VIRTIO_VSOCKETS", "EROFS_FS", "OVERLAY_FS",
            "VMGENID", "PVPANIC_MMIO", "FS_DAX", "SERIAL_8250_CONSOLE", "KVM_GUEST" } do
            assert.is_true(seen["CONFIG_" .. name], name)
        end
    end)
end)
