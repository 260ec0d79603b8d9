/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Another program's unix socket: plain frames behind their length (u32,
 * big-endian), as QEMU's stream backend and passt speak it. The policy stays
 * in front; what the program does with a frame is its business.
 *
 * Threads: one.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include "backends.h"

#define LENGTH_BYTES 4
#define FRAME_ROOM (LENGTH_BYTES + SM_NET_MAX_FRAME)
#define IN_BYTES (4 * FRAME_ROOM)

struct wire {
    struct sm_backend backend;
    int fd, index;
    size_t in_len, out_at, out_len;
    uint64_t lost;
    uint8_t in[IN_BYTES], out[2 * FRAME_ROOM];
};

static void hang_up(struct wire *w)
{
    struct sm_nic *nic = w->backend.nic;

    if (w->fd < 0)
        return;
    close(w->fd);
    w->fd = -1;
    w->out_len = w->in_len = 0;
    nic->event(nic, &(struct sm_nic_event){ .kind = SM_NIC_GONE, .why = "the other program hung up" },
               nic->arg);
}

static void flush_out(struct wire *w)
{
    while (w->out_len && w->fd >= 0) {
        ssize_t n = send(w->fd, w->out + w->out_at, w->out_len, MSG_NOSIGNAL | MSG_DONTWAIT);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            if (errno != EAGAIN)
                hang_up(w);
            return;
        }
        w->out_at += (size_t)n;
        w->out_len -= (size_t)n;
    }
    w->out_at = 0;
}

/* Ethernet may lose frames; a peer that does not read loses them here. */
static void wire_send(struct sm_backend *b, const struct sm_net_hdr *hdr, uint8_t *frame, size_t len)
{
    struct wire *w = (struct wire *)b;

    (void)hdr;
    flush_out(w);
    if (w->fd < 0 || w->out_at + w->out_len + LENGTH_BYTES + len > sizeof(w->out)) {
        w->lost++;
        return;
    }
    sm_set_be32(w->out + w->out_at + w->out_len, (uint32_t)len);
    memcpy(w->out + w->out_at + w->out_len + LENGTH_BYTES, frame, len);
    w->out_len += LENGTH_BYTES + len;
    flush_out(w);
}

static void wire_fill(struct sm_backend *b, struct sm_poll *poll)
{
    struct wire *w = (struct wire *)b;
    short events = (short)((sm_nic_full(b->nic) ? 0 : POLLIN) | (w->out_len ? POLLOUT : 0));

    w->index = w->fd >= 0 && events ? sm_poll_add(poll, w->fd, events) : -1;
}

static void take_frames(struct wire *w)
{
    struct sm_net_hdr none = { 0 };
    size_t at = 0;

    while (w->in_len - at >= LENGTH_BYTES) {
        uint32_t len = sm_be32(w->in + at);

        if (len < SM_NET_MIN_FRAME || len > SM_NET_MAX_FRAME) {
            hang_up(w);
            return;
        }
        if (w->in_len - at < LENGTH_BYTES + len)
            break;
        sm_nic_deliver(w->backend.nic, &none, w->in + at + LENGTH_BYTES, len);
        at += LENGTH_BYTES + len;
    }
    memmove(w->in, w->in + at, w->in_len - at);
    w->in_len -= at;
}

static void wire_serve(struct sm_backend *b, struct sm_poll *poll)
{
    struct wire *w = (struct wire *)b;
    short got = sm_poll_got(poll, w->index);
    ssize_t n;

    if (got & POLLOUT)
        flush_out(w);
    if (w->fd < 0 || !(got & (POLLIN | POLLHUP | POLLERR)))
        return;
    n = recv(w->fd, w->in + w->in_len, sizeof(w->in) - w->in_len, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        hang_up(w);
        return;
    }
    w->in_len += (size_t)n;
    take_frames(w);
}

static void wire_destroy(struct sm_backend *b)
{
    struct wire *w = (struct wire *)b;

    if (w->fd >= 0)
        close(w->fd);
    free(w);
}

static const struct sm_backend_ops wire_ops = {
    .type = "unix",
    .send = wire_send,
    .fill = wire_fill,
    .serve = wire_serve,
    .destroy = wire_destroy,
};

int sm_wire_create(struct sm_nic *nic, const char *path, struct sm_backend **out)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    struct wire *w;
    int fd, err;

    if (strlen(path) >= sizeof(addr.sun_path))
        return -ENAMETOOLONG;
    strcpy(addr.sun_path, path);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    w = calloc(1, sizeof(*w));
    if (!w || connect(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        err = w ? -errno : -ENOMEM;
        free(w);
        close(fd);
        return err;
    }
    w->backend = (struct sm_backend){ &wire_ops, nic };
    w->fd = fd;
    w->index = -1;
    *out = &w->backend;
    return 0;
}
