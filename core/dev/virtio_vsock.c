/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-vsock: packets and credit; see virtio_vsock.h.
 *
 * A stream is known by (host port, guest port). Guest to host, a payload goes
 * from the guest's buffers into the unix socket with one sendmsg; what the
 * socket does not take waits in the connection's buffer. We advertise exactly
 * that buffer (buf_alloc) and count what left it (fwd_cnt), so a guest that
 * keeps to its credit always finds room, and one that does not is reset. Host
 * to guest, one readv fills the data parts of as many receive buffers as the
 * guest's credit allows, and each gets its header after.
 *
 * Nothing waits for a slow end but its own stream. A host that does not read
 * fills one buffer, the guest's credit ends there. A guest that does not read
 * has no credit left, the socket fills, the host's writer waits. A guest that
 * gives no receive buffers stops its own transmit queue as soon as too many
 * replies wait, for replies are never dropped.
 *
 * After a load every stream is gone: TRANSPORT_RESET goes into the event
 * queue, and nothing else is sent until the guest has handed that buffer back,
 * because a driver that sees new packets first would take them for the old
 * streams' (5.10.6.6).
 */
#include "dev/virtio_vsock.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#include "dev/virtio_vsock_conn.h"
#include "state.h"

#define ID_VSOCK 19
#define RX 0
#define TX 1
#define EVENT 2
#define QUEUE_SIZE 256
#define TURNS 32    /* connections served before others of the thread */
#define TX_BATCH 64 /* packets taken, likewise */
#define F_STREAM (1ull << 0)
#define EVENT_TRANSPORT_RESET 0

/* One receive buffer, for a packet without payload. False: there is none. */
static bool send_header(struct sm_vsock *d, const struct sm_vsock_header *h)
{
    struct iovec iov[SM_VIRTQ_SEGS];
    struct sm_virtq_chain chain = { .iov = iov, .cap = SM_VIRTQ_SEGS };

    if (!sm_virtio_pop(&d->virtio, RX, &chain))
        return false;
    if (chain.in_bytes < sizeof(*h)) {
        sm_virtio_fail(&d->virtio, RX, "receive buffer without room for a header");
        return false;
    }
    sm_iov_write(iov + chain.out, chain.in, h, sizeof(*h));
    sm_virtio_push(&d->virtio, RX, chain.head, sizeof(*h));
    return true;
}

static struct sm_vsock_header header(struct sm_vsock_conn *c, enum sm_vsock_op op,
                                     uint32_t flags, uint32_t len)
{
    return (struct sm_vsock_header){
        .src_cid = SM_VSOCK_HOST_CID,
        .dst_cid = c->dev->guest_cid,
        .src_port = c->host_port,
        .dst_port = c->guest_port,
        .len = len,
        .type = SM_VSOCK_TYPE_STREAM,
        .op = (uint16_t)op,
        .flags = flags,
        .buf_alloc = SM_VSOCK_BUF_BYTES,
        .fwd_cnt = c->forwarded,
    };
}

/* Every packet of a stream tells the guest what we have passed on. */
static void credit_told(struct sm_vsock_conn *c)
{
    c->told = c->forwarded;
    c->pending &= ~(1u << SM_VSOCK_CREDIT_UPDATE);
}

/* A pending packet of this kind, if there is one. False: no buffer for it. */
static bool send_pending(struct sm_vsock_conn *c, enum sm_vsock_op op)
{
    struct sm_vsock_header h;

    if (!(c->pending & 1u << op))
        return true;
    h = header(c, op, op == SM_VSOCK_SHUTDOWN ? c->shut : 0, 0);
    if (!send_header(c->dev, &h))
        return false;
    c->pending &= ~(1u << op);
    credit_told(c);
    return true;
}

void sm_vsock_reset_later(struct sm_vsock *d, uint32_t host_port, uint32_t guest_port,
                          uint16_t type)
{
    unsigned tail = (d->reset_head + d->reset_count) % SM_VSOCK_RESETS;

    if (d->reset_count == SM_VSOCK_RESETS)
        return; /* cannot be, see tx_may_go; a guest would time out */
    d->resets[tail] = (struct sm_vsock_reset){ host_port, guest_port, type };
    d->reset_count++;
}

