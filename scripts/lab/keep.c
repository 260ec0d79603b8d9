/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The keeper: one background process per lab machine. It starts QEMU, listens
 * on DIR/sock for clients, and passes their frames to labd and back (mux.h).
 * It dials the caller's loopback for the lab and listens on published ports.
 * It stops the machine when no client has been there for IDLE_SECONDS.
 *
 * One thread, one poll loop. DIR/alive is locked for as long as the keeper or
 * its QEMU lives: whoever gets that lock may clean DIR up. QEMU dies with the
 * keeper (PDEATHSIG) and the keeper ends with QEMU, so a kill -9 of either
 * leaves nothing behind but files that the next start replaces.
 */
#define _GNU_SOURCE
#include "lab.h"
#include "mux.h"
#include "relay.h"

#include <netinet/in.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BOOT_SECONDS 600 /* a busy machine boots slowly; a dead one exits */
#define STOP_SECONDS 10
#define QEMU_CHANNEL_FD 3

struct client {
    struct link link;
    uint32_t chan;
    struct buf waiting; /* frames sent before the machine was up */
    struct client *next;
};

struct publish {
    int fd;
    uint16_t outside, inside;
    struct client *owner;
    struct publish *next;
};

struct keeper {
    const char *dir;
    int idle_seconds;
    pid_t qemu;
    int listener, sigfd;
    struct link guest;
    bool ready, stopping, qemu_gone;
    uint32_t next_chan;
    time_t start, last_used, stop_at;
    struct client *clients;
    struct relays relays;
    struct publish *published;
};

static time_t seconds(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_BOOTTIME, &ts);
    return ts.tv_sec;
}

/* --- TCP --------------------------------------------------------------- */

static void send_fail(struct link *l, uint32_t chan, int err, const char *text)
{
    char data[256];
    int32_t code = err;
    int n = snprintf(data + 4, sizeof data - 4, "%s", text);

    memcpy(data, &code, 4);
    link_send(l, chan, F_FAIL, 0, data, 4 + (size_t)n);
}

/* The lab wants the caller's loopback. Our own published ports lead back
 * into the lab, where nothing listened: the answer is no. */
static void dial(struct keeper *k, uint32_t chan, uint16_t port)
{
    for (struct publish *p = k->published; p; p = p->next)
        if (p->outside == port) {
            send_fail(&k->guest, chan, ECONNREFUSED, "");
            return;
        }
    relays_dial(&k->relays, chan, port, 0);
}

