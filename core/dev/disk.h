/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is behind a block device: a base put together from extents of files,
 * and, for a disk that can be written, either a copy-on-write overlay or the
 * base itself.
 *
 *     base     [ file a ][ file b … ][ zeros up to size ]       read only
 *     delta    sparse file, cluster n at its own offset         read, write
 *     map      one bit a cluster: set = the delta has it (a hole in the
 *              delta under a set bit is zeros that were written or discarded)
 *
 * A write to part of a cluster that the delta lacks copies the rest up first,
 * so a set bit always speaks for a whole cluster.
 *
 * A persistent overlay keeps its map in `<overlay>.map`, a log of checked
 * records (disk_map.h). A flush makes the data durable first and the map
 * after: what was flushed survives anything, what was not may be lost, as on
 * any disk with a write cache. Delta and map are locked against a second user.
 * An ephemeral overlay has no name and no map on disk, and its flush does
 * nothing: it does not outlive the process.
 *
 * Threads. One at a time (the block device's I/O thread); every call blocks.
 * Errors are -errno. All offsets and lengths are checked against the size.
 */
#ifndef SM_DISK_H
#define SM_DISK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define SM_DISK_CLUSTER_BYTES 4096u
#define SM_DISK_MAX_BYTES (1ull << 46) /* 64 TiB */
#define SM_DISK_MAX_EXTENTS 1024

/* Give a path, or path NULL and an fd, which is duplicated, or path NULL and
 * fd -1 for zeros. length_bytes 0: to the end of the file. */
struct sm_disk_extent {
    const char *path;
    int fd;
    uint64_t offset, length_bytes;
};

enum sm_disk_mode {
    SM_DISK_READ_ONLY,
    SM_DISK_OVERLAY, /* writes go to the overlay */
    SM_DISK_DIRECT,  /* writes go to the extents */
};

struct sm_disk_config {
    enum sm_disk_mode mode;
    const struct sm_disk_extent *extents;
    unsigned extent_count;
    uint64_t
        size_bytes; /* 0: what the extents hold; else at least 512, a multiple of 512 */
    const char *overlay; /* the delta's path; made when it is missing */
    bool ephemeral;      /* overlay: the name is removed at once; no map file */
    const char *base_id; /* overlay: what the base is (a digest), ≤ 127 bytes; an
                            overlay made for another is refused. May be NULL */
};

struct sm_disk;
struct sm_state_writer;
struct sm_state_reader;

/* -EBUSY: the overlay is in use; -ESTALE: it belongs to another base or size;
 * -EBADMSG: its map is damaged. err gets one line, may be NULL. */
int sm_disk_open(const struct sm_disk_config *cfg, struct sm_disk **out, char *err,
                 size_t errlen);
/* Saves the map of a persistent overlay. Returns what went wrong with that. */
int sm_disk_close(struct sm_disk *disk);

uint64_t sm_disk_size_bytes(const struct sm_disk *disk);
bool sm_disk_read_only(const struct sm_disk *disk);

/* All of the buffers or an error. The iovecs are not changed. */
int sm_disk_read(struct sm_disk *disk, uint64_t offset, const struct iovec *iov,
                 unsigned count);
int sm_disk_write(struct sm_disk *disk, uint64_t offset, const struct iovec *iov,
                  unsigned count);
/* The range reads as zeros afterwards. release: give the space back. */
int sm_disk_zero(struct sm_disk *disk, uint64_t offset, uint64_t len_bytes, bool release);
int sm_disk_flush(struct sm_disk *disk);

/*
 * For a snapshot. A disk that is only read is a reference: its size is noted,
 * what it is says whoever restores it. An overlay is kept whole, base and
 * delta as one, in a blob beside the stream (state.h), zeros left out; loaded,
 * that blob takes the place of the base, read only and shared by every clone,
 * and writes go to the new disk's own delta. A disk that writes to its extents
 * cannot be kept: -ENOTSUP. Without a blob file only the delta's map is noted.
 * -ESTALE: the disk has another shape.
 */
int sm_disk_save(struct sm_disk *disk, struct sm_state_writer *w);
int sm_disk_load(struct sm_disk *disk, struct sm_state_reader *r);

/*
 * The place for faults: asked before each operation on a file, a result other
 * than 0 is what the operation returns. For specs.
 */
enum sm_disk_op { SM_DISK_OP_READ, SM_DISK_OP_WRITE, SM_DISK_OP_ZERO, SM_DISK_OP_FLUSH };
typedef int sm_disk_fault_fn(void *arg, enum sm_disk_op op, uint64_t offset,
                             uint64_t len_bytes);
void sm_disk_set_fault(struct sm_disk *disk, sm_disk_fault_fn *fn, void *arg);

#endif
