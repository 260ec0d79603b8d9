/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Messages as Lua values. A table whose keys are 1 … n becomes an array, any
 * other a map (an empty one a map); keys are strings or integers. Unsigned
 * numbers above the largest Lua integer wrap, as Lua's own hexadecimal
 * literals do. Metamethods are not consulted.
 */
#include "lua_core.h"

#include <errno.h>
#include <string.h>

#define WRITER "sm.core.writer"

static int writer_gc(lua_State *L)
{
    sm_msg_writer_free(luaL_checkudata(L, 1, WRITER));
    return 0;
}

struct sm_msg_writer *sm_lua_new_writer(lua_State *L, size_t limit_bytes)
{
    struct sm_msg_writer *w = lua_newuserdatauv(L, sizeof(*w), 0);
    sm_msg_writer_init(w, limit_bytes);
    if (luaL_newmetatable(L, WRITER)) {
        lua_pushcfunction(L, writer_gc);
        lua_setfield(L, -2, "__gc");
    }
    lua_setmetatable(L, -2);
    return w;
}

/* ---- Lua → message ---- */

static const char *pack_value(lua_State *L, int idx, struct sm_msg_writer *w, int depth);

/* How many pairs, and whether their keys are 1 … n. */
static lua_Unsigned count_pairs(lua_State *L, int idx, int *is_array)
{
    lua_Unsigned count = 0, len = lua_rawlen(L, idx);
    *is_array = len > 0;
    lua_pushnil(L);
    while (lua_next(L, idx)) {
        lua_Integer key = lua_isinteger(L, -2) ? lua_tointeger(L, -2) : 0;
        if (key < 1 || (lua_Unsigned)key > len) {
            *is_array = 0;
        }
        count++;
        lua_pop(L, 1);
    }
    if (count != len) {
        *is_array = 0;
    }
    return count;
}

static const char *pack_array(lua_State *L, int idx, lua_Unsigned count,
                              struct sm_msg_writer *w, int depth)
{
    const char *bad = NULL;
    sm_msg_put_array(w, (uint32_t)count);
    for (lua_Unsigned i = 1; i <= count && !bad; i++) {
        lua_rawgeti(L, idx, (lua_Integer)i);
        bad = pack_value(L, lua_gettop(L), w, depth);
        lua_pop(L, 1);
    }
    return bad;
}

static const char *pack_map(lua_State *L, int idx, lua_Unsigned count,
                            struct sm_msg_writer *w, int depth)
{
    sm_msg_put_map(w, (uint32_t)count);
    lua_pushnil(L);
    while (lua_next(L, idx)) {
        int top = lua_gettop(L);
        const char *bad = NULL;
        if (lua_type(L, -2) != LUA_TSTRING && !lua_isinteger(L, -2)) {
            bad = "cannot pack a key that is neither a string nor an integer";
        } else {
            bad = pack_value(L, top - 1, w, depth);
        }
        if (!bad) {
            bad = pack_value(L, top, w, depth);
        }
        if (bad) {
            lua_pop(L, 2);
            return bad;
        }
        lua_pop(L, 1);
    }
    return NULL;
}

static const char *pack_table(lua_State *L, int idx, struct sm_msg_writer *w, int depth)
{
    int is_array;
    if (depth > SM_MSG_MAX_DEPTH || !lua_checkstack(L, 4)) {
        return "cannot pack a table nested too deep";
    }
    lua_Unsigned count = count_pairs(L, idx, &is_array);
    if (count > UINT32_MAX) {
        return "cannot pack a table so large";
    }
    return is_array ? pack_array(L, idx, count, w, depth) : pack_map(L, idx, count, w, depth);
}

static const char *pack_value(lua_State *L, int idx, struct sm_msg_writer *w, int depth)
{
    size_t len;
    const char *s;
    switch (lua_type(L, idx)) {
    case LUA_TNIL: sm_msg_put_nil(w); return NULL;
    case LUA_TBOOLEAN: sm_msg_put_bool(w, lua_toboolean(L, idx)); return NULL;
    case LUA_TNUMBER:
        if (lua_isinteger(L, idx)) {
            sm_msg_put_int(w, lua_tointeger(L, idx));
        } else {
            sm_msg_put_double(w, lua_tonumber(L, idx));
        }
        return NULL;
    case LUA_TSTRING:
        s = lua_tolstring(L, idx, &len);
        sm_msg_put_strn(w, s, len);
        return NULL;
    case LUA_TTABLE: return pack_table(L, idx, w, depth + 1);
    case LUA_TFUNCTION: return "cannot pack a function";
    case LUA_TTHREAD: return "cannot pack a coroutine";
    default: return "cannot pack a userdata";
    }
}

const char *sm_lua_pack(lua_State *L, int idx, struct sm_msg_writer *w)
{
    const char *bad = pack_value(L, lua_absindex(L, idx), w, 0);
    if (!bad && w->error) {
        return w->error == -ENOMEM ? "out of memory" : "more data than one command may carry";
    }
    return bad;
}

static int takes_table_first(const struct sm_cmd *cmd)
{
    return !cmd->variants && cmd->arg_count > 0 &&
           (cmd->args[0].type == SM_ARG_MAP || cmd->args[0].type == SM_ARG_ARRAY);
}

