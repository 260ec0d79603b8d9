-- SPDX-License-Identifier: Apache-2.0
--
-- Documentation as data. The text of a public function stands once: above the
-- function in its Lua source (LuaLS annotations), for a command of the machine
-- in the command table (core/cmd.c), for the rest of sm.core in the definitions
-- file lua/sm/core_api.lua. From those come the manual (`make docs`), the
-- definitions for editors and help().
--
-- Nothing here is loaded unless somebody asks for help.

local files = require "sm.files"

local M = {}

--- What is public, in the order of the manual: the module or class as people
--- write it, the source, and the local name its functions have there.
M.PUBLIC = {
    { name = "sm", module = "sm", var = "M", about = "The front door: images in, running VMs out." },
    { name = "vm", module = "sm.vm", var = "VM", class = true, about = "A running VM, from sm.start." },
    { name = "proc", module = "sm.exec", var = "Process", class = true, about = "A command in a VM, from vm:spawn." },
    { name = "attached", module = "sm.attached", var = "VM", class = true,
        about = "A VM of another process, from sm.attach." },
    { name = "attached_proc", module = "sm.attached", var = "Process", class = true,
        about = "A command in a VM of another process." },
    { name = "loop", module = "sm.loop", var = "M", about = "The event loop: require \"sm.loop\", or sm.loop." },
    { name = "task", module = "sm.loop", var = "Task", class = true, about = "What loop.spawn gives." },
    { name = "worker", module = "sm.worker", var = "M", about = "Machines in processes of their own: require \"sm.worker\"." },
    { name = "core", module = "sm.core_api", var = "core", about = "The primitives: require \"sm.core\"." },
    { name = "core_vm", module = "sm.core_api", var = "vm", class = true,
        about = "A machine: core.vm in this process, worker.vm in one of its own." },
}

---@class sm.DocEntry
---@field id string "sm.start", "vm:exec"
---@field name string
---@field text string
---@field params { name: string, type: string, optional: boolean, text: string }[]
---@field returns { type: string, name: string, text: string }[]
---@field yields boolean
---@field line integer of the function
---@field path string

local function source_of(module)
    return assert(package.searchpath(module, package.path))
end

-- A type of LuaLS at the beginning of text: brackets nest, and ends at a space
-- outside of them. A union's " | " is not used in our sources.
local function split_type(text)
    local depth = 0
    for i = 1, #text do
        local c = text:sub(i, i)
        if c:find "[%[({<]" then
            depth = depth + 1
        elseif c:find "[%])}>]" then
            depth = depth - 1
        elseif c == " " and depth == 0 and text:sub(i - 1, i - 1) ~= ":" and text:sub(i - 1, i - 1) ~= "," then
            return text:sub(1, i - 1), text:sub(i + 1)
        end
    end
    return text, ""
end

