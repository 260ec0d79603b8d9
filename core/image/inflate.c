/* SPDX-License-Identifier: Apache-2.0 */
/* Decompression of a layer's blob; see inflate.h. */
#include "inflate.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <zstd.h>

#if !defined(SM_NO_ISAL) && defined(__has_include)
#if __has_include(<isa-l/igzip_lib.h>)
#define SM_HAVE_ISAL 1
#endif
#endif
#ifdef SM_HAVE_ISAL
#include <isa-l/igzip_lib.h>
#else
#include <zlib.h>
#endif

#define IN_BYTES (256u << 10)
#define IN_SLACK_BYTES 16 /* ISA-L loads whole words, the last one past the end */
/* The ratio counts only after this much: small layers compress by anything. */
#define RATIO_GRACE_BYTES (64u << 20)

struct sm_inflate {
    const struct inflate_ops *ops;
    int fd;
    bool in_eof;  /* the file has no more bytes */
    bool done;    /* the stream has no more bytes */
    bool inside;  /* within a member or frame */
    long failed;  /* the first error, which stays: a decoder's counts mean nothing after it */
    struct sm_image_error error;
    uint32_t ratio;
    uint64_t in_total, out_total;
    struct sm_image_progress *progress;
    uint8_t *next; /* unread part of buf */
    size_t avail;
#ifdef SM_HAVE_ISAL
    struct inflate_state *gz;
#else
    z_stream *gz;
#endif
    ZSTD_DStream *zstd;
    uint8_t buf[IN_BYTES + IN_SLACK_BYTES];
};

struct inflate_ops {
    const char *name;
    int (*open)(struct sm_inflate *s);
    long (*read)(struct sm_inflate *s, void *buf, size_t len, struct sm_image_error *e);
    void (*close)(struct sm_inflate *s);
};

/* Appends file bytes behind the unread part until there are want or the end. */
static int fill(struct sm_inflate *s, size_t want, struct sm_image_error *e)
{
    if (s->avail >= want || s->in_eof)
        return 0;
    memmove(s->buf, s->next, s->avail);
    s->next = s->buf;
    while (s->avail < want && !s->in_eof) {
        ssize_t n = read(s->fd, s->buf + s->avail, IN_BYTES - s->avail);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return sm_image_fail(e, errno, "reading: %s", strerror(errno));
        s->in_eof = n == 0;
        s->avail += (size_t)n;
        s->in_total += (uint64_t)n;
        if (s->progress)
            atomic_store(&s->progress->now_bytes, s->in_total);
    }
    return 0;
}

static int truncated(struct sm_inflate *s, struct sm_image_error *e)
{
    return sm_image_fail(e, EBADMSG, "%s stream ends early", s->ops->name);
}

static int corrupt(struct sm_inflate *s, const char *why, struct sm_image_error *e)
{
    return sm_image_fail(e, EBADMSG, "%s stream is corrupt (%s)", s->ops->name, why);
}

/* plain */

static long plain_read(struct sm_inflate *s, void *buf, size_t len, struct sm_image_error *e)
{
    int ret = fill(s, 1, e);
    size_t n = s->avail < len ? s->avail : len;

    if (ret < 0)
        return ret;
    memcpy(buf, s->next, n);
    s->next += n;
    s->avail -= n;
    s->done = n == 0;
    return (long)n;
}

/* gzip */

/* At a member's end: is there another one? Anything else is trailing garbage. */
static int gzip_next_member(struct sm_inflate *s, bool *more, struct sm_image_error *e)
{
    int ret = fill(s, 2, e);

    *more = ret == 0 && s->avail >= 2 && s->next[0] == 0x1f && s->next[1] == 0x8b;
    return ret;
}

#ifdef SM_HAVE_ISAL
static int gzip_open(struct sm_inflate *s)
{
    s->gz = malloc(sizeof(*s->gz));
    return s->gz ? 0 : -ENOMEM;
}

static void gzip_begin(struct sm_inflate *s)
{
    isal_inflate_init(s->gz);
    s->gz->crc_flag = ISAL_GZIP;
}

