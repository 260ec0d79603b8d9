/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frames over a stream socket; net.h has the format.
 *
 * Out: a large frame by a sendmsg of its own, straight from the guest's buffers;
 * small ones are gathered in `out` until the batch ends. What the socket does not
 * take is copied there too, and nothing else is taken until it is gone. In: as
 * much as there is, into a buffer of several frames; a frame that the guest has no
 * room for stays there and the socket is not read, so the peer feels it.
 *
 * The peer is trusted no more than the guest: a length out of bounds ends the
 * connection, and the device lives on with nothing attached.
 *
 * Threads: the device's I/O thread.
 */
#include "dev/net.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define LENGTH_BYTES 4
#define FRAME_ROOM (LENGTH_BYTES + SM_NET_HDR_BYTES + SM_NET_MAX_FRAME)
#define IN_BYTES (4 * FRAME_ROOM)
#define TURNS 16 /* reads before others of the thread have a turn */
#define MAX_IOV 260
#define SMALL_BYTES 2048 /* copied: cheaper than a call of the kernel */

struct stream {
    struct sm_net net;
    int fd; /* -1: gone */
    bool vnet;
    bool started, blocked; /* blocked: rx said no */
    bool full;             /* the socket said no */
    uint32_t events;       /* what the watch asks for; 0: it is not there */
    struct sm_io_watch watch;
    size_t in_at, in_len; /* of in: bytes not yet delivered */
    size_t out_at, out_len;
    uint8_t in[IN_BYTES], out[FRAME_ROOM + 2 * LENGTH_BYTES];
};

static void on_event(struct sm_io_watch *watch, uint32_t events);

static uint32_t get_be32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static void put_be32(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)(v >> 24);
    p[1] = (uint8_t)(v >> 16);
    p[2] = (uint8_t)(v >> 8);
    p[3] = (uint8_t)v;
}

static void hang_up(struct stream *s, const char *why)
{
    if (s->fd < 0)
        return;
    sm_io_unwatch(s->net.io, &s->watch);
    s->events = 0;
    close(s->fd);
    s->fd = -1;
    s->in_len = s->out_len = 0;
    s->full = false;
    s->net.port.gone(s->net.port.dev, why);
}

/* Listen for what can be made use of. */
static void rearm(struct stream *s)
{
    uint32_t want = (s->started && !s->blocked ? EPOLLIN : 0) |
                    (s->started && s->full ? EPOLLOUT : 0);
    int err = 0;

    if (s->fd < 0 || want == s->events)
        return;
    /* Without events it would still report a hang-up, again and again. */
    if (!want)
        sm_io_unwatch(s->net.io, &s->watch);
    else if (!s->events)
        err = sm_io_watch(s->net.io, &s->watch, s->fd, want, on_event, s);
    else
        err = sm_io_rearm(s->net.io, &s->watch, want);
    s->events = want;
    if (err) {
        s->events = 0;
        hang_up(s, "cannot watch the socket");
    }
}

/* ---- guest → peer ---- */

/* False: the socket is full, or gone. rearm follows. */
static bool flush_out(struct stream *s)
{
    s->full = false;
    while (s->out_len) {
        ssize_t n = send(s->fd, s->out + s->out_at, s->out_len, MSG_NOSIGNAL | MSG_DONTWAIT);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            if (errno == EAGAIN)
                s->full = true;
            else
                hang_up(s, "the network process went away");
            return false;
        }
        s->out_at += (size_t)n;
        s->out_len -= (size_t)n;
    }
    s->out_at = 0;
    return true;
}

/* Keep what is behind the first `done` bytes of a message. */
static void keep_rest(struct stream *s, struct iovec *iov, unsigned n, size_t done)
{
    for (unsigned i = 0; i < n; i++) {
        size_t skip = done < iov[i].iov_len ? done : iov[i].iov_len;
        size_t len = iov[i].iov_len - skip;

        done -= skip;
        memcpy(s->out + s->out_at + s->out_len, (uint8_t *)iov[i].iov_base + skip, len);
        s->out_len += len;
    }
}

