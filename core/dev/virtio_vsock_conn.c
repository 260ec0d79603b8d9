/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-vsock: the unix sockets; see virtio_vsock_conn.h.
 *
 * A socket is watched once, edge-triggered, for everything; `readable` and
 * `writable` hold from an edge to the next EAGAIN, so neither a stalled guest
 * nor a stalled host costs a system call. The end of a direction on the host's
 * side is found by reading it to its end (0) or by writing (EPIPE), and told
 * to the guest as SHUTDOWN; only EPOLLHUP tells a close from a half-close, and
 * even then all that was written before is delivered first.
 */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
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
#define WANT_MIN 8192u
#define TELL_BYTES (SM_VSOCK_BUF_BYTES / 4) /* the guest hears of each such step */

static void on_socket(struct sm_io_watch *watch, uint32_t events);
static void on_timer(struct sm_io_timer *timer);

/* The table */

static struct sm_vsock_conn **bucket(struct sm_vsock *d, uint32_t host_port,
                                     uint32_t guest_port)
{
    uint32_t h = host_port * 0x9e3779b1u ^ guest_port * 0x85ebca6bu;

    return &d->buckets[(h >> 16) % SM_VSOCK_BUCKETS];
}

struct sm_vsock_conn *sm_vsock_find(struct sm_vsock *d, uint32_t host_port,
                                    uint32_t guest_port)
{
    struct sm_vsock_conn *c = *bucket(d, host_port, guest_port);

    while (c && (c->host_port != host_port || c->guest_port != guest_port))
        c = c->next_in_bucket;
    return c;
}

static void hash(struct sm_vsock_conn *c)
{
    struct sm_vsock_conn **at = bucket(c->dev, c->host_port, c->guest_port);

    c->next_in_bucket = *at;
    *at = c;
    c->hashed = true;
}

static void unhash(struct sm_vsock_conn *c)
{
    struct sm_vsock_conn **at = bucket(c->dev, c->host_port, c->guest_port);

    if (!c->hashed)
        return;
    while (*at != c)
        at = &(*at)->next_in_bucket;
    *at = c->next_in_bucket;
    c->hashed = false;
}

void sm_vsock_unready(struct sm_vsock_conn *c)
{
    struct sm_vsock *d = c->dev;

    if (!c->queued)
        return;
    *(c->prev_ready ? &c->prev_ready->next_ready : &d->ready_first) = c->next_ready;
    *(c->next_ready ? &c->next_ready->prev_ready : &d->ready_last) = c->prev_ready;
    c->queued = false;
}

uint32_t sm_vsock_credit(const struct sm_vsock_conn *c)
{
    uint32_t on_the_way = c->sent - c->peer_fwd;

    /* A guest whose numbers make no sense has no room. */
    return on_the_way < c->peer_alloc ? c->peer_alloc - on_the_way : 0;
}

bool sm_vsock_can_read(const struct sm_vsock_conn *c)
{
    return c->state == SM_VSOCK_OPEN && c->readable && !(c->shut & SM_VSOCK_SHUT_SEND) &&
           !c->guest_reads_no_more;
}

void sm_vsock_ready(struct sm_vsock_conn *c)
{
    struct sm_vsock *d = c->dev;

    if (c->queued)
        return;
    if (!c->pending && !(sm_vsock_can_read(c) && (sm_vsock_credit(c) || !c->asked)))
        return;
    c->prev_ready = d->ready_last;
    c->next_ready = NULL;
    *(d->ready_last ? &d->ready_last->next_ready : &d->ready_first) = c;
    d->ready_last = c;
    c->queued = true;
}

void sm_vsock_want(struct sm_vsock_conn *c, enum sm_vsock_op op)
{
    c->pending |= 1u << op;
    sm_vsock_ready(c);
}

static void close_socket(struct sm_vsock_conn *c)
{
    sm_io_unwatch(c->dev->virtio.io, &c->watch);
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    c->readable = c->writable = false;
}