/* Half of the ring is for what the guest's packets cause, half for the
 * connections there are: one RST each, and new ones need that to go first. */
static bool tx_may_go(const struct sm_vsock *d)
{
    return d->reset_count < SM_VSOCK_RESETS - SM_VSOCK_CONNS;
}

static bool send_reset(struct sm_vsock *d)
{
    const struct sm_vsock_reset *r = &d->resets[d->reset_head];
    struct sm_vsock_header h = {
        .src_cid = SM_VSOCK_HOST_CID,
        .dst_cid = d->guest_cid,
        .src_port = r->host_port,
        .dst_port = r->guest_port,
        .type = r->type,
        .op = SM_VSOCK_RST,
    };

    if (!send_header(d, &h))
        return false;
    d->reset_head = (d->reset_head + 1) % SM_VSOCK_RESETS;
    d->reset_count--;
    return true;
}

/* Receive buffers for up to limit bytes of payload, into d->rx; rx_data gets
 * their data parts. Returns how many buffers; *datas how many iovecs. */
static unsigned take_buffers(struct sm_vsock *d, size_t limit, unsigned *datas)
{
    unsigned n = 0, used = 0, data = 0;
    size_t total = 0;

    while (n < SM_VSOCK_RX_BATCH && total < limit &&
           used + SM_VIRTQ_SEGS <= SM_VSOCK_RX_IOV) {
        struct sm_virtq_chain chain = { .iov = d->rx_iov + used, .cap = SM_VIRTQ_SEGS };
        struct iovec *part = d->rx_data + data;
        size_t room;
        unsigned parts;

        if (!sm_virtio_pop(&d->virtio, RX, &chain))
            break;
        if (chain.in_bytes <= sizeof(struct sm_vsock_header)) {
            sm_virtio_fail(&d->virtio, RX, "receive buffer without room for data");
            return 0;
        }
        memcpy(part, chain.iov + chain.out, chain.in * sizeof(*part));
        parts = sm_iov_skip(&part, chain.in, sizeof(struct sm_vsock_header));
        room = 0;
        for (unsigned i = 0; i < parts && total < limit; i++) {
            size_t len =
                part[i].iov_len < limit - total ? part[i].iov_len : limit - total;

            d->rx_data[data++] = (struct iovec){ part[i].iov_base, len };
            room += len;
            total += len;
        }
        d->rx[n].head = chain.head;
        d->rx[n].iov = used + chain.out;
        d->rx[n].count = chain.in;
        d->rx[n++].room = room;
        used += chain.out + chain.in;
    }
    *datas = data;
    return n;
}

/* One read of the host's data into packets. False: no buffer for it. */
static bool send_data(struct sm_vsock_conn *c)
{
    struct sm_vsock *d = c->dev;
    uint32_t credit = sm_vsock_credit(c);
    unsigned datas, n = take_buffers(d, credit < c->want ? credit : c->want, &datas);
    unsigned i = 0;
    size_t got;

    if (!n)
        return false;
    got = sm_vsock_read(c, d->rx_data, datas);
    c->sent += (uint32_t)got;
    for (; got; i++) {
        size_t len = got < d->rx[i].room ? got : d->rx[i].room;
        struct sm_vsock_header h = header(c, SM_VSOCK_RW, 0, (uint32_t)len);

        sm_iov_write(d->rx_iov + d->rx[i].iov, d->rx[i].count, &h, sizeof(h));
        sm_virtio_push(&d->virtio, RX, d->rx[i].head, (uint32_t)(sizeof(h) + len));
        got -= len;
        credit_told(c);
    }
    sm_virtq_unpop(&d->virtio.queues[RX].vq, n - i);
    return true;
}

