/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The Lua module sm.core: the primitives, and nothing of the product.
 *
 *   vm{...}          a virtual machine in this process (lua_vm.c)
 *   commands()       the command table, as data
 *   probe()          what the hypervisor of this machine offers
 *   pack, unpack, request   messages (lua_msg.c)
 *   snapshot(path)   what is in a snapshot (lua_snap.c)
 *   flatten(paths, out)     one snapshot out of a chain
 *   working_set(paths, touched, out), working_set_verify(path)
 *   flock, umask, hangup, send_fd, data_extents   what luv lacks
 *
 * No globals, no signals, nothing printed: several Lua states in several
 * threads may load it.
 */
#include "lua_core.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backend.h"

__attribute__((visibility("default"))) int luaopen_sm_core(lua_State *L);

/* ---- commands() ---- */

static const char *const type_names[] = {
    [SM_ARG_BOOL] = "boolean", [SM_ARG_INT] = "integer", [SM_ARG_U64] = "integer",
    [SM_ARG_NUMBER] = "number", [SM_ARG_SIZE] = "size", [SM_ARG_STRING] = "string", [SM_ARG_BYTES] = "bytes",
    [SM_ARG_CHOICE] = "choice", [SM_ARG_ARRAY] = "list", [SM_ARG_MAP] = "table",
};

static void set_string(lua_State *L, const char *key, const char *value)
{
    lua_pushstring(L, value);
    lua_setfield(L, -2, key);
}

static void push_args(lua_State *L, const struct sm_arg_spec *specs, unsigned count)
{
    lua_createtable(L, (int)count, 0);
    for (unsigned i = 0; i < count; i++) {
        lua_createtable(L, 0, 5);
        set_string(L, "key", specs[i].key);
        set_string(L, "type", type_names[specs[i].type]);
        set_string(L, "doc", specs[i].doc);
        lua_pushboolean(L, specs[i].required);
        lua_setfield(L, -2, "required");
        if (specs[i].choices) {
            set_string(L, "choices", specs[i].choices);
        }
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
}

static void push_variants(lua_State *L, const struct sm_cmd_variant *v)
{
    lua_newtable(L);
    for (; v->type; v++) {
        push_args(L, v->args, v->arg_count);
        lua_setfield(L, -2, v->type);
    }
}

/* commands() → list of {name, method, doc, args | variants} */
static int core_commands(lua_State *L)
{
    lua_newtable(L);
    lua_Integer n = 0;
    for (const struct sm_cmd *cmd = sm_cmd_table(); cmd->name; cmd++) {
        lua_createtable(L, 0, 4);
        set_string(L, "name", cmd->name);
        set_string(L, "doc", cmd->doc);
        if (cmd->method) {
            set_string(L, "method", cmd->method);
        }
        if (cmd->variants) {
            push_variants(L, cmd->variants);
            lua_setfield(L, -2, "variants");
        } else {
            push_args(L, cmd->args, cmd->arg_count);
            lua_setfield(L, -2, "args");
        }
        lua_rawseti(L, -2, ++n);
    }
    return 1;
}

/* ---- probe() ---- */

static void push_info(lua_State *L, const struct sm_hv_info *info)
{
    const struct {
        const char *key;
        bool value;
    } flags[] = {
        { "hardware", info->hardware },
        { "irqfd", info->irqfd },
        { "ioeventfd", info->ioeventfd },
        { "readonly_mem", info->readonly_mem },
        { "dirty_log", info->dirty_log },
        { "immediate_exit", info->immediate_exit },
        { "xsave", info->xsave },
        { "tsc_control", info->tsc_control },
        { "clock_realtime", info->clock_realtime },
    };
    lua_newtable(L);
    if (info->backend) {
        set_string(L, "backend", info->backend);
    }
    lua_pushinteger(L, info->max_vcpus);
    lua_setfield(L, -2, "max_vcpus");
    lua_pushinteger(L, info->page_bytes);
    lua_setfield(L, -2, "page_bytes");
    for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
        lua_pushboolean(L, flags[i].value);
        lua_setfield(L, -2, flags[i].key);
    }
}

/* probe() → table, or nil, what, errno, table of what is known */
static int core_probe(lua_State *L)
{
    struct sm_hv_info info = { 0 };
    int err = sm_hv_probe(&info);
    if (err < 0) {
        const char *what = err == -ENOENT   ? "no hypervisor device on this machine"
                           : err == -EACCES ? "the hypervisor device is not for this user"
                           : err == -ENOTSUP ? "the hypervisor lacks something we need"
                                             : strerror(-err);
        sm_lua_refuse(L, what, err);
        push_info(L, &info);
        return 4;
    }
    push_info(L, &info);
    return 1;
}

