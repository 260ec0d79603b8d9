/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Section streams; see state.h. On the wire a section is
 *   name[8] | version u32 | length u32 | length bytes
 * all little-endian, no padding.
 */
#include "state.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define HEAD_BYTES 16

void sm_state_writer_init(struct sm_state_writer *w)
{
    memset(w, 0, sizeof(*w));
}

void sm_state_writer_free(struct sm_state_writer *w)
{
    free(w->buf);
    sm_state_writer_init(w);
}

void sm_state_put_bytes(struct sm_state_writer *w, const void *p, size_t len)
{
    if (w->error)
        return;
    if (len > w->cap - w->len) {
        size_t cap = w->cap ? w->cap : 4096;
        uint8_t *buf;

        while (cap - w->len < len)
            cap *= 2;
        buf = realloc(w->buf, cap);
        if (!buf) {
            w->error = -ENOMEM;
            return;
        }
        w->buf = buf;
        w->cap = cap;
    }
    memcpy(w->buf + w->len, p, len);
    w->len += len;
}

static void put_le(struct sm_state_writer *w, uint64_t v, unsigned bytes)
{
    uint8_t b[8];

    for (unsigned i = 0; i < bytes; i++)
        b[i] = (uint8_t)(v >> (8 * i));
    sm_state_put_bytes(w, b, bytes);
}

void sm_state_put_u8(struct sm_state_writer *w, uint8_t v)
{
    put_le(w, v, 1);
}

void sm_state_put_u16(struct sm_state_writer *w, uint16_t v)
{
    put_le(w, v, 2);
}

void sm_state_put_u32(struct sm_state_writer *w, uint32_t v)
{
    put_le(w, v, 4);
}

void sm_state_put_u64(struct sm_state_writer *w, uint64_t v)
{
    put_le(w, v, 8);
}

void sm_state_begin(struct sm_state_writer *w, const char *name, uint32_t version)
{
    char padded[8] = { 0 };

    memcpy(padded, name, strnlen(name, 8));
    sm_state_put_bytes(w, padded, 8);
    sm_state_put_u32(w, version);
    w->section = w->len;
    sm_state_put_u32(w, 0);
}

void sm_state_end(struct sm_state_writer *w)
{
    size_t len = w->len - w->section - 4;

    if (w->error)
        return;
    for (unsigned i = 0; i < 4; i++)
        w->buf[w->section + i] = (uint8_t)(len >> (8 * i));
    w->section = 0;
}

void sm_state_reader_init(struct sm_state_reader *r, const void *buf, size_t len)
{
    *r = (struct sm_state_reader){ .buf = buf, .len = len };
}

static uint64_t get_le(struct sm_state_reader *r, size_t limit, unsigned bytes)
{
    uint64_t v = 0;

    if (r->error || limit - r->pos < bytes) {
        r->error = -EBADMSG;
        return 0;
    }
    for (unsigned i = 0; i < bytes; i++)
        v |= (uint64_t)r->buf[r->pos + i] << (8 * i);
    r->pos += bytes;
    return v;
}

uint32_t sm_state_open(struct sm_state_reader *r, const char *name)
{
    char padded[8] = { 0 };
    uint32_t version, len;

    memcpy(padded, name, strnlen(name, 8));
    if (r->error || r->len - r->pos < HEAD_BYTES ||
        memcmp(r->buf + r->pos, padded, 8) != 0) {
        r->error = -EBADMSG;
        return 0;
    }
    r->pos += 8;
    version = (uint32_t)get_le(r, r->len, 4);
    len = (uint32_t)get_le(r, r->len, 4);
    if (len > r->len - r->pos || version == 0) {
        r->error = -EBADMSG;
        return 0;
    }
    r->end = r->pos + len;
    return version;
}

void sm_state_close(struct sm_state_reader *r)
{
    if (!r->error)
        r->pos = r->end;
}

uint8_t sm_state_get_u8(struct sm_state_reader *r)
{
    return (uint8_t)get_le(r, r->end, 1);
}

uint16_t sm_state_get_u16(struct sm_state_reader *r)
{
    return (uint16_t)get_le(r, r->end, 2);
}

uint32_t sm_state_get_u32(struct sm_state_reader *r)
{
    return (uint32_t)get_le(r, r->end, 4);
}

uint64_t sm_state_get_u64(struct sm_state_reader *r)
{
    return get_le(r, r->end, 8);
}

void sm_state_get_bytes(struct sm_state_reader *r, void *p, size_t len)
{
    if (r->error || len > r->end - r->pos) {
        r->error = -EBADMSG;
        memset(p, 0, len);
        return;
    }
    memcpy(p, r->buf + r->pos, len);
    r->pos += len;
}

void sm_state_skip(struct sm_state_reader *r, size_t len)
{
    if (r->error || len > r->end - r->pos)
        r->error = -EBADMSG;
    else
        r->pos += len;
}

size_t sm_state_left(const struct sm_state_reader *r)
{
    return r->error ? 0 : r->end - r->pos;
}
