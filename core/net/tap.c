/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A tap device: frames go into the host's own network stack. The device is
 * somebody's to set up (address, bridge, masquerade).
 *
 * Offloads pass through: the header of a frame is the same one that the tap
 * speaks, and what the guest's driver takes is told to the tap.
 *
 * Threads: one.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

#include "backends.h"
#include "tap.h"

#define BATCH 64

struct tap {
    struct sm_backend backend;
    int fd, index;
    uint8_t in[SM_NET_MAX_FRAME];
};

static void tap_send(struct sm_backend *b, const struct sm_net_hdr *hdr, uint8_t *frame, size_t len)
{
    struct tap *t = (struct tap *)b;
    struct sm_net_hdr h = *hdr;
    struct iovec iov[2] = { { &h, sizeof(h) }, { frame, len } };
    ssize_t n = writev(t->fd, iov, 2);

    (void)n; /* full: a wire loses frames */
}

static void tap_fill(struct sm_backend *b, struct sm_poll *poll)
{
    struct tap *t = (struct tap *)b;

    t->index = sm_nic_full(b->nic) ? -1 : sm_poll_add(poll, t->fd, POLLIN);
}

static void tap_serve(struct sm_backend *b, struct sm_poll *poll)
{
    struct tap *t = (struct tap *)b;
    struct sm_net_hdr h;
    struct iovec iov[2] = { { &h, sizeof(h) }, { t->in, sizeof(t->in) } };

    if (!sm_poll_got(poll, t->index))
        return;
    for (unsigned i = 0; i < BATCH && !sm_nic_full(b->nic); i++) {
        ssize_t n = readv(t->fd, iov, 2);

        if (n < (ssize_t)(sizeof(h) + SM_NET_MIN_FRAME))
            return;
        sm_nic_deliver(b->nic, &h, t->in, (size_t)n - sizeof(h));
    }
}

static void tap_offloads(struct sm_backend *b, unsigned offloads)
{
    sm_tap_set_offloads(((struct tap *)b)->fd, offloads);
}

static void tap_destroy(struct sm_backend *b)
{
    close(((struct tap *)b)->fd);
    free(b);
}

static const struct sm_backend_ops tap_ops = {
    .type = "tap",
    .send = tap_send,
    .fill = tap_fill,
    .serve = tap_serve,
    .offloads = tap_offloads,
    .destroy = tap_destroy,
    .takes = SM_NET_OFFLOAD_ALL,
};

int sm_tap_create(struct sm_nic *nic, char name[SM_TAP_NAME_BYTES], struct sm_backend **out)
{
    struct tap *t = calloc(1, sizeof(*t));
    int err;

    if (!t)
        return -ENOMEM;
    t->backend = (struct sm_backend){ &tap_ops, nic };
    err = sm_tap_open(name, false, &t->fd);
    if (err)
        free(t);
    else
        *out = &t->backend;
    return err;
}
