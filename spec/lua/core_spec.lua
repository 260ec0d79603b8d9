-- SPDX-License-Identifier: Apache-2.0
-- The contract of sm.core's VMs on the fake backend: no hypervisor needed.
package.cpath = package.cpath:gsub("([^;]*)build/%?%.so", "%1build/fake/?.so")

local contract = require "support.core_contract"
local core = require "sm.core"

describe("the build under test", function()
    it("has the fake backend", function()
        assert.equal("fake", core.probe().backend)
    end)
end)

for _, target in ipairs(contract.targets) do
    contract.describe(target, _ENV)
end
