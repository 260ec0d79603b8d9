/* SPDX-License-Identifier: Apache-2.0 */
/*
 * EXEC: make the pipes or the terminal, fork, and hear from the child whether
 * its execve worked. That word comes by a close-on-exec pipe: closed without a
 * byte means it did. The agent never waits for it, so a child that hangs on a
 * dead file system hangs alone.
 */
#include "agent.h"
#include "kabi.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#define PIPE_BYTES 262144
#define KABI_TIOCGPTPEER 0x5441

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* ours: the agent's end, non-blocking; theirs: the process's, blocking. */
static int make_pipe(int *ours, int *theirs, bool process_reads)
{
    int p[2];
    if (pipe2(p, O_CLOEXEC) < 0)
        return -errno;
    *ours = p[process_reads ? 1 : 0];
    *theirs = p[process_reads ? 0 : 1];
    fcntl(*ours, F_SETFL, fcntl(*ours, F_GETFL) | O_NONBLOCK);
    fcntl(*ours, F_SETPIPE_SZ, PIPE_BYTES); /* fewer turns; may be refused */
    return 0;
}

static int open_tty(struct sm_chan *c, int *theirs)
{
    int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (master < 0)
        return -errno;
    int unlock = 0;
    struct kabi_winsize w = { .row = c->exec.rows, .col = c->exec.columns };
    if (ioctl(master, TIOCSPTLCK, &unlock) < 0 || kabi_set_winsize(master, &w) < 0) {
        close(master);
        return -EIO;
    }
    *theirs = ioctl(master, KABI_TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (*theirs < 0) {
        int rc = -errno;
        close(master);
        return rc;
    }
    c->tty = master;
    return 0;
}

struct ends {
    int in, out, err; /* ours */
    struct sm_child_fds child;
};

static int make_ends(struct sm_agent *a, struct sm_chan *c, struct ends *e)
{
    int rc;
    if (c->exec.flags & SM_EXECF_TTY) {
        rc = open_tty(c, &e->child.tty);
        if (rc)
            return rc;
        /* Two more descriptors of the same terminal: an epoll set takes one
         * registration of each, and closing stdin must not close stdout. */
        e->out = fcntl(c->tty, F_DUPFD_CLOEXEC, 3);
        e->in = fcntl(c->tty, F_DUPFD_CLOEXEC, 3);
        return e->out < 0 || e->in < 0 ? -errno : 0;
    }
    if (c->exec.flags & SM_EXECF_STDIN)
        rc = make_pipe(&e->in, &e->child.in, true);
    else
        rc = (e->child.in = fcntl(a->devnull, F_DUPFD_CLOEXEC, 3)) < 0 ? -errno : 0;
    if (rc == 0)
        rc = make_pipe(&e->out, &e->child.out, false);
    if (rc == 0)
        rc = make_pipe(&e->err, &e->child.err, false);
    return rc;
}

void sm_exec_report(struct sm_agent *a, struct sm_chan *c)
{
    uint8_t word[264];
    ssize_t n = read(c->report.fd, word, sizeof(word) - 1);
    if (n < 0 && (errno == EAGAIN || errno == EINTR) && !c->reaped)
        return;
    sm_source_close(&c->report);
    if (n >= 8) {
        word[n] = 0;
        sm_chan_fail(a, c, (int)sm_get32(word), sm_get32(word + 4), (char *)word + 8);
        return;
    }
    c->started = true;
    if (c->detached)
        return;
    uint8_t pid[4];
    sm_put32(pid, (uint32_t)c->pid);
    sm_link_send(a, SM_STARTED, 0, c->id, pid, sizeof(pid));
}

static void report_ready(struct sm_agent *a, void *arg, uint32_t events)
{
    (void)events;
    sm_exec_report(a, arg);
}

/* The channel takes our ends over; the caller closes those it did not. */
static int listen_all(struct sm_agent *a, struct sm_chan *c, struct ends *e, int report)
{
    int rc = sm_source_add(a, &c->report, a->epoll, report, EPOLLIN, report_ready, c);
    if (rc == 0 && e->in >= 0) {
        rc = sm_chan_listen_in(a, c, e->in);
        if (rc == 0)
            e->in = -1;
    } else if (rc == 0) {
        c->in_closed = true;
    }
    if (rc == 0 && (rc = sm_chan_listen_out(a, c, 0, e->out, c->exec.window[0])) == 0)
        e->out = -1;
    if (rc == 0 && e->err >= 0 &&
        (rc = sm_chan_listen_out(a, c, 1, e->err, c->exec.window[1])) == 0)
        e->err = -1;
    return rc;
}

void sm_exec_start(struct sm_agent *a, struct sm_chan *c)
{
    struct ends e = { -1, -1, -1, { -1, -1, -1, -1, -1 } };
    int report = -1;
    int rc = make_ends(a, c, &e);
    if (rc == 0)
        rc = make_pipe(&report, &e.child.report, false);
    if (rc == 0) {
        c->start_ns = sm_now_ns();
        c->pid = fork();
        if (c->pid == 0)
            sm_child_run(a, &c->exec, &e.child);
        if (c->pid < 0) {
            rc = -errno;
            c->pid = 0;
        }
    }
    if (rc == 0) {
        rc = listen_all(a, c, &e, report);
        if (c->report.fd == report)
            report = -1;
        if (rc)
            kill(c->pid, SIGKILL);
    }
    close_fd(&e.child.in);
    close_fd(&e.child.out);
    close_fd(&e.child.err);
    close_fd(&e.child.tty);
    close_fd(&e.child.report);
    close_fd(&e.in);
    close_fd(&e.out);
    close_fd(&e.err);
    close_fd(&report);
    if (rc)
        sm_chan_fail(a, c, -rc, SM_STAGE_SPAWN, strerror(-rc));
}
