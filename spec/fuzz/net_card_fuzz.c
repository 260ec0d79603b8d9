/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A card of sm-net fed by a worker that a guest has taken over: frames with
 * their offload headers, each behind a length (u16, little-endian), through
 * the whole way out. What reaches the backend is checked as it is then, after
 * checksums were filled in. An odd length is a frame from the world.
 */
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>

#include "net/nic.h"
#include "net/nic_stream.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void world_send(struct sm_backend *b, const struct sm_net_hdr *h, uint8_t *frame, size_t len)
{
    struct sm_policy *p = &b->nic->policy;
    struct sm_packet k;

    sm_packet_parse(frame, len, &k);
    if (k.kind == SM_PACKET_BAD || h->flags || memcmp(frame + 6, p->mac, 6) || k.len != len)
        abort();
    if (k.kind != SM_PACKET_ARP && k.kind != SM_PACKET_ND && k.dport != 67 &&
        h->gso_type && k.kind != SM_PACKET_TCP)
        abort();
}

static void quiet(struct sm_nic *nic, const struct sm_nic_event *e, void *arg)
{
    (void)arg;
    if (e->kind == SM_NIC_ASK && e->flow->id % 3)
        sm_nic_decide(nic, e->flow->id, e->flow->id % 3 == 1);
}

static const struct sm_backend_ops ops = { .type = "fuzz", .send = world_send };

static struct sm_nic *set_up(void)
{
    static const uint8_t mac[6] = { 2, 0x73, 0, 0, 0, 1 };
    static struct sm_backend backend = { .ops = &ops };
    struct sm_nic *nic = calloc(1, sizeof(*nic));

    if (!nic || sm_policy_init(&nic->policy))
        abort();
    memcpy(nic->policy.mac, mac, 6);
    sm_addr_parse("10.0.2.15", &nic->policy.ip4);
    sm_addr_parse("10.0.2.2", &nic->policy.gw4);
    sm_addr_parse("10.0.2.3", &nic->policy.dns4);
    sm_addr_parse("fd00:736d::15", &nic->policy.ip6);
    nic->policy.fallback = SM_DEFAULT_DENY_PRIVATE;
    nic->policy.dhcp = true;
    nic->fd = nic->listen_fd = -1;
    nic->mtu = 65520;
    nic->vnet = nic->ready = true;
    nic->event = quiet;
    sm_resolver_init(&nic->resolver, NULL, nic); /* no server: every question fails at once */
    backend.nic = nic;
    nic->backend = &backend;
    return nic;
}

static void unanswered(const struct sm_resolver_answer *a, void *arg)
{
    (void)a;
    (void)arg;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct sm_nic *nic;

    if (!nic) {
        nic = set_up();
        nic->resolver.answer = unanswered;
    }
    nic->policy.ask = size & 1;
    while (size >= 2) {
        size_t len = (size_t)(data[0] | data[1] << 8);
        struct sm_net_hdr h = { 0 };
        bool in = len & 1;
        uint8_t *copy;

        data += 2;
        size -= 2;
        len = len < size ? len : size;
        nic->now_ns += 1000000000ull;
        if (len < sizeof(h) + SM_NET_MIN_FRAME)
            break;
        memcpy(&h, data, sizeof(h));
        copy = malloc(len - sizeof(h));
        memcpy(copy, data + sizeof(h), len - sizeof(h));
        if (in)
            sm_nic_deliver(nic, &h, copy, len - sizeof(h));
        else
            sm_nic_out(nic, &h, copy, len - sizeof(h));
        free(copy);
        data += len;
        size -= len;
    }
    return 0;
}