/* What a connection has to say, once round. False: buffers ran out. */
static bool serve(struct sm_vsock_conn *c)
{
    if (!send_pending(c, SM_VSOCK_RESPONSE))
        return false;
    if (c->pending & 1u << SM_VSOCK_REQUEST) {
        if (!send_pending(c, SM_VSOCK_REQUEST))
            return false;
        c->request_sent = true;
    }
    if (sm_vsock_can_read(c)) {
        if (!sm_vsock_credit(c)) {
            /* Once: the guest tells by itself when it has made room. */
            if (!c->asked)
                c->pending |= 1u << SM_VSOCK_CREDIT_REQUEST;
            c->asked = true;
        } else if (!send_data(c)) {
            return false;
        }
    }
    if (!send_pending(c, SM_VSOCK_CREDIT_REQUEST) ||
        !send_pending(c, SM_VSOCK_CREDIT_UPDATE))
        return false;
    if (c->pending & 1u << SM_VSOCK_SHUTDOWN) {
        if (!send_pending(c, SM_VSOCK_SHUTDOWN))
            return false;
        if (c->shut == SM_VSOCK_SHUT_BOTH)
            sm_vsock_closing(c);
    }
    return true;
}

/* The next thing to send. 1: done; 0: nothing to do; -1: no buffer. */
static int step(struct sm_vsock *d)
{
    struct sm_vsock_conn *c = d->ready_first;
    bool ok;

    if (d->reset_count)
        return send_reset(d) ? 1 : -1;
    if (!c)
        return 0;
    sm_vsock_unready(c);
    ok = serve(c);
    sm_vsock_ready(c); /* at the end of the list: everybody has a turn */
    return ok ? 1 : -1;
}

void sm_vsock_pump(struct sm_vsock *d)
{
    unsigned turns = 0;
    int r = 0;

    if (!d->virtio.running || d->reset_event || d->gated || d->stalled)
        return;
    while (turns++ < TURNS) {
        r = step(d);
        if (r == 0 || (r < 0 && !sm_virtio_kicks_on(&d->virtio, RX)))
            break;
    }
    sm_virtio_notify(&d->virtio, RX);
    if (turns > TURNS)
        sm_virtio_again(&d->virtio, RX);
    if (d->tx_stalled && tx_may_go(d)) {
        d->tx_stalled = false;
        sm_virtio_again(&d->virtio, TX);
    }
}

static void open_stream(struct sm_vsock *d, const struct sm_vsock_header *h)
{
    struct sm_vsock_conn *c;

    if (sm_vsock_open(d, h->dst_port, h->src_port, &c)) {
        sm_vsock_reset_later(d, h->dst_port, h->src_port, h->type);
        return;
    }
    c->peer_alloc = h->buf_alloc;
    c->peer_fwd = h->fwd_cnt;
    sm_vsock_want(c, SM_VSOCK_RESPONSE);
}

/* A packet for a stream there is. The payload is in iov. */
static void stream_packet(struct sm_vsock_conn *c, const struct sm_vsock_header *h,
                          struct iovec *iov, unsigned count)
{
    c->peer_alloc = h->buf_alloc;
    c->peer_fwd = h->fwd_cnt;
    if (sm_vsock_credit(c))
        c->asked = false;

    switch (h->op) {
    case SM_VSOCK_RESPONSE:
        if (c->state != SM_VSOCK_REQUESTED || !c->request_sent) {
            sm_vsock_abort(c);
            return;
        }
        sm_vsock_accepted(c);
        return;
    case SM_VSOCK_RW:
        if (c->state == SM_VSOCK_CLOSING)
            return; /* it has not heard yet */
        if (c->state != SM_VSOCK_OPEN || c->guest_sent_all ||
            sm_vsock_write(c, iov, count, h->len)) {
            sm_vsock_abort(c);
            return;
        }
        break;
    case SM_VSOCK_SHUTDOWN:
        if (c->state == SM_VSOCK_REQUESTED)
            sm_vsock_abort(c);
        else
            sm_vsock_guest_shutdown(c, h->flags);
        return;
    case SM_VSOCK_CREDIT_UPDATE:
        break;
    case SM_VSOCK_CREDIT_REQUEST:
        sm_vsock_want(c, SM_VSOCK_CREDIT_UPDATE);
        break;
    default: /* REQUEST for a stream there is, or no operation at all */
        sm_vsock_abort(c);
        return;
    }
    sm_vsock_ready(c);
}

