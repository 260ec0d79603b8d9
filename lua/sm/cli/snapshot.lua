-- SPDX-License-Identifier: Apache-2.0
--
-- sm snapshot: save VMs that run, whoever started them, and look after what
-- was saved.

local progress = require "sm.cli.progress"
local sm = require "sm"
local vms = require "sm.cli.vms"

local function size(bytes)
    if bytes >= 1 << 30 then
        return ("%.1f GiB"):format(bytes / (1 << 30))
    end
    return ("%.1f MiB"):format(bytes / (1 << 20))
end

local function report_damaged(list)
    for _, bad in ipairs(list) do
        io.stderr:write("sm: ", bad.error, "\n")
    end
    return #list > 0 and 1 or 0
end

local verbs = {}

function verbs.create(o, vm, name)
    if not vm or not name then
        return nil, "snapshot create: needs a VM and a name (or a path with a slash)"
    end
    local made, err = vms.with(vm, function(attached)
        local slash = name:find("/", 1, true)
        return attached:snapshot { path = slash and name or nil, name = not slash and name or nil, diff = o.diff,
            live = o.live }
    end)
    if not made then
        return nil, err
    end
    print(made.name or made.path)
    if not o.quiet then
        io.stderr:write(("saved %s; the VM stood still for %.0f ms\n"):format(size(made.stored), made.pause * 1000))
    end
    return 0
end

function verbs.ls(o)
    local list, damaged = sm.snapshot.list()
    if o.quiet then
        for _, s in ipairs(list) do
            print(s.name)
        end
        return report_damaged(damaged)
    end
    local now, rows = os.time(), { { "NAME", "IMAGE", "CPUS", "MEMORY", "SIZE", "CREATED" } }
    for _, s in ipairs(list) do
        rows[#rows + 1] = {
            s.name, s.image.name or s.image.reference or "", tostring(s.cpus), size(s.memory), size(s.stored),
            vms.ago(math.max(0, now - math.floor(s.created))) .. " ago",
        }
    end
    vms.print_table(rows)
    return report_damaged(damaged)
end

function verbs.show(_, name)
    if not name then
        return nil, "snapshot show: needs a name"
    end
    local s, err = sm.snapshot.open(name)
    if not s then
        return nil, err
    end
    local function line(key, value)
        print(("%-12s %s"):format(key, value))
    end
    line("name", s.name or "-")
    line("path", s.path)
    line("id", s.id)
    line("created", os.date("%Y-%m-%d %H:%M:%S", math.floor(s.created)))
    line("of VM", s.source or "-")
    line("image", ("%s %s"):format(s.image.name or s.image.reference or "-", s.image.digest))
    line("cpus", s.cpus)
    line("memory", size(s.memory))
    line("size", size(s.stored))
    if s.parent then
        line("parent", ("%s (%s)"):format(s.parent.path:match "([^/]*)%.sms$" or s.parent.path, s.parent.id))
    end
    line("cpu model", s.fingerprint)
    return 0
end

local function each(names, what, act)
    if #names == 0 then
        return nil, ("snapshot %s: needs a name"):format(what)
    end
    return vms.each(names, act)
end

-- The same for what takes its time.
local function each_told(o, names, what, act)
    local bars, err = progress.new(o)
    if not bars then
        return nil, ("snapshot %s: %s"):format(what, err)
    end
    local code
    code, err = each(names, what, function(name)
        return act(name, bars:meter(name))
    end)
    bars:finish()
    return code, err
end

function verbs.rm(_, ...)
    return each({ ... }, "rm", sm.snapshot.remove)
end

function verbs.verify(o, ...)
    return each_told(o, { ... }, "verify", sm.snapshot.verify)
end

function verbs.flatten(o, ...)
    return each_told(o, { ... }, "flatten", sm.snapshot.flatten)
end

function verbs.export(o, name)
    if not name then
        return nil, "snapshot export: needs a name"
    elseif not o.output and require("luv").guess_handle(1) == "tty" then
        return nil, "snapshot export: standard output is a terminal; give a file with -o"
    end
    local ok, err = sm.snapshot.export(name, o.output or 1)
    return ok and 0 or nil, err
end

function verbs.import(o, name)
    if not name then
        return nil, "snapshot import: needs a name for it"
    elseif not o.input and require("luv").guess_handle(0) == "tty" then
        return nil, "snapshot import: standard input is a terminal; give a file with -i"
    end
    local bars, why = progress.new(o)
    if not bars then
        return nil, "snapshot import: " .. why
    end
    local made, err = sm.snapshot.import(o.input or "-", name, { progress = function(event)
        bars:event(event)
    end })
    bars:finish()
    if not made then
        return nil, err
    end
    print(made.name)
    return 0
end

return {
    usage = "sm snapshot create [--diff] [--live] VM NAME | ls | show NAME | rm NAME… | verify NAME… | flatten NAME… | "
        .. "export NAME | import NAME",
    about = "Save a running VM, its memory and its writable disk; it goes on where it was.\n"
        .. "A name with a slash is a path. `verify` reads all of a snapshot and holds it\n"
        .. "against its checksums; everything but memory is checked at each restore.\n"
        .. "With --diff only what changed since the VM was restored, or since its last diff,\n"
        .. "is saved; it needs that parent, until `flatten` makes it stand alone. `export` writes\n"
        .. "a snapshot and its image as one archive, `import` takes it in on another machine.",
    flags = {
        { "diff", nil, nil, "of create: only what changed" },
        { "live", nil, nil, "of create: copy memory while the VM runs; it stands still for the rest" },
        { "output", "o", "FILE", "of export: write to this file, not to stdout", kind = "string" },
        { "input", "i", "FILE", "of import: read this file, not stdin", kind = "string" },
        progress.FLAG,
        { "quiet", "q", nil, "names only; no progress" },
    },
    verbs = true,
    min = 1,
    needs = "create, ls, show, rm, verify, flatten, export or import",
    run = function(o, rest)
        local verb = verbs[rest[1]]
        if not verb then
            return nil, ("snapshot: no such action: '%s' (create, ls, show, rm, verify, flatten, export, import)"):format(rest[1])
        end
        return verb(o, table.unpack(rest, 2))
    end,
}
