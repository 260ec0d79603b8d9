/* SPDX-License-Identifier: Apache-2.0 */
/* Reading and writing a disk; see disk.h. Opening is in disk_open.c, snapshots
 * are in disk_state.c. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "dev/disk_impl.h"

#define PART_IOV 64 /* iovecs given to one system call */

static const uint8_t zeros[64 * 1024];

/* A position in the caller's iovecs. */
struct cursor {
    const struct iovec *iov;
    unsigned count;
    size_t skip; /* bytes used of the first */
};

/* Up to `most` bytes from the cursor on, as at most PART_IOV iovecs. */
static unsigned cursor_part(const struct cursor *c, uint64_t most, struct iovec *out)
{
    size_t skip = c->skip;
    unsigned n = 0;

    for (unsigned i = 0; i < c->count && n < PART_IOV && most; i++) {
        size_t len = c->iov[i].iov_len - skip;

        if (len > most)
            len = (size_t)most;
        if (len) {
            out[n].iov_base = (uint8_t *)c->iov[i].iov_base + skip;
            out[n++].iov_len = len;
        }
        most -= len;
        skip = 0;
    }
    return n;
}

static void cursor_advance(struct cursor *c, size_t bytes)
{
    while (c->count && bytes >= c->iov->iov_len - c->skip) {
        bytes -= c->iov->iov_len - c->skip;
        c->skip = 0;
        c->iov++;
        c->count--;
    }
    c->skip += bytes;
}

static int ask_fault(const struct sm_disk *disk, enum sm_disk_op op, uint64_t offset,
                     uint64_t len)
{
    return disk->fault ? disk->fault(disk->fault_arg, op, offset, len) : 0;
}

/* len bytes between a file and the cursor. A file that ends early was cut off
 * behind our back: -EIO. */
static int transfer(int fd, uint64_t offset, struct cursor *c, uint64_t len, bool write)
{
    struct iovec part[PART_IOV];

    while (len) {
        unsigned n = cursor_part(c, len, part);
        ssize_t done = write ? pwritev(fd, part, (int)n, (off_t)offset)
                             : preadv(fd, part, (int)n, (off_t)offset);

        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done < 0 ? -errno : -EIO;
        cursor_advance(c, (size_t)done);
        offset += (uint64_t)done;
        len -= (uint64_t)done;
    }
    return 0;
}

static void read_zeros(struct cursor *c, uint64_t len)
{
    struct iovec part[PART_IOV];

    while (len) {
        unsigned n = cursor_part(c, len, part);
        size_t done = 0;

        for (unsigned i = 0; i < n; i++) {
            memset(part[i].iov_base, 0, part[i].iov_len);
            done += part[i].iov_len;
        }
        cursor_advance(c, done);
        len -= done;
    }
}

/* The extent that holds a byte of the disk, or NULL beyond the base. */
const struct sm_disk_part *sm_disk_find_extent(const struct sm_disk *disk, uint64_t at)
{
    unsigned low = 0, high = disk->extent_count;

    while (low < high) {
        unsigned mid = (low + high) / 2;
        const struct sm_disk_part *e = &disk->extents[mid];

        if (at < e->start)
            high = mid;
        else if (at - e->start >= e->len)
            low = mid + 1;
        else
            return e;
    }
    return NULL;
}

/* Read what a snapshot holds; what it does not is zeros. */
static int lower_read(struct sm_disk *disk, uint64_t at, struct cursor *c, uint64_t len)
{
    int err = 0;

    while (!err && len) {
        uint64_t cluster = at / SM_DISK_CLUSTER_BYTES;
        uint64_t last = (at + len - 1) / SM_DISK_CLUSTER_BYTES;
        bool present;
        uint64_t run = sm_disk_map_run(&disk->lower_map, cluster, last - cluster + 1, &present);
        uint64_t n = (cluster + run) * SM_DISK_CLUSTER_BYTES - at;

        if (n > len)
            n = len;
        if (present)
            err = transfer(disk->lower_fd, disk->lower_offset + at, c, n, false);
        else
            read_zeros(c, n);
        at += n;
        len -= n;
    }
    return err;
}

