/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of a disk: what disk.c, disk_open.c and disk_state.c share. */
#ifndef SM_DISK_IMPL_H
#define SM_DISK_IMPL_H

#include "dev/disk.h"
#include "dev/disk_map.h"

struct sm_disk_part {
    int fd;         /* -1: zeros */
    uint64_t start; /* on the disk */
    uint64_t len;
    uint64_t offset; /* in the file */
};

struct sm_disk {
    enum sm_disk_mode mode;
    bool ephemeral;
    uint64_t size_bytes;
    unsigned extent_count;
    struct sm_disk_part *extents; /* in order, without gaps, from 0 */
    int delta;                    /* -1: no overlay */
    struct sm_disk_map map;
    /* From a snapshot, in place of the base; -1: none. */
    int lower_fd;
    uint64_t lower_offset;
    struct sm_disk_map lower_map;
    int sync_error; /* the kernel tells a failed sync once; we keep telling */
    sm_disk_fault_fn *fault;
    void *fault_arg;
};

/* The extent that holds a byte of the disk, or NULL beyond the base. */
const struct sm_disk_part *sm_disk_find_extent(const struct sm_disk *disk, uint64_t at);
/* Back to the base, and an empty delta. */
void sm_disk_drop_lower(struct sm_disk *disk);

#endif
