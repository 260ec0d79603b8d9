/* SPDX-License-Identifier: Apache-2.0 */
/* Taps by vhost-net; see vhost_net.h. Threads: the device's I/O thread. */
#include "dev/vhost_net.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/vhost.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "dev/virtio.h"
#include "dev/virtio_net.h"
#include "mem.h"
#include "tap.h"

#define F_MRG_RXBUF (1ull << 15)
#define RINGS 2 /* of a pair: what the guest receives, what it sends */

struct pair {
    int vhost, tap, err; /* err: an eventfd, when a ring is spoilt */
    bool attached;       /* the tap gives it frames */
    struct sm_io_watch watch;
};

struct vhost_net {
    struct sm_net net;
    struct sm_virtio *v; /* while it has the rings */
    unsigned count, used;
    struct pair pairs[SM_VIRTIO_NET_MAX_PAIRS];
};

/* ---- the rings ---- */

static int set_memory(int vhost, const struct sm_mem *mem)
{
    struct {
        struct vhost_memory head;
        struct vhost_memory_region regions[SM_MEM_MAX_REGIONS];
    } table = { .head.nregions = mem->count };

    for (unsigned i = 0; i < mem->count; i++)
        table.regions[i] = (struct vhost_memory_region){
            .guest_phys_addr = mem->regions[i].gpa,
            .memory_size = mem->regions[i].len_bytes,
            .userspace_addr = (uintptr_t)mem->regions[i].hva,
        };
    return ioctl(vhost, VHOST_SET_MEM_TABLE, &table) < 0 ? -errno : 0;
}

static int set_ring(const struct pair *p, unsigned ring, const struct sm_virtio_queue *q, int irq)
{
    const struct sm_virtq *vq = &q->vq;
    struct vhost_vring_state size = { ring, vq->size }, base = { ring, vq->next_avail };
    struct vhost_vring_addr addr = {
        .index = ring,
        .desc_user_addr = (uintptr_t)vq->desc,
        .avail_user_addr = (uintptr_t)vq->avail,
        .used_user_addr = (uintptr_t)vq->used,
    };
    struct vhost_vring_file kick = { ring, q->kick_fd }, call = { ring, irq }, err = { ring, p->err };

    if (ioctl(p->vhost, VHOST_SET_VRING_NUM, &size) < 0 ||
        ioctl(p->vhost, VHOST_SET_VRING_BASE, &base) < 0 ||
        ioctl(p->vhost, VHOST_SET_VRING_ADDR, &addr) < 0 ||
        ioctl(p->vhost, VHOST_SET_VRING_KICK, &kick) < 0 ||
        ioctl(p->vhost, VHOST_SET_VRING_CALL, &call) < 0 ||
        ioctl(p->vhost, VHOST_SET_VRING_ERR, &err) < 0)
        return -errno;
    return 0;
}

static int set_backend(const struct pair *p, unsigned ring, int fd)
{
    struct vhost_vring_file backend = { ring, fd };

    return ioctl(p->vhost, VHOST_NET_SET_BACKEND, &backend) < 0 ? -errno : 0;
}

/* What the driver gave the host is nonsense, to vhost. */
static void on_error(struct sm_io_watch *watch, uint32_t events)
{
    struct vhost_net *n = watch->dev;

    (void)events;
    for (unsigned i = 0; i < n->used; i++) {
        uint64_t times;

        if (read(n->pairs[i].err, &times, sizeof(times)) > 0 && n->v)
            sm_virtio_fail(n->v, RINGS * i, "the host's kernel (vhost) refused its queue");
    }
}

static int start_pair(struct vhost_net *n, unsigned i)
{
    struct pair *p = &n->pairs[i];
    uint64_t supported, features;
    int err;

    if (ioctl(p->vhost, VHOST_GET_FEATURES, &supported) < 0)
        return -errno;
    features = n->v->features & supported;
    if (ioctl(p->vhost, VHOST_SET_FEATURES, &features) < 0)
        return -errno;
    err = set_memory(p->vhost, n->v->mem);
    for (unsigned ring = 0; ring < RINGS && !err; ring++) {
        struct sm_virtio_queue *q = &n->v->queues[RINGS * i + ring];

        if (!q->vq.size)
            continue;
        err = sm_virtio_take(n->v, q->index);
        if (!err)
            err = set_ring(p, ring, q, n->v->irq.fd);
        if (!err)
            err = set_backend(p, ring, p->tap);
    }
    return err ? err : sm_io_watch(n->net.io, &p->watch, p->err, EPOLLIN, on_error, n);
}

/* Which queues of the tap get frames. */
static int vhost_use_pairs(struct sm_net *net, unsigned pairs)
{
    struct vhost_net *n = (struct vhost_net *)net;

    for (unsigned i = 0; i < n->count && n->count > 1; i++) {
        struct ifreq r = { .ifr_flags = i < pairs ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE };

        if (n->pairs[i].attached == (i < pairs))
            continue;
        if (ioctl(n->pairs[i].tap, TUNSETQUEUE, &r) < 0)
            return -errno;
        n->pairs[i].attached = i < pairs;
    }
    return 0;
}

