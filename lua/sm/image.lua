-- SPDX-License-Identifier: Apache-2.0
--
-- Images, from a name to a root device: resolve, fetch, convert, merge.
--
--   reference ─▶ registry, layout folder, archive or plain folder
--                      ─▶ blobs ─▶ per layer EROFS parts ─▶ one merged image
--
-- A pull holds the store's `use` lock, works on its layers in parallel
-- (sm.assemble), and names the image last. What is there already is not
-- fetched, what is all there needs no network. The result holds a lease: as
-- long as it lives, nobody removes the image.
--
-- Every step is a function that a script may give in our place, or watch:
-- `resolve`, `credentials`, `choose` (of an index), `verify`, `layers`,
-- `fetch`, `progress`. Every function here that fetches yields.

local assemble = require "sm.assemble"
local catalog = require "sm.catalog"
local fetch = require "sm.fetch"
local here = require "sm.here"
local loop = require "sm.loop"
local reference = require "sm.reference"
local registries = require "sm.registries"
local registry = require "sm.registry"

local M = {}

-- A source of a registry's images: the places this machine's configuration names
-- for it, in order, each asked when those before it have failed. Clients are made
-- at the first need.
local function registry_source(opts, ref)
    local self = {}
    local transport, places, clients, current
    -- A script's resolver may send us to another name, a mirror's say.
    function self.point_at(other)
        ref, places = other, nil
    end
    local function locate()
        if places then
            return true
        end
        local found, why = registries.places(ref)
        if not found then
            return nil, ("%s: %s"):format(reference.familiar(ref), why)
        end
        places, clients, current = found, {}, 1
        return true
    end
    local function client(i)
        if not clients[i] then
            transport = transport or fetch.open { parallel = assemble.parallel_downloads, core = opts.core }
            clients[i] = registry.at(places[i], transport, {
                insecure = opts.insecure, cafile = opts.cafile, credentials = opts.credentials,
                retry_delay = opts.retry_delay, notify = opts.progress,
            })
        end
        return clients[i]
    end
    -- A method of a client, where it works: from the place that did so last onwards.
    function self.ask(method, ...)
        local ok, why = locate()
        if not ok then
            return nil, why
        end
        for i = current, #places do
            local result, failed = client(i)[method](clients[i], ...)
            if result then
                current = math.max(current, i)
                return result
            elseif i == #places then
                return nil, failed
            end
            opts.progress { type = "retry", reason = failed or places[i].ref.registry .. " does not say",
                delay = 0, try = i, place = places[i + 1].ref.registry }
        end
    end
    function self.blob(layer, file, watching)
        return self.ask("blob", layer, file, watching)
    end
    function self.progress(id)
        return transport:progress(id)
    end
    return setmetatable(self, { __close = function()
        if transport then
            transport:close()
        end
    end })
end

-- What is in the store under this name and good for the platform, or nil.
local function find_local(opts, ref)
    local entry, why = opts.store:find(ref)
    if not entry then
        return nil, why
    end
    local found = assemble.read_local(opts, entry)
    return found, nil, entry
end

-- The warm start: everything is there. nil: it is not.
local function warm(opts, ref)
    local name = reference.format(ref)
    for _ = 1, 3 do
        local found, why = find_local(opts, ref)
        if not found or not opts.store:image(found.digest) then
            return nil, why
        end
        local fine
        fine, why = assemble.approve(opts, found, name)
        if not fine then
            return nil, why
        end
        local lease
        lease, why = opts.store:lease(found.digest)
        if not lease then
            return nil, why
        end
        -- Somebody may have removed it before we held it.
        local again = find_local(opts, ref)
        if again and again.digest == found.digest then
            local image = assemble.finish(opts, found, name, lease)
            if image then
                return image
            end
        end
        lease:close()
    end
end

-- Resolve by network or, for what is here in part, by what is here.
local function resolve(opts, ref, source)
    if opts.policy ~= "always" then
        local found = find_local(opts, ref)
        if found then
            return found
        end
    end
    opts.progress { type = "resolve", reference = reference.format(ref) }
    local function by_default(other, wanted)
        if other and other ~= ref then
            if type(other) == "string" then
                local parsed, why = reference.parse(other)
                if not parsed then
                    return nil, why
                end
                other = parsed
            end
            source.point_at(other)
        end
        return source.ask("resolve", wanted or opts.platform, opts.choose)
    end
    if opts.resolve then
        return opts.resolve(ref, opts.platform, by_default)
    end
    return by_default()
end

