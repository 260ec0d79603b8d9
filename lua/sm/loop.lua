-- SPDX-License-Identifier: Apache-2.0
--
-- The event loop of the product layer: coroutines on libuv (luv).
--
-- A *task* is a coroutine. It gives up the thread only in `loop.await`, which
-- every waiting function of ours is built on; so code reads top to bottom and
-- nothing else is scheduled between two awaits. A waiting call made outside
-- any task (a plain script, the REPL) runs the loop until it is answered.
--
-- Two traps of luv shape this file. A Lua error inside a luv callback exits
-- the process, even under pcall(uv.run): every callback goes through
-- `loop.guard`, which keeps the error and rethrows it from `loop.run`. And
-- resuming a coroutine inside the callback of the handle it is about to close
-- is legal but hard to follow, so wake-ups run from one queue, drained after
-- each turn.

local check = require "sm.check"
local uv = require "luv"

local M = {}

---@class sm.Task
---@field package co thread
---@field package done boolean
---@field package ok boolean?
---@field package results table?
---@field package waiters table
---@field package cancel_wait fun()?
local Task = {}
Task.__index = Task

local ready = {}          -- queue of {task, ...} to resume
local ready_first, ready_last = 1, 0
local current             -- the running task, or nil
local failure             -- first error of a callback or an unjoined task
local tasks = setmetatable({}, { __mode = "k" }) -- coroutine -> task
local wake                -- uv async-like idle handle that drains `ready`

local function drain()
    while ready_first <= ready_last do
        local item = ready[ready_first]
        ready[ready_first] = nil
        ready_first = ready_first + 1
        item()
    end
    ready_first, ready_last = 1, 0
end

-- Queue a function to run on the loop, soon, outside the caller's stack.
local function soon(fn)
    ready_last = ready_last + 1
    ready[ready_last] = fn
    if not wake then
        wake = uv.new_idle()
    end
    if not wake:is_active() then
        wake:start(function()
            wake:stop()
            local ok, err = xpcall(drain, debug.traceback)
            if not ok and not failure then
                failure = err
            end
            if failure then
                uv.stop()
            end
        end)
    end
end

local function finish(task, ok, ...)
    task.done, task.ok, task.results = true, ok, table.pack(...)
    if not ok and #task.waiters == 0 and not task.cancelled and not task.quiet then
        failure = failure or task.results[1]
        uv.stop()
    end
    M.wake(task.waiters)
end

local function resume(task, ...)
    if task.done then
        return
    end
    local before = current
    current = task
    local res = table.pack(coroutine.resume(task.co, ...))
    current = before
    if coroutine.status(task.co) == "dead" then
        if res[1] then
            finish(task, true, table.unpack(res, 2, res.n))
        else
            local err = res[2]
            if type(err) == "string" then
                err = debug.traceback(task.co, err)
            end
            coroutine.close(task.co)
            finish(task, false, err)
        end
    end
end

--- Start `fn(...)` as a task; it begins at the next turn of the loop.
--- An error that nobody joins is rethrown by `loop.run`.
---
--- ```lua
--- local loop = require "sm.loop"
--- local task = loop.spawn(function(a, b)
---     loop.sleep(0.001)
---     return a + b
--- end, 1, 2)
--- assert(task:join() == 3)
--- ```
---@param fn function
---@return sm.Task
function M.spawn(fn, ...)
    check("loop.spawn", 1, fn, "fn", "function")
    local args = table.pack(...)
    local task = setmetatable({
        done = false,
        waiters = {},
    }, Task)
    task.co = coroutine.create(fn)
    tasks[task.co] = task
    soon(function()
        resume(task, table.unpack(args, 1, args.n))
    end)
    return task
end

--- The running task, or nil outside any.
---@return sm.Task?
function M.current()
    return current
end

-- Run the loop until cond() holds; used where there is no task to suspend.
local function run_until(cond)
    while not cond() do
        if failure then
            local err = failure
            failure = nil
            error(err, 0)
        end
        if not uv.run("once") and not cond() and not failure and ready_last < ready_first then
            error("deadlock: waiting for something that nothing can bring", 0)
        end
    end
    M.flush()
end

--- Let handles that are closing finish, unless a running loop will. luv 1.44
--- crashes at the end of a Lua state that leaves one half closed, so whatever
--- closes handles without waiting after it ends with this.
function M.flush()
    if not uv.loop_mode() then
        uv.run("nowait")
    end
end

