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
 * Several pairs of queues (MQ): the driver says by the control queue how many it
 * uses; a frame goes to the one that net_steer.h names. A backend that works on the
 * rings itself (vhost) steers for itself, and only the control queue is ours.
 *
 * Threads: the device's I/O thread; the counters are read by others.
 */
#include "dev/virtio_net.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "dev/net_steer.h"
#include "event.h"
#include "state.h"

#define ID_NET 1
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
#define F_CTRL_VQ (1ull << 17)
#define F_MQ (1ull << 22)

#define STATUS_LINK_UP 1

/* 5.1.6.5: the control queue's commands that there are, and its answers. */
#define CTRL_MQ 4
#define CTRL_MQ_PAIRS_SET 0
#define CTRL_OK 0
#define CTRL_ERR 1

struct net {
    struct sm_virtio virtio;
    struct sm_net *backend;
    struct sm_virtio_net_stats stats;
    unsigned pairs, active; /* there are; the driver uses */
    uint32_t rx_filled;     /* queues to be notified, bits */
    bool tx_waits;          /* for writable */
    struct sm_net_steer steer;
    struct iovec rx_iov[RX_IOV];
    struct {
        uint16_t head;
        uint32_t bytes;
    } rx_chains[QUEUE_SIZE];
};

/* 5.1.2: receiveq1, transmitq1, … and, last, the control queue: after all pairs
 * with MQ, after the first without. */
static unsigned rx_queue(unsigned pair)
{
    return 2 * pair;
}

static bool is_tx(unsigned queue)
{
    return queue & 1;
}

static bool is_ctrl(const struct net *n, unsigned queue)
{
    return sm_virtio_has(&n->virtio, F_CTRL_VQ) &&
           queue == (sm_virtio_has(&n->virtio, F_MQ) ? 2 * n->pairs : 2);
}

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

static void learn(struct net *n, unsigned queue, const struct iovec *iov, unsigned parts)
{
    uint8_t head[SM_NET_STEER_BYTES];
    size_t len = sm_iov_read(iov, parts, head, sizeof(head));

    n->steer.pair[sm_net_steer_entry(head, len)] = (uint8_t)(queue / 2);
}

/* One chain. -EAGAIN: the backend is full. */
static int send_chain(struct net *n, unsigned queue, const struct sm_virtq_chain *chain)
{
    struct sm_net_hdr h;
    struct iovec *rest = chain->iov;
    struct iovec all[SM_VIRTQ_SEGS + 1] = { { &h, sizeof(h) } };
    size_t frame;
    unsigned parts;
    int err;

    if (sm_iov_read(chain->iov, chain->out, &h, sizeof(h)) < sizeof(h)) {
        sm_virtio_fail(&n->virtio, queue, "frame without room for its header");
        return 0;
    }
    frame = (size_t)chain->out_bytes - sizeof(h);
    if (frame < SM_NET_MIN_FRAME || frame > SM_NET_MAX_FRAME ||
        !check_header(&n->virtio, &h, frame)) {
        count(&n->stats.tx_dropped, 1);
        return 0;
    }
    parts = sm_iov_skip(&rest, chain->out, sizeof(h));
    if (n->active > 1)
        learn(n, queue, rest, parts);
    memcpy(all + 1, rest, parts * sizeof(*rest));
    err = n->backend->ops->tx(n->backend, all, parts + 1, sizeof(h) + frame);
    if (!err) {
        count(&n->stats.tx_frames, 1);
        count(&n->stats.tx_bytes, frame);
    }
    return err;
}

static void kick_tx(struct net *n, unsigned queue)
{
    struct sm_virtio *v = &n->virtio;
    struct iovec iov[SM_VIRTQ_SEGS];
    struct sm_virtq_chain chain = { .iov = iov, .cap = SM_VIRTQ_SEGS };
    unsigned taken = 0;

    sm_virtio_kicks_off(v, queue);
    do {
        while (taken < TX_BATCH && !n->tx_waits && sm_virtio_pop(v, queue, &chain)) {
            if (send_chain(n, queue, &chain) == -EAGAIN) {
                sm_virtq_unpop(&v->queues[queue].vq, 1);
                n->tx_waits = true;
                break;
            }
            sm_virtio_push(v, queue, chain.head, 0);
            taken++;
        }
        if (n->tx_waits)
            break;
        if (taken == TX_BATCH) {
            sm_virtio_again(v, queue);
            break;
        }
    } while (sm_virtio_kicks_on(v, queue));
    if (n->backend->ops->tx_done)
        n->backend->ops->tx_done(n->backend);
    sm_virtio_notify(v, queue);
}

