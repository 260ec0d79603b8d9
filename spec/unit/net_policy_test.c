/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The egress policy on frames built by hand: destinations by policies, and
 * what a hostile guest tries: other people's addresses, fragments, odd
 * headers, tags, ports used again, DNS that points inside.
 */
#include "net/dns.h"
#include "net/policy.h"
#include "test.h"

#include <stdlib.h>
#include <netinet/in.h>

static const uint8_t mac[6] = { 2, 0x73, 0, 0, 0, 1 };
static struct sm_policy p;
static uint8_t frame[2048];
static size_t len;
static uint64_t now = 1000000000000ull;
static struct sm_flow *flow;
static const char *why;
static bool fresh;

static struct sm_addr addr(const char *text)
{
    struct sm_addr a;

    CHECK(sm_addr_parse(text, &a));
    return a;
}

static void open_policy(enum sm_policy_default fallback)
{
    CHECK_EQ(sm_policy_init(&p), 0);
    memcpy(p.mac, mac, 6);
    p.ip4 = addr("10.0.2.15");
    p.gw4 = addr("10.0.2.2");
    p.dns4 = addr("10.0.2.3");
    p.subnet4 = addr("10.0.2.0");
    p.prefix4 = 24;
    p.ip6 = addr("fd00:736d::15");
    p.gw6 = addr("fd00:736d::2");
    p.dns6 = addr("fd00:736d::3");
    p.subnet6 = addr("fd00:736d::");
    p.prefix6 = 64;
    p.dhcp = true;
    p.fallback = fallback;
}

static void rule(bool allow, const char *text)
{
    const char *err;

    CHECK_EQ(sm_policy_add_rule(&p, allow, text, &err), 0);
}

/* ---- frames ---- */

static uint8_t *ether(uint16_t type)
{
    memset(frame, 0, sizeof(frame));
    memset(frame, 0x52, 6);
    memcpy(frame + 6, mac, 6);
    sm_set_be16(frame + 12, type);
    return frame + 14;
}

static void fix_csum(void)
{
    sm_set_be16(frame + 24, 0);
    sm_set_be16(frame + 24, sm_csum_fold(sm_csum_add(0, frame + 14, 20)));
}

/* An IP packet with room for `l4` bytes; where those are. */
static uint8_t *ip(const char *src, const char *dst, uint8_t proto, size_t l4)
{
    struct sm_addr s = addr(src), d = addr(dst);
    uint8_t *h = ether(s.family == 4 ? 0x0800 : 0x86dd);

    if (s.family == 4) {
        h[0] = 0x45;
        sm_set_be16(h + 2, (uint16_t)(20 + l4));
        h[8] = 64;
        h[9] = proto;
        memcpy(h + 12, s.b, 4);
        memcpy(h + 16, d.b, 4);
        fix_csum();
        len = 14 + 20 + l4;
        return h + 20;
    }
    h[0] = 0x60;
    sm_set_be16(h + 4, (uint16_t)l4);
    h[6] = proto;
    h[7] = 255;
    memcpy(h + 8, s.b, 16);
    memcpy(h + 24, d.b, 16);
    len = 14 + 40 + l4;
    return h + 40;
}

static const char *me(const char *dst)
{
    return strchr(dst, ':') ? "fd00:736d::15" : "10.0.2.15";
}

static void tcp(const char *dst, uint16_t sport, uint16_t dport, uint8_t flags, uint32_t seq)
{
    uint8_t *t = ip(me(dst), dst, IPPROTO_TCP, 20);

    sm_set_be16(t, sport);
    sm_set_be16(t + 2, dport);
    sm_set_be32(t + 4, seq);
    t[12] = 5 << 4;
    t[13] = flags;
}

static void udp(const char *dst, uint16_t sport, uint16_t dport)
{
    uint8_t *u = ip(me(dst), dst, IPPROTO_UDP, 12);

    sm_set_be16(u, sport);
    sm_set_be16(u + 2, dport);
    sm_set_be16(u + 4, 12);
}

