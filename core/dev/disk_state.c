/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A disk in a snapshot; see disk.h. Saving walks the disk layer by layer and
 * asks each file where it has data, so a large sparse disk costs what was
 * written to it; and where the file system can share blocks between files
 * (xfs, btrfs), not even that: copy_file_range(2) has it do so.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "dev/disk_impl.h"
#include "file.h"
#include "state.h"

#define CHUNK_CLUSTERS 16u
#define CHUNK_BYTES (CHUNK_CLUSTERS * SM_DISK_CLUSTER_BYTES)

enum { VERSION_MAP = 1, VERSION_WHOLE = 2 };

void sm_disk_drop_lower(struct sm_disk *disk)
{
    if (disk->lower_fd < 0)
        return;
    close(disk->lower_fd);
    disk->lower_fd = -1;
    sm_disk_map_free(&disk->lower_map);
}

/* ---- where there is data ---- */

/* The first byte of a file from `offset` on that may be data, at most `end`. */
static uint64_t seek_data(int fd, uint64_t offset, uint64_t end)
{
    off_t at = lseek(fd, (off_t)offset, SEEK_DATA);

    if (at < 0)
        return errno == ENXIO ? end : offset; /* cannot tell: all of it */
    return (uint64_t)at < end ? (uint64_t)at : end;
}

/* From `at` on: where the base may have data, at most `end`. */
static uint64_t base_data(const struct sm_disk *disk, uint64_t at, uint64_t end)
{
    while (at < end) {
        const struct sm_disk_part *e = sm_disk_find_extent(disk, at);
        uint64_t stop, found;

        if (!e)
            return end;
        stop = e->start + e->len < end ? e->start + e->len : end;
        if (e->fd >= 0) {
            found = seek_data(e->fd, e->offset + (at - e->start), e->offset + (stop - e->start));
            at = e->start + (found - e->offset);
            if (at < stop)
                return at;
        }
        at = stop;
    }
    return end;
}

static uint64_t next_data(const struct sm_disk *disk, uint64_t at)
{
    while (at < disk->size_bytes) {
        uint64_t cluster = at / SM_DISK_CLUSTER_BYTES, end, found;
        bool present, below;
        uint64_t run = sm_disk_map_run(&disk->map, cluster, disk->map.clusters - cluster, &present);

        if (!present && disk->lower_fd >= 0) {
            run = sm_disk_map_run(&disk->lower_map, cluster, run, &below);
            if (below)
                return at;
        }
        end = (cluster + run) * SM_DISK_CLUSTER_BYTES;
        if (end > disk->size_bytes)
            end = disk->size_bytes;
        found = present               ? seek_data(disk->delta, at, end)
                : disk->lower_fd >= 0 ? end
                                      : base_data(disk, at, end);
        if (found < end)
            return found;
        at = end;
    }
    return disk->size_bytes;
}

/* ---- save ---- */

static bool is_zero(const uint8_t *p, size_t len)
{
    return p[0] == 0 && memcmp(p, p + 1, len - 1) == 0;
}

/* One run of clusters that have data, noted as (start, count). */
struct range {
    uint64_t start, count;
};

static void put_range(struct sm_state_writer *w, struct range *range)
{
    if (range->count) {
        sm_state_put_u64(w, range->start);
        sm_state_put_u64(w, range->count);
    }
    range->count = 0;
}

static void add_range(struct sm_state_writer *w, struct range *range, uint64_t start,
                      uint64_t count)
{
    if (range->count && range->start + range->count != start)
        put_range(w, range);
    if (!range->count)
        range->start = start;
    range->count += count;
}