--- Wait for an answer. `setup(resume)` starts the operation and returns a
--- function that cancels it (or nil); `resume(...)` may be called once, from
--- anywhere, and its arguments are what await returns. After `timeout` seconds
--- the operation is cancelled and await returns nil, "timeout". Yields.
---@async
---@param setup fun(resume: fun(...)): fun()?
---@param timeout number? seconds
function M.await(setup, timeout)
    check("loop.await", 1, setup, "setup", "function")
    check("loop.await", 2, timeout, "timeout", "number?")
    local task = current
    if task and coroutine.running() ~= task.co then
        task = nil -- inside a foreign coroutine: run the loop instead
    end
    local answer, suspended, timer, cancel
    local function settle(...)
        if answer then
            return
        end
        answer = table.pack(...)
        if timer then
            timer:stop()
            timer:close()
            timer = nil
        end
        if suspended then
            soon(function()
                resume(task)
            end)
        end
    end
    cancel = setup(settle)
    if answer then
        return table.unpack(answer, 1, answer.n)
    end
    if timeout then
        uv.update_time() -- somebody may have blocked since the loop last looked
        timer = uv.new_timer()
        timer:start(math.max(0, math.ceil(timeout * 1000)), 0, M.guard(function()
            if cancel then
                cancel()
            end
            settle(nil, "timeout")
        end))
    end
    if task then
        suspended = true
        task.cancel_wait = function()
            if cancel then
                cancel()
            end
            if timer then
                timer:stop()
                timer:close()
                timer = nil
            end
            answer = answer or { n = 0 }
        end
        coroutine.yield()
        task.cancel_wait = nil
    else
        run_until(function()
            return answer ~= nil
        end)
    end
    return table.unpack(answer, 1, answer.n)
end

