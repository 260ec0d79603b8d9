/* SPDX-License-Identifier: Apache-2.0 */
/* The message codec; see msg.h. Format: the MessagePack specification. */
#include "msg.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void sm_msg_writer_init(struct sm_msg_writer *w, size_t limit_bytes)
{
    *w = (struct sm_msg_writer){ .limit = limit_bytes };
}

void sm_msg_writer_free(struct sm_msg_writer *w)
{
    free(w->buf);
    w->buf = NULL;
    w->len = w->cap = 0;
}

void sm_msg_writer_rewind(struct sm_msg_writer *w, size_t len)
{
    if (len <= w->len) {
        w->len = len;
    }
    w->error = 0;
}

static uint8_t *writer_room(struct sm_msg_writer *w, size_t n)
{
    if (w->error) {
        return NULL;
    }
    if (n > w->limit - w->len) {
        w->error = -EMSGSIZE;
        return NULL;
    }
    if (n > w->cap - w->len) {
        size_t cap = w->cap ? w->cap : 128;
        while (cap - w->len < n) {
            cap *= 2;
        }
        if (cap > w->limit) {
            cap = w->limit;
        }
        uint8_t *buf = realloc(w->buf, cap);
        if (!buf) {
            w->error = -ENOMEM;
            return NULL;
        }
        w->buf = buf;
        w->cap = cap;
    }
    uint8_t *p = w->buf + w->len;
    w->len += n;
    return p;
}

/* A tag and a big-endian number of n bytes. */
static void put_tagged(struct sm_msg_writer *w, uint8_t tag, uint64_t v, unsigned n)
{
    uint8_t *p = writer_room(w, 1 + n);
    if (!p) {
        return;
    }
    *p++ = tag;
    for (unsigned i = 0; i < n; i++) {
        p[i] = (uint8_t)(v >> (8 * (n - 1 - i)));
    }
}

void sm_msg_put_nil(struct sm_msg_writer *w)
{
    put_tagged(w, 0xc0, 0, 0);
}

void sm_msg_put_bool(struct sm_msg_writer *w, bool v)
{
    put_tagged(w, v ? 0xc3 : 0xc2, 0, 0);
}

void sm_msg_put_uint(struct sm_msg_writer *w, uint64_t v)
{
    if (v < 0x80) {
        put_tagged(w, (uint8_t)v, 0, 0);
    } else if (v <= UINT8_MAX) {
        put_tagged(w, 0xcc, v, 1);
    } else if (v <= UINT16_MAX) {
        put_tagged(w, 0xcd, v, 2);
    } else if (v <= UINT32_MAX) {
        put_tagged(w, 0xce, v, 4);
    } else {
        put_tagged(w, 0xcf, v, 8);
    }
}

void sm_msg_put_int(struct sm_msg_writer *w, int64_t v)
{
    if (v >= 0) {
        sm_msg_put_uint(w, (uint64_t)v);
    } else if (v >= -32) {
        put_tagged(w, (uint8_t)v, 0, 0);
    } else if (v >= INT8_MIN) {
        put_tagged(w, 0xd0, (uint64_t)v, 1);
    } else if (v >= INT16_MIN) {
        put_tagged(w, 0xd1, (uint64_t)v, 2);
    } else if (v >= INT32_MIN) {
        put_tagged(w, 0xd2, (uint64_t)v, 4);
    } else {
        put_tagged(w, 0xd3, (uint64_t)v, 8);
    }
}

void sm_msg_put_double(struct sm_msg_writer *w, double v)
{
    uint64_t bits;
    memcpy(&bits, &v, sizeof(bits));
    put_tagged(w, 0xcb, bits, 8);
}

void *sm_msg_put_strbuf(struct sm_msg_writer *w, size_t len)
{
    if (len > UINT32_MAX) {
        w->error = w->error ? w->error : -EMSGSIZE;
        return NULL;
    }
    if (len < 32) {
        put_tagged(w, (uint8_t)(0xa0 | len), 0, 0);
    } else if (len <= UINT8_MAX) {
        put_tagged(w, 0xd9, len, 1);
    } else if (len <= UINT16_MAX) {
        put_tagged(w, 0xda, len, 2);
    } else {
        put_tagged(w, 0xdb, len, 4);
    }
    return writer_room(w, len);
}

void sm_msg_put_strn(struct sm_msg_writer *w, const void *p, size_t len)
{
    void *to = sm_msg_put_strbuf(w, len);
    if (to && len) {
        memcpy(to, p, len);
    }
}