/* The clusters of a chunk that are not zero, into the blob. */
static int save_chunk(const uint8_t *buf, uint64_t at, size_t len, int fd,
                      const struct sm_state_blob *blob, struct sm_state_writer *w,
                      struct range *range)
{
    for (size_t from = 0; from < len; from += SM_DISK_CLUSTER_BYTES) {
        size_t part = len - from < SM_DISK_CLUSTER_BYTES ? len - from : SM_DISK_CLUSTER_BYTES;
        uint64_t cluster = (at + from) / SM_DISK_CLUSTER_BYTES;
        int err;

        if (is_zero(buf + from, part))
            continue;
        err = sm_file_write(fd, buf + from, part, blob->offset + at + from);
        if (err)
            return err;
        add_range(w, range, cluster, 1);
    }
    return 0;
}

/* The file that has a cluster, which the disk wrote itself or took over from a
 * snapshot, where in it, and how many clusters on; false: none, or the base. */
static bool find_file(const struct sm_disk *disk, uint64_t cluster, int *fd, uint64_t *offset,
                      uint64_t *run)
{
    bool present, below = false;

    *run = sm_disk_map_run(&disk->map, cluster, disk->map.clusters - cluster, &present);
    if (!present && disk->lower_fd >= 0)
        *run = sm_disk_map_run(&disk->lower_map, cluster, *run, &below);
    *fd = present ? disk->delta : disk->lower_fd;
    *offset = cluster * SM_DISK_CLUSTER_BYTES + (present ? 0 : disk->lower_offset);
    return present || below;
}

/* Clusters from *at on by a copy within the kernel; *at is then behind them. False,
 * and *at where it was: by hand. */
static bool copy_clusters(const struct sm_disk *disk, uint64_t *at, int to,
                          const struct sm_state_blob *blob, struct sm_state_writer *w,
                          struct range *range)
{
    uint64_t cluster = *at / SM_DISK_CLUSTER_BYTES, offset, run, end;
    off_t hole, from, into = (off_t)(blob->offset + *at);
    int fd;

    if (!find_file(disk, cluster, &fd, &offset, &run))
        return false;
    end = *at + run * SM_DISK_CLUSTER_BYTES;
    hole = lseek(fd, (off_t)offset, SEEK_HOLE);
    if (hole > (off_t)offset && *at + ((uint64_t)hole - offset) < end)
        end = *at + ((uint64_t)hole - offset);
    if (end > disk->size_bytes)
        end = disk->size_bytes;
    from = (off_t)offset;
    while ((uint64_t)from - offset < end - *at) {
        size_t left = (size_t)(end - *at - ((uint64_t)from - offset));
        ssize_t n = copy_file_range(fd, &from, to, &into, left, 0);

        if (n <= 0)
            return false; /* what is there already is what would be written by hand */
    }
    run = (end - *at + SM_DISK_CLUSTER_BYTES - 1) / SM_DISK_CLUSTER_BYTES;
    add_range(w, range, cluster, run);
    *at += run * SM_DISK_CLUSTER_BYTES;
    return true;
}

static int save_data(struct sm_disk *disk, struct sm_state_writer *w,
                     const struct sm_state_blob *blob)
{
    uint8_t buf[CHUNK_BYTES];
    struct range range = { 0 };
    uint64_t at = 0;
    int err = 0;

    while (!err && (at = next_data(disk, at)) < disk->size_bytes) {
        uint64_t left;
        struct iovec v = { .iov_base = buf };

        at -= at % SM_DISK_CLUSTER_BYTES;
        if (copy_clusters(disk, &at, w->blobs->fd, blob, w, &range))
            continue;
        left = disk->size_bytes - at;
        v.iov_len = left < CHUNK_BYTES ? (size_t)left : CHUNK_BYTES;
        /* the last cluster may be short: zeros follow it */
        memset(buf + v.iov_len, 0, sizeof(buf) - v.iov_len);
        err = sm_disk_read(disk, at, &v, 1);
        if (!err)
            err = save_chunk(buf, at, v.iov_len, w->blobs->fd, blob, w, &range);
        at += v.iov_len;
    }
    put_range(w, &range);
    return err;
}

