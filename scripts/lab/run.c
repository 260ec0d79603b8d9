/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lab run: one command in a lab machine, as if it ran here. Streams, window
 * size and signals go in, output and the way it ended come out: when the
 * command was killed by a signal, so are we.
 *
 * One thread. Our standard streams belong to others too, so they stay in
 * blocking mode and are only touched after poll(2) said so. If the machine
 * was just shutting down, nothing has run yet, and the driver script is
 * executed again to start another.
 */
#define _GNU_SOURCE
#include "lab.h"
#include "mux.h"
#include "request.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define OURS 125 /* exit status of our own failures */
#define MAX_PUBLISH 32
#define MAX_TRIES 3

extern char **environ;

struct run {
    const char *socket_path;
    char **command, **retry;
    int tty; /* 1 yes, 0 no, -1 ask the standard streams */
    uint16_t publish[MAX_PUBLISH][2];
    int npublish;
    struct link link;
    struct src in;
    struct dst out, err;
    int sigfd;
    sigset_t old_mask;
    bool opened, raw;
    int tries;
    struct termios saved;
};

static void restore_terminal(struct run *r)
{
    if (r->raw)
        tcsetattr(0, TCSADRAIN, &r->saved);
    r->raw = false;
}

static void raw_terminal(struct run *r)
{
    struct termios t;

    if (tcgetattr(0, &r->saved))
        return;
    t = r->saved;
    cfmakeraw(&t);
    r->raw = !tcsetattr(0, TCSADRAIN, &t);
}

static bool foreground(void)
{
    return tcgetpgrp(0) == getpgrp();
}

/* --- the request ------------------------------------------------------- */

static void add_string(struct buf *b, const char *s)
{
    buf_add(b, s, strlen(s) + 1);
}

static uint32_t count(char **list)
{
    uint32_t n = 0;

    while (list[n])
        n++;
    return n;
}

static void fill_request(struct request *q, struct run *r)
{
    struct winsize size = { 0 };
    struct rlimit nofile = { 1024, 1024 };
    mode_t mask = umask(0);

    umask(mask);
    ioctl(0, TIOCGWINSZ, &size);
    getrlimit(RLIMIT_NOFILE, &nofile);
    *q = (struct request){
        .uid = geteuid(),
        .gid = getegid(),
        .ngroups = (uint32_t)getgroups(0, NULL),
        .umask = mask,
        .rows = size.ws_row,
        .columns = size.ws_col,
        .argc = count(r->command),
        .envc = count(environ),
        .nofile_soft = nofile.rlim_cur,
        .nofile_hard = nofile.rlim_max,
    };
    if (r->tty)
        q->flags |= REQ_TTY | (isatty(2) ? REQ_TTY_STDERR : 0);
    if (r->in.fd < 0)
        q->flags |= REQ_NO_STDIN;
}

static void send_request(struct run *r)
{
    struct request q;
    struct buf b = { 0 };
    gid_t *groups;
    char *cwd = getcwd(NULL, 0);

    fill_request(&q, r);
    groups = calloc(q.ngroups + 1, sizeof *groups);
    if (groups)
        getgroups((int)q.ngroups, groups);
    buf_add(&b, &q, sizeof q);
    buf_add(&b, groups, q.ngroups * sizeof *groups);
    add_string(&b, cwd ? cwd : "/");
    for (char **a = r->command; *a; a++)
        add_string(&b, *a);
    for (char **e = environ; *e; e++)
        add_string(&b, *e);
    for (int i = 0; i < r->npublish; i++)
        link_send(&r->link, 0, F_PUBLISH, 0, r->publish[i], 4);
    link_send(&r->link, 0, F_OPEN, 0, b.bytes, b.len);
    buf_free(&b);
    free(groups);
    free(cwd);
}

/* --- the end ----------------------------------------------------------- */

static int end_like(struct run *r, int status)
{
    sigset_t only;
    int sig;

    restore_terminal(r);
    if (WIFEXITED(status))
        return WEXITSTATUS(status);
    sig = WTERMSIG(status);
    setrlimit(RLIMIT_CORE, &(struct rlimit){ 0, 0 });
    signal(sig, SIG_DFL);
    sigemptyset(&only);
    sigaddset(&only, sig);
    raise(sig);
    sigprocmask(SIG_UNBLOCK, &only, NULL);
    return 128 + sig;
}