static int gzip_step(struct sm_inflate *s, uint8_t *buf, size_t len, size_t *got, bool *end,
                     struct sm_image_error *e)
{
    int ret;

    s->gz->next_in = s->next;
    s->gz->avail_in = (uint32_t)s->avail;
    s->gz->next_out = buf;
    s->gz->avail_out = (uint32_t)len;
    ret = isal_inflate(s->gz);
    s->next = s->gz->next_in;
    s->avail = s->gz->avail_in;
    *got = len - s->gz->avail_out;
    *end = s->gz->block_state == ISAL_BLOCK_FINISH;
    if (ret == ISAL_INCORRECT_CHECKSUM)
        return corrupt(s, "checksum", e);
    return ret < 0 ? corrupt(s, "data", e) : 0;
}

static void gzip_close(struct sm_inflate *s)
{
    free(s->gz);
}
#else
static int gzip_open(struct sm_inflate *s)
{
    s->gz = calloc(1, sizeof(*s->gz));
    if (!s->gz)
        return -ENOMEM;
    return inflateInit2(s->gz, 15 + 16) == Z_OK ? 0 : -ENOMEM;
}

static void gzip_begin(struct sm_inflate *s)
{
    inflateReset(s->gz);
}

static int gzip_step(struct sm_inflate *s, uint8_t *buf, size_t len, size_t *got, bool *end,
                     struct sm_image_error *e)
{
    int ret;

    s->gz->next_in = s->next;
    s->gz->avail_in = (uInt)s->avail;
    s->gz->next_out = buf;
    s->gz->avail_out = (uInt)len;
    ret = inflate(s->gz, Z_NO_FLUSH);
    s->next = s->gz->next_in;
    s->avail = s->gz->avail_in;
    *got = len - s->gz->avail_out;
    *end = ret == Z_STREAM_END;
    if (ret == Z_OK || ret == Z_STREAM_END || ret == Z_BUF_ERROR)
        return 0;
    return corrupt(s, s->gz->msg ? s->gz->msg : "data", e);
}

static void gzip_close(struct sm_inflate *s)
{
    if (s->gz)
        inflateEnd(s->gz);
    free(s->gz);
}
#endif

static long gzip_read(struct sm_inflate *s, void *buf, size_t len, struct sm_image_error *e)
{
    for (;;) {
        bool more = true, end = false;
        size_t got = 0;
        int ret;

        if (!s->inside) {
            ret = gzip_next_member(s, &more, e);
            if (ret < 0)
                return ret;
            s->done = !more;
            if (!more)
                return 0;
            gzip_begin(s);
            s->inside = true;
        }
        ret = fill(s, 1, e);
        if (ret == 0)
            ret = gzip_step(s, buf, len, &got, &end, e);
        if (ret < 0)
            return ret;
        s->inside = !end;
        if (got)
            return (long)got;
        if (!end && s->in_eof && !s->avail)
            return truncated(s, e);
    }
}

/* zstd */

static int zstd_open(struct sm_inflate *s)
{
    s->zstd = ZSTD_createDStream();
    return s->zstd ? 0 : -ENOMEM;
}

static long zstd_read(struct sm_inflate *s, void *buf, size_t len, struct sm_image_error *e)
{
    ZSTD_outBuffer out = { buf, len, 0 };

    while (!out.pos) {
        int ret = fill(s, 1, e);
        ZSTD_inBuffer in;
        size_t hint;

        if (ret < 0)
            return ret;
        if (!s->avail && !s->inside) {
            s->done = true;
            return 0;
        }
        in = (ZSTD_inBuffer){ s->next, s->avail, 0 };
        hint = ZSTD_decompressStream(s->zstd, &out, &in);
        if (ZSTD_isError(hint))
            return corrupt(s, ZSTD_getErrorName(hint), e);
        if (!out.pos && !in.pos && s->in_eof && !s->avail)
            return truncated(s, e);
        s->next += in.pos;
        s->avail -= in.pos;
        s->inside = hint != 0;
    }
    return (long)out.pos;
}

