/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-net; see virtio_net.h and, for the flow of frames, net.h.
 *
 * Transmit: a chain is one frame behind a struct sm_net_hdr. The header is
 * copied, checked against what was negotiated and handed on with the guest's
 * own buffers; a header that lies costs its frame. A chain without room for
 * one breaks the device.
 *
 * Receive: with MRG_RXBUF a frame fills as many buffers as it takes, and the
 * driver sees them all at once (it counts on num_buffers of them being there).
 * Too few buffers: they are given back, the frame waits in the backend, and
 * the next kick of the queue asks for it.
 *
 * Threads: the device's I/O thread; the counters are read by others.
 */
#include "dev/virtio_net.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "event.h"

#define ID_NET 1
#define RX 0
#define TX 1
#define QUEUE_SIZE 256
#define TX_BATCH 64
#define RX_IOV 1024 /* buffers of one frame; a page each would be 17 */

#define F_CSUM (1ull << 0)
#define F_GUEST_CSUM (1ull << 1)
#define F_MTU (1ull << 3)
#define F_MAC (1ull << 5)
#define F_GUEST_TSO4 (1ull << 7)
#define F_GUEST_TSO6 (1ull << 8)
#define F_GUEST_ECN (1ull << 9)
#define F_HOST_TSO4 (1ull << 11)
#define F_HOST_TSO6 (1ull << 12)
#define F_HOST_ECN (1ull << 13)
#define F_MRG_RXBUF (1ull << 15)
#define F_STATUS (1ull << 16)

#define STATUS_LINK_UP 1

struct net {
    struct sm_virtio virtio;
    struct sm_net *backend;
    struct sm_virtio_net_stats stats;
    bool tx_waits; /* for writable */
    struct iovec rx_iov[RX_IOV];
    struct {
        uint16_t head;
        uint32_t bytes;
    } rx_chains[QUEUE_SIZE];
};

static void count(uint64_t *counter, uint64_t by)
{
    __atomic_fetch_add(counter, by, __ATOMIC_RELAXED);
}

/* ---- guest → backend ---- */

static bool gso_ok(const struct sm_virtio *v, const struct sm_net_hdr *h)
{
    uint8_t type = h->gso_type & (uint8_t)~SM_NET_GSO_ECN;

    if (h->gso_type == SM_NET_GSO_NONE)
        return true;
    if (h->gso_type & SM_NET_GSO_ECN && !sm_virtio_has(v, F_HOST_ECN))
        return false;
    if (type == SM_NET_GSO_TCPV4 ? !sm_virtio_has(v, F_HOST_TSO4)
                                 : type != SM_NET_GSO_TCPV6 || !sm_virtio_has(v, F_HOST_TSO6))
        return false;
    /* 5.1.6.2: segments need their checksums computed. */
    return h->gso_size && h->flags & SM_NET_HDR_NEEDS_CSUM;
}

/* What may be handed to the backend; fields that say nothing become 0. */
static bool check_header(const struct sm_virtio *v, struct sm_net_hdr *h, size_t frame)
{
    h->flags &= SM_NET_HDR_NEEDS_CSUM;
    h->num_buffers = 0;
    if (!gso_ok(v, h))
        return false;
    if (h->gso_type == SM_NET_GSO_NONE)
        h->gso_size = h->hdr_len = 0;
    if (!h->flags) {
        h->csum_start = h->csum_offset = 0;
        return true;
    }
    return sm_virtio_has(v, F_CSUM) && (size_t)h->csum_start + h->csum_offset + 2 <= frame &&
           h->hdr_len <= frame;
}

/* One chain. -EAGAIN: the backend is full. */
static int send_chain(struct net *n, const struct sm_virtq_chain *chain)
{
    struct sm_net_hdr h;
    struct iovec *rest = chain->iov;
    struct iovec all[SM_VIRTQ_SEGS + 1] = { { &h, sizeof(h) } };
    size_t frame;
    unsigned parts;
    int err;

    if (sm_iov_read(chain->iov, chain->out, &h, sizeof(h)) < sizeof(h)) {
        sm_virtio_fail(&n->virtio, TX, "frame without room for its header");
        return 0;
    }
    frame = (size_t)chain->out_bytes - sizeof(h);
    if (frame < SM_NET_MIN_FRAME || frame > SM_NET_MAX_FRAME ||
        !check_header(&n->virtio, &h, frame)) {
        count(&n->stats.tx_dropped, 1);
        return 0;
    }
    parts = sm_iov_skip(&rest, chain->out, sizeof(h));
    memcpy(all + 1, rest, parts * sizeof(*rest));
    err = n->backend->ops->tx(n->backend, all, parts + 1, sizeof(h) + frame);
    if (!err) {
        count(&n->stats.tx_frames, 1);
        count(&n->stats.tx_bytes, frame);
    }
    return err;
}

