-- SPDX-License-Identifier: Apache-2.0
--
-- A line editor: bytes of a terminal in, escape sequences and finished lines
-- out. It knows no terminal and no loop, so it can be tested with strings, and
-- whoever owns it can take the line off the screen, print, and put it back.
--
-- readline and linenoise, which Debian has for Lua, read the terminal
-- themselves and block until the line is done: no event loop runs below them,
-- so neither VMs' events nor timers would be served while somebody types.
--
-- One screen row: a line longer than that scrolls sideways. Keys are Emacs's,
-- as in every shell.

local M = {}

---@class sm.Editor
---@field write fun(text: string) to the terminal
---@field prompt string
---@field history string[]
---@field complete (fun(text: string, at: integer): string[], integer)? candidates, and where the word begins
---@field columns integer
local Editor = {}
Editor.__index = Editor

--- A new editor.
---@param opts { write: fun(text: string), complete: function?, history: string[]?, columns: integer? }
---@return sm.Editor
function M.new(opts)
    return setmetatable({
        write = opts.write,
        complete = opts.complete,
        history = opts.history or {},
        columns = opts.columns or 80,
        prompt = "> ",
        chars = {},  -- of the line, UTF-8 characters
        at = 0,      -- characters before the cursor
        input = "",  -- bytes not understood yet
        shown = false,
    }, Editor)
end

-- ---- the line ----

