/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Child processes without a signal handler.
 *
 * libuv learns of a child's end by a SIGCHLD handler of its own, which takes the
 * place of the host program's. Here its end is an event on a pidfd (Linux 5.4).
 * The host still gets SIGCHLD, as for any child; should it wait for all children
 * and take ours, we know that it ended and not how. The child begins with
 * default signals, an empty mask and the descriptors it is given; all others of
 * ours are close-on-exec.
 *
 * Threads: any. Between clone and exec the child is a copy with one thread, and
 * calls only what is safe in one. Guest memory is not copied (MADV_DONTFORK).
 */
#include "lua_core.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h> /* CLONE_PIDFD */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef P_PIDFD
#define P_PIDFD 3
#endif

#define FDS_MAX 16
#define ARGS_MAX 4096
#define FIRST_SPARE_FD 64        /* above every target */

struct spawn {
    const char *path;
    char **argv;
    int fds[FDS_MAX]; /* for descriptor i; -1: /dev/null below 3, else closed */
    int count;
    bool detached;
};

static void default_signals(void)
{
    struct sigaction act;
    memset(&act, 0, sizeof(act));
    act.sa_handler = SIG_DFL;
    for (int i = 1; i < NSIG; i++) {
        sigaction(i, &act, NULL); /* fails for some; those cannot be set */
    }
}

/* First out of each other's way, then to their places. */
static int place_fds(struct spawn *s)
{
    for (int i = 0; i < s->count; i++) {
        int fd = s->fds[i] >= 0 ? s->fds[i] : -1;
        if (fd < 0 && i < 3) {
            fd = open("/dev/null", O_RDWR | O_CLOEXEC);
        } else if (fd < 0) {
            continue;
        }
        s->fds[i] = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, FIRST_SPARE_FD);
        if (s->fds[i] < 0) {
            return errno;
        }
    }
    for (int i = 0; i < s->count; i++) {
        if (s->fds[i] >= 0 && dup2(s->fds[i], i) < 0) {
            return errno;
        }
    }
    return 0;
}

_Noreturn static void child_main(struct spawn *s, int report)
{
    sigset_t none;
    int err;

    default_signals();
    err = place_fds(s);
    if (!err && s->detached && setsid() < 0) {
        err = errno;
    }
    if (!err) {
        sigemptyset(&none);
        pthread_sigmask(SIG_SETMASK, &none, NULL);
        execvp(s->path, s->argv);
        err = errno;
    }
    if (write(report, &err, sizeof(err)) < 0) {
        _exit(126);
    }
    _exit(127);
}

/* What the child could not do, 0 once it has become the program. */
static int read_report(int fd)
{
    int err = 0;
    ssize_t n;
    do {
        n = read(fd, &err, sizeof(err));
    } while (n < 0 && errno == EINTR);
    return n == (ssize_t)sizeof(err) ? err : 0;
}

/* pid and pidfd, or -errno */
static int spawn(struct spawn *s, int *pidfd)
{
    sigset_t all, before;
    int report[2], err;

    if (pipe2(report, O_CLOEXEC) < 0) {
        return -errno;
    }
    /* No handler of the host's may run in the child. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    /* Not fork(): a pidfd at once, and none of the host's atfork handlers. */
    int pid = (int)syscall(SYS_clone, (unsigned long)(CLONE_PIDFD | SIGCHLD), NULL, pidfd, 0, 0);
    if (pid == 0) {
        child_main(s, report[1]);
    }
    err = pid < 0 ? errno : 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    close(report[1]);
    if (!err) {
        err = read_report(report[0]);
        if (err) {
            siginfo_t info;
            waitid(P_PIDFD, (id_t)*pidfd, &info, WEXITED | __WALL);
            close(*pidfd);
        }
    }
    close(report[0]);
    return err ? -err : pid;
}

/* ---- spawn(path, args, fds, detached?) ---- */

static int read_fds(lua_State *L, int idx, struct spawn *s)
{
    lua_Integer count = luaL_len(L, idx);
    lua_getfield(L, idx, "n");
    if (lua_isinteger(L, -1)) {
        count = lua_tointeger(L, -1);
    }
    lua_pop(L, 1);
    luaL_argcheck(L, count >= 0 && count <= FDS_MAX, idx, "too many descriptors");
    s->count = count < 3 ? 3 : (int)count;
    for (int i = 0; i < s->count; i++) {
        lua_rawgeti(L, idx, i + 1);
        s->fds[i] = lua_isinteger(L, -1) ? (int)lua_tointeger(L, -1) : -1;
        lua_pop(L, 1);
    }
    return 0;
}

/* spawn(path, args, fds, detached?) → pid, pidfd; nil, what, errno. fds[1] is to
 * be descriptor 0, and so on (fds.n of them, holes allowed); detached: in a
 * session of its own. */
static int posix_spawn_(lua_State *L)
{
    struct spawn s = { .path = luaL_checkstring(L, 1), .detached = lua_toboolean(L, 4) };
    int pidfd = -1;

    luaL_checktype(L, 2, LUA_TTABLE);
    luaL_checktype(L, 3, LUA_TTABLE);
    lua_Integer n = luaL_len(L, 2);
    luaL_argcheck(L, n >= 0 && n <= ARGS_MAX, 2, "too many arguments");
    read_fds(L, 3, &s);
    s.argv = lua_newuserdatauv(L, ((size_t)n + 2) * sizeof(char *), 1);
    s.argv[0] = (char *)s.path;
    for (lua_Integer i = 1; i <= n; i++) {
        lua_rawgeti(L, 2, i); /* stays in the table while we use it */
        luaL_argcheck(L, lua_type(L, -1) == LUA_TSTRING, 2, "expected a list of strings");
        s.argv[i] = (char *)lua_tostring(L, -1);
        lua_pop(L, 1);
    }
    s.argv[n + 1] = NULL;
    int pid = spawn(&s, &pidfd);
    if (pid < 0) {
        return sm_lua_refuse(L, strerror(-pid), pid);
    }
    lua_pushinteger(L, pid);
    lua_pushinteger(L, pidfd);
    return 2;
}

/* reap(pidfd) → exit code, signal (0: none); nil, "again" while it runs; nil and
 * ECHILD when somebody else took the status */
static int posix_reap(lua_State *L)
{
    siginfo_t info;
    memset(&info, 0, sizeof(info));
    if (waitid(P_PIDFD, (id_t)luaL_checkinteger(L, 1), &info, WEXITED | WNOHANG | __WALL) < 0) {
        return sm_lua_refuse(L, strerror(errno), -errno);
    }
    if (info.si_pid == 0) {
        return sm_lua_refuse(L, "again", -EAGAIN);
    }
    bool exited = info.si_code == CLD_EXITED;
    lua_pushinteger(L, exited ? info.si_status : 0);
    lua_pushinteger(L, exited ? 0 : info.si_status);
    return 2;
}

/* signal(pidfd, number): the very process, never another with its number */
static int posix_signal(lua_State *L)
{
    int fd = (int)luaL_checkinteger(L, 1), number = (int)luaL_checkinteger(L, 2);
    if (syscall(SYS_pidfd_send_signal, fd, number, NULL, 0) < 0) {
        return sm_lua_refuse(L, strerror(errno), -errno);
    }
    lua_pushboolean(L, 1);
    return 1;
}

void sm_lua_add_spawn(lua_State *L)
{
    static const luaL_Reg functions[] = {
        { "spawn", posix_spawn_ },
        { "reap", posix_reap },
        { "signal", posix_signal },
        { NULL, NULL },
    };
    luaL_setfuncs(L, functions, 0);
}
