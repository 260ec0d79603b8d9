-- SPDX-License-Identifier: Apache-2.0
--
-- Warm starts: the first machine of a kind is saved once it is booted, and
-- later ones of that kind are copies of it (`sm run --warm`, `warm = true`).
--
-- Of one kind are machines of the same image, kernel, agent and configuration.
-- The template is a snapshot like any other, named warm-HASH: `sm snapshot`
-- lists, shows and removes it. One that this machine cannot restore (another
-- CPU, a damaged file) is replaced.

local config = require "sm.config"
local image_core = require "sm.image_core"
local kernel = require "sm.kernel"
local machine = require "sm.machine"
local snapshot = require "sm.snapshot"
local uv = require "luv"

local M = {}

local HASH_DIGITS = 16
-- What says how the image is found; its digest says what was found.
local IMAGE_ONLY = { pull = true, platform = true, progress = true, warm = true }

-- What tells two files apart without reading them.
local function stamp(path)
    local stat = path and uv.fs_stat(path)
    return stat and ("%s %d %d.%09d"):format(path, stat.size, stat.mtime.sec, stat.mtime.nsec)
end

-- A value as text that is the same in every process.
local function text_of(value)
    if type(value) ~= "table" then
        return ("%s %q"):format(type(value), tostring(value))
    end
    local parts = {}
    for key, v in pairs(value) do
        parts[#parts + 1] = text_of(key) .. "=" .. text_of(v)
    end
    table.sort(parts)
    return "{" .. table.concat(parts, ",") .. "}"
end

-- What a copy can be given anew is no part of its kind.
local function kind_of(image, cfg)
    local found, err = kernel.find(cfg.kernel)
    if not found then
        return nil, err
    end
    local init
    init, err = machine.guest_init()
    if not init then
        return nil, err
    end
    for _, card in ipairs(cfg.net) do
        if card.type ~= "user" then
            return nil, ("a %s network cannot be copied; only user networks can"):format(card.type)
        elseif card.on_flow then
            return nil, "a machine whose flows a function decides about cannot be saved for others"
        end
    end
    local shape = {}
    for key, value in pairs(cfg) do
        shape[key] = not (config.for_restore(key) or IMAGE_ONLY[key]) and value or nil
    end
    return { image = image.digest, kernel = stamp(found.path), init = stamp(init), cmdline = machine.cmdline(cfg),
        shape = shape }
end

--- The name of the template for an image and a configuration.
---@param image table
---@param cfg table checked
---@return string?
---@return string? err
function M.name(image, cfg)
    local kind, err = kind_of(image, cfg)
    if not kind then
        return nil, err
    end
    return "warm-" .. image_core.sha256(text_of(kind)):match("%x+$"):sub(1, HASH_DIGITS)
end

local function for_copy(cfg)
    local out = {}
    for key, value in pairs(cfg) do
        if config.for_restore(key) then
            out[key] = value
        end
    end
    return out
end

--- As sm.vm's start, by way of the template. Yields.
---@async
---@param image table
---@param cfg table checked
---@return sm.VM?
---@return string? err
function M.start(image, cfg)
    local name, err = M.name(image, cfg)
    if not name then
        return nil, "warm: " .. err
    end
    if uv.fs_stat(snapshot.path(name)) then
        local template, vm, why
        template, why = snapshot.open(name)
        if template then
            vm, why = require("sm.clone").copy(template, for_copy(cfg))
        end
        if vm then
            return vm
        end
        io.stderr:write(("sm: warm: %s; booting instead\n"):format(why))
        snapshot.remove(name)
    end
    local vm
    vm, err = require("sm.vm").start(image, cfg)
    if not vm then
        return nil, err
    end
    local made, why = require("sm.capture").create(vm, { name = name })
    -- Another process may have been first.
    if not made and not snapshot.open(name) then
        vm:close()
        return nil, "warm: " .. why
    end
    return vm
end

return M
