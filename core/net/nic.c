/* SPDX-License-Identifier: Apache-2.0 */
/* A card's frames through the policy; see nic.h. The stream to the worker is
 * nic_stream.c. */
#include "nic.h"
#include "nic_stream.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define REPEAT_NS 200000000ull
#define STARTING_NS 90000000000ull /* after ready: servers are still coming up */
#define REPEAT_BYTES 256

static void drop(struct sm_nic *nic, const char *why)
{
    for (unsigned i = 0; i < SM_NIC_REASONS; i++) {
        if (!nic->drops[i].why)
            nic->drops[i].why = why;
        if (nic->drops[i].why == why) {
            nic->drops[i].count++;
            return;
        }
    }
}

/* Once for each destination; the oldest of many may be said again. */
static bool said(struct sm_nic *nic, const void *what, size_t len)
{
    uint32_t h = 2166136261u;

    for (size_t i = 0; i < len; i++)
        h = (h ^ ((const uint8_t *)what)[i]) * 16777619u;
    h |= 1;
    for (unsigned i = 0; i < SM_NIC_SAID; i++)
        if (nic->said[i] == h)
            return true;
    nic->said[nic->next_said++ % SM_NIC_SAID] = h;
    return false;
}

static void say_blocked(struct sm_nic *nic, const struct sm_flow *f, const char *why)
{
    uint8_t key[20] = { f->proto, (uint8_t)(f->remote_port >> 8), (uint8_t)f->remote_port };

    memcpy(key + 3, f->remote.b, 16);
    if (!said(nic, key, sizeof(key)))
        nic->event(nic, &(struct sm_nic_event){ .kind = SM_NIC_BLOCKED, .flow = f, .why = why },
                   nic->arg);
}

/* ---- checksums and segments ---- */

void sm_nic_finish_csum(struct sm_net_hdr *hdr, uint8_t *frame, const struct sm_packet *p)
{
    uint8_t *field = frame + p->l4 + (p->proto == IPPROTO_TCP ? 16 : 6);
    uint16_t sum;

    if (!(hdr->flags & SM_NET_HDR_NEEDS_CSUM))
        return;
    sm_set_be16(field, 0);
    sum = sm_csum_l4(&p->src, &p->dst, p->proto, frame + p->l4, p->len - p->l4);
    sm_set_be16(field, sum || p->proto == IPPROTO_TCP ? sum : 0xffff);
    hdr->flags = 0;
    hdr->csum_start = hdr->csum_offset = 0;
}

/* The worker checked it already, if it still is the worker's own code. */
static void clean_header(struct sm_net_hdr *h)
{
    h->flags &= SM_NET_HDR_NEEDS_CSUM;
    h->num_buffers = 0;
    if (!h->flags)
        h->csum_start = h->csum_offset = 0;
    if (!h->gso_type)
        h->gso_size = h->hdr_len = 0;
}

/* A header may point nowhere but at its packet's own checksum: a backend that
 * fills it in (a tap) would else write over what the policy has read. */
static const char *check_offloads(const struct sm_net_hdr *h, const struct sm_packet *p)
{
    uint8_t gso = h->gso_type & (uint8_t)~SM_NET_GSO_ECN;
    bool tcp = p->kind == SM_PACKET_TCP;

    if (h->flags & SM_NET_HDR_NEEDS_CSUM &&
        ((!tcp && p->kind != SM_PACKET_UDP) || p->first_fragment || h->csum_start != p->l4 ||
         h->csum_offset != (tcp ? 16 : 6)))
        return "checksum offload that points elsewhere";
    if (h->gso_type && (!h->gso_size || !h->flags || h->hdr_len > p->len))
        return "malformed segmentation";
    if (h->gso_type && (!tcp || p->first_fragment || gso != (p->src.family == 4 ? SM_NET_GSO_TCPV4
                                                                        : SM_NET_GSO_TCPV6)))
        return "segmentation of what is no TCP";
    return NULL;
}

/* ---- out ---- */

static void answer(struct sm_nic *nic, const uint8_t *frame, size_t len)
{
    struct sm_net_hdr h = { .flags = SM_NET_HDR_DATA_VALID };

    sm_nic_queue(nic, &h, frame, len);
}

