---@meta sm.core
-- SPDX-License-Identifier: Apache-2.0
--
-- What sm.core offers beside the commands of a machine (core/cmd.c has those):
-- definitions for editors, and the text of the manual and help(). Never loaded;
-- sm.docs reads it.

---@class sm.core
local core = {}

---@class sm.core.vm
local vm = {}

--- A machine in this process. What commands do with it, its methods do.
---@param cfg? { cpus: integer?, memory: integer|string? }
---@return sm.core.vm? vm
---@return string? err
---@return integer? errno
function core.vm(cfg) end

--- The command table, as data: a list of { name, method, doc, args | variants }.
---@return table[] commands
function core.commands() end

--- What the hypervisor of this machine offers.
---@return table? info
---@return string? err
---@return integer? errno
---@return table? known what is known of it all the same
function core.probe() end

--- A value as a message: nil, booleans, numbers, strings and tables of them.
---@param value any
---@return string message
function core.pack(value) end

--- The value of a message.
---@param message string
---@return any value
---@return string? err
---@return integer? errno
function core.unpack(message) end

--- The message [id, name, arguments] of a command, for a worker; its arguments
--- given as to the method.
---@param id integer
---@param name string
---@param ... any
---@return string? message
---@return string? err what is wrong with the arguments
function core.request(id, name, ...) end

--- What a snapshot's file says of itself: version, arch, fingerprint, id, parent,
--- cpus, created_ns, ram_bytes, file_bytes, meta.
---@param path string
---@param verify boolean? check every byte
---@param progress (fun(done: integer, total: integer))? bytes
---@return table? info
---@return string? err
---@return integer? errno
function core.snapshot(path, verify, progress) end

--- Lock a file's descriptor, or let go. Never waits: EAGAIN when another holds it.
---@param fd integer
---@param mode "shared"|"exclusive"|"unlock"|nil exclusive when absent
---@return true? ok
---@return string? err
---@return integer? errno
function core.flock(fd, mode) end

--- Set the process's file mode mask.
---@param mask integer
---@return integer before
function core.umask(mask) end

--- Both directions of a socket end now. The descriptor stays open and its owner's.
---@param fd integer
function core.hangup(fd) end

--- Send bytes into a socket, as many as it takes now: never waits ("again"), never
--- raises SIGPIPE.
---@param fd integer
---@param bytes string
---@param from integer? position of the first byte to send
---@return integer? sent
---@return string? err
---@return integer? errno
function core.send(fd, bytes, from) end

--- Send a descriptor along with bytes through a unix socket. Never waits.
---@param socket integer
---@param fd integer
---@param bytes string
---@return integer? sent
---@return string? err
---@return integer? errno
function core.send_fd(socket, fd, bytes) end

--- A descriptor that polls readable once a socket takes bytes or has failed. It is
--- the caller's to close.
---@param fd integer
---@return integer? fd
---@return string? err
---@return integer? errno
function core.writable(fd) end

--- Make a descriptor a duplicate of another.
---@param fd integer
---@param target integer
---@return true? ok
---@return string? err
---@return integer? errno
function core.redirect(fd, target) end

--- Make one snapshot of a chain, with the id of the last. Blocks while it reads all.
---@param paths string[] from the one that is no diff on
---@param out string an empty file
---@param progress (fun(done: integer, total: integer))? bytes
---@return true? ok
---@return string? err
---@return integer? errno
function core.flatten(paths, out, progress) end

--- Write the pages that a copy of the last snapshot of a chain has touched.
---@param paths string[]
---@param touched string what the command snapshot.touched gave
---@param out string an empty file
---@return true? ok
---@return string? err
---@return integer? errno
function core.working_set(paths, touched, out) end

--- Hold the pages of a working set against their checksum.
---@param path string
---@return true? ok
---@return string? err
---@return integer? errno
function core.working_set_verify(path) end

--- Where a file has data, ascending; one extent when that cannot be told.
---@param path string
---@return { offset: integer, length: integer }[]? extents
---@return string? err
---@return integer? errno
function core.data_extents(path) end

--- Start a program without a signal handler: its end is told by the pidfd.
---@param path string looked for on the PATH
---@param args string[]
---@param fds table what its descriptors 0, 1, … are; n of them, holes allowed
---@param detached boolean? in a session of its own
---@return integer? pid
---@return integer|string pidfd or why not
---@return integer? errno
function core.spawn(path, args, fds, detached) end

--- The end of a program: "again" while it runs, ECHILD when somebody else took it.
---@param pidfd integer
---@return integer? code
---@return integer|string signal 0 for none, or why there is no code
---@return integer? errno
function core.reap(pidfd) end

--- Send a signal to the very process, never to another with its number.
---@param pidfd integer
---@param number integer
---@return true? ok
---@return string? err
---@return integer? errno
function core.signal(pidfd, number) end

--- Run a command by name.
---@param name string
---@param arguments table?
---@return any result
---@return string? err
---@return integer? errno
function vm:call(name, arguments) end

--- A descriptor that is readable when `next` has something.
---@return integer fd
function vm:pollfd() end

--- What to poll it for.
---@return string events "r"
function vm:events() end

--- When to look again without it.
---@return number? seconds nil: the descriptor alone says when
function vm:timeout() end

--- The next event, or nil. Never blocks.
---@return table? event
function vm:next() end

--- Wait for the next event.
---@param timeout number? seconds
---@return table? event
---@return string? err "timeout"
function vm:next_event(timeout) end

--- A vCPU as a part of its own: `vm:vcpu(0):step()` is `vm:step(0)`.
---@param index integer
---@return userdata vcpu
function vm:vcpu(index) end

--- An interrupt line as a part of its own: `vm:line(5):irq()` is `vm:irq(5)`.
---@param gsi integer
---@return userdata line
function vm:line(gsi) end

--- A device written in Lua: a claimed range whose accesses the handlers answer,
--- while `next` takes events. Closing it gives the range back.
---@param range table what `claim` takes, and the handlers read and write
---@return userdata? device
---@return string? err
---@return integer? errno
function vm:device(range) end

--- Stop it and free everything. May be called again.
function vm:close() end

return core
