/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The end, of processes and of the machine.
 *
 *   NONE ─▶ MAIN ─▶ ASKED ─▶ KILL ─▶ FLUSH ─▶ ACK ─▶ power off or reboot
 *           the main command gets its stop signal and the grace time; then
 *           everything gets SIGTERM, then SIGKILL; no process left: output
 *           reaches the host, disks are written and unmounted, GOODBYE
 *
 * Phases whose condition holds already are passed in the same turn. The end is
 * asked for by the main command's exit, by SHUTDOWN, or from inside the guest
 * by the signals with which poweroff, reboot and halt (BusyBox, systemd) speak
 * to PID 1. As PID 1 we are the parent of every orphan, so "no child left" is
 * "no process left".
 */
#include "agent.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#define MS 1000000ull
#define LEFTOVER_GRACE_MS 2000 /* SIGTERM to SIGKILL once main is gone */
#define KILL_WAIT_MS 3000      /* for a process stuck in the kernel */
#define FLUSH_STALL_MS 2000    /* after SHUTDOWN: a host that does not read */
#define ACK_WAIT_MS 1000

/* SIGRTMIN as init systems count it: 34, on every architecture. */
enum { RT_HALT = 34 + 3, RT_POWEROFF, RT_REBOOT, RT_KEXEC };
enum { RT_HALT_NOW = 34 + 13, RT_POWEROFF_NOW, RT_REBOOT_NOW };

static struct sm_chan *main_chan(struct sm_agent *a)
{
    for (struct sm_chan *c = a->chans; c; c = c->next)
        if (c->main && c->pid > 0 && !c->reaped)
            return c;
    return NULL;
}

static void signal_all(struct sm_agent *a, int sig)
{
    if (a->own_ns) {
        kill(-1, sig);
        return;
    }
    for (struct sm_chan *c = a->chans; c; c = c->next)
        if (c->pid > 0 && !c->reaped)
            kill(-c->pid, sig);
}

static bool no_process_left(void)
{
    siginfo_t info;
    return waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) < 0 && errno == ECHILD;
}

void sm_end_begin(struct sm_agent *a, uint32_t reason, uint32_t code, uint32_t grace_ms,
                  uint32_t signal, const char *text)
{
    struct sm_chan *m = main_chan(a);
    if (reason == SM_BYE_EXITED)
        grace_ms = LEFTOVER_GRACE_MS;
    uint64_t deadline = sm_now_ns() + grace_ms * MS;
    if (a->end != SM_END_NONE) {
        /* Asked again: only ever sooner. */
        if (a->end_deadline_ns == 0 || deadline < a->end_deadline_ns)
            a->end_deadline_ns = deadline;
        return;
    }
    a->bye_reason = reason;
    a->bye_code = code;
    strncpy(a->bye_text, text ? text : "", sizeof(a->bye_text) - 1);
    a->end_deadline_ns = deadline;
    a->end = SM_END_MAIN;
    if (m) {
        uint32_t sig = signal ? signal : m->exec.stop_signal ? m->exec.stop_signal : SIGTERM;
        kill(m->pid, (int)sig);
    }
}

/* No process is left: what nobody can finish any more will not happen. */
static void cancel_unfinished(struct sm_agent *a)
{
    for (struct sm_chan *c = a->chans; c; c = c->next)
        if (!c->dead && (c->waiting || c->kind == SM_CHAN_PUT))
            sm_chan_fail(a, c, ESHUTDOWN, SM_STAGE_REQUEST, "shutting down");
}

static void say_goodbye(struct sm_agent *a)
{
    uint8_t bytes[8 + sizeof(a->bye_text)];
    size_t len = strnlen(a->bye_text, sizeof(a->bye_text));
    sm_put32(bytes, a->bye_reason);
    sm_put32(bytes + 4, a->bye_code);
    memcpy(bytes + 8, a->bye_text, len);
    sm_link_send(a, SM_GOODBYE, 0, 0, bytes, 8 + len);
}

/* One transition, if its time has come. */
static bool step(struct sm_agent *a)
{
    uint64_t now = sm_now_ns();
    bool late = a->end_deadline_ns && now >= a->end_deadline_ns;
    switch (a->end) {
    case SM_END_NONE:
        return false;
    case SM_END_MAIN:
        if (main_chan(a) && !late)
            return false;
        if (!late && a->end_deadline_ns > now + LEFTOVER_GRACE_MS * MS)
            a->end_deadline_ns = now + LEFTOVER_GRACE_MS * MS;
        signal_all(a, SIGTERM);
        if (a->own_ns)
            kill(-1, SIGCONT);
        a->end = SM_END_ASKED;
        return true;
    case SM_END_ASKED:
        if (!no_process_left()) {
            if (!late)
                return false;
            signal_all(a, SIGKILL);
        }
        a->end_deadline_ns = now + KILL_WAIT_MS * MS;
        a->end = SM_END_KILL;
        return true;
    case SM_END_KILL:
        if (!no_process_left() && !late)
            return false;
        /* A pipeline's reader may take its time over the main command's
         * output; who shut the machine down from outside does not wait. */
        a->end_deadline_ns = a->bye_reason == SM_BYE_EXITED && !a->end_asked
                                 ? 0
                                 : now + FLUSH_STALL_MS * MS;
        a->end = SM_END_FLUSH;
        cancel_unfinished(a);
        return true;
    case SM_END_FLUSH:
        sm_link_flush(a); /* what does not go now wakes us when it can */
        if ((a->chans || a->out.len) && a->link.fd >= 0 && !late)
            return false;
        if (a->vm)
            sm_root_leave(a);
        say_goodbye(a);
        a->end_deadline_ns = sm_now_ns() + ACK_WAIT_MS * MS;
        a->end = SM_END_ACK;
        return true;
    case SM_END_ACK:
        if (a->bye_read || late)
            sm_power(a);
        return false;
    }
    return false;
}

