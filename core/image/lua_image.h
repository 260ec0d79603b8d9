/* SPDX-License-Identifier: Apache-2.0 */
/* Shared by the files that make up the Lua module sm.image_core. */
#ifndef SM_LUA_IMAGE_H
#define SM_LUA_IMAGE_H

#include <lua.h>
#include <lauxlib.h>

#include "image.h"

#define LUA_IMAGE_JOB "sm.image_job"
#define LUA_IMAGE_FETCHER "sm.image_fetcher"

/* Raises unless arg is a table whose keys are all in the NULL-terminated list. */
void lua_image_check_table(lua_State *L, int arg, const char *const *keys);

/* Fields of the table at arg; the string stays borrowed from the table. */
const char *lua_image_string(lua_State *L, int arg, const char *key, bool required);
int64_t lua_image_integer(lua_State *L, int arg, const char *key, int64_t fallback,
                          int64_t min, int64_t max);
bool lua_image_boolean(lua_State *L, int arg, const char *key);

/* nil, text, errno */
int lua_image_fail(lua_State *L, const char *text, int err);

int lua_image_open_fetch(lua_State *L); /* adds `fetcher` to the table on top */
int lua_image_open_jobs(lua_State *L);  /* adds ingest, merge, digest, sha256 */

#endif
