-- SPDX-License-Identifier: Apache-2.0
--
-- Platforms as images name them (os/architecture/variant), and which of an
-- index's entries serves one: the exact variant first, then what it can run.

local uv = require "luv"

local M = {}

---@class sm.Platform
---@field os string
---@field architecture string
---@field variant string?

local architecture_alias = {
    x86_64 = "amd64", ["x86-64"] = "amd64", aarch64 = "arm64", armhf = "arm", armv7l = "arm",
    i386 = "386", i686 = "386",
}

-- For each architecture, the variants a machine of the key's variant runs,
-- best first. "" is an image that names none.
local runs = {
    arm64 = { [""] = { "", "v8" }, v8 = { "v8", "" } },
    arm = {
        [""] = { "v7", "", "v6", "v5" }, v8 = { "v8", "v7", "", "v6", "v5" },
        v7 = { "v7", "", "v6", "v5" }, v6 = { "v6", "v5" }, v5 = { "v5" },
    },
    amd64 = {
        [""] = { "", "v1", "v2", "v3" }, v1 = { "v1", "" }, v2 = { "v2", "v1", "" },
        v3 = { "v3", "v2", "v1", "" }, v4 = { "v4", "v3", "v2", "v1", "" },
    },
}

--- Parse "os/arch[/variant]" or "arch".
---@param text string
---@return sm.Platform?
---@return string? error
function M.parse(text)
    local parts = {}
    for part in (text .. "/"):gmatch("([^/]*)/") do
        parts[#parts + 1] = part:lower()
        if not part:find("^[%w._-]+$") then
            return nil, ("%q is not a platform: expected os/architecture[/variant]"):format(text)
        end
    end
    if #parts == 1 then
        table.insert(parts, 1, "linux")
    elseif #parts > 3 then
        return nil, ("%q is not a platform: expected os/architecture[/variant]"):format(text)
    end
    return {
        os = parts[1],
        architecture = architecture_alias[parts[2]] or parts[2],
        variant = parts[3],
    }
end

--- The platform of guests on this machine.
---@return sm.Platform
function M.host()
    local machine = uv.os_uname().machine
    return { os = "linux", architecture = architecture_alias[machine] or machine }
end

---@param p table
---@return string "os/architecture[/variant]"
function M.format(p)
    local text = tostring(p.os or "?") .. "/" .. tostring(p.architecture or "?")
    if p.variant and p.variant ~= "" then
        text = text .. "/" .. tostring(p.variant)
    end
    return text
end

--- The variants that serve `wanted`, best first; "" is none.
---@param wanted sm.Platform
---@return string[]
function M.variants(wanted)
    local variant = wanted.variant or ""
    local known = runs[wanted.architecture]
    return known and known[variant] or { variant }
end

--- Whether an image for `offered` runs on `wanted`, whatever its rank.
---@param offered table
---@param wanted sm.Platform
---@return boolean
function M.serves(offered, wanted)
    if offered.os ~= wanted.os or offered.architecture ~= wanted.architecture then
        return false
    end
    for _, variant in ipairs(M.variants(wanted)) do
        if (offered.variant or "") == variant then
            return true
        end
    end
    return false
end

return M
