-- SPDX-License-Identifier: Apache-2.0
--
-- Where the time of a boot went, for `sm run --verbose`.
--
-- Host marks are readings of one clock (loop.now). The guest's are readings of
-- its own, whose zero is not known to the host better than the moment the
-- kernel was entered; they are shown against that.

local M = {}

--- The timeline of a VM as text.
---@param vm table a started VM
---@param marks { process: number, image: number } readings of loop.now by the caller
---@return string
function M.format(vm, marks)
    local t = vm.timeline
    local rows = {}
    local zero = marks.process
    local function row(at, what)
        if at then
            rows[#rows + 1] = { at = at - zero, what = what }
        end
    end
    row(marks.process, "process start")
    row(marks.image, "image ready")
    row(t.vm_ready, "VM ready")
    row(t.kernel_entered, "kernel entered")
    row(t.resumed, "copy runs")
    local g = vm.guest_marks or {}
    if t.kernel_entered and g.init then
        row(t.kernel_entered + g.init / 1e9, "init")
    end
    row(t.hello, "agent answers")
    row(t.booted, t.resumed and "told who it is" or "root mounted")
    row(t.command, "your command")
    table.sort(rows, function(a, b)
        return a.at < b.at
    end)
    local out, before = {}, 0
    for _, r in ipairs(rows) do
        out[#out + 1] = ("  %9.1f ms  %+9.1f  %s\n"):format(r.at * 1e3, (r.at - before) * 1e3, r.what)
        before = r.at
    end
    return "timeline:\n" .. table.concat(out)
end

return M
