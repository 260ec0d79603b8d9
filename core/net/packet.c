/* SPDX-License-Identifier: Apache-2.0 */
/* Frames taken apart; see packet.h. */
#include "packet.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>

#define ETHER 14
#define TYPE_IP4 0x0800
#define TYPE_ARP 0x0806
#define TYPE_IP6 0x86dd
#define TYPE_VLAN 0x8100
#define TYPE_QINQ 0x88a8
#define IP6_HEADER 40

/* ---- addresses ---- */

bool sm_addr_equal(const struct sm_addr *a, const struct sm_addr *b)
{
    return a->family == b->family && !memcmp(a->b, b->b, sizeof(a->b));
}

bool sm_addr_in(const struct sm_addr *a, const struct sm_addr *net, unsigned prefix)
{
    unsigned bytes = prefix / 8, bits = prefix % 8;

    if (a->family != net->family || memcmp(a->b, net->b, bytes))
        return false;
    return !bits || !((a->b[bytes] ^ net->b[bytes]) >> (8 - bits));
}

bool sm_addr_parse(const char *text, struct sm_addr *out)
{
    memset(out, 0, sizeof(*out));
    if (inet_pton(AF_INET, text, out->b) == 1)
        out->family = 4;
    else if (inet_pton(AF_INET6, text, out->b) == 1)
        out->family = 6;
    return out->family;
}

const char *sm_addr_text(const struct sm_addr *a, char out[SM_ADDR_TEXT])
{
    if (!inet_ntop(a->family == 4 ? AF_INET : AF_INET6, a->b, out, SM_ADDR_TEXT))
        snprintf(out, SM_ADDR_TEXT, "?");
    return out;
}

static struct sm_addr addr4(const uint8_t *p)
{
    struct sm_addr a = { .family = 4 };

    memcpy(a.b, p, 4);
    return a;
}

static struct sm_addr addr6(const uint8_t *p)
{
    struct sm_addr a = { .family = 6 };

    memcpy(a.b, p, 16);
    return a;
}

/* ---- checksums ---- */

uint32_t sm_csum_add(uint32_t sum, const void *p, size_t len)
{
    const uint8_t *b = p;
    uint64_t total = sum;

    /* Eight bytes a step; the order of bytes does not matter until the end. */
    uint64_t wide = 0;
    while (len >= 8) {
        uint64_t v;

        memcpy(&v, b, 8);
        wide += (v & 0xffffffff) + (v >> 32);
        b += 8;
        len -= 8;
    }
    while (wide >> 16)
        wide = (wide & 0xffff) + (wide >> 16);
    total += ntohs((uint16_t)wide);
    for (; len >= 2; b += 2, len -= 2)
        total += sm_be16(b);
    if (len)
        total += (uint32_t)b[0] << 8;
    while (total >> 32)
        total = (total & 0xffffffff) + (total >> 32);
    return (uint32_t)total;
}

uint16_t sm_csum_fold(uint32_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~sum;
}

uint16_t sm_csum_l4(const struct sm_addr *src, const struct sm_addr *dst, uint8_t proto,
                    const void *l4, size_t len)
{
    size_t bytes = src->family == 4 ? 4 : 16;
    uint32_t sum = sm_csum_add(0, src->b, bytes);

    sum = sm_csum_add(sum, dst->b, bytes);
    sum += proto + (uint32_t)(len >> 16) + (uint32_t)(len & 0xffff);
    return sm_csum_fold(sm_csum_add(sum, l4, len));
}

/* ---- the parser ---- */

static void bad(struct sm_packet *p, const char *why)
{
    p->kind = SM_PACKET_BAD;
    p->why = why;
}

static void bad_quiet(struct sm_packet *p, const char *why)
{
    bad(p, why);
    p->quiet = true;
}

static void parse_arp(struct sm_packet *p)
{
    const uint8_t *a = p->frame + p->l3;

    if (p->len - p->l3 < 28 || sm_be16(a) != 1 || sm_be16(a + 2) != TYPE_IP4 || a[4] != 6 ||
        a[5] != 4) {
        bad(p, "malformed ARP");
        return;
    }
    p->kind = SM_PACKET_ARP;
    p->arp_op = sm_be16(a + 6);
    p->link = a + 8;
    p->src = addr4(a + 14);
    p->target = addr4(a + 24);
}

