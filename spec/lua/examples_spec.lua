-- SPDX-License-Identifier: Apache-2.0
-- The example scripts that need no Linux, on the fake backend; all of them run
-- on KVM in spec/soak/examples_spec.lua.

local shell = require "support.shell"
local uv = require "luv"

local here = assert(uv.cwd())

local function run(...)
    return shell.run { "env", ("LUA_PATH=%s/lua/?.lua;;"):format(here), ("LUA_CPATH=%s/build/fake/?.so;;"):format(here),
        "lua5.4", ... }
end

describe("scripts/examples", function()
    it("bare-metal.lua prints from sixteen-bit code", function()
        assert.equal("hello from ring 0\nthe guest ended: reboot\n", run "scripts/examples/bare-metal.lua")
    end)

    it("fleet.lua asks many VMs at once", function()
        assert.equal("20 VMs, 20 right answers\n", run("scripts/examples/fleet.lua", "20"))
    end)
end)