static int command_failed(struct run *r, const struct frame *f,
                          const char *data)
{
    int err = (int)frame_u32(f, data);
    int len = f->len > 4 ? (int)f->len - 4 : 0;

    restore_terminal(r);
    if (len) {
        fprintf(stderr, "with-kvm: %.*s: %s\n", len, data + 4, strerror(err));
        return OURS;
    }
    fprintf(stderr, "with-kvm: %s: %s\n", r->command[0], strerror(err));
    return err == ENOENT ? 127 : 126;
}

static int machine_gone(struct run *r)
{
    char text[16];

    restore_terminal(r);
    if (!r->opened && r->retry && r->tries < MAX_TRIES) {
        sigprocmask(SIG_SETMASK, &r->old_mask, NULL);
        signal(SIGPIPE, SIG_DFL);
        snprintf(text, sizeof text, "%d", r->tries + 1);
        setenv("SM_LAB_RETRY", text, 1);
        execv(r->retry[0], r->retry);
    }
    fprintf(stderr, "with-kvm: the lab machine went away%s%.*s%s\n",
            r->opened ? "" : " before the command ran; see ",
            r->opened ? 0 : (int)(strrchr(r->socket_path, '/') - r->socket_path),
            r->socket_path, r->opened ? "" : "/console.log");
    return OURS;
}

/* --- the loop ---------------------------------------------------------- */

static void forward_signals(struct run *r)
{
    struct signalfd_siginfo info;

    while (read(r->sigfd, &info, sizeof info) == sizeof info) {
        if (info.ssi_signo == SIGWINCH) {
            struct winsize size;
            uint16_t rc[2];

            if (!r->tty || ioctl(0, TIOCGWINSZ, &size))
                continue;
            rc[0] = size.ws_row;
            rc[1] = size.ws_col;
            link_send(&r->link, 0, F_WINSIZE, 0, rc, sizeof rc);
        } else {
            /* The terminal signals a whole group; kill(2) one process. */
            uint8_t data[2] = { (uint8_t)info.ssi_signo,
                                info.ssi_code == SI_KERNEL };

            link_send(&r->link, 0, F_SIGNAL, 0, data, sizeof data);
        }
    }
}

static void finish_output(struct run *r)
{
    while (dst_wants(&r->out) || dst_wants(&r->err)) {
        struct pollfd p[] = {
            { .fd = dst_wants(&r->out) ? r->out.fd : -1, .events = POLLOUT },
            { .fd = dst_wants(&r->err) ? r->err.fd : -1, .events = POLLOUT },
        };

        poll(p, 2, -1);
        if (p[0].revents)
            dst_pump(&r->out, &r->link, 0);
        if (p[1].revents)
            dst_pump(&r->err, &r->link, 0);
    }
}

/* Returns the exit status, or -1 to go on. */
static int handle(struct run *r, const struct frame *f, const char *data)
{
    struct dst *dst = f->stream == 1 ? &r->out : &r->err;

    switch (f->type) {
    case F_OPENED:
        r->opened = true;
        break;
    case F_FAIL:
        return command_failed(r, f, data);
    case F_DATA:
        r->opened = true;
        dst_add(dst, &r->link, 0, data, f->len);
        break;
    case F_EOF:
        dst_eof(dst);
        break;
    case F_CREDIT:
        r->in.credit += frame_u32(f, data);
        break;
    case F_BROKEN:
        src_close(&r->in);
        break;
    case F_EXIT:
        /* All data came before; what is left is our own writing. */
        finish_output(r);
        return end_like(r, (int)frame_u32(f, data));
    default:
        break;
    }
    return -1;
}

static int loop(struct run *r)
{
    for (;;) {
        struct pollfd p[] = {
            { .fd = r->link.fd, .events = link_events(&r->link) },
            { .fd = r->sigfd, .events = POLLIN },
            { .fd = src_wants(&r->in) ? r->in.fd : -1, .events = POLLIN },
            { .fd = dst_wants(&r->out) ? r->out.fd : -1, .events = POLLOUT },
            { .fd = dst_wants(&r->err) ? r->err.fd : -1, .events = POLLOUT },
        };
        struct frame f;
        const char *data;

        if (poll(p, 5, -1) < 0 && errno != EINTR)
            return OURS;
        forward_signals(r);
        if (p[2].revents)
            src_pump(&r->in, &r->link, 0);
        if (p[3].revents)
            dst_pump(&r->out, &r->link, 0);
        if (p[4].revents)
            dst_pump(&r->err, &r->link, 0);
        link_flush(&r->link);
        if (p[0].revents & (POLLIN | POLLHUP | POLLERR))
            link_fill(&r->link);
        while (link_next(&r->link, &f, &data)) {
            int status = handle(r, &f, data);

            if (status >= 0)
                return status;
        }
        if (r->link.err)
            return machine_gone(r);
    }
}

