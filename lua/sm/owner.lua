-- SPDX-License-Identifier: Apache-2.0
--
-- The process that holds a detached VM, or a pool. `launch` starts one: an `sm` in a
-- session of its own, told on its standard input what to run, which answers on
-- its standard output once the command runs, and then stays for as long as the
-- VM does. From then on it is met through the VM's control socket only.
--
--   launch ── { image, config, process } ──▶ sm _owner ── VM, agent, log
--          ◀── { true, id } | { false, why } ──┘     └── control.sock
--
-- Threads: the loop's, in either process.

local child = require "sm.child"
local uv = require "luv"
local config = require "sm.config"
local core = require "sm.core"
local loop = require "sm.loop"
local paths = require "sm.paths"
local rundir = require "sm.rundir"

local M = {}

local PLACES = { "/../sm", "/../../../bin/sm" }

-- ------------------------------------------------------------- the launcher

local function start_process(path)
    local pipes = { uv.new_pipe(false), uv.new_pipe(false), uv.new_pipe(false) }
    local handle, err = child.spawn(path, { args = { "_owner" }, stdio = pipes, detached = true }, function() end)
    if not handle then
        for _, pipe in ipairs(pipes) do
            pipe:close()
        end
        return nil, ("%s: %s"):format(path, err)
    end
    handle:unref()
    return pipes, handle
end

-- Read both outputs to their ends. Yields.
local function read_ends(out, err)
    local text, open = { [out] = {}, [err] = {} }, 2
    loop.await(function(settle)
        for _, pipe in ipairs { out, err } do
            pipe:read_start(loop.guard(function(_, chunk)
                if chunk then
                    table.insert(text[pipe], chunk)
                    return
                end
                open = open - 1
                if pipe == out or open == 0 then
                    settle(true)
                end
            end))
        end
    end)
    return table.concat(text[out]), table.concat(text[err])
end

local PROCESS_KEYS = {
    argv = 1, env = 1, cwd = 1, user = 1, tty = 1, rows = 1, cols = 1, stdin = 1, stop_signal = 1,
    groups = 1, rlimits = 1, files = 1,
}

local function check(opts)
    local wire = require "sm.wire"
    wire.check_keys("launch", opts, { config = 1, process = 1, keep = 1 })
    if type(opts.process) ~= "table" then
        error(("launch: process: expected a table, got %s"):format(type(opts.process)), 3)
    end
    wire.check_keys("launch: process", opts.process, PROCESS_KEYS)
    for key, value in pairs(opts.config or {}) do
        if type(value) == "function" then
            error(("launch: config: %s: a function cannot go to another process"):format(key), 3)
        end
    end
    return config.check(opts.config)
end

-- Start the process, tell it what to run, and wait for its word. Yields.
local function ask(message)
    local path, err = paths.ours("SM_EXECUTABLE", "sm", PLACES)
    if not path then
        return nil, err
    end
    local pipes, handle = start_process(path)
    if not pipes then
        return nil, handle
    end
    pipes[1]:write(core.pack(message))
    pipes[1]:shutdown()
    local answer, words = read_ends(pipes[2], pipes[3])
    for _, pipe in ipairs(pipes) do
        pipe:close()
    end
    local said = core.unpack(answer)
    if type(said) ~= "table" then
        return nil, "the VM's process ended before it could answer: " .. words
    elseif said[1] then
        return said[2]
    end
    return nil, said[2], said[3] or nil
end

--- See sm.launch. Yields.
---@async
function M.launch(image, opts)
    local ok, err = check(opts)
    if not ok then
        return nil, err
    end
    return ask {
        image = type(image) == "table" and image.reference or image,
        pull = type(image) == "table" and "never" or nil,
        config = opts.config or {}, process = opts.process, keep = opts.keep or false,
    }
end

--- See sm.launch_copy. Yields.
---@async
function M.launch_copy(snapshot, opts)
    local ok, err = config.check_restore(opts and opts.config)
    if not ok then
        return nil, err
    end
    return ask { snapshot = snapshot, config = opts and opts.config or {}, keep = false }
end

--- See sm.launch_pool. Yields.
---@async
function M.launch_pool(name, cfg)
    for key, value in pairs(cfg) do
        if type(value) == "function" then
            return nil, ("launch_pool: %s: a function cannot go to another process"):format(key)
        end
    end
    local ok, err = config.check_restore { name = name }
    if not ok then
        return nil, err
    end
    return ask { pool = cfg, name = name }