static enum sm_verdict out(void)
{
    struct sm_packet pkt;

    sm_packet_parse(frame, len, &pkt);
    return sm_policy_out(&p, &pkt, now, &flow, &why, &fresh);
}

static struct sm_flow *in(void)
{
    struct sm_packet pkt;

    sm_packet_parse(frame, len, &pkt);
    return sm_policy_in(&p, &pkt, now);
}

static enum sm_verdict syn(const char *dst, uint16_t port)
{
    static uint16_t sport = 1024;

    tcp(dst, ++sport, port, SM_TCP_SYN, 1);
    return out();
}

/* ---- who is it, where to ---- */

static const char *const public[] = { "8.8.8.8", "93.184.216.34", "2606:4700::1111",
                                      "64:ff9b::808:808", "2002:808:808::1" };
static const char *const inside[] = {
    "10.0.2.2",       "10.1.2.3",        "172.16.0.1",    "172.31.255.255",  "192.168.1.1",
    "100.64.0.1",     "169.254.169.254", "169.254.1.1",   "192.0.2.1",       "198.18.0.1",
    "240.0.0.1",      "fd00:736d::2",    "fd00:ec2::254", "fe80::1",         "fc00::1",
    "fec0::1",        "64:ff9b::a01:203", "2002:a01:203::1", "2001:0:1::1",  "2001:db8::1",
    "100.100.100.200", "64:ff9b::7f00:1",
};
static const char *const never[] = { "127.0.0.1", "127.9.9.9", "0.0.0.0", "0.1.2.3",
                                     "::ffff:8.8.8.8", "::ffff:127.0.0.1", "::1", "::",
                                     "::8.8.8.8", "224.0.0.251", "255.255.255.255", "ff02::fb" };
#define N(a) (sizeof(a) / sizeof((a)[0]))

static void test_matrix(void)
{
    for (int fallback = SM_DEFAULT_ALLOW_ALL; fallback <= SM_DEFAULT_DENY; fallback++) {
        open_policy((enum sm_policy_default)fallback);
        for (size_t i = 0; i < N(public); i++)
            CHECK_EQ(syn(public[i], 80), fallback == SM_DEFAULT_DENY ? SM_REJECT : SM_PASS);
        for (size_t i = 0; i < N(inside); i++)
            CHECK_EQ(syn(inside[i], 80), fallback == SM_DEFAULT_ALLOW_ALL ? SM_PASS : SM_REJECT);
        for (size_t i = 0; i < N(never); i++) {
            enum sm_verdict v = syn(never[i], 80);

            CHECK(v == SM_REJECT || v == SM_DROP);
        }
        /* Nobody is at the other addresses of the virtual network: libslirp
         * would take every one of them for the host's loopback. */
        CHECK_EQ(syn("10.0.2.77", 80), SM_REJECT);
        CHECK_EQ(syn("fd00:736d::77", 80), SM_REJECT);
        sm_policy_free(&p);
    }
}

static void test_own_addresses_are_the_host(void)
{
    open_policy(SM_DEFAULT_DENY_PRIVATE);
    p.own[p.own_count++] = addr("93.184.216.99");
    CHECK_EQ(syn("93.184.216.99", 22), SM_REJECT);
    CHECK(!strcmp(why, "the host"));
    CHECK_EQ(syn("93.184.216.98", 22), SM_PASS);
    sm_policy_free(&p);
}

