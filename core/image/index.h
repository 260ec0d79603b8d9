/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The index of one layer: its normalised tree as a file. Own format, version 1,
 * little endian, written once and never changed:
 *
 *   header  96 bytes   magic "smlayer\n", version, counts, sizes, checksum
 *   text    digest     the layer's diffID, "sha256:..." (length in the header)
 *   nodes   32 bytes each, parents before children, siblings by name
 *   inodes  72 bytes each, in order of their first node
 *   strings names, link targets and attribute lists, referred to by offset
 *
 * A reader trusts nothing: lengths, checksum, every reference, every name and
 * every attribute list is checked before the first entry is handed out, so a
 * damaged or forged index is one error and never a crash.
 */
#ifndef SM_IMAGE_INDEX_H
#define SM_IMAGE_INDEX_H

#include "digest.h"
#include "tree.h"

struct sm_index {
    uint8_t *file; /* owned */
    const uint8_t *nodes, *inodes, *strings;
    uint32_t n_nodes, n_inodes;
    uint64_t strings_bytes;
    uint64_t data_bytes; /* length of the data blob */
    char diff_id[SM_DIGEST_TEXT];
};

/* The tree's live nodes into fd, from offset 0. */
int sm_index_write(const struct sm_tree *t, const char *diff_id, uint64_t data_bytes, int fd,
                   uint32_t *inodes, struct sm_image_error *e);

/* Takes ownership of file (malloc) in every case. check_sum false: for fuzzing. */
int sm_index_parse(struct sm_index *ix, uint8_t *file, size_t len, bool check_sum,
                   struct sm_image_error *e);
int sm_index_load(struct sm_index *ix, const char *path, struct sm_image_error *e);
void sm_index_close(struct sm_index *ix);

/* Entry i, its strings borrowed from the index; parent is an index node number. */
void sm_index_node(const struct sm_index *ix, uint32_t i, struct sm_node *n);
void sm_index_inode(const struct sm_index *ix, uint32_t i, struct sm_inode *n);

#endif
