/* SPDX-License-Identifier: Apache-2.0 */
/* See relay.h. */
#define _GNU_SOURCE
#include "relay.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int loopback_socket(uint16_t port, struct sockaddr_in *addr)
{
    *addr = (struct sockaddr_in){
        .sin_family = AF_INET,
        .sin_port = htons(port),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    return socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
}

short poll_revents(const struct pollfd *fds, size_t n, int fd)
{
    for (size_t i = 0; i < n; i++)
        if (fds[i].fd == fd)
            return fds[i].revents;
    return 0;
}

static struct relay *add(struct relays *rs, int fd, uint32_t chan,
                         bool accepted)
{
    struct relay *r = calloc(1, sizeof *r);

    if (!r) {
        close(fd);
        link_send(rs->link, chan, F_CLOSE, 0, "", 0);
        return NULL;
    }
    set_nonblock(fd);
    r->fd = fd;
    r->chan = chan;
    src_init(&r->src, fd, accepted ? 0 : 1);
    dst_init(&r->dst, fd, accepted ? 1 : 0);
    /* The halves share the socket; it is closed with the relay. */
    r->src.keep = r->dst.keep = true;
    r->dst.socket = true;
    r->next = rs->first;
    rs->first = r;
    return r;
}

void relays_add(struct relays *rs, int fd, uint32_t chan, bool accepted)
{
    add(rs, fd, chan, accepted);
}

static void answer(struct relays *rs, uint32_t chan, int err)
{
    int32_t code = err;

    if (err)
        link_send(rs->link, chan, F_FAIL, 0, &code, sizeof code);
    else
        link_send(rs->link, chan, F_OPENED, 0, "", 0);
}

void relays_dial(struct relays *rs, uint32_t chan, uint16_t port, int mark)
{
    struct sockaddr_in addr;
    struct relay *r;
    int fd = loopback_socket(port, &addr);
    int err = fd < 0 ? errno : 0;

    if (!err && mark)
        setsockopt(fd, SOL_SOCKET, SO_MARK, &mark, sizeof mark);
    if (!err && connect(fd, (struct sockaddr *)&addr, sizeof addr))
        err = errno;
    if (err && err != EINPROGRESS) {
        if (fd >= 0)
            close(fd);
        answer(rs, chan, err);
        return;
    }
    r = add(rs, fd, chan, false);
    if (r)
        r->connecting = true;
}

void relays_frame(struct relays *rs, const struct frame *f, const char *data)
{
    struct relay *r = rs->first;

    while (r && r->chan != f->chan)
        r = r->next;
    if (!r)
        return;
    switch (f->type) {
    case F_DATA:
        dst_add(&r->dst, rs->link, r->chan, data, f->len);
        break;
    case F_EOF:
        dst_eof(&r->dst);
        break;
    case F_CREDIT:
        r->src.credit += frame_u32(f, data);
        break;
    case F_BROKEN:
        r->src.fd = -1;
        break;
    case F_CLOSE:
    case F_FAIL:
        r->aborted = true;
        break;
    default:
        break;
    }
}

size_t relays_count(const struct relays *rs)
{
    size_t n = 0;

    for (const struct relay *r = rs->first; r; r = r->next)
        n++;
    return n;
}

static short wanted(const struct relay *r)
{
    if (r->connecting)
        return POLLOUT;
    return (short)((src_wants(&r->src) ? POLLIN : 0) |
                   (dst_wants(&r->dst) ? POLLOUT : 0));
}

size_t relays_poll(const struct relays *rs, struct pollfd *fds)
{
    size_t n = 0;

    /* poll(2) reports POLLHUP unasked, so leave out who wants nothing. */
    for (const struct relay *r = rs->first; r; r = r->next)
        if (wanted(r))
            fds[n++] = (struct pollfd){ .fd = r->fd, .events = wanted(r) };
    return n;
}

/* Returns false when the relay is over. */
static bool pump(struct relays *rs, struct relay *r, short revents)
{
    if (r->aborted) {
        /* Whoever holds the other end shall see a reset, not an end. */
        struct linger hard = { .l_onoff = 1 };

        setsockopt(r->fd, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
        return false;
    }
    if (r->connecting) {
        int err = 0;
        socklen_t len = sizeof err;

        if (!revents)
            return true;
        getsockopt(r->fd, SOL_SOCKET, SO_ERROR, &err, &len);
        answer(rs, r->chan, err);
        r->connecting = false;
        return !err;
    }
    if (revents & (POLLIN | POLLHUP | POLLERR))
        src_pump(&r->src, rs->link, r->chan);
    dst_pump(&r->dst, rs->link, r->chan);
    return r->src.fd >= 0 || r->dst.fd >= 0;
}

void relays_turn(struct relays *rs, const struct pollfd *fds, size_t n)
{
    for (struct relay **at = &rs->first; *at;) {
        struct relay *r = *at;

        if (pump(rs, r, poll_revents(fds, n, r->fd))) {
            at = &r->next;
            continue;
        }
        *at = r->next;
        close(r->fd);
        buf_free(&r->dst.buf);
        free(r);
    }
}
