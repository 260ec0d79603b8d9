-- SPDX-License-Identifier: Apache-2.0
--
-- sm pool: copies of one machine that wait, booted and warm, for commands; each
-- command gets one that nobody has touched.

local exec = require "sm.cli.exec"
local sm = require "sm"
local vms = require "sm.cli.vms"

local verbs = {}

local function with(name, fn)
    if not name then
        return nil, "pool: needs the name of a pool"
    end
    local pool <close>, err = sm.attach_pool(name)
    if not pool then
        return nil, err
    end
    return fn(pool)
end

function verbs.start(o, name, image)
    if not name or not image then
        return nil, "pool start: needs a name and an image"
    end
    local started, err = sm.launch_pool(name, {
        image = image, min = o.min, max = o.max, burst = o.burst, idle_timeout = o.idle_timeout,
        acquire_timeout = o.acquire_timeout, config = { cpus = o.cpus, memory = o.memory },
        warmup = o.warmup and { "/bin/sh", "-c", o.warmup } or nil,
    })
    if not started then
        return nil, err
    end
    print(started)
    return 0
end

function verbs.run(o, name, ...)
    local argv = { ... }
    if #argv == 0 then
        return nil, "pool run: needs the name of a pool and a command"
    end
    return with(name, function(pool)
        local vm <close>, err = pool:acquire(o.acquire_timeout)
        if not vm then
            return nil, err == "timeout" and ("the pool '%s' has none to give"):format(name) or err
        end
        return exec.in_vm(vm, o, argv)
    end)
end

function verbs.ls(o)
    local list, err = sm.pools()
    if not list then
        return nil, err
    end
    local now, rows = os.time(), { { "NAME", "IMAGE", "READY", "TAKEN", "MAX", "CREATED" } }
    for _, info in ipairs(list) do
        local stats = not o.quiet and with(info.id, function(pool) return pool:stats() end) or {}
        rows[#rows + 1] = {
            info.id, info.image or "", tostring(stats.ready or "?"), tostring(stats.taken or "?"), tostring(info.max or "?"),
            vms.ago(now - (info.created or now)) .. " ago",
        }
    end
    if o.quiet then
        for i = 2, #rows do
            print(rows[i][1])
        end
    else
        vms.print_table(rows)
    end
    return 0
end

function verbs.stats(_, name)
    local stats, err = with(name, function(pool) return pool:stats() end)
    if not stats then
        return nil, err
    end
    for _, key in ipairs { "ready", "taken", "making", "waiting", "made", "acquired", "released", "died", "failed",
        "idled", "timeouts" } do
        print(("%-10s %d"):format(key, stats[key]))
    end
    for _, key in ipairs { "acquire", "make" } do
        local q = stats[key]
        if q.n > 0 then
            print(("%-10s p50 %.1f ms, p99 %.1f ms, max %.1f ms (the last %d)"):format(key, q.p50 * 1000, q.p99 * 1000,
                q.max * 1000, q.n))
        end
    end
    return 0
end

function verbs.stop(_, ...)
    local names = { ... }
    if #names == 0 then
        return nil, "pool stop: needs the name of a pool"
    end
    return vms.each(names, function(name)
        return with(name, function(pool) return pool:stop() end)
    end)
end

return {
    usage = "sm pool start [flags] NAME IMAGE | run [flags] NAME COMMAND [ARG…] | ls | stats NAME | stop NAME…",
    about = "Keep booted copies of an image ready. `run` takes one that nobody has touched, runs\n"
        .. "the command in it and throws it away; its exit code is the command's, as `sm exec`'s.",
    flags = {
        { "min", nil, "N", "of start: how many are kept ready (default 1)", kind = "integer" },
        { "max", nil, "N", "of start: how many there are at most (default 4)", kind = "integer" },
        { "burst", nil, "N", "of start: how many are made at the same time (default 2)", kind = "integer" },
        { "idle-timeout", nil, "TIME", "of start: end those beyond --min that nobody takes", kind = "seconds" },
        { "acquire-timeout", nil, "TIME", "how long to wait for one", kind = "seconds" },
        { "warmup", nil, "COMMAND", "of start: run this in the machine before copies are made of it", kind = "string" },
        { "cpus", nil, "N", "of start: virtual CPUs (default 1)", kind = "integer" },
        { "memory", "m", "SIZE", "of start: memory (default 512M)", kind = "size" },
        { "interactive", "i", nil, "of run: join standard input to the command" },
        { "tty", "t", nil, "of run: give the command a terminal" },
        { "env", "e", "KEY=VALUE", "of run: set a variable", kind = "list" },
        { "workdir", "w", "DIR", "of run: working directory", kind = "string" },
        { "user", "u", "USER[:GROUP]", "of run: user", kind = "string" },
        { "quiet", "q", nil, "of ls: names only" },
    },
    verbs = true,
    min = 1,
    needs = "start, run, ls, stats or stop",
    run = function(o, rest)
        local verb = verbs[rest[1]]
        if not verb then
            return nil, ("pool: no such action: '%s' (start, run, ls, stats, stop)"):format(rest[1])
        end
        return verb(o, table.unpack(rest, 2))
    end,
}