static void kick_tx(struct net *n)
{
    struct sm_virtio *v = &n->virtio;
    struct iovec iov[SM_VIRTQ_SEGS];
    struct sm_virtq_chain chain = { .iov = iov, .cap = SM_VIRTQ_SEGS };
    unsigned taken = 0;

    sm_virtio_kicks_off(v, TX);
    do {
        while (taken < TX_BATCH && !n->tx_waits && sm_virtio_pop(v, TX, &chain)) {
            if (send_chain(n, &chain) == -EAGAIN) {
                sm_virtq_unpop(&v->queues[TX].vq, 1);
                n->tx_waits = true;
                break;
            }
            sm_virtio_push(v, TX, chain.head, 0);
            taken++;
        }
        if (n->tx_waits)
            break;
        if (taken == TX_BATCH) {
            sm_virtio_again(v, TX);
            break;
        }
    } while (sm_virtio_kicks_on(v, TX));
    sm_virtio_notify(v, TX);
}

static void on_writable(void *dev)
{
    struct net *n = dev;

    if (n->tx_waits) {
        n->tx_waits = false;
        if (n->virtio.running)
            kick_tx(n);
    }
}

/* ---- backend → guest ---- */

/* Pop buffers for `want` bytes. Their number, their room in *got. */
static unsigned take_buffers(struct net *n, size_t want, unsigned most, unsigned *iovs,
                             uint64_t *got)
{
    unsigned chains = 0, used = 0;

    *got = 0;
    while (*got < want && chains < most && used + SM_VIRTQ_SEGS <= RX_IOV) {
        struct sm_virtq_chain chain = { .iov = n->rx_iov + used, .cap = SM_VIRTQ_SEGS };

        if (!sm_virtio_pop(&n->virtio, RX, &chain))
            break;
        /* Readable parts of a receive buffer are no use to anybody. */
        memmove(chain.iov, chain.iov + chain.out, chain.in * sizeof(*chain.iov));
        n->rx_chains[chains].head = chain.head;
        n->rx_chains[chains].bytes =
            chain.in_bytes < UINT32_MAX ? (uint32_t)chain.in_bytes : UINT32_MAX;
        *got += n->rx_chains[chains++].bytes;
        used += chain.in;
    }
    *iovs = used;
    return chains;
}

static void fill(struct net *n, unsigned chains, unsigned iovs, struct sm_net_hdr *h,
                 const void *frame, size_t len)
{
    struct sm_virtq *vq = &n->virtio.queues[RX].vq;
    struct iovec *at = n->rx_iov;
    size_t left = sizeof(*h) + len;

    h->num_buffers = (uint16_t)chains;
    sm_iov_write(at, iovs, h, sizeof(*h));
    iovs = sm_iov_skip(&at, iovs, sizeof(*h));
    sm_iov_write(at, iovs, frame, len);
    for (unsigned i = 0; i < chains; i++) {
        uint32_t part = left < n->rx_chains[i].bytes ? (uint32_t)left : n->rx_chains[i].bytes;

        sm_virtq_fill(vq, n->rx_chains[i].head, part);
        left -= part;
    }
    sm_virtq_publish(vq);
    count(&n->stats.rx_frames, 1);
    count(&n->stats.rx_bytes, len);
}

/* Frames of the backend, made such as the driver asked for. */
static bool fit_header(const struct sm_virtio *v, struct sm_net_hdr *h, size_t len)
{
    uint8_t type = h->gso_type & (uint8_t)~SM_NET_GSO_ECN;

    if (!sm_virtio_has(v, F_GUEST_CSUM))
        h->flags &= (uint8_t)~SM_NET_HDR_DATA_VALID;
    if (h->flags & SM_NET_HDR_NEEDS_CSUM &&
        (!sm_virtio_has(v, F_GUEST_CSUM) || (size_t)h->csum_start + h->csum_offset + 2 > len))
        return false;
    switch (type) {
    case SM_NET_GSO_NONE:
        return true;
    case SM_NET_GSO_TCPV4:
        return sm_virtio_has(v, F_GUEST_TSO4);
    case SM_NET_GSO_TCPV6:
        return sm_virtio_has(v, F_GUEST_TSO6);
    default:
        return false;
    }
}

static bool on_rx(void *dev, const struct sm_net_hdr *hdr, const void *frame, size_t len)
{
    struct net *n = dev;
    struct sm_virtio *v = &n->virtio;
    struct sm_net_hdr h = *hdr;
    bool merge = sm_virtio_has(v, F_MRG_RXBUF);
    size_t want = sizeof(h) + len;

    if (!v->running || !fit_header(v, &h, len)) {
        count(&n->stats.rx_dropped, 1);
        return true;
    }
    for (;;) {
        unsigned iovs, chains;
        uint64_t got;

        chains = take_buffers(n, want, merge ? QUEUE_SIZE : 1, &iovs, &got);
        if (got >= want) {
            fill(n, chains, iovs, &h, frame, len);
            return true;
        }
        sm_virtq_unpop(&v->queues[RX].vq, chains);
        if (!v->queues[RX].vq.size || v->queues[RX].vq.fault ||
            (chains && (!merge || chains == QUEUE_SIZE || iovs + SM_VIRTQ_SEGS > RX_IOV))) {
            /* It will never fit, whatever the driver adds. */
            count(&n->stats.rx_dropped, 1);
            return true;
        }
        /* A kick for the first buffer beyond those there are. */
        if (!sm_virtq_kicks_on_after(&v->queues[RX].vq,
                                     (uint16_t)(v->queues[RX].vq.next_avail + chains)))
            return false;
    }
}