local function chars_of(text)
    local chars = {}
    for char in text:gmatch "[\0-\x7f\xc0-\xff][\x80-\xbf]*" do
        chars[#chars + 1] = char
    end
    return chars
end

--- What is typed so far.
---@return string
function Editor:text()
    return table.concat(self.chars)
end

--- Replace the line; the cursor goes to its end.
---@param text string
function Editor:set(text)
    self.chars = chars_of(text)
    self.at = #self.chars
end

-- ---- the screen ----

-- Draw prompt and line, with the cursor in view.
local function draw(self)
    local room = math.max(8, self.columns - #self.prompt - 1)
    local from = math.max(0, self.at - room)
    local visible = table.concat(self.chars, "", from + 1, math.min(#self.chars, from + room))
    local column = #self.prompt + self.at - from
    self.write(("\r%s%s\27[K\r%s"):format(self.prompt, visible, column > 0 and ("\27[%dC"):format(column) or ""))
end

--- Put the line on the screen.
function Editor:show()
    self.shown = true
    draw(self)
end

--- Take the line off the screen, so that something else can be printed.
function Editor:hide()
    if self.shown then
        self.shown = false
        self.write "\r\27[K"
    end
end

--- Begin a line under a prompt.
---@param prompt string
function Editor:begin(prompt)
    self.prompt = prompt
    self.chars, self.at = {}, 0
    self.place, self.kept = #self.history + 1, nil
    self:show()
end

-- ---- keys ----

local function insert(self, text)
    for _, char in ipairs(chars_of(text)) do
        table.insert(self.chars, self.at + 1, char)
        self.at = self.at + 1
    end
end

local function delete(self, from, to)
    for _ = from, to do
        table.remove(self.chars, from)
    end
    self.at = math.min(from - 1, #self.chars)
end

-- Where the word before the cursor begins.
local function word_start(self)
    local at = self.at
    while at > 0 and not self.chars[at]:find "[%w_]" do
        at = at - 1
    end
    while at > 0 and self.chars[at]:find "[%w_]" do
        at = at - 1
    end
    return at
end

local function word_end(self)
    local at = self.at
    while at < #self.chars and not self.chars[at + 1]:find "[%w_]" do
        at = at + 1
    end
    while at < #self.chars and self.chars[at + 1]:find "[%w_]" do
        at = at + 1
    end
    return at
end

local function recall(self, place)
    if place < 1 or place > #self.history + 1 then
        return
    end
    if self.place == #self.history + 1 then
        self.kept = self:text()
    end
    self.place = place
    self:set(self.history[place] or self.kept or "")
end

-- The newest line before `place` that holds the text.
local function search_back(self, text, place)
    for i = math.min(place, #self.history), 1, -1 do
        if self.history[i]:find(text, 1, true) then
            return i
        end
    end
end

local function common_prefix(list)
    local prefix = list[1]
    for _, item in ipairs(list) do
        while item:sub(1, #prefix) ~= prefix do
            prefix = prefix:sub(1, -2)
        end
    end
    return prefix
end

local function in_columns(self, list)
    local width = 0
    for _, item in ipairs(list) do
        width = math.max(width, #item + 2)
    end
    local per_row = math.max(1, self.columns // width)
    local rows = {}
    for i = 1, #list, per_row do
        local row = {}
        for k = i, math.min(#list, i + per_row - 1) do
            row[#row + 1] = list[k] .. (" "):rep(width - #list[k])
        end
        rows[#rows + 1] = table.concat(row):gsub("%s+$", "")
    end
    return table.concat(rows, "\r\n")
end

local SHOWN_MAX = 200 -- candidates

local function complete(self)
    if not self.complete then
        return
    end
    local before = table.concat(self.chars, "", 1, self.at)
    local list, start = self.complete(before)
    if #list == 0 then
        self.write "\a"
        return
    end
    local prefix = common_prefix(list)
    local typed = before:sub(start)
    if #prefix > #typed then
        insert(self, prefix:sub(#typed + 1))
    elseif #list > 1 then
        local shown = table.move(list, 1, math.min(#list, SHOWN_MAX), 1, {})
        self:hide()
        self.write(in_columns(self, shown) .. (#list > SHOWN_MAX and "\r\n..." or "") .. "\r\n")
        self.shown = true
    end
end

-- Key → function; what it returns is an event for the owner.
local keys = {}

keys["\1"] = function(self) self.at = 0 end
keys["\5"] = function(self) self.at = #self.chars end
keys["\2"] = function(self) self.at = math.max(0, self.at - 1) end
keys["\6"] = function(self) self.at = math.min(#self.chars, self.at + 1) end
keys["\16"] = function(self) recall(self, self.place - 1) end
keys["\14"] = function(self) recall(self, self.place + 1) end
keys["\127"] = function(self)
    if self.at > 0 then
        delete(self, self.at, self.at)
    end
end
keys["\8"] = keys["\127"]
keys["\t"] = complete
keys["\12"] = function(self) self.write "\27[H\27[2J" end
keys["\11"] = function(self)
    self.killed = table.concat(self.chars, "", self.at + 1)
    delete(self, self.at + 1, #self.chars)
end
keys["\21"] = function(self)
    self.killed = table.concat(self.chars, "", 1, self.at)
    delete(self, 1, self.at)
end
keys["\23"] = function(self)
    local start = word_start(self)
    self.killed = table.concat(self.chars, "", start + 1, self.at)
    delete(self, start + 1, self.at)
end
keys["\25"] = function(self) insert(self, self.killed or "") end
keys["\18"] = function(self) -- ^R: the last line that holds what is typed
    self.sought = self.sought or self:text()
    local found = search_back(self, self.sought, self.place - 1)
    if found then
        recall(self, found)
    else
        self.write "\a"
    end
end
keys["\3"] = function() return "interrupt" end
keys["\4"] = function(self)
    if #self.chars == 0 then
        return "end"
    end
    delete(self, self.at + 1, math.min(self.at + 1, #self.chars))
end
keys["\r"] = function() return "line" end
keys["\n"] = keys["\r"]

local sequences = {
    ["[A"] = keys["\16"], ["[B"] = keys["\14"], ["[C"] = keys["\6"], ["[D"] = keys["\2"],
    ["OA"] = keys["\16"], ["OB"] = keys["\14"], ["OC"] = keys["\6"], ["OD"] = keys["\2"],
    ["[H"] = keys["\1"], ["[F"] = keys["\5"], ["OH"] = keys["\1"], ["OF"] = keys["\5"],
    ["[1~"] = keys["\1"], ["[4~"] = keys["\5"], ["[7~"] = keys["\1"], ["[8~"] = keys["\5"],
    ["[3~"] = function(self)
        delete(self, self.at + 1, math.min(self.at + 1, #self.chars))
    end,
    ["b"] = function(self) self.at = word_start(self) end,
    ["f"] = function(self) self.at = word_end(self) end,
    ["[1;5D"] = function(self) self.at = word_start(self) end,
    ["[1;5C"] = function(self) self.at = word_end(self) end,
}

-- Take one key off the input: its bytes, or nil when it is not all there.
local function next_key(input)
    local byte = input:byte()
    if byte == 27 then
        if #input == 1 then
            return nil
        end
        return input:match "^\27%[[%d;]*[%a~]" or input:match "^\27O%a"
            or (input:find "^\27%[[%d;]*$" or input == "\27O") and nil
            or not input:find "^\27[%[O]" and input:sub(1, 2) or nil
    elseif byte >= 0xc0 then
        local need = byte >= 0xf0 and 4 or byte >= 0xe0 and 3 or 2
        return #input >= need and input:sub(1, need) or nil
    end
    return input:sub(1, 1)
end

local function press(self, key)
    if key ~= "\18" then
        self.sought = nil
    end
    local fn = keys[key] or key:byte() == 27 and sequences[key:sub(2)]
    if fn then
        return fn(self)
    elseif key:byte() >= 32 and key:byte() ~= 127 then
        insert(self, key)
    end
end

--- Take bytes of the terminal. Returns "line" and the line, "interrupt" (^C) or
--- "end" (^D on an empty line) as soon as one is there; the rest of the bytes
--- waits for the next call (with ""). nil: nothing yet.
---@param bytes string
---@return "line"|"interrupt"|"end"|nil
---@return string?
function Editor:feed(bytes)
    self.input = self.input .. bytes
    while #self.input > 0 do
        local key = next_key(self.input)
        if not key then
            break
        end
        self.input = self.input:sub(#key + 1)
        local event = press(self, key)
        if event then
            self:draw_last()
            return event, event == "line" and self:text() or nil
        end
    end
    if self.shown then
        draw(self)
    end
end

--- The finished line stays on the screen; what follows begins below it.
function Editor:draw_last()
    if self.shown then
        self.at = #self.chars
        draw(self)
        self.write "\r\n"
        self.shown = false
    end
end

--- Remember a line, but not twice in a row.
---@param line string
---@return boolean added
function Editor:remember(line)
    if line:find "%S" and self.history[#self.history] ~= line then
        self.history[#self.history + 1] = line
        return true
    end
    return false
end

return M