static void refuse(struct sm_nic *nic, const struct sm_packet *p)
{
    uint8_t out[1536];
    size_t len = sm_packet_refuse(p, out, sizeof(out));

    if (len)
        answer(nic, out, len);
}

static void hold(struct sm_flow *f, const struct sm_net_hdr *h, const uint8_t *frame, size_t len)
{
    if (f->held)
        return;
    f->held = malloc(sizeof(*h) + len);
    if (f->held) {
        memcpy(f->held, h, sizeof(*h));
        memcpy((uint8_t *)f->held + sizeof(*h), frame, len);
        f->held_len = sizeof(*h) + len;
    }
}

static void let_go(struct sm_nic *nic, struct sm_flow *f)
{
    if (f->again_ns)
        nic->repeats--;
    free(f->held);
    f->held = NULL;
    f->again_ns = 0;
}

/* A guest that has just come up refuses what its server will take in a moment:
 * the client's SYN is repeated instead. True: the refusal goes no further. */
static bool swallow_reset(struct sm_nic *nic, struct sm_flow *f, const struct sm_packet *p)
{
    if (!f || !f->inbound || p->kind != SM_PACKET_TCP || !f->held)
        return false;
    if (p->tcp_flags & SM_TCP_RST && nic->now_ns < nic->ready_ns + STARTING_NS) {
        if (!f->again_ns)
            nic->repeats++;
        f->again_ns = nic->now_ns + REPEAT_NS;
        f->closed = false;
        return true;
    }
    if (f->established)
        nic->served[p->sport / 64] |= 1ull << (p->sport % 64);
    let_go(nic, f);
    return false;
}

static void repeat(struct sm_nic *nic, struct sm_poll *poll)
{
    struct sm_policy *p = &nic->policy;

    for (uint32_t i = p->newest; i && nic->repeats; i = p->flows[i - 1].older) {
        struct sm_flow *f = &p->flows[i - 1];

        if (!f->again_ns)
            continue;
        if (f->again_ns <= nic->now_ns) {
            struct sm_net_hdr h;

            f->again_ns = nic->now_ns + REPEAT_NS * 20; /* unless refused before */
            memcpy(&h, f->held, sizeof(h));
            sm_nic_queue(nic, &h, (uint8_t *)f->held + sizeof(h), f->held_len - sizeof(h));
        }
        if (poll)
            sm_poll_at(poll, f->again_ns);
    }
}

static void ask_resolver(struct sm_nic *nic, const uint8_t *frame, const struct sm_packet *p)
{
    struct sm_dns_question q;
    const uint8_t *msg = frame + p->payload;
    size_t len = p->len - p->payload;
    uint8_t out[SM_RESOLVER_BYTES + 128], copy[SM_RESOLVER_BYTES];

    nic->dns_questions++;
    if (sm_dns_query(msg, len, &q) || len > SM_RESOLVER_BYTES) {
        drop(nic, "malformed DNS question");
        return;
    }
    if (sm_policy_may_ask(&nic->policy, q.name)) {
        sm_resolver_ask(&nic->resolver, frame, p->len, p->payload, &q, nic->now_ns);
        return;
    }
    drop(nic, "name not on the list");
    if (!said(nic, q.name, strlen(q.name)))
        nic->event(nic, &(struct sm_nic_event){ .kind = SM_NIC_NAME, .name = q.name }, nic->arg);
    memcpy(copy, msg, len);
    len = sm_dns_empty(copy, &q, SM_DNS_REFUSED);
    len = sm_packet_udp_reply(p, copy, len, out, sizeof(out));
    if (len)
        answer(nic, out, len);
}

static void pass(struct sm_nic *nic, struct sm_net_hdr *h, uint8_t *frame, struct sm_packet *p)
{
    if (h->flags & SM_NET_HDR_NEEDS_CSUM && (!(nic->backend->ops->takes & SM_NET_OFFLOAD_CSUM) || nic->captures.count))
        if (!h->gso_type || !(nic->backend->ops->takes & SM_NET_OFFLOAD_TSO4))
            sm_nic_finish_csum(h, frame, p);
    nic->out_frames++;
    nic->out_bytes += p->len;
    sm_captures_frame(&nic->captures, frame, p->len);
    nic->backend->ops->send(nic->backend, h, frame, p->len);
}

