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
#include <poll.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "backend.h"
#include "vm.h"

#define VM SM_LUA_VM
#define SERVED_MAX 64 /* accesses that one next() answers */

int sm_lua_refuse(lua_State *L, const char *what, int err)
{
    lua_pushnil(L);
    lua_pushstring(L, what);
    lua_pushinteger(L, -err);
    return 3;
}

struct sm_lua_vm *sm_lua_check_vm(lua_State *L, int idx)
{
    struct sm_lua_vm *box = luaL_checkudata(L, idx, VM);
    if (!box->machine) {
        luaL_error(L, "attempt to use a closed vm");
    }
    return box;
}

static struct sm_lua_vm *check_open(lua_State *L)
{
    return sm_lua_check_vm(L, 1);
}

/* Let the vCPUs go on that were held; but the one that was to be held. */
static void let_go(struct sm_lua_vm *box, const char *name, const struct sm_msg_writer *w)
{
    struct sm_msg_reader r, at;
    struct sm_msg_value vcpu = { .type = SM_MSG_NIL };
    sm_msg_reader_init(&r, w->buf, w->len);
    if (strcmp(name, "vcpu.hold") == 0 && sm_msg_find(&r, "vcpu", &at) == 0 &&
        sm_msg_next(&at, &vcpu) == 0 && vcpu.type == SM_MSG_INT) {
        box->held &= ~(1ull << (vcpu.u.i & 63));
    }
    while (box->held) {
        unsigned i = (unsigned)__builtin_ctzll(box->held);
        box->held &= box->held - 1;
        sm_vm_vcpu_continue(sm_machine_vm(box->machine), i, false);
    }
}

/*
 * A command that finds a vCPU waiting for a device's handler is refused with
 * EBUSY. We are the one who can answer: do, hold the vCPU behind that access,
 * and ask again; a turn for each vCPU is enough.
 */
#define BUSY_TURNS (2 * SM_MAX_VCPUS)

static int call(lua_State *L, int idx, const char *name, size_t name_len,
                struct sm_msg_writer *w, struct sm_msg_writer *out, struct sm_cmd_error *err)
{
    struct sm_lua_vm *box = lua_touserdata(L, idx);
    int code = 0;
    for (int turn = 0; turn < BUSY_TURNS; turn++) {
        code = sm_machine_call(box->machine, name, name_len, w->buf, w->len, out, err);
        if (code != -EBUSY || !box->devices) {
            break;
        }
        sm_lua_serve_waiting(L, idx);
        sm_lua_check_vm(L, idx); /* a handler may have closed it */
    }
    if (box->held) {
        let_go(box, name, w);
    }
    return code;
}

