/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the loop of the product layer (luv) lacks, or does in a way that takes
 * something from a host program: descriptors here, sockets in which a peer that
 * hung up is an error and never a SIGPIPE.
 */
#include "lua_core.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static int check_fd(lua_State *L, int arg)
{
    lua_Integer fd = luaL_checkinteger(L, arg);
    luaL_argcheck(L, fd >= 0 && fd <= 0x7fffffff, arg, "not a descriptor");
    return (int)fd;
}

static int refuse_errno(lua_State *L, int err)
{
    return sm_lua_refuse(L, err == EAGAIN || err == EWOULDBLOCK ? "again" : strerror(err), -err);
}

/* redirect(fd, target): target becomes a duplicate of fd, without close-on-exec
 * when it is a standard stream */
static int posix_redirect(lua_State *L)
{
    int fd = check_fd(L, 1), target = check_fd(L, 2);
    int done = target <= 2 ? dup2(fd, target) : dup3(fd, target, O_CLOEXEC);
    if (done < 0) {
        return refuse_errno(L, errno);
    }
    lua_pushboolean(L, 1);
    return 1;
}

/* send(fd, bytes, from?) → how many of bytes[from…] a socket took; nil, what,
 * errno. Never waits ("again"), never raises SIGPIPE. */
static int posix_send(lua_State *L)
{
    size_t len;
    int fd = check_fd(L, 1);
    const char *bytes = luaL_checklstring(L, 2, &len);
    lua_Integer from = luaL_optinteger(L, 3, 1);
    luaL_argcheck(L, from >= 1 && (size_t)from <= len + 1, 3, "outside the string");
    ssize_t n;
    do {
        n = send(fd, bytes + from - 1, len - (size_t)from + 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    if (n < 0) {
        return refuse_errno(L, errno);
    }
    lua_pushinteger(L, n);
    return 1;
}

/* writable(fd) → a descriptor of the caller's that polls readable once fd takes
 * bytes or has failed: a loop need not poll fd itself, twice, for that */
static int posix_writable(lua_State *L)
{
    struct epoll_event event = { .events = EPOLLOUT };
    int fd = check_fd(L, 1), ep = epoll_create1(EPOLL_CLOEXEC);
    if (ep < 0) {
        return refuse_errno(L, errno);
    }
    if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &event) < 0) {
        int err = errno;
        close(ep);
        return refuse_errno(L, err);
    }
    lua_pushinteger(L, ep);
    return 1;
}

void sm_lua_add_posix(lua_State *L)
{
    static const luaL_Reg functions[] = {
        { "redirect", posix_redirect },
        { "send", posix_send },
        { "writable", posix_writable },
        { NULL, NULL },
    };
    luaL_setfuncs(L, functions, 0);
}
