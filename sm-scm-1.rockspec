-- SPDX-License-Identifier: Apache-2.0
rockspec_format = "3.0"
package = "sm"
version = "scm-1"
source = { url = "git+file://." }
description = {
    summary = "A Lua-scriptable VMM toolkit: OCI images as KVM microVMs",
    license = "Apache-2.0",
}
supported_platforms = { "linux" }
dependencies = { "lua >= 5.4, < 5.5", "luv >= 1.44", "lua-cjson >= 2.1" }
build = {
    type = "make",
    build_variables = {
        CC = "$(CC)",
        CFLAGS = "$(CFLAGS)",
        LUA_CFLAGS = "-I$(LUA_INCDIR)",
    },
    install_variables = {
        PREFIX = "$(PREFIX)",
        BINDIR = "$(BINDIR)",
        LUADIR = "$(LUADIR)",
        CMODDIR = "$(LIBDIR)",
        -- The programs go where the modules go: that is all a rock deploys.
        LIBEXECDIR = "$(LIBDIR)/sm",
    },
}
