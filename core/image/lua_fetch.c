/* SPDX-License-Identifier: Apache-2.0 */
#include "lua_image.h"
int lua_image_open_fetch(lua_State *L)
{
    (void)L;
    return 0;
}