static void zstd_close(struct sm_inflate *s)
{
    ZSTD_freeDStream(s->zstd);
}

static const struct inflate_ops plain_ops = { "plain", NULL, plain_read, NULL };
static const struct inflate_ops gzip_ops = { "gzip", gzip_open, gzip_read, gzip_close };
static const struct inflate_ops zstd_ops = { "zstd", zstd_open, zstd_read, zstd_close };

static const struct inflate_ops *sniff(const uint8_t *p, size_t n, const char **unsupported)
{
    static const struct {
        const char *magic;
        size_t len;
        const char *name;
    } others[] = {
        { "\xfd" "7zXZ\0", 6, "xz" },
        { "BZh", 3, "bzip2" },
        { "\x04\x22\x4d\x18", 4, "lz4" },
        { "PK\x03\x04", 4, "zip" },
        { "\x5d\0\0", 3, "lzma" },
    };

    *unsupported = NULL;
    if (n >= 2 && p[0] == 0x1f && p[1] == 0x8b)
        return &gzip_ops;
    if (n >= 4 && (sm_get32(p) == 0xfd2fb528u || (sm_get32(p) & ~15u) == 0x184d2a50u))
        return &zstd_ops;
    /* "BZh" may begin the name of a plain tar's first file; then ustar tells. */
    if (n >= 512 && !memcmp(p + 257, "ustar", 5))
        return &plain_ops;
    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++)
        if (n >= others[i].len && !memcmp(p, others[i].magic, others[i].len))
            *unsupported = others[i].name;
    return &plain_ops;
}

int sm_inflate_open(struct sm_inflate **out, int fd, uint32_t ratio,
                    struct sm_image_progress *progress, struct sm_image_error *e)
{
    struct sm_inflate *s = calloc(1, sizeof(*s));
    const char *unsupported;
    int ret;

    if (!s)
        return sm_image_fail(e, ENOMEM, "out of memory");
    s->fd = fd;
    s->ratio = ratio;
    s->progress = progress;
    s->next = s->buf;
    s->ops = &plain_ops;
    ret = fill(s, 512, e);
    if (ret < 0)
        goto fail;
    s->ops = sniff(s->next, s->avail, &unsupported);
    if (unsupported) {
        ret = sm_image_fail(e, EPROTONOSUPPORT, "%s compression is not supported",
                            unsupported);
        goto fail;
    }
    if (s->ops->open && (ret = s->ops->open(s)) < 0) {
        sm_image_fail(e, -ret, "out of memory");
        goto fail;
    }
    *out = s;
    return 0;
fail:
    sm_inflate_close(s);
    return ret;
}

const char *sm_inflate_format(const struct sm_inflate *s)
{
    return s->ops->name;
}

static long read_some(struct sm_inflate *s, void *buf, size_t len, struct sm_image_error *e)
{
    long n;

    if (s->progress && atomic_load(&s->progress->cancel))
        return sm_image_fail(e, ECANCELED, "cancelled");
    n = s->ops->read(s, buf, len > INT_MAX ? INT_MAX : len, e);
    if (n < 0)
        return n;
    s->out_total += (uint64_t)n;
    if (s->out_total > RATIO_GRACE_BYTES && s->out_total / s->ratio > s->in_total)
        return sm_image_fail(e, EFBIG, "expands more than %u times (limit ratio)", s->ratio);
    return n;
}

long sm_inflate_read(struct sm_inflate *s, void *buf, size_t len, struct sm_image_error *e)
{
    long n;

    if (s->done)
        return 0;
    if (s->failed) {
        *e = s->error;
        return s->failed;
    }
    n = read_some(s, buf, len, e);
    if (n < 0) {
        s->failed = n;
        s->error = *e;
    }
    return n;
}

void sm_inflate_close(struct sm_inflate *s)
{
    if (!s)
        return;
    if (s->ops->close)
        s->ops->close(s);
    free(s);
}