static void test_rules(void)
{
    open_policy(SM_DEFAULT_DENY_PRIVATE);
    rule(true, "10.1.0.0/16:80-90");
    rule(true, "host:8000");
    rule(true, "[fd12::/16]:443");
    rule(false, "8.8.0.0/16");
    rule(false, "10.1.2.99");
    CHECK_EQ(syn("10.1.2.3", 80), SM_PASS);
    CHECK_EQ(syn("10.1.2.3", 91), SM_REJECT);
    CHECK_EQ(syn("10.2.2.3", 80), SM_REJECT);
    CHECK_EQ(syn("10.1.2.99", 80), SM_REJECT); /* deny beats allow */
    CHECK_EQ(syn("10.0.2.2", 8000), SM_PASS);
    CHECK_EQ(syn("10.0.2.2", 8001), SM_REJECT);
    CHECK_EQ(syn("fd00:736d::2", 8000), SM_PASS);
    CHECK_EQ(syn("fd12::5", 443), SM_PASS);
    CHECK_EQ(syn("fd12::5", 444), SM_REJECT);
    CHECK_EQ(syn("8.8.8.8", 53), SM_REJECT);
    CHECK_EQ(syn("127.0.0.1", 8000), SM_REJECT); /* even so */
    sm_policy_free(&p);
    open_policy(SM_DEFAULT_DENY);
    rule(true, "127.0.0.1:9"); /* the host, by the name people give it */
    rule(true, "*:443");
    CHECK_EQ(syn("10.0.2.2", 9), SM_PASS);
    CHECK_EQ(syn("8.8.8.8", 443), SM_PASS);
    CHECK_EQ(syn("10.0.2.2", 443), SM_REJECT); /* the world is not the host */
    sm_policy_free(&p);
}

static void test_malformed_rules(void)
{
    static const char *const bad[] = { "10.0.0.0/33", "10.0.0.0/", "10.0.0.0/8x", "a b", "", "1.2.3",
                                       "name/8", "host:0", "host:65536", "host:9-8", "host:x",
                                       "[::1", "[::1]x", "fd00::/129", "*.", "1.2.3.4.5:80" };
    const char *err;

    open_policy(SM_DEFAULT_DENY);
    for (size_t i = 0; i < N(bad); i++) {
        err = NULL;
        CHECK_EQ(sm_policy_add_rule(&p, true, bad[i], &err), -22);
        CHECK(err && *err);
    }
    CHECK_EQ(p.rule_count, 0);
    sm_policy_free(&p);
}

static void test_no_other_identity(void)
{
    open_policy(SM_DEFAULT_ALLOW_ALL);
    tcp("8.8.8.8", 1, 80, SM_TCP_SYN, 1);
    frame[6] ^= 4;
    CHECK_EQ(out(), SM_DROP);
    ip("10.0.2.16", "8.8.8.8", IPPROTO_UDP, 12);
    sm_set_be16(frame + 34 + 4, 12);
    CHECK_EQ(out(), SM_DROP);
    ip("fd00:736d::16", "2606:4700::1111", IPPROTO_UDP, 12);
    sm_set_be16(frame + 54 + 4, 12);
    CHECK_EQ(out(), SM_DROP);
    CHECK(!strcmp(why, "another's IP address"));
    sm_policy_free(&p);
}

static uint8_t *arp(uint16_t op, const char *sender)
{
    struct sm_addr s = addr(sender);
    uint8_t *a = ether(0x0806);

    memset(frame, 0xff, 6);
    sm_set_be16(a, 1);
    sm_set_be16(a + 2, 0x0800);
    a[4] = 6;
    a[5] = 4;
    sm_set_be16(a + 6, op);
    memcpy(a + 8, mac, 6);
    memcpy(a + 14, s.b, 4);
    len = 14 + 28;
    return a;
}

static void test_arp(void)
{
    open_policy(SM_DEFAULT_DENY_PRIVATE);
    arp(1, "10.0.2.15");
    CHECK_EQ(out(), SM_PASS);
    arp(1, "0.0.0.0"); /* a probe */
    CHECK_EQ(out(), SM_PASS);
    arp(2, "10.0.2.2"); /* "I am the gateway" */
    CHECK_EQ(out(), SM_DROP);
    arp(1, "10.0.2.2");
    CHECK_EQ(out(), SM_DROP);
    arp(2, "10.0.2.15")[9] ^= 1;
    CHECK_EQ(out(), SM_DROP);
    arp(3, "10.0.2.15");
    CHECK_EQ(out(), SM_DROP);
    arp(1, "10.0.2.15");
    len -= 1;
    CHECK_EQ(out(), SM_DROP);
    sm_policy_free(&p);
}