static void publish(struct keeper *k, struct client *c, const struct frame *f,
                    const char *data)
{
    struct publish *p = calloc(1, sizeof *p);
    struct sockaddr_in addr;
    int one = 1;

    if (!p || f->len < 4) {
        free(p);
        return;
    }
    memcpy(&p->outside, data, 2);
    memcpy(&p->inside, data + 2, 2);
    p->owner = c;
    p->fd = loopback_socket(p->outside, &addr);
    setsockopt(p->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (p->fd < 0 || bind(p->fd, (struct sockaddr *)&addr, sizeof addr) ||
        listen(p->fd, 64)) {
        char text[64];

        snprintf(text, sizeof text, "cannot publish port %u", p->outside);
        send_fail(&c->link, 0, errno, text);
        if (p->fd >= 0)
            close(p->fd);
        free(p);
        return;
    }
    p->next = k->published;
    k->published = p;
}

static void publish_accept(struct keeper *k, struct publish *p)
{
    int fd = accept4(p->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    uint32_t chan = k->next_chan;

    if (fd < 0)
        return;
    k->next_chan += 2;
    link_send(&k->guest, chan, F_CONNECT, 0, &p->inside, sizeof p->inside);
    relays_add(&k->relays, fd, chan, true);
}

/* --- frames ------------------------------------------------------------ */

static void begin_stop(struct keeper *k, bool power_cut)
{
    char path[512];

    if (k->stopping)
        return;
    /* From here on a new caller finds no socket and starts a new machine. */
    snprintf(path, sizeof path, "%s/sock", k->dir);
    unlink(path);
    close(k->listener);
    k->listener = -1;
    k->stopping = true;
    k->stop_at = seconds() + STOP_SECONDS;
    if (!power_cut) {
        /* Its disk is scratch; only a power cut leaves it to look at. */
        snprintf(path, sizeof path, "%s/disk.img", k->dir);
        unlink(path);
    }
    if (power_cut || !k->ready)
        kill(k->qemu, SIGKILL);
    else
        link_send(&k->guest, 0, F_STOP, 0, "", 0);
}

static void status(struct keeper *k, struct client *c)
{
    char text[512];
    int n, clients = -1, relays = 0;

    for (struct client *p = k->clients; p; p = p->next)
        clients++;
    for (struct relay *r = k->relays.first; r; r = r->next)
        relays++;
    n = snprintf(text, sizeof text,
                 "%s: %s, qemu pid %d, up %ld s, %d commands, %d connections\n",
                 k->dir, k->ready ? "ready" : "booting", (int)k->qemu,
                 (long)(seconds() - k->start), clients, relays);
    link_send(&c->link, 0, F_TEXT, 0, text, (size_t)n);
    link_flush(&c->link);
    c->link.err = EPIPE;
}

static void send_clock(struct keeper *k)
{
    struct timespec ts;
    int64_t ns;

    clock_gettime(CLOCK_REALTIME, &ts);
    ns = ts.tv_sec * 1000000000ll + ts.tv_nsec;
    link_send(&k->guest, 0, F_CLOCK, 0, &ns, sizeof ns);
}

static void client_frame(struct keeper *k, struct client *c, struct frame *f,
                         const char *data)
{
    switch (f->type) {
    case F_STOP:
    case F_KILL:
        begin_stop(k, f->type == F_KILL);
        break;
    case F_STATUS:
        status(k, c);
        break;
    case F_PUBLISH:
        publish(k, c, f, data);
        break;
    default:
        f->chan = c->chan;
        if (k->ready && f->type == F_OPEN)
            send_clock(k);
        if (k->ready)
            link_send(&k->guest, c->chan, f->type, f->stream, data, f->len);
        else if (buf_add(&c->waiting, f, sizeof *f) ||
                 buf_add(&c->waiting, data, f->len))
            c->link.err = ENOMEM;
        break;
    }
}

static void guest_ready(struct keeper *k)
{
    k->ready = true;
    send_clock(k);
    for (struct client *c = k->clients; c; c = c->next) {
        if (buf_add(&k->guest.out, c->waiting.bytes + c->waiting.start,
                    c->waiting.len))
            k->guest.err = ENOMEM;
        buf_free(&c->waiting);
    }
    link_flush(&k->guest);
}

static void guest_frame(struct keeper *k, const struct frame *f,
                        const char *data)
{
    struct client *c = k->clients;

    if (f->type == F_READY) {
        guest_ready(k);
        return;
    }
    if (f->type == F_DIAL) {
        dial(k, f->chan, (uint16_t)frame_u32(f, data));
        return;
    }
    while (c && c->chan != f->chan)
        c = c->next;
    if (c)
        link_send(&c->link, f->chan, f->type, f->stream, data, f->len);
    else
        relays_frame(&k->relays, f, data);
}

/* --- clients ----------------------------------------------------------- */

static void client_accept(struct keeper *k)
{
    int fd = accept4(k->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    struct client *c = fd < 0 ? NULL : calloc(1, sizeof *c);

    if (!c) {
        if (fd >= 0)
            close(fd);
        return;
    }
    link_init(&c->link, fd);
    c->chan = k->next_chan;
    k->next_chan += 2;
    c->next = k->clients;
    k->clients = c;
}

static void client_free(struct keeper *k, struct client *c)
{
    for (struct publish **at = &k->published; *at;) {
        struct publish *p = *at;

        if (p->owner != c) {
            at = &p->next;
            continue;
        }
        *at = p->next;
        close(p->fd);
        free(p);
    }
    if (k->ready)
        link_send(&k->guest, c->chan, F_CLOSE, 0, "", 0);
    link_close(&c->link);
    buf_free(&c->waiting);
    free(c);
}

static void clients_turn(struct keeper *k)
{
    for (struct client **at = &k->clients; *at;) {
        struct client *c = *at;
        struct frame f;
        const char *data;

        link_flush(&c->link);
        if (!c->link.err)
            link_fill(&c->link);
        while (link_next(&c->link, &f, &data))
            client_frame(k, c, &f, data);
        if (c->link.err) {
            *at = c->next;
            client_free(k, c);
        } else {
            at = &c->next;
        }
        k->last_used = seconds();
    }
}

/* --- the loop ---------------------------------------------------------- */

static void signals(struct keeper *k)
{
    struct signalfd_siginfo info;

    while (read(k->sigfd, &info, sizeof info) > 0)
        if (info.ssi_signo == SIGTERM)
            begin_stop(k, false);
    if (waitpid(k->qemu, NULL, WNOHANG) == k->qemu)
        k->qemu_gone = true;
}

static size_t poll_fill(struct keeper *k, struct pollfd **fds)
{
    size_t n = 3, i = 0;

    for (struct client *c = k->clients; c; c = c->next)
        n++;
    n += relays_count(&k->relays);
    for (struct publish *p = k->published; p; p = p->next)
        n++;
    *fds = calloc(n, sizeof **fds);
    if (!*fds)
        return 0;
#define ADD(FD, EVENTS) (*fds)[i++] = (struct pollfd){ .fd = FD, .events = EVENTS }
    ADD(k->listener, POLLIN);
    ADD(k->sigfd, POLLIN);
    ADD(k->guest.fd, link_events(&k->guest));
    for (struct client *c = k->clients; c; c = c->next)
        ADD(c->link.fd, link_events(&c->link));
    i += relays_poll(&k->relays, *fds + i);
    for (struct publish *p = k->published; p; p = p->next)
        ADD(p->fd, POLLIN);
#undef ADD
    return i;
}

static void check_clock(struct keeper *k)
{
    time_t now = seconds();

    if (k->stopping && now >= k->stop_at)
        kill(k->qemu, SIGKILL);
    else if (!k->ready && now - k->start > BOOT_SECONDS)
        kill(k->qemu, SIGKILL);
    else if (!k->clients && now - k->last_used >= k->idle_seconds)
        begin_stop(k, false);
}

static void turn(struct keeper *k)
{
    struct pollfd *fds;
    size_t n = poll_fill(k, &fds);
    struct frame f;
    const char *data;

    poll(fds, n, 1000);
    signals(k);
    if (poll_revents(fds, n, k->listener) & POLLIN)
        client_accept(k);
    for (struct publish *p = k->published; p; p = p->next)
        if (poll_revents(fds, n, p->fd) & POLLIN)
            publish_accept(k, p);
    link_flush(&k->guest);
    link_fill(&k->guest);
    while (link_next(&k->guest, &f, &data))
        guest_frame(k, &f, data);
    relays_turn(&k->relays, fds, n);
    clients_turn(k);
    check_clock(k);
    free(fds);
}

/* --- start ------------------------------------------------------------- */

static int listen_at(const char *path)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd < 0 || strlen(path) >= sizeof addr.sun_path)
        return -ENAMETOOLONG;
    strcpy(addr.sun_path, path);
    unlink(path);
    if (bind(fd, (struct sockaddr *)&addr, sizeof addr) || listen(fd, 256)) {
        int err = -errno;

        close(fd);
        return err;
    }
    return fd;
}

static pid_t start_qemu(char **argv, int channel)
{
    pid_t parent = getpid();
    pid_t pid = fork();

    if (pid)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
    if (channel == QEMU_CHANNEL_FD)
        fcntl(channel, F_SETFD, 0);
    else
        dup2(channel, QEMU_CHANNEL_FD);
    execvp(argv[0], argv);
    perror(argv[0]);
    _exit(127);
}

static void own_stdio(const char *dir)
{
    char path[512];
    int log, null = open("/dev/null", O_RDWR);

    snprintf(path, sizeof path, "%s/keeper.log", dir);
    log = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600);
    dup2(null, 0);
    dup2(log, 1);
    dup2(log, 2);
    close_range(3, ~0u, 0);
}

