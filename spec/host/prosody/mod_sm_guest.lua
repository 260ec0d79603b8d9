-- SPDX-License-Identifier: Apache-2.0
--
-- A module of Prosody (the XMPP server, Debian's real host for Lua 5.4) that
-- works with VMs: the loop is a descriptor that Prosody's own loop watches.

local server = require "net.server"
local timer = require "util.timer"

local script = assert(loadfile(os.getenv "SM_HOST_SCRIPT"))(1, os.getenv "SM_HOST_ARG")
local watch, wakeup

local function turn()
    local ok, err = pcall(script.step)
    if not ok or script.done() then
        module:log(ok and "info" or "error", "sm: %s", ok and "ok" or err)
        if watch then
            watch:close()
            watch = nil
        end
        return
    end
    local left = script.timeout()
    if wakeup then
        timer.stop(wakeup)
    end
    wakeup = left and timer.add_task(left, turn)
end

watch = server.watchfd(script.pollfd(), turn)
timer.add_task(0, turn)
