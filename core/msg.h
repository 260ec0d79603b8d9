/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Messages: self-describing values in a flat buffer, the one form in which
 * commands, results and events cross between Lua, the core and a worker.
 *
 * The encoding is a subset of MessagePack (nil, bool, integers of 64 bit,
 * double, str/bin, array, map; no ext, no float32 on output), so any
 * MessagePack library can read it. Values are written in their shortest form.
 *
 * The writer grows its own buffer up to a limit and fails once (`error`), so a
 * caller checks at the end. The reader copies nothing: bytes point into the
 * buffer. Its input is hostile until sm_msg_check has passed: lengths are held
 * against what is left, counts against the bytes they would need at least, and
 * nesting against SM_MSG_MAX_DEPTH; after that no read of it can fail but by
 * asking for the wrong type.
 *
 * Threads: none; the objects belong to their caller.
 */
#ifndef SM_MSG_H
#define SM_MSG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SM_MSG_MAX_DEPTH 16

enum sm_msg_type {
    SM_MSG_NIL,
    SM_MSG_BOOL,   /* u.b */
    SM_MSG_INT,    /* u.i */
    SM_MSG_UINT,   /* u.u; only for values above INT64_MAX */
    SM_MSG_DOUBLE, /* u.d */
    SM_MSG_BYTES,  /* u.bytes; str and bin alike */
    SM_MSG_ARRAY,  /* u.count values follow */
    SM_MSG_MAP,    /* u.count pairs follow */
};

struct sm_msg_value {
    enum sm_msg_type type;
    union {
        bool b;
        int64_t i;
        uint64_t u;
        double d;
        struct {
            const char *p; /* not terminated */
            size_t len;
        } bytes;
        uint32_t count;
    } u;
};

struct sm_msg_writer {
    uint8_t *buf;
    size_t len, cap, limit;
    int error; /* -ENOMEM, or -EMSGSIZE past the limit */
};

void sm_msg_writer_init(struct sm_msg_writer *w, size_t limit_bytes);
void sm_msg_writer_free(struct sm_msg_writer *w);
/* Back to length len (a value begun and given up), error cleared. */
void sm_msg_writer_rewind(struct sm_msg_writer *w, size_t len);

void sm_msg_put_nil(struct sm_msg_writer *w);
void sm_msg_put_bool(struct sm_msg_writer *w, bool v);
void sm_msg_put_int(struct sm_msg_writer *w, int64_t v);
void sm_msg_put_uint(struct sm_msg_writer *w, uint64_t v);
void sm_msg_put_double(struct sm_msg_writer *w, double v);
void sm_msg_put_str(struct sm_msg_writer *w, const char *s);
void sm_msg_put_strn(struct sm_msg_writer *w, const void *p, size_t len);
/* Room for a str of len bytes, to be filled by the caller; NULL on error. Valid
 * until the next put. */
void *sm_msg_put_strbuf(struct sm_msg_writer *w, size_t len);
void sm_msg_put_array(struct sm_msg_writer *w, uint32_t count); /* then count values */
void sm_msg_put_map(struct sm_msg_writer *w, uint32_t count);   /* then key, value … */
/* Bytes that are already a message. */
void sm_msg_put_raw(struct sm_msg_writer *w, const void *p, size_t len);

struct sm_msg_reader {
    const uint8_t *buf;
    size_t len, pos;
};

void sm_msg_reader_init(struct sm_msg_reader *r, const void *buf, size_t len);
/* The buffer is exactly one well-formed value. 0 or -EBADMSG. */
int sm_msg_check(const void *buf, size_t len);
/* The next value; of an array or map its head, the content follows. -EBADMSG. */
int sm_msg_next(struct sm_msg_reader *r, struct sm_msg_value *v);
/* Step over one whole value. -EBADMSG. */
int sm_msg_skip(struct sm_msg_reader *r);
/* r stands at a map: leaves `value` standing at what belongs to key. -ENOENT;
 * -EBADMSG when r does not stand at a map. */
int sm_msg_find(const struct sm_msg_reader *r, const char *key, struct sm_msg_reader *value);
/* Whether v is these bytes. */
bool sm_msg_is(const struct sm_msg_value *v, const char *s);

#endif
