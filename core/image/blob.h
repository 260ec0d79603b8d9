/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The writer of a layer's data blob: file contents one after another, each
 * beginning on a 4 KiB block, the whole padded to 2 MiB. Blocks of zeros are
 * left as holes whether the tar called them sparse or not, so the bytes read
 * back depend on nothing but the contents. One thread.
 */
#ifndef SM_IMAGE_BLOB_H
#define SM_IMAGE_BLOB_H

#include "image.h"

struct sm_blob {
    int fd;
    uint8_t *buf;  /* the file's bytes from base on */
    size_t used;
    uint64_t base; /* multiple of a block */
    uint64_t end;  /* first byte no file owns */
};

int sm_blob_open(struct sm_blob *b, int fd);
void sm_blob_close(struct sm_blob *b);

/* Reserves bytes for one file; returns its offset, a multiple of a block. */
uint64_t sm_blob_reserve(struct sm_blob *b, uint64_t bytes);

/* Writes at a growing offset inside what was reserved last. */
int sm_blob_write(struct sm_blob *b, uint64_t offset, const void *data, size_t len);

/* Flushes, pads; *bytes becomes the blob's length. */
int sm_blob_finish(struct sm_blob *b, uint64_t *bytes);

#endif
