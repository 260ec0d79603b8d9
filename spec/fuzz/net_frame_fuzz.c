/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frames and DNS messages of a hostile guest against the policy. Input: frames,
 * each behind its length (u16, little-endian); a length with the top bit is a
 * DNS answer, with the next one a frame from outside. Whatever passes must be
 * ours by its addresses and go where the default policy lets it go.
 */
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>

#include "net/dns.h"
#include "net/policy.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const uint8_t mac[6] = { 2, 0x73, 0, 0, 0, 1 };

static void set_up(struct sm_policy *p)
{
    const char *err;

    memcpy(p->mac, mac, 6);
    sm_addr_parse("10.0.2.15", &p->ip4);
    sm_addr_parse("10.0.2.2", &p->gw4);
    sm_addr_parse("10.0.2.3", &p->dns4);
    sm_addr_parse("10.0.2.0", &p->subnet4);
    sm_addr_parse("fd00:736d::15", &p->ip6);
    sm_addr_parse("fd00:736d::2", &p->gw6);
    sm_addr_parse("fd00:736d::3", &p->dns6);
    sm_addr_parse("fd00:736d::", &p->subnet6);
    p->prefix4 = 24;
    p->prefix6 = 64;
    p->dhcp = true;
    p->fallback = SM_DEFAULT_DENY_PRIVATE;
    if (sm_policy_add_rule(p, false, "8.8.8.8:53", &err))
        abort();
}

/* What passed is what it seems. */
static void check(const struct sm_policy *p, const struct sm_packet *k, const struct sm_flow *flow)
{
    bool echo = k->icmp_type == 8 || k->icmp_type == 128;

    if (memcmp(k->frame + 6, mac, 6))
        abort();
    if (k->kind == SM_PACKET_ARP || k->kind == SM_PACKET_ND) {
        if (k->link && memcmp(k->link, mac, 6))
            abort();
        return;
    }
    if (k->kind == SM_PACKET_UDP && k->dport == 67)
        return;
    if (k->len > 65535 + 54 || k->l4 > k->len || k->payload > k->len)
        abort();
    if (flow && flow->inbound)
        return; /* an answer */
    if (k->kind == SM_PACKET_ICMP && echo && sm_policy_class(p, &k->dst) == SM_CLASS_HOST)
        return; /* the gateway's own echo */
    if (sm_policy_class(p, &k->dst) != SM_CLASS_PUBLIC)
        abort();
    if (k->kind != SM_PACKET_FRAGMENT && k->kind != SM_PACKET_ICMP && k->dst.family == 4 &&
        !memcmp(k->dst.b, "\x8\x8\x8\x8", 4) && k->dport == 53)
        abort();
}

static bool any(const struct sm_addr *a, uint32_t ttl_s, void *arg)
{
    sm_policy_learn(arg, "name.test", a, ttl_s, 1);
    return true;
}

static void dns(struct sm_policy *p, const uint8_t *msg, size_t len)
{
    static const uint8_t query[] = { 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 'x', 0, 0, 1, 0, 1 };
    struct sm_dns_question q;

    if (sm_dns_query(msg, len, &q) == 0) {
        uint8_t *copy = malloc(len);

        memcpy(copy, msg, len);
        if (strlen(q.name) >= SM_DNS_NAME || q.end > len || sm_dns_empty(copy, &q, 5) > len)
            abort();
        sm_policy_may_ask(p, q.name);
        free(copy);
    }
    sm_dns_query(query, sizeof(query), &q);
    if (sm_dns_response(msg, len, query, sizeof(query), &q) == 0 && sm_be16(msg + 4))
        sm_dns_addresses(msg, len, q.end, any, p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct sm_policy p; /* its tables are large: kept, and emptied by age */
    static uint64_t now = 1;
    uint8_t answer[2048];

    if (!p.flows) {
        if (sm_policy_init(&p))
            abort();
        set_up(&p);
    }
    while (size >= 2) {
        unsigned head = data[0] | data[1] << 8;
        size_t len = head & 0x3fff;
        struct sm_packet k;
        struct sm_flow *flow;
        const char *why;
        bool fresh;
        uint8_t *copy;

        data += 2;
        size -= 2;
        len = len < size ? len : size;
        copy = malloc(len ? len : 1); /* its own, so that ASan sees its end */
        memcpy(copy, data, len);
        data += len;
        size -= len;
        now += 50000000000ull;
        if (head & 0x8000) {
            dns(&p, copy, len);
        } else {
            enum sm_verdict v;

            sm_packet_parse(copy, len, &k);
            if (head & 0x4000) {
                sm_policy_in(&p, &k, now);
            } else {
                v = sm_policy_out(&p, &k, now, &flow, &why, &fresh);
                if (v == SM_PASS)
                    check(&p, &k, flow);
                else if (v == SM_REJECT && (!why || sm_packet_refuse(&k, answer, sizeof(answer)) > sizeof(answer)))
                    abort();
            }
        }
        free(copy);
    }
    return 0;
}
