/* SPDX-License-Identifier: Apache-2.0 */
/* The AML writer; see aml.h. */
#include "aml.h"

#include <string.h>

enum {
    OP_ZERO = 0x00,
    OP_ONE = 0x01,
    OP_NAME = 0x08,
    OP_BYTE = 0x0a,
    OP_WORD = 0x0b,
    OP_DWORD = 0x0c,
    OP_STRING = 0x0d,
    OP_QWORD = 0x0e,
    OP_SCOPE = 0x10,
    OP_BUFFER = 0x11,
    OP_METHOD = 0x14,
    OP_DUAL_NAME = 0x2e,
    OP_MULTI_NAME = 0x2f,
    OP_EXT = 0x5b,
    OP_DEVICE = 0x5b82,
};

void sm_aml_bytes(struct sm_aml *aml, const void *p, size_t len)
{
    if (aml->overflow || len > aml->cap - aml->len) {
        aml->overflow = true;
        return;
    }
    memcpy(aml->buf + aml->len, p, len);
    aml->len += len;
}

static void put_le(struct sm_aml *aml, uint64_t v, unsigned bytes)
{
    uint8_t b[8];

    for (unsigned i = 0; i < bytes; i++)
        b[i] = (uint8_t)(v >> (8 * i));
    sm_aml_bytes(aml, b, bytes);
}

void sm_aml_u8(struct sm_aml *aml, uint8_t v)
{
    put_le(aml, v, 1);
}

void sm_aml_u16(struct sm_aml *aml, uint16_t v)
{
    put_le(aml, v, 2);
}

void sm_aml_u32(struct sm_aml *aml, uint32_t v)
{
    put_le(aml, v, 4);
}

void sm_aml_u64(struct sm_aml *aml, uint64_t v)
{
    put_le(aml, v, 8);
}

size_t sm_aml_begin(struct sm_aml *aml, unsigned op)
{
    if (op > 0xff)
        sm_aml_u8(aml, OP_EXT);
    sm_aml_u8(aml, (uint8_t)op);
    return aml->len;
}

/* PkgLength counts itself. One byte holds 6 bits; otherwise the low nibble is
 * in the first byte, whose top two bits say how many follow. */
static unsigned pkg_length(uint8_t out[4], size_t body)
{
    size_t n = 1, total = body + 1;

    if (total < 64) {
        out[0] = (uint8_t)total;
        return 1;
    }
    do
        total = body + ++n;
    while (n < 4 && total >> (4 + 8 * (n - 1)));
    out[0] = (uint8_t)((n - 1) << 6 | (total & 15));
    for (size_t i = 1; i < n; i++)
        out[i] = (uint8_t)(total >> (4 + 8 * (i - 1)));
    return (unsigned)n;
}

void sm_aml_end(struct sm_aml *aml, size_t mark)
{
    uint8_t length[4];
    size_t body = aml->len - mark;
    unsigned n;

    if (aml->overflow)
        return;
    n = pkg_length(length, body);
    if (n > aml->cap - aml->len) {
        aml->overflow = true;
        return;
    }
    memmove(aml->buf + mark + n, aml->buf + mark, body);
    memcpy(aml->buf + mark, length, n);
    aml->len += n;
}

void sm_aml_path(struct sm_aml *aml, const char *path)
{
    size_t segs;

    while (*path == '\\' || *path == '^')
        sm_aml_u8(aml, (uint8_t)*path++);
    segs = (strlen(path) + 1) / 5;
    if (segs == 2) {
        sm_aml_u8(aml, OP_DUAL_NAME);
    } else if (segs > 2) {
        sm_aml_u8(aml, OP_MULTI_NAME);
        sm_aml_u8(aml, (uint8_t)segs);
    } else if (segs == 0) {
        sm_aml_u8(aml, 0);
    }
    for (; segs; segs--, path += 5)
        sm_aml_bytes(aml, path, 4);
}

size_t sm_aml_scope(struct sm_aml *aml, const char *path)
{
    size_t mark = sm_aml_begin(aml, OP_SCOPE);

    sm_aml_path(aml, path);
    return mark;
}

size_t sm_aml_device(struct sm_aml *aml, const char *seg)
{
    size_t mark = sm_aml_begin(aml, OP_DEVICE);

    sm_aml_path(aml, seg);
    return mark;
}