static int vhost_take_rings(struct sm_net *net, struct sm_virtio *v, unsigned pairs)
{
    struct vhost_net *n = (struct vhost_net *)net;
    int err = vhost_use_pairs(net, 1);

    n->v = v;
    n->used = pairs;
    for (unsigned i = 0; i < pairs && !err; i++)
        err = start_pair(n, i);
    return err;
}

static void vhost_stop(struct sm_net *net)
{
    struct vhost_net *n = (struct vhost_net *)net;

    for (unsigned i = 0; i < n->used; i++) {
        sm_io_unwatch(net->io, &n->pairs[i].watch);
        /* Each waits until its ring is left alone. */
        for (unsigned ring = 0; ring < RINGS; ring++)
            set_backend(&n->pairs[i], ring, VHOST_FILE_UNBIND);
    }
    n->used = 0;
    n->v = NULL;
}

static void vhost_start(struct sm_net *net, unsigned offloads)
{
    struct vhost_net *n = (struct vhost_net *)net;

    for (unsigned i = 0; i < n->count; i++)
        sm_tap_set_offloads(n->pairs[i].tap, offloads);
}

/* ---- never called: no frame comes by here ---- */

static int vhost_tx(struct sm_net *net, const struct iovec *iov, unsigned n, size_t bytes)
{
    (void)net;
    (void)iov;
    (void)n;
    (void)bytes;
    return 0;
}

static void vhost_pull(struct sm_net *net)
{
    (void)net;
}

/* ---- life ---- */

static void vhost_destroy(struct sm_net *net)
{
    struct vhost_net *n = (struct vhost_net *)net;

    for (unsigned i = 0; i < n->count; i++) {
        const int fds[] = { n->pairs[i].vhost, n->pairs[i].tap, n->pairs[i].err };

        for (unsigned k = 0; k < 3; k++)
            if (fds[k] >= 0)
                close(fds[k]);
    }
    free(n);
}

static const struct sm_net_ops vhost_ops = {
    .type = "vhost",
    .start = vhost_start,
    .stop = vhost_stop,
    .tx = vhost_tx,
    .pull = vhost_pull,
    .use_pairs = vhost_use_pairs,
    .take_rings = vhost_take_rings,
    .destroy = vhost_destroy,
};

static int open_vhost(struct pair *p, char *why, size_t why_bytes)
{
    const uint64_t needed = SM_VIRTIO_F_COMMON | F_MRG_RXBUF;
    uint64_t features;
    int err;

    p->vhost = open("/dev/vhost-net", O_RDWR | O_CLOEXEC);
    if (p->vhost < 0) {
        err = -errno;
        snprintf(why, why_bytes, "/dev/vhost-net: %s; %s", strerror(-err),
                 err == -EACCES ? "let root give you access to it (its group is often kvm)"
                                : "modprobe vhost_net");
        return err;
    }
    if (ioctl(p->vhost, VHOST_SET_OWNER) < 0 ||
        ioctl(p->vhost, VHOST_GET_FEATURES, &features) < 0) {
        err = -errno;
        snprintf(why, why_bytes, "/dev/vhost-net: %s", strerror(-err));
        return err;
    }
    if ((features & needed) != needed) {
        snprintf(why, why_bytes, "/dev/vhost-net: this kernel's is too old");
        return -ENOTSUP;
    }
    p->err = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return p->err < 0 ? -errno : 0;
}

static int open_pair(struct vhost_net *n, const char *name, bool several, char *why, size_t why_bytes)
{
    struct pair *p = &n->pairs[n->count++];
    char real[SM_TAP_NAME_BYTES] = "";
    int err;

    *p = (struct pair){ .vhost = -1, .tap = -1, .err = -1, .attached = true, .watch.fd = -1 };
    snprintf(real, sizeof(real), "%s", name);
    err = open_vhost(p, why, why_bytes);
    if (err)
        return err;
    err = sm_tap_open(real, several, &p->tap);
    if (err)
        snprintf(why, why_bytes, "tap %s: %s", name, sm_tap_why(err, several));
    return err;
}

int sm_vhost_net_create(const char *name, unsigned pairs, struct sm_net **out, char *why,
                        size_t why_bytes)
{
    struct vhost_net *n = calloc(1, sizeof(*n));
    int err = 0;

    if (!n)
        return -ENOMEM;
    n->net.ops = &vhost_ops;
    n->net.offloads = SM_NET_OFFLOAD_ALL;
    for (unsigned i = 0; i < pairs && !err; i++)
        err = open_pair(n, name, pairs > 1, why, why_bytes);
    if (err)
        vhost_destroy(&n->net);
    else
        *out = &n->net;
    return err;
}
