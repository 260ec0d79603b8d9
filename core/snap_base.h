/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a VM's memory lies over: the file of a snapshot, and those of the diffs that
 * it is made of, each page a private view of the newest file that holds it.
 *
 * One view is one mapping, of which a process may have some 65,000; beyond
 * SM_SNAP_VIEWS the pages of a diff are read into place instead. Those are private
 * then and a later diff holds them again, which costs space and no more.
 *
 * Threads: the VM's owner's, while no vCPU runs.
 */
#ifndef SM_SNAP_BASE_H
#define SM_SNAP_BASE_H

#include <stdbool.h>
#include <stdint.h>

#include "snap.h"

#define SM_SNAP_VIEWS 16384

struct sm_mem;
struct sm_mem_region;
struct sm_snap_area;
struct sm_snap_base;

/* NULL: out of memory. */
struct sm_snap_base *sm_snap_base_new(const uint8_t *id);
void sm_snap_base_free(struct sm_snap_base *base);
const uint8_t *sm_snap_base_id(const struct sm_snap_base *base);
/* From now on it is this snapshot. */
void sm_snap_base_set_id(struct sm_snap_base *base, const uint8_t *id);

/* There is a region; -ENOMEM, -ENOSPC. */
int sm_snap_base_add(struct sm_snap_base *base, uint64_t gpa, uint64_t len_bytes);
/*
 * Bring the pages of a diff under it: those of the area that have their bit set, out
 * of the file. `read`: also where no view can be had; without it those stay as they
 * are, for they hold the same.
 */
int sm_snap_base_lay(struct sm_snap_base *base, struct sm_mem *mem, const struct sm_snap_area *a,
                     const uint8_t *bits, int fd, bool read);
/* One view: a part of a file that holds what those bytes of the region are. false: there
 * can be none here, and nothing was changed. */
bool sm_snap_base_view(struct sm_snap_base *base, struct sm_mem *mem, const struct sm_mem_region *r,
                       uint64_t at, uint64_t len_bytes, int fd, uint64_t offset);
/* The pages that come out of diffs; NULL: none. */
const uint8_t *sm_snap_base_bits(const struct sm_snap_base *base, uint64_t gpa);
/* The VM's RAM is what it was when the base was made, and all of it over files. */
bool sm_snap_base_fits(const struct sm_snap_base *base, const struct sm_mem *mem);

#endif
