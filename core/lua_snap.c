/* SPDX-License-Identifier: Apache-2.0 */
/* Snapshots as files, without a VM: what they say of themselves. */
#include "lua_core.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "snap.h"
#include "working_set.h"

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

/* What is open while something is made of it, so that no error leaks it. */
struct reading {
    struct sm_snap *snaps[SM_SNAP_CHAIN_MAX];
    unsigned count;
    int fd; /* that is written to */
};

static void close_all(struct reading *r)
{
    while (r->count) {
        sm_snap_close(r->snaps[--r->count]);
    }
    if (r->fd >= 0) {
        close(r->fd);
    }
    r->fd = -1;
}

static int reading_close(lua_State *L)
{
    close_all(lua_touserdata(L, 1));
    return 0;
}

static struct reading *new_reading(lua_State *L)
{
    struct reading *r = lua_newuserdatauv(L, sizeof(*r), 0);

    r->count = 0;
    r->fd = -1;
    lua_createtable(L, 0, 1);
    lua_pushcfunction(L, reading_close);
    lua_setfield(L, -2, "__gc");
    lua_setmetatable(L, -2);
    return r;
}

static int open_next(struct reading *r, const char *path, char *why, size_t len)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), err;

    if (fd < 0) {
        return -errno;
    }
    err = sm_snap_open(fd, &r->snaps[r->count], why, len);
    r->count += err == 0;
    return err;
}

static int refuse(lua_State *L, const char *path, int err, const char *why)
{
    lua_pushfstring(L, "%s: %s", path, why[0] ? why : strerror(-err));
    return sm_lua_refuse(L, lua_tostring(L, -1), err);
}

/* A function of the caller's that is told how far we are: (done, total) in bytes. */
struct telling {
    struct sm_snap_progress progress; /* first */
    lua_State *L;
    int index;
};

static void tell(struct sm_snap_progress *p)
{
    const struct telling *t = (const struct telling *)p;

    lua_pushvalue(t->L, t->index);
    lua_pushinteger(t->L, (lua_Integer)p->done_bytes);
    lua_pushinteger(t->L, (lua_Integer)p->total_bytes);
    if (lua_pcall(t->L, 2, 0, 0) != LUA_OK) { /* an error of its own stops nothing */
        lua_pop(t->L, 1);
    }
}

/* The function at an index, or NULL when there is none. */
static struct sm_snap_progress *told(lua_State *L, int index, struct telling *t)
{
    if (lua_isnoneornil(L, index)) {
        return NULL;
    }
    luaL_checktype(L, index, LUA_TFUNCTION);
    *t = (struct telling){ .progress.tell = tell, .L = L, .index = index };
    return &t->progress;
}

/* snapshot(path, verify?, progress?) → {version, arch, fingerprint, id, parent, cpus,
 * created_ns, ram_bytes, file_bytes, diff, meta}, or nil, what, errno */
int sm_lua_snapshot(lua_State *L)
{
    const char *path = luaL_checkstring(L, 1);
    bool verify = lua_toboolean(L, 2);
    struct telling t;
    struct sm_snap_progress *progress = told(L, 3, &t);
    struct reading *reading = new_reading(L);
    char why[240] = "";
    int err = open_next(reading, path, why, sizeof(why));

    if (!err && verify) {
        err = sm_snap_verify(reading->snaps[0], progress, why, sizeof(why));
    }
    if (err) {
        return refuse(L, path, err, why);
    }
    const struct sm_snap_info *info = sm_snap_info(reading->snaps[0]);
    size_t len;
    const char *meta = sm_snap_meta(reading->snaps[0], &len);
    lua_createtable(L, 0, 11);
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
    lua_pushboolean(L, info->diff);
    lua_setfield(L, -2, "diff");
    close_all(reading); /* not only at the next collection */
    return 1;
}

/* Open the chain that the list at index 1 names; false: why is on the stack, as
 * results. */
static bool open_chain(lua_State *L, struct reading *reading)
{
    lua_Integer n = luaL_len(L, 1);

    luaL_argcheck(L, n >= 1 && n <= SM_SNAP_CHAIN_MAX, 1, "expected 1 to 16 paths");
    for (lua_Integer i = 1; i <= n; i++) {
        char why[240] = "";

        lua_geti(L, 1, i);
        const char *path = luaL_checkstring(L, -1);
        int err = open_next(reading, path, why, sizeof(why));
        if (err) {
            refuse(L, path, err, why);
            return false;
        }
    }
    return true;
}

/* flatten(paths, out, progress?) → true, or nil, what, errno: one snapshot, in the empty
 * file `out`, of a chain that begins with one that is no diff */
int sm_lua_snapshot_flatten(lua_State *L)
{
    luaL_checktype(L, 1, LUA_TTABLE);
    const char *out = luaL_checkstring(L, 2);
    struct telling t;
    struct sm_snap_progress *progress = told(L, 3, &t);
    struct reading *reading = new_reading(L);
    char why[240] = "";

    if (!open_chain(L, reading)) {
        return 3;
    }
    reading->fd = open(out, O_WRONLY | O_CLOEXEC);
    int err = reading->fd < 0 ? -errno
                              : sm_snap_flatten(reading->snaps, reading->count, reading->fd,
                                                progress, why, sizeof(why));
    close_all(reading);
    if (err) {
        return refuse(L, out, err, why);
    }
    lua_pushboolean(L, true);
    return 1;
}

/* working_set(paths, touched, out) → true, or nil, what, errno: the pages that a copy of
 * the last one of a chain has touched (the command snapshot.touched), in the empty file
 * `out` */
int sm_lua_working_set(lua_State *L)
{
    luaL_checktype(L, 1, LUA_TTABLE);
    size_t len;
    const char *touched = luaL_checklstring(L, 2, &len);
    const char *out = luaL_checkstring(L, 3);
    luaL_argcheck(L, len % sizeof(struct sm_working_range) == 0 &&
                         len / sizeof(struct sm_working_range) <= SM_WORKING_SET_RANGES,
                  2, "expected what snapshot.touched gives");
    struct reading *reading = new_reading(L);

    if (!open_chain(L, reading)) {
        return 3;
    }
    struct sm_working_range *ranges = lua_newuserdatauv(L, len + 1, 0); /* aligned */
    memcpy(ranges, touched, len);
    reading->fd = open(out, O_WRONLY | O_CLOEXEC);
    int err = reading->fd < 0 ? -errno
                              : sm_working_set_write(reading->snaps, reading->count, ranges,
                                                     (unsigned)(len / sizeof(*ranges)), reading->fd);
    close_all(reading);
    if (err) {
        return refuse(L, out, err, "");
    }
    lua_pushboolean(L, true);
    return 1;
}

/* working_set_verify(path) → true, or nil, what, errno */
int sm_lua_working_set_verify(lua_State *L)
{
    const char *path = luaL_checkstring(L, 1);
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct sm_working_set *set = NULL;
    int err = fd < 0 ? -errno : sm_working_set_open(fd, &set);

    if (!err) {
        err = sm_working_set_verify(set);
    }
    sm_working_set_close(set);
    if (err) {
        return refuse(L, path, err, err == -EBADMSG ? "damaged" : "");
    }
    lua_pushboolean(L, true);
    return 1;
}
