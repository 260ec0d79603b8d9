/* SPDX-License-Identifier: Apache-2.0 */
/*
 * PID 1 of an sm guest.
 *
 *   init                       in a machine: mounts, modules, dial, serve
 *   init --connect PORT …      an ordinary process of the machine (pipe.c)
 *   init --fd N [--root DIR]   in a test: serve the connected socket N as an
 *                              ordinary process, inside DIR if given
 *
 * In a machine the host is dialled before the root device is looked for, so
 * that both round trips overlap; HELLO tells when each step was reached.
 */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define DEFAULT_GRACE_MS 10000
#define DIAL_TRIES 600

uint64_t sm_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t cycle_counter(void)
{
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    uint64_t v;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(v));
    return v;
#else
    return 0;
#endif
}

void sm_log(struct sm_agent *a, const char *format, ...)
{
    char line[256];
    int len = snprintf(line, sizeof(line), "%ssm-agent: ", a->vm ? "<3>" : "");
    va_list args;
    va_start(args, format);
    len += vsnprintf(line + len, sizeof(line) - (size_t)len - 1, format, args);
    va_end(args);
    if (len > (int)sizeof(line) - 2)
        len = (int)sizeof(line) - 2;
    line[len++] = '\n';
    if (a->log >= 0 && write(a->log, line, (size_t)len) < 0)
        return;
}

int sm_source_listen(struct sm_source *s, int set, uint32_t events)
{
    struct epoll_event e = { .events = events, .data.ptr = s };
    if (s->set == set && s->events == events)
        return 0;
    if (epoll_ctl(set, s->set >= 0 ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, s->fd, &e) < 0)
        return -errno;
    s->set = set;
    s->events = events;
    return 0;
}

int sm_source_add(struct sm_agent *a, struct sm_source *s, int set, int fd, uint32_t events,
                  void (*ready)(struct sm_agent *, void *, uint32_t), void *arg)
{
    (void)a;
    s->fd = fd;
    s->set = -1;
    s->ready = ready;
    s->arg = arg;
    int rc = sm_source_listen(s, set, events);
    if (rc)
        s->fd = -1;
    return rc;
}

void sm_source_mute(struct sm_source *s)
{
    if (s->set >= 0)
        epoll_ctl(s->set, EPOLL_CTL_DEL, s->fd, NULL);
    s->set = -1;
}

void sm_source_close(struct sm_source *s)
{
    if (s->fd < 0)
        return;
    if (s->set >= 0)
        epoll_ctl(s->set, EPOLL_CTL_DEL, s->fd, NULL);
    close(s->fd);
    s->fd = s->set = -1;
}

void sm_power(struct sm_agent *a)
{
    if (!a->vm) {
        for (struct sm_chan *c = a->chans; c; c = c->next)
            if (c->pid > 0 && !c->reaped && kill(-c->pid, SIGKILL) == 0)
                waitpid(c->pid, NULL, 0);
        _exit(0);
    }
    reboot(a->bye_reason == SM_BYE_REBOOT ? RB_AUTOBOOT : RB_POWER_OFF);
    for (;;)
        pause(); /* no way to turn this machine off: the host saw GOODBYE */
}

static void dispatch(struct sm_agent *a, int set, int max, int timeout_ms)
{
    struct epoll_event events[64];
    int n = epoll_wait(set, events, max < 64 ? max : 64, timeout_ms);
    for (int i = 0; i < n; i++) {
        struct sm_source *s = events[i].data.ptr;
        if (s->fd >= 0)
            s->ready(a, s->arg, events[i].events);
    }
}

static void streams_ready(struct sm_agent *a, void *arg, uint32_t events)
{
    (void)arg;
    (void)events;
    dispatch(a, a->streams, 16, 0);
}

