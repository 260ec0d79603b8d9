-- SPDX-License-Identifier: Apache-2.0
--
-- A guest's tar stream on its way to the host's tar: device nodes and fifos are
-- dropped, since root's tar would make them, and what only few understand is
-- refused rather than guessed at. Names need no care here: GNU tar strips
-- leading slashes, refuses "..", and makes links that lead out last.
--
-- Not a general reader: ustar, GNU long names and pax headers.

local M = {}

local BLOCK = 512
local HEADER_MAX = 1 << 20 -- of a pax or long-name header's data

local Filter = {}
Filter.__index = Filter

--- `filter:feed(bytes)` returns what may go on; nil and why when the stream
--- cannot be trusted. After its end everything is padding, and dropped.
---@return table filter
function M.new()
    return setmetatable({ input = "", pass = 0, pending = {}, need = BLOCK }, Filter)
end

local function number(field)
    local first = field:byte()
    if first and first >= 0x80 then
        local value = first & 0x7f
        for i = 2, #field do
            if value >= 1 << 54 then
                return nil
            end
            value = value << 8 | field:byte(i)
        end
        return value
    end
    local text = field:match "^ *([0-7]*)[ %z]*$"
    return text and (text == "" and 0 or tonumber(text, 8))
end

local function checksum_is_right(block)
    local sum = 8 * 32
    for i = 1, BLOCK do
        if i <= 148 or i > 156 then
            sum = sum + block:byte(i)
        end
    end
    return number(block:sub(149, 156)) == sum
end

local function padded(size)
    return (size + BLOCK - 1) // BLOCK * BLOCK
end

-- One header block, and for extended headers their data.
local function header(self, block, out)
    if block == ("\0"):rep(BLOCK) then
        out[#out + 1] = block
        return true
    elseif not checksum_is_right(block) then
        return nil, "the guest's tar made a header that is none"
    end
    local kind, size = block:sub(157, 157), number(block:sub(125, 136))
    if not size then
        return nil, "the guest's tar made a size that is none"
    elseif kind == "x" or kind == "L" or kind == "K" then
        if size > HEADER_MAX then
            return nil, "the guest's tar made a header of " .. size .. " bytes"
        end
        self.pending[#self.pending + 1] = block
        self.extra = { size = padded(size), pax = kind == "x" and size }
    elseif kind == "3" or kind == "4" or kind == "6" then
        self.pending, self.pax_size = {}, nil
    elseif kind == "0" or kind == "\0" or kind == "7" then
        table.move(self.pending, 1, #self.pending, #out + 1, out)
        out[#out + 1] = block
        self.pass = padded(self.pax_size or size)
        self.pending, self.pax_size = {}, nil
    elseif kind == "1" or kind == "2" or kind == "5" then
        if (self.pax_size or size) ~= 0 then
            return nil, "the guest's tar gave a link or folder contents"
        end
        table.move(self.pending, 1, #self.pending, #out + 1, out)
        out[#out + 1] = block
        self.pending, self.pax_size = {}, nil
    else
        return nil, ("the guest's tar made an entry of type %q"):format(kind)
    end
    return true
end

-- The data of an extended header: kept with it; a pax size counts.
local function extended(self, data)
    self.pending[#self.pending + 1] = data
    if self.extra.pax then
        local text, at = data:sub(1, self.extra.pax), 1
        while at <= #text do
            local length = tonumber(text:match("^(%d+) ", at))
            if not length or length < 5 or at + length - 1 > #text then
                return nil, "the guest's tar made a pax header that is none"
            end
            local key, value = text:sub(at, at + length - 2):match "^%d+ ([^=]+)=(.*)$"
            if key == "size" then
                self.pax_size = math.tointeger(tonumber(value))
                if not self.pax_size or self.pax_size < 0 or self.pax_size >= 1 << 54 then
                    return nil, "the guest's tar made a size that is none"
                end
            elseif not key or key:find "^GNU%.sparse" then
                return nil, "the guest's tar made a sparse entry"
            end
            at = at + length
        end
    end
    self.extra = nil
    return true
end

---@param bytes string
---@return string? out
---@return string? err
function Filter:feed(bytes)
    local input, at, out = self.input .. bytes, 1, {}
    while true do
        local have = #input - at + 1
        if self.pass > 0 then
            local take = math.min(self.pass, have)
            if take == 0 then
                break
            end
            out[#out + 1] = input:sub(at, at + take - 1)
            self.pass, at = self.pass - take, at + take
        else
            local want = self.extra and self.extra.size or BLOCK
            if have < want then
                break
            end
            local piece = input:sub(at, at + want - 1)
            local ok, err
            if self.extra then
                ok, err = extended(self, piece)
            else
                ok, err = header(self, piece, out)
            end
            if not ok then
                return nil, err
            end
            at = at + want
        end
    end
    self.input = input:sub(at)
    return table.concat(out)
end

return M