/* Neighbour discovery with the option of our own or another's link. */
static uint8_t *nd(uint8_t type, const char *target, const uint8_t *link)
{
    struct sm_addr t = addr(target);
    uint8_t *n = ip("fd00:736d::15", "ff02::1", IPPROTO_ICMPV6, 32);

    frame[0] = 0x33;
    frame[1] = 0x33;
    n[0] = type;
    memcpy(n + 8, t.b, 16);
    n[24] = type == 136 ? 2 : 1;
    n[25] = 1;
    memcpy(n + 26, link, 6);
    return n;
}

static void test_nd(void)
{
    static const uint8_t other[6] = { 2, 1, 1, 1, 1, 1 };

    open_policy(SM_DEFAULT_DENY_PRIVATE);
    nd(135, "fd00:736d::2", mac);
    CHECK_EQ(out(), SM_PASS);
    nd(136, "fd00:736d::15", mac);
    CHECK_EQ(out(), SM_PASS);
    nd(136, "fe80::73:ff:fe00:1", mac); /* by our MAC */
    CHECK_EQ(out(), SM_PASS);
    nd(136, "fd00:736d::2", mac); /* "I am the gateway" */
    CHECK_EQ(out(), SM_DROP);
    nd(136, "fd00:736d::15", other);
    CHECK_EQ(out(), SM_DROP);
    nd(134, "fd00:736d::15", mac); /* "I am a router" */
    CHECK_EQ(out(), SM_DROP);
    nd(137, "fd00:736d::15", mac);
    CHECK_EQ(out(), SM_DROP);
    nd(135, "fd00:736d::2", mac);
    frame[14 + 7] = 64; /* came over a router */
    CHECK_EQ(out(), SM_DROP);
    nd(135, "fd00:736d::2", mac)[25] = 0; /* an option of no length */
    CHECK_EQ(out(), SM_DROP);
    sm_policy_free(&p);
}

static void test_odd_headers(void)
{
    open_policy(SM_DEFAULT_ALLOW_ALL);
    tcp("8.8.8.8", 1, 80, SM_TCP_SYN, 1);
    sm_set_be16(frame + 12, 0x8100); /* a tag */
    CHECK_EQ(out(), SM_DROP);
    tcp("8.8.8.8", 1, 80, SM_TCP_SYN, 1);
    frame[14] = 0x46; /* options: 20 bytes of TCP begin 4 bytes early */
    fix_csum();
    CHECK_EQ(out(), SM_DROP);
    tcp("8.8.8.8", 1, 80, SM_TCP_SYN, 1);
    sm_set_be16(frame + 16, 4000); /* longer than the frame */
    fix_csum();
    CHECK_EQ(out(), SM_DROP);
    tcp("8.8.8.8", 1, 80, SM_TCP_SYN, 1);
    frame[24] ^= 1; /* checksum */
    CHECK_EQ(out(), SM_DROP);
    tcp("8.8.8.8", 1, 80, SM_TCP_SYN, 1);
    frame[34 + 12] = 15 << 4; /* header longer than the packet */
    CHECK_EQ(out(), SM_DROP);
    udp("8.8.8.8", 1, 80);
    sm_set_be16(frame + 34 + 4, 13);
    CHECK_EQ(out(), SM_DROP);
    ip("10.0.2.15", "8.8.8.8", 47, 20); /* GRE */
    CHECK_EQ(out(), SM_DROP);
    ip("fd00:736d::15", "2606:4700::1111", IPPROTO_ROUTING, 24);
    CHECK_EQ(out(), SM_DROP);
    ip("fd00:736d::15", "2606:4700::1111", IPPROTO_DSTOPTS, 24);
    CHECK_EQ(out(), SM_DROP);
    ip("fd00:736d::15", "2606:4700::1111", IPPROTO_FRAGMENT, 40)[0] = IPPROTO_ROUTING;
    CHECK_EQ(out(), SM_DROP);
    ip("10.0.2.15", "8.8.8.8", IPPROTO_ICMPV6, 20);
    CHECK_EQ(out(), SM_DROP);
    for (len = 0; len < 60; len++) /* cut anywhere */
        CHECK(out() == SM_DROP);
    sm_policy_free(&p);
}