-- With policy "always": whether the store has what the tag means now. Yields.
local function is_current(opts, ref, source)
    local entry = opts.store:find(ref)
    if not entry or not entry.source then
        return false
    end
    opts.progress { type = "resolve", reference = reference.format(ref) }
    return source.ask("head") == entry.source
end

local function pull(opts, ref)
    local name = reference.format(ref)
    if opts.policy ~= "always" and not opts.layers then
        local image, why = warm(opts, ref)
        if image or why then
            return image, why
        end
    end
    if opts.policy == "never" then
        return nil, ("%s: not in the image store, and pulling was forbidden")
            :format(reference.familiar(ref))
    end
    local source <close> = registry_source(opts, ref)
    if opts.policy == "always" and is_current(opts, ref, source) then
        local image = warm(opts, ref)
        if image then
            return image
        end
    end
    local held <close>, why = opts.store:use()
    if not held then
        return nil, why
    end
    local found
    found, why = resolve(opts, ref, source)
    if not found then
        return nil, why
    end
    local image, put
    image, why, put = assemble.assemble(opts, found, source, name)
    if not image then
        return nil, why
    end
    local ok = true
    if put == found then -- with layers left out it is not what the name means
        ok, why = assemble.tag(opts, name, found)
    end
    if not ok then
        image:close()
        return nil, why
    end
    opts.progress { type = "done", reference = name, digest = found.digest }
    return image
end

--- Bring an image from a registry into the store, or find it there, and return
--- it ready to be a root device.
--- opts: store (an sm.Store or a folder), platform ("os/arch[/variant]"),
--- policy ("missing", "always", "never"), progress (function(event)), limits
--- (of conversion), insecure, cafile; and, each in place of what we would do:
---
---   resolve(ref, wanted, default) → found, err    `default(ref?, wanted?)` asks
---       the registry; another ref, a mirror's say, is asked for in its place
---   credentials(registry, path) → sm.Credential?, err
---   choose(entries, wanted) → entry    out of an index; an entry has digest,
---       size, media_type, platform, annotations
---   verify{reference, digest, source_digest, config, manifest} → boolean, reason
---       also asked about an image that is here already
---   layers({digest, size, media_type, diff_id, index}, config) → boolean    which
---       ones to take; what results is another image and gets no name
---   fetch(descriptor, file, default) → true, err    a layer's blob into a file;
---       size and digest are checked after it
---
--- Yields.
---
--- Events: {type="resolve"}, {type="resolved", digest, layers}, {type="layer",
--- digest, index, phase = "exists"|"waiting"|"download"|"convert"|"done", now,
--- total}, {type="retry", reason, delay, try,
--- place = the registry asked next, when it is another}, {type="merge"}, {type="done"}.
---@async
---@param ref string|sm.Reference
---@param opts table?
---@return sm.Image?
---@return string? error
function M.pull(ref, opts)
    local options, why = assemble.options(opts)
    if not options then
        return nil, why
    end
    if type(ref) == "string" then
        ref, why = reference.parse(ref)
        if not ref then
            return nil, why
        end
    end
    return loop.run(pull, options, ref)
end

local transports = {
    ["oci"] = here.from_layout,
    ["oci-archive"] = here.from_archive,
    ["docker-archive"] = here.from_archive,
    ["dir"] = here.from_folder,
}

--- What `sm run` takes, told apart by its form, never by guessing at files:
---   REFERENCE, docker://REFERENCE     a registry's
---   oci:DIR[:TAG]                     an OCI layout folder
---   oci-archive:FILE[:TAG], docker-archive:FILE[:NAME]
---   dir:DIR                           a folder as a root
---   ./…, ../…, /…                     any of these, by what is there
---   -                                 an archive on standard input
--- Options as in `pull`. Yields.
---@async
---@param text string
---@param opts table?
---@return sm.Image?
---@return string? error
function M.get(text, opts)
    local kind, rest = text:match("^([%l-]+):(.+)$")
    if kind == "docker" and rest:sub(1, 2) == "//" then
        return M.pull(rest:sub(3), opts)
    elseif transports[kind] then
        return transports[kind](rest, opts)
    elseif text == "-" then
        return here.from_archive("-", opts)
    elseif text:find("^%.?%.?/") or text == "." or text == ".." then
        return here.from_path(text, opts)
    end
    return M.pull(text, opts)
end

M.from_layout, M.from_archive, M.from_folder = here.from_layout, here.from_archive, here.from_folder
M.load = here.load
M.save = function(...)
    return require("sm.export").save(...)
end
M.push = function(...)
    return require("sm.push").push(...)
end
for _, name in ipairs { "list", "remove", "inspect", "tag", "history", "prune", "usage", "verify" } do
    M[name] = catalog[name]
end

return M
