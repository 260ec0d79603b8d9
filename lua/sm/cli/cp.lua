-- SPDX-License-Identifier: Apache-2.0
--
-- sm cp: files and folders into and out of a running VM, with Docker's rules
-- for where they land. A single file goes by the agent alone; a folder, and
-- `-` for a tar stream, need a tar in the image.

local uv = require "luv"
local files = require "sm.files"
local paths = require "sm.paths"
local process = require "sm.process"
local tarfilter = require "sm.tarfilter"
local vms = require "sm.cli.vms"

local CHUNK = 65536
local EISDIR, ENOENT, ENOTDIR = 21, 2, 20
local ENV = { "PATH=" .. require("sm.oci_config").default_path }

local M = {
    usage = "sm cp [flags] VM:PATH DEST\n       sm cp [flags] SRC VM:PATH",
    about = "Copy a file or folder out of or into a running VM; `-` as DEST or SRC is a tar\n"
        .. "stream. Folders and streams need a tar in the image.",
    flags = {
        { "archive", "a", nil, "keep owners and all permissions" },
        { "quiet", "q", nil, "accepted for Docker's habit" },
    },
    min = 2,
    max = 2,
    needs = "a source and a destination",
}

-- VM:PATH, or a path of the host (one with a '/' before any ':').
local function parse(text)
    local name, path = text:match "^([^/:]+):(.*)$"
    if not name then
        return nil, text
    end
    return name, path:sub(1, 1) == "/" and path or "/" .. path
end

-- "/a/b/" and "/a/b/." → "/a/b", "b".
local function split(path)
    local clean = path:gsub("/%.$", ""):gsub("/+$", "")
    if clean == "" then
        return "/", "/"
    end
    local parent, base = clean:match "^(.*)/([^/]+)$"
    if not parent then
        return clean, clean, "."
    end
    return clean, base, parent == "" and "/" or parent
end

local function contents_only(path)
    return path:find "/%.$" ~= nil or path == "."
end

-- "file", "folder", or nil and why, of the guest.
local function guest_kind(vm, path)
    local seen = {}
    local ok, data, err, failure = pcall(vm.read_file, vm, path, { sink = function()
        error(seen, 0)
    end })
    if not ok then
        if data == seen then
            return "file"
        end
        error(data, 0)
    elseif data then
        return "file"
    elseif failure and failure.errno == EISDIR then
        return "folder"
    elseif failure and (failure.errno == ENOENT or failure.errno == ENOTDIR) then
        return nil
    end
    return nil, err
end

-- A small image may have a busybox and no link to it by that name.
local TARS = { { "tar" }, { "busybox", "tar" } }

