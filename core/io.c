/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The I/O thread; see io.h.
 *
 * Calls from other threads queue under `lock` and wake the loop by an
 * eventfd. A hold is a call that sleeps on `released`: the loop is then
 * between two callbacks by construction.
 *
 * A callback may unwatch another watch whose event was already collected in
 * this epoll round. The round is therefore kept in `round`, and unwatch clears
 * the entry, so nothing stale is dispatched.
 */
#include "io.h"
#include "thread.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define ROUND_EVENTS 32
#define STACK_BYTES (256 * 1024)

struct call {
    int (*fn)(void *arg);
    void *arg;
    int result;
    bool done;
    struct call *next;
};

struct sm_io {
    pthread_t thread;
    int epoll_fd, wake_fd;
    char name[16];

    pthread_mutex_t lock; /* calls, holds, stop */
    pthread_cond_t changed;
    struct call *first, **last;
    unsigned holds;
    bool held, stop;

    /* the I/O thread's own */
    struct epoll_event round[ROUND_EVENTS];
    int round_count;
    struct sm_io_timer *timers; /* sorted by deadline */
};

uint64_t sm_io_now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void wake(struct sm_io *io)
{
    uint64_t one = 1;
    ssize_t n = write(io->wake_fd, &one, sizeof(one));

    (void)n;
}

/* Serve queued calls and holds; returns false when the thread must end. */
static bool serve_calls(struct sm_io *io)
{
    uint64_t n;
    ssize_t got = read(io->wake_fd, &n, sizeof(n));
    bool stop;

    (void)got;
    pthread_mutex_lock(&io->lock);
    for (;;) {
        struct call *c = io->first;

        if (c) {
            io->first = c->next;
            if (!io->first)
                io->last = &io->first;
            pthread_mutex_unlock(&io->lock);
            c->result = c->fn(c->arg);
            pthread_mutex_lock(&io->lock);
            c->done = true;
            pthread_cond_broadcast(&io->changed);
        } else if (io->holds) {
            io->held = true;
            pthread_cond_broadcast(&io->changed);
            pthread_cond_wait(&io->changed, &io->lock);
        } else {
            io->held = false;
            break;
        }
    }
    stop = io->stop;
    pthread_mutex_unlock(&io->lock);
    return !stop;
}

/* Fire what is due; returns the epoll timeout in ms to the next, or -1. */
static int serve_timers(struct sm_io *io)
{
    while (io->timers) {
        struct sm_io_timer *t = io->timers;
        uint64_t now = sm_io_now_ns();

        if (t->deadline_ns > now) {
            uint64_t ms = (t->deadline_ns - now + 999999) / 1000000;

            return ms > 1000000 ? 1000000 : (int)ms;
        }
        io->timers = t->next;
        t->deadline_ns = 0;
        t->next = NULL;
        t->fn(t);
    }
    return -1;
}

static void *io_main(void *arg)
{
    struct sm_io *io = arg;

    pthread_setname_np(pthread_self(), io->name);
    for (;;) {
        int timeout = serve_timers(io);
        int n = epoll_wait(io->epoll_fd, io->round, ROUND_EVENTS, timeout);
        bool calls = false;

        if (n < 0)
            n = 0; /* EINTR: a debugger; every other error is our own bug */
        io->round_count = n;
        for (int i = 0; i < n; i++) {
            struct sm_io_watch *w = io->round[i].data.ptr;

            if (w == (void *)io)
                calls = true;
            else if (w)
                w->fn(w, io->round[i].events);
        }
        io->round_count = 0;
        if (calls && !serve_calls(io))
            return NULL;
    }
}

static int start_thread(struct sm_io *io)
{
    sigset_t all, old;
    pthread_attr_t attr;
    int err;

    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    err = sm_thread_create(&io->thread, &attr, io_main, io);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    return -err;
}

int sm_io_create(struct sm_io **out, const char *name)
{
    struct sm_io *io = calloc(1, sizeof(*io));
    struct epoll_event ev = { .events = EPOLLIN };
    int err;

    if (!io)
        return -ENOMEM;
    snprintf(io->name, sizeof(io->name), "sm-%s", name);
    io->last = &io->first;
    pthread_mutex_init(&io->lock, NULL);
    pthread_cond_init(&io->changed, NULL);
    io->wake_fd = -1;
    io->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (io->epoll_fd >= 0)
        io->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    ev.data.ptr = io;
    if (io->wake_fd < 0 || epoll_ctl(io->epoll_fd, EPOLL_CTL_ADD, io->wake_fd, &ev) < 0)
        err = -errno;
    else
        err = start_thread(io);
    if (!err) {
        *out = io;
        return 0;
    }
    if (io->wake_fd >= 0)
        close(io->wake_fd);
    if (io->epoll_fd >= 0)
        close(io->epoll_fd);
    pthread_cond_destroy(&io->changed);
    pthread_mutex_destroy(&io->lock);
    free(io);
    return err;
}

