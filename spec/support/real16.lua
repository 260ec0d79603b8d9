-- SPDX-License-Identifier: Apache-2.0
--
-- Bare-metal programs for specs: pieces of x86 real mode as bytes, put together
-- with `..`. Only instructions that the fake backend interprets (core/fake),
-- so the same program runs there and on KVM.

local M = {}

local function word(n)
    return string.pack("<I2", n & 0xffff)
end

M.halt = "\xf4"
M.forever = "\xeb\xfe" -- jmp to itself
M.triple_fault_idt = 6 -- bytes that triple_fault wants zeroed

--- mov al, byte
function M.al(byte)
    return "\xb0" .. string.char(byte)
end

--- mov ax, word
function M.ax(n)
    return "\xb8" .. word(n)
end

--- mov eax, dword
function M.eax(n)
    return "\x66\xb8" .. string.pack("<I4", n)
end

--- mov dx, port; mov al, byte; out dx, al
function M.out(port, byte)
    return "\xba" .. word(port) .. M.al(byte) .. "\xee"
end

--- Each byte of a text to a port.
function M.print(port, text)
    local code = { "\xba" .. word(port) }
    for i = 1, #text do
        code[#code + 1] = M.al(text:byte(i)) .. "\xee"
    end
    return table.concat(code)
end

--- mov dx, port; in al, dx
function M.in8(port)
    return "\xba" .. word(port) .. "\xec"
end

--- mov dx, port; in eax, dx
function M.in32(port)
    return "\xba" .. word(port) .. "\x66\xed"
end

--- mov [addr], ax  (DS-relative)
function M.store16(addr)
    return "\xa3" .. word(addr)
end

--- mov [addr], eax
function M.store32(addr)
    return "\x66\xa3" .. word(addr)
end

--- mov ax, [addr]
function M.load16(addr)
    return "\xa1" .. word(addr)
end

--- mov eax, [addr]
function M.load32(addr)
    return "\x66\xa1" .. word(addr)
end

--- ds = segment; spoils bx
function M.ds(segment)
    return "\xbb" .. word(segment) .. "\x8e\xdb" -- mov bx, imm; mov ds, bx
end

--- Count in ax and keep it at addr, for ever. inc ax; mov [addr], ax; jmp back
function M.count(addr)
    return "\x40" .. M.store16(addr) .. "\xeb\xfa"
end

--- lidt [zeros]; int3: no way to take a trap
function M.triple_fault(zeros)
    return "\x0f\x01\x1e" .. word(zeros) .. "\xcc"
end

return M
