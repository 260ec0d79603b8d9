/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Parts of a VM as userdata: vm:vcpu(0), vm:line(5). A part is a number and the
 * VM it keeps alive; its methods are the commands that take that number first,
 * under the command's own name: vcpu.step is vm:step(0) and vm:vcpu(0):step().
 */
#include "lua_core.h"

#include <string.h>

#include "vm.h"

struct kind {
    const char *type;   /* of the userdata */
    const char *word;   /* what it is, for people */
    const char *method; /* of the VM, that gives it */
    const char *key;    /* the first argument of its commands */
};

static const struct kind kinds[] = {
    { "sm.core.vcpu", "vcpu", "vcpu", "vcpu" },
    { "sm.core.line", "line", "line", "gsi" },
};

struct part {
    const struct kind *kind;
    lua_Integer number;
};

static struct part *check_part(lua_State *L)
{
    return luaL_checkudata(L, 1, lua_tostring(L, lua_upvalueindex(1)));
}

/* part:METHOD(...); upvalues: the type, the command's name */
static int part_method(lua_State *L)
{
    size_t len;
    struct part *part = check_part(L);
    const char *name = lua_tolstring(L, lua_upvalueindex(2), &len);
    lua_getiuservalue(L, 1, 1);
    lua_replace(L, 1); /* the VM */
    sm_lua_check_vm(L, 1);
    lua_pushinteger(L, part->number);
    lua_insert(L, 2);
    struct sm_msg_writer *w = sm_lua_new_writer(L, SM_CMD_MAX_MESSAGE_BYTES);
    lua_insert(L, 1);
    const char *bad = sm_lua_pack_args(L, sm_cmd_find(name, len), 3, w);
    if (bad) {
        return luaL_error(L, "%s: %s", name, bad);
    }
    return sm_lua_run(L, 2, name, len, w);
}

static int part_tostring(lua_State *L)
{
    struct part *part = check_part(L);
    lua_getiuservalue(L, 1, 1);
    struct sm_lua_vm *box = lua_touserdata(L, -1);
    lua_pushfstring(L, box->machine ? "%s %I" : "%s %I (closed)", part->kind->word, part->number);
    return 1;
}

static int part_eq(lua_State *L)
{
    struct part *a = luaL_testudata(L, 1, lua_tostring(L, lua_upvalueindex(1)));
    struct part *b = luaL_testudata(L, 2, lua_tostring(L, lua_upvalueindex(1)));
    int same = a && b && a->number == b->number;
    if (same) {
        lua_getiuservalue(L, 1, 1);
        lua_getiuservalue(L, 2, 1);
        same = lua_rawequal(L, -1, -2);
    }
    lua_pushboolean(L, same);
    return 1;
}

static void push_methods(lua_State *L, const struct kind *kind)
{
    lua_newtable(L);
    for (const struct sm_cmd *cmd = sm_cmd_table(); cmd->name; cmd++) {
        if (cmd->arg_count && strcmp(cmd->args[0].key, kind->key) == 0) {
            lua_pushstring(L, kind->type);
            lua_pushstring(L, cmd->name);
            lua_pushcclosure(L, part_method, 2);
            lua_setfield(L, -2, strchr(cmd->name, '.') + 1);
        }
    }
}

static void push_metatable(lua_State *L, const struct kind *kind)
{
    if (!luaL_newmetatable(L, kind->type)) {
        return;
    }
    const luaL_Reg meta[] = {
        { "__tostring", part_tostring }, { "__eq", part_eq }, { NULL, NULL }
    };
    lua_pushstring(L, kind->type);
    luaL_setfuncs(L, meta, 1);
    push_methods(L, kind);
    lua_setfield(L, -2, "__index");
}

static int push_part(lua_State *L, const struct kind *kind, lua_Integer end)
{
    sm_lua_check_vm(L, 1);
    lua_Integer number = luaL_checkinteger(L, 2);
    luaL_argcheck(L, number >= 0 && number < end, 2, "out of range");
    struct part *part = lua_newuserdatauv(L, sizeof(*part), 1);
    *part = (struct part){ .kind = kind, .number = number };
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, -2, 1);
    push_metatable(L, kind);
    lua_setmetatable(L, -2);
    return 1;
}

/* vm:vcpu(index) */
static int vm_vcpu(lua_State *L)
{
    return push_part(L, &kinds[0], sm_vm_cpus(sm_machine_vm(sm_lua_check_vm(L, 1)->machine)));
}

/* vm:line(gsi) */
static int vm_line(lua_State *L)
{
    return push_part(L, &kinds[1], 1024);
}

void sm_lua_add_parts(lua_State *L)
{
    lua_pushcfunction(L, vm_vcpu);
    lua_setfield(L, -2, kinds[0].method);
    lua_pushcfunction(L, vm_line);
    lua_setfield(L, -2, kinds[1].method);
}