static void on_writable(void *dev)
{
    struct net *n = dev;

    if (n->tx_waits) {
        n->tx_waits = false;
        for (unsigned pair = 0; pair < n->pairs && n->virtio.running; pair++)
            kick_tx(n, rx_queue(pair) + 1);
    }
}

/* ---- backend → guest ---- */

/* Pop buffers for `want` bytes. Their number, their room in *got. */
static unsigned take_buffers(struct net *n, unsigned queue, size_t want, unsigned most,
                             unsigned *iovs, uint64_t *got)
{
    unsigned chains = 0, used = 0;

    *got = 0;
    while (*got < want && chains < most && used + SM_VIRTQ_SEGS <= RX_IOV) {
        struct sm_virtq_chain chain = { .iov = n->rx_iov + used, .cap = SM_VIRTQ_SEGS };

        if (!sm_virtio_pop(&n->virtio, queue, &chain))
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

static void fill(struct net *n, unsigned queue, unsigned chains, unsigned iovs,
                 struct sm_net_hdr *h, const void *frame, size_t len)
{
    struct sm_virtq *vq = &n->virtio.queues[queue].vq;
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
    n->rx_filled |= 1u << queue;
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

/* The pair a frame belongs to, as far as the driver still uses it. */
static unsigned steer(const struct net *n, const void *frame, size_t len)
{
    unsigned pair;

    if (n->active == 1)
        return 0;
    pair = n->steer.pair[sm_net_steer_entry(frame, len)];
    return pair < n->active ? pair : 0;
}

static bool on_rx(void *dev, const struct sm_net_hdr *hdr, const void *frame, size_t len)
{
    struct net *n = dev;
    struct sm_virtio *v = &n->virtio;
    struct sm_net_hdr h = *hdr;
    bool merge = sm_virtio_has(v, F_MRG_RXBUF);
    size_t want = sizeof(h) + len;
    unsigned queue = rx_queue(steer(n, frame, len));
    struct sm_virtq *vq = &v->queues[queue].vq;

    if (!v->running || !fit_header(v, &h, len)) {
        count(&n->stats.rx_dropped, 1);
        return true;
    }
    for (;;) {
        unsigned iovs, chains;
        uint64_t got;

        chains = take_buffers(n, queue, want, merge ? QUEUE_SIZE : 1, &iovs, &got);
        if (got >= want) {
            fill(n, queue, chains, iovs, &h, frame, len);
            return true;
        }
        sm_virtq_unpop(vq, chains);
        if (!vq->size || vq->fault ||
            (chains && (!merge || chains == QUEUE_SIZE || iovs + SM_VIRTQ_SEGS > RX_IOV))) {
            /* It will never fit, whatever the driver adds. */
            count(&n->stats.rx_dropped, 1);
            return true;
        }
        /* A kick for the first buffer beyond those there are. */
        if (!sm_virtq_kicks_on_after(vq, (uint16_t)(vq->next_avail + chains)))
            return false;
    }
}

static void on_flush(void *dev)
{
    struct net *n = dev;

    for (unsigned pair = 0; pair < n->pairs && n->virtio.running; pair++)
        if (n->rx_filled & 1u << rx_queue(pair))
            sm_virtio_notify(&n->virtio, rx_queue(pair));
    n->rx_filled = 0;
}

static void on_gone(void *dev, const char *why)
{
    struct net *n = dev;

    if (n->virtio.events)
        sm_events_notice(n->virtio.events, n->virtio.name, why, 0);
    on_writable(n); /* what waits is lost, as with any cable pulled */
}

/* ---- the control queue ---- */

/* One command: {class, command} and its data. */
static uint8_t obey(struct net *n, const struct sm_virtq_chain *chain)
{
    uint8_t c[4];
    unsigned pairs;

    if (sm_iov_read(chain->iov, chain->out, c, sizeof(c)) < sizeof(c) || c[0] != CTRL_MQ ||
        c[1] != CTRL_MQ_PAIRS_SET || !sm_virtio_has(&n->virtio, F_MQ))
        return CTRL_ERR;
    pairs = c[2] | (unsigned)c[3] << 8;
    if (!pairs || pairs > n->pairs)
        return CTRL_ERR;
    if (n->backend->ops->use_pairs && n->backend->ops->use_pairs(n->backend, pairs))
        return CTRL_ERR;
    n->active = pairs;
    return CTRL_OK;
}

static void kick_ctrl(struct net *n, unsigned queue)
{
    struct sm_virtio *v = &n->virtio;
    struct iovec iov[SM_VIRTQ_SEGS];
    struct sm_virtq_chain chain = { .iov = iov, .cap = SM_VIRTQ_SEGS };

    do {
        while (sm_virtio_pop(v, queue, &chain)) {
            uint8_t ack = obey(n, &chain);

            sm_virtio_push(v, queue, chain.head,
                           (uint32_t)sm_iov_write(iov + chain.out, chain.in, &ack, 1));
        }
    } while (sm_virtio_kicks_on(v, queue));
    sm_virtio_notify(v, queue);
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
    if (n->backend->ops->take_rings &&
        n->backend->ops->take_rings(n->backend, v, sm_virtio_has(v, F_MQ) ? n->pairs : 1))
        sm_virtio_fail(v, 0, "vhost does not take the queues");
}

static void net_stop(struct sm_virtio *v)
{
    struct net *n = (struct net *)v;

    n->backend->ops->stop(n->backend);
    n->active = 1;
}

static void net_kick(struct sm_virtio *v, unsigned queue)
{
    struct net *n = (struct net *)v;

    if (is_ctrl(n, queue))
        kick_ctrl(n, queue);
    else if (is_tx(queue))
        kick_tx(n, queue);
    else
        n->backend->ops->pull(n->backend);
}

/* What a card of one pair saves is what it saved before there were several. */
static void net_save(struct sm_virtio *v, struct sm_state_writer *w)
{
    struct net *n = (struct net *)v;

    if (n->pairs > 1) {
        sm_state_begin(w, "netpairs", 1);
        sm_state_put_u8(w, (uint8_t)n->active);
        sm_state_end(w);
    }
}

static int net_load(struct sm_virtio *v, struct sm_state_reader *r)
{
    struct net *n = (struct net *)v;
    unsigned active;

    if (n->pairs == 1)
        return 0;
    if (sm_state_open(r, "netpairs") != 1)
        return -EBADMSG;
    active = sm_state_get_u8(r);
    sm_state_close(r);
    if (r->error || !active || active > n->pairs)
        return -EBADMSG;
    n->active = active;
    return 0;
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
    .save = net_save,
    .load = net_load,
    .destroy = net_destroy,
};

/* The guest's side of each offload costs the backend nothing: it may use it. */
static uint64_t features(const struct sm_virtio_net_config *cfg)
{
    unsigned off = cfg->net->offloads;
    uint64_t f = F_MAC | F_STATUS | F_MRG_RXBUF;

    if (cfg->mtu)
        f |= F_MTU;
    if (cfg->pairs > 1)
        f |= F_CTRL_VQ | F_MQ;
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
static void set_config(struct net *n, const struct sm_virtio_net_config *cfg)
{
    struct sm_virtio *v = &n->virtio;
    uint16_t status = STATUS_LINK_UP, pairs = (uint16_t)n->pairs;

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

    if ((cfg->mtu && (cfg->mtu < 68 || cfg->mtu > SM_NET_MAX_MTU)) ||
        cfg->pairs > SM_VIRTIO_NET_MAX_PAIRS)
        return -EINVAL;
    n = calloc(1, sizeof(*n));
    if (!n)
        return -ENOMEM;
    n->backend = cfg->net;
    n->pairs = cfg->pairs > 1 ? cfg->pairs : 1;
    n->active = 1;
    n->virtio.queue_count = n->pairs > 1 ? 2 * n->pairs + 1 : 2;
    err = sm_virtio_init(&n->virtio, env, &net_class, features(cfg));
    if (err) {
        free(n);
        return err;
    }
    set_config(n, cfg);
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
