/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frames and credit for both ends of the lab's wire; mux.h has the picture.
 */
#define _GNU_SOURCE
#include "mux.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int set_nonblock(int fd)
{
    int flags = fcntl(fd, F_GETFL);

    return flags < 0 ? -errno : fcntl(fd, F_SETFL, flags | O_NONBLOCK);
}

int buf_add(struct buf *b, const void *data, size_t len)
{
    if (b->start && b->start + b->len + len > b->cap) {
        memmove(b->bytes, b->bytes + b->start, b->len);
        b->start = 0;
    }
    if (b->len + len > b->cap) {
        size_t cap = (b->len + len) * 2;
        char *bytes = realloc(b->bytes, cap);

        if (!bytes)
            return -ENOMEM;
        b->bytes = bytes;
        b->cap = cap;
    }
    memcpy(b->bytes + b->start + b->len, data, len);
    b->len += len;
    return 0;
}

void buf_take(struct buf *b, size_t len)
{
    b->start += len;
    b->len -= len;
    if (!b->len)
        b->start = 0;
}

void buf_free(struct buf *b)
{
    free(b->bytes);
    memset(b, 0, sizeof *b);
}

void link_init(struct link *l, int fd)
{
    memset(l, 0, sizeof *l);
    l->fd = fd;
    set_nonblock(fd);
}

void link_close(struct link *l)
{
    if (l->fd >= 0)
        close(l->fd);
    l->fd = -1;
    l->err = EPIPE;
    buf_free(&l->in);
    buf_free(&l->out);
}

void link_flush(struct link *l)
{
    while (!l->err && l->out.len) {
        ssize_t n = write(l->fd, l->out.bytes + l->out.start, l->out.len);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0)
            l->err = errno;
        else
            buf_take(&l->out, (size_t)n);
    }
}

void link_send(struct link *l, uint32_t chan, int type, int stream,
               const void *data, size_t len)
{
    struct frame f = {
        .chan = chan,
        .type = (uint8_t)type,
        .stream = (uint8_t)stream,
        .len = (uint32_t)len,
    };

    if (l->err)
        return;
    if (buf_add(&l->out, &f, sizeof f) || buf_add(&l->out, data, len)) {
        l->err = ENOMEM;
        return;
    }
    link_flush(l);
}

void link_fill(struct link *l)
{
    char chunk[CHUNK_BYTES];
    ssize_t n = read(l->fd, chunk, sizeof chunk);

    if (n > 0) {
        if (buf_add(&l->in, chunk, (size_t)n))
            l->err = ENOMEM;
    } else if (n == 0) {
        l->err = EPIPE;
    } else if (errno != EAGAIN && errno != EINTR) {
        l->err = errno;
    }
}

bool link_next(struct link *l, struct frame *f, const char **data)
{
    if (l->in.len < sizeof *f)
        return false;
    memcpy(f, l->in.bytes + l->in.start, sizeof *f);
    if (f->len > FRAME_MAX) {
        l->err = EPROTO;
        return false;
    }
    if (l->in.len < sizeof *f + f->len)
        return false;
    *data = l->in.bytes + l->in.start + sizeof *f;
    buf_take(&l->in, sizeof *f + f->len);
    return true;
}

uint32_t frame_u32(const struct frame *f, const char *data)
{
    uint32_t value = 0;

    memcpy(&value, data, f->len < sizeof value ? f->len : sizeof value);
    return value;
}

short link_events(const struct link *l)
{
    return (short)(POLLIN | (l->out.len ? POLLOUT : 0));
}

void src_init(struct src *s, int fd, int stream)
{
    s->fd = fd;
    s->keep = false;
    s->stream = (uint8_t)stream;
    s->credit = WINDOW_BYTES;
}

bool src_wants(const struct src *s)
{
    return s->fd >= 0 && s->credit > 0;
}

void src_close(struct src *s)
{
    if (s->fd >= 0 && !s->keep)
        close(s->fd);
    s->fd = -1;
}

long src_pump(struct src *s, struct link *l, uint32_t chan)
{
    char chunk[CHUNK_BYTES];
    size_t want = s->credit < sizeof chunk ? s->credit : sizeof chunk;
    ssize_t n;

    if (!src_wants(s))
        return 0;
    n = read(s->fd, chunk, want);
    if (n > 0) {
        s->credit -= (uint32_t)n;
        link_send(l, chan, F_DATA, s->stream, chunk, (size_t)n);
        return n;
    }
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    link_send(l, chan, F_EOF, s->stream, "", 0);
    src_close(s);
    return -1;
}

void dst_init(struct dst *d, int fd, int stream)
{
    memset(d, 0, sizeof *d);
    d->fd = fd;
    d->stream = (uint8_t)stream;
}

static void dst_ack(struct dst *d, struct link *l, uint32_t chan, size_t len)
{
    d->unacked += (uint32_t)len;
    if (d->unacked && (d->unacked >= WINDOW_BYTES / 4 || !d->buf.len)) {
        link_send(l, chan, F_CREDIT, d->stream, &d->unacked, sizeof d->unacked);
        d->unacked = 0;
    }
}

void dst_add(struct dst *d, struct link *l, uint32_t chan, const void *data,
             size_t len)
{
    if (d->fd < 0)
        dst_ack(d, l, chan, len);
    else if (buf_add(&d->buf, data, len))
        l->err = ENOMEM;
}

void dst_eof(struct dst *d)
{
    d->eof = true;
}

bool dst_wants(const struct dst *d)
{
    return d->fd >= 0 && (d->buf.len || d->eof);
}

void dst_close(struct dst *d)
{
    if (d->fd >= 0 && !d->keep)
        close(d->fd);
    d->fd = -1;
}

void dst_pump(struct dst *d, struct link *l, uint32_t chan)
{
    while (d->fd >= 0 && d->buf.len) {
        size_t len = d->buf.len;
        ssize_t n;

        /* A pipe that polls writable takes this much without blocking, even
         * when we may not make it non-blocking because others share it. */
        if (d->shared && len > 4096)
            len = 4096;
        n = write(d->fd, d->buf.bytes + d->buf.start, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0) {
            size_t lost = d->buf.len;

            link_send(l, chan, F_BROKEN, d->stream, "", 0);
            dst_close(d);
            buf_free(&d->buf);
            dst_ack(d, l, chan, lost);
            return;
        }
        buf_take(&d->buf, (size_t)n);
        dst_ack(d, l, chan, (size_t)n);
        if (d->shared)
            break;
    }
    if (d->fd >= 0 && d->eof && !d->buf.len) {
        if (d->socket)
            shutdown(d->fd, SHUT_WR);
        dst_close(d);
    }
}
