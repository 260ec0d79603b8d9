/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Devices written in Lua: a claimed bus range (core/claim.h) whose accesses a
 * handler answers, on the Lua thread, while vm:next() takes events.
 *
 *   vCPU thread   access → parks, its slot filled ─▶ event fd
 *   Lua thread    vm:next() → handler → answer ─▶ the vCPU goes on
 *
 * A handler that raises gives the access what an access to nobody gets, and
 * the error comes back as an event {type = "device", claim, vcpu, error}. The
 * VM keeps its handlers, so a device lives until it is closed or the VM is.
 * Handlers do not yield.
 */
#include "lua_core.h"

#include <string.h>

#include "vm.h"

#define DEVICE "sm.core.device"

struct device {
    lua_Integer claim;
    int closed;
};

/* ---- serving ---- */

/* Push the field of the handler table on top; whether it is a function. */
static int push_handler(lua_State *L, const char *name)
{
    if (lua_getfield(L, -1, name) == LUA_TFUNCTION) {
        return 1;
    }
    lua_pop(L, 1);
    return 0;
}

static lua_Integer field(lua_State *L, int idx, const char *name)
{
    lua_getfield(L, idx, name);
    lua_Integer value = lua_tointeger(L, -1);
    lua_pop(L, 1);
    return value;
}

/* Call the handler on top for the event; 0 and the value in *value, or 1 and
 * an error message on the stack. Takes the handler. */
static int ask_handler(lua_State *L, int event, uint64_t *value)
{
    int write;
    lua_getfield(L, event, "write");
    write = lua_toboolean(L, -1);
    lua_pop(L, 1);
    if (!push_handler(L, write ? "write" : "read")) {
        lua_pop(L, 1);
        return 0;
    }
    lua_remove(L, -2);
    lua_pushinteger(L, field(L, event, "offset"));
    if (write) {
        lua_pushinteger(L, field(L, event, "value"));
    }
    lua_pushinteger(L, field(L, event, "len"));
    if (lua_pcall(L, write ? 3 : 2, 1, 0) != LUA_OK) {
        return 1;
    }
    int is_int;
    lua_Integer answer = lua_tointegerx(L, -1, &is_int);
    if (is_int) {
        *value = (uint64_t)answer;
    } else if (!write && !lua_isnil(L, -1)) {
        lua_pushfstring(L, "a read handler returned a %s, not an integer", luaL_typename(L, -1));
        lua_remove(L, -2);
        return 1;
    }
    lua_pop(L, 1);
    return 0;
}

/* Turn the error on top into its report. */
static void push_report(lua_State *L, lua_Integer claim, lua_Integer vcpu)
{
    luaL_tolstring(L, -1, NULL);
    lua_createtable(L, 0, 4);
    lua_pushliteral(L, "device");
    lua_setfield(L, -2, "type");
    lua_pushinteger(L, claim);
    lua_setfield(L, -2, "claim");
    lua_pushinteger(L, vcpu);
    lua_setfield(L, -2, "vcpu");
    lua_insert(L, -2);
    lua_setfield(L, -2, "error");
    lua_remove(L, -2);
}

/* Push the handlers of the event's claim; 0: it has none. */
static int push_handlers(lua_State *L, int idx, int event)
{
    if (lua_getfield(L, event, "claim") != LUA_TNUMBER) {
        lua_pop(L, 1);
        return 0;
    }
    if (lua_getiuservalue(L, idx, SM_LUA_HANDLERS) != LUA_TTABLE) {
        lua_pop(L, 2);
        return 0;
    }
    lua_pushvalue(L, -2);
    lua_rawget(L, -2);
    lua_replace(L, -3);
    lua_pop(L, 1);
    if (!lua_istable(L, -1)) {
        lua_pop(L, 1);
        return 0;
    }
    return 1;
}

static int is_exit(lua_State *L, int event)
{
    lua_getfield(L, event, "type");
    const char *type = lua_tostring(L, -1);
    int is = type && strcmp(type, "exit") == 0;
    lua_pop(L, 1);
    return is;
}

static int serve(lua_State *L, int idx, int hold)
{
    struct sm_lua_vm *box = lua_touserdata(L, idx);
    int event = lua_gettop(L);
    luaL_checkstack(L, 10, "device");
    if (!is_exit(L, event) || !push_handlers(L, idx, event)) {
        return 0;
    }
    uint64_t value = UINT64_MAX;
    int died = ask_handler(L, event, &value);
    lua_Integer vcpu = field(L, event, "vcpu"), claim = field(L, event, "claim");
    if (box->machine) { /* the handler may have closed it */
        sm_vm_vcpu_answer(sm_machine_vm(box->machine), (unsigned)vcpu,
                          died ? UINT64_MAX : value, hold);
        box->held |= hold ? 1ull << vcpu : 0;
    }
    if (died) {
        push_report(L, claim, vcpu);
        lua_replace(L, event);
        return 0;
    }
    lua_settop(L, event - 1);
    return 1;
}

int sm_lua_serve(lua_State *L, int idx)
{
    return serve(L, idx, 0);
}

