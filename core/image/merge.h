/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Layers to image: the indexes of the layers, lowest first, are laid over each
 * other and the result is written as one EROFS metadata image. The device that
 * the guest mounts is [meta | data 0 | data 1 | ...], each part as long as its
 * file; the parts are returned as extents in that order, empty ones left out.
 *
 * Whiteouts and opaque marks of a layer act on the layers below it only; so do
 * its hard links into them, which see the lower layers before its whiteouts.
 */
#ifndef SM_IMAGE_MERGE_H
#define SM_IMAGE_MERGE_H

#include "image.h"

struct sm_merge_config {
    const char *const *layers; /* directories with data and index, lowest first */
    uint32_t n_layers;
    const char *out; /* the meta file; must not exist, removed on failure */
    struct sm_image_limits limits;
    struct sm_image_progress *progress; /* or NULL */
};

struct sm_merge_result {
    uint64_t meta_bytes;
    uint64_t device_bytes; /* meta and all data */
    uint32_t inodes;
    uint64_t *layer_bytes; /* n_layers lengths of data; freed by the caller */
};

int sm_merge(const struct sm_merge_config *cfg, struct sm_merge_result *r,
             struct sm_image_error *e);

#endif
