-- SPDX-License-Identifier: Apache-2.0
--
-- A machine on the fake backend that the product's snapshot code takes for one
-- of its own. As a program (`lua5.4 support/saved.lua`) it saves one for ever,
-- under ever new names, until it is killed: whole, as diffs, copied while it runs;
-- and flattens and removes some of them.
package.cpath = package.cpath:gsub("([^;]*build/)%?%.so", "%1fake/?.so;%1?.so")

local core = require "sm.core"

local M = {}

function M.machine()
    local vm = assert(core.vm { memory = "2M" })
    assert(vm:write(0x1000, "\xeb\xfe")) -- jmp to itself
    for page = 1, 200 do
        assert(vm:write(0x10000 + page * 4096, ("%d "):format(page):rep(200)))
    end
    assert(vm:enter(0, "real16", 0x1000))
    assert(vm:start())
    return {
        id = "fake",
        image = { reference = "app:1", name = "app:1", digest = "sha256:" .. ("0"):rep(64), size = 0,
            extents = {}, config = { config = {} } },
        cfg = { cpus = 1, memory = 2 << 20 },
        parts = { worker = vm, devices = { { type = "serial" } } },
    }
end

if arg and arg[0] and arg[0]:match "saved%.lua$" then
    local capture, snapshot = require "sm.capture", require "sm.snapshot"
    require("sm.loop").run(function()
        local n = 0
        local function save(vm, opts)
            n = n + 1
            opts.name = ("s%d-%d"):format(require("luv").os_getpid(), n)
            return assert(capture.create(vm, opts))
        end
        while true do
            local vm = M.machine()
            save(vm, {})
            local whole, diff = save(vm, { diff = true }), save(vm, { diff = true, live = true })
            assert(diff.parent.id == whole.id)
            assert(snapshot.flatten(diff))
            assert(snapshot.remove(whole))
            save(vm, { diff = true })
            vm.parts.worker:close()
        end
    end)
end

return M