/* A ping may not be the cover of other ICMP. */
static void test_icmp_in_a_flow(void)
{
    static const uint8_t others[] = { 3, 5, 13, 17, 0 };

    open_policy(SM_DEFAULT_ALLOW_ALL);
    for (unsigned i = 0; i < 2; i++) {
        const char *to = i ? "10.0.2.2" : "93.184.216.34"; /* the gateway; a host */

        ip("10.0.2.15", to, IPPROTO_ICMP, 8)[0] = 8;
        CHECK_EQ(out(), SM_PASS);
        for (unsigned t = 0; t < sizeof(others); t++) {
            ip("10.0.2.15", to, IPPROTO_ICMP, 8)[0] = others[t];
            CHECK_EQ(out(), SM_DROP);
        }
    }
    ip("fd00:736d::15", "fd00:736d::2", IPPROTO_ICMPV6, 8)[0] = 128;
    CHECK_EQ(out(), SM_PASS);
    ip("fd00:736d::15", "fd00:736d::2", IPPROTO_ICMPV6, 8)[0] = 96;
    CHECK_EQ(out(), SM_DROP);
    sm_policy_free(&p);
}

static void fragment(const char *dst, uint16_t id, uint16_t offset, bool more, uint16_t port)
{
    udp(dst, 7, port);
    sm_set_be16(frame + 34 + 4, 1000);
    sm_set_be16(frame + 18, id);
    sm_set_be16(frame + 20, (uint16_t)(offset / 8 | (more ? 0x2000 : 0)));
    fix_csum();
}

static void test_fragments(void)
{
    open_policy(SM_DEFAULT_DENY_PRIVATE);
    rule(true, "10.9.9.9:53");
    fragment("8.8.8.8", 1, 64, true, 53); /* without its first */
    CHECK_EQ(out(), SM_DROP);
    fragment("8.8.8.8", 1, 0, true, 53);
    CHECK_EQ(out(), SM_PASS);
    fragment("8.8.8.8", 1, 64, false, 53);
    CHECK_EQ(out(), SM_PASS);
    fragment("8.8.8.8", 2, 64, false, 53); /* of another packet */
    CHECK_EQ(out(), SM_DROP);
    fragment("8.8.8.8", 1, 8, false, 53); /* rewrites the header */
    CHECK_EQ(out(), SM_DROP);
    fragment("8.8.8.8", 1, 65528, false, 53); /* beyond 64 KiB */
    CHECK_EQ(out(), SM_DROP);
    /* The same packet first to an open port, then to a shut one. */
    fragment("10.9.9.9", 3, 0, true, 53);
    CHECK_EQ(out(), SM_PASS);
    fragment("10.9.9.9", 3, 0, true, 54);
    CHECK_EQ(out(), SM_REJECT);
    fragment("10.1.1.1", 4, 0, true, 53);
    CHECK_EQ(out(), SM_REJECT);
    fragment("10.1.1.1", 4, 64, false, 53);
    CHECK_EQ(out(), SM_DROP);
    now += 31000000000ull; /* forgotten */
    fragment("8.8.8.8", 1, 64, false, 53);
    CHECK_EQ(out(), SM_DROP);
    sm_policy_free(&p);
}

/* ---- flows ---- */

