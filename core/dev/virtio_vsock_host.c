/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-vsock: host clients; see virtio_vsock_conn.h.
 *
 * The listening socket, the CONNECT line and the deadlines. A client gets a
 * bounded line and a bounded time to say where to, and the guest a bounded
 * time to answer. Accepting pauses when descriptors run out.
 */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "dev/virtio_vsock_conn.h"

#define BACKLOG 128
#define ACCEPT_BATCH 16
#define LINE_BYTES 32                /* "CONNECT 4294967295\n" is 19 */
#define HELLO_NS 10000000000ull      /* for the CONNECT line */
#define REQUEST_NS 20000000000ull    /* for the guest's answer; it may be starved */
#define ACCEPT_PAUSE_NS 100000000ull /* after running out of descriptors */

static void set_deadline(struct sm_vsock_conn *c, uint64_t after_ns)
{
    struct sm_vsock *d = c->dev;

    c->deadline_ns = sm_io_now_ns() + after_ns;
    if (!d->timer.deadline_ns || c->deadline_ns < d->timer.deadline_ns)
        sm_io_arm(d->virtio.io, &d->timer, c->deadline_ns);
}

/* "CONNECT <port>\n" exactly. */
static bool parse_connect(const char *line, size_t len, uint32_t *port)
{
    static const char word[] = "CONNECT ";
    uint64_t value = 0;

    if (len < sizeof(word) || memcmp(line, word, sizeof(word) - 1))
        return false;
    for (size_t i = sizeof(word) - 1; i < len; i++) {
        if (!isdigit((unsigned char)line[i]))
            return false;
        value = value * 10 + (uint64_t)(line[i] - '0');
        if (value > UINT32_MAX)
            return false;
    }
    *port = (uint32_t)value;
    return true;
}

/* A host port that no stream to this guest port has. The table is smaller
 * than the range, so there is one. */
static uint32_t pick_port(struct sm_vsock *d, uint32_t guest_port)
{
    do
        d->next_port = (d->next_port + 1) | 1u << 30;
    while (d->next_port == UINT32_MAX || sm_vsock_find(d, d->next_port, guest_port));
    return d->next_port;
}

/* The client's line: look at it, and take it only when it is whole, for what
 * follows it is the stream. */
void sm_vsock_hello(struct sm_vsock_conn *c)
{
    char line[LINE_BYTES];
    ssize_t n = recv(c->fd, line, sizeof(line), MSG_PEEK | MSG_DONTWAIT);
    char *end = n > 0 ? memchr(line, '\n', (size_t)n) : NULL;

    if (!end) {
        if (n == 0 || n == (ssize_t)sizeof(line) ||
            (n < 0 && errno != EAGAIN && errno != EINTR) || c->hung_up)
            sm_vsock_free(c);
        return;
    }
    n = end - line;
    if (!parse_connect(line, (size_t)n, &c->guest_port) ||
        recv(c->fd, line, (size_t)n + 1, MSG_DONTWAIT) != n + 1) {
        sm_vsock_free(c);
        return;
    }
    c->host_port = pick_port(c->dev, c->guest_port);
    sm_vsock_hash(c);
    c->state = SM_VSOCK_REQUESTED;
    c->readable = true; /* there may be more behind the line */
    set_deadline(c, REQUEST_NS);
    sm_vsock_want(c, SM_VSOCK_REQUEST);
}

void sm_vsock_accepted(struct sm_vsock_conn *c)
{
    char line[LINE_BYTES];
    int n = snprintf(line, sizeof(line), "OK %u\n", c->host_port);

    /* The first bytes into an empty socket: all of them or the client is gone. */
    if (send(c->fd, line, (size_t)n, MSG_NOSIGNAL | MSG_DONTWAIT) != n) {
        sm_vsock_abort(c);
        return;
    }
    c->state = SM_VSOCK_OPEN;
    c->deadline_ns = 0;
    sm_vsock_ready(c);
}