static void parse_tcp(struct sm_packet *p)
{
    const uint8_t *t = p->frame + p->l4;
    size_t left = p->len - p->l4, head;

    if (left < 20) {
        bad(p, "TCP header cut short");
        return;
    }
    head = (size_t)(t[12] >> 4) * 4;
    if (head < 20 || head > left) {
        bad(p, "TCP header of a bad length");
        return;
    }
    p->kind = SM_PACKET_TCP;
    p->sport = sm_be16(t);
    p->dport = sm_be16(t + 2);
    p->seq = sm_be32(t + 4);
    p->ack = sm_be32(t + 8);
    p->tcp_flags = t[13];
    p->payload = p->l4 + head;
}

static void parse_udp(struct sm_packet *p)
{
    const uint8_t *u = p->frame + p->l4;
    size_t left = p->len - p->l4;

    if (left < 8) {
        bad(p, "UDP header cut short");
        return;
    }
    if (sm_be16(u + 4) < 8 || (!p->first_fragment && sm_be16(u + 4) > left)) {
        bad(p, "UDP length that lies");
        return;
    }
    p->kind = SM_PACKET_UDP;
    p->sport = sm_be16(u);
    p->dport = sm_be16(u + 2);
    p->payload = p->l4 + 8;
}

/* RFC 4861: hop limit 255 proves that it was sent on this link. */
static void parse_nd(struct sm_packet *p)
{
    const uint8_t *n = p->frame + p->l4;
    size_t left = p->len - p->l4, at;

    at = p->icmp_type == 133 ? 8 : p->icmp_type == 134 ? 16 : 24;
    if (left < at || p->frame[p->l3 + 7] != 255 || n[1] || p->first_fragment) {
        bad(p, "malformed neighbour discovery");
        return;
    }
    p->kind = SM_PACKET_ND;
    if (p->icmp_type >= 135)
        p->target = addr6(n + 8);
    while (at < left) {
        size_t len;

        if (left - at < 8 || !(len = (size_t)n[at + 1] * 8) || len > left - at) {
            bad(p, "malformed neighbour discovery");
            return;
        }
        if (n[at] == 1 || n[at] == 2) {
            if (p->link && memcmp(p->link, n + at + 2, 6)) {
                bad(p, "two link-layer addresses");
                return;
            }
            p->link = n + at + 2;
        }
        at += len;
    }
}

static void parse_icmp(struct sm_packet *p, bool six)
{
    const uint8_t *i = p->frame + p->l4;

    if (p->len - p->l4 < 8) {
        bad(p, "ICMP header cut short");
        return;
    }
    p->icmp_type = i[0];
    if (six && i[0] >= 133 && i[0] <= 137) {
        parse_nd(p);
        return;
    }
    if (six && (i[0] == 131 || i[0] == 132 || i[0] == 143 || i[0] == 130)) {
        bad_quiet(p, "multicast listener report");
        return;
    }
    p->kind = SM_PACKET_ICMP;
    p->sport = i[0] == 8 || i[0] == 0 || (six && (i[0] == 128 || i[0] == 129)) ? sm_be16(i + 4) : 0;
    p->payload = p->l4 + 8;
}

static void parse_l4(struct sm_packet *p)
{
    switch (p->proto) {
    case IPPROTO_TCP:
        parse_tcp(p);
        break;
    case IPPROTO_UDP:
        parse_udp(p);
        break;
    case IPPROTO_ICMP:
        if (p->src.family == 4)
            parse_icmp(p, false);
        else
            bad(p, "ICMP of the wrong version");
        break;
    case IPPROTO_ICMPV6:
        if (p->src.family == 6)
            parse_icmp(p, true);
        else
            bad(p, "ICMP of the wrong version");
        break;
    case IPPROTO_IGMP:
        bad_quiet(p, "IGMP");
        break;
    default:
        bad(p, "protocol other than TCP, UDP and ICMP");
    }
}

/* Offset in bytes. A later fragment must not reach into the first one's
 * header: 60 bytes is the longest there is (RFC 3128). */
static void parse_fragment(struct sm_packet *p, size_t offset)
{
    if (offset < 60)
        bad(p, "fragment that overlaps a header");
    else if (offset + (p->len - p->l4) > 65535)
        bad(p, "fragment beyond the end of a packet");
    else
        p->kind = SM_PACKET_FRAGMENT;
}