void sm_vsock_free(struct sm_vsock_conn *c)
{
    struct sm_vsock *d = c->dev;

    close_socket(c);
    unhash(c);
    sm_vsock_unready(c);
    *(c->prev ? &c->prev->next : &d->first) = c->next;
    if (c->next)
        c->next->prev = c->prev;
    d->count--;
    free(c->buf);
    free(c);
}

void sm_vsock_free_all(struct sm_vsock *d)
{
    while (d->first)
        sm_vsock_free(d->first);
}

/* When the table is full, a stream that only waits for the guest's last word
 * makes room. */
static void make_room(struct sm_vsock *d)
{
    struct sm_vsock_conn *c = d->first, *oldest = NULL;

    for (; c; c = c->next)
        if (c->state == SM_VSOCK_CLOSING)
            oldest = c; /* new ones go to the front */
    if (oldest)
        sm_vsock_abort(oldest);
}

/* A connection around fd, which it closes even when it fails. */
static struct sm_vsock_conn *new_conn(struct sm_vsock *d, int fd,
                                      enum sm_vsock_state state)
{
    int bytes = 1 << 20;
    struct sm_vsock_conn *c = NULL;

    if (d->count >= SM_VSOCK_CONNS)
        make_room(d);
    if (d->count < SM_VSOCK_CONNS)
        c = calloc(1, sizeof(*c));
    if (!c) {
        close(fd);
        return NULL;
    }
    c->dev = d;
    c->state = state;
    c->fd = fd;
    c->watch.fd = -1;
    c->want = WANT_MIN;
    c->writable = true;
    c->next = d->first;
    if (c->next)
        c->next->prev = c;
    d->first = c;
    d->count++;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes)); /* a wish */
    if (sm_io_watch(d->virtio.io, &c->watch, fd,
                    EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, on_socket, c)) {
        sm_vsock_free(c);
        return NULL;
    }
    return c;
}

/* The end of a stream */

void sm_vsock_abort(struct sm_vsock_conn *c)
{
    /* A guest that was never asked knows nothing to forget. */
    if (c->hashed && (c->state != SM_VSOCK_REQUESTED || c->request_sent))
        sm_vsock_reset_later(c->dev, c->host_port, c->guest_port, SM_VSOCK_TYPE_STREAM);
    sm_vsock_free(c);
}

void sm_vsock_guest_gone(struct sm_vsock_conn *c)
{
    if (!c->buf_count || c->fd < 0) {
        sm_vsock_free(c);
        return;
    }
    unhash(c); /* the guest may use the port again */
    sm_vsock_unready(c);
    c->pending = 0;
    c->state = SM_VSOCK_LINGER;
}

void sm_vsock_closing(struct sm_vsock_conn *c)
{
    close_socket(c);
    c->state = SM_VSOCK_CLOSING;
    c->pending = 0;
}

/* The host's end will not send (SHUT_SEND) or not read (SHUT_RCV) any more. */
static void host_shut(struct sm_vsock_conn *c, unsigned flags)
{
    if (flags & SM_VSOCK_SHUT_RCV) {
        c->forwarded += (uint32_t)c->buf_count; /* dropped */
        c->buf_count = 0;
    }
    if (c->state != SM_VSOCK_OPEN || (c->shut | flags) == c->shut)
        return;
    c->shut |= flags;
    sm_vsock_want(c, SM_VSOCK_SHUTDOWN);
}

/* Host to guest */