static void test_flows(void)
{
    open_policy(SM_DEFAULT_DENY_PRIVATE);
    p.ask = true;
    tcp("10.1.2.3", 4000, 80, SM_TCP_SYN, 100);
    CHECK_EQ(out(), SM_ASK);
    CHECK(fresh);
    CHECK_EQ(out(), SM_ASK); /* the same SYN again is the same question */
    CHECK(!fresh);
    flow->verdict = SM_PASS;
    tcp("10.1.2.3", 4000, 80, SM_TCP_ACK, 101);
    CHECK_EQ(out(), SM_PASS);
    tcp("10.1.2.3", 4000, 81, SM_TCP_ACK, 101); /* another port: asked anew */
    CHECK_EQ(out(), SM_ASK);
    tcp("10.1.2.4", 4000, 80, SM_TCP_ACK, 101);
    CHECK_EQ(out(), SM_ASK);
    tcp("10.1.2.3", 4000, 80, SM_TCP_SYN, 999); /* the port used again */
    CHECK_EQ(out(), SM_ASK);
    CHECK(fresh);
    udp("10.1.2.3", 5, 80);
    CHECK_EQ(out(), SM_ASK);
    flow->verdict = SM_PASS;
    CHECK_EQ(out(), SM_PASS);
    now += 121000000000ull;
    CHECK_EQ(out(), SM_ASK);
    sm_policy_free(&p);
}

static void test_replies_pass(void)
{
    uint8_t *t;

    open_policy(SM_DEFAULT_DENY);
    tcp("10.0.2.2", 8080, 5000, SM_TCP_ACK, 1);
    CHECK_EQ(out(), SM_REJECT);
    t = ip("10.0.2.2", "10.0.2.15", IPPROTO_TCP, 20); /* a published port's client */
    sm_set_be16(t, 5001);
    sm_set_be16(t + 2, 8080);
    t[12] = 5 << 4;
    t[13] = SM_TCP_SYN;
    CHECK(in() != NULL);
    tcp("10.0.2.2", 8080, 5001, SM_TCP_SYN | SM_TCP_ACK, 1);
    CHECK_EQ(out(), SM_PASS);
    CHECK(flow->inbound && flow->established);
    tcp("10.0.2.2", 8081, 5001, SM_TCP_ACK, 1); /* the neighbouring port is not */
    CHECK_EQ(out(), SM_REJECT);
    sm_policy_free(&p);
}

/* More flows than fit: bounded, and the old ones are decided again. */
static void test_flow_flood(void)
{
    open_policy(SM_DEFAULT_DENY_PRIVATE);
    for (unsigned i = 0; i < 3 * SM_POLICY_FLOWS; i++) {
        tcp("8.8.8.8", (uint16_t)i, (uint16_t)(1 + i / 65536), SM_TCP_SYN, i);
        CHECK_EQ(out(), SM_PASS);
    }
    CHECK_EQ(p.flow_count, SM_POLICY_FLOWS);
    tcp("10.1.1.1", 1, 1, SM_TCP_ACK, 1);
    CHECK_EQ(out(), SM_REJECT);
    for (unsigned i = 0; i < SM_POLICY_FLOWS; i++)
        CHECK(sm_policy_flow(&p, p.flows[i].id) == &p.flows[i]);
    sm_policy_free(&p);
}

/* ---- names ---- */

static void test_names(void)
{
    struct sm_addr a = addr("93.184.216.34"), b = addr("93.184.216.35");

    open_policy(SM_DEFAULT_DENY);
    rule(true, "example.org:443");
    rule(true, "*.example.net");
    rule(false, "bad.example.net");
    CHECK(sm_policy_may_ask(&p, "EXAMPLE.org"));
    CHECK(sm_policy_may_ask(&p, "a.b.example.net"));
    CHECK(!sm_policy_may_ask(&p, "example.net"));
    CHECK(!sm_policy_may_ask(&p, "bad.example.net"));
    CHECK(!sm_policy_may_ask(&p, "notexample.org"));
    CHECK_EQ(syn("93.184.216.34", 443), SM_REJECT);
    CHECK(sm_policy_learn(&p, "example.org", &a, 1, now));
    CHECK_EQ(syn("93.184.216.34", 443), SM_PASS);
    CHECK_EQ(syn("93.184.216.34", 80), SM_REJECT);
    CHECK_EQ(syn("93.184.216.35", 443), SM_REJECT);
    CHECK(sm_policy_learn(&p, "x.example.net", &b, 10000000, now));
    now += 59000000000ull; /* a TTL of one second counts for a minute */
    CHECK_EQ(syn("93.184.216.34", 443), SM_PASS);
    now += 2000000000ull;
    CHECK_EQ(syn("93.184.216.34", 443), SM_REJECT);
    CHECK_EQ(syn("93.184.216.35", 1), SM_PASS);
    now += 3600000000000ull; /* and the longest for an hour */
    CHECK_EQ(syn("93.184.216.35", 1), SM_REJECT);
    sm_policy_free(&p);
}