static void parse_ip4(struct sm_packet *p)
{
    const uint8_t *h = p->frame + p->l3;
    size_t left = p->len - p->l3, head, total;
    uint16_t frag;

    if (left < 20 || h[0] >> 4 != 4) {
        bad(p, "malformed IPv4");
        return;
    }
    head = (size_t)(h[0] & 15) * 4;
    total = sm_be16(h + 2);
    if (head < 20 || total < head || total > left) {
        bad(p, "IPv4 length that lies");
        return;
    }
    p->proto = h[9];
    p->src = addr4(h + 12);
    p->dst = addr4(h + 16);
    if (head > 20) {
        if (p->proto == IPPROTO_IGMP)
            bad_quiet(p, "IGMP");
        else
            bad(p, "IPv4 options");
        return;
    }
    if (sm_csum_fold(sm_csum_add(0, h, head))) {
        bad(p, "IPv4 checksum");
        return;
    }
    p->len = p->l3 + total;
    p->l4 = p->l3 + head;
    frag = sm_be16(h + 6);
    p->frag_id = sm_be16(h + 4);
    if (frag & 0x1fff) {
        parse_fragment(p, (size_t)(frag & 0x1fff) * 8);
        return;
    }
    p->first_fragment = frag & 0x2000;
    parse_l4(p);
}

static void parse_ip6(struct sm_packet *p)
{
    const uint8_t *h = p->frame + p->l3;
    size_t left = p->len - p->l3;

    if (left < IP6_HEADER || h[0] >> 4 != 6) {
        bad(p, "malformed IPv6");
        return;
    }
    if (sm_be16(h + 4) > left - IP6_HEADER) {
        bad(p, "IPv6 length that lies");
        return;
    }
    p->len = p->l3 + IP6_HEADER + sm_be16(h + 4);
    p->l4 = p->l3 + IP6_HEADER;
    p->proto = h[6];
    p->src = addr6(h + 8);
    p->dst = addr6(h + 24);
    if (p->proto == IPPROTO_HOPOPTS) { /* what multicast reports come in */
        bad_quiet(p, "IPv6 hop-by-hop options");
        return;
    }
    if (p->proto == IPPROTO_FRAGMENT) {
        const uint8_t *f = p->frame + p->l4;
        uint16_t off;

        if (p->len - p->l4 < 8) {
            bad(p, "malformed IPv6 fragment");
            return;
        }
        p->proto = f[0];
        off = sm_be16(f + 2);
        p->frag_id = sm_be32(f + 4);
        p->l4 += 8;
        if (off & 0xfff8) {
            parse_fragment(p, off & 0xfff8);
            return;
        }
        p->first_fragment = off & 1;
    }
    if (p->proto == IPPROTO_ROUTING || p->proto == IPPROTO_DSTOPTS ||
        p->proto == IPPROTO_HOPOPTS || p->proto == IPPROTO_FRAGMENT) {
        bad(p, "IPv6 extension header");
        return;
    }
    parse_l4(p);
}

void sm_packet_parse(const uint8_t *frame, size_t len, struct sm_packet *p)
{
    memset(p, 0, sizeof(*p));
    p->frame = frame;
    p->len = len;
    p->l3 = ETHER;
    if (len < ETHER) {
        bad(p, "frame cut short");
        return;
    }
    switch (sm_be16(frame + 12)) {
    case TYPE_ARP:
        parse_arp(p);
        break;
    case TYPE_IP4:
        parse_ip4(p);
        break;
    case TYPE_IP6:
        parse_ip6(p);
        break;
    case TYPE_VLAN:
    case TYPE_QINQ:
        bad(p, "VLAN tag");
        break;
    default:
        bad(p, "Ethernet type other than ARP, IPv4 and IPv6");
    }
}

/* ---- answers ---- */

