/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-pmem (VIRTIO 1.2, 5.19), read-only: files of the host as memory of
 * the guest. The guest's file system maps their pages straight into programs
 * (DAX), so they are cached once, by the host, for all guests that share them.
 *
 * The files are mapped MAP_SHARED and PROT_READ, one after the other, into one
 * range behind one read-only slot. A guest's store to it comes out as an MMIO
 * write that no device claims. Files that shrink under a guest end its worker
 * by SIGBUS: only files that nobody changes (the image store's) belong here.
 *
 * Guests that share pages can time each other's accesses to them; see the
 * security model in README.md.
 */
#ifndef SM_VIRTIO_PMEM_H
#define SM_VIRTIO_PMEM_H

#include "dev/disk.h"
#include "dev/virtio.h"
#include "dev/virtio_mmio.h"

/* Linux adds such memory in sub-sections of this size. */
#define SM_PMEM_ALIGN_BYTES (2ull << 20)

struct sm_pmem_config {
    const struct sm_disk_extent *extents; /* offset and length: multiples of a
                                             page, the sum of SM_PMEM_ALIGN_BYTES */
    unsigned extent_count;
};

/*
 * The segment goes above all other memory, at a multiple of 1 GiB, so the same
 * devices in the same order give the same addresses. -EINVAL: alignment, or no
 * extents; -ERANGE: a file is shorter than its extent. err: one line.
 */
int sm_virtio_pmem_create(const struct sm_virtio_env *env, const struct sm_pmem_config *cfg,
                          struct sm_virtio_mmio **out, char *err, size_t errlen);

#endif
