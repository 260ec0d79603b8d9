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
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "dev/virtio_vsock_conn.h"

#define WANT_MIN 8192u
#define TELL_BYTES (SM_VSOCK_BUF_BYTES / 4) /* the guest hears of each such step */

static void on_socket(struct sm_io_watch *watch, uint32_t events);

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

void sm_vsock_hash(struct sm_vsock_conn *c)
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

struct sm_vsock_conn *sm_vsock_new(struct sm_vsock *d, int fd, enum sm_vsock_state state)
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
    c = sm_vsock_new(d, fd, SM_VSOCK_OPEN);
    if (!c)
        return -ENOBUFS;
    c->host_port = host_port;
    c->guest_port = guest_port;
    sm_vsock_hash(c);
    *out = c;
    return 0;
}

/* Events */

static void socket_event(struct sm_vsock_conn *c, uint32_t events)
{
    if (events & (EPOLLHUP | EPOLLERR))
        c->hung_up = true;
    if (c->state == SM_VSOCK_HELLO) {
        sm_vsock_hello(c);
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
