/* SPDX-License-Identifier: Apache-2.0 */
/* One tar entry into the layer's tree; used by layer.c only. See entry.c. */
#ifndef SM_IMAGE_ENTRY_H
#define SM_IMAGE_ENTRY_H

#include "blob.h"
#include "tree.h"

struct archive;
struct archive_entry;

struct sm_layer_build {
    struct sm_tree tree;
    struct sm_blob blob;
    struct sm_image_limits limits;
    uint64_t bytes, xattr_bytes, entries, ignored;
    uint32_t links; /* unresolved hard links */
    struct sm_walk walk;
    char path[SM_IMAGE_PATH_MAX + 1];
};

/* Takes one entry, its data included. */
int sm_entry_add(struct sm_layer_build *b, struct archive *a, struct archive_entry *ae,
                 struct sm_image_error *e);

/* After the last entry: hard links whose target came later in the tar. */
int sm_entry_finish(struct sm_layer_build *b, struct sm_image_error *e);

#endif
