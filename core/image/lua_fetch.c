/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fetcher of sm.image_core. fetch.h has the rules of a transfer.
 *
 * core.fetcher{ parallel=4, user_agent="sm" } -> f
 *   parallel bounds the transfers into files; those into memory never wait.
 * f:submit{ url=, method=, headers={"Name: value", ...}, body=,
 *           cafile=, certfile=, keyfile=, insecure=, low_speed=seconds | {bytes=1024, seconds=30},
 *           connect_timeout=15, timeout=,        seconds; no timeout by default
 *           limit_bytes=4 MiB,                   a body in memory
 *           file=, offset=0, size=, digest= }    a body in a file
 *   -> id | nil, err, errno
 * f:next() -> result | nil     never blocks
 *   { id=, status=, headers={{name, value}, ...}, body=, bytes=, digest=,
 *     file=true when the body went to the file,
 *     error=, transient=true when trying again may help, curl_code= }
 *   Without `error` the exchange is complete and all that was asked to be
 *   verified is; `status` is still whatever the server answered. `bytes` of a
 *   failed file is what a resume may give as offset.
 * f:progress(id) -> now, total (0: unknown) | nil    f:cancel(id) -> boolean
 * f:pending() -> requests without a collected result
 * f:pollfd() :events() :timeout()      readable while there are results
 * f:close()                            cancels all, joins the thread
 */
#include "lua_image.h"

#include <errno.h>
#include <string.h>

#include "fetch.h"

struct box {
    struct sm_fetcher *f;            /* NULL when closed */
    struct sm_fetch_result *current; /* being turned into a table */
};

static struct box *check_fetcher(lua_State *L)
{
    struct box *b = luaL_checkudata(L, 1, LUA_IMAGE_FETCHER);

    if (!b->f)
        luaL_error(L, "attempt to use a closed fetcher");
    return b;
}

static int core_fetcher(lua_State *L)
{
    static const char *const keys[] = { "parallel", "user_agent", NULL };
    struct sm_image_error e = { "" };
    const char *user_agent = "sm";
    unsigned parallel = 4;
    struct box *b;
    int ret;

    if (!lua_isnoneornil(L, 1)) {
        lua_image_check_table(L, 1, keys);
        parallel = (unsigned)lua_image_integer(L, 1, "parallel", 4, 1, 64);
        user_agent = lua_image_string(L, 1, "user_agent", false);
        user_agent = user_agent ? user_agent : "sm";
    }
    luaL_argcheck(L, !strpbrk(user_agent, "\r\n"), 1, "field 'user_agent' has a line break");
    b = lua_newuserdatauv(L, sizeof(*b), 0);
    b->f = NULL;
    b->current = NULL;
    luaL_setmetatable(L, LUA_IMAGE_FETCHER);
    ret = sm_fetcher_open(&b->f, parallel, user_agent, &e);
    return ret < 0 ? lua_image_fail(L, e.text, ret) : 1;
}

/* Seconds, whole or not, as milliseconds. */
static uint32_t milliseconds(lua_State *L, int arg, const char *key, double fallback)
{
    double s = fallback;
    int ok = 1;

    if (lua_getfield(L, arg, key) != LUA_TNIL) {
        s = lua_tonumberx(L, -1, &ok);
        if (!ok || !(s > 0 && s <= 1e6))
            luaL_argerror(L, arg, lua_pushfstring(L, "field '%s': seconds expected", key));
    }
    lua_pop(L, 1);
    return s > 0 && s < 0.001 ? 1 : (uint32_t)(s * 1000);
}

static void read_low_speed(lua_State *L, int arg, struct sm_fetch_spec *s)
{
    static const char *const keys[] = { "bytes", "seconds", NULL };
    int type = lua_getfield(L, arg, "low_speed"), at = lua_gettop(L);

    s->low_speed_bytes = 1024;
    s->low_speed_seconds = 30;
    if (type == LUA_TTABLE) {
        lua_image_check_table(L, at, keys);
        s->low_speed_bytes = (uint32_t)lua_image_integer(L, at, "bytes", 1024, 0, 1 << 30);
        s->low_speed_seconds = (uint32_t)lua_image_integer(L, at, "seconds", 30, 1, 86400);
    } else if (type != LUA_TNIL) {
        s->low_speed_seconds = (uint32_t)lua_image_integer(L, arg, "low_speed", 30, 1, 86400);
    }
    lua_pop(L, 1);
}

