/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A host program with Lua in it, as strict as hosts come: signal handlers of its
 * own, a poll(2) loop of its own, a lua_State per thread. It runs a script in
 * each and then looks whether anything was taken from it.
 *
 *     host THREADS SCRIPT [ARG…]
 *
 * The script gets the thread's number and the arguments, and returns a table:
 * pollfd(), timeout() (seconds or nil), step(), done(). Exit 0 and the line "ok",
 * or 1 and what was wrong.
 */
#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>

#include <dlfcn.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SIGNALS 32
#define THREADS_MAX 16

static atomic_int hits[SIGNALS]; /* by our handler */
static atomic_int elsewhere;     /* our handler ran on a thread that is not ours */
static _Thread_local int ours;
static int arg_count;
static char **args;

static void on_signal(int number)
{
    atomic_fetch_add(&hits[number], 1);
    if (!ours) {
        atomic_store(&elsewhere, number);
    }
}

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "host: %s: %s\n", what, why ? why : "?");
    return 1;
}

static lua_Integer count_globals(lua_State *L)
{
    lua_Integer n = 0;
    lua_pushglobaltable(L);
    lua_pushnil(L);
    while (lua_next(L, -2)) {
        n++;
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
    return n;
}

/* Call a field of the script's table, which is at 1. */
static int call(lua_State *L, const char *name)
{
    lua_getfield(L, 1, name);
    return lua_pcall(L, 0, 1, 0);
}

static int wait_once(lua_State *L)
{
    struct pollfd p = { .events = POLLIN };
    int timeout = -1;

    if (call(L, "pollfd") || (p.fd = (int)lua_tointeger(L, -1), call(L, "timeout"))) {
        return fail("waiting", lua_tostring(L, -1));
    }
    if (!lua_isnil(L, -1)) {
        timeout = (int)(lua_tonumber(L, -1) * 1000 + 0.999);
    }
    lua_settop(L, 1);
    poll(&p, 1, timeout < 0 || timeout > 60000 ? 60000 : timeout);
    return 0;
}

static int drive(lua_State *L)
{
    for (;;) {
        if (call(L, "step") || call(L, "done")) {
            return fail("the script", lua_tostring(L, -1));
        }
        int done = lua_toboolean(L, -1);
        lua_settop(L, 1);
        if (done) {
            return 0;
        }
        if (wait_once(L)) {
            return 1;
        }
    }
}

static int run_state(int index)
{
    lua_State *L = luaL_newstate();
    lua_Integer globals;
    int bad;

    if (!L) {
        return fail("lua", "out of memory");
    }
    luaL_openlibs(L);
    globals = count_globals(L);
    bad = luaL_loadfile(L, args[0]);
    if (!bad) {
        lua_pushinteger(L, index);
        for (int i = 1; i < arg_count; i++) {
            lua_pushstring(L, args[i]);
        }
        bad = lua_pcall(L, arg_count, 1, 0);
    }
    if (bad || !lua_istable(L, -1)) {
        bad = fail("the script", bad ? lua_tostring(L, -1) : "expected a table");
    } else {
        bad = drive(L);
    }
    if (!bad && count_globals(L) != globals) {
        bad = fail("globals", "the script's modules made some");
    }
    lua_close(L);
    return bad;
}

static void *thread_main(void *arg)
{
    ours = 1;
    return (void *)(long)run_state((int)(long)arg);
}

static int handled(int number)
{
    return number != SIGKILL && number != SIGSTOP && number != SIGSEGV && number != SIGBUS &&
           number != SIGFPE && number != SIGILL && number != SIGABRT && number != SIGTRAP;
}

static void take_signals(void)
{
    struct sigaction act = { .sa_handler = on_signal };
    for (int i = 1; i < SIGNALS; i++) {
        if (handled(i)) {
            sigaction(i, &act, NULL);
        }
    }
}

/* Everything is as we left it. */
static int check_signals(const sigset_t *mask)
{
    sigset_t now;
    for (int i = 1; i < SIGNALS; i++) {
        struct sigaction act;
        sigaction(i, NULL, &act);
        if (handled(i) && act.sa_handler != on_signal) {
            return fail("a signal handler was taken", strsignal(i));
        }
        if (!handled(i) && act.sa_handler != SIG_DFL && i != SIGSEGV && i != SIGBUS &&
            i != SIGFPE && i != SIGILL && i != SIGABRT) { /* sanitizers own those */
            return fail("a signal handler was set", strsignal(i));
        }
    }
    pthread_sigmask(SIG_SETMASK, NULL, &now);
    for (int i = 1; i < SIGNALS; i++) {
        if (sigismember(&now, i) != sigismember(mask, i)) {
            return fail("the signal mask was changed", strsignal(i));
        }
    }
    if (atomic_load(&hits[SIGPIPE])) {
        return fail("a signal was raised", "SIGPIPE");
    }
    if (atomic_load(&elsewhere)) {
        return fail("our handler ran on a thread of theirs", strsignal(atomic_load(&elsewhere)));
    }
    return 0;
}

static void at_exit(void)
{
    if (args) {
        fprintf(stderr, "host: exit was taken\n");
        _exit(1);
    }
}

int main(int argc, char **argv)
{
    pthread_t threads[THREADS_MAX];
    sigset_t mask;
    int count = argc > 2 ? atoi(argv[1]) : 0, bad = 0;

    if (count < 1 || count > THREADS_MAX) {
        fprintf(stderr, "usage: host THREADS SCRIPT [ARG...]\n");
        return 2;
    }
#ifdef __SANITIZE_THREAD__
    /* Its suppression by library wants the library to stay (tsan.supp). */
    dlopen("libuv.so.1", RTLD_NOW | RTLD_NODELETE);
#endif
    ours = 1;
    args = argv + 2;
    arg_count = argc - 2;
    atexit(at_exit);
    take_signals();
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    for (int i = 0; i < count; i++) {
        pthread_create(&threads[i], NULL, thread_main, (void *)(long)(i + 1));
    }
    /* Signals that the host means for itself arrive all the while. */
    for (int i = 0; i < 20; i++) {
        kill(getpid(), SIGUSR1);
        usleep(5000);
    }
    for (int i = 0; i < count; i++) {
        void *result;
        pthread_join(threads[i], &result);
        bad |= result != NULL;
    }
    bad = bad || check_signals(&mask);
    args = NULL;
    if (!bad) {
        printf("ok\n");
    }
    return bad;
}