static void serve(struct sm_agent *a)
{
    for (;;) {
        bool busy = sm_file_pump_all(a);
        if (sm_link_flush(a))
            sm_link_lost(a);
        if (sm_link_full(a))
            sm_source_mute(&a->streams_src);
        else
            sm_source_listen(&a->streams_src, a->epoll, EPOLLIN);
        dispatch(a, a->epoll, 64, busy ? 0 : sm_end_timeout_ms(a));
        sm_chan_run_chains(a);
        sm_chan_sweep(a);
        sm_end_step(a);
    }
}

static int prepare(struct sm_agent *a)
{
    a->grace_ms = DEFAULT_GRACE_MS;
    a->epoll = epoll_create1(EPOLL_CLOEXEC);
    a->streams = epoll_create1(EPOLL_CLOEXEC);
    a->devnull = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (a->epoll < 0 || a->streams < 0 || a->devnull < 0)
        return -errno;
    int rc = sm_source_add(a, &a->streams_src, a->epoll, a->streams, EPOLLIN, streams_ready, NULL);
    return rc ? rc : sm_end_init(a);
}

/* The host is there before the machine starts; but it may be slow to listen. */
static int dial(struct sm_agent *a)
{
    int rc = 0;
    for (int tries = 0, wait_ms = 1; tries < DIAL_TRIES; tries++) {
        int fd;
        rc = sm_link_dial(a, &fd);
        if (rc == 0) {
            sm_root_lower(a, 0); /* overlaps the answer; retried at BOOT */
            rc = sm_link_finish(fd, 10000);
            if (rc == 0)
                return sm_link_attach(a, fd);
            close(fd);
        }
        if (rc == -EAFNOSUPPORT)
            break;
        poll(NULL, 0, wait_ms);
        wait_ms = wait_ms < 64 ? wait_ms * 2 : 64;
    }
    return rc;
}

static int start_machine(struct sm_agent *a)
{
    int rc = sm_early_mounts(a);
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    a->marks[SM_MARK_KERNEL_ZERO] =
        (uint64_t)wall.tv_sec * 1000000000u + (uint64_t)wall.tv_nsec - sm_now_ns();
    if (rc)
        return rc;
    int oom = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (oom >= 0) {
        if (write(oom, "-1000", 5) < 0)
            sm_log(a, "oom_score_adj: %s", strerror(errno));
        close(oom);
    }
    reboot(RB_DISABLE_CAD);
    sm_early_modules(a);
    a->marks[SM_MARK_MODULES] = sm_now_ns();
    rc = prepare(a);
    if (rc)
        return rc;
    rc = dial(a);
    if (rc)
        sm_log(a, "dialling the host: %s", strerror(-rc));
    return rc;
}

static int start_test(struct sm_agent *a, int argc, char **argv)
{
    if (argc < 3 || strcmp(argv[1], "--fd")) {
        fprintf(stderr, "usage: init --fd N [--root DIR]\n");
        return -EINVAL;
    }
    int fd = atoi(argv[2]);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    a->log = 2;
    int rc = prepare(a);
    if (rc)
        return rc;
    if (argc >= 5 && !strcmp(argv[3], "--root") &&
        (chroot(argv[4]) < 0 || chdir("/") < 0))
        return -errno;
    return sm_link_attach(a, fd);
}

int main(int argc, char **argv)
{
    static struct sm_agent agent; /* zeroed, and too large for the stack */
    struct sm_agent *a = &agent;
    if (getpid() != 1 && argc > 1 && strcmp(argv[1], "--fd"))
        return sm_pipe_main(argc, argv);
    a->marks[SM_MARK_TSC] = cycle_counter();
    a->marks[SM_MARK_INIT] = sm_now_ns();
    a->epoll = a->streams = a->devnull = a->log = a->old_root = -1;
    a->link.fd = a->signals.fd = a->streams_src.fd = -1;
    a->own_ns = getpid() == 1;
    a->vm = a->own_ns && !(argc > 1 && !strcmp(argv[1], "--fd"));
    int rc = a->vm ? start_machine(a) : start_test(a, argc, argv);
    if (rc == 0)
        serve(a);
    if (a->vm) {
        a->bye_reason = SM_BYE_FAILED;
        sm_power(a);
    }
    return 1;
}
