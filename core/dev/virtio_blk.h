/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-blk (VIRTIO 1.2, 5.2): one request queue over a struct sm_disk.
 * Requests run one after the other, synchronously, on the device's own I/O
 * thread (give each disk one), so nothing is in flight while it is held.
 */
#ifndef SM_VIRTIO_BLK_H
#define SM_VIRTIO_BLK_H

#include "dev/disk.h"
#include "dev/virtio.h"
#include "dev/virtio_mmio.h"

#define SM_BLK_SERIAL_BYTES 20 /* 5.2.6: GET_ID, need not end in a NUL */

struct sm_blk_config {
    const char *serial;   /* up to SM_BLK_SERIAL_BYTES; NULL: none */
    struct sm_disk *disk; /* the device's on success, closed with it */
    struct sm_faults *faults; /* the caller's, outlives it; may be NULL */
};

/* -EINVAL: serial too long. */
int sm_virtio_blk_create(const struct sm_virtio_env *env, const struct sm_blk_config *cfg,
                         struct sm_virtio_mmio **out);

#endif
