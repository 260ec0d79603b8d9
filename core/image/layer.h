/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One layer: a blob (tar, compressed or not) becomes `out/data`, the contents of
 * its files, and `out/index`, everything else (index.h). One pass:
 *
 *   blob -> inflate -> hash of the plain bytes (diffID) -> libarchive -> tree
 *                                                              `-> data blob
 *
 * The result depends on the plain bytes alone: the same for gzip, zstd and tar,
 * in any locale, at any time. What a tar may say, and what we make of it, is in
 * entry.c (image-spec, layer.md). The caller gives a directory of its own and
 * publishes it by rename; on an error both files are removed from it.
 *
 * Runs on the calling thread; progress may be read and cancelled from others.
 */
#ifndef SM_IMAGE_LAYER_H
#define SM_IMAGE_LAYER_H

#include "digest.h"

struct sm_layer_config {
    const char *blob;
    const char *out;     /* an existing directory */
    const char *diff_id; /* expected digest of the plain tar, or NULL */
    struct sm_image_limits limits;
    struct sm_image_progress *progress; /* or NULL */
};

struct sm_layer_result {
    char diff_id[SM_DIGEST_TEXT];
    const char *format; /* "gzip", "zstd", "plain" */
    uint64_t tar_bytes; /* plain bytes */
    uint64_t data_bytes;
    uint64_t entries; /* in the tar */
    uint64_t ignored; /* entries and attributes an image cannot have */
    uint32_t inodes;
};

int sm_layer_ingest(const struct sm_layer_config *cfg, struct sm_layer_result *r,
                    struct sm_image_error *e);

#endif
