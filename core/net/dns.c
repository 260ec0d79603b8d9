/* SPDX-License-Identifier: Apache-2.0 */
/* DNS messages; see dns.h. */
#include "dns.h"

#include <errno.h>
#include <string.h>
#include <strings.h>

#define TYPE_A 1
#define TYPE_AAAA 28
#define CLASS_IN 1
#define JUMPS 64

/* Read a name at *at, following compression; *at moves behind it. */
static int read_name(const uint8_t *msg, size_t len, size_t *at, char out[SM_DNS_NAME])
{
    size_t pos = *at, n = 0;
    unsigned jumps = 0;
    bool moved = false;

    for (;;) {
        unsigned c;

        if (pos >= len)
            return -EBADMSG;
        c = msg[pos];
        if ((c & 0xc0) == 0xc0) {
            if (pos + 1 >= len || ++jumps > JUMPS)
                return -EBADMSG;
            if (!moved)
                *at = pos + 2;
            moved = true;
            pos = (c & 0x3f) << 8 | msg[pos + 1];
            continue;
        }
        if (c & 0xc0)
            return -EBADMSG;
        pos++;
        if (!c)
            break;
        if (pos + c > len || n + c + 1 >= SM_DNS_NAME)
            return -EBADMSG;
        if (n)
            out[n++] = '.';
        for (unsigned i = 0; i < c; i++) {
            uint8_t b = msg[pos + i];

            /* What cannot be written cannot be matched by a rule either. */
            if (b <= ' ' || b >= 0x7f || b == '.')
                return -EBADMSG;
            out[n++] = (char)b;
        }
        pos += c;
    }
    out[n] = 0;
    if (!moved)
        *at = pos;
    return 0;
}

int sm_dns_query(const uint8_t *msg, size_t len, struct sm_dns_question *out)
{
    size_t at = SM_DNS_HEADER;

    /* QR 0, opcode 0; one question, no answers; EDNS may follow. */
    if (len < SM_DNS_HEADER + 5 || msg[2] & 0xf8 || sm_be16(msg + 4) != 1 || sm_be16(msg + 6) ||
        sm_be16(msg + 8))
        return -EBADMSG;
    out->id = sm_be16(msg);
    if (read_name(msg, len, &at, out->name) || at + 4 > len)
        return -EBADMSG;
    out->end = at + 4;
    return 0;
}

int sm_dns_response(const uint8_t *msg, size_t len, const uint8_t *query, size_t query_len,
                    const struct sm_dns_question *q)
{
    char name[SM_DNS_NAME];
    size_t at = SM_DNS_HEADER;

    if (len < SM_DNS_HEADER || !(msg[2] & 0x80) || sm_be16(msg + 4) > 1)
        return -EBADMSG;
    if (!sm_be16(msg + 4)) /* some servers refuse without repeating it */
        return msg[3] & 15 ? 0 : -EBADMSG;
    if (read_name(msg, len, &at, name) || at + 4 > len || q->end > query_len)
        return -EBADMSG;
    if (strcasecmp(name, q->name) || memcmp(msg + at, query + q->end - 4, 4))
        return -ENOENT;
    return 0;
}

int sm_dns_addresses(const uint8_t *msg, size_t len, size_t at,
                     bool (*fn)(const struct sm_addr *addr, uint32_t ttl_s, void *arg), void *arg)
{
    unsigned records = sm_be16(msg + 6) + sm_be16(msg + 8) + sm_be16(msg + 10);
    char name[SM_DNS_NAME];

    for (unsigned i = 0; i < records; i++) {
        struct sm_addr a = { 0 };
        uint16_t type, class, bytes;

        if (read_name(msg, len, &at, name) || at + 10 > len)
            return -EBADMSG;
        type = sm_be16(msg + at);
        class = sm_be16(msg + at + 2);
        bytes = sm_be16(msg + at + 8);
        if (at + 10 + bytes > len)
            return -EBADMSG;
        if (class == CLASS_IN && (type == TYPE_A || type == TYPE_AAAA)) {
            if (bytes != (type == TYPE_A ? 4 : 16))
                return -EBADMSG;
            a.family = type == TYPE_A ? 4 : 6;
            memcpy(a.b, msg + at + 10, bytes);
            if (!fn(&a, sm_be32(msg + at + 4), arg))
                return 0;
        }
        at += 10 + bytes;
    }
    return 0;
}

size_t sm_dns_empty(uint8_t *query, const struct sm_dns_question *q, unsigned rcode)
{
    query[2] = (uint8_t)(0x80 | (query[2] & 1));
    query[3] = (uint8_t)(0x80 | rcode);
    memset(query + 6, 0, 6);
    return q->end;
}