end

-- ---------------------------------------------------------------- the owner

local function reply(message)
    uv.fs_write(1, core.pack(message), -1)
    -- The launcher waits for the end of both; nobody reads what we say later.
    local null = assert(uv.fs_open("/dev/null", "r+", 0))
    core.redirect(null, 0)
    core.redirect(null, 1)
    core.redirect(null, 2)
    uv.fs_close(null)
end

-- What ends a process ends what it holds in good order: calls fn in a task.
local function end_with(fn)
    for _, name in ipairs { "sigterm", "sigint" } do
        local handle = assert(uv.new_signal())
        handle:start(name, loop.guard(function()
            loop.spawn(fn)
        end))
        handle:unref()
    end
    local hup = assert(uv.new_signal())
    hup:start("sighup", function() end)
    hup:unref()
end

local function end_with_us(vm)
    end_with(function()
        vm:stop()
    end)
end

-- A copy of a saved machine: what ran in it runs on, there is no command of ours.
local function hold_copy(spec)
    local vm, err = require("sm").restore(spec.snapshot, spec.config)
    if not vm then
        return { false, err }
    end
    local held <close> = vm
    held.server:update { detached = true }
    end_with_us(held)
    reply { true, held.id }
    held:wait()
    return nil
end

-- A command that has to succeed, as a pool's warm-up.
local function warmup(argv)
    return function(vm)
        local r, err = vm:exec { argv = argv }
        if not r then
            return nil, err
        elseif r.status ~= 0 then
            return nil, ("`%s` ended with %d: %s"):format(table.concat(argv, " "), r.status, r.stderr:gsub("%s+$", ""))
        end
        return true
    end
end

local function hold_pool(spec)
    local dir <close>, err = rundir.new(spec.name)
    if not dir then
        return { false, err }
    end
    local cfg = spec.pool
    local image = cfg.image
    cfg.warmup = cfg.warmup and warmup(cfg.warmup)
    local pool <close>, why = require("sm").pool(cfg)
    if not pool then
        return { false, why }
    end
    local server <close>, failed = require("sm.pool_server").new(pool, dir.path, {
        id = spec.name, image = image, created = os.time(), owner = uv.os_getpid(), min = pool.min, max = pool.max,
    })
    if not server then
        return { false, failed }
    end
    end_with(function()
        server:stop()
    end)
    reply { true, spec.name }
    server:wait()
    return nil
end

local function hold(spec)
    local sm = require "sm"
    if spec.pool then
        return hold_pool(spec)
    end
    if spec.snapshot then
        return hold_copy(spec)
    end
    local image, err = sm.image(spec.image, { pull = spec.pull or spec.config.pull })
    if not image then
        return { false, err }
    end
    local vm
    vm, err = sm.start(image, spec.config)
    if not vm then
        return { false, err }
    end
    local held <close> = vm
    local process = spec.process
    process.main = true
    local proc, failure
    proc, err, failure = held:spawn(process)
    if not proc then
        return { false, err, failure }
    end
    held.server:update { detached = true }
    local logged
    logged, err = held.server:keep_log(proc, process.tty)
    if not logged then
        return { false, err }
    end
    end_with_us(held)
    reply { true, held.id }
    held:wait()
    logged:join(10)
    local outcome = held.server:outcome()
    if spec.keep then
        held.parts.rundir.keep = true
        held.server:update {
            status = "exited", code = outcome.code, reason = outcome.reason,
            detail = outcome.detail, finished = os.time(),
        }
    end
    return nil
end

--- The body of `sm _owner`.
---@return integer exit code
function M.main()
    local spec = core.unpack(io.read "a" or "")
    local known = type(spec) == "table" and (type(spec.snapshot) == "string"
        or type(spec.pool) == "table" and type(spec.name) == "string"
        or type(spec.image) == "string" and type(spec.process) == "table")
    if not known then
        io.stderr:write "sm: _owner is for sm itself; see `sm run -d`\n"
        return 125
    end
    local ok, refused = xpcall(loop.run, debug.traceback, hold, spec)
    if not ok then
        refused = { false, "internal error, please report it\n" .. tostring(refused) }
    end
    if refused then
        reply(refused)
        return 125
    end
    return 0
end

return M