static int save_whole(struct sm_disk *disk, struct sm_state_writer *w)
{
    struct sm_state_blobs *blobs = w->blobs;
    struct sm_state_blob *blob = &blobs->list[blobs->count];
    int err;

    if (blobs->count == SM_STATE_BLOBS)
        return -ENOSPC;
    blob->offset = blobs->end;
    blob->len_bytes = disk->map.clusters * SM_DISK_CLUSTER_BYTES;
    blob->sum = 0; /* whoever writes the file sums it, see core/snap_save.c */
    sm_state_begin(w, "disk", VERSION_WHOLE);
    sm_state_put_u8(w, (uint8_t)disk->mode);
    sm_state_put_u64(w, disk->size_bytes);
    sm_state_put_u32(w, blobs->count);
    err = save_data(disk, w, blob);
    sm_state_end(w);
    blobs->end += blob->len_bytes;
    blobs->count++;
    return err ? err : w->error;
}

int sm_disk_save(struct sm_disk *disk, struct sm_state_writer *w)
{
    uint64_t at = 0;

    if (w->blobs && disk->mode == SM_DISK_DIRECT)
        return -ENOTSUP;
    if (w->blobs && disk->mode == SM_DISK_OVERLAY)
        return save_whole(disk, w);
    sm_state_begin(w, "disk", VERSION_MAP);
    sm_state_put_u8(w, (uint8_t)disk->mode);
    sm_state_put_u64(w, disk->size_bytes);
    while (disk->delta >= 0 && at < disk->map.clusters) {
        bool present;
        uint64_t n = sm_disk_map_run(&disk->map, at, disk->map.clusters - at, &present);

        if (present) {
            sm_state_put_u64(w, at);
            sm_state_put_u64(w, n);
        }
        at += n;
    }
    sm_state_end(w);
    return w->error;
}

/* ---- load ---- */

static int load_ranges(struct sm_disk_map *map, struct sm_state_reader *r)
{
    while (!r->error && sm_state_left(r)) {
        uint64_t at = sm_state_get_u64(r), n = sm_state_get_u64(r);

        if (at >= map->clusters || n > map->clusters - at)
            return -EBADMSG;
        sm_disk_map_set(map, at, n);
    }
    return r->error;
}

static int load_whole(struct sm_disk *disk, struct sm_state_reader *r)
{
    uint32_t number = sm_state_get_u32(r);
    const struct sm_state_blob *blob;
    int err;

    if (r->error || !r->blobs || number >= r->blobs->count || disk->mode != SM_DISK_OVERLAY)
        return -EBADMSG;
    blob = &r->blobs->list[number];
    if (blob->len_bytes != disk->map.clusters * SM_DISK_CLUSTER_BYTES)
        return -EBADMSG;
    sm_disk_drop_lower(disk);
    err = sm_disk_map_init(&disk->lower_map, disk->size_bytes);
    if (err)
        return err;
    disk->lower_map.fd = -1;
    disk->lower_fd = fcntl(r->blobs->fd, F_DUPFD_CLOEXEC, 0);
    if (disk->lower_fd < 0) {
        err = -errno;
        sm_disk_map_free(&disk->lower_map);
        return err;
    }
    disk->lower_offset = blob->offset;
    sm_disk_map_wipe(&disk->map);
    return load_ranges(&disk->lower_map, r);
}

int sm_disk_load(struct sm_disk *disk, struct sm_state_reader *r)
{
    uint32_t version = sm_state_open(r, "disk");
    uint8_t mode = sm_state_get_u8(r);
    int err;

    if (r->error || (version != VERSION_MAP && version != VERSION_WHOLE))
        return -EBADMSG;
    if (sm_state_get_u64(r) != disk->size_bytes || mode != (uint8_t)disk->mode)
        return r->error ? r->error : -ESTALE;
    if (version == VERSION_WHOLE) {
        err = load_whole(disk, r);
    } else if (disk->delta >= 0) {
        sm_disk_map_wipe(&disk->map);
        err = load_ranges(&disk->map, r);
    } else {
        err = sm_state_left(r) ? -EBADMSG : 0;
    }
    sm_state_close(r);
    return err ? err : r->error;
}