/* Ethernet and IP headers of an answer; the offset behind them. */
static size_t begin_reply(const struct sm_packet *p, uint8_t proto, size_t l4_len, uint8_t *out)
{
    memcpy(out, p->frame + 6, 6);
    memcpy(out + 6, p->frame, 6);
    memcpy(out + 12, p->frame + 12, 2);
    if (p->src.family == 4) {
        uint8_t *h = out + ETHER;

        memset(h, 0, 20);
        h[0] = 0x45;
        sm_set_be16(h + 2, (uint16_t)(20 + l4_len));
        h[6] = 0x40; /* do not fragment */
        h[8] = 64;
        h[9] = proto;
        memcpy(h + 12, p->dst.b, 4);
        memcpy(h + 16, p->src.b, 4);
        sm_set_be16(h + 10, sm_csum_fold(sm_csum_add(0, h, 20)));
        return ETHER + 20;
    }
    uint8_t *h = out + ETHER;
    memset(h, 0, IP6_HEADER);
    h[0] = 0x60;
    sm_set_be16(h + 4, (uint16_t)l4_len);
    h[6] = proto;
    h[7] = 64;
    memcpy(h + 8, p->dst.b, 16);
    memcpy(h + 24, p->src.b, 16);
    return ETHER + IP6_HEADER;
}

static size_t build_reset(const struct sm_packet *p, uint8_t *out)
{
    size_t at = begin_reply(p, IPPROTO_TCP, 20, out);
    uint8_t *t = out + at;
    bool acked = p->tcp_flags & SM_TCP_ACK;
    uint32_t taken = (uint32_t)(p->len - p->payload) + !!(p->tcp_flags & SM_TCP_SYN) +
                     !!(p->tcp_flags & SM_TCP_FIN);

    memset(t, 0, 20);
    sm_set_be16(t, p->dport);
    sm_set_be16(t + 2, p->sport);
    sm_set_be32(t + 4, acked ? p->ack : 0);
    sm_set_be32(t + 8, acked ? 0 : p->seq + taken);
    t[12] = 5 << 4;
    t[13] = SM_TCP_RST | (acked ? 0 : SM_TCP_ACK);
    sm_set_be16(t + 16, sm_csum_l4(&p->dst, &p->src, IPPROTO_TCP, t, 20));
    return at + 20;
}

/* Destination unreachable, administratively prohibited. */
static size_t build_unreachable(const struct sm_packet *p, uint8_t *out)
{
    bool six = p->src.family == 6;
    size_t quote = p->len - p->l3, most = six ? 1232 : 548;
    if (quote > most)
        quote = most;
    size_t at = begin_reply(p, six ? IPPROTO_ICMPV6 : IPPROTO_ICMP, 8 + quote, out);
    uint8_t *i = out + at;

    memset(i, 0, 8);
    i[0] = six ? 1 : 3;
    i[1] = six ? 1 : 13;
    memcpy(i + 8, p->frame + p->l3, quote);
    sm_set_be16(i + 2, six ? sm_csum_l4(&p->dst, &p->src, IPPROTO_ICMPV6, i, 8 + quote)
                           : sm_csum_fold(sm_csum_add(0, i, 8 + quote)));
    return at + 8 + quote;
}

size_t sm_packet_refuse(const struct sm_packet *p, uint8_t *out, size_t cap)
{
    bool multicast = p->frame[0] & 1;

    if (cap < 1500 || multicast)
        return 0;
    if (p->kind == SM_PACKET_TCP)
        return p->tcp_flags & SM_TCP_RST ? 0 : build_reset(p, out);
    if (p->kind == SM_PACKET_UDP ||
        (p->kind == SM_PACKET_ICMP && (p->icmp_type == 8 || p->icmp_type == 128)))
        return build_unreachable(p, out);
    return 0;
}

size_t sm_packet_udp_reply(const struct sm_packet *p, const void *data, size_t len, uint8_t *out,
                           size_t cap)
{
    size_t head = ETHER + (p->src.family == 4 ? 20 : IP6_HEADER) + 8;
    uint16_t sum;

    if (len > 65535 - 48 || head + len > cap)
        return 0;
    size_t at = begin_reply(p, IPPROTO_UDP, 8 + len, out);
    uint8_t *u = out + at;
    sm_set_be16(u, p->dport);
    sm_set_be16(u + 2, p->sport);
    sm_set_be16(u + 4, (uint16_t)(8 + len));
    sm_set_be16(u + 6, 0);
    memcpy(u + 8, data, len);
    sum = sm_csum_l4(&p->dst, &p->src, IPPROTO_UDP, u, 8 + len);
    sm_set_be16(u + 6, sum ? sum : 0xffff);
    return at + 8 + len;
}
