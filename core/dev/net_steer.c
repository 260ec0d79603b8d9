/* SPDX-License-Identifier: Apache-2.0 */
/* Entries of flows; see net_steer.h. */
#include "dev/net_steer.h"

#include <netinet/in.h>
#include <stdbool.h>
#include <string.h>

#define ETHERTYPE_AT 12
#define TAG_BYTES 4
#define TYPE_IPV4 0x0800
#define TYPE_IPV6 0x86dd
#define TYPE_TAG 0x8100

static uint32_t be16(const uint8_t *p)
{
    return (uint32_t)p[0] << 8 | p[1];
}

/* Source and destination in either order give the same. */
static uint32_t fold_addresses(const uint8_t *src, const uint8_t *dst, size_t len)
{
    uint32_t h = 0;

    for (size_t i = 0; i < len; i += 2)
        h = h * 31 + (be16(src + i) ^ be16(dst + i));
    return h;
}

unsigned sm_net_steer_entry(const uint8_t *frame, size_t len)
{
    size_t at = ETHERTYPE_AT + 2, l4;
    uint32_t type, h;
    uint8_t proto;

    if (len < at)
        return 0;
    type = be16(frame + ETHERTYPE_AT);
    if (type == TYPE_TAG && len >= at + TAG_BYTES) {
        at += TAG_BYTES;
        type = be16(frame + at - 2);
    }
    if (type == TYPE_IPV4 && len >= at + 20) {
        bool fragment = be16(frame + at + 6) & 0x3fff;

        h = fold_addresses(frame + at + 12, frame + at + 16, 4);
        proto = fragment ? 0 : frame[at + 9];
        l4 = at + (size_t)(frame[at] & 15) * 4;
    } else if (type == TYPE_IPV6 && len >= at + 40) {
        h = fold_addresses(frame + at + 8, frame + at + 24, 16);
        proto = frame[at + 6];
        l4 = at + 40;
    } else {
        return 0;
    }
    if ((proto == IPPROTO_TCP || proto == IPPROTO_UDP) && len >= l4 + 4)
        h = h * 31 + (be16(frame + l4) ^ be16(frame + l4 + 2));
    h *= 0x9e3779b1u; /* the golden ratio: every bit reaches the top ones */
    return h >> 24;
}