void sm_msg_put_str(struct sm_msg_writer *w, const char *s)
{
    sm_msg_put_strn(w, s, strlen(s));
}

void sm_msg_put_array(struct sm_msg_writer *w, uint32_t count)
{
    if (count < 16) {
        put_tagged(w, (uint8_t)(0x90 | count), 0, 0);
    } else if (count <= UINT16_MAX) {
        put_tagged(w, 0xdc, count, 2);
    } else {
        put_tagged(w, 0xdd, count, 4);
    }
}

void sm_msg_put_map(struct sm_msg_writer *w, uint32_t count)
{
    if (count < 16) {
        put_tagged(w, (uint8_t)(0x80 | count), 0, 0);
    } else if (count <= UINT16_MAX) {
        put_tagged(w, 0xde, count, 2);
    } else {
        put_tagged(w, 0xdf, count, 4);
    }
}

void sm_msg_put_raw(struct sm_msg_writer *w, const void *p, size_t len)
{
    uint8_t *to = writer_room(w, len);
    if (to && len) {
        memcpy(to, p, len);
    }
}

void sm_msg_reader_init(struct sm_msg_reader *r, const void *buf, size_t len)
{
    *r = (struct sm_msg_reader){ .buf = buf, .len = len };
}

/* A big-endian number of n bytes. */
static int get_be(struct sm_msg_reader *r, unsigned n, uint64_t *out)
{
    if (n > r->len - r->pos) {
        return -EBADMSG;
    }
    uint64_t v = 0;
    for (unsigned i = 0; i < n; i++) {
        v = v << 8 | r->buf[r->pos + i];
    }
    r->pos += n;
    *out = v;
    return 0;
}

static int get_uint(struct sm_msg_reader *r, unsigned n, struct sm_msg_value *v)
{
    uint64_t u;
    if (get_be(r, n, &u) < 0) {
        return -EBADMSG;
    }
    if (u > INT64_MAX) {
        v->type = SM_MSG_UINT;
        v->u.u = u;
    } else {
        v->type = SM_MSG_INT;
        v->u.i = (int64_t)u;
    }
    return 0;
}

static int get_int(struct sm_msg_reader *r, unsigned n, struct sm_msg_value *v)
{
    uint64_t u;
    if (get_be(r, n, &u) < 0) {
        return -EBADMSG;
    }
    v->type = SM_MSG_INT;
    switch (n) {
    case 1: v->u.i = (int8_t)u; break;
    case 2: v->u.i = (int16_t)u; break;
    case 4: v->u.i = (int32_t)u; break;
    default: v->u.i = (int64_t)u; break;
    }
    return 0;
}

static int get_double(struct sm_msg_reader *r, unsigned n, struct sm_msg_value *v)
{
    uint64_t bits;
    if (get_be(r, n, &bits) < 0) {
        return -EBADMSG;
    }
    v->type = SM_MSG_DOUBLE;
    if (n == 4) {
        float f;
        uint32_t half = (uint32_t)bits;
        memcpy(&f, &half, sizeof(f));
        v->u.d = f;
    } else {
        memcpy(&v->u.d, &bits, sizeof(v->u.d));
    }
    return 0;
}

static int take_bytes(struct sm_msg_reader *r, uint64_t len, struct sm_msg_value *v)
{
    if (len > r->len - r->pos) {
        return -EBADMSG;
    }
    v->type = SM_MSG_BYTES;
    v->u.bytes.p = (const char *)r->buf + r->pos;
    v->u.bytes.len = (size_t)len;
    r->pos += (size_t)len;
    return 0;
}

static int get_bytes(struct sm_msg_reader *r, unsigned n, struct sm_msg_value *v)
{
    uint64_t len;
    return get_be(r, n, &len) < 0 ? -EBADMSG : take_bytes(r, len, v);
}

/* Each element takes a byte at least, so a count beyond that is a lie. */
static int take_count(struct sm_msg_reader *r, enum sm_msg_type type, uint64_t count,
                      struct sm_msg_value *v)
{
    uint64_t need = type == SM_MSG_MAP ? 2 * count : count;
    if (need > r->len - r->pos) {
        return -EBADMSG;
    }
    v->type = type;
    v->u.count = (uint32_t)count;
    return 0;
}

static int get_count(struct sm_msg_reader *r, enum sm_msg_type type, unsigned n,
                     struct sm_msg_value *v)
{
    uint64_t count;
    return get_be(r, n, &count) < 0 ? -EBADMSG : take_count(r, type, count, v);
}

