#!/usr/bin/env sm
-- SPDX-License-Identifier: Apache-2.0
--
-- One machine is booted, copied ten times as it stands, another command is run
-- in each copy, and the best one is kept. Line by line it works in the REPL too.
--
--   sm best-of-ten.lua [IMAGE]

local sm = require "sm"

local vm <close> = assert(sm.start(arg[1] or "alpine", { memory = "128M" }))
local best = { score = -1 }
for i, kid in ipairs(assert(vm:fork(10))) do
    local out = assert(kid:exec { argv = { "sh", "-c", ("echo $((%d * 7 %% 11))"):format(i) } }).stdout
    local loser = kid
    if tonumber(out) > best.score then
        loser, best = best.vm, { vm = kid, score = tonumber(out), number = i }
    end
    if loser then loser:close() end
end
print(("copy %d is the best: %d"):format(best.number, best.score))
best.vm:close()
