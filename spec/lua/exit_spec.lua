-- SPDX-License-Identifier: Apache-2.0
--
-- A script ends well whatever it closed last. luv 1.44 crashes at the end of a
-- Lua state that leaves a handle half closed, which each of these once did.

local shell = require "support.shell"

-- Run a script of its own with the fake backend; its exit status and words.
local function run(script)
    local dir = shell.tmpdir()
    shell.write(dir .. "/script.lua", [[
        package.cpath = package.cpath:gsub("([^;]*)build/%?%.so", "%1build/fake/?.so") .. ";" .. package.cpath
        local loop = require "sm.loop"
    ]] .. script)
    local _, _, status = os.execute(("lua5.4 %s/script.lua >%s/out 2>&1"):format(dir, dir))
    local out = shell.run { "cat", dir .. "/out" }
    shell.remove(dir)
    return status, out
end

describe("a script that ends", function()
    local ends = {
        ["after closing a VM"] = [[
            require("sm.worker").vm {}:close()
        ]],
        ["after closing a VM whose worker died"] = [[
            local vm = require("sm.worker").vm {}
            os.execute("kill -9 " .. vm:pid())
            repeat
                local event, why = vm:next_event(60)
                assert(why ~= "timeout")
            until not event
            repeat loop.step() until vm.link.exited
            vm:close()
        ]],
        ["with a VM open"] = [[
            vm = require("sm.worker").vm {}
        ]],
        ["in an error, with a VM to be closed"] = [[
            local vm <close> = require("sm.worker").vm {}
            os.exit(pcall(function()
                local other <close> = require("sm.worker").vm {}
                error "on purpose"
            end) and 1 or 0, true)
        ]],
        ["after closing a fetcher that has something to do"] = [[
            local uv = require "luv"
            local server = uv.new_tcp()
            server:bind("127.0.0.1", 0)
            server:listen(1, function() end) -- and never answer
            local fetch = assert(require("sm.fetch").open {})
            local task = loop.spawn(fetch.exchange, fetch, {
                url = "http://127.0.0.1:" .. server:getsockname().port })
            loop.sleep(0)
            assert(next(fetch.waiting))
            fetch:close()
            task:cancel()
        ]],
    }
    for what, script in pairs(ends) do
        it(what, function()
            local status, out = run(script)
            assert.equal("", out)
            assert.equal(0, status)
        end)
    end
end)
