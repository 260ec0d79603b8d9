-- SPDX-License-Identifier: Apache-2.0
--
-- Commands and temporary folders for specs. Everything made here lives below
-- one temporary folder that `remove` takes away again.

local uv = require "luv"

local M = {}

--- Quote one word for the shell.
---@param word string|number
---@return string
function M.quote(word)
    return "'" .. tostring(word):gsub("'", "'\\''") .. "'"
end

--- Run a shell script; its words may be given as a list that is quoted.
--- Returns stdout, or raises an error that shows the command and its stderr.
---@param script string|string[]
---@return string
function M.run(script)
    if type(script) == "table" then
        local words = {}
        for i, word in ipairs(script) do
            words[i] = M.quote(word)
        end
        script = table.concat(words, " ")
    end
    local fd, errors = assert(uv.fs_mkstemp((os.getenv("TMPDIR") or "/tmp") .. "/sm-spec-XXXXXX"))
    uv.fs_close(fd)
    local pipe = assert(io.popen("set -e\n{ " .. script .. "\n} 2>" .. M.quote(errors)))
    local out = pipe:read("a")
    local ok, _, code = pipe:close()
    local file = assert(io.open(errors))
    local text = file:read("a")
    file:close()
    os.remove(errors)
    if not ok then
        error(("command failed (%s): %s\n%s"):format(code, script, text), 2)
    end
    return out
end

--- Whether a program is on the PATH.
---@param name string
---@return boolean
function M.has(name)
    return (os.execute("command -v " .. M.quote(name) .. " >/dev/null 2>&1")) == true
end

--- A fresh temporary folder.
---@return string path
function M.tmpdir()
    return assert(uv.fs_mkdtemp((os.getenv("TMPDIR") or "/tmp") .. "/sm-spec-XXXXXX"))
end

--- Remove a folder that `tmpdir` made.
---@param path string
function M.remove(path)
    assert(path:find("/sm%-spec%-......"), "not a folder of ours: " .. path)
    M.run { "rm", "-rf", "--one-file-system", path }
end

---@param path string
---@param text string
---@param mode string? octal
---@return string path
function M.write(path, text, mode)
    local file = assert(io.open(path, "wb"))
    assert(file:write(text))
    assert(file:close())
    if mode then
        assert(uv.fs_chmod(path, tonumber(mode, 8)))
    end
    return path
end

---@param path string
---@return string
function M.read(path)
    local file = assert(io.open(path, "rb"))
    local text = file:read("a")
    file:close()
    return text
end

--- The names in a folder, sorted; none where there is no folder.
---@param path string
---@return string[]
function M.list(path)
    local names, scan = {}, uv.fs_scandir(path)
    local name = scan and uv.fs_scandir_next(scan)
    while name do
        names[#names + 1] = name
        name = uv.fs_scandir_next(scan)
    end
    table.sort(names)
    return names
end

return M