void sm_io_destroy(struct sm_io *io)
{
    if (!io)
        return;
    pthread_mutex_lock(&io->lock);
    io->stop = true;
    io->holds = 0;
    pthread_cond_broadcast(&io->changed);
    pthread_mutex_unlock(&io->lock);
    wake(io);
    pthread_join(io->thread, NULL);
    close(io->wake_fd);
    close(io->epoll_fd);
    pthread_cond_destroy(&io->changed);
    pthread_mutex_destroy(&io->lock);
    free(io);
}

int sm_io_watch(struct sm_io *io, struct sm_io_watch *watch, int fd, uint32_t events,
                void (*fn)(struct sm_io_watch *, uint32_t), void *dev)
{
    struct epoll_event ev = { .events = events, .data.ptr = watch };

    watch->fn = fn;
    watch->dev = dev;
    if (epoll_ctl(io->epoll_fd, EPOLL_CTL_ADD, fd, &ev) < 0) {
        watch->fd = -1;
        return -errno;
    }
    watch->fd = fd;
    return 0;
}

int sm_io_rearm(struct sm_io *io, struct sm_io_watch *watch, uint32_t events)
{
    struct epoll_event ev = { .events = events, .data.ptr = watch };

    if (watch->fd < 0)
        return -EBADF;
    return epoll_ctl(io->epoll_fd, EPOLL_CTL_MOD, watch->fd, &ev) < 0 ? -errno : 0;
}

void sm_io_unwatch(struct sm_io *io, struct sm_io_watch *watch)
{
    if (watch->fd < 0)
        return;
    epoll_ctl(io->epoll_fd, EPOLL_CTL_DEL, watch->fd, NULL);
    watch->fd = -1;
    for (int i = 0; i < io->round_count; i++)
        if (io->round[i].data.ptr == watch)
            io->round[i].data.ptr = NULL;
}

void sm_io_disarm(struct sm_io *io, struct sm_io_timer *timer)
{
    struct sm_io_timer **at = &io->timers;

    while (*at && *at != timer)
        at = &(*at)->next;
    if (*at)
        *at = timer->next;
    timer->next = NULL;
    timer->deadline_ns = 0;
}

void sm_io_arm(struct sm_io *io, struct sm_io_timer *timer, uint64_t deadline_ns)
{
    struct sm_io_timer **at = &io->timers;

    sm_io_disarm(io, timer);
    timer->deadline_ns = deadline_ns ? deadline_ns : 1;
    while (*at && (*at)->deadline_ns <= timer->deadline_ns)
        at = &(*at)->next;
    timer->next = *at;
    *at = timer;
}

int sm_io_call(struct sm_io *io, int (*fn)(void *arg), void *arg)
{
    struct call c = { .fn = fn, .arg = arg };

    if (pthread_equal(pthread_self(), io->thread))
        return fn(arg);
    pthread_mutex_lock(&io->lock);
    *io->last = &c;
    io->last = &c.next;
    pthread_cond_broadcast(&io->changed); /* it may be held */
    wake(io);
    while (!c.done)
        pthread_cond_wait(&io->changed, &io->lock);
    pthread_mutex_unlock(&io->lock);
    return c.result;
}

void sm_io_hold(struct sm_io *io)
{
    pthread_mutex_lock(&io->lock);
    io->holds++;
    wake(io);
    while (!io->held)
        pthread_cond_wait(&io->changed, &io->lock);
    pthread_mutex_unlock(&io->lock);
}

void sm_io_release(struct sm_io *io)
{
    pthread_mutex_lock(&io->lock);
    if (io->holds)
        io->holds--;
    if (!io->holds) {
        /* The thread clears `held` itself, but a hold that follows at once
         * must wait for it to be held anew. */
        io->held = false;
        pthread_cond_broadcast(&io->changed);
    }
    pthread_mutex_unlock(&io->lock);
}
