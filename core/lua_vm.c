/* SPDX-License-Identifier: Apache-2.0 */
/*
 * VMs as Lua userdata. Methods come from the command table (core/cmd.c); a
 * command runs in the caller's thread, and waits there where it has to wait
 * for a vCPU.
 *
 * The userdata is a box: `machine` is NULL when closed. One idempotent close
 * serves vm:close(), <close> and the collector. What pollfd() gives is a
 * duplicate that lives until the box is collected, because closing a
 * descriptor that an event loop still polls breaks the loop.
 */
#include "lua_core.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "vm.h"

#define VM "sm.core.vm"

struct box {
    struct sm_machine *machine; /* NULL: closed */
    int poll_fd;                /* -1: never asked for */
};

int sm_lua_refuse(lua_State *L, const char *what, int err)
{
    lua_pushnil(L);
    lua_pushstring(L, what);
    lua_pushinteger(L, -err);
    return 3;
}

static struct box *check_open(lua_State *L)
{
    struct box *box = luaL_checkudata(L, 1, VM);
    if (!box->machine) {
        luaL_error(L, "attempt to use a closed vm");
    }
    return box;
}

/* Run a command whose arguments are packed in w; the result is written behind
 * them. 1 value, or nil, what, errno; misuse raises. */
static int run(lua_State *L, struct box *box, const char *name, size_t name_len,
               struct sm_msg_writer *w)
{
    struct sm_cmd_error err;
    struct sm_msg_writer *out = sm_lua_new_writer(L, SM_CMD_MAX_MESSAGE_BYTES);
    if (sm_machine_call(box->machine, name, name_len, w->buf, w->len, out, &err) < 0) {
        if (err.misuse) {
            return luaL_error(L, "%s", err.text);
        }
        return sm_lua_refuse(L, err.text, err.code);
    }
    struct sm_msg_reader r;
    sm_msg_reader_init(&r, out->buf, out->len);
    struct sm_msg_value head;
    struct sm_msg_reader peek = r;
    sm_msg_next(&peek, &head);
    if (head.type == SM_MSG_NIL) {
        lua_pushboolean(L, 1); /* done; nil is for refusals */
    } else {
        sm_lua_unpack(L, &r);
    }
    sm_msg_writer_free(out); /* not only at the next collection */
    return 1;
}

/* vm:METHOD(...); upvalue 1 is the command's name */
static int vm_method(lua_State *L)
{
    size_t len;
    const char *name = lua_tolstring(L, lua_upvalueindex(1), &len);
    struct box *box = check_open(L);
    struct sm_msg_writer *w = sm_lua_new_writer(L, SM_CMD_MAX_MESSAGE_BYTES);
    lua_insert(L, 1);
    const char *bad = sm_lua_pack_args(L, sm_cmd_find(name, len), 3, w);
    if (bad) {
        return luaL_error(L, "%s: %s", name, bad);
    }
    return run(L, box, name, len, w);
}

/* vm:call(name, arguments?) */
static int vm_call(lua_State *L)
{
    size_t len;
    struct box *box = check_open(L);
    const char *name = luaL_checklstring(L, 2, &len);
    if (!lua_isnoneornil(L, 3)) {
        luaL_checktype(L, 3, LUA_TTABLE);
    }
    lua_settop(L, 3);
    struct sm_msg_writer *w = sm_lua_new_writer(L, SM_CMD_MAX_MESSAGE_BYTES);
    const char *bad = sm_lua_pack(L, 3, w);
    if (bad) {
        return luaL_error(L, "%s: %s", name, bad);
    }
    return run(L, box, name, len, w);
}

/* vm:pollfd() → a descriptor that is readable when next() has something */
static int vm_pollfd(lua_State *L)
{
    struct box *box = check_open(L);
    if (box->poll_fd < 0) {
        box->poll_fd = fcntl(sm_machine_event_fd(box->machine), F_DUPFD_CLOEXEC, 3);
        if (box->poll_fd < 0) {
            return sm_lua_refuse(L, strerror(errno), -errno);
        }
    }
    lua_pushinteger(L, box->poll_fd);
    return 1;
}

/* vm:events() → "r" */
static int vm_events(lua_State *L)
{
    check_open(L);
    lua_pushliteral(L, "r");
    return 1;
}

