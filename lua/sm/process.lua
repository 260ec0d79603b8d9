-- SPDX-License-Identifier: Apache-2.0
--
-- Programs of the host: run one, with streams.

local child = require "sm.child"
local uv = require "luv"
local loop = require "sm.loop"

local M = {}

--- Run a program to its end. `stdin` is a function that gives the next piece or
--- nil, `stdout` one that takes each piece; both may yield. Its stderr is the
--- error's text. Yields.
---@async
---@param argv string[]
---@param opts { stdin: (fun(): string?)?, stdout: fun(piece: string)? }?
---@return true?
---@return string? err
function M.run(argv, opts)
    opts = opts or {}
    local stdin = opts.stdin and uv.new_pipe(false) or nil
    local stdout = opts.stdout and uv.new_pipe(false) or nil
    local stderr = uv.new_pipe(false)
    local words, code, signal, waiting = {}, nil, nil, nil
    local queue = {}
    local open = stdout and 3 or 2 -- stdout, stderr, the process
    local function news()
        if waiting then
            local settle = waiting
            waiting = nil
            settle(true)
        end
    end
    local function wait()
        loop.await(function(settle)
            waiting = settle
            return function()
                waiting = nil
            end
        end)
    end
    local handle, err
    handle, err = child.spawn(argv[1], {
        args = table.move(argv, 2, #argv, 1, {}), stdio = { stdin, stdout, stderr },
    }, loop.guard(function(c, s)
        code, signal, open = c, s, open - 1
        news()
    end))
    local feeder
    local _ <close> = setmetatable({}, { __close = function()
        if feeder and not feeder:finished() then
            feeder:cancel()
        end
        for _, pipe in pairs { stdin or false, stdout or false, stderr } do
            if pipe and not pipe:is_closing() then
                pipe:close()
            end
        end
        if handle and not handle:is_closing() then
            if not code then
                handle:kill "sigkill"
            end
            handle:close()
        end
    end })
    if not handle then
        return nil, ("%s: %s"):format(argv[1], err)
    end
    stderr:read_start(loop.guard(function(_, chunk)
        if chunk then
            words[#words + 1] = chunk
        else
            open = open - 1
        end
        news()
    end))
    local reading = false
    local function read_on()
        if stdout and not reading then
            reading = true
            stdout:read_start(loop.guard(function(_, chunk)
                if chunk then
                    queue[#queue + 1] = chunk
                    stdout:read_stop() -- until it is taken
                    reading = false
                else
                    open = open - 1
                end
                news()
            end))
        end
    end
    read_on()
    if stdin then
        feeder = loop.spawn(function()
            for piece in opts.stdin do
                local ok = loop.await(function(settle)
                    stdin:write(piece, loop.guard(function(why)
                        settle(not why)
                    end))
                end)
                if not ok then
                    break -- it reads no more; its exit says why
                end
            end
            if not stdin:is_closing() then
                stdin:close()
            end
        end)
    end
    while open > 0 or queue[1] do
        if queue[1] then
            local piece = table.remove(queue, 1)
            opts.stdout(piece)
            read_on()
        else
            wait()
        end
    end
    if code ~= 0 or signal ~= 0 then
        local text = table.concat(words):gsub("%s+$", "")
        return nil, text ~= "" and text or ("%s: %s %d"):format(argv[1],
            signal ~= 0 and "killed by signal" or "exit status", signal ~= 0 and signal or code)
    end
    return true
end

return M