size_t sm_vsock_read(struct sm_vsock_conn *c, const struct iovec *iov, unsigned count)
{
    size_t asked = 0;
    ssize_t n;

    for (unsigned i = 0; i < count; i++)
        asked += iov[i].iov_len;
    do
        n = readv(c->fd, iov, (int)count);
    while (n < 0 && errno == EINTR);
    if (n > 0) {
        /* Ask for as much as comes, so that few buffers are handled twice. */
        if ((size_t)n == c->want && c->want < SM_VSOCK_BUF_BYTES)
            c->want *= 2;
        else if ((size_t)n < asked && (size_t)n < c->want / 4 && c->want > WANT_MIN)
            c->want /= 2;
        return (size_t)n;
    }
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
        c->readable = false;
        return 0;
    }
    if (n < 0)
        c->hung_up = true;
    host_shut(c, c->hung_up ? SM_VSOCK_SHUT_BOTH : SM_VSOCK_SHUT_SEND);
    return 0;
}

/* Guest to host */

/* Bytes have left for the host: say so, now and then. */
static void passed_on(struct sm_vsock_conn *c, size_t bytes)
{
    c->forwarded += (uint32_t)bytes;
    if (c->state == SM_VSOCK_OPEN && c->forwarded - c->told >= TELL_BYTES)
        sm_vsock_want(c, SM_VSOCK_CREDIT_UPDATE);
}

