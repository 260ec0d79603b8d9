-- SPDX-License-Identifier: Apache-2.0
--
-- A real terminal for a spec: tmux plays the user.

local loop = require "sm.loop"
local shell = require "support.shell"
local uv = require "luv"

-- Its socket lies on a file system of this kernel: /tmp is another's in the lab.
uv.os_setenv("TMUX_TMPDIR", os.getenv "XDG_RUNTIME_DIR")

local M = {}

local servers = 0 -- one for each terminal: the last one may still be on its way out

---@class support.Terminal
local Terminal = {}
Terminal.__index = Terminal

--- A terminal with a shell in it, of so many columns and rows.
---@param columns integer
---@param rows integer
function M.open(columns, rows)
    servers = servers + 1
    local self = setmetatable({ server = ("tty%d-%d"):format(uv.os_getpid(), servers) }, Terminal)
    self:tmux("new-session", "-d", "-s", "s", "-x", tostring(columns), "-y", tostring(rows),
        "env", "TERM=xterm", "bash", "--norc")
    self:keys("PS1='host> '; clear", "Enter")
    self:see "host> "
    return self
end

function Terminal:tmux(...)
    return shell.run { "tmux", "-L", self.server, "-f", "/dev/null", ... }
end

function Terminal:keys(...)
    self:tmux("send-keys", "-t", "s", ...)
end

---@param columns integer
---@param rows integer
function Terminal:resize(columns, rows)
    self:tmux("resize-window", "-t", "s", "-x", tostring(columns), "-y", tostring(rows))
end

--- What it shows. Each line begins with a line break and keeps the spaces at its
--- end: a prompt ends in one.
function Terminal:screen()
    return "\n" .. self:tmux("capture-pane", "-p", "-N", "-t", "s")
end

--- Look until the screen shows the pattern; a pane has no event to wait for.
function Terminal:see(pattern, seconds)
    local limit = loop.now() + (seconds or 120)
    while true do
        local text = self:screen()
        if text:find(pattern) then
            return text
        end
        assert(loop.now() < limit, "the screen never showed " .. pattern .. ":\n" .. text)
        loop.sleep(0.2)
    end
end

function Terminal:close()
    pcall(self.tmux, self, "kill-server")
end
Terminal.__close = Terminal.close

return M
