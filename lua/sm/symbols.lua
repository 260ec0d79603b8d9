-- SPDX-License-Identifier: Apache-2.0
--
-- Names of a kernel's addresses, from its System.map or from the symbol table
-- of an ELF file (ELF-64 specification; little endian).

local M = {}

---@class sm.Symbols
---@field count integer
local Symbols = {}
Symbols.__index = Symbols
Symbols.__name = "sm.Symbols"

function Symbols:__tostring()
    return ("symbols (%d)"):format(self.count)
end

local function new()
    return setmetatable({ by_name = {}, sorted = {}, count = 0 }, Symbols)
end

local function add(self, name, address)
    self.count = self.count + 1
    self.by_name[name] = self.by_name[name] or address
    self.sorted[self.count] = { address = address, name = name }
end

local function finish(self)
    table.sort(self.sorted, function(a, b)
        return math.ult(a.address, b.address)
    end)
    return self
end

local function from_map(text)
    local self = new()
    for line in text:gmatch "[^\n]+" do
        local address, name = line:match "^(%x+) %a (%S+)"
        if not address then
            return nil, "neither an ELF file nor a System.map"
        end
        add(self, name, tonumber(address, 16))
    end
    return finish(self)
end

-- Sections of an ELF-64 file: type, offset, size, link, entry size.
local function sections(elf)
    local shoff = string.unpack("<I8", elf, 0x29)
    local size, count = string.unpack("<I2I2", elf, 0x3b)
    local list = {}
    for i = 0, count - 1 do
        local at = shoff + i * size + 1
        if size < 64 or at + 63 > #elf then
            return nil
        end
        local _, kind, _, _, offset, bytes, link = string.unpack("<I4I4I8I8I8I8I4", elf, at)
        list[i] = { kind = kind, offset = offset, bytes = bytes, link = link }
    end
    return list
end

local SYMTAB, ENTRY = 2, 24

local function add_table(self, elf, symtab, strings)
    for at = symtab.offset + 1, symtab.offset + symtab.bytes - ENTRY + 1, ENTRY do
        if at + ENTRY - 1 > #elf then
            return
        end
        local name, info, _, section, value = string.unpack("<I4BBI2I8", elf, at)
        local from = strings.offset + name + 1
        if name ~= 0 and section ~= 0 and info & 15 <= 2 and from <= #elf then
            add(self, elf:match("^[^\0]*", from), value)
        end
    end
end

local function from_elf(elf)
    if #elf < 64 or elf:byte(5) ~= 2 or elf:byte(6) ~= 1 then
        return nil, "not a 64-bit little-endian ELF file"
    end
    local list = sections(elf)
    local self = new()
    for _, section in pairs(list or {}) do
        if section.kind == SYMTAB and list[section.link] then
            add_table(self, elf, section, list[section.link])
        end
    end
    if self.count == 0 then
        return nil, "no symbol table in it"
    end
    return finish(self)
end

--- Load the names of a kernel.
---@param path string a System.map, or an ELF file with a symbol table
---@return sm.Symbols?
---@return string? err
function M.load(path)
    local file, err = io.open(path, "rb")
    if not file then
        return nil, err
    end
    local text = file:read "a"
    file:close()
    if not text then
        return nil, path .. ": cannot be read"
    end
    local self
    self, err = (text:sub(1, 4) == "\127ELF" and from_elf or from_map)(text)
    if not self then
        return nil, path .. ": " .. err
    end
    return self
end

--- The address of a name, or nil.
---@param name string
---@return integer?
function Symbols:find(name)
    return self.by_name[name]
end

--- "name+0x12" for an address, or nil when none lies at or before it.
---@param address integer
---@return string?
function Symbols:name(address)
    local low, high = 1, self.count
    while low <= high do
        local mid = (low + high) // 2
        if math.ult(address, self.sorted[mid].address) then
            high = mid - 1
        else
            low = mid + 1
        end
    end
    local found = self.sorted[high]
    if not found then
        return nil
    end
    local offset = address - found.address
    return offset == 0 and found.name or ("%s+0x%x"):format(found.name, offset)
end

return M