local function parse_block(block, entry)
    local words = {}
    for _, line in ipairs(block) do
        local tag, rest = line:match "^@(%w+)%s*(.*)$"
        if tag == "param" then
            local name, tail = rest:match "^(%S+)%s+(.*)$"
            if name then
                local type, text = split_type(tail)
                local optional = name:sub(-1) == "?" or type:sub(-1) == "?" and not type:find "^fun%("
                entry.params[#entry.params + 1] = {
                    name = name:gsub("%?$", ""), type = type:gsub("%?$", ""), optional = optional, text = text,
                }
            end
        elseif tag == "return" then
            local type, tail = split_type(rest)
            local name, text = tail:match "^(%S+)%s*(.*)$"
            entry.returns[#entry.returns + 1] = { type = type, name = name or "", text = text or "" }
        elseif tag == "async" then
            entry.yields = true
        elseif tag == "package" or tag == "private" then
            entry.hidden = true
        elseif not tag then
            words[#words + 1] = (line:gsub("^ ", ""))
        end
    end
    entry.text = table.concat(words, "\n"):gsub("%s+$", "")
end

-- The functions of `var` in a source, with the block of `---` above each.
local function scan(place, into)
    local path = source_of(place.module)
    local text = assert(files.read(path))
    local block, number = {}, 0
    for line in (text .. "\n"):gmatch "(.-)\n" do
        number = number + 1
        local doc = line:match "^%-%-%-(.*)$"
        local var, sep, name, args = line:match "^function ([%a_][%w_]*)([.:])([%a_][%w_]*)(%b())"
        if doc then
            block[#block + 1] = doc
        elseif var == place.var and name:sub(1, 1) ~= "_" then
            local entry = {
                id = place.name .. sep .. name, name = name, place = place, path = path, line = number,
                params = {}, returns = {}, yields = false, documented = #block > 0, args = args,
            }
            parse_block(block, entry)
            if not entry.hidden then
                into[#into + 1] = entry
            end
            block = {}
        else
            block = {}
        end
    end
end

-- A command of the table as an entry.
local function command_entry(command, place)
    local entry = {
        id = place.name .. ":" .. command.method, name = command.method, place = place, params = {},
        returns = {}, yields = false, documented = command.doc ~= "", text = command.doc, command = command,
    }
    for _, arg in ipairs(command.args or {}) do
        entry.params[#entry.params + 1] = {
            name = arg.key, type = arg.choices and '"' .. arg.choices:gsub("|", '"|"') .. '"' or arg.type,
            optional = not arg.required, text = arg.doc,
        }
    end
    return entry
end

local all

--- Every public function, in the order of the manual.
---@return sm.DocEntry[]
function M.entries()
    if all then
        return all
    end
    all = {}
    for _, place in ipairs(M.PUBLIC) do
        scan(place, all)
        if place.name == "core_vm" then
            for _, command in ipairs(require("sm.core").commands()) do
                if command.method then
                    all[#all + 1] = command_entry(command, place)
                end
            end
        end
    end
    return all
end

--- "vm:exec(opts)", the arguments that may be left out in brackets.
---@param entry sm.DocEntry
---@return string
function M.signature(entry)
    local names, open = {}, 0
    for i, p in ipairs(entry.params) do
        local comma = i > 1 and ", " or ""
        if p.optional then
            names[i] = "[" .. comma .. p.name
            open = open + 1
        else
            names[i] = comma .. p.name
        end
    end
    return entry.id .. "(" .. table.concat(names) .. ("]"):rep(open) .. ")"
end

--- The text of help(): signature, text, arguments, results.
---@param entry sm.DocEntry
---@return string
function M.plain(entry)
    local lines = { M.signature(entry), "", entry.text }
    if #entry.params > 0 then
        lines[#lines + 1] = ""
    end
    for _, p in ipairs(entry.params) do
        lines[#lines + 1] = ("  %-12s %s%s%s"):format(p.name, p.type, p.optional and ", optional" or "",
            p.text ~= "" and ": " .. p.text or "")
    end
    for i, r in ipairs(entry.returns) do
        lines[#lines + 1] = ("  %-12s %s%s%s"):format(i == 1 and "returns" or "", r.type,
            r.name ~= "" and " " .. r.name or "", r.text ~= "" and ": " .. r.text or "")
    end
    for type, args in pairs(entry.command and entry.command.variants or {}) do
        lines[#lines + 1] = ("  type = %q:"):format(type)
        for _, arg in ipairs(args) do
            lines[#lines + 1] = ("    %-10s %s%s: %s"):format(arg.key, arg.choices or arg.type,
                arg.required and "" or ", optional", arg.doc)
        end
    end
    return table.concat(lines, "\n")
end

-- ------------------------------------------------------------------ output

local function each_place(fn)
    local list = M.entries()
    for _, place in ipairs(M.PUBLIC) do
        fn(place)
        for _, entry in ipairs(list) do
            if entry.place == place then
                fn(place, entry)
            end
        end
    end
end

local function commands_of_cli()
    local list = {}
    for _, c in ipairs(require("sm.cli").commands()) do
        list[#list + 1] = require("sm.cli." .. c)
        list[#list].command = c
    end
    return list
end

--- The manual, in Markdown.
---@return string
function M.markdown()
    local out = { "# sm: the manual", "", "Made by `make docs` from the sources; do not edit.", "" }
    local function add(text)
        out[#out + 1] = text
    end
    each_place(function(place, entry)
        if not entry then
            add("## " .. place.name .. "\n\n" .. place.about .. "\n")
            return
        end
        add("### `" .. M.signature(entry) .. "`\n\n" .. entry.text .. "\n")
        for _, p in ipairs(entry.params) do
            add(("- `%s` (`%s`%s) %s"):format(p.name, p.type, p.optional and ", optional" or "", p.text))
        end
        for _, r in ipairs(entry.returns) do
            add(("- returns `%s` %s %s"):format(r.type, r.name, r.text))
        end
        for type, args in pairs(entry.command and entry.command.variants or {}) do
            for _, arg in ipairs(args) do
                add(("- `%s` with type `%s` (`%s`%s) %s"):format(arg.key, type, arg.choices or arg.type,
                    arg.required and "" or ", optional", arg.doc))
            end
        end
        add("")
    end)
    add "## The command line\n"
    for _, c in ipairs(commands_of_cli()) do
        add("### sm " .. c.command .. "\n\n```\n" .. require("sm.cli.args").help(c.usage, c.about, c.flags) .. "```\n")
    end
    return table.concat(out, "\n")
end

local function roff(text)
    return (text:gsub("\\", "\\e"):gsub("%-", "\\-"):gsub("\n([.'])", "\n\\&%1"):gsub("^([.'])", "\\&%1"))
end

--- The manual page sm(1).
---@return string
function M.man()
    local out = {
        '.TH SM 1 "" "sm ' .. require "sm.version" .. '" "User Commands"', ".SH NAME",
        "sm \\- run OCI images as microVMs, and script the machine", ".SH SYNOPSIS",
        ".B sm\n.I COMMAND\n[flags] [args]\n.br\n.B sm\n.I SCRIPT.lua\n[args]", ".SH COMMANDS",
    }
    for _, c in ipairs(commands_of_cli()) do
        out[#out + 1] = ".SS " .. roff("sm " .. c.command) .. "\n.nf\n"
            .. roff(require("sm.cli.args").help(c.usage, c.about, c.flags)) .. ".fi"
    end
    out[#out + 1] = ".SH LUA API"
    each_place(function(place, entry)
        if not entry then
            out[#out + 1] = ".SS " .. roff(place.name) .. "\n" .. roff(place.about)
        else
            out[#out + 1] = ".TP\n.B " .. roff(M.signature(entry)) .. "\n" .. roff(entry.text)
        end
    end)
    return table.concat(out, "\n") .. "\n"
end

local function luals_type(type)
    local names = { size = "integer|string", bytes = "string", list = "table", choice = "string" }
    return names[type] or type
end

--- LuaLS definitions of what no Lua source has: the commands of a machine.
---@return string
function M.definitions()
    local out = { "---@meta", "", "---@class sm.core.vm", "local vm = {}", "" }
    for _, entry in ipairs(M.entries()) do
        if entry.command then
            out[#out + 1] = "--- " .. entry.text:gsub("\n", "\n--- ")
            local names = {}
            for i, p in ipairs(entry.params) do
                names[i] = p.name
                out[#out + 1] = ("---@param %s%s %s %s"):format(p.name, p.optional and "?" or "", luals_type(p.type), p.text)
            end
            if entry.command.variants then
                names[1] = "args"
                out[#out + 1] = "---@param args table type, and the keys of that type"
            end
            out[#out + 1] = ("function vm:%s(%s) end\n"):format(entry.name, table.concat(names, ", "))
        end
    end
    return table.concat(out, "\n")
end

return M
