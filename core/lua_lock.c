/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sm.core.lock: advisory locks between processes, for the image store.
 *
 *   lock(path [, {shared = boolean}]) -> lock | nil, "path: reason", errno
 *   lock:close()     lets go; also __close, and when collected
 *   lock:remove()    deletes the file, then lets go
 *
 * flock(2) on a file of its own: it belongs to the open descriptor, so two
 * holders in one process exclude each other as well, and the kernel lets go of
 * it when the process dies, however it dies. Never blocks: a lock somebody else
 * holds is EWOULDBLOCK, and waiting is the event loop's business.
 *
 * A holder may remove the file. Whoever opened it just before would then lock
 * a name that is gone, so the lock only counts while the path still leads to
 * the locked inode. Any thread with its own lua_State; no shared state.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <lauxlib.h>
#include <lua.h>

#define LOCK_TYPE "sm.lock"

/* A path that changes hands this often under us is somebody's mischief. */
#define MAX_RACES 100

struct lock {
    int fd;     /* -1 when closed */
    char *path; /* owned, NULL when closed */
};

int luaopen_sm_core_lock(lua_State *L);

static int fail(lua_State *L, const char *path, int err)
{
    lua_pushnil(L);
    lua_pushfstring(L, "%s: %s", path, err == EWOULDBLOCK ? "locked by another" : strerror(err));
    lua_pushinteger(L, err);
    return 3;
}

/* Opens and locks path; the descriptor, or -errno. -EAGAIN: look again. */
static int take(const char *path, int operation)
{
    struct stat held, named;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    int err;

    if (fd < 0)
        return -errno;
    if (flock(fd, operation | LOCK_NB) < 0) {
        err = errno;
    } else if (fstat(fd, &held) < 0) {
        err = errno;
    } else if (stat(path, &named) == 0 && held.st_ino == named.st_ino &&
               held.st_dev == named.st_dev) {
        return fd;
    } else {
        close(fd);
        return -ESTALE;
    }
    close(fd);
    return -err;
}

static int lock_new(lua_State *L)
{
    const char *path = luaL_checkstring(L, 1);
    int operation = LOCK_EX, fd = -ESTALE;
    struct lock *lock;

    if (!lua_isnoneornil(L, 2)) {
        luaL_checktype(L, 2, LUA_TTABLE);
        lua_getfield(L, 2, "shared");
        operation = lua_toboolean(L, -1) ? LOCK_SH : LOCK_EX;
        lua_pop(L, 1);
    }
    lock = lua_newuserdatauv(L, sizeof(*lock), 0);
    lock->fd = -1;
    lock->path = NULL;
    luaL_setmetatable(L, LOCK_TYPE);
    lock->path = strdup(path);
    if (!lock->path)
        return fail(L, path, ENOMEM);
    for (int i = 0; fd == -ESTALE && i < MAX_RACES; i++)
        fd = take(path, operation);
    if (fd < 0)
        return fail(L, path, -fd);
    lock->fd = fd;
    return 1;
}

static int lock_close(lua_State *L)
{
    struct lock *lock = luaL_checkudata(L, 1, LOCK_TYPE);

    if (lock->fd >= 0)
        close(lock->fd);
    lock->fd = -1;
    free(lock->path);
    lock->path = NULL;
    return 0;
}

static int lock_remove(lua_State *L)
{
    struct lock *lock = luaL_checkudata(L, 1, LOCK_TYPE);

    if (lock->fd < 0)
        return luaL_error(L, "attempt to use a closed lock");
    unlink(lock->path);
    return lock_close(L);
}

static int lock_tostring(lua_State *L)
{
    struct lock *lock = luaL_checkudata(L, 1, LOCK_TYPE);

    lua_pushfstring(L, "lock (%s)", lock->fd < 0 ? "closed" : lock->path);
    return 1;
}

static const luaL_Reg methods[] = {
    { "close", lock_close },
    { "remove", lock_remove },
    { NULL, NULL },
};

static const luaL_Reg meta[] = {
    { "__gc", lock_close },
    { "__close", lock_close },
    { "__tostring", lock_tostring },
    { NULL, NULL },
};

/* Returns the function `lock`; sm.core calls it and keeps it as a field. */
__attribute__((visibility("default"))) int luaopen_sm_core_lock(lua_State *L)
{
    luaL_newmetatable(L, LOCK_TYPE);
    luaL_setfuncs(L, meta, 0);
    luaL_newlib(L, methods);
    lua_setfield(L, -2, "__index");
    lua_pop(L, 1);
    lua_pushcfunction(L, lock_new);
    return 1;
}
