/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An I/O thread: one epoll loop that devices hang their descriptors on.
 *
 * The one thread model of all devices. A device gets its sm_io when it is
 * created; queue kicks (ioeventfd), sockets and timers of that device are
 * handled there, so its dataplane state needs no lock. A VM has one for
 * streams (console, vsock, rng, net) and one per disk, because a disk blocks.
 *
 * Threads. sm_io_watch/unwatch/arm are for the I/O thread itself or while it
 * is not yet started or is held; every other thread goes through sm_io_call,
 * which runs a function on the I/O thread and waits. Calls run in the order
 * they were made. Stopped by sm_io_destroy, which joins.
 */
#ifndef SM_IO_H
#define SM_IO_H

#include <stdint.h>

struct sm_io;

/* Embedded in a device; fn runs on the I/O thread with EPOLL* bits. */
struct sm_io_watch {
    int fd; /* -1 when not watched */
    void (*fn)(struct sm_io_watch *watch, uint32_t events);
    void *dev;
};

/* Embedded in a device; fires once, CLOCK_MONOTONIC. */
struct sm_io_timer {
    uint64_t deadline_ns; /* 0: not armed */
    void (*fn)(struct sm_io_timer *timer);
    void *dev;
    struct sm_io_timer *next; /* owned by sm_io */
};

/* The thread is named "sm-<name>" (15 characters at most) and starts with all
 * signals blocked. */
int sm_io_create(struct sm_io **out, const char *name);
void sm_io_destroy(struct sm_io *io);

int sm_io_watch(struct sm_io *io, struct sm_io_watch *watch, int fd, uint32_t events,
                void (*fn)(struct sm_io_watch *, uint32_t), void *dev);
int sm_io_rearm(struct sm_io *io, struct sm_io_watch *watch, uint32_t events);
/* Idempotent. No callback of this watch runs after it, not even one that was
 * already collected in the same epoll round. */
void sm_io_unwatch(struct sm_io *io, struct sm_io_watch *watch);

void sm_io_arm(struct sm_io *io, struct sm_io_timer *timer, uint64_t deadline_ns);
void sm_io_disarm(struct sm_io *io, struct sm_io_timer *timer);
uint64_t sm_io_now_ns(void);

/* Run fn(arg) on the I/O thread and return its result; called on it, runs at
 * once. */
int sm_io_call(struct sm_io *io, int (*fn)(void *arg), void *arg);
/* Hold the thread between two callbacks until released: a pause of every
 * device on it. Nests. */
void sm_io_hold(struct sm_io *io);
void sm_io_release(struct sm_io *io);

#endif
