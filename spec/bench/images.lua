-- SPDX-License-Identifier: Apache-2.0
--
-- From a registry on loopback to a root that a VM boots from, against the tools
-- people use for it: skopeo and umoci, and mkfs.erofs on what they unpack. The
-- same image of this machine's own files, at least 500 MB unpacked, in three
-- layers; gzip and zstd; medians of RUNS, taken in turns. Also: the processor
-- time of each, the most memory it needs, and ours with a small image.
--
-- Debian's umoci (0.4.7) cannot read zstd layers; there the peer is skopeo, which
-- decompresses them into a folder, and tar.
--
--   lua5.4 spec/bench/images.lua CACHE [RUNS]

local uv = require "luv"
local images = require "support.images"
local registry = require "support.registry"
local shell = require "support.shell"

local cache, runs = assert(arg[1], "usage: images.lua CACHE [RUNS]"), tonumber(arg[2] or 5)
local q = shell.quote
local least_bytes = 500000000

-- Files of this machine until there are enough, in three layers.
local function make(layout)
    local work = shell.tmpdir()
    shell.run(([[cd %s
        umoci new --image %s:big
        find /usr -xdev \( -type f -o -type l \) -size -60M -print0 2>/dev/null | sort -z > all
        total=0; layer=1; : > l1; : > l2; : > l3
        xargs -0 stat -c '%%s %%n' < all | awk -v least=%d '
            { size = $1; sub(/^[0-9]+ \//, ""); if (index($0, "\\n")) next
              total += size; f = total < least * 0.4 ? "l1" : total < least * 0.8 ? "l2" : "l3"
              print > f; if (total > least * 1.05) exit }'
        for i in 1 2 3; do
            tar -C / --owner=0 --group=0 --no-recursion --ignore-failed-read -cf l$i.tar -T l$i
            umoci raw add-layer --image %s:big l$i.tar; rm l$i.tar
        done]]):format(q(work), q(layout), least_bytes, q(layout)))
    -- zstd of the same: through plain tars, for skopeo does not convert.
    images.copy("oci:" .. layout .. ":big", "dir:" .. work .. "/plain", "--dest-decompress")
    shell.run("rm -f /var/lib/containers/cache/blob-info-cache-v1.boltdb")
    images.copy("dir:" .. work .. "/plain", "oci:" .. layout .. ":bigz", "--format", "oci", "--dest-compress",
        "--dest-compress-format", "zstd")
    shell.remove(work)
end

-- Seconds of "1m2.345s".
local function seconds_of(text)
    local m, s = text:match "^(%d+)m([%d.]+)s$"
    return m * 60 + tonumber(s)
end

-- Seconds, peak memory (KiB) and processor seconds of a script.
local function timed(script, env)
    local stderr = assert(uv.new_pipe(false))
    local text, code, peak = {}, nil, 0
    local began = uv.hrtime()
    local handle, pid = uv.spawn("/bin/bash", { args = { "-ec", script .. "\ntimes >&2" }, env = env, stdio = { nil, nil, stderr } },
        function(c)
            code = c
        end)
    assert(handle, pid)
    stderr:read_start(function(_, chunk)
        text[#text + 1] = chunk
    end)
    local function rss(of)
        local f = io.open(("/proc/%d/status"):format(of))
        local own = f and tonumber((f:read("a"):match "VmHWM:%s+(%d+)")) or 0
        if f then
            f:close()
        end
        return own
    end
    local timer = uv.new_timer()
    timer:start(0, 20, function()
        local sum = rss(pid)
        local f = io.open(("/proc/%d/task/%d/children"):format(pid, pid))
        for child in (f and f:read("a") or ""):gmatch "%d+" do
            sum = math.max(sum, rss(tonumber(child)))
        end
        if f then
            f:close()
        end
        peak = math.max(peak, sum)
    end)
    while not code do
        uv.run("once")
    end
    local seconds = (uv.hrtime() - began) / 1e9
    timer:close()
    handle:close()
    stderr:close()
    uv.run("nowait")
    text = table.concat(text)
    assert(code == 0, text)
    local user, system = text:match "(%S+) (%S+)%s*$" -- the children's
    return seconds, peak, seconds_of(user) + seconds_of(system)
end

local function median(list)
    table.sort(list)
    return list[(#list + 1) // 2]
end

local layout = cache .. "/oci"
if not uv.fs_stat(cache .. "/.complete") then
    shell.run { "rm", "-rf", cache }
    shell.run { "mkdir", "-p", cache }
    io.stderr:write("making the image, once\n")
    images.make(layout)
    make(layout)
    shell.write(cache .. "/.complete", "")
end

local reg <close> = setmetatable(registry.start(), { __close = function(self)
    self.stop()
end })
for _, tag in ipairs { "big", "bigz", "one" } do
    images.copy("oci:" .. layout .. ":" .. tag, "docker://" .. reg.host .. "/bench/" .. tag .. ":1")
end

local work = shell.tmpdir()
local base = { "PATH=" .. os.getenv "PATH", "HOME=" .. work, "LUA_PATH=" .. os.getenv "LUA_PATH",
    "LUA_CPATH=" .. os.getenv "LUA_CPATH" }
local function fresh()
    shell.run(("rm -rf %s/*; rm -f /var/lib/containers/cache/blob-info-cache-v1.boltdb; sync"):format(q(work)))
    return table.move({ "XDG_DATA_HOME=" .. work .. "/data" }, 1, 1, #base + 1, table.move(base, 1, #base, 1, {}))
end
local function ours(tag)
    return timed(("./sm pull -q %s/bench/%s:1 >/dev/null"):format(reg.host, tag), fresh())
end
local function theirs(tag)
    local env = fresh()
    local script = [[skopeo --insecure-policy copy -q --src-tls-verify=false docker://%s/bench/%s:1 oci:%s/oci:x
        umoci unpack --image %s/oci:x %s/bundle]]
    if tag == "bigz" then
        script = [[skopeo --insecure-policy copy -q --src-tls-verify=false --dest-decompress docker://%s/bench/%s:1 dir:%s/dir
            mkdir -p %s/bundle/rootfs; cd %s/dir
            for layer in $(jq -r '.layers[].digest' manifest.json); do tar -C ../bundle/rootfs -xf ${layer#sha256:}; done]]
    end
    local seconds, peak, cpu = timed(script:format(reg.host, tag, q(work), q(work), q(work)), env)
    local erofs = timed(("mkfs.erofs %s/root.erofs %s/bundle/rootfs >/dev/null"):format(q(work), q(work)), env)
    return seconds, peak, cpu, erofs
end

local function megabytes(tag)
    return tonumber(shell.run(("umoci stat --json --image %s:%s | jq '[.history[].layer.size? // 0] | add'")
        :format(q(layout), tag))) / 1e6
end

for _, kind in ipairs { { "big", "gzip", "skopeo copy + umoci unpack" }, { "bigz", "zstd", "skopeo copy + tar x" } } do
    local a, b, c, cpu_a, cpu_b, peak_a, peak_b = {}, {}, {}, {}, {}, 0, 0
    for i = 1, runs do
        local peak
        a[i], peak, cpu_a[i] = ours(kind[1])
        peak_a = math.max(peak_a, peak)
        b[i], peak, cpu_b[i], c[i] = theirs(kind[1])
        peak_b = math.max(peak_b, peak)
    end
    local unpacked = tonumber(shell.run(("du -s --apparent-size -B1 %s/bundle/rootfs | cut -f1"):format(q(work)))) / 1e6
    local ma, mb, mc = median(a), median(b), median(c)
    local pa, pb = median(cpu_a), median(cpu_b)
    print(("%s, %.0f MB, %.0f MB unpacked, medians of %d"):format(kind[2], megabytes(kind[1]), unpacked, runs))
    print(("  %-28s %6.2f s  cpu %6.2f s  peak %4d MiB"):format("sm pull, ready to boot", ma, pa, peak_a >> 10))
    print(("  %-28s %6.2f s  cpu %6.2f s  peak %4d MiB   %.1f times as long, %.1f times the cpu"):format(kind[3], mb,
        pb, peak_b >> 10, mb / ma, pb / pa))
    print(("  %-28s %6.2f s                                %.1f times as long"):format("… and mkfs.erofs on it",
        mb + mc, (mb + mc) / ma))
end
local _, small = ours "one"
print(("sm pull of an image of 2 MB: peak %d MiB"):format(small >> 10))
shell.remove(work)
