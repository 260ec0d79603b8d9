-- SPDX-License-Identifier: Apache-2.0
--
-- The documentation against the program: nothing public without a text, no text
-- of what is gone, every example runs, and every public function tells misuse by
-- its own name. All of it is generated from sm.docs, so that none is forgotten.

local docs = require "sm.docs"
local files = require "sm.files"
local help = require "sm.help"
local shell = require "support.shell"

-- A class's table: an upvalue of that name, of a function the module has or of
-- one that those call. Its methods are defined in the module's own source.
local function class_of(place)
    local seen = {}
    local function search(fn)
        if seen[fn] then
            return nil
        end
        seen[fn] = true
        local source = debug.getinfo(fn, "S").source
        for i = 1, 60 do
            local name, value = debug.getupvalue(fn, i)
            if not name then
                return nil
            elseif name == place.var and type(value) == "table" and source == "@" .. place.path then
                return value
            elseif type(value) == "table" and not seen[value] then
                seen[value] = true
                for _, method in pairs(value) do
                    local found = type(method) == "function" and debug.getinfo(method, "S").source == source
                        and search(method)
                    if found then
                        return found
                    end
                end
            elseif type(value) == "function" and debug.getinfo(value, "S").source == "@" .. place.path then
                local found = search(value)
                if found then
                    return found
                end
            end
        end
    end
    place.path = assert(package.searchpath(place.module, package.path))
    for _, fn in pairs(require(place.module)) do
        local found = type(fn) == "function" and search(fn)
        if found then
            return found
        end
    end
end

local function machine_methods()
    local methods = debug.getregistry()["sm.core.vm"]
    if not methods then
        pcall(require("sm.core").vm, {}) -- makes the metatable, with or without KVM
        methods = debug.getregistry()["sm.core.vm"]
    end
    return methods.__index
end

local by_id = {}
for _, entry in ipairs(docs.entries()) do
    by_id[entry.id] = entry
end

-- What is there at run time: name of the place → table of functions.
local function live(place)
    if place.name == "core" then
        return require "sm.core"
    elseif place.name == "core_vm" then
        return machine_methods()
    elseif place.class then
        return class_of(place)
    end
    return require(place.module)
end

