/* SPDX-License-Identifier: Apache-2.0 */
/* Frames and fields of proto.h: pure functions over memory, no descriptors. */
#ifndef SM_GUEST_FRAME_H
#define SM_GUEST_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A growable byte queue: bytes[start … start+len) of cap. Zeroed = empty. */
struct sm_buf {
    uint8_t *bytes;
    size_t start, len, cap;
};

/* Make room for n more bytes behind the end. 0 or -ENOMEM. */
int sm_buf_reserve(struct sm_buf *b, size_t n);
int sm_buf_append(struct sm_buf *b, const void *data, size_t n);
void sm_buf_consume(struct sm_buf *b, size_t n);
void sm_buf_free(struct sm_buf *b);
static inline uint8_t *sm_buf_head(struct sm_buf *b)
{
    return b->bytes + b->start;
}
static inline uint8_t *sm_buf_tail(struct sm_buf *b)
{
    return b->bytes + b->start + b->len;
}
static inline size_t sm_buf_room(const struct sm_buf *b)
{
    return b->cap - b->start - b->len;
}

struct sm_frame {
    uint8_t type, flags;
    uint16_t chan;
    uint32_t len;
    const uint8_t *payload; /* in the caller's buffer */
};

/*
 * Take one frame from the head of data. Returns the bytes it occupies, 0 when
 * it is not complete yet, -EPROTO when its length is not allowed.
 */
long sm_frame_next(const uint8_t *data, size_t len, struct sm_frame *out);
void sm_frame_header(uint8_t out[8], uint32_t len, uint8_t type, uint8_t flags, uint16_t chan);

/* A field of a request. */
struct sm_field {
    uint16_t tag;
    uint32_t len;
    const uint8_t *value;
};

/* Walk fields; *at starts at 0. 1 = got one, 0 = end, -EPROTO = cut short. */
int sm_field_next(const uint8_t *data, size_t len, size_t *at, struct sm_field *out);
int sm_field_put(struct sm_buf *b, uint16_t tag, const void *value, uint32_t len);
int sm_field_put_u32(struct sm_buf *b, uint16_t tag, uint32_t v);
/* The field's value as an integer of exactly that width; false when it is not. */
bool sm_field_u16(const struct sm_field *f, uint16_t *out);
bool sm_field_u32(const struct sm_field *f, uint32_t *out);
/* A fresh NUL-terminated copy; NULL with errno EPROTO (inner NUL) or ENOMEM. */
char *sm_field_text(const struct sm_field *f);

uint16_t sm_get16(const uint8_t *p);
uint32_t sm_get32(const uint8_t *p);
uint64_t sm_get64(const uint8_t *p);
void sm_put16(uint8_t *p, uint16_t v);
void sm_put32(uint8_t *p, uint32_t v);
void sm_put64(uint8_t *p, uint64_t v);

#endif