void sm_end_step(struct sm_agent *a)
{
    while (step(a))
        sm_chan_sweep(a);
}

int sm_end_timeout_ms(const struct sm_agent *a)
{
    if (a->end == SM_END_NONE || a->end_deadline_ns == 0)
        return -1;
    uint64_t now = sm_now_ns();
    return now >= a->end_deadline_ns ? 0 : (int)((a->end_deadline_ns - now) / MS) + 1;
}

static uint64_t timeval_ns(struct timeval t)
{
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_usec * 1000u;
}

static void announce_exit(struct sm_agent *a, struct sm_chan *c, int status,
                          const struct rusage *use)
{
    uint8_t b[SM_EXIT_BYTES];
    uint32_t code = WIFEXITED(status) ? (uint32_t)WEXITSTATUS(status) : 0;
    uint32_t sig = WIFSIGNALED(status) ? (uint32_t)WTERMSIG(status) : 0;
    sm_put32(b, code);
    sm_put32(b + 4, sig);
    sm_put64(b + 8, sm_now_ns() - c->start_ns);
    sm_put64(b + 16, (uint64_t)use->ru_maxrss * 1024);
    sm_put64(b + 24, timeval_ns(use->ru_utime));
    sm_put64(b + 32, timeval_ns(use->ru_stime));
    if (!c->detached)
        sm_link_send(a, SM_EXIT, 0, c->id, b, sizeof(b));
    if (code == 0 && sig == 0)
        sm_chan_succeeded(a, c);
    if (!c->main)
        return;
    code = sig ? 128 + sig : code;
    if (a->end == SM_END_NONE) {
        sm_end_begin(a, SM_BYE_EXITED, code, 0, 0, "");
    } else if (a->bye_reason == SM_BYE_POWEROFF && a->end_asked) {
        /* The host asked it to stop, and this is how it did. */
        a->bye_reason = SM_BYE_EXITED;
        a->bye_code = code;
    }
}

void sm_reap(struct sm_agent *a)
{
    int status;
    struct rusage use;
    pid_t pid;
    while ((pid = wait4(-1, &status, WNOHANG, &use)) > 0) {
        struct sm_chan *c = a->chans;
        while (c && (c->pid != pid || c->reaped || c->dead))
            c = c->next;
        if (!c)
            continue; /* an orphan, or a child that failed and has said so */
        c->reaped = true;
        if (c->report.fd >= 0)
            sm_exec_report(a, c);
        if (!c->dead) {
            announce_exit(a, c, status, &use);
            sm_chan_drain(a, c);
        }
    }
}

static void signal_ready(struct sm_agent *a, void *arg, uint32_t events)
{
    struct signalfd_siginfo info;
    (void)arg;
    (void)events;
    while (read(a->signals.fd, &info, sizeof(info)) == sizeof(info)) {
        switch (info.ssi_signo) {
        case SIGCHLD:
            sm_reap(a);
            break;
        case SIGUSR1: /* BusyBox halt, systemd halt */
        case SIGUSR2: /* BusyBox poweroff */
        case RT_HALT:
        case RT_POWEROFF:
        case RT_HALT_NOW:
        case RT_POWEROFF_NOW:
            sm_end_begin(a, SM_BYE_POWEROFF, 0, a->grace_ms, 0, "asked inside the guest");
            break;
        default: /* SIGTERM (BusyBox reboot), SIGINT (ctrl-alt-del), RT_REBOOT */
            sm_end_begin(a, SM_BYE_REBOOT, 0, a->grace_ms, 0, "asked inside the guest");
            break;
        }
    }
}

int sm_end_init(struct sm_agent *a)
{
    static const int set[] = { SIGCHLD, SIGTERM,  SIGINT,     SIGUSR1,   SIGUSR2,
                               RT_HALT, RT_POWEROFF, RT_REBOOT, RT_KEXEC,  RT_HALT_NOW,
                               RT_POWEROFF_NOW, RT_REBOOT_NOW };
    sigset_t mask;
    sigemptyset(&mask);
    for (size_t i = 0; i < sizeof(set) / sizeof(set[0]); i++)
        sigaddset(&mask, set[i]);
    if (sigprocmask(SIG_BLOCK, &mask, NULL) < 0)
        return -errno;
    signal(SIGPIPE, SIG_IGN);
    int fd = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0)
        return -errno;
    return sm_source_add(a, &a->signals, a->epoll, fd, EPOLLIN, signal_ready, NULL);
}