/* One chain of the transmit queue. */
static void take_packet(struct sm_vsock *d, struct sm_virtq_chain *chain)
{
    struct iovec *iov = chain->iov;
    struct sm_vsock_header h;
    struct sm_vsock_conn *c;
    unsigned count;

    if (sm_iov_read(iov, chain->out, &h, sizeof(h)) < sizeof(h) ||
        h.len > chain->out_bytes - sizeof(h)) {
        sm_virtio_fail(&d->virtio, TX, "packet longer than its buffers");
        return;
    }
    count = sm_iov_skip(&iov, chain->out, sizeof(h));
    if (h.src_cid != d->guest_cid || h.dst_cid != SM_VSOCK_HOST_CID)
        return; /* nobody of that name here */
    if (h.type != SM_VSOCK_TYPE_STREAM) {
        if (h.op != SM_VSOCK_RST)
            sm_vsock_reset_later(d, h.dst_port, h.src_port, h.type);
        return;
    }
    c = sm_vsock_find(d, h.dst_port, h.src_port);
    if (h.op == SM_VSOCK_RST) {
        if (c)
            sm_vsock_guest_gone(c);
    } else if (c) {
        stream_packet(c, &h, iov, count);
    } else if (h.op == SM_VSOCK_REQUEST) {
        open_stream(d, &h);
    } else {
        sm_vsock_reset_later(d, h.dst_port, h.src_port, h.type);
    }
}

static void kick_tx(struct sm_vsock *d)
{
    struct sm_virtio *v = &d->virtio;
    struct iovec iov[SM_VIRTQ_SEGS];
    struct sm_virtq_chain chain = { .iov = iov, .cap = SM_VIRTQ_SEGS };
    unsigned taken = 0;

    sm_virtio_kicks_off(v, TX);
    do {
        while (taken < TX_BATCH && tx_may_go(d) && sm_virtio_pop(v, TX, &chain)) {
            take_packet(d, &chain);
            sm_virtio_push(v, TX, chain.head, 0);
            taken++;
        }
        if (!tx_may_go(d)) {
            d->tx_stalled = true;
            break;
        }
        if (taken == TX_BATCH) {
            sm_virtio_again(v, TX);
            break;
        }
    } while (sm_virtio_kicks_on(v, TX));
    sm_virtio_notify(v, TX);
}

/* The guest has to be told of a transport reset, or has it taken notice? */
static void kick_event(struct sm_vsock *d)
{
    struct sm_virtio *v = &d->virtio;
    struct sm_virtq *vq = &v->queues[EVENT].vq;
    struct iovec iov[SM_VIRTQ_SEGS];
    struct sm_virtq_chain chain = { .iov = iov, .cap = SM_VIRTQ_SEGS };
    uint32_t id = EVENT_TRANSPORT_RESET;

    if (d->reset_event) {
        do {
            if (sm_virtio_pop(v, EVENT, &chain)) {
                d->reset_event = false;
                break;
            }
        } while (sm_virtio_kicks_on(v, EVENT));
        if (d->reset_event)
            return;
        d->gated = true;
        d->event_seen = sm_virtq_seen(vq);
        sm_iov_write(iov + chain.out, chain.in, &id, sizeof(id));
        sm_virtio_push(v, EVENT, chain.head, sizeof(id));
        sm_virtio_notify(v, EVENT);
    }
    if (d->gated && sm_virtq_kicks_on_after(vq, d->event_seen))
        d->gated = false;
}

static void vsock_kick(struct sm_virtio *v, unsigned queue)
{
    struct sm_vsock *d = (struct sm_vsock *)v;

    if (d->stalled)
        return; /* what the guest sends stays in its queue */
    if (queue == TX)
        kick_tx(d);
    else if (queue == EVENT)
        kick_event(d);
    sm_vsock_pump(d);
}

static void vsock_stop(struct sm_virtio *v)
{
    struct sm_vsock *d = (struct sm_vsock *)v;

    sm_vsock_free_all(d);
    d->reset_head = d->reset_count = 0;
    d->tx_stalled = d->reset_event = d->gated = false;
}

static void vsock_save(struct sm_virtio *v, struct sm_state_writer *w)
{
    struct sm_vsock *d = (struct sm_vsock *)v;

    sm_state_begin(w, "vsock", 1);
    sm_state_put_u64(w, d->guest_cid);
    sm_state_put_u32(w, d->next_port);
    sm_state_end(w);
}