static int get_tagged(struct sm_msg_reader *r, uint8_t tag, struct sm_msg_value *v)
{
    switch (tag) {
    case 0xc0: v->type = SM_MSG_NIL; return 0;
    case 0xc2:
    case 0xc3:
        v->type = SM_MSG_BOOL;
        v->u.b = tag == 0xc3;
        return 0;
    case 0xc4:
    case 0xd9: return get_bytes(r, 1, v);
    case 0xc5:
    case 0xda: return get_bytes(r, 2, v);
    case 0xc6:
    case 0xdb: return get_bytes(r, 4, v);
    case 0xca: return get_double(r, 4, v);
    case 0xcb: return get_double(r, 8, v);
    case 0xcc: return get_uint(r, 1, v);
    case 0xcd: return get_uint(r, 2, v);
    case 0xce: return get_uint(r, 4, v);
    case 0xcf: return get_uint(r, 8, v);
    case 0xd0: return get_int(r, 1, v);
    case 0xd1: return get_int(r, 2, v);
    case 0xd2: return get_int(r, 4, v);
    case 0xd3: return get_int(r, 8, v);
    case 0xdc: return get_count(r, SM_MSG_ARRAY, 2, v);
    case 0xdd: return get_count(r, SM_MSG_ARRAY, 4, v);
    case 0xde: return get_count(r, SM_MSG_MAP, 2, v);
    case 0xdf: return get_count(r, SM_MSG_MAP, 4, v);
    default: return -EBADMSG; /* ext types and 0xc1 */
    }
}

int sm_msg_next(struct sm_msg_reader *r, struct sm_msg_value *v)
{
    if (r->pos >= r->len) {
        return -EBADMSG;
    }
    uint8_t tag = r->buf[r->pos++];
    if (tag < 0x80) {
        v->type = SM_MSG_INT;
        v->u.i = tag;
        return 0;
    }
    if (tag >= 0xe0) {
        v->type = SM_MSG_INT;
        v->u.i = (int8_t)tag;
        return 0;
    }
    if (tag < 0x90) {
        return take_count(r, SM_MSG_MAP, tag & 15, v);
    }
    if (tag < 0xa0) {
        return take_count(r, SM_MSG_ARRAY, tag & 15, v);
    }
    if (tag < 0xc0) {
        return take_bytes(r, tag & 31, v);
    }
    return get_tagged(r, tag, v);
}

/* Not recursive: left[d] counts the values still due at depth d. */
int sm_msg_skip(struct sm_msg_reader *r)
{
    uint64_t left[SM_MSG_MAX_DEPTH + 1];
    unsigned depth = 0;
    left[0] = 1;
    for (;;) {
        while (left[depth] == 0) {
            if (depth == 0) {
                return 0;
            }
            depth--;
        }
        left[depth]--;
        struct sm_msg_value v;
        if (sm_msg_next(r, &v) < 0) {
            return -EBADMSG;
        }
        if (v.type == SM_MSG_ARRAY || v.type == SM_MSG_MAP) {
            if (depth == SM_MSG_MAX_DEPTH) {
                return -EBADMSG;
            }
            left[++depth] = v.type == SM_MSG_MAP ? 2ull * v.u.count : v.u.count;
        }
    }
}

int sm_msg_check(const void *buf, size_t len)
{
    struct sm_msg_reader r;
    sm_msg_reader_init(&r, buf, len);
    if (sm_msg_skip(&r) < 0 || r.pos != len) {
        return -EBADMSG;
    }
    return 0;
}

int sm_msg_find(const struct sm_msg_reader *r, const char *key, struct sm_msg_reader *value)
{
    struct sm_msg_reader at = *r;
    struct sm_msg_value v;
    if (sm_msg_next(&at, &v) < 0 || v.type != SM_MSG_MAP) {
        return -EBADMSG;
    }
    for (uint32_t n = v.u.count; n; n--) {
        struct sm_msg_reader start = at;
        struct sm_msg_value k;
        if (sm_msg_next(&at, &k) < 0) {
            return -EBADMSG;
        }
        if (sm_msg_is(&k, key)) {
            *value = at;
            return 0;
        }
        at = start; /* the key may be a container */
        if (sm_msg_skip(&at) < 0 || sm_msg_skip(&at) < 0) {
            return -EBADMSG;
        }
    }
    return -ENOENT;
}

bool sm_msg_is(const struct sm_msg_value *v, const char *s)
{
    size_t len = strlen(s);
    return v->type == SM_MSG_BYTES && v->u.bytes.len == len &&
           memcmp(v->u.bytes.p, s, len) == 0;
}
