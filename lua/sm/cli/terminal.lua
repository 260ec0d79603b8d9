-- SPDX-License-Identifier: Apache-2.0
--
-- The user's terminal: raw mode, size, and getting it back whatever happens.
--
-- Raw mode must end even when this process is killed with -9. So a small
-- guard, `stty` behind a pipe, is started first: the kernel closes the pipe
-- when we are gone, for whatever reason, and the guard puts the saved
-- settings back. Closing in good order goes the same way.

local uv = require "luv"
local loop = require "sm.loop"

local M = {}

local Terminal = {}
Terminal.__index = Terminal

--- Whether a descriptor is a terminal.
---@param fd integer
---@return boolean
function M.is_tty(fd)
    return uv.guess_handle(fd) == "tty"
end

local function capture(fd, ...)
    -- stty reads its own stdin, so the terminal is handed down as that.
    local out = assert(uv.new_pipe(false))
    local text, done, code = {}, false, nil
    local handle, err = uv.spawn("stty", { args = { ... }, stdio = { fd, out, 2 } }, loop.guard(function(c)
        code = c
    end))
    if not handle then
        out:close()
        return nil, "stty: " .. tostring(err)
    end
    loop.await(function(settle)
        out:read_start(loop.guard(function(_, chunk)
            if chunk then
                text[#text + 1] = chunk
            else
                done = true
                settle(true)
            end
        end))
    end)
    assert(done)
    out:close()
    if not handle:is_closing() then
        handle:close()
    end
    return (table.concat(text):gsub("%s+$", ""))
end

--- Put the terminal `fd` into raw mode. Yields.
---@async
---@param fd integer
---@return table? terminal with :restore()
---@return string? err
function M.raw(fd)
    local saved, err = capture(fd, "-g")
    if not saved or saved == "" then
        return nil, err or "stty: cannot read the terminal's settings"
    end
    local pipe = assert(uv.new_pipe(false))
    local self = setmetatable({ pipe = pipe }, Terminal)
    -- A background process that changes the terminal would be stopped by
    -- SIGTTOU; and it must outlive the signals that end us.
    local handle
    handle, err = uv.spawn("sh", {
        args = { "-c", 'trap "" TTOU INT TERM HUP QUIT; cat >/dev/null; exec stty "$0" <&3', saved },
        stdio = { pipe, nil, nil, fd },
    }, loop.guard(function()
        self.ended = true
        if self.on_end then
            self.on_end()
        end
    end))
    if not handle then
        pipe:close()
        return nil, "sh: " .. tostring(err)
    end
    self.handle = handle
    -- Raw both ways: the guest's own terminal edits lines and turns \n into
    -- \r\n already.
    local _, raw_err = capture(fd, "raw", "-echo")
    if raw_err then
        self:restore()
        return nil, raw_err
    end
    return self
end

--- Restore the settings; returns when it is done. Yields.
---@async
function Terminal:restore()
    if self.restored then
        return
    end
    self.restored = true
    self.pipe:close()
    if not self.ended then
        loop.await(function(settle)
            self.on_end = settle
            if self.ended then
                settle()
            end
        end, 5)
    end
    if not self.handle:is_closing() then
        self.handle:close()
    end
end

Terminal.__close = Terminal.restore

--- Rows and columns of the terminal, 24 × 80 where nobody knows.
---@param fd integer
---@return integer rows
---@return integer cols
function M.size(fd)
    local tty = uv.new_tty(fd, false)
    if not tty then
        return 24, 80
    end
    local cols, rows = tty:get_winsize()
    tty:close()
    if not cols or cols == 0 or rows == 0 then
        return 24, 80
    end
    return rows, cols
end

return M