static int keep(struct keeper *k, char **qemu_argv)
{
    char path[512];
    sigset_t mask, old;
    int pair[2], alive;

    snprintf(path, sizeof path, "%s/alive", k->dir);
    alive = open(path, O_RDWR | O_CREAT, 0600);
    if (alive < 0 || flock(alive, LOCK_EX | LOCK_NB))
        return 1;
    /* Out of the way of QEMU_CHANNEL_FD; inherited by QEMU on purpose. */
    if (fcntl(alive, F_DUPFD, 16) < 0)
        return 1;
    close(alive);
    snprintf(path, sizeof path, "%s/sock", k->dir);
    k->listener = listen_at(path);
    if (k->listener < 0 ||
        socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
        return 1;
    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    sigaddset(&mask, SIGTERM);
    sigaddset(&mask, SIGPIPE);
    k->qemu = start_qemu(qemu_argv, pair[1]);
    close(pair[1]);
    sigprocmask(SIG_BLOCK, &mask, &old);
    k->sigfd = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
    link_init(&k->guest, pair[0]);
    k->relays.link = &k->guest;
    k->start = k->last_used = seconds();
    k->next_chan = 1;
    while (!k->qemu_gone)
        turn(k);
    for (struct client *c = k->stopping ? NULL : k->clients; c; c = c->next)
        send_fail(&c->link, c->chan, EIO, "the lab machine died (--console)");
    begin_stop(k, true);
    return 0;
}

/*
 * The parent returns when the socket is there (or will never be). A pipe
 * tells: the child's end closes when keep() has begun or failed.
 */
int keep_main(int argc, char **argv)
{
    struct keeper k = { .listener = -1 };
    char path[512];
    pid_t pid;

    if (argc < 4 || strcmp(argv[2], "--"))
        return 125;
    k.dir = argv[0];
    k.idle_seconds = atoi(argv[1]);
    pid = fork();
    if (!pid) {
        setsid();
        if (fork())
            _exit(0);
        own_stdio(k.dir);
        if (chdir("/"))
            _exit(1);
        _exit(keep(&k, argv + 3));
    }
    waitpid(pid, NULL, 0);
    snprintf(path, sizeof path, "%s/sock", k.dir);
    for (int i = 0; i < 500; i++) {
        int fd = lab_connect(path);

        if (fd >= 0) {
            close(fd);
            return 0;
        }
        usleep(10000);
    }
    return 1;
}