local function guest_tar(vm, args, streams)
    local said = {}
    local r, err, failure
    for _, tar in ipairs(TARS) do
        r, err, failure = vm:exec {
            argv = table.move(args, 1, #args, #tar + 1, { table.unpack(tar) }),
            env = ENV, user = "0", stdin = streams.stdin, stdout = streams.stdout,
            stderr = function(piece)
                said[#said + 1] = piece:gsub("%c", "?")
            end,
        }
        if r or not (failure and failure.status == 127) then
            break
        end
    end
    if not r then
        local absent = failure and failure.status == 127
        return nil, absent and "the image has no tar, which folders need; files can be copied one by one" or err
    elseif r.status ~= 0 then
        local text = table.concat(said)
        return nil, "the guest's tar: " .. (text ~= "" and text:sub(1, 400) or "exit status " .. r.status)
    end
    return true
end

-- ------------------------------------------------------------ out of the VM

local function target_of(dest, base)
    local stat = uv.fs_stat(dest)
    if stat and stat.type == "directory" then
        return dest:gsub("/+$", "") .. "/" .. base
    elseif not stat and dest:sub(-1) == "/" then
        return nil, ("%s: no such folder"):format(dest)
    end
    return dest
end

local function file_out(vm, path, dest, o)
    local _, base = split(path)
    local target, err = target_of(dest, base)
    if not target then
        return nil, err
    end
    local fd, temporary = uv.fs_mkstemp(target .. ".XXXXXX")
    if not fd then
        return nil, temporary
    end
    local at, write_err = 0, nil
    local ok, info = vm:read_file(path, { sink = function(piece)
        while piece ~= "" and not write_err do
            local n
            n, write_err = uv.fs_write(fd, piece, at)
            if n then
                at, piece = at + n, piece:sub(n + 1)
            end
        end
    end })
    err = not ok and info or write_err
    if not err then
        uv.fs_fchmod(fd, info.mode & (o.archive and 4095 or 511))
        if o.archive then
            uv.fs_fchown(fd, info.uid, info.gid)
        end
        ok, err = uv.fs_rename(temporary, target)
        err = not ok and err or nil
    end
    uv.fs_close(fd)
    if err then
        uv.fs_unlink(temporary)
        return nil, err
    end
    return true
end

local function tar_argv(path)
    local clean, base, parent = split(path)
    if contents_only(path) or clean == "/" then
        return { "-C", clean, "-cf", "-", "." }
    end
    return { "-C", parent, "-cf", "-", base }
end

local function stream_out(vm, path)
    return guest_tar(vm, tar_argv(path), { stdout = function(piece)
        io.stdout:write(piece)
    end })
end

-- Pieces handed from one task to another, one at a time.
local function pipe()
    local loop = require "sm.loop"
    local piece, ended, waiting
    local self = {}
    local function news()
        local settle = waiting
        waiting = nil
        if settle then
            settle()
        end
    end
    local function wait()
        loop.await(function(settle)
            waiting = settle
        end)
    end
    function self.put(bytes)
        while piece and not ended do
            wait()
        end
        piece = bytes
        news()
    end
    function self.get()
        while not piece and not ended do
            wait()
        end
        local bytes = piece
        piece = nil
        news()
        return bytes
    end
    function self.finish()
        ended = true
        news()
    end
    return self
end

local function folder_out(vm, path, dest, o)
    local loop = require "sm.loop"
    local argv = { "tar", "-xf", "-" }
    local stat = uv.fs_stat(dest)
    if stat and stat.type ~= "directory" then
        return nil, ("%s: a folder does not go over a file"):format(dest)
    elseif not stat then
        local ok, err = paths.make((dest:gsub("/+$", "")))
        if not ok then
            return nil, err
        end
        if not contents_only(path) and split(path) ~= "/" then
            argv[#argv + 1] = "--strip-components=1"
        end
    end
    for _, word in ipairs { "-C", dest, o.archive and "--same-owner" or "--no-same-owner",
        o.archive and "--same-permissions" or "--no-same-permissions" } do
        argv[#argv + 1] = word
    end
    local between, filter, refused = pipe(), tarfilter.new(), nil
    local host = loop.spawn(function()
        local ok, err = process.run(argv, { stdin = between.get })
        between.finish()
        return ok, err
    end)
    local ok, err = guest_tar(vm, tar_argv(path), { stdout = function(piece)
        if not refused then
            piece, refused = filter:feed(piece)
            if piece and piece ~= "" then
                between.put(piece)
            end
        end
    end })
    between.finish()
    local host_ok, host_err = host:join()
    if refused or not ok then
        return nil, refused or err
    end
    return host_ok, host_err
end

local function out_of(vm, path, dest, o)
    if dest == "-" then
        return stream_out(vm, path)
    end
    local kind, err = guest_kind(vm, path)
    if kind == "file" then
        return file_out(vm, path, dest, o)
    elseif kind == "folder" then
        return folder_out(vm, path, dest, o)
    end
    return nil, err or ("%s: no such file in the VM"):format(path)
end

-- ------------------------------------------------------------- into the VM

local function reader(fd)
    local at = 0
    return function()
        local piece = uv.fs_read(fd, CHUNK, at)
        at = at + (piece and #piece or 0)
        return piece ~= "" and piece or nil
    end
end

local function file_into(vm, src, stat, path, o)
    local fd, err = uv.fs_open(src, "r", 0)
    if not fd then
        return nil, err
    end
    local opts = {
        mode = stat.mode & (o.archive and 4095 or 511), parents = false,
        uid = o.archive and stat.uid or 0, gid = o.archive and stat.gid or 0,
    }
    local base = src:match "[^/]+$"
    local info, failure
    if path:sub(-1) ~= "/" then
        info, err, failure = vm:write_file(path, reader(fd), opts)
    end
    if path:sub(-1) == "/" or failure and failure.errno == EISDIR then
        info, err = vm:write_file(path:gsub("/*$", "/") .. base, reader(fd), opts)
    end
    uv.fs_close(fd)
    return info and true, err
end

-- How GNU tar names the top of what it reads from `src`.
local function renamed(from, to)
    return "--transform=flags=rh;s,^" .. from:gsub("[.%[%]*^$\\,]", "\\%0") .. "," .. to:gsub("[\\&,]", "\\%0") .. ","
end

local function folder_into(vm, src, path, o)
    local loop = require "sm.loop"
    local clean, base, parent = split(src)
    local dest, name = path, nil
    local kind, err = guest_kind(vm, path)
    if err then
        return nil, err
    elseif kind == "file" then
        return nil, ("%s: a folder does not go over a file"):format(path)
    elseif not kind then
        -- Made anew under the name asked for.
        local _, last, above = split(path)
        dest, name = above, last
    end
    local argv = { "tar", "--format=gnu", "-cf", "-" }
    if not o.archive then
        argv[#argv + 1] = "--owner=0"
        argv[#argv + 1] = "--group=0"
    end
    if contents_only(src) or clean == "/" or src == "." then
        if name then
            argv[#argv + 1] = renamed(".", name)
        end
        table.move({ "-C", clean, "." }, 1, 3, #argv + 1, argv)
    else
        if name and name ~= base then
            argv[#argv + 1] = renamed(base, name)
        end
        table.move({ "-C", parent, "--", base }, 1, 4, #argv + 1, argv)
    end
    local between = pipe()
    local host = loop.spawn(function()
        local ok, why = process.run(argv, { stdout = between.put })
        between.finish()
        return ok, why
    end)
    local ok
    ok, err = guest_tar(vm, { "-C", dest, "-xf", "-" }, { stdin = between.get })
    between.finish()
    local host_ok, host_err = host:join()
    if not ok then
        return nil, err
    end
    return host_ok, host_err
end

local function into(vm, src, path, o)
    if src == "-" then
        return guest_tar(vm, { "-C", path, "-xf", "-" }, { stdin = function()
            local piece = uv.fs_read(0, CHUNK, -1)
            return piece ~= "" and piece or nil
        end })
    end
    local stat, err = uv.fs_stat(src)
    if not stat then
        return nil, files.error(src, err)
    elseif stat.type == "directory" then
        return folder_into(vm, src, path, o)
    elseif stat.type == "file" then
        return file_into(vm, src, stat, path, o)
    end
    return nil, ("%s: neither a file nor a folder"):format(src)
end

function M.run(o, rest)
    local from_vm, from = parse(rest[1])
    local to_vm, to = parse(rest[2])
    if not from_vm == not to_vm then
        return 1, "cp: one of the two is VM:PATH, the other a path of this machine or -"
    end
    local ok, err = vms.with(from_vm or to_vm, function(vm)
        if from_vm then
            return out_of(vm, from, to, o)
        end
        return into(vm, from, to, o)
    end)
    return ok and 0 or 1, not ok and "cp: " .. tostring(err) or nil
end

return M
