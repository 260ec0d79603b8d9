-- SPDX-License-Identifier: Apache-2.0
--
-- Private memory of the worker of an idle 128 MiB guest, beyond the guest's
-- own pages.
--
--   sm spec/bench/idle.lua IMAGE

local sm = require "sm"
package.path = "spec/?.lua;" .. package.path
local spec = require "support.vm"

local vm <close> = assert(sm.start(..., { memory = "128M" }))
assert(vm:exec { argv = { "/bin/true" } })
local m = spec.mappings(vm.parts.worker:pid(), 128 << 20)
print(("private memory of an idle guest's worker: %d KiB"):format(m.private >> 10))