static void test_rebinding(void)
{
    struct sm_addr in1 = addr("10.1.2.3"), in2 = addr("192.168.0.1"), lo = addr("127.0.0.1");
    struct sm_addr mapped = addr("::ffff:10.1.2.3"), out1 = addr("8.8.8.8");
    struct sm_addr metadata = addr("169.254.169.254");
    static const char *const held_back[] = { "169.254.169.254", "100.100.100.200", "169.254.9.9", "10.0.2.2" };

    open_policy(SM_DEFAULT_DENY_PRIVATE);
    rule(true, "intranet.test:80");
    rule(true, "192.168.0.0/24");
    CHECK(sm_policy_learn(&p, "evil.test", &out1, 60, now));
    CHECK(!sm_policy_learn(&p, "evil.test", &in1, 60, now));
    CHECK(!sm_policy_learn(&p, "evil.test", &lo, 60, now));
    CHECK(!sm_policy_learn(&p, "evil.test", &mapped, 60, now));
    CHECK_EQ(syn("10.1.2.3", 80), SM_REJECT);
    CHECK(sm_policy_learn(&p, "nas.test", &in2, 60, now)); /* open anyway */
    CHECK(sm_policy_learn(&p, "intranet.test", &in1, 60, now));
    CHECK_EQ(syn("10.1.2.3", 80), SM_PASS);
    CHECK_EQ(syn("10.1.2.3", 81), SM_REJECT);
    CHECK(!sm_policy_learn(&p, "intranet.test", &lo, 60, now));
    /* A name opens neither the host nor what clouds and links keep for themselves. */
    for (size_t i = 0; i < sizeof(held_back) / sizeof(held_back[0]); i++) {
        struct sm_addr a = addr(held_back[i]);

        CHECK(!sm_policy_learn(&p, "intranet.test", &a, 60, now));
        CHECK_EQ(syn(held_back[i], 80), SM_REJECT);
    }
    /* Not even beside a rule that opens another port of it. */
    rule(true, "169.254.169.254:81");
    CHECK(sm_policy_learn(&p, "intranet.test", &metadata, 60, now));
    CHECK_EQ(syn("169.254.169.254", 81), SM_PASS);
    CHECK_EQ(syn("169.254.169.254", 80), SM_REJECT);
    sm_policy_free(&p);
}

static void test_dns_goes_to_us(void)
{
    open_policy(SM_DEFAULT_DENY);
    udp("10.0.2.3", 5, 53);
    CHECK_EQ(out(), SM_DNS);
    udp("fd00:736d::3", 5, 53);
    CHECK_EQ(out(), SM_DNS);
    udp("10.0.2.3", 5, 54);
    CHECK_EQ(out(), SM_REJECT);
    CHECK_EQ(syn("10.0.2.3", 53), SM_REJECT);
    udp("8.8.8.8", 5, 53); /* another's resolver is a flow like any */
    CHECK_EQ(out(), SM_REJECT);
    sm_policy_free(&p);
}

static bool count_addr(const struct sm_addr *a, uint32_t ttl, void *arg)
{
    (void)a;
    (void)ttl;
    ++*(int *)arg;
    return true;
}

