/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frames of a guest, taken apart. Pure functions over memory; every byte is
 * hostile. What the parser accepts has one meaning to every stack behind it:
 * anything with two (options that reroute, headers cut by a fragment, lengths
 * that disagree, tags, unusual extension headers) is refused with a reason.
 *
 * Sources: RFC 791, 826, 1858, 3128, 4861, 8200, 9293.
 */
#ifndef SM_NET_PACKET_H
#define SM_NET_PACKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct sm_addr {
    uint8_t family; /* 4 or 6; 0: none */
    uint8_t b[16];  /* the first 4 for IPv4, the rest 0 */
};

bool sm_addr_equal(const struct sm_addr *a, const struct sm_addr *b);
bool sm_addr_in(const struct sm_addr *a, const struct sm_addr *net, unsigned prefix);
/* "1.2.3.4" or "::1"; false when it is neither. */
bool sm_addr_parse(const char *text, struct sm_addr *out);
#define SM_ADDR_TEXT 46
const char *sm_addr_text(const struct sm_addr *a, char out[SM_ADDR_TEXT]);

enum sm_packet_kind {
    SM_PACKET_BAD, /* `why` says what is wrong */
    SM_PACKET_ARP,
    SM_PACKET_TCP,
    SM_PACKET_UDP,
    SM_PACKET_ICMP, /* either version; echo alone has an id in sport */
    SM_PACKET_ND,   /* neighbour discovery (ICMPv6 133 … 136) */
    SM_PACKET_FRAGMENT, /* a later fragment: addresses and frag_id only */
};

enum { SM_TCP_FIN = 1, SM_TCP_SYN = 2, SM_TCP_RST = 4, SM_TCP_ACK = 16 };

struct sm_packet {
    enum sm_packet_kind kind;
    const char *why; /* static; of a bad one */
    bool quiet;      /* bad, but every kernel sends it */
    const uint8_t *frame;
    size_t len; /* of the frame without padding */
    size_t l3, l4, payload; /* offsets */
    struct sm_addr src, dst;
    uint8_t proto; /* IPPROTO_* */
    uint16_t sport, dport;
    uint8_t tcp_flags, icmp_type;
    uint32_t seq, ack;
    bool first_fragment; /* others follow */
    uint32_t frag_id;
    /* ARP: operation and sender, ND: target and link-layer option */
    uint16_t arp_op;
    struct sm_addr target;
    const uint8_t *link; /* 6 bytes, or NULL */
};

void sm_packet_parse(const uint8_t *frame, size_t len, struct sm_packet *out);

/* Internet checksum: add to a running sum; fold. */
uint32_t sm_csum_add(uint32_t sum, const void *p, size_t len);
uint16_t sm_csum_fold(uint32_t sum);
/* The checksum of what is behind the IP header, pseudo header included. */
uint16_t sm_csum_l4(const struct sm_addr *src, const struct sm_addr *dst, uint8_t proto,
                    const void *l4, size_t len);

/*
 * Answers to a frame, as if its destination had sent them: out has room for
 * `cap` bytes; the length, or 0 when there is none.
 */
size_t sm_packet_refuse(const struct sm_packet *p, uint8_t *out, size_t cap);
size_t sm_packet_udp_reply(const struct sm_packet *p, const void *data, size_t len,
                           uint8_t *out, size_t cap);

static inline uint16_t sm_be16(const uint8_t *p)
{
    return (uint16_t)(p[0] << 8 | p[1]);
}
static inline uint32_t sm_be32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}
static inline void sm_set_be16(uint8_t *p, uint16_t v)
{
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}
static inline void sm_set_be32(uint8_t *p, uint32_t v)
{
    sm_set_be16(p, (uint16_t)(v >> 16));
    sm_set_be16(p + 2, (uint16_t)v);
}

#endif
