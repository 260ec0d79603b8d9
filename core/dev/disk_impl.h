/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of a disk: what disk.c and disk_open.c share. */
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
    int sync_error; /* the kernel tells a failed sync once; we keep telling */
    sm_disk_fault_fn *fault;
    void *fault_arg;
};

#endif