size_t sm_aml_method(struct sm_aml *aml, const char *seg, unsigned args)
{
    size_t mark = sm_aml_begin(aml, OP_METHOD);

    sm_aml_path(aml, seg);
    sm_aml_u8(aml, (uint8_t)args);
    return mark;
}

void sm_aml_name(struct sm_aml *aml, const char *seg)
{
    sm_aml_u8(aml, OP_NAME);
    sm_aml_path(aml, seg);
}

void sm_aml_int(struct sm_aml *aml, uint64_t v)
{
    if (v <= 1) {
        sm_aml_u8(aml, v ? OP_ONE : OP_ZERO);
    } else if (v <= 0xff) {
        sm_aml_u8(aml, OP_BYTE);
        put_le(aml, v, 1);
    } else if (v <= 0xffff) {
        sm_aml_u8(aml, OP_WORD);
        put_le(aml, v, 2);
    } else if (v <= 0xffffffff) {
        sm_aml_u8(aml, OP_DWORD);
        put_le(aml, v, 4);
    } else {
        sm_aml_u8(aml, OP_QWORD);
        put_le(aml, v, 8);
    }
}

void sm_aml_string(struct sm_aml *aml, const char *s)
{
    sm_aml_u8(aml, OP_STRING);
    sm_aml_bytes(aml, s, strlen(s) + 1);
}

static unsigned hex_digit(char c)
{
    return (unsigned)(c >= 'A' ? c - 'A' + 10 : c - '0');
}

void sm_aml_eisaid(struct sm_aml *aml, const char *id)
{
    /* Three letters of 5 bits, four hex digits; big-endian in memory. */
    unsigned letters = (unsigned)(id[0] - 0x40) << 10 | (unsigned)(id[1] - 0x40) << 5 |
                       (unsigned)(id[2] - 0x40);
    uint8_t b[4] = {
        (uint8_t)(letters >> 8),
        (uint8_t)letters,
        (uint8_t)(hex_digit(id[3]) << 4 | hex_digit(id[4])),
        (uint8_t)(hex_digit(id[5]) << 4 | hex_digit(id[6])),
    };

    sm_aml_u8(aml, OP_DWORD);
    sm_aml_bytes(aml, b, sizeof(b));
}

struct sm_aml_resources sm_aml_resources_begin(struct sm_aml *aml)
{
    struct sm_aml_resources at;

    at.term = sm_aml_begin(aml, OP_BUFFER);
    sm_aml_u8(aml, OP_WORD);
    at.size_at = aml->len;
    sm_aml_u16(aml, 0);
    return at;
}

void sm_aml_resources_end(struct sm_aml *aml, struct sm_aml_resources at)
{
    size_t size;

    sm_aml_u8(aml, 0x79); /* end tag, checksum 0: none */
    sm_aml_u8(aml, 0);
    if (aml->overflow)
        return;
    size = aml->len - at.size_at - 2;
    aml->buf[at.size_at] = (uint8_t)size;
    aml->buf[at.size_at + 1] = (uint8_t)(size >> 8);
    sm_aml_end(aml, at.term);
}

void sm_aml_memory32(struct sm_aml *aml, uint32_t base, uint32_t len)
{
    sm_aml_u8(aml, 0x86); /* 32-bit fixed memory range */
    sm_aml_u16(aml, 9);
    sm_aml_u8(aml, 1); /* writable */
    sm_aml_u32(aml, base);
    sm_aml_u32(aml, len);
}

void sm_aml_io(struct sm_aml *aml, uint16_t base, uint8_t len)
{
    sm_aml_u8(aml, 0x47); /* I/O port descriptor */
    sm_aml_u8(aml, 1);    /* 16-bit decode */
    sm_aml_u16(aml, base);
    sm_aml_u16(aml, base);
    sm_aml_u8(aml, 1);
    sm_aml_u8(aml, len);
}

void sm_aml_interrupt(struct sm_aml *aml, uint32_t gsi)
{
    sm_aml_u8(aml, 0x89); /* extended interrupt */
    sm_aml_u16(aml, 6);
    sm_aml_u8(aml, 0x03); /* consumer, edge */
    sm_aml_u8(aml, 1);
    sm_aml_u32(aml, gsi);
}