/* vm:timeout() → nil: the descriptor alone says when */
static int vm_timeout(lua_State *L)
{
    check_open(L);
    lua_pushnil(L);
    return 1;
}

/* vm:next() → the next event, or nil; never blocks */
static int vm_next(lua_State *L)
{
    struct box *box = check_open(L);
    struct sm_msg_writer *w = sm_lua_new_writer(L, 4096);
    if (sm_machine_next_event(box->machine, w) <= 0) {
        lua_pushnil(L);
        return 1;
    }
    struct sm_msg_reader r;
    sm_msg_reader_init(&r, w->buf, w->len);
    sm_lua_unpack(L, &r);
    sm_msg_writer_free(w);
    return 1;
}

static void close_box(struct box *box)
{
    struct sm_machine *machine = box->machine;
    box->machine = NULL;
    sm_machine_destroy(machine);
}

/* vm:close(): stop it and free everything; may be called again */
static int vm_close(lua_State *L)
{
    close_box(luaL_checkudata(L, 1, VM));
    return 0;
}

static int vm_gc(lua_State *L)
{
    struct box *box = luaL_checkudata(L, 1, VM);
    close_box(box);
    if (box->poll_fd >= 0) {
        close(box->poll_fd);
        box->poll_fd = -1;
    }
    return 0;
}

static int vm_tostring(lua_State *L)
{
    struct box *box = luaL_checkudata(L, 1, VM);
    if (!box->machine || !sm_machine_vm(box->machine)) {
        lua_pushliteral(L, "vm (closed)");
        return 1;
    }
    struct sm_vm *vm = sm_machine_vm(box->machine);
    struct sm_vm_status status;
    sm_vm_state(vm, &status);
    lua_pushfstring(L, "vm (%d vcpu, %s)", (int)sm_vm_cpus(vm), sm_run_state_name(status.state));
    return 1;
}

static void push_methods(lua_State *L)
{
    static const luaL_Reg fixed[] = {
        { "call", vm_call },
        { "pollfd", vm_pollfd },
        { "events", vm_events },
        { "timeout", vm_timeout },
        { "next", vm_next },
        { "close", vm_close },
        { NULL, NULL },
    };
    luaL_newlib(L, fixed);
    for (const struct sm_cmd *cmd = sm_cmd_table(); cmd->name; cmd++) {
        if (cmd->method) {
            lua_pushstring(L, cmd->name);
            lua_pushcclosure(L, vm_method, 1);
            lua_setfield(L, -2, cmd->method);
        }
    }
}

static void push_metatable(lua_State *L)
{
    static const luaL_Reg meta[] = {
        { "__gc", vm_gc },
        { "__close", vm_close },
        { "__tostring", vm_tostring },
        { NULL, NULL },
    };
    if (luaL_newmetatable(L, VM)) {
        luaL_setfuncs(L, meta, 0);
        push_methods(L);
        lua_setfield(L, -2, "__index");
    }
}

/* vm { cpus = 1, memory = 0 } → vm, or nil, what, errno */
static int core_vm(lua_State *L)
{
    if (!lua_isnoneornil(L, 1)) {
        luaL_checktype(L, 1, LUA_TTABLE);
    }
    lua_settop(L, 1);
    struct sm_msg_writer *w = sm_lua_new_writer(L, SM_CMD_MAX_MESSAGE_BYTES);
    const char *bad = sm_lua_pack(L, 1, w);
    if (bad) {
        return luaL_error(L, "vm.create: %s", bad);
    }
    struct box *box = lua_newuserdatauv(L, sizeof(*box), 0);
    *box = (struct box){ .poll_fd = -1 };
    push_metatable(L);
    lua_setmetatable(L, -2);
    int self = lua_gettop(L);
    int err = sm_machine_create(&box->machine);
    if (err < 0) {
        return sm_lua_refuse(L, "vm.create: out of memory", err);
    }
    int results = run(L, box, "vm.create", strlen("vm.create"), w);
    if (results != 1) {
        close_box(box);
        return results;
    }
    lua_pushvalue(L, self);
    return 1;
}

void sm_lua_push_vm_constructor(lua_State *L)
{
    lua_pushcfunction(L, core_vm);
}