int sm_lua_serve_waiting(lua_State *L, int idx)
{
    struct sm_lua_vm *box = lua_touserdata(L, idx);
    int top = lua_gettop(L);
    struct sm_msg_writer *w = sm_lua_new_writer(L, 4096);
    if (sm_machine_next_exit(box->machine, w) <= 0) {
        lua_settop(L, top);
        return 0;
    }
    struct sm_msg_reader r;
    sm_msg_reader_init(&r, w->buf, w->len);
    sm_lua_unpack(L, &r);
    if (!serve(L, idx, 1)) { /* for the owner: it comes with the next() */
        if (lua_getiuservalue(L, idx, SM_LUA_STASH) != LUA_TTABLE) {
            lua_pop(L, 1);
            lua_newtable(L);
            lua_pushvalue(L, -1);
            lua_setiuservalue(L, idx, SM_LUA_STASH);
        }
        lua_insert(L, -2);
        lua_rawseti(L, -2, (lua_Integer)lua_rawlen(L, -2) + 1);
    }
    lua_settop(L, top);
    return 1;
}

/* ---- the device ---- */

static void take_handlers_out(lua_State *L, int vm, lua_Integer claim)
{
    struct sm_lua_vm *box = lua_touserdata(L, vm);
    if (lua_getiuservalue(L, vm, SM_LUA_HANDLERS) == LUA_TTABLE &&
        lua_rawgeti(L, -1, claim) == LUA_TTABLE) {
        lua_pushnil(L);
        lua_rawseti(L, -3, claim);
        box->devices--;
    }
}

/* device:close(): accesses go to nobody from now on; may be called again */
static int device_close(lua_State *L)
{
    struct device *dev = luaL_checkudata(L, 1, DEVICE);
    lua_settop(L, 1);
    if (dev->closed) {
        return 0;
    }
    dev->closed = 1;
    lua_getiuservalue(L, 1, 1);
    struct sm_lua_vm *box = lua_touserdata(L, 2);
    if (box->machine) {
        sm_vm_release(sm_machine_vm(box->machine), (unsigned)dev->claim);
    }
    take_handlers_out(L, 2, dev->claim);
    return 0;
}

static int device_tostring(lua_State *L)
{
    struct device *dev = luaL_checkudata(L, 1, DEVICE);
    lua_getiuservalue(L, 1, 1);
    struct sm_lua_vm *box = lua_touserdata(L, -1);
    if (dev->closed || !box->machine) {
        lua_pushliteral(L, "device (closed)");
    } else {
        lua_pushfstring(L, "device (claim %I)", dev->claim);
    }
    return 1;
}

static void push_device(lua_State *L, int vm, lua_Integer claim)
{
    static const luaL_Reg meta[] = {
        { "close", device_close },
        { "__close", device_close },
        { "__tostring", device_tostring },
        { NULL, NULL },
    };
    struct device *dev = lua_newuserdatauv(L, sizeof(*dev), 1);
    *dev = (struct device){ .claim = claim };
    lua_pushvalue(L, vm);
    lua_setiuservalue(L, -2, 1);
    if (luaL_newmetatable(L, DEVICE)) {
        luaL_setfuncs(L, meta, 0);
        lua_pushvalue(L, -1);
        lua_setfield(L, -2, "__index");
    }
    lua_setmetatable(L, -2);
}

/* Move a handler from the argument at 2 into the table on top. */
static void take_handler(lua_State *L, const char *name)
{
    int type = lua_getfield(L, 2, name);
    if (type != LUA_TFUNCTION && type != LUA_TNIL) {
        luaL_error(L, "vm.device: %s: expected a function, got %s", name, luaL_typename(L, -1));
    }
    lua_setfield(L, -2, name);
    lua_pushnil(L);
    lua_setfield(L, 3, name);
}

/* Copy the argument's keys, so that taking some out leaves the caller's alone. */
static void copy_table(lua_State *L)
{
    lua_newtable(L);
    lua_pushnil(L);
    while (lua_next(L, 2)) {
        lua_pushvalue(L, -2);
        lua_insert(L, -2);
        lua_rawset(L, 3);
    }
}

/* Put the handlers on top under a claim. */
static void put_handlers(lua_State *L, lua_Integer claim)
{
    struct sm_lua_vm *box = lua_touserdata(L, 1);
    if (lua_getiuservalue(L, 1, SM_LUA_HANDLERS) != LUA_TTABLE) {
        lua_pop(L, 1);
        lua_newtable(L);
        lua_pushvalue(L, -1);
        lua_setiuservalue(L, 1, SM_LUA_HANDLERS);
    }
    lua_insert(L, -2);
    lua_rawseti(L, -2, claim);
    lua_pop(L, 1);
    box->devices++;
}

/*
 * vm:device { space = "mmio"|"pio", base =, size =,
 *             read = function(offset, len) → value,
 *             write = function(offset, value, len) } → device
 */
static int vm_device(lua_State *L)
{
    sm_lua_check_vm(L, 1);
    luaL_checktype(L, 2, LUA_TTABLE);
    lua_settop(L, 2);
    copy_table(L);
    lua_newtable(L);
    take_handler(L, "read");
    take_handler(L, "write");
    struct sm_msg_writer *w = sm_lua_new_writer(L, 4096);
    const char *bad = sm_lua_pack(L, 3, w);
    if (bad) {
        return luaL_error(L, "vm.device: %s", bad);
    }
    int results = sm_lua_run(L, 1, "bus.claim", strlen("bus.claim"), w);
    if (results != 1) {
        return results;
    }
    lua_Integer claim = lua_tointeger(L, -1);
    lua_pushvalue(L, 4);
    put_handlers(L, claim);
    push_device(L, 1, claim);
    return 1;
}

void sm_lua_add_device(lua_State *L)
{
    lua_pushcfunction(L, vm_device);
    lua_setfield(L, -2, "device");
}
