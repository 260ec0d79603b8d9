/* SPDX-License-Identifier: Apache-2.0 */
/* Offsets of the layer index's records; only index.c and index_write.c. */
#ifndef SM_IMAGE_INDEX_FORMAT_H
#define SM_IMAGE_INDEX_FORMAT_H

#include "index.h"

#define INDEX_MAGIC "smlayer\n"
#define INDEX_VERSION 1u
#define INDEX_BYTES_MAX (4ull << 30)
#define SM_XATTR_LIST_MAX (64u << 10)

enum {
    H_VERSION = 8,
    H_SUM = 12, /* CRC-32C of everything, this field as zero */
    H_NODES = 16,
    H_INODES = 20,
    H_STRINGS = 24, /* u64 */
    H_DATA = 32,    /* u64 */
    H_ID_BYTES = 40,
    HEADER_BYTES = 96,
    ID_BYTES = 160,
};

enum {
    N_PARENT = 0,
    N_INODE = 4,
    N_NAME = 8, /* u64: the name, then the hard link's path */
    N_NAME_LEN = 16,
    N_LINK_LEN = 18,
    N_KIND = 20,
    N_FLAGS = 21,
    NODE_BYTES = 32,
};

enum {
    I_MODE = 0,
    I_UID = 4,
    I_GID = 8,
    I_MTIME_NS = 12,
    I_MTIME = 16,
    I_SIZE = 24,
    I_DATA = 32,
    I_STRINGS = 40, /* u64: the link's target, then the attribute list */
    I_XATTR_BYTES = 48,
    I_MAJOR = 52,
    I_MINOR = 56,
    INODE_BYTES = 72,
};

uint32_t sm_index_sum(const uint8_t *file, size_t len);

#endif
