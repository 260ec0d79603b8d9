/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The `sm` executable: a Lua interpreter with our modules on its path.
 *
 * Everything a user can do is Lua (lua/sm/cli.lua); this file only finds the
 * Lua files and C modules next to itself, in the source tree or below a
 * prefix, and hands over. SM_LUA overrides where, for a tree that was moved.
 *
 *   source tree   <dir>/sm, <dir>/lua/?.lua, <dir>/build/?.so
 *   installed     <prefix>/bin/sm, <prefix>/share/lua/5.4/?.lua, <prefix>/lib/lua/5.4/?.so
 */
#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>

#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef __APPLE__
#include <mach-o/dyld.h>
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

static void set_paths(lua_State *L, const char *dir)
{
    char probe[PATH_MAX + 32];
    const char *lua, *c;

    snprintf(probe, sizeof(probe), "%s/lua/sm/cli.lua", dir);
    if (access(probe, R_OK) == 0) {
        lua = lua_pushfstring(L, "%s/lua/?.lua;%s/lua/?/init.lua", dir, dir);
        c = lua_pushfstring(L, "%s/build/?.so", dir);
    } else {
        lua = lua_pushfstring(L, "%s/../share/lua/5.4/?.lua;%s/../share/lua/5.4/?/init.lua",
                              dir, dir);
        c = lua_pushfstring(L, "%s/../lib/lua/5.4/?.so", dir);
    }
    prepend(L, "path", lua);
    prepend(L, "cpath", c);
    lua_pop(L, 2);
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