/* One sendmsg; how much went, 0 when nothing goes now. */
static size_t send_some(struct sm_vsock_conn *c, struct iovec *iov, unsigned count)
{
    struct msghdr msg = { .msg_iov = iov, .msg_iovlen = count };
    ssize_t n;

    do
        n = sendmsg(c->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    if (n >= 0)
        return (size_t)n;
    c->writable = false;
    if (errno != EAGAIN && errno != EWOULDBLOCK)
        host_shut(c, c->hung_up ? SM_VSOCK_SHUT_BOTH : SM_VSOCK_SHUT_RCV);
    return 0;
}

/* The rest of a payload into the ring. Credit has seen to the room. */
static int buffer(struct sm_vsock_conn *c, const struct iovec *iov, unsigned count)
{
    if (!c->buf)
        c->buf = malloc(SM_VSOCK_BUF_BYTES);
    if (!c->buf)
        return -ENOMEM;
    for (unsigned i = 0; i < count; i++) {
        const uint8_t *from = iov[i].iov_base;
        size_t len = iov[i].iov_len;

        while (len) {
            size_t tail = (c->buf_head + c->buf_count) % SM_VSOCK_BUF_BYTES;
            size_t part = SM_VSOCK_BUF_BYTES - tail;

            if (part > len)
                part = len;
            memcpy(c->buf + tail, from, part);
            c->buf_count += part;
            from += part;
            len -= part;
        }
    }
    return 0;
}

/* Cut the iovecs to len bytes; returns how many are left. */
static unsigned trim(struct iovec *iov, unsigned count, size_t len)
{
    unsigned i = 0;

    for (; i < count && len; i++) {
        if (iov[i].iov_len > len)
            iov[i].iov_len = len;
        len -= iov[i].iov_len;
    }
    return i;
}

int sm_vsock_write(struct sm_vsock_conn *c, struct iovec *iov, unsigned count, size_t len)
{
    if (len > SM_VSOCK_BUF_BYTES - (c->received - c->forwarded))
        return -EPROTO;
    c->received += (uint32_t)len;
    count = trim(iov, count, len);
    while (len && !c->buf_count && c->writable) {
        size_t n = send_some(c, iov, count);

        count = sm_iov_skip(&iov, count, n);
        len -= n;
        passed_on(c, n);
    }
    if (c->shut & SM_VSOCK_SHUT_RCV) {
        passed_on(c, len); /* nobody reads it; the guest hears so by SHUTDOWN */
        return 0;
    }
    return len ? buffer(c, iov, count) : 0;
}

/* The guest has sent all, and the host has it. */
static void finish_sending(struct sm_vsock_conn *c)
{
    if (c->buf_count)
        return;
    free(c->buf);
    c->buf = NULL;
    if (c->state == SM_VSOCK_OPEN && c->guest_sent_all)
        shutdown(c->fd, SHUT_WR);
}

static void flush_buffer(struct sm_vsock_conn *c)
{
    while (c->buf_count && c->writable) {
        size_t part = SM_VSOCK_BUF_BYTES - c->buf_head;
        struct iovec iov[2];
        size_t n;

        if (part > c->buf_count)
            part = c->buf_count;
        iov[0] = (struct iovec){ c->buf + c->buf_head, part };
        iov[1] = (struct iovec){ c->buf, c->buf_count - part };
        n = send_some(c, iov, iov[1].iov_len ? 2 : 1);
        if (!n)
            break;
        c->buf_head = (c->buf_head + n) % SM_VSOCK_BUF_BYTES;
        c->buf_count -= n;
        passed_on(c, n);
    }
    if (!c->buf_count && c->buf)
        finish_sending(c);
}

void sm_vsock_guest_shutdown(struct sm_vsock_conn *c, uint32_t flags)
{
    if (flags & SM_VSOCK_SHUT_RCV)
        c->guest_reads_no_more = true;
    if (flags & SM_VSOCK_SHUT_SEND)
        c->guest_sent_all = true;
    if (c->guest_reads_no_more && c->guest_sent_all) {
        /* 5.10.6.5: a RST confirms, at once; the host's end may be slow. */
        sm_vsock_reset_later(c->dev, c->host_port, c->guest_port, SM_VSOCK_TYPE_STREAM);
        sm_vsock_guest_gone(c);
        return;
    }
    if (c->state != SM_VSOCK_OPEN)
        return;
    if (c->guest_reads_no_more)
        shutdown(c->fd, SHUT_RD);
    if (c->guest_sent_all)
        finish_sending(c);
}

/* Opening */

int sm_vsock_open(struct sm_vsock *d, uint32_t host_port, uint32_t guest_port,
                  struct sm_vsock_conn **out)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    struct sm_vsock_conn *c;
    int fd, n;

    if (d->listen_fd < 0)
        return -ECONNREFUSED;
    n = snprintf(addr.sun_path, sizeof(addr.sun_path), "%s_%u", d->path, host_port);
    if (n < 0 || (size_t)n >= sizeof(addr.sun_path))
        return -ENAMETOOLONG;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    if (connect(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        n = -errno; /* a unix socket connects at once, or its backlog is full */
        close(fd);
        return n;
    }
    c = new_conn(d, fd, SM_VSOCK_OPEN);
    if (!c)
        return -ENOBUFS;
    c->host_port = host_port;
    c->guest_port = guest_port;
    hash(c);
    *out = c;
    return 0;
}

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
static void read_hello(struct sm_vsock_conn *c)
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
    hash(c);
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

/* Events */

static void socket_event(struct sm_vsock_conn *c, uint32_t events)
{
    if (events & (EPOLLHUP | EPOLLERR))
        c->hung_up = true;
    if (c->state == SM_VSOCK_HELLO) {
        read_hello(c);
        return;
    }
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        c->readable = true;
    if (events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) {
        c->writable = true;
        flush_buffer(c);
    }
    if (c->state == SM_VSOCK_LINGER && (c->hung_up || !c->buf_count)) {
        sm_vsock_free(c);
        return;
    }
    if (c->hung_up && c->state == SM_VSOCK_REQUESTED) {
        sm_vsock_abort(c);
        return;
    }
    /* Gone, and no reading will find that out. */
    if (c->hung_up && (c->guest_reads_no_more || c->shut & SM_VSOCK_SHUT_SEND))
        host_shut(c, SM_VSOCK_SHUT_BOTH);
    sm_vsock_ready(c);
}

static void on_socket(struct sm_io_watch *watch, uint32_t events)
{
    struct sm_vsock_conn *c = watch->dev;
    struct sm_vsock *d = c->dev;

    socket_event(c, events);
    sm_vsock_pump(d);
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
        c = new_conn(d, fd, SM_VSOCK_HELLO);
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

/* Listening */

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