void sm_nic_out(struct sm_nic *nic, struct sm_net_hdr *h, uint8_t *frame, size_t len)
{
    struct sm_packet p;
    struct sm_flow *flow;
    const char *why;
    bool fresh;
    enum sm_verdict v;

    clean_header(h);
    sm_packet_parse(frame, len, &p);
    why = p.kind == SM_PACKET_BAD ? NULL : check_offloads(h, &p);
    if (why) {
        drop(nic, why);
        return;
    }
    v = sm_policy_out(&nic->policy, &p, nic->now_ns, &flow, &why, &fresh);
    switch (v) {
    case SM_PASS:
        if (swallow_reset(nic, flow, &p))
            return;
        pass(nic, h, frame, &p);
        break;
    case SM_DNS:
        ask_resolver(nic, frame, &p);
        break;
    case SM_ASK:
        if (flow->held)
            return; /* its first frame waits already */
        hold(flow, h, frame, p.len);
        if (fresh)
            nic->event(nic, &(struct sm_nic_event){ .kind = SM_NIC_ASK, .flow = flow }, nic->arg);
        break;
    case SM_REJECT:
        drop(nic, why);
        refuse(nic, &p);
        if (fresh)
            say_blocked(nic, flow, why);
        break;
    case SM_DROP:
        drop(nic, why);
        break;
    }
}

int sm_nic_decide(struct sm_nic *nic, uint32_t flow_id, bool allow)
{
    struct sm_flow *f = sm_policy_flow(&nic->policy, flow_id);
    uint8_t *held;

    if (!f || f->verdict != SM_ASK)
        return -ESRCH;
    f->verdict = allow ? SM_PASS : SM_REJECT;
    f->why = "denied by the script";
    held = f->held;
    f->held = NULL;
    if (held) {
        struct sm_net_hdr h;

        memcpy(&h, held, sizeof(h));
        if (!allow)
            say_blocked(nic, f, f->why);
        sm_nic_out(nic, &h, held + sizeof(h), f->held_len - sizeof(h));
    }
    free(held);
    return 0;
}

/* ---- in ---- */

void sm_nic_deliver(struct sm_nic *nic, const struct sm_net_hdr *hdr, const uint8_t *frame,
                    size_t len)
{
    struct sm_packet p;
    struct sm_flow *f;

    sm_packet_parse(frame, len, &p);
    f = sm_policy_in(&nic->policy, &p, nic->now_ns);
    if (f && f->inbound && !f->established && !f->held && nic->ready && len <= REPEAT_BYTES &&
        (p.tcp_flags & (SM_TCP_SYN | SM_TCP_ACK)) == SM_TCP_SYN && p.kind == SM_PACKET_TCP &&
        nic->now_ns < nic->ready_ns + STARTING_NS &&
        !(nic->served[p.dport / 64] >> (p.dport % 64) & 1))
        hold(f, hdr, frame, len);
    nic->in_frames++;
    nic->in_bytes += len;
    sm_captures_frame(&nic->captures, frame, len);
    sm_nic_queue(nic, hdr, frame, len);
}

/* ---- names ---- */

struct lesson {
    struct sm_nic *nic;
    const char *name;
    struct sm_addr bad;
};

static bool learn(const struct sm_addr *addr, uint32_t ttl_s, void *arg)
{
    struct lesson *l = arg;

    if (sm_policy_learn(&l->nic->policy, l->name, addr, ttl_s, l->nic->now_ns))
        return true;
    l->bad = *addr;
    return false;
}

