-- SPDX-License-Identifier: Apache-2.0
--
-- Child processes on the loop, with the shape of luv's spawn. Not luv's own,
-- because libuv installs a SIGCHLD handler in place of the host program's; here
-- the end of a child is a pidfd that gets ready (core/lua_spawn.c).
--
-- Threads: the loop's.

local uv = require "luv"
local core = require "sm.core"
local loop = require "sm.loop"

local M = {}

---@class sm.Child
---@field pid integer
local Child = {}
Child.__index = Child
Child.__name = "sm.Child"

local NUMBERS = { sigkill = 9, sigterm = 15, sigint = 2 }

-- What stands for each descriptor of the child, and what to close after.
local function place(stdio)
    local fds, ours, n = { n = 0 }, {}, 0
    for i in pairs(stdio) do
        n = math.max(n, i)
    end
    fds.n = n
    for i = 1, n do
        local entry = stdio[i]
        if type(entry) == "userdata" then
            local pair, err = uv.socketpair("stream", nil, { nonblock = true }, {})
            if not pair then
                return nil, err, ours
            end
            entry:open(pair[1])
            fds[i] = pair[2]
            ours[#ours + 1] = pair[2]
        else
            fds[i] = entry
        end
    end
    return fds, nil, ours
end

--- Start a program. `stdio[1]` is its standard input, and so on: a descriptor,
--- a fresh luv pipe for our end of a stream, nil for /dev/null. `on_exit(code,
--- signal)` is called once.
---@param path string looked for on the PATH
---@param opts { args: string[]?, stdio: table?, detached: boolean? }
---@param on_exit fun(code: integer, signal: integer)
---@return sm.Child?
---@return integer|string pid, or why
function M.spawn(path, opts, on_exit)
    local fds, err, ours = place(opts.stdio or {})
    local pid, pidfd, errno
    if fds then
        pid, pidfd, errno = core.spawn(path, opts.args or {}, fds, opts.detached)
        err = errno and (uv.translate_sys_error(errno)) or pidfd -- "ENOENT: …", as luv says it
    end
    for _, fd in ipairs(ours) do
        uv.fs_close(fd)
    end
    if not pid then
        return nil, err
    end
    local self = setmetatable({ pid = pid, pidfd = pidfd, poll = assert(uv.new_poll(pidfd)) }, Child)
    self.poll:start("r", loop.guard(function()
        local code, signal = core.reap(pidfd)
        if code or signal ~= "again" then
            self.poll:stop()
            self.exited = true
            on_exit(code or 255, code and signal or 0)
        end
    end))
    return self, pid
end

--- Send a signal; nothing once it has ended.
---@param signal string|integer "sigkill", "sigterm", "sigint" or a number
function Child:kill(signal)
    if self.pidfd and not self.exited then
        core.signal(self.pidfd, NUMBERS[signal] or signal)
    end
end

---@return boolean
function Child:is_closing()
    return self.pidfd == nil
end

--- Stop watching it. A child that runs goes on, unwatched. Idempotent.
function Child:close()
    if self.pidfd then
        self.poll:stop()
        self.poll:close()
        uv.fs_close(self.pidfd)
        self.pidfd = nil
    end
end

function Child:ref()
    if self.pidfd then
        self.poll:ref()
    end
end

function Child:unref()
    if self.pidfd then
        self.poll:unref()
    end
end

return M