/* Read, or in direct mode write, what lies below the delta. */
static int base_io(struct sm_disk *disk, uint64_t at, struct cursor *c, uint64_t len,
                   bool write)
{
    if (disk->lower_fd >= 0)
        return lower_read(disk, at, c, len);
    while (len) {
        const struct sm_disk_part *e = sm_disk_find_extent(disk, at);
        uint64_t n = e && e->len - (at - e->start) < len ? e->len - (at - e->start) : len;
        int err = 0;

        if (e && e->fd >= 0)
            err = transfer(e->fd, e->offset + (at - e->start), c, n, write);
        else if (write)
            err = -EIO;
        else
            read_zeros(c, n);
        if (err)
            return err;
        at += n;
        len -= n;
    }
    return 0;
}

/* The bytes of the buffers, or -EINVAL when they leave the disk. */
static int64_t checked_len(const struct sm_disk *disk, uint64_t offset,
                           const struct iovec *iov, unsigned count)
{
    uint64_t len = 0;

    if (offset > disk->size_bytes)
        return -EINVAL;
    for (unsigned i = 0; i < count; i++) {
        if (iov[i].iov_len > disk->size_bytes - offset - len)
            return -EINVAL;
        len += iov[i].iov_len;
    }
    return (int64_t)len;
}

int sm_disk_read(struct sm_disk *disk, uint64_t offset, const struct iovec *iov,
                 unsigned count)
{
    int64_t checked = checked_len(disk, offset, iov, count);
    struct cursor c = { .iov = iov, .count = count };
    uint64_t len = (uint64_t)checked;
    int err = checked < 0 ? (int)checked : ask_fault(disk, SM_DISK_OP_READ, offset, len);

    if (disk->delta < 0)
        return err ? err : base_io(disk, offset, &c, len, false);
    while (!err && len) {
        uint64_t cluster = offset / SM_DISK_CLUSTER_BYTES;
        uint64_t last = (offset + len - 1) / SM_DISK_CLUSTER_BYTES;
        bool present;
        uint64_t run = sm_disk_map_run(&disk->map, cluster, last - cluster + 1, &present);
        uint64_t n = (cluster + run) * SM_DISK_CLUSTER_BYTES - offset;

        if (n > len)
            n = len;
        err = present ? transfer(disk->delta, offset, &c, n, false)
                      : base_io(disk, offset, &c, n, false);
        offset += n;
        len -= n;
    }
    return err;
}

/* Bytes of a cluster: the last one of the disk may be short. */
static uint64_t cluster_len(const struct sm_disk *disk, uint64_t cluster)
{
    uint64_t left = disk->size_bytes - cluster * SM_DISK_CLUSTER_BYTES;

    return left < SM_DISK_CLUSTER_BYTES ? left : SM_DISK_CLUSTER_BYTES;
}

/* The base's content of a cluster into the delta, if the delta lacks it and
 * [offset, end) is about to write only a part of it. */
static int copy_up(struct sm_disk *disk, uint64_t cluster, uint64_t offset, uint64_t end)
{
    uint8_t buf[SM_DISK_CLUSTER_BYTES];
    uint64_t at = cluster * SM_DISK_CLUSTER_BYTES;
    uint64_t len = cluster_len(disk, cluster);
    struct iovec v = { buf, len };
    struct cursor c = { .iov = &v, .count = 1 };
    int err;

    if ((offset <= at && end >= at + len) || sm_disk_map_has(&disk->map, cluster))
        return 0;
    err = base_io(disk, at, &c, len, false);
    if (err)
        return err;
    c = (struct cursor){ .iov = &v, .count = 1 };
    return transfer(disk->delta, at, &c, len, true);
}

/* What comes before every change of [offset, offset+len) in the delta. */
static int prepare_delta(struct sm_disk *disk, uint64_t offset, uint64_t len)
{
    uint64_t first = offset / SM_DISK_CLUSTER_BYTES;
    uint64_t last = (offset + len - 1) / SM_DISK_CLUSTER_BYTES;
    int err = 0;

    if (!sm_disk_map_room(&disk->map))
        err = sm_disk_flush(disk);
    if (!err)
        err = copy_up(disk, first, offset, offset + len);
    if (!err && last != first)
        err = copy_up(disk, last, offset, offset + len);
    return err;
}

static void mark_delta(struct sm_disk *disk, uint64_t offset, uint64_t len)
{
    uint64_t first = offset / SM_DISK_CLUSTER_BYTES;
    uint64_t last = (offset + len - 1) / SM_DISK_CLUSTER_BYTES;

    sm_disk_map_set(&disk->map, first, last - first + 1);
}