static void on_answer(const struct sm_resolver_answer *a, void *arg)
{
    struct sm_nic *nic = arg;
    struct lesson l = { .nic = nic, .name = a->question->name };
    struct sm_packet p;
    uint8_t empty[SM_RESOLVER_BYTES], *out;
    const uint8_t *msg = a->msg;
    size_t len = a->len, cap = 65536 + 128, room;

    sm_packet_parse(a->frame, a->frame_len, &p);
    if (sm_be16(msg + 4) &&
        sm_dns_addresses(msg, len, a->question->end, learn, &l)) {
        drop(nic, "malformed DNS answer");
        return;
    }
    if (l.bad.family) {
        drop(nic, "DNS rebinding");
        if (!said(nic, l.name, strlen(l.name)))
            nic->event(nic, &(struct sm_nic_event){ .kind = SM_NIC_REBINDING, .name = l.name,
                                                   .addr = l.bad }, nic->arg);
        memcpy(empty, a->frame + p.payload, p.len - p.payload);
        len = sm_dns_empty(empty, a->question, 0);
        msg = empty;
    }
    room = nic->mtu - (p.src.family == 4 ? 28 : 48);
    if (len > room) { /* the resolver library knows what to do about TC */
        memcpy(empty, a->frame + p.payload, p.len - p.payload);
        len = sm_dns_empty(empty, a->question, 0);
        empty[2] |= 2;
        msg = empty;
    }
    out = malloc(cap);
    if (out && (len = sm_packet_udp_reply(&p, msg, len, out, cap)))
        answer(nic, out, len);
    free(out);
}

/* ---- life ---- */

static void flow_gone(struct sm_flow *f, void *arg)
{
    struct sm_nic *nic = arg;

    if (f->again_ns)
        nic->repeats--;
}

static int listen_at(const char *path)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int fd, err;

    if (strlen(path) >= sizeof(addr.sun_path))
        return -ENAMETOOLONG;
    strcpy(addr.sun_path, path);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    if (bind(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0 || listen(fd, 1) < 0) {
        err = -errno;
        close(fd);
        return err;
    }
    return fd;
}

int sm_nic_create(const char *name, const char *path, struct sm_nic **out)
{
    struct sm_nic *nic = calloc(1, sizeof(*nic));
    int err;

    if (!nic)
        return -ENOMEM;
    snprintf(nic->name, sizeof(nic->name), "%s", name);
    nic->fd = nic->listen_fd = -1;
    nic->in = malloc(SM_NIC_IN_BYTES);
    err = nic->in ? sm_policy_init(&nic->policy) : -ENOMEM;
    if (err) {
        free(nic->in);
        free(nic);
        return err;
    }
    nic->policy.flow_gone = flow_gone;
    nic->policy.arg = nic;
    sm_resolver_init(&nic->resolver, on_answer, nic);
    nic->listen_fd = listen_at(path);
    if (nic->listen_fd < 0) {
        err = nic->listen_fd;
        nic->listen_fd = -1;
        sm_nic_destroy(nic);
        return err;
    }
    snprintf(nic->path, sizeof(nic->path), "%s", path);
    *out = nic;
    return 0;
}

void sm_nic_destroy(struct sm_nic *nic)
{
    if (!nic)
        return;
    if (nic->backend)
        nic->backend->ops->destroy(nic->backend);
    sm_resolver_close(&nic->resolver);
    sm_policy_free(&nic->policy);
    sm_captures_close(&nic->captures);
    if (nic->fd >= 0)
        close(nic->fd);
    if (nic->listen_fd >= 0)
        close(nic->listen_fd);
    if (nic->path[0])
        unlink(nic->path); /* fails once confined: its folder goes with the VM */
    free(nic->in);
    free(nic->out);
    free(nic);
}

void sm_nic_fill(struct sm_nic *nic, struct sm_poll *poll)
{
    nic->now_ns = poll->now_ns;
    if (nic->repeats)
        repeat(nic, poll);
    sm_nic_stream_fill(nic, poll); /* behind all that may queue, in front of who asks sm_nic_full */
    sm_resolver_fill(&nic->resolver, poll);
    sm_captures_fill(&nic->captures, poll);
    if (nic->backend)
        nic->backend->ops->fill(nic->backend, poll);
}

void sm_nic_serve(struct sm_nic *nic, struct sm_poll *poll)
{
    nic->now_ns = poll->now_ns;
    if (nic->backend)
        nic->backend->ops->serve(nic->backend, poll);
    sm_resolver_serve(&nic->resolver, poll, poll->now_ns);
    if (nic->repeats)
        repeat(nic, NULL);
    sm_nic_stream_serve(nic, poll);
    sm_captures_flush(&nic->captures);
}
