-- SPDX-License-Identifier: Apache-2.0
-- Run control and devices in Lua on the fake backend, which has every kind of
-- breakpoint.
package.cpath = package.cpath:gsub("([^;]*)build/%?%.so", "%1build/fake/?.so")

local contract = require "support.control_contract"

describe("the build under test", function()
    it("has the fake backend", function()
        assert.equal("fake", contract.core.probe().backend)
    end)
end)

for _, target in ipairs(contract.targets) do
    target.cycles = 50
    contract.describe(target, _ENV, function()
        return true
    end)
end
