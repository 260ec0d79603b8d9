-- SPDX-License-Identifier: Apache-2.0
--
-- A real VM, booted and used from inside programs with loops of their own: a
-- strict C host with poll(2), luv, cqueues and Prosody.

local shell = require "support.shell"
local spec = require "support.vm"

local one = spec.image "one"

describe("a product VM in a host", function()
    after_each(function()
        assert.same({}, spec.settled_leftovers())
    end)

    it("runs under poll(2), two states in two threads, and takes nothing", function()
        assert.equal("ok\n", shell.run("build/host 2 spec/host/guest.lua " .. one .. " 2>&1"))
    end)

    it("runs under luv", function()
        assert.equal("ok\n", shell.run("lua5.4 spec/host/luv.lua spec/host/guest.lua " .. one))
    end)

    it("runs under cqueues", function()
        assert.equal("ok\n", shell.run("lua5.4 spec/host/cqueues.lua spec/host/guest.lua " .. one))
    end)

    it("runs inside Prosody", function()
        assert.equal("ok\nended in order\n", shell.run("spec/host/prosody/run spec/host/guest.lua " .. one))
    end)
end)
