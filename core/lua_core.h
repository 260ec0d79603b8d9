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

/* Push the constructor of VMs. */
void sm_lua_push_vm_constructor(lua_State *L);
/* Push messages' functions into the table on top. */
void sm_lua_add_msg(lua_State *L);

#endif
