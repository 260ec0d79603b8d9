/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What every file of core/image shares: errors as text, limits, progress,
 * small file helpers and CRC-32C.
 *
 * The image side turns a container layer (a tar, often compressed) into two
 * files, `data` and `index` (layer.h), and a list of such layers into one
 * small EROFS `meta` image (merge.h) that describes the data of all of them.
 * Everything that arrives here comes from a registry or an archive and is
 * hostile: it is only ever parsed into our own structures, never extracted.
 *
 * Functions return 0 or -errno and put one line of text into the error they
 * were given. No function prints, aborts or keeps global state.
 */
#ifndef SM_IMAGE_H
#define SM_IMAGE_H

#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SM_IMAGE_BLOCK 4096u          /* EROFS block, alignment of file data */
#define SM_IMAGE_PAD (2u << 20)       /* meta and data blobs end on 2 MiB */
#define SM_IMAGE_NAME_MAX 255u        /* one path component */
#define SM_IMAGE_PATH_MAX 4095u       /* one path, and one link target */

struct sm_image_error {
    char text[512];
};

/* Bounds against decompression and metadata bombs; 0 means the default. */
struct sm_image_limits {
    uint64_t bytes;       /* file bytes of one layer, holes included */
    uint64_t entries;     /* tar entries of a layer, inodes of an image */
    uint64_t xattr_bytes; /* names and values of extended attributes */
    uint32_t depth;       /* components of a path */
    uint32_t ratio;       /* decompressed bytes per compressed byte */
};

/* Shared by a worker thread and its owner; every field is atomic. */
struct sm_image_progress {
    atomic_bool cancel;
    _Atomic uint64_t now_bytes;
    _Atomic uint64_t total_bytes;
};

/* Formats into e (which may be NULL) and returns -err. */
int sm_image_fail(struct sm_image_error *e, int err, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Puts "<prefix>: " before the text already in e and returns ret. */
int sm_image_wrap(struct sm_image_error *e, int ret, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* A name from outside, made safe for one line: at most 80 bytes, no controls. */
struct sm_image_quoted {
    char text[96];
};
struct sm_image_quoted sm_image_quote(const char *s, size_t len);

/* Fills the zero fields of l with the defaults. */
void sm_image_limits_default(struct sm_image_limits *l);

uint32_t sm_image_crc32c(uint32_t seed, const void *data, size_t len);

int sm_image_write_all(int fd, const void *data, size_t len, uint64_t offset);

/* Reads a whole file of at most max bytes; *out is freed by the caller. */
int sm_image_read_file(const char *path, uint64_t max, uint8_t **out, size_t *len,
                       struct sm_image_error *e);

static inline uint64_t sm_image_align(uint64_t v, uint64_t to)
{
    return (v + to - 1) / to * to;
}

static inline void sm_put16(uint8_t *p, uint16_t v)
{
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}

static inline void sm_put32(uint8_t *p, uint32_t v)
{
    sm_put16(p, (uint16_t)v);
    sm_put16(p + 2, (uint16_t)(v >> 16));
}

static inline void sm_put64(uint8_t *p, uint64_t v)
{
    sm_put32(p, (uint32_t)v);
    sm_put32(p + 4, (uint32_t)(v >> 32));
}

static inline uint16_t sm_get16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static inline uint32_t sm_get32(const uint8_t *p)
{
    return sm_get16(p) | (uint32_t)sm_get16(p + 2) << 16;
}

static inline uint64_t sm_get64(const uint8_t *p)
{
    return sm_get32(p) | (uint64_t)sm_get32(p + 4) << 32;
}

#endif