static int vsock_load(struct sm_virtio *v, struct sm_state_reader *r)
{
    struct sm_vsock *d = (struct sm_vsock *)v;

    if (sm_state_open(r, "vsock") != 1)
        return -EBADMSG;
    sm_state_get_u64(r); /* the guest reads its CID again at TRANSPORT_RESET */
    d->next_port = sm_state_get_u32(r);
    sm_state_close(r);
    d->reset_event = v->status & SM_VIRTIO_DRIVER_OK && v->queues[EVENT].vq.size;
    return r->error;
}

static void vsock_destroy(struct sm_virtio *v)
{
    struct sm_vsock *d = (struct sm_vsock *)v;

    sm_io_call(v->io, sm_vsock_unlisten, d);
    sm_virtio_fini(v);
    free(d);
}

static const struct sm_virtio_class vsock_class = {
    .device = SM_VIRTIO_DEVICE_OPS("virtio-vsock"),
    .id = ID_VSOCK,
    .queues = 3,
    .queue_size = QUEUE_SIZE,
    .stop = vsock_stop,
    .kick = vsock_kick,
    .save = vsock_save,
    .load = vsock_load,
    .destroy = vsock_destroy,
};

int sm_virtio_vsock_create(const struct sm_virtio_env *env,
                           const struct sm_vsock_config *cfg, struct sm_virtio_mmio **out)
{
    struct sm_vsock *d;
    int err;

    /* 5.10.4: 0, 1, 2 and the top are reserved, the upper half is zero. */
    if (cfg->guest_cid < 3 || cfg->guest_cid >= UINT32_MAX)
        return -EINVAL;
    d = calloc(1, sizeof(*d));
    if (!d)
        return -ENOMEM;
    d->guest_cid = cfg->guest_cid;
    d->next_port = 1u << 30;
    d->listen_fd = d->listen_watch.fd = -1;
    err = sm_virtio_init(&d->virtio, env, &vsock_class, F_STREAM);
    if (err) {
        free(d);
        return err;
    }
    memcpy(d->virtio.config, &d->guest_cid, sizeof(d->guest_cid));
    d->virtio.config_bytes = sizeof(d->guest_cid);
    err = sm_virtio_mmio_create(&d->virtio, out);
    if (err) {
        vsock_destroy(&d->virtio);
        return err;
    }
    err = cfg->path ? sm_vsock_listen(d, cfg->path) : 0;
    if (err) {
        free(*out);
        vsock_destroy(&d->virtio);
    }
    return err;
}

struct fault_call {
    struct sm_vsock *dev;
    enum sm_vsock_fault what;
    uint32_t port;
};

static int reset_streams(struct sm_vsock *d, uint32_t port)
{
    struct sm_vsock_conn *c, *next;
    int n = 0;

    for (c = d->first; c; c = next) {
        next = c->next;
        if ((c->state == SM_VSOCK_OPEN || c->state == SM_VSOCK_REQUESTED) &&
            (!port || c->host_port == port || c->guest_port == port)) {
            sm_vsock_abort(c);
            n++;
        }
    }
    sm_vsock_pump(d);
    return n;
}

static int do_fault(void *arg)
{
    struct fault_call *call = arg;
    struct sm_vsock *d = call->dev;

    switch (call->what) {
    case SM_VSOCK_FAULT_RESET:
        return reset_streams(d, call->port);
    case SM_VSOCK_FAULT_STALL:
        d->stalled = true;
        return 0;
    case SM_VSOCK_FAULT_GO:
        d->stalled = false;
        sm_vsock_pump(d);
        if (d->virtio.running) {
            sm_virtio_again(&d->virtio, TX);
            sm_virtio_again(&d->virtio, EVENT);
        }
        return 0;
    }
    return -EINVAL;
}

int sm_virtio_vsock_fault(struct sm_virtio_mmio *dev, enum sm_vsock_fault what, uint32_t port)
{
    struct sm_virtio *v = sm_virtio_mmio_virtio(dev);
    struct fault_call call = { (struct sm_vsock *)v, what, port };

    if (v->class != &vsock_class)
        return -ENODEV;
    return sm_io_call(v->io, do_fault, &call);
}