static bool fd_open(int fd)
{
    return fcntl(fd, F_GETFD) >= 0;
}

static void block_signals(struct run *r)
{
    static const int forwarded[] = { SIGINT,  SIGTERM, SIGHUP,  SIGQUIT,
                                     SIGUSR1, SIGUSR2, SIGWINCH };
    sigset_t mask;

    sigemptyset(&mask);
    for (size_t i = 0; i < sizeof forwarded / sizeof *forwarded; i++) {
        struct sigaction sa;

        /* Ignored by our caller (nohup, &): stays ignored. */
        if (!sigaction(forwarded[i], NULL, &sa) && sa.sa_handler != SIG_IGN)
            sigaddset(&mask, forwarded[i]);
    }
    sigprocmask(SIG_BLOCK, &mask, &r->old_mask);
    r->sigfd = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
    /* Our own failed writes are told to the command, not to us. */
    signal(SIGPIPE, SIG_IGN);
}

static int parse(struct run *r, int argc, char **argv)
{
    int i = 1;

    r->socket_path = argv[0];
    r->tty = -1;
    for (; i < argc && strcmp(argv[i], "--"); i++) {
        unsigned outside, inside;

        if (!strcmp(argv[i], "-t"))
            r->tty = 1;
        else if (!strcmp(argv[i], "-T"))
            r->tty = 0;
        else if (!strcmp(argv[i], "-p") && i + 1 < argc &&
                 sscanf(argv[i + 1], "%u:%u", &outside, &inside) == 2 &&
                 r->npublish < MAX_PUBLISH) {
            r->publish[r->npublish][0] = (uint16_t)outside;
            r->publish[r->npublish++][1] = (uint16_t)inside;
            i++;
        } else
            return -EINVAL;
    }
    if (i + 1 >= argc)
        return -EINVAL;
    r->command = argv + i + 1;
    return 0;
}

/* SM_LAB_DRIVER holds the driver's path and arguments, one a line. */
static void retry_command(struct run *r)
{
    char *text = getenv("SM_LAB_DRIVER");
    char *copy, *line;
    size_t n = 0;

    if (!text)
        return;
    copy = strdup(text);
    unsetenv("SM_LAB_DRIVER");
    r->retry = calloc(strlen(text) + count(r->command) + 2, sizeof *r->retry);
    if (!copy || !r->retry)
        return;
    while ((line = strsep(&copy, "\n")))
        if (*line)
            r->retry[n++] = line;
    for (char **a = r->command; *a; a++)
        r->retry[n++] = *a;
}

int run_main(int argc, char **argv)
{
    struct run r = { 0 };
    char *tries = getenv("SM_LAB_RETRY");
    int fd;

    if (parse(&r, argc, argv)) {
        fprintf(stderr, "with-kvm: bad arguments\n");
        return OURS;
    }
    retry_command(&r);
    r.tries = tries ? atoi(tries) : 0;
    unsetenv("SM_LAB_RETRY");
    for (int i = 0; i < 3; i++)
        if (!fd_open(i) && open("/dev/null", O_RDWR) < 0)
            return OURS;
    if (r.tty < 0)
        r.tty = isatty(0) && isatty(1) && foreground();
    block_signals(&r);
    src_init(&r.in, !r.tty && isatty(0) && !foreground() ? -1 : 0, 0);
    dst_init(&r.out, 1, 1);
    dst_init(&r.err, 2, 2);
    r.in.keep = r.out.keep = r.err.keep = true;
    r.out.shared = r.err.shared = true;
    fd = lab_connect(r.socket_path);
    if (fd < 0) {
        r.link.err = -fd;
        return machine_gone(&r);
    }
    link_init(&r.link, fd);
    send_request(&r);
    if (r.tty && isatty(0))
        raw_terminal(&r);
    return loop(&r);
}