/* Leaves a userdata that holds the array on the stack. */
static void read_headers(lua_State *L, int arg, struct sm_fetch_spec *s)
{
    int type = lua_getfield(L, arg, "headers");
    const char **list;

    if (type != LUA_TNIL && type != LUA_TTABLE)
        luaL_argerror(L, arg, "field 'headers': a list of 'Name: value' expected");
    s->n_headers = type == LUA_TTABLE ? lua_rawlen(L, -1) : 0;
    luaL_argcheck(L, s->n_headers <= 256, arg, "field 'headers' has more than 256 entries");
    list = lua_newuserdatauv(L, (s->n_headers + 1) * sizeof(*list), 0);
    for (size_t i = 0; i < s->n_headers; i++) {
        size_t len;

        if (lua_rawgeti(L, -2, (lua_Integer)i + 1) != LUA_TSTRING)
            luaL_argerror(L, arg, "field 'headers': a list of 'Name: value' expected");
        list[i] = lua_tolstring(L, -1, &len);
        luaL_argcheck(L, strlen(list[i]) == len, arg, "a header contains a zero byte");
        lua_pop(L, 1);
    }
    s->headers = list;
    lua_remove(L, -2);
}

static void read_spec(lua_State *L, int arg, struct sm_fetch_spec *s)
{
    s->url = lua_image_string(L, arg, "url", true);
    s->method = lua_image_string(L, arg, "method", false);
    s->cafile = lua_image_string(L, arg, "cafile", false);
    s->certfile = lua_image_string(L, arg, "certfile", false);
    s->keyfile = lua_image_string(L, arg, "keyfile", false);
    s->insecure = lua_image_boolean(L, arg, "insecure");
    s->file = lua_image_string(L, arg, "file", false);
    s->digest = lua_image_string(L, arg, "digest", false);
    s->offset = (uint64_t)lua_image_integer(L, arg, "offset", 0, 0, INT64_MAX);
    s->limit_bytes = (uint64_t)lua_image_integer(L, arg, "limit_bytes", s->file ? 0 : 4 << 20, 0,
                                                 s->file ? INT64_MAX : 1ll << 31);
    s->size = (uint64_t)lua_image_integer(L, arg, "size", 0, 0, INT64_MAX);
    s->has_size = lua_getfield(L, arg, "size") != LUA_TNIL;
    lua_pop(L, 1);
    if (lua_getfield(L, arg, "body") == LUA_TSTRING)
        s->body = lua_tolstring(L, -1, &s->body_bytes);
    else if (!lua_isnil(L, -1))
        luaL_argerror(L, arg, "field 'body': string expected");
    lua_pop(L, 1);
    s->connect_timeout_ms = milliseconds(L, arg, "connect_timeout", 15);
    s->timeout_ms = milliseconds(L, arg, "timeout", 0);
    luaL_argcheck(L, s->file || !s->offset, arg, "field 'offset' needs 'file'");
    luaL_argcheck(L, !s->file || s->has_size || s->limit_bytes, arg,
                  "field 'file' needs 'size' or 'limit_bytes'");
    read_low_speed(L, arg, s);
    read_headers(L, arg, s);
}

static int fetcher_submit(lua_State *L)
{
    static const char *const keys[] = { "url", "method", "headers", "body", "cafile", "certfile",
                                        "keyfile", "insecure", "limit_bytes", "file", "offset",
                                        "size", "digest", "low_speed", "connect_timeout", "timeout", NULL };
    struct box *b = check_fetcher(L);
    struct sm_fetch_spec s = { 0 };
    struct sm_image_error e = { "" };
    uint64_t id;
    int ret;

    lua_image_check_table(L, 2, keys);
    read_spec(L, 2, &s);
    ret = sm_fetcher_submit(b->f, &s, &id, &e);
    if (ret < 0)
        return lua_image_fail(L, e.text, ret);
    lua_pushinteger(L, (lua_Integer)id);
    return 1;
}