describe("the documentation", function()
    it("has a text for every public function", function()
        local missing = {}
        for _, entry in ipairs(docs.entries()) do
            if not entry.documented or entry.text == "" then
                missing[#missing + 1] = entry.id
            end
        end
        for _, place in ipairs(docs.PUBLIC) do
            local sep = place.class and ":" or "."
            for name, value in pairs(live(place) or {}) do
                local public = type(value) == "function" and type(name) == "string" and name:sub(1, 1) ~= "_"
                -- Methods of classes are checked in the source: private ones are marked there.
                if public and (not place.class or place.name == "core_vm") and not by_id[place.name .. sep .. name] then
                    missing[#missing + 1] = place.name .. sep .. name
                end
            end
        end
        assert.same({}, missing)
    end)

    it("has no text of what is gone", function()
        local gone = {}
        for _, entry in ipairs(docs.entries()) do
            local there = live(entry.place)
            if there and type(there[entry.name]) ~= "function" then
                gone[#gone + 1] = entry.id
            end
        end
        assert.same({}, gone)
    end)

    it("names every argument of a function as the function does", function()
        local wrong = {}
        for _, entry in ipairs(docs.entries()) do
            if entry.args then
                local names = {}
                for name in entry.args:gmatch "[%w_.]+" do
                    names[#names + 1] = name
                end
                for i, p in ipairs(entry.params) do
                    if names[i] ~= p.name and names[i] ~= "..." then
                        wrong[#wrong + 1] = entry.id .. ": " .. p.name
                    end
                end
            end
        end
        assert.same({}, wrong)
    end)

    it("says Yields where it says async, and the other way", function()
        local wrong = {}
        for _, entry in ipairs(docs.entries()) do
            if entry.yields and not entry.text:find("Yields", 1, true) then
                wrong[#wrong + 1] = entry.id
            end
        end
        assert.same({}, wrong)
    end)

    it("answers help() for functions, names and modules", function()
        local sm = require "sm"
        assert.matches("^sm%.start%(image%[, cfg%]%)\n\nBoot a VM", help.of(sm.start))
        assert.matches("^vm:exec%(opts%)", help.of "vm:exec")
        assert.matches("^core%.flock", help.of(require("sm.core").flock))
        assert.matches("^core_vm:map", help.of(machine_methods().map))
        assert.matches("Put memory at a guest%-physical address", help.of(machine_methods().map))
        assert.matches("loop%.spawn", help.of(sm.loop))
        assert.is_nil(help.of(print))
    end)

    it("makes a manual, a man page and definitions that parse", function()
        local manual = docs.markdown()
        for _, entry in ipairs(docs.entries()) do
            assert.is_truthy(manual:find("### `" .. docs.signature(entry) .. "`", 1, true), entry.id)
        end
        assert(load(docs.definitions()))
        local dir = shell.tmpdir()
        shell.write(dir .. "/sm.1", docs.man())
        if shell.has "man" then
            assert.equal("", shell.run(("man --warnings -l %s/sm.1 2>&1 >/dev/null | grep -v 'cannot adjust\\|can.t break' || true"):format(dir)))
        end
        shell.remove(dir)
    end)

    it("has examples that run", function()
        -- Blocks of ```lua in the texts; one that needs a VM is only compiled.
        local ran = 0
        for _, entry in ipairs(docs.entries()) do
            for code in entry.text:gmatch "```lua\n(.-)```" do
                local chunk = assert(load(code, "=" .. entry.id))
                if not code:find "sm%.start" then
                    chunk()
                    ran = ran + 1
                end
            end
        end
        -- And the front page's, as far as it goes without a guest.
        local front = assert(files.read "README.md"):match "```lua\n(.-)```"
        assert(load(front, "=README.md"))
        assert.is_true(ran >= 3, "only " .. ran .. " examples run")
    end)
end)

-- A value that is of none of the types an argument takes.
local function wrong_for(type_text)
    local kinds = { boolean = false, number = 7.5, string = "text", table = {}, ["function"] = print }
    for _, kind in ipairs { "boolean", "function", "table", "string", "number" } do
        local takes = type_text:find(kind, 1, true) or kind == "table" and type_text:find "[{%[]" or type_text:find "sm%."
            or kind == "function" and type_text:find("fun(", 1, true)
            or kind == "string" and type_text:find '"' or kind == "number" and type_text:find "integer"
        if not takes then
            return kinds[kind], kind
        end
    end
end

local CHECKED = { sm = true, loop = true, task = true, vm = true, proc = true, attached = true, attached_proc = true }

describe("misuse", function()
    for _, entry in ipairs(docs.entries()) do
        if CHECKED[entry.place.name] and entry.args and #entry.params > 0 then
            it("of " .. entry.id .. " is told by its name, the argument's and what was expected", function()
                local there = live(entry.place)
                local fn = there[entry.name]
                for i, p in ipairs(entry.params) do
                    local bad, kind = wrong_for(p.type)
                    if bad ~= nil and p.type ~= "any" and p.name ~= "..." then
                        local given = { n = #entry.params }
                        for j, other in ipairs(entry.params) do
                            if j == i then
                                given[j] = bad
                            elseif not other.optional then
                                -- Something of the right type; the bad one is told before it is used.
                                given[j] = other.type:find "^fun" and print or other.type:find "^string" and "x"
                                    or (other.type:find "^integer" or other.type:find "^number") and 1 or {}
                            end
                        end
                        local ok, err
                        if entry.id:find ":" then
                            ok, err = pcall(fn, setmetatable({}, there), table.unpack(given, 1, given.n))
                        else
                            ok, err = pcall(fn, table.unpack(given, 1, given.n))
                        end
                        assert.is_false(ok, p.name .. " was taken")
                        assert.is_truthy(err:find(("bad argument #%d '%s' to '%s'"):format(i, p.name, entry.id), 1, true), err)
                        assert.is_truthy(err:find("expected, got " .. kind, 1, true), err)
                    end
                end
            end)
        end
    end
end)

-- The commands of a machine, in a process with the fake backend's module.
describe("misuse of a machine's commands", function()
    it("is told by their names, the argument's and what was expected", function()
        shell.run "make -s build/fake/sm/core.so"
        local root = shell.run "pwd":gsub("\n", "")
        local script = [[
            local core = require "sm.core"
            local BAD = { boolean = "x", number = "x", integer = {}, size = {}, string = {}, bytes = {}, choice = "no such", list = 5, table = 5 }
            local count = 0
            local function check(command, arg, ok, err)
                if ok or not tostring(err):find(command, 1, true) or not err:find(arg, 1, true) then
                    error(("%s, %s: %s, %s"):format(command, arg, ok, err), 0)
                end
                count = count + 1
            end
            -- What must be there, of the right type, so that the one mistake is told.
            local GOOD = { boolean = true, number = 1, integer = 1, size = 4096, string = "x", bytes = "x", list = {}, table = {} }
            local LEAST = { cid = 3 }
            local function required(args, type)
                local given = { type = type or nil }
                for _, arg in ipairs(args) do
                    if arg.required then
                        given[arg.key] = arg.choices and arg.choices:match "^[^|]+" or LEAST[arg.key] or GOOD[arg.type]
                    end
                end
                given.type = type or given.type
                return given
            end
            for _, command in ipairs(core.commands()) do
                if command.method then
                    local vm = assert(core.vm { memory = "2M" })
                    local method = vm[command.method]
                    for type, args in pairs(command.variants or { [false] = command.args }) do
                        for _, arg in ipairs(args) do
                            local given = required(args, type)
                            given[arg.key] = BAD[arg.type]
                            check(command.name, arg.key, pcall(vm.call, vm, command.name, given))
                        end
                        local given = required(args, type)
                        given.nonsense = 1
                        check(command.name, "nonsense", pcall(vm.call, vm, command.name, given))
                    end
                    vm:close()
                    local ok, err = pcall(method, vm)
                    assert(not ok and err:find("attempt to use a closed vm", 1, true), err)
                end
            end
            print(count > 60 and "told" or count)
        ]]
        shell.write("build/misuse.lua", script)
        assert.equal("told\n", shell.run(("LUA_CPATH='%s/build/fake/?.so;;' lua5.4 build/misuse.lua"):format(root)))
    end)
end)

describe("the product layer", function()
    it("takes from sm.core only what is documented", function()
        local undocumented, taken = {}, {}
        for path in shell.run "find lua -name '*.lua'":gmatch "[^\n]+" do
            local text = assert(files.read(path))
            -- Only files that call sm.core so; sm.image_core is a module of its own.
            if text:find 'core = require "sm%.core"' or text:find 'core = core or require "sm%.core"' then
                for name in text:gmatch "%f[%w_]core%.([%a_][%w_]*)%f[^%w_]" do
                    taken[name] = path
                end
            end
            for method in text:gmatch ':call%("([%a]+%.[%a_]+)"' do
                -- The network's process has commands of its own (core/net), no part of sm.core.
                taken[method] = not method:find "^net%." and path or nil
            end
        end
        local commands = {}
        for _, command in ipairs(require("sm.core").commands()) do
            commands[command.name] = command.doc ~= ""
        end
        local count = 0
        for name, path in pairs(taken) do
            count = count + 1
            local text = by_id["core." .. name]
            local ok = text and text.text ~= "" or commands[name]
            if not ok and not name:find "^sm" and name ~= "so" then
                undocumented[#undocumented + 1] = path .. ": " .. name
            end
        end
        table.sort(undocumented)
        assert.same({}, undocumented)
        assert.is_true(count > 15, "found only " .. count .. " uses")
    end)
end)