const char *sm_lua_pack_args(lua_State *L, const struct sm_cmd *cmd, int first,
                             struct sm_msg_writer *w)
{
    int count = lua_gettop(L) - first + 1;
    if (count < 0) {
        count = 0;
    }
    if (count == 1 && lua_istable(L, first) && !takes_table_first(cmd)) {
        return sm_lua_pack(L, first, w);
    }
    if (cmd->variants && count > 0) {
        return "expected one table of arguments";
    }
    if ((unsigned)count > cmd->arg_count) {
        return "too many arguments";
    }
    sm_msg_put_map(w, (uint32_t)count);
    const char *bad = NULL;
    for (int i = 0; i < count && !bad; i++) {
        sm_msg_put_str(w, cmd->args[i].key);
        bad = sm_lua_pack(L, first + i, w);
    }
    return bad;
}

/* ---- message → Lua ---- */

static void unpack_container(lua_State *L, struct sm_msg_reader *r,
                             const struct sm_msg_value *head)
{
    uint32_t count = head->u.count;
    luaL_checkstack(L, 4, "message");
    if (head->type == SM_MSG_ARRAY) {
        lua_createtable(L, count < 1024 ? (int)count : 1024, 0);
        for (uint32_t i = 1; i <= count; i++) {
            sm_lua_unpack(L, r);
            lua_rawseti(L, -2, i);
        }
        return;
    }
    lua_createtable(L, 0, count < 1024 ? (int)count : 1024);
    for (uint32_t i = 0; i < count; i++) {
        sm_lua_unpack(L, r);
        sm_lua_unpack(L, r);
        int type = lua_type(L, -2);
        if (type == LUA_TSTRING || type == LUA_TBOOLEAN || lua_isinteger(L, -2)) {
            lua_rawset(L, -3);
        } else {
            lua_pop(L, 2); /* no key of ours, and NaN or nil would raise */
        }
    }
}

void sm_lua_unpack(lua_State *L, struct sm_msg_reader *r)
{
    struct sm_msg_value v;
    if (sm_msg_next(r, &v) < 0) {
        luaL_error(L, "malformed message");
    }
    switch (v.type) {
    case SM_MSG_NIL: lua_pushnil(L); return;
    case SM_MSG_BOOL: lua_pushboolean(L, v.u.b); return;
    case SM_MSG_INT: lua_pushinteger(L, v.u.i); return;
    case SM_MSG_UINT: lua_pushinteger(L, (lua_Integer)v.u.u); return;
    case SM_MSG_DOUBLE: lua_pushnumber(L, v.u.d); return;
    case SM_MSG_BYTES: lua_pushlstring(L, v.u.bytes.p, v.u.bytes.len); return;
    case SM_MSG_ARRAY:
    case SM_MSG_MAP: unpack_container(L, r, &v); return;
    }
}

/* ---- functions ---- */

/* pack(value) → string */
static int core_pack(lua_State *L)
{
    luaL_checkany(L, 1);
    lua_settop(L, 1);
    struct sm_msg_writer *w = sm_lua_new_writer(L, SM_CMD_MAX_MESSAGE_BYTES);
    const char *bad = sm_lua_pack(L, 1, w);
    if (bad) {
        return luaL_error(L, "pack: %s", bad);
    }
    lua_pushlstring(L, (const char *)w->buf, w->len);
    return 1;
}

/* unpack(string) → value, or nil, what, errno */
static int core_unpack(lua_State *L)
{
    size_t len;
    const char *s = luaL_checklstring(L, 1, &len);
    if (sm_msg_check(s, len) < 0) {
        return sm_lua_refuse(L, "unpack: malformed message", -EBADMSG);
    }
    struct sm_msg_reader r;
    sm_msg_reader_init(&r, s, len);
    sm_lua_unpack(L, &r);
    return 1;
}

/* request(id, name, ...) → string: the message [id, name, arguments] of a
 * command, its arguments given as to the method; nil, what is wrong with them. */
static int core_request(lua_State *L)
{
    size_t len;
    lua_Integer id = luaL_checkinteger(L, 1);
    const char *name = luaL_checklstring(L, 2, &len);
    const struct sm_cmd *cmd = sm_cmd_find(name, len);
    if (!cmd) {
        lua_pushnil(L);
        lua_pushfstring(L, "no command named '%s'", name);
        return 2;
    }
    struct sm_msg_writer *w = sm_lua_new_writer(L, SM_CMD_MAX_MESSAGE_BYTES);
    lua_insert(L, 1);
    sm_msg_put_array(w, 3);
    sm_msg_put_int(w, id);
    sm_msg_put_strn(w, name, len);
    const char *bad = sm_lua_pack_args(L, cmd, 4, w);
    if (bad) {
        lua_pushnil(L);
        lua_pushfstring(L, "%s: %s", name, bad);
        return 2;
    }
    lua_pushlstring(L, (const char *)w->buf, w->len);
    return 1;
}

void sm_lua_add_msg(lua_State *L)
{
    static const luaL_Reg functions[] = {
        { "pack", core_pack },
        { "unpack", core_unpack },
        { "request", core_request },
        { NULL, NULL },
    };
    luaL_setfuncs(L, functions, 0);
}