--- Wait in a list until somebody wakes it, or takes the oldest waiter out of it and calls
--- that; returns what it was called with. One that gives up (the timeout, a task that is
--- cancelled) leaves the list. One that is cancelled when it was called already, and has
--- not gone on yet, passes what it was given to `unclaimed(...)`. Yields.
---
--- ```lua
--- local loop = require "sm.loop"
--- local list = {}
--- local task = loop.spawn(function()
---     return loop.wait_in(list)
--- end)
--- loop.sleep(0.001)
--- table.remove(list, 1)("its turn")
--- assert(task:join() == "its turn")
--- ```
---@async
---@param list table the waiters, functions, the oldest first
---@param timeout number? seconds
---@param unclaimed? fun(...)
function M.wait_in(list, timeout, unclaimed)
    check("loop.wait_in", 1, list, "list", "table")
    check("loop.wait_in", 2, timeout, "timeout", "number?")
    check("loop.wait_in", 3, unclaimed, "unclaimed", "function?")
    return M.await(function(settle)
        local given
        local function waiter(...)
            given = table.pack(...)
            settle(...)
        end
        list[#list + 1] = waiter
        return function()
            for i, other in ipairs(list) do
                if other == waiter then
                    table.remove(list, i)
                    return
                end
            end
            if given and unclaimed then
                unclaimed(table.unpack(given, 1, given.n))
            end
        end
    end, timeout)
end

--- Wait in a list until `ready()`, which is asked again each time the list is woken; nil
--- and why once `gone()` says why it never will be; nil, "timeout". Yields.
---@async
---@param list table the waiters
---@param ready fun(): any
---@param gone fun(): string?
---@param timeout number? seconds
---@return true?
---@return string? err
function M.wait_until(list, ready, gone, timeout)
    check("loop.wait_until", 1, list, "list", "table")
    check("loop.wait_until", 2, ready, "ready", "function")
    check("loop.wait_until", 3, gone, "gone", "function")
    check("loop.wait_until", 4, timeout, "timeout", "number?")
    local deadline = timeout and M.now() + timeout
    while not ready() do
        local why = gone()
        if why then
            return nil, why
        end
        local left = deadline and deadline - M.now()
        if left and left <= 0 then
            return nil, "timeout"
        end
        M.wait_in(list, left)
    end
    return true
end

--- Wake all that wait in a list; `wait_in` returns true to them.
---@param list table
function M.wake(list)
    check("loop.wake", 1, list, "list", "table")
    local waiters = table.move(list, 1, #list, 1, {})
    for i = #list, 1, -1 do
        list[i] = nil
    end
    for _, waiter in ipairs(waiters) do
        waiter(true)
    end
end

--- Wait until the task ends and return its results; its error is rethrown.
--- With a timeout in seconds: nil, "timeout". Yields.
---@async
---@param timeout number?
function Task:join(timeout)
    check("task:join", 1, timeout, "timeout", "number?")
    if not self.done then
        local _, why = M.wait_in(self.waiters, timeout)
        if why == "timeout" and not self.done then
            return nil, "timeout"
        end
    end
    if not self.ok then
        error(self.results[1], 0)
    end
    return table.unpack(self.results, 1, self.results.n)
end

--- End the task where it waits: its operation is cancelled, its `<close>`
--- variables are closed. A task cannot cancel itself.
function Task:cancel()
    if self.done then
        return
    end
    assert(current ~= self, "a task cannot cancel itself")
    self.cancelled = true
    if self.cancel_wait then
        self.cancel_wait()
        self.cancel_wait = nil
    end
    local _, err = coroutine.close(self.co)
    finish(self, false, err or "cancelled")
end

--- Whether the task has ended.
---@return boolean
function Task:finished()
    return self.done
end

--- Wrap a luv callback: an error stops the loop and is rethrown by
--- `loop.run` instead of ending the process.
---@param fn function
---@return function
function M.guard(fn)
    check("loop.guard", 1, fn, "fn", "function")
    return function(...)
        local ok, err = xpcall(fn, debug.traceback, ...)
        if not ok then
            failure = failure or err
            uv.stop()
        end
    end
end

--- Sleep. Yields.
---
--- ```lua
--- local loop = require "sm.loop"
--- local before = loop.now()
--- loop.sleep(0.002)
--- assert(loop.now() > before)
--- ```
---@async
---@param seconds number
function M.sleep(seconds)
    check("loop.sleep", 1, seconds, "seconds", "number")
    M.await(function(settle)
        uv.update_time() -- as in await
        local t = uv.new_timer()
        t:start(math.max(0, math.ceil(seconds * 1000)), 0, M.guard(function()
            t:close()
            settle(true)
        end))
        return function()
            if not t:is_closing() then
                t:close()
            end
        end
    end)
end

--- Monotonic time in seconds.
---@return number
function M.now()
    return uv.hrtime() / 1e9
end

--- Wait until `fd` is readable (or "w": writable). Returns true, or nil,
--- "timeout". The descriptor stays open and the caller's. Yields.
---@async
---@param fd integer
---@param timeout number? seconds
---@param mode? "r"|"w"|"rw"
function M.readable(fd, timeout, mode)
    check("loop.readable", 1, fd, "fd", "integer")
    check("loop.readable", 2, timeout, "timeout", "number?")
    check("loop.readable", 3, mode, "mode", "string?")
    return M.await(function(settle)
        local poll = assert(uv.new_poll(fd))
        local function stop()
            if not poll:is_closing() then
                poll:stop()
                poll:close()
            end
        end
        poll:start(mode or "r", M.guard(function(err)
            stop()
            if err then
                settle(nil, err)
            else
                settle(true)
            end
        end))
        return stop
    end, timeout)
end

--- Run `fn(...)` as a task and the loop until that task ends; returns its
--- results, rethrows its error. Inside a task it is an ordinary call.
---@param fn function
function M.run(fn, ...)
    check("loop.run", 1, fn, "fn", "function")
    if current and coroutine.running() == current.co then
        return fn(...)
    end
    local task = M.spawn(fn, ...)
    task.quiet = true
    run_until(function()
        return task.done
    end)
    if not task.ok then
        error(task.results[1], 0)
    end
    return table.unpack(task.results, 1, task.results.n)
end

--- Run the loop until nothing is left to wait for.
function M.finish()
    while true do
        if failure then
            local err = failure
            failure = nil
            error(err, 0)
        end
        if not uv.run("default") and not failure and ready_last < ready_first then
            return
        end
    end
end

--- The loop as a waitable, for a host with its own loop: wait on `fd` for at
--- most `timeout` seconds, then call `step()`.
---@return integer fd
function M.pollfd()
    return uv.backend_fd()
end

--- How long to wait for `pollfd` at most.
---@return number? seconds nil: for ever
function M.timeout()
    local ms = uv.backend_timeout()
    if not ms or ms < 0 then
        return nil
    end
    return ms / 1000
end

--- Do what is due without waiting.
---
--- ```lua
--- local loop = require "sm.loop"
--- local task = loop.spawn(function() end)
--- while not task:finished() do
---     loop.step() -- a host polls loop.pollfd() for loop.timeout() first
--- end
--- ```
function M.step()
    uv.run("nowait")
    if failure then
        local err = failure
        failure = nil
        error(err, 0)
    end
end

return M