static void on_flush(void *dev)
{
    struct net *n = dev;

    if (n->virtio.running)
        sm_virtio_notify(&n->virtio, RX);
}

static void on_gone(void *dev, const char *why)
{
    struct net *n = dev;

    if (n->virtio.events)
        sm_events_notice(n->virtio.events, n->virtio.name, why, 0);
    on_writable(n); /* what waits is lost, as with any cable pulled */
}

/* ---- life ---- */

static void net_start(struct sm_virtio *v)
{
    struct net *n = (struct net *)v;
    unsigned offloads = 0;

    if (sm_virtio_has(v, F_GUEST_CSUM))
        offloads |= SM_NET_OFFLOAD_CSUM;
    if (sm_virtio_has(v, F_GUEST_TSO4))
        offloads |= SM_NET_OFFLOAD_TSO4;
    if (sm_virtio_has(v, F_GUEST_TSO6))
        offloads |= SM_NET_OFFLOAD_TSO6;
    if (sm_virtio_has(v, F_GUEST_ECN))
        offloads |= SM_NET_OFFLOAD_ECN;
    n->tx_waits = false;
    n->backend->ops->start(n->backend, offloads);
}

static void net_stop(struct sm_virtio *v)
{
    struct net *n = (struct net *)v;

    n->backend->ops->stop(n->backend);
}

static void net_kick(struct sm_virtio *v, unsigned queue)
{
    struct net *n = (struct net *)v;

    if (queue == TX)
        kick_tx(n);
    else
        n->backend->ops->pull(n->backend);
}

static void net_destroy(struct sm_virtio *v)
{
    struct net *n = (struct net *)v;

    n->backend->ops->destroy(n->backend);
    sm_virtio_fini(v);
    free(n);
}

static const struct sm_virtio_class net_class = {
    .device = SM_VIRTIO_DEVICE_OPS("virtio-net"),
    .id = ID_NET,
    .queues = 2,
    .queue_size = QUEUE_SIZE,
    .start = net_start,
    .stop = net_stop,
    .kick = net_kick,
    .destroy = net_destroy,
};

/* The guest's side of each offload costs the backend nothing: it may use it. */
static uint64_t features(const struct sm_virtio_net_config *cfg)
{
    unsigned off = cfg->net->offloads;
    uint64_t f = F_MAC | F_STATUS | F_MRG_RXBUF;

    if (cfg->mtu)
        f |= F_MTU;
    if (off & SM_NET_OFFLOAD_CSUM)
        f |= F_CSUM | F_GUEST_CSUM;
    if (off & SM_NET_OFFLOAD_TSO4)
        f |= F_HOST_TSO4 | F_GUEST_TSO4;
    if (off & SM_NET_OFFLOAD_TSO6)
        f |= F_HOST_TSO6 | F_GUEST_TSO6;
    if (off & SM_NET_OFFLOAD_ECN)
        f |= F_HOST_ECN | F_GUEST_ECN;
    return f;
}

/* struct virtio_net_config (5.1.4) as far as mtu. */
static void set_config(struct sm_virtio *v, const struct sm_virtio_net_config *cfg)
{
    uint16_t status = STATUS_LINK_UP, pairs = 1;

    memcpy(v->config, cfg->mac, 6);
    memcpy(v->config + 6, &status, 2);
    memcpy(v->config + 8, &pairs, 2);
    memcpy(v->config + 10, &cfg->mtu, 2);
    v->config_bytes = 12;
}

int sm_virtio_net_create(const struct sm_virtio_env *env, const struct sm_virtio_net_config *cfg,
                         struct sm_virtio_mmio **out)
{
    struct net *n;
    int err;

    if (cfg->mtu && (cfg->mtu < 68 || cfg->mtu > SM_NET_MAX_MTU))
        return -EINVAL;
    n = calloc(1, sizeof(*n));
    if (!n)
        return -ENOMEM;
    n->backend = cfg->net;
    err = sm_virtio_init(&n->virtio, env, &net_class, features(cfg));
    if (err) {
        free(n);
        return err;
    }
    set_config(&n->virtio, cfg);
    err = sm_virtio_mmio_create(&n->virtio, out);
    if (err) {
        sm_virtio_fini(&n->virtio);
        free(n);
        return err;
    }
    n->backend->io = env->io;
    n->backend->port = (struct sm_net_port){ on_rx, on_flush, on_writable, on_gone, n };
    return 0;
}

void sm_virtio_net_stats(struct sm_virtio_mmio *dev, struct sm_virtio_net_stats *out)
{
    const struct net *n = (const struct net *)sm_virtio_mmio_virtio(dev);
    const uint64_t *from = &n->stats.rx_frames;
    uint64_t *to = &out->rx_frames;

    for (size_t i = 0; i < sizeof(*out) / sizeof(*to); i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}
