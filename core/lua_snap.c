/* SPDX-License-Identifier: Apache-2.0 */
/* Snapshots as files, without a VM: what they say of themselves. */
#include "lua_core.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "snap.h"

static void set_string(lua_State *L, const char *key, const char *p, size_t len)
{
    lua_pushlstring(L, p, len);
    lua_setfield(L, -2, key);
}

static void set_integer(lua_State *L, const char *key, uint64_t value)
{
    lua_pushinteger(L, (lua_Integer)value);
    lua_setfield(L, -2, key);
}

static void set_id(lua_State *L, const char *key, const uint8_t *id)
{
    static const uint8_t none[SM_SNAP_ID_BYTES];
    char hex[2 * SM_SNAP_ID_BYTES];

    if (memcmp(id, none, sizeof(none)) == 0) {
        return;
    }
    for (unsigned i = 0; i < SM_SNAP_ID_BYTES; i++) {
        hex[2 * i] = "0123456789abcdef"[id[i] >> 4];
        hex[2 * i + 1] = "0123456789abcdef"[id[i] & 15];
    }
    set_string(L, key, hex, sizeof(hex));
}

/* What is read before the box is filled, so that no error leaks it. */
struct reading {
    struct sm_snap *snap;
};

static int reading_close(lua_State *L)
{
    struct reading *r = lua_touserdata(L, 1);

    sm_snap_close(r->snap);
    r->snap = NULL;
    return 0;
}

static struct reading *new_reading(lua_State *L)
{
    struct reading *r = lua_newuserdatauv(L, sizeof(*r), 0);

    r->snap = NULL;
    lua_createtable(L, 0, 1);
    lua_pushcfunction(L, reading_close);
    lua_setfield(L, -2, "__gc");
    lua_setmetatable(L, -2);
    return r;
}

/* snapshot(path, verify?) → {version, arch, fingerprint, id, parent, cpus,
 * created_ns, ram_bytes, file_bytes, meta}, or nil, what, errno */
int sm_lua_snapshot(lua_State *L)
{
    const char *path = luaL_checkstring(L, 1);
    bool verify = lua_toboolean(L, 2);
    struct reading *reading = new_reading(L);
    char why[240] = "";
    int err = 0, fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

    if (fd < 0) {
        err = -errno;
    } else {
        err = sm_snap_open(fd, &reading->snap, why, sizeof(why));
        if (!err && verify) {
            err = sm_snap_verify(reading->snap, why, sizeof(why));
        }
    }
    if (err) {
        lua_pushfstring(L, "%s: %s", path, why[0] ? why : strerror(-err));
        const char *text = lua_tostring(L, -1);
        return sm_lua_refuse(L, text, err);
    }
    const struct sm_snap_info *info = sm_snap_info(reading->snap);
    size_t len;
    const char *meta = sm_snap_meta(reading->snap, &len);
    lua_createtable(L, 0, 10);
    set_string(L, "meta", meta, len);
    set_string(L, "arch", info->arch, strlen(info->arch));
    set_string(L, "fingerprint", info->fingerprint, strlen(info->fingerprint));
    set_id(L, "id", info->id);
    set_id(L, "parent", info->parent);
    set_integer(L, "version", info->version);
    set_integer(L, "cpus", info->cpus);
    set_integer(L, "created_ns", info->created_ns);
    set_integer(L, "ram_bytes", info->ram_bytes);
    set_integer(L, "file_bytes", info->file_bytes);
    sm_snap_close(reading->snap); /* not only at the next collection */
    reading->snap = NULL;
    return 1;
}
