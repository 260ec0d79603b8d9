-- SPDX-License-Identifier: Apache-2.0
--
-- Tar archives byte by byte (POSIX.1-2001 pax over ustar), for what no sane
-- tool writes: whiteouts of any type, names with "..", wrong orders, bombs.
--
--   tar.make { "dir/", { "dir/file", data = "x" }, { "l", link = "dir" } }
--
-- An entry is a name, a folder when it ends in "/", or a table: name first, then
-- data, link (symbolic), hard (hard link), dev = {"c"|"b", major, minor}, fifo,
-- mode, uid, gid, mtime, size (when it should lie), pax = {key = value},
-- xattr = {name = value}, type (a typeflag).

local M = {}

local function octal(n, width)
    return ("%0" .. width - 1 .. "o\0"):format(n)
end

local function padded(data)
    return data .. ("\0"):rep(-#data % 512)
end

local function header(name, flag, size, e)
    local dev = e.dev or {}
    local head = table.concat {
        name:sub(1, 100), ("\0"):rep(100 - math.min(#name, 100)),
        octal(e.mode or (flag == "5" and 493 or 420), 8), octal(e.uid or 0, 8), octal(e.gid or 0, 8),
        octal(size, 12), octal(e.mtime or 1000000000, 12), "        ", flag,
        (e.link or e.hard or ""):sub(1, 100), ("\0"):rep(100 - math.min(#(e.link or e.hard or ""), 100)),
        "ustar\00000", ("\0"):rep(64), octal(dev[2] or 0, 8), octal(dev[3] or 0, 8),
    }
    head = head .. ("\0"):rep(512 - #head)
    local sum = 0
    for i = 1, 512 do
        sum = sum + head:byte(i)
    end
    return head:sub(1, 148) .. ("%06o\0 "):format(sum) .. head:sub(157)
end

local function pax_record(key, value)
    local rest = " " .. key .. "=" .. value .. "\n"
    local n = #rest + 1
    while #tostring(n) + #rest ~= n do
        n = #tostring(n) + #rest
    end
    return n .. rest
end

local function typeflag(e)
    if e.type then
        return e.type
    elseif e.link then
        return "2"
    elseif e.hard then
        return "1"
    elseif e.dev then
        return e.dev[1] == "c" and "3" or "4"
    elseif e.fifo then
        return "6"
    end
    return e[1]:sub(-1) == "/" and "5" or "0"
end

--- One entry, extended header included, without the end of the archive.
function M.entry(e)
    e = type(e) == "string" and { e } or e
    local pax = {}
    for k, v in pairs(e.pax or {}) do
        pax[#pax + 1] = pax_record(k, v)
    end
    for k, v in pairs(e.xattr or {}) do
        pax[#pax + 1] = pax_record("SCHILY.xattr." .. k, v)
    end
    if #e[1] > 100 then
        pax[#pax + 1] = pax_record("path", e[1])
    end
    local link = e.link or e.hard
    if link and #link > 100 then
        pax[#pax + 1] = pax_record("linkpath", link)
    end
    table.sort(pax)
    local out = ""
    if #pax > 0 then
        local body = table.concat(pax)
        out = header("pax", "x", #body, {}) .. padded(body)
    end
    local data = e.data or ""
    return out .. header(e[1], typeflag(e), e.size or #data, e) .. padded(data)
end

--- A whole archive.
---@param entries table
---@return string
function M.make(entries)
    local out = {}
    for i, e in ipairs(entries) do
        out[i] = M.entry(e)
    end
    out[#out + 1] = ("\0"):rep(1024)
    return table.concat(out)
end

return M