static void on_accept(struct sm_io_watch *watch, uint32_t events)
{
    struct sm_vsock *d = watch->dev;

    (void)events;
    for (unsigned i = 0; i < ACCEPT_BATCH; i++) {
        int fd = accept4(d->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        struct sm_vsock_conn *c;

        if (fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM)) {
            /* It would be ready for ever: try again when some are free. */
            uint64_t at = sm_io_now_ns() + ACCEPT_PAUSE_NS;

            sm_io_unwatch(d->virtio.io, &d->listen_watch);
            if (!d->timer.deadline_ns || at < d->timer.deadline_ns)
                sm_io_arm(d->virtio.io, &d->timer, at);
        }
        if (fd < 0)
            return;
        if (!d->virtio.running) {
            close(fd); /* no driver, nobody to ask */
            continue;
        }
        c = sm_vsock_new(d, fd, SM_VSOCK_HELLO);
        if (c)
            set_deadline(c, HELLO_NS);
    }
}

static void on_timer(struct sm_io_timer *timer)
{
    struct sm_vsock *d = timer->dev;
    uint64_t now = sm_io_now_ns(), next_ns = 0;
    struct sm_vsock_conn *c = d->first, *next;

    if (d->listen_fd >= 0 && d->listen_watch.fd < 0)
        sm_io_watch(d->virtio.io, &d->listen_watch, d->listen_fd, EPOLLIN, on_accept, d);
    for (; c; c = next) {
        next = c->next;
        if (!c->deadline_ns)
            continue;
        if (c->deadline_ns <= now)
            sm_vsock_abort(c);
        else if (!next_ns || c->deadline_ns < next_ns)
            next_ns = c->deadline_ns;
    }
    if (next_ns)
        sm_io_arm(d->virtio.io, timer, next_ns);
    sm_vsock_pump(d);
}

static int start_listening(void *arg)
{
    struct sm_vsock *d = arg;

    d->timer.fn = on_timer;
    d->timer.dev = d;
    return sm_io_watch(d->virtio.io, &d->listen_watch, d->listen_fd, EPOLLIN, on_accept,
                       d);
}

/* A socket that nobody listens on any more was left by a process that died. */
static void remove_stale(const struct sockaddr_un *addr)
{
    struct stat st;
    int fd;

    if (lstat(addr->sun_path, &st) < 0 || !S_ISSOCK(st.st_mode))
        return;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return;
    if (connect(fd, (const struct sockaddr *)addr, sizeof(*addr)) < 0 &&
        errno == ECONNREFUSED)
        unlink(addr->sun_path);
    close(fd);
}

int sm_vsock_listen(struct sm_vsock *d, const char *path)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    size_t len = strlen(path);
    int fd, err;

    if (!len || len + sizeof("_4294967295") > sizeof(addr.sun_path))
        return -ENAMETOOLONG;
    memcpy(addr.sun_path, path, len + 1);
    remove_stale(&addr);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    /* Before bind, so that the socket never has a wider mode (Linux takes it
     * from here); after, for other systems. */
    fchmod(fd, 0600);
    if (bind(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        err = -errno;
        close(fd);
        return err;
    }
    if (chmod(path, 0600) < 0 || listen(fd, BACKLOG) < 0) {
        err = -errno;
        unlink(path);
        close(fd);
        return err;
    }
    memcpy(d->path, path, len + 1);
    d->listen_fd = fd;
    return sm_io_call(d->virtio.io, start_listening, d);
}

int sm_vsock_unlisten(void *arg)
{
    struct sm_vsock *d = arg;

    sm_vsock_free_all(d);
    sm_io_disarm(d->virtio.io, &d->timer);
    sm_io_unwatch(d->virtio.io, &d->listen_watch);
    if (d->listen_fd >= 0) {
        close(d->listen_fd);
        unlink(d->path);
        d->listen_fd = -1;
    }
    return 0;
}