static int stream_tx(struct sm_net *net, const struct iovec *iov, unsigned n, size_t bytes)
{
    struct stream *s = (struct stream *)net;
    uint8_t length[LENGTH_BYTES];
    struct iovec all[MAX_IOV] = { { length, sizeof(length) } };
    unsigned skip = s->vnet ? 0 : 1; /* the header stays here */
    struct msghdr msg = { .msg_iov = all };
    size_t total = sizeof(length) + bytes - (skip ? SM_NET_HDR_BYTES : 0);
    bool small = total <= SMALL_BYTES;
    ssize_t sent;

    if (s->fd < 0 || n - skip + 1 > MAX_IOV)
        return 0;
    if (!s->full && s->out_len && (!small || s->out_len + total > FRAME_ROOM) && !flush_out(s))
        rearm(s);
    if (s->full)
        return -EAGAIN;
    if (s->fd < 0)
        return 0;
    put_be32(length, (uint32_t)(total - sizeof(length)));
    memcpy(all + 1, iov + skip, (n - skip) * sizeof(*iov));
    msg.msg_iovlen = n - skip + 1;
    if (small) {
        keep_rest(s, all, (unsigned)msg.msg_iovlen, 0);
        return 0;
    }
    do
        sent = sendmsg(s->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (sent < 0 && errno == EINTR);
    if (sent < 0 && errno == EAGAIN)
        sent = 0;
    if (sent < 0) {
        hang_up(s, "the network process went away");
        return 0;
    }
    if ((size_t)sent < total) {
        keep_rest(s, all, (unsigned)msg.msg_iovlen, (size_t)sent);
        s->full = true;
        rearm(s);
    }
    return 0;
}

static void stream_tx_done(struct sm_net *net)
{
    struct stream *s = (struct stream *)net;

    if (s->fd >= 0 && s->out_len && !s->full && !flush_out(s))
        rearm(s);
}

/* ---- peer → guest ---- */

/* One frame at the head of in. 1: delivered; 0: incomplete; -1: stop. */
static int deliver(struct stream *s)
{
    const uint8_t *p = s->in + s->in_at;
    size_t head = s->vnet ? SM_NET_HDR_BYTES : 0;
    struct sm_net_hdr hdr = { 0 };
    uint32_t len;

    if (s->in_len < LENGTH_BYTES)
        return 0;
    len = get_be32(p);
    if (len < head + SM_NET_MIN_FRAME || len > head + SM_NET_MAX_FRAME) {
        hang_up(s, "the network process sent a frame of a bad length");
        return -1;
    }
    if (s->in_len < LENGTH_BYTES + len)
        return 0;
    memcpy(&hdr, p + LENGTH_BYTES, head);
    if (!s->net.port.rx(s->net.port.dev, &hdr, p + LENGTH_BYTES + head, len - head)) {
        s->blocked = true;
        return -1;
    }
    s->in_at += LENGTH_BYTES + len;
    s->in_len -= LENGTH_BYTES + len;
    return 1;
}

static void deliver_all(struct stream *s)
{
    int r;

    do
        r = deliver(s);
    while (r > 0);
    s->net.port.flush(s->net.port.dev);
}

static void read_in(struct stream *s)
{
    for (unsigned turn = 0; turn < TURNS && !s->blocked && s->fd >= 0; turn++) {
        size_t room;
        ssize_t n;

        if (!s->in_len)
            s->in_at = 0;
        /* A whole frame must fit behind what is there. */
        if (s->in_at + s->in_len + FRAME_ROOM > sizeof(s->in)) {
            memmove(s->in, s->in + s->in_at, s->in_len);
            s->in_at = 0;
        }
        room = sizeof(s->in) - s->in_at - s->in_len;
        n = recv(s->fd, s->in + s->in_at + s->in_len, room, MSG_DONTWAIT);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n <= 0) {
            hang_up(s, "the network process went away");
            return;
        }
        s->in_len += (size_t)n;
        deliver_all(s);
    }
}

static void on_event(struct sm_io_watch *watch, uint32_t events)
{
    struct stream *s = watch->dev;

    if (events & EPOLLOUT && flush_out(s))
        s->net.port.writable(s->net.port.dev);
    if (s->fd >= 0 && events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        read_in(s);
    rearm(s);
}

static void stream_pull(struct sm_net *net)
{
    struct stream *s = (struct stream *)net;

    if (!s->blocked || s->fd < 0)
        return;
    s->blocked = false;
    deliver_all(s);
    rearm(s);
}

/* ---- life ---- */

static void stream_start(struct sm_net *net, unsigned offloads)
{
    struct stream *s = (struct stream *)net;

    s->started = true;
    s->blocked = true; /* the kick that follows a start pulls */
    if (s->fd >= 0 && s->vnet) {
        /* Behind what is still on its way; two of these fit `out`. */
        uint8_t *p = s->out + s->out_at + s->out_len;

        if (s->out_at + s->out_len + 2 * LENGTH_BYTES <= sizeof(s->out)) {
            put_be32(p, 4);
            for (unsigned i = 0; i < 4; i++)
                p[LENGTH_BYTES + i] = (uint8_t)(offloads >> (8 * i));
            s->out_len += 2 * LENGTH_BYTES;
            flush_out(s);
        }
    }
    rearm(s);
}

static void stream_stop(struct sm_net *net)
{
    struct stream *s = (struct stream *)net;

    s->started = false;
    rearm(s);
}

static void stream_destroy(struct sm_net *net)
{
    struct stream *s = (struct stream *)net;

    if (s->fd >= 0)
        close(s->fd);
    free(s);
}

static const struct sm_net_ops stream_ops = {
    .type = "stream",
    .start = stream_start,
    .stop = stream_stop,
    .tx = stream_tx,
    .tx_done = stream_tx_done,
    .pull = stream_pull,
    .destroy = stream_destroy,
};

int sm_net_stream_create(int fd, bool vnet, unsigned offloads, struct sm_net **out)
{
    struct stream *s = calloc(1, sizeof(*s));

    if (!s)
        return -ENOMEM;
    s->net.ops = &stream_ops;
    s->net.offloads = vnet ? offloads : 0;
    s->fd = fd;
    s->vnet = vnet;
    s->watch.fd = -1;
    *out = &s->net;
    return 0;
}

int sm_net_stream_connect(const char *path, bool vnet, unsigned offloads, struct sm_net **out)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    size_t len = strlen(path);
    int fd, err;

    if (len >= sizeof(addr.sun_path))
        return -ENAMETOOLONG;
    memcpy(addr.sun_path, path, len + 1);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    if (connect(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0)
        err = -errno;
    else
        err = sm_net_stream_create(fd, vnet, offloads, out);
    if (err)
        close(fd);
    return err;
}
