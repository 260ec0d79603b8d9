/* SPDX-License-Identifier: Apache-2.0 */
/* Shared by the files of the Lua module sm.core (core/lua_*.c). */
#ifndef SM_LUA_CORE_H
#define SM_LUA_CORE_H

#include <lauxlib.h>
#include <lua.h>

#include "cmd.h"
#include "msg.h"

/* A writer on the Lua stack, freed when collected: Lua may longjmp past us. */
struct sm_msg_writer *sm_lua_new_writer(lua_State *L, size_t limit_bytes);

/* Append the value at idx. NULL, or what cannot be packed (a static string).
 * Raises nothing. */
const char *sm_lua_pack(lua_State *L, int idx, struct sm_msg_writer *w);
/* Push the next value of a checked message. May raise (memory). */
void sm_lua_unpack(lua_State *L, struct sm_msg_reader *r);

/*
 * Append the arguments of a method call, from the stack at `first` to the top,
 * as the map that cmd wants: one table gives them by name, else they are in the
 * table's order. NULL, or what is wrong.
 */
const char *sm_lua_pack_args(lua_State *L, const struct sm_cmd *cmd, int first,
                             struct sm_msg_writer *w);

/* nil, what, errno */
int sm_lua_refuse(lua_State *L, const char *what, int err);

/*
 * A VM's box (core/lua_vm.c): machine is NULL when closed. Its user values are
 * what must live as long: the handlers of its devices by claim, and events
 * that were taken but not handed out. Both nil until they are needed.
 */
struct sm_lua_vm {
    struct sm_machine *machine;
    int poll_fd;      /* -1: never asked for */
    unsigned devices; /* handlers there are */
    uint64_t held;    /* vCPUs held behind an access, for a command to get through */
};
enum { SM_LUA_HANDLERS = 1, SM_LUA_STASH, SM_LUA_VM_VALUES = SM_LUA_STASH };
#define SM_LUA_VM "sm.core.vm"

/* The open VM at idx; raises. */
struct sm_lua_vm *sm_lua_check_vm(lua_State *L, int idx);
/* Run a command whose arguments are packed in w, on the VM at idx. 1 value, or
 * nil, what, errno; misuse raises. */
int sm_lua_run(lua_State *L, int idx, const char *name, size_t name_len, struct sm_msg_writer *w);

/* core/lua_device.c: an event is on top. Served: popped and true, or replaced
 * by the report of a handler that died and false; not for us: false. */
int sm_lua_serve(lua_State *L, int idx);
/* Serve one vCPU that waits for a handler of the VM at idx, and hold it. */
int sm_lua_serve_waiting(lua_State *L, int idx);
/* Push the methods of devices and of parts into the table on top. */
void sm_lua_add_device(lua_State *L);
void sm_lua_add_parts(lua_State *L);

/* Push the constructor of VMs. */
void sm_lua_push_vm_constructor(lua_State *L);
/* Push messages' functions into the table on top. */
void sm_lua_add_msg(lua_State *L);
void sm_lua_add_posix(lua_State *L);
void sm_lua_add_spawn(lua_State *L);

/* lua_snap.c */
int sm_lua_snapshot(lua_State *L);
int sm_lua_snapshot_flatten(lua_State *L);
int sm_lua_working_set(lua_State *L);
int sm_lua_working_set_verify(lua_State *L);

#endif
