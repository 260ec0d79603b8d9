-- SPDX-License-Identifier: Apache-2.0
--
-- A look into a running guest: memory by its own (virtual) addresses, and the
-- rings of a device's queues. Works on a VM of sm.core, on a worker's proxy
-- and on what sm.start gives.

local M = {}

local PAGE = 4096

--- The machine that takes commands: that of what sm.start gives, or the thing itself.
---@param vm table|userdata
---@return table|userdata
function M.machine_of(vm)
    return type(vm) == "table" and vm.parts and vm:machine() or vm
end

-- Call fn(gpa, len) for each piece of a virtual range.
local function each_piece(vm, address, len, vcpu, fn)
    while len > 0 do
        local gpa, err = vm:translate(vcpu or 0, address)
        if not gpa then
            return nil, err
        end
        local n = math.min(len, PAGE - address % PAGE)
        local ok
        ok, err = fn(gpa, n)
        if not ok then
            return nil, err
        end
        address, len = address + n, len - n
    end
    return true
end

--- Bytes at a virtual address, as a vCPU's page tables have it. Yields.
---@async
---@param vm table|userdata
---@param address integer
---@param len integer
---@param vcpu integer? 0 when absent
---@return string?
---@return string? err
function M.peek(vm, address, len, vcpu)
    vm = M.machine_of(vm)
    local parts = {}
    local ok, err = each_piece(vm, address, len, vcpu, function(gpa, n)
        local bytes, why = vm:read(gpa, n)
        parts[#parts + 1] = bytes
        return bytes, why
    end)
    if not ok then
        return nil, err
    end
    return table.concat(parts)
end

--- Write bytes at a virtual address. Yields.
---@async
---@param vm table|userdata
---@param address integer
---@param bytes string
---@param vcpu integer?
---@return true?
---@return string? err
function M.poke(vm, address, bytes, vcpu)
    vm = M.machine_of(vm)
    local at = 1
    return each_piece(vm, address, #bytes, vcpu, function(gpa, n)
        at = at + n
        return vm:write(gpa, bytes:sub(at - n, at - 1))
    end)
end

local function descriptor(vm, queue, index)
    local bytes, err = vm:read(queue.desc + 16 * index, 16)
    if not bytes then
        return nil, err
    end
    local address, len, flags, next_index = string.unpack("<I8I4I2I2", bytes)
    return {
        index = index, address = address, len = len,
        next = flags & 1 ~= 0 and next_index or nil,
        device_writes = flags & 2 ~= 0, indirect = flags & 4 ~= 0,
    }
end

local function chain(vm, queue, head)
    local list, index = {}, head
    while index and #list < queue.size do
        local desc, err = descriptor(vm, queue, index)
        if not desc then
            return nil, err
        end
        list[#list + 1] = desc
        index = desc.next and desc.next % queue.size
    end
    return list
end

--- What lies in a queue of a device: its two indices, and the chains that the
--- device has not given back. Yields.
---@async
---@param vm table|userdata
---@param device string "blk0"
---@param number integer? of the queue, 0 when absent
---@return table? { size, avail, used, pending = { { { index, address, len, … }, … }, … } }
---@return string? err
function M.virtqueue(vm, device, number)
    vm = M.machine_of(vm)
    local devices, err = vm:devices()
    if not devices then
        return nil, err
    end
    for _, candidate in ipairs(devices) do
        if candidate.name == device then
            local queue = candidate.queues[(number or 0) + 1]
            if not queue then
                return nil, ("%s has %d queues"):format(device, #candidate.queues)
            elseif not queue.ready then
                return { size = 0, avail = 0, used = 0, pending = {} }
            end
            local avail, used = vm:read(queue.avail + 2, 2), vm:read(queue.used + 2, 2)
            if not (avail and used) then
                return nil, "the queue lies outside of memory"
            end
            avail, used = string.unpack("<I2", avail), string.unpack("<I2", used)
            local pending = {}
            for i = 0, math.min((avail - used) & 0xffff, queue.size) - 1 do
                local slot = (used + i) % queue.size
                local head = string.unpack("<I2", assert(vm:read(queue.avail + 4 + 2 * slot, 2)))
                pending[#pending + 1] = chain(vm, queue, head % queue.size)
            end
            return { size = queue.size, avail = avail, used = used, pending = pending }
        end
    end
    return nil, "no device named " .. tostring(device)
end

--- Bytes as people read them: 16 a row, with text beside.
---@param bytes string
---@param address integer? of the first
---@return string
function M.hexdump(bytes, address)
    local rows = {}
    for at = 1, #bytes, 16 do
        local row = bytes:sub(at, at + 15)
        rows[#rows + 1] = ("%016x  %-48s |%s|"):format((address or 0) + at - 1,
            row:gsub(".", function(c) return ("%02x "):format(c:byte()) end),
            (row:gsub("[^\32-\126]", ".")))
    end
    return table.concat(rows, "\n")
end

return M