static void push_headers(lua_State *L, const struct sm_fetch_result *r)
{
    lua_createtable(L, (int)r->n_headers, 0);
    for (size_t i = 0; i < r->n_headers; i++) {
        lua_createtable(L, 2, 0);
        lua_pushstring(L, r->headers[i].name);
        lua_rawseti(L, -2, 1);
        lua_pushstring(L, r->headers[i].value);
        lua_rawseti(L, -2, 2);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
}

static void push_result(lua_State *L, const struct sm_fetch_result *r)
{
    lua_createtable(L, 0, 10);
    lua_pushinteger(L, (lua_Integer)r->id);
    lua_setfield(L, -2, "id");
    lua_pushinteger(L, r->status);
    lua_setfield(L, -2, "status");
    push_headers(L, r);
    lua_setfield(L, -2, "headers");
    if (!r->to_file) {
        lua_pushlstring(L, r->body ? (const char *)r->body : "", r->body_bytes);
        lua_setfield(L, -2, "body");
    }
    lua_pushboolean(L, r->to_file);
    lua_setfield(L, -2, "file");
    lua_pushinteger(L, (lua_Integer)r->bytes);
    lua_setfield(L, -2, "bytes");
    if (r->digest[0]) {
        lua_pushstring(L, r->digest);
        lua_setfield(L, -2, "digest");
    }
    if (r->error.text[0]) {
        lua_pushstring(L, r->error.text);
        lua_setfield(L, -2, "error");
        lua_pushboolean(L, r->transient);
        lua_setfield(L, -2, "transient");
    }
    lua_pushinteger(L, r->curl_code);
    lua_setfield(L, -2, "curl_code");
}

static int fetcher_next(lua_State *L)
{
    struct box *b = check_fetcher(L);

    /* Held by the box while tables are made, for that may raise. */
    sm_fetch_result_free(b->current);
    b->current = sm_fetcher_next(b->f);
    if (!b->current) {
        lua_pushnil(L);
        return 1;
    }
    push_result(L, b->current);
    sm_fetch_result_free(b->current);
    b->current = NULL;
    return 1;
}

static int fetcher_progress(lua_State *L)
{
    struct box *b = check_fetcher(L);
    uint64_t now, total;

    if (!sm_fetcher_progress(b->f, (uint64_t)luaL_checkinteger(L, 2), &now, &total)) {
        lua_pushnil(L);
        return 1;
    }
    lua_pushinteger(L, (lua_Integer)now);
    lua_pushinteger(L, (lua_Integer)total);
    return 2;
}

static int fetcher_cancel(lua_State *L)
{
    struct box *b = check_fetcher(L);

    lua_pushboolean(L, sm_fetcher_cancel(b->f, (uint64_t)luaL_checkinteger(L, 2)));
    return 1;
}

static int fetcher_pending(lua_State *L)
{
    lua_pushinteger(L, (lua_Integer)sm_fetcher_pending(check_fetcher(L)->f));
    return 1;
}

static int fetcher_pollfd(lua_State *L)
{
    lua_pushinteger(L, sm_fetcher_fd(check_fetcher(L)->f));
    return 1;
}

static int fetcher_events(lua_State *L)
{
    check_fetcher(L);
    lua_pushliteral(L, "r");
    return 1;
}

static int fetcher_timeout(lua_State *L)
{
    check_fetcher(L);
    lua_pushnil(L);
    return 1;
}

static int fetcher_close(lua_State *L)
{
    struct box *b = luaL_checkudata(L, 1, LUA_IMAGE_FETCHER);

    if (b->f)
        sm_fetcher_close(b->f);
    b->f = NULL;
    sm_fetch_result_free(b->current);
    b->current = NULL;
    return 0;
}

static int fetcher_tostring(lua_State *L)
{
    struct box *b = luaL_checkudata(L, 1, LUA_IMAGE_FETCHER);

    if (b->f)
        lua_pushfstring(L, "fetcher (%p)", (void *)b);
    else
        lua_pushliteral(L, "fetcher (closed)");
    return 1;
}

static const luaL_Reg methods[] = {
    { "submit", fetcher_submit },   { "next", fetcher_next },
    { "progress", fetcher_progress }, { "cancel", fetcher_cancel },
    { "pending", fetcher_pending }, { "pollfd", fetcher_pollfd },
    { "events", fetcher_events },   { "timeout", fetcher_timeout },
    { "close", fetcher_close },     { NULL, NULL },
};

static const luaL_Reg meta[] = {
    { "__gc", fetcher_close },
    { "__close", fetcher_close },
    { "__tostring", fetcher_tostring },
    { NULL, NULL },
};

int lua_image_open_fetch(lua_State *L)
{
    luaL_newmetatable(L, LUA_IMAGE_FETCHER);
    luaL_setfuncs(L, meta, 0);
    luaL_newlib(L, methods);
    lua_setfield(L, -2, "__index");
    lua_pop(L, 1);
    lua_pushcfunction(L, core_fetcher);
    lua_setfield(L, -2, "fetcher");
    return 0;
}