int sm_disk_write(struct sm_disk *disk, uint64_t offset, const struct iovec *iov,
                  unsigned count)
{
    int64_t checked = checked_len(disk, offset, iov, count);
    struct cursor c = { .iov = iov, .count = count };
    uint64_t len = (uint64_t)checked;
    int err = checked < 0 ? (int)checked : ask_fault(disk, SM_DISK_OP_WRITE, offset, len);

    if (err || !len)
        return err;
    if (disk->mode == SM_DISK_READ_ONLY)
        return -EROFS;
    if (disk->mode == SM_DISK_DIRECT)
        return base_io(disk, offset, &c, len, true);
    err = prepare_delta(disk, offset, len);
    if (!err)
        err = transfer(disk->delta, offset, &c, len, true);
    if (!err)
        mark_delta(disk, offset, len);
    return err;
}

static int write_zeros(int fd, uint64_t offset, uint64_t len)
{
    while (len) {
        size_t n = len < sizeof(zeros) ? (size_t)len : sizeof(zeros);
        ssize_t done = pwrite(fd, zeros, n, (off_t)offset);

        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done < 0 ? -errno : -EIO;
        offset += (uint64_t)done;
        len -= (uint64_t)done;
    }
    return 0;
}

/* Zeros in a file: a hole, zeroed space, or bytes where the file system knows
 * neither. */
static int zero_file(int fd, uint64_t offset, uint64_t len, bool release)
{
    int how = release ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;

    while (fallocate(fd, how | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)len) < 0) {
        if (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL)
            return write_zeros(fd, offset, len);
        if (errno != EINTR)
            return -errno;
    }
    return 0;
}

static int zero_direct(struct sm_disk *disk, uint64_t at, uint64_t len, bool release)
{
    while (len) {
        const struct sm_disk_part *e = sm_disk_find_extent(disk, at);
        uint64_t n, left;
        int err;

        if (!e)
            return -EIO;
        left = e->len - (at - e->start);
        n = left < len ? left : len;
        err = zero_file(e->fd, e->offset + (at - e->start), n, release);
        if (err)
            return err;
        at += n;
        len -= n;
    }
    return 0;
}

int sm_disk_zero(struct sm_disk *disk, uint64_t offset, uint64_t len_bytes, bool release)
{
    int err;

    if (offset > disk->size_bytes || len_bytes > disk->size_bytes - offset)
        return -EINVAL;
    err = ask_fault(disk, SM_DISK_OP_ZERO, offset, len_bytes);
    if (err || !len_bytes)
        return err;
    if (disk->mode == SM_DISK_READ_ONLY)
        return -EROFS;
    if (disk->mode == SM_DISK_DIRECT)
        return zero_direct(disk, offset, len_bytes, release);
    /* The delta is sparse anyway, so space is always released. A cluster the
     * delta lacks is punched too: a crash may have left something there. */
    err = prepare_delta(disk, offset, len_bytes);
    if (!err)
        err = zero_file(disk->delta, offset, len_bytes, true);
    if (!err)
        mark_delta(disk, offset, len_bytes);
    return err;
}

static int sync_file(struct sm_disk *disk, int fd)
{
    if (fdatasync(fd) < 0)
        disk->sync_error = -errno;
    return disk->sync_error;
}

int sm_disk_flush(struct sm_disk *disk)
{
    int err = ask_fault(disk, SM_DISK_OP_FLUSH, 0, 0);

    if (!err)
        err = disk->sync_error;
    if (err || disk->mode == SM_DISK_READ_ONLY || disk->ephemeral)
        return err;
    if (disk->mode == SM_DISK_OVERLAY) {
        err = sync_file(disk, disk->delta);
        return err ? err : sm_disk_map_commit(&disk->map);
    }
    for (unsigned i = 0; !err && i < disk->extent_count; i++)
        err = sync_file(disk, disk->extents[i].fd);
    return err;
}

uint64_t sm_disk_size_bytes(const struct sm_disk *disk)
{
    return disk->size_bytes;
}

bool sm_disk_read_only(const struct sm_disk *disk)
{
    return disk->mode == SM_DISK_READ_ONLY;
}

void sm_disk_set_fault(struct sm_disk *disk, sm_disk_fault_fn *fn, void *arg)
{
    disk->fault = fn;
    disk->fault_arg = arg;
}