static void test_dns_messages(void)
{
    uint8_t q[64] = { 0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3, 'w', 'w', 'w', 1, 'x', 0, 0, 1, 0, 1 };
    uint8_t r[128];
    struct sm_dns_question question;
    int n = 0;

    CHECK_EQ(sm_dns_query(q, 23, &question), 0);
    CHECK(!strcmp(question.name, "www.x"));
    CHECK_EQ(question.end, 23);
    memcpy(r, q, 23);
    r[2] = 0x81;
    r[7] = 1;
    memcpy(r + 23, "\xc0\x0c\0\x01\0\x01\0\0\0\x05\0\x04\x08\x08\x08\x08", 16);
    CHECK_EQ(sm_dns_response(r, 39, q, 23, &question), 0);
    CHECK_EQ(sm_dns_addresses(r, 39, 23, count_addr, &n), 0);
    CHECK_EQ(n, 1);
    for (size_t cut = 23; cut < 39; cut++)
        CHECK(sm_dns_addresses(r, cut, 23, count_addr, &n) < 0);
    r[24] = 23; /* a name that points at itself */
    CHECK(sm_dns_addresses(r, 39, 23, count_addr, &n) < 0);
    r[24] = 12;
    r[13] = 'y';
    CHECK_EQ(sm_dns_response(r, 39, q, 23, &question), -2);
    for (size_t cut = 0; cut < 23; cut++)
        CHECK(sm_dns_query(q, cut, &question) < 0);
    q[5] = 2;
    CHECK(sm_dns_query(q, 23, &question) < 0);
}

static void test_answers(void)
{
    struct sm_packet pkt, reply;
    uint8_t answer[2048];
    static const char *const to[] = { "10.1.2.3", "fd12::1" };

    for (unsigned i = 0; i < 2; i++) {
        tcp(to[i], 4000, 80, SM_TCP_SYN, 100);
        sm_packet_parse(frame, len, &pkt);
        sm_packet_parse(answer, sm_packet_refuse(&pkt, answer, sizeof(answer)), &reply);
        CHECK_EQ(reply.kind, SM_PACKET_TCP);
        CHECK_EQ(reply.tcp_flags, SM_TCP_RST | SM_TCP_ACK);
        CHECK_EQ(reply.ack, 101);
        CHECK_EQ(reply.dport, 4000);
        CHECK(sm_addr_equal(&reply.src, &pkt.dst) && !memcmp(answer, mac, 6));
        CHECK_EQ(sm_csum_l4(&reply.src, &reply.dst, IPPROTO_TCP, answer + reply.l4, 20), 0);
        tcp(to[i], 4000, 80, SM_TCP_RST, 100); /* never a reset for a reset */
        sm_packet_parse(frame, len, &pkt);
        CHECK_EQ(sm_packet_refuse(&pkt, answer, sizeof(answer)), 0);
        udp(to[i], 7, 9);
        sm_packet_parse(frame, len, &pkt);
        sm_packet_parse(answer, sm_packet_refuse(&pkt, answer, sizeof(answer)), &reply);
        CHECK_EQ(reply.kind, SM_PACKET_ICMP);
        CHECK_EQ(reply.icmp_type, i ? 1 : 3);
        sm_packet_parse(answer, sm_packet_udp_reply(&pkt, "abc", 3, answer, sizeof(answer)), &reply);
        CHECK_EQ(reply.kind, SM_PACKET_UDP);
        CHECK_EQ(sm_csum_l4(&reply.src, &reply.dst, IPPROTO_UDP, answer + reply.l4, 11), 0);
    }
}

int main(void)
{
    TEST(test_matrix);
    TEST(test_own_addresses_are_the_host);
    TEST(test_rules);
    TEST(test_malformed_rules);
    TEST(test_no_other_identity);
    TEST(test_arp);
    TEST(test_nd);
    TEST(test_odd_headers);
    TEST(test_fragments);
    TEST(test_flows);
    TEST(test_replies_pass);
    TEST(test_flow_flood);
    TEST(test_icmp_in_a_flow);
    TEST(test_names);
    TEST(test_rebinding);
    TEST(test_dns_goes_to_us);
    TEST(test_dns_messages);
    TEST(test_answers);
    return test_report();
}
