/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frames, fields and the byte queue (proto.h has the format). Nothing here
 * blocks, prints or keeps state, so the unit test and the fuzzer drive it as
 * it is. Every length is checked against what is really there before use.
 */
#include "frame.h"
#include "proto.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

uint16_t sm_get16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

uint32_t sm_get32(const uint8_t *p)
{
    return sm_get16(p) | (uint32_t)sm_get16(p + 2) << 16;
}

uint64_t sm_get64(const uint8_t *p)
{
    return sm_get32(p) | (uint64_t)sm_get32(p + 4) << 32;
}

void sm_put16(uint8_t *p, uint16_t v)
{
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}

void sm_put32(uint8_t *p, uint32_t v)
{
    sm_put16(p, (uint16_t)v);
    sm_put16(p + 2, (uint16_t)(v >> 16));
}

void sm_put64(uint8_t *p, uint64_t v)
{
    sm_put32(p, (uint32_t)v);
    sm_put32(p + 4, (uint32_t)(v >> 32));
}

int sm_buf_reserve(struct sm_buf *b, size_t n)
{
    if (b->len == 0)
        b->start = 0;
    if (sm_buf_room(b) >= n)
        return 0;
    if (b->start > 0) {
        memmove(b->bytes, b->bytes + b->start, b->len);
        b->start = 0;
        if (sm_buf_room(b) >= n)
            return 0;
    }
    if (n > SIZE_MAX / 4 || b->len > SIZE_MAX / 4)
        return -ENOMEM;
    size_t cap = b->cap ? b->cap : 256;
    while (cap - b->len < n)
        cap *= 2;
    uint8_t *bytes = realloc(b->bytes, cap);
    if (!bytes)
        return -ENOMEM;
    b->bytes = bytes;
    b->cap = cap;
    return 0;
}

int sm_buf_append(struct sm_buf *b, const void *data, size_t n)
{
    if (n == 0)
        return 0;
    int rc = sm_buf_reserve(b, n);
    if (rc)
        return rc;
    memcpy(sm_buf_tail(b), data, n);
    b->len += n;
    return 0;
}

void sm_buf_consume(struct sm_buf *b, size_t n)
{
    b->start += n;
    b->len -= n;
    if (b->len == 0)
        b->start = 0;
}

void sm_buf_free(struct sm_buf *b)
{
    free(b->bytes);
    memset(b, 0, sizeof(*b));
}

long sm_frame_next(const uint8_t *data, size_t len, struct sm_frame *out)
{
    if (len < SM_FRAME_HEADER_BYTES)
        return 0;
    uint32_t n = sm_get32(data);
    if (n > SM_FRAME_PAYLOAD_MAX)
        return -EPROTO;
    if (len - SM_FRAME_HEADER_BYTES < n)
        return 0;
    out->len = n;
    out->type = data[4];
    out->flags = data[5];
    out->chan = sm_get16(data + 6);
    out->payload = data + SM_FRAME_HEADER_BYTES;
    return (long)n + SM_FRAME_HEADER_BYTES;
}

void sm_frame_header(uint8_t out[8], uint32_t len, uint8_t type, uint8_t flags, uint16_t chan)
{
    sm_put32(out, len);
    out[4] = type;
    out[5] = flags;
    sm_put16(out + 6, chan);
}

int sm_field_next(const uint8_t *data, size_t len, size_t *at, struct sm_field *out)
{
    if (*at == len)
        return 0;
    if (*at > len || len - *at < 6)
        return -EPROTO;
    const uint8_t *p = data + *at;
    uint32_t n = sm_get32(p + 2);
    if (n > len - *at - 6)
        return -EPROTO;
    out->tag = sm_get16(p);
    out->len = n;
    out->value = p + 6;
    *at += 6 + (size_t)n;
    return 1;
}

int sm_field_put(struct sm_buf *b, uint16_t tag, const void *value, uint32_t len)
{
    uint8_t head[6];
    sm_put16(head, tag);
    sm_put32(head + 2, len);
    int rc = sm_buf_append(b, head, sizeof(head));
    return rc ? rc : sm_buf_append(b, value, len);
}

int sm_field_put_u32(struct sm_buf *b, uint16_t tag, uint32_t v)
{
    uint8_t bytes[4];
    sm_put32(bytes, v);
    return sm_field_put(b, tag, bytes, sizeof(bytes));
}

bool sm_field_u16(const struct sm_field *f, uint16_t *out)
{
    if (f->len != 2)
        return false;
    *out = sm_get16(f->value);
    return true;
}

bool sm_field_u32(const struct sm_field *f, uint32_t *out)
{
    if (f->len != 4)
        return false;
    *out = sm_get32(f->value);
    return true;
}

char *sm_field_text(const struct sm_field *f)
{
    if (f->len > 0 && memchr(f->value, 0, f->len)) {
        errno = EPROTO;
        return NULL;
    }
    char *s = malloc((size_t)f->len + 1);
    if (!s)
        return NULL;
    if (f->len > 0)
        memcpy(s, f->value, f->len);
    s[f->len] = 0;
    return s;
}
