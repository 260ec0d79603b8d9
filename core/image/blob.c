/* SPDX-License-Identifier: Apache-2.0 */
/* A layer's data blob; see blob.h. */
#include "blob.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BUF_BYTES (1u << 20)

int sm_blob_open(struct sm_blob *b, int fd)
{
    memset(b, 0, sizeof(*b));
    b->fd = fd;
    b->buf = malloc(BUF_BYTES);
    return b->buf ? 0 : -ENOMEM;
}

void sm_blob_close(struct sm_blob *b)
{
    free(b->buf);
    b->buf = NULL;
}

static bool is_zero(const uint8_t *p)
{
    return !p[0] && !memcmp(p, p + 1, SM_IMAGE_BLOCK - 1);
}

/* Writes the buffer's runs of blocks that are not all zero. */
static int flush(struct sm_blob *b)
{
    size_t blocks = (b->used + SM_IMAGE_BLOCK - 1) / SM_IMAGE_BLOCK;
    size_t from = 0;
    int ret;

    memset(b->buf + b->used, 0, blocks * SM_IMAGE_BLOCK - b->used);
    for (size_t i = 0; i <= blocks; i++) {
        if (i < blocks && !is_zero(b->buf + i * SM_IMAGE_BLOCK))
            continue;
        if (i > from) {
            ret = sm_image_write_all(b->fd, b->buf + from * SM_IMAGE_BLOCK,
                                     (i - from) * SM_IMAGE_BLOCK,
                                     b->base + from * SM_IMAGE_BLOCK);
            if (ret < 0)
                return ret;
        }
        from = i + 1;
    }
    b->base += blocks * SM_IMAGE_BLOCK;
    b->used = 0;
    return 0;
}

uint64_t sm_blob_reserve(struct sm_blob *b, uint64_t bytes)
{
    uint64_t at = b->end;

    b->end = sm_image_align(b->end + bytes, SM_IMAGE_BLOCK);
    return at;
}

/* Moves the buffer's end to offset: zeros when near, a new buffer when far. */
static int seek(struct sm_blob *b, uint64_t offset)
{
    uint64_t at = b->base + b->used;
    uint64_t block = offset / SM_IMAGE_BLOCK * SM_IMAGE_BLOCK;
    int ret;

    if (offset - b->base >= BUF_BYTES) {
        ret = flush(b);
        if (ret < 0)
            return ret;
        /* flush rounded up: never back into a block that was written */
        if (block > b->base)
            b->base = block;
        at = b->base;
    }
    memset(b->buf + b->used, 0, offset - at);
    b->used += offset - at;
    return 0;
}

int sm_blob_write(struct sm_blob *b, uint64_t offset, const void *data, size_t len)
{
    const uint8_t *p = data;
    int ret;

    if (offset < b->base + b->used || offset > b->end || len > b->end - offset)
        return -EINVAL;
    ret = seek(b, offset);
    while (ret == 0 && len) {
        size_t n = BUF_BYTES - b->used;

        if (n > len)
            n = len;
        memcpy(b->buf + b->used, p, n);
        b->used += n;
        p += n;
        len -= n;
        if (b->used == BUF_BYTES)
            ret = flush(b);
    }
    return ret;
}

int sm_blob_finish(struct sm_blob *b, uint64_t *bytes)
{
    int ret = flush(b);

    *bytes = sm_image_align(b->end, SM_IMAGE_PAD);
    if (ret == 0 && ftruncate(b->fd, (off_t)*bytes) < 0)
        ret = -errno;
    return ret;
}
