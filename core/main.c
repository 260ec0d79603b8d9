/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The `sm` executable: a Lua interpreter with our modules on its path.
 *
 * Everything a user can do is Lua (lua/sm/cli.lua); this file only finds the
 * Lua files and C modules next to itself, in the source tree or below a
 * prefix, and hands over.
 *
 *                 source tree              installed
 *   executable    <dir>/sm                 <prefix>/bin/sm
 *   modules       <dir>/lua/?.lua          <prefix>/share/lua/5.4/?.lua
 *   C modules     <dir>/build/?.so         <prefix>/lib/lua/5.4/?.so
 *   compiled      <dir>/build/luac/?.luac  <prefix>/libexec/sm/luac/?.luac
 *
 * Most of what a short command costs is reading Lua, so a module is taken compiled where
 * there is such a file (scripts/compile-lua) that says it comes from the very source
 * that require() would read, and has its time. The source is what counts: once it is
 * edited, it is read again.
 */
#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>

#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef __APPLE__
#include <mach-o/dyld.h>
#define st_mtim st_mtimespec
#endif

/* The directory this executable lies in, without a trailing slash. */
static int executable_dir(char *dir, size_t len)
{
    char path[PATH_MAX];
    char *slash;
#ifdef __APPLE__
    uint32_t size = sizeof(path);

    if (_NSGetExecutablePath(path, &size) != 0)
        return -1;
#else
    ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 1);

    if (n < 0)
        return -1;
    path[n] = '\0';
#endif
    slash = strrchr(path, '/');
    if (!slash)
        return -1;
    *slash = '\0';
    return snprintf(dir, len, "%s", path) < (int)len ? 0 : -1;
}

static void prepend(lua_State *L, const char *field, const char *value)
{
    lua_getglobal(L, "package");
    lua_getfield(L, -1, field);
    lua_pushfstring(L, "%s;%s", value, lua_tostring(L, -1));
    lua_setfield(L, -3, field);
    lua_pop(L, 2);
}

static int same_time(const char *a, const char *b)
{
    struct stat sa, sb;

    return stat(a, &sa) == 0 && stat(b, &sb) == 0 &&
           sa.st_mtim.tv_sec == sb.st_mtim.tv_sec &&
           sa.st_mtim.tv_nsec == sb.st_mtim.tv_nsec;
}

/* One of package.searchers. Upvalue: the folder of the compiled modules. What has no
 * compiled form costs one look for it. */
static int search_compiled(lua_State *L)
{
    const char *file = luaL_gsub(L, luaL_checkstring(L, 1), ".", "/"), *source, *compiled;
    lua_Debug info;

    compiled = lua_pushfstring(L, "%s/%s.luac", lua_tostring(L, lua_upvalueindex(1)), file);
    if (access(compiled, R_OK) != 0)
        return 0;
    lua_getglobal(L, "package");
    lua_getfield(L, -1, "searchpath");
    lua_pushvalue(L, 1);
    lua_getfield(L, -3, "path");
    lua_call(L, 2, 1);
    source = lua_tostring(L, -1);
    if (!source || !same_time(source, compiled) || luaL_loadfilex(L, compiled, "b") != LUA_OK)
        return 0;
    lua_pushvalue(L, -1);
    lua_getinfo(L, ">S", &info);
    if (info.source[0] != '@' || strcmp(info.source + 1, source) != 0)
        return 0;
    lua_pushstring(L, source);
    return 2;
}

static void set_paths(lua_State *L, const char *dir)
{
    char probe[PATH_MAX + 32];
    const char *modules, *c, *compiled;

    snprintf(probe, sizeof(probe), "%s/lua/sm/cli.lua", dir);
    if (access(probe, R_OK) == 0) {
        modules = lua_pushfstring(L, "%s/lua/?.lua;%s/lua/?/init.lua", dir, dir);
        c = lua_pushfstring(L, "%s/build/?.so", dir);
        compiled = lua_pushfstring(L, "%s/build/luac", dir);
    } else {
        modules = lua_pushfstring(L, "%s/../share/lua/5.4/?.lua;%s/../share/lua/5.4/?/init.lua",
                                  dir, dir);
        c = lua_pushfstring(L, "%s/../lib/lua/5.4/?.so", dir);
        compiled = lua_pushfstring(L, "%s/../libexec/sm/luac", dir);
    }
    prepend(L, "path", modules);
    prepend(L, "cpath", c);

    /* Before the searcher that reads sources, after package.preload. */
    lua_getglobal(L, "package");
    lua_getfield(L, -1, "searchers");
    for (lua_Integer i = luaL_len(L, -1); i >= 2; i--) {
        lua_geti(L, -1, i);
        lua_seti(L, -2, i + 1);
    }
    lua_pushstring(L, compiled);
    lua_pushcclosure(L, search_compiled, 1);
    lua_seti(L, -2, 2);
    lua_settop(L, 0);
}

static int traceback(lua_State *L)
{
    const char *msg = lua_tostring(L, 1);

    if (!msg)
        msg = luaL_tolstring(L, 1, NULL);
    luaL_traceback(L, L, msg, 1);
    return 1;
}

int main(int argc, char **argv)
{
    char dir[PATH_MAX];
    lua_State *L;
    int status;

    /* A peer that hung up is an error code to us, not an end. */
    signal(SIGPIPE, SIG_IGN);
    if (executable_dir(dir, sizeof(dir)) < 0) {
        fprintf(stderr, "sm: cannot find my own path; is /proc mounted?\n");
        return 125;
    }
    L = luaL_newstate();
    if (!L) {
        fprintf(stderr, "sm: out of memory\n");
        return 125;
    }
    luaL_openlibs(L);
    set_paths(L, dir);
    lua_pushcfunction(L, traceback);
    lua_getglobal(L, "require");
    lua_pushstring(L, "sm.cli");
    status = lua_pcall(L, 1, 1, 1);
    if (status == LUA_OK) {
        lua_getfield(L, -1, "main");
        lua_createtable(L, argc, 0);
        for (int i = 0; i < argc; i++) {
            lua_pushstring(L, argv[i]);
            lua_rawseti(L, -2, i);
        }
        status = lua_pcall(L, 1, 1, 1);
    }
    if (status != LUA_OK) {
        fprintf(stderr, "sm: %s\n", lua_tostring(L, -1));
        status = 125;
    } else {
        status = (int)lua_tointeger(L, -1);
    }
    lua_close(L);
    return status;
}