/* The result is written behind the arguments' writer. */
int sm_lua_run(lua_State *L, int idx, const char *name, size_t name_len, struct sm_msg_writer *w)
{
    struct sm_cmd_error err;
    struct sm_msg_writer *out = sm_lua_new_writer(L, SM_CMD_MAX_MESSAGE_BYTES);
    if (call(L, idx, name, name_len, w, out, &err) < 0) {
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
    check_open(L);
    struct sm_msg_writer *w = sm_lua_new_writer(L, SM_CMD_MAX_MESSAGE_BYTES);
    lua_insert(L, 1);
    const char *bad = sm_lua_pack_args(L, sm_cmd_find(name, len), 3, w);
    if (bad) {
        return luaL_error(L, "%s: %s", name, bad);
    }
    return sm_lua_run(L, 2, name, len, w);
}

/* vm:call(name, arguments?) */
static int vm_call(lua_State *L)
{
    size_t len;
    check_open(L);
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
    return sm_lua_run(L, 1, name, len, w);
}

/* vm:pollfd() → a descriptor that is readable when next() has something */
static int vm_pollfd(lua_State *L)
{
    struct sm_lua_vm *box = check_open(L);
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

/* An event that a command met and kept for later. */
static int take_stashed(lua_State *L)
{
    if (lua_getiuservalue(L, 1, SM_LUA_STASH) != LUA_TTABLE) {
        lua_pop(L, 1);
        return 0;
    }
    lua_Integer n = (lua_Integer)lua_rawlen(L, -1);
    if (n == 0) {
        lua_pop(L, 1);
        return 0;
    }
    lua_rawgeti(L, -1, 1);
    for (lua_Integer i = 1; i <= n; i++) {
        lua_rawgeti(L, -2, i + 1);
        lua_rawseti(L, -3, i);
    }
    lua_remove(L, -2);
    return 1;
}

/* Push the next event that no device has served; 0: there is none. */
static int next_event(lua_State *L)
{
    struct sm_lua_vm *box = check_open(L);
    if (take_stashed(L)) {
        return 1;
    }
    /* With the turns used up the descriptor has not been cleared: it stays
     * readable. */
    for (int turn = 0; turn < SERVED_MAX; turn++) {
        check_open(L); /* a handler may have closed it */
        struct sm_msg_writer *w = sm_lua_new_writer(L, 4096);
        if (sm_machine_next_event(box->machine, w) <= 0) {
            return 0;
        }
        struct sm_msg_reader r;
        sm_msg_reader_init(&r, w->buf, w->len);
        sm_lua_unpack(L, &r);
        sm_msg_writer_free(w);
        if (!box->devices || !sm_lua_serve(L, 1)) {
            return 1;
        }
        lua_settop(L, 2);
    }
    return 0;
}

/* vm:next() → the next event, or nil; never waits */
static int vm_next(lua_State *L)
{
    lua_settop(L, 2);
    if (!next_event(L)) {
        lua_pushnil(L);
    }
    return 1;
}

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* vm:next_event(timeout?) → the next event, or nil, "timeout"; the thread waits
 * (in an event loop, poll and call next) */
static int vm_next_event(lua_State *L)
{
    lua_Number seconds = luaL_optnumber(L, 2, -1);
    luaL_argcheck(L, seconds < 1e9, 2, "too long");
    int64_t deadline = now_ms() + (int64_t)(seconds * 1000);
    lua_settop(L, 2);
    while (!next_event(L)) {
        struct pollfd pfd = { sm_machine_event_fd(check_open(L)->machine), POLLIN, 0 };
        int64_t left = seconds < 0 ? -1 : deadline - now_ms();
        if (seconds >= 0 && left <= 0) {
            lua_pushnil(L);
            lua_pushliteral(L, "timeout");
            return 2;
        }
        if (poll(&pfd, 1, left > INT32_MAX ? INT32_MAX : (int)left) < 0) {
            /* The host's signal handler may want Lua's attention. */
            return sm_lua_refuse(L, strerror(errno), -errno);
        }
        lua_settop(L, 2);
    }
    return 1;
}

static void close_box(struct sm_lua_vm *box)
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
    struct sm_lua_vm *box = luaL_checkudata(L, 1, VM);
    close_box(box);
    if (box->poll_fd >= 0) {
        close(box->poll_fd);
        box->poll_fd = -1;
    }
    return 0;
}

static int vm_tostring(lua_State *L)
{
    struct sm_lua_vm *box = luaL_checkudata(L, 1, VM);
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
        { "next_event", vm_next_event },
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
    sm_lua_add_device(L);
    sm_lua_add_parts(L);
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
    struct sm_lua_vm *box = lua_newuserdatauv(L, sizeof(*box), SM_LUA_VM_VALUES);
    *box = (struct sm_lua_vm){ .poll_fd = -1 };
    push_metatable(L);
    lua_setmetatable(L, -2);
    int self = lua_gettop(L);
    int err = sm_machine_create(&box->machine);
    if (err < 0) {
        return sm_lua_refuse(L, "vm.create: out of memory", err);
    }
    int results = sm_lua_run(L, self, "vm.create", strlen("vm.create"), w);
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
