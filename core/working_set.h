/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The working set of a snapshot: the pages that a copy needed until it had answered,
 * one after the other in a file beside it. A later copy has that file read in one go
 * and its pages laid over those of the snapshot, instead of asking for each when the
 * guest comes to it; clones share the page cache of it as they do the snapshot's.
 *
 *   0      header, 64 bytes: magic, version, id of the snapshot, checksums
 *   64     ranges of guest memory, 16 bytes each, ascending
 *   page … their pages, as the snapshot (with its parents) has them; zero pages are
 *          holes
 *
 * It is a copy of what the snapshot holds and no more: without it, or with one of
 * another snapshot or a damaged one, a restore is slower and otherwise the same.
 * Header and ranges are held against their checksum at each open, the pages by
 * sm_working_set_verify.
 *
 * Threads: the VM's owner; sm_working_set alone: one thread at a time.
 */
#ifndef SM_WORKING_SET_H
#define SM_WORKING_SET_H

#include <stddef.h>
#include <stdint.h>

struct sm_snap;
struct sm_snap_base;
struct sm_vm;

#define SM_WORKING_SET_RANGES 4096

struct sm_working_range {
    uint64_t gpa, len_bytes; /* whole pages */
};

/*
 * What of its memory this VM has touched since it was loaded, and a little around it:
 * how many ranges, ascending. -ESRCH: it was not loaded lazily; -E2BIG: more ranges
 * than max; -ENOTSUP: this kernel does not say.
 */
int sm_working_set_touched(struct sm_vm *vm, struct sm_working_range *out, unsigned max);

/* Write those of a chain (see sm_snap_flatten) into an empty file. -EINVAL: ranges
 * that are not ascending, or not of the snapshot's memory. */
int sm_working_set_write(struct sm_snap *const *links, unsigned count,
                         const struct sm_working_range *ranges, unsigned range_count, int fd);

struct sm_working_set;

/* fd becomes the set's, also on failure. -EBADMSG: damaged, or none. */
int sm_working_set_open(int fd, struct sm_working_set **out);
void sm_working_set_close(struct sm_working_set *set);
/* Its pages against their checksum. -EBADMSG. */
int sm_working_set_verify(struct sm_working_set *set);

/* Begin to read it, and return. */
void sm_working_set_prefetch(const struct sm_working_set *set);
/* Lay it over a VM's memory, whose base is that of its snapshot. Bytes laid; 0: it is
 * of another snapshot, or this host cannot. */
uint64_t sm_working_set_lay(const struct sm_working_set *set, struct sm_vm *vm,
                            struct sm_snap_base *base);

#endif
