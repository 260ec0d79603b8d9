-- SPDX-License-Identifier: Apache-2.0
--
-- Base64 (RFC 4648, section 4), for credentials. Decoding is strict about the
-- alphabet and lenient about missing padding.

local M = {}

local alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
local value_of = {}
for i = 1, #alphabet do
    value_of[alphabet:byte(i)] = i - 1
end

---@param bytes string
---@return string
function M.encode(bytes)
    local out = {}
    for i = 1, #bytes, 3 do
        local a, b, c = bytes:byte(i, i + 2)
        local word = a << 16 | (b or 0) << 8 | (c or 0)
        for shift = 18, 0, -6 do
            local index = (word >> shift & 63) + 1
            out[#out + 1] = alphabet:sub(index, index)
        end
        if not c then
            out[#out] = "="
            if not b then
                out[#out - 1] = "="
            end
        end
    end
    return table.concat(out)
end

---@param text string
---@return string? bytes nil if it is not base64
function M.decode(text)
    text = text:gsub("%s+", ""):gsub("=+$", "")
    if #text % 4 == 1 then
        return nil
    end
    local out, word, bits = {}, 0, 0
    for i = 1, #text do
        local value = value_of[text:byte(i)]
        if not value then
            return nil
        end
        word, bits = (word << 6 | value) & 0xffffff, bits + 6
        if bits >= 8 then
            bits = bits - 8
            out[#out + 1] = string.char(word >> bits & 255)
        end
    end
    return table.concat(out)
end

return M
