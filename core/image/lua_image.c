/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The Lua module sm.image_core: the byte side of images. Policy (registries,
 * credentials, stores, retries) is Lua's; nothing here decides where to go.
 *
 * core.fetcher{parallel=4, user_agent=} -> f            lua_fetch.c
 *   f:submit{...} -> id            f:next() -> result or nil (never blocks)
 *   f:progress(id) -> now, total   f:cancel(id)   f:close()
 *
 * core.ingest{blob=, out=, diff_id=, media=, limits={bytes=, entries=,
 *             xattr_bytes=, depth=, ratio=}} -> job      lua_jobs.c
 *   writes out/data and out/index; result: {diff_id, format, tar_bytes,
 *   data_bytes, inodes, entries, ignored}. media is not believed, only taken.
 * core.merge{layers={dir, ...}, out=path, limits=} -> result  (blocks)
 *   lowest layer first; result: {bytes, size, inodes,
 *   extents={{path=, offset=0, length=}, ...}}, the parts of the device in
 *   order (meta first, empty data left out); bytes is meta's, size the device's.
 * core.digest{file=, algorithm="sha256"|"sha512"} -> job, result {digest=}
 * core.unpack_archive{file=path or "-", out=, limits=} -> job  archive.h
 *   a list of {name=, link=} or {name=, digest=, size=, path=}, as in the tar
 * core.pack_folder{dir=, out=} -> job, result {digest=, size=, entries=, skipped=}
 * core.sha256(bytes | {file=}) -> "sha256:..."           (blocks)
 * core.valid_digest(text) -> boolean
 * core.unpack_kernel(bzimage, out) -> true               (blocks)
 *
 * ingest, merge and digest take async=: ingest and digest are jobs by default,
 * merge is one with async=true. A job:
 *   job:pollfd() :events() :timeout()   waitable; readable once it has ended
 *   job:done() -> boolean               job:progress() -> now, total
 *   job:result() -> table | nil, err, errno   waits for the end if need be
 *   job:cancel()   job:close()          close cancels and joins
 *
 * What the world refuses is nil, "what: reason", errno; misuse raises. A config
 * table with an unknown key is misuse. One lua_State, one thread; every object
 * may be closed at any time and is when collected.
 */
#include "lua_image.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "digest.h"

#if defined(__has_include)
#if __has_include("unpack_kernel.h")
#include "unpack_kernel.h"
#define HAVE_UNPACK_KERNEL 1
#endif
#endif

void lua_image_check_table(lua_State *L, int arg, const char *const *keys)
{
    luaL_checktype(L, arg, LUA_TTABLE);
    lua_pushnil(L);
    while (lua_next(L, arg)) {
        const char *const *k = keys;

        lua_pop(L, 1);
        if (lua_type(L, -1) != LUA_TSTRING)
            luaL_argerror(L, arg, "a table of named fields expected");
        while (*k && strcmp(*k, lua_tostring(L, -1)))
            k++;
        if (!*k)
            luaL_argerror(L, arg,
                          lua_pushfstring(L, "unknown field '%s'", lua_tostring(L, -1)));
    }
}

const char *lua_image_string(lua_State *L, int arg, const char *key, bool required)
{
    const char *s = NULL;
    size_t len = 0;
    int type = lua_getfield(L, arg, key);

    if (type == LUA_TSTRING)
        s = lua_tolstring(L, -1, &len);
    else if (type != LUA_TNIL || required)
        luaL_argerror(L, arg, lua_pushfstring(L, "field '%s': string expected", key));
    if (s && strlen(s) != len)
        luaL_argerror(L, arg, lua_pushfstring(L, "field '%s' contains a zero byte", key));
    lua_pop(L, 1);
    return s;
}

int64_t lua_image_integer(lua_State *L, int arg, const char *key, int64_t fallback,
                          int64_t min, int64_t max)
{
    int64_t v = fallback;
    int ok = 1;

    if (lua_getfield(L, arg, key) != LUA_TNIL) {
        v = lua_tointegerx(L, -1, &ok);
        if (!ok || v < min || v > max)
            luaL_argerror(L, arg,
                          lua_pushfstring(L, "field '%s': integer from %I to %I expected", key,
                                          (LUAI_UACINT)min, (LUAI_UACINT)max));
    }
    lua_pop(L, 1);
    return v;
}

bool lua_image_boolean(lua_State *L, int arg, const char *key)
{
    int type = lua_getfield(L, arg, key);
    bool v = lua_toboolean(L, -1);

    if (type != LUA_TNIL && type != LUA_TBOOLEAN)
        luaL_argerror(L, arg, lua_pushfstring(L, "field '%s': boolean expected", key));
    lua_pop(L, 1);
    return v;
}

int lua_image_fail(lua_State *L, const char *text, int err)
{
    lua_pushnil(L);
    lua_pushstring(L, text);
    lua_pushinteger(L, err < 0 ? -err : err);
    return 3;
}

static int hash_bytes(const void *data, size_t len, char text[SM_DIGEST_TEXT])
{
    struct sm_digest d;
    int ret = sm_digest_open(&d, SM_DIGEST_SHA256);

    if (ret < 0)
        return ret;
    ret = sm_digest_update(&d, data, len);
    if (ret == 0)
        ret = sm_digest_text(&d, text);
    sm_digest_close(&d);
    return ret;
}

static int core_sha256(lua_State *L)
{
    static const char *const keys[] = { "file", NULL };
    struct sm_image_error e = { "hashing failed" };
    char text[SM_DIGEST_TEXT];
    int ret;

    if (lua_type(L, 1) == LUA_TSTRING) {
        size_t len;
        const char *s = lua_tolstring(L, 1, &len);

        ret = hash_bytes(s, len, text);
    } else {
        lua_image_check_table(L, 1, keys);
        ret = sm_digest_file(lua_image_string(L, 1, "file", true), SM_DIGEST_SHA256, text, NULL,
                             &e);
    }
    if (ret < 0)
        return lua_image_fail(L, e.text, ret);
    lua_pushstring(L, text);
    return 1;
}

static int core_valid_digest(lua_State *L)
{
    size_t len;
    const char *s = luaL_checklstring(L, 1, &len);

    lua_pushboolean(L, strlen(s) == len && sm_digest_parse(s) != SM_DIGEST_NONE);
    return 1;
}

#ifdef HAVE_UNPACK_KERNEL
static int core_unpack_kernel(lua_State *L)
{
    const char *in = luaL_checkstring(L, 1), *out = luaL_checkstring(L, 2);
    char err[512] = "unpacking the kernel failed";
    int ret = sm_unpack_kernel(in, out, err, sizeof(err));

    if (ret < 0)
        return lua_image_fail(L, err, ret);
    lua_pushboolean(L, 1);
    return 1;
}
#endif

static const luaL_Reg functions[] = {
    { "sha256", core_sha256 },
    { "valid_digest", core_valid_digest },
#ifdef HAVE_UNPACK_KERNEL
    { "unpack_kernel", core_unpack_kernel },
#endif
    { NULL, NULL },
};

LUAMOD_API int luaopen_sm_image_core(lua_State *L);

__attribute__((visibility("default"))) int luaopen_sm_image_core(lua_State *L)
{
    luaL_newlib(L, functions);
    lua_image_open_jobs(L);
    lua_image_open_fetch(L);
    return 1;
}