/* ---- what luv lacks ---- */

/* flock(fd, "shared"|"exclusive"|"unlock") → true, or nil, what, errno. Never
 * waits: EAGAIN when another holds it. */
static int core_flock(lua_State *L)
{
    static const char *const names[] = { "shared", "exclusive", "unlock", NULL };
    static const int ops[] = { LOCK_SH, LOCK_EX, LOCK_UN };
    lua_Integer fd = luaL_checkinteger(L, 1);
    luaL_argcheck(L, fd >= 0 && fd <= 0x7fffffff, 1, "not a descriptor");
    int op = ops[luaL_checkoption(L, 2, "exclusive", names)];
    if (flock((int)fd, op | LOCK_NB) < 0) {
        int err = errno;
        return sm_lua_refuse(L, err == EWOULDBLOCK ? "held by another" : strerror(err), -err);
    }
    lua_pushboolean(L, 1);
    return 1;
}

/* send_fd(socket, fd, bytes) → how many went, or nil, what, errno. The descriptor
 * goes along with the first byte; it stays open here. Never waits. */
static int core_send_fd(lua_State *L)
{
    size_t len;
    int sock = (int)luaL_checkinteger(L, 1), fd = (int)luaL_checkinteger(L, 2);
    const char *bytes = luaL_checklstring(L, 3, &len);
    union {
        struct cmsghdr head;
        char space[CMSG_SPACE(sizeof(int))];
    } control = { 0 };
    struct iovec iov = { (void *)bytes, len };
    struct msghdr msg = {
        .msg_iov = &iov,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
    luaL_argcheck(L, len > 0, 3, "no bytes to go with it");
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(c), &fd, sizeof(fd));
    ssize_t n = sendmsg(sock, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0) {
        int err = errno;
        return sm_lua_refuse(L, strerror(err), -err);
    }
    lua_pushinteger(L, (lua_Integer)n);
    return 1;
}

/* data_extents(path) → list of {offset, length} where a file has data, ascending;
 * nil, what, errno. One that cannot tell holes is one extent. */
static int core_data_extents(lua_State *L)
{
    int fd = open(luaL_checkstring(L, 1), O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        int err = errno;
        return sm_lua_refuse(L, strerror(err), -err);
    }
    off_t at = 0, end = lseek(fd, 0, SEEK_END);
    lua_newtable(L);
    for (lua_Integer n = 1; at < end; n++) {
        off_t data = lseek(fd, at, SEEK_DATA), hole;
        if (data < 0 && errno == ENXIO) {
            break;
        }
        data = data < 0 ? at : data;
        hole = lseek(fd, data, SEEK_HOLE);
        at = hole <= data ? end : hole;
        lua_createtable(L, 0, 2);
        lua_pushinteger(L, data);
        lua_setfield(L, -2, "offset");
        lua_pushinteger(L, at - data);
        lua_setfield(L, -2, "length");
        lua_rawseti(L, -2, n);
    }
    close(fd);
    return 1;
}

/* umask(mask) → the one before; of the whole process */
static int core_umask(lua_State *L)
{
    lua_Integer mask = luaL_checkinteger(L, 1);
    luaL_argcheck(L, mask >= 0 && mask <= 0777, 1, "not a mask");
    lua_pushinteger(L, (lua_Integer)umask((mode_t)mask));
    return 1;
}

/* hangup(fd): both directions of a socket end now; the descriptor stays open
 * and its owner's. Allowed in a finalizer, where luv's handles are not. */
static int core_hangup(lua_State *L)
{
    shutdown((int)luaL_checkinteger(L, 1), SHUT_RDWR);
    return 0;
}

int luaopen_sm_core(lua_State *L)
{
    static const luaL_Reg functions[] = {
        { "commands", core_commands },
        { "probe", core_probe },
        { "flock", core_flock },
        { "umask", core_umask },
        { "hangup", core_hangup },
        { "send_fd", core_send_fd },
        { "data_extents", core_data_extents },
        { "snapshot", sm_lua_snapshot },
        { "flatten", sm_lua_snapshot_flatten },
        { "working_set", sm_lua_working_set },
        { "working_set_verify", sm_lua_working_set_verify },
        { NULL, NULL },
    };
    luaL_checkversion(L);
    luaL_newlib(L, functions);
    sm_lua_add_msg(L);
    sm_lua_add_posix(L);
    sm_lua_add_spawn(L);
    sm_lua_push_vm_constructor(L);
    lua_setfield(L, -2, "vm");
    return 1;
}
