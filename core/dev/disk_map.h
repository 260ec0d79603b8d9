/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which clusters of a copy-on-write disk are in its delta: a bit each, and,
 * for a disk that outlives the process, a log of what was set.
 *
 * The file, all little-endian:
 *     header   "smdiskm1" | version u32 | cluster u32 | size u64 | base id[128]
 *              | crc u32
 *     records  start u64 | count u64 | batch u32 | crc u32     appended
 * Bits are only ever set, so replaying records in any order gives the map. A
 * commit appends one batch and makes it durable before the next one begins; a
 * crash can therefore spoil records of the last batch only, and those were
 * not reported done. A bad record with a valid one two batches later behind it
 * is damage, and refused. The log is rewritten (new file, fsync, rename) when
 * it is long.
 *
 * Threads: the disk's.
 */
#ifndef SM_DISK_MAP_H
#define SM_DISK_MAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SM_DISK_BASE_ID_BYTES 128

struct sm_disk_range {
    uint64_t start, count; /* clusters */
};

struct sm_disk_map {
    uint64_t clusters;
    uint64_t *bits; /* mmap: pages that stay zero cost nothing */
    size_t bits_bytes;
    /* the log, when there is one */
    int fd; /* -1: none */
    char *path;
    uint64_t size_bytes;
    char base_id[SM_DISK_BASE_ID_BYTES];
    uint64_t end;                /* where the next record goes */
    uint64_t records, rewritten; /* now; after the last rewrite */
    uint32_t batch;
    bool stale; /* the log does not describe bits: rewrite it */
    struct sm_disk_range *pending;
    unsigned pending_count;
};

/* Without a log. -ENOMEM. */
int sm_disk_map_init(struct sm_disk_map *map, uint64_t size_bytes);
void sm_disk_map_free(struct sm_disk_map *map);

/* Start a log at path, replacing what is there; or read it. base_id may be
 * NULL. -ESTALE: it is for another disk; -EBADMSG: damaged; -ENOENT. */
int sm_disk_map_create_log(struct sm_disk_map *map, const char *path,
                           const char *base_id);
int sm_disk_map_open_log(struct sm_disk_map *map, const char *path, const char *base_id);
/* Make all that is set durable in the log; the data comes before. */
int sm_disk_map_commit(struct sm_disk_map *map);

/* How many clusters from start on, at most `most`, are all present or all
 * absent; *present says which. */
uint64_t sm_disk_map_run(const struct sm_disk_map *map, uint64_t start, uint64_t most,
                         bool *present);
bool sm_disk_map_has(const struct sm_disk_map *map, uint64_t cluster);
/* Whether there is room to note another range before a commit is due. */
bool sm_disk_map_room(const struct sm_disk_map *map);
void sm_disk_map_set(struct sm_disk_map *map, uint64_t start, uint64_t count);
void sm_disk_map_wipe(struct sm_disk_map *map); /* all absent; the log is rewritten */

#endif
