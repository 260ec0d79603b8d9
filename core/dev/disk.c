/* SPDX-License-Identifier: Apache-2.0 */
/* Extents, overlay and direct writes; see disk.h. */
#include "dev/disk.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "dev/disk_map.h"
#include "state.h"

#define SECTOR 512u
#define PART_IOV 64 /* iovecs given to one system call */

static const uint8_t zeros[64 * 1024];

struct extent {
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
    struct extent *extents; /* in order, without gaps, from 0 */
    int delta;              /* -1: no overlay */
    struct sm_disk_map map;
    int sync_error; /* the kernel tells a failed sync once; we keep telling */
    sm_disk_fault_fn *fault;
    void *fault_arg;
};

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
static const struct extent *find_extent(const struct sm_disk *disk, uint64_t at)
{
    unsigned low = 0, high = disk->extent_count;

    while (low < high) {
        unsigned mid = (low + high) / 2;
        const struct extent *e = &disk->extents[mid];

        if (at < e->start)
            high = mid;
        else if (at - e->start >= e->len)
            low = mid + 1;
        else
            return e;
    }
    return NULL;
}

/* Read, or in direct mode write, the base. */
static int base_io(struct sm_disk *disk, uint64_t at, struct cursor *c, uint64_t len,
                   bool write)
{
    while (len) {
        const struct extent *e = find_extent(disk, at);
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
        const struct extent *e = find_extent(disk, at);
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

/* Opening. Each step says in err what it was about and returns -errno. */

static int fail(char *err, size_t errlen, int code, const char *fmt, ...)
{
    va_list ap;
    int n;

    if (err && errlen) {
        va_start(ap, fmt);
        n = vsnprintf(err, errlen, fmt, ap);
        va_end(ap);
        if (n >= 0 && (size_t)n < errlen && code)
            snprintf(err + n, errlen - (size_t)n, ": %s", strerror(-code));
    }
    return code;
}

static int open_extent(struct sm_disk *disk, const struct sm_disk_extent *from, char *err,
                       size_t errlen)
{
    struct extent *e = &disk->extents[disk->extent_count];
    const char *name = from->path ? from->path : "extent";
    bool write = disk->mode == SM_DISK_DIRECT;
    off_t file_end;

    *e = (struct extent){ .fd = -1, .len = from->length_bytes, .offset = from->offset };
    if (from->path)
        e->fd = open(from->path, (write ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    else if (from->fd >= 0)
        e->fd = fcntl(from->fd, F_DUPFD_CLOEXEC, 0);
    if (e->fd < 0 && (from->path || from->fd >= 0))
        return fail(err, errlen, -errno, "%s", name);
    disk->extent_count++; /* from here on sm_disk_close closes it */
    if (e->fd < 0)
        return e->len && !write ? 0 : fail(err, errlen, -EINVAL, "%s of zeros", name);

    /* lseek, for it knows block devices too */
    file_end = lseek(e->fd, 0, SEEK_END);
    if (file_end < 0)
        return fail(err, errlen, -errno, "%s", name);
    if (e->offset > (uint64_t)file_end || e->len > (uint64_t)file_end - e->offset)
        return fail(err, errlen, -ERANGE, "%s is shorter than its extent", name);
    if (!e->len)
        e->len = (uint64_t)file_end - e->offset;
    if (!e->len)
        return fail(err, errlen, -EINVAL, "%s is empty", name);
    if (write && flock(e->fd, LOCK_EX | LOCK_NB) < 0)
        return fail(err, errlen, errno == EWOULDBLOCK ? -EBUSY : -errno, "%s", name);
    return 0;
}

static int open_base(struct sm_disk *disk, const struct sm_disk_config *cfg, char *err,
                     size_t errlen)
{
    uint64_t base = 0;

    if (cfg->extent_count > SM_DISK_MAX_EXTENTS)
        return fail(err, errlen, -EINVAL, "%u extents", cfg->extent_count);
    disk->extents = calloc(cfg->extent_count + 1, sizeof(*disk->extents));
    if (!disk->extents)
        return fail(err, errlen, -ENOMEM, "disk");
    for (unsigned i = 0; i < cfg->extent_count; i++) {
        struct extent *e = &disk->extents[i];
        int r = open_extent(disk, &cfg->extents[i], err, errlen);

        if (r)
            return r;
        if (e->len > SM_DISK_MAX_BYTES - base || e->offset > INT64_MAX - e->len)
            return fail(err, errlen, -EFBIG, "disk of more than 64 TiB");
        e->start = base;
        base += e->len;
    }
    disk->size_bytes = cfg->size_bytes;
    if (!disk->size_bytes)
        disk->size_bytes = (base + SECTOR - 1) / SECTOR * SECTOR;
    if (!disk->size_bytes || disk->size_bytes % SECTOR ||
        disk->size_bytes > SM_DISK_MAX_BYTES)
        return fail(err, errlen, -EINVAL, "disk of %llu bytes",
                    (unsigned long long)disk->size_bytes);
    if (disk->mode == SM_DISK_DIRECT && disk->size_bytes != base)
        return fail(err, errlen, -EINVAL, "writable disk of %llu bytes on %llu",
                    (unsigned long long)disk->size_bytes, (unsigned long long)base);
    return 0;
}

/* The map of a named overlay: read, or begun when the delta is new. It is made
 * before the delta gets its size, so a delta with content always has one. */
static int open_map(struct sm_disk *disk, const struct sm_disk_config *cfg, bool fresh,
                    char *err, size_t errlen)
{
    char *path;
    int r;

    if (asprintf(&path, "%s.map", cfg->overlay) < 0)
        return fail(err, errlen, -ENOMEM, "disk");
    r = fresh ? sm_disk_map_create_log(&disk->map, path, cfg->base_id)
              : sm_disk_map_open_log(&disk->map, path, cfg->base_id);
    if (r == -ESTALE)
        fail(err, errlen, 0, "%s was made for another base or size", cfg->overlay);
    else if (r == -EBADMSG)
        fail(err, errlen, 0, "%s is damaged", path);
    else if (r)
        fail(err, errlen, r, "%s", path);
    free(path);
    return r;
}

static int open_overlay(struct sm_disk *disk, const struct sm_disk_config *cfg, char *err,
                        size_t errlen)
{
    const char *name = cfg->overlay;
    struct stat st;
    bool fresh;
    int r;

    if (!name)
        return fail(err, errlen, -EINVAL, "overlay without a path");
    disk->delta = open(name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (disk->delta < 0)
        return fail(err, errlen, -errno, "%s", name);
    if (flock(disk->delta, LOCK_EX | LOCK_NB) < 0)
        return fail(err, errlen, errno == EWOULDBLOCK ? -EBUSY : -errno, "%s", name);
    if (fstat(disk->delta, &st) < 0)
        return fail(err, errlen, -errno, "%s", name);
    if (!S_ISREG(st.st_mode))
        return fail(err, errlen, -EINVAL, "%s is not a file", name);
    r = sm_disk_map_init(&disk->map, disk->size_bytes);
    if (r)
        return fail(err, errlen, r, "disk");
    fresh = st.st_size == 0;
    if (!fresh && disk->ephemeral)
        return fail(err, errlen, -EEXIST, "%s", name);
    if (!disk->ephemeral)
        r = open_map(disk, cfg, fresh, err, errlen);
    if (!r && ftruncate(disk->delta, (off_t)disk->size_bytes) < 0)
        r = fail(err, errlen, -errno, "%s", name);
    if (fresh && (r || disk->ephemeral))
        unlink(name);
    if (fresh && r && disk->map.path)
        unlink(disk->map.path);
    return r;
}

int sm_disk_open(const struct sm_disk_config *cfg, struct sm_disk **out, char *err,
                 size_t errlen)
{
    struct sm_disk *disk = calloc(1, sizeof(*disk));
    int r;

    if (!disk)
        return fail(err, errlen, -ENOMEM, "disk");
    disk->mode = cfg->mode;
    disk->ephemeral = cfg->mode == SM_DISK_OVERLAY && cfg->ephemeral;
    disk->delta = disk->map.fd = -1;
    r = open_base(disk, cfg, err, errlen);
    if (!r && disk->mode == SM_DISK_OVERLAY)
        r = open_overlay(disk, cfg, err, errlen);
    if (r) {
        disk->mode = SM_DISK_READ_ONLY; /* nothing to flush */
        sm_disk_close(disk);
        return r;
    }
    *out = disk;
    return 0;
}

int sm_disk_close(struct sm_disk *disk)
{
    int err;

    if (!disk)
        return 0;
    err = sm_disk_flush(disk);
    for (unsigned i = 0; i < disk->extent_count; i++)
        if (disk->extents[i].fd >= 0)
            close(disk->extents[i].fd);
    free(disk->extents);
    sm_disk_map_free(&disk->map);
    if (disk->delta >= 0)
        close(disk->delta); /* last: it is the lock */
    free(disk);
    return err;
}

void sm_disk_save(struct sm_disk *disk, struct sm_state_writer *w)
{
    uint64_t at = 0;

    sm_state_begin(w, "disk", 1);
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
}

int sm_disk_load(struct sm_disk *disk, struct sm_state_reader *r)
{
    if (sm_state_open(r, "disk") != 1)
        return -EBADMSG;
    if (sm_state_get_u8(r) != (uint8_t)disk->mode ||
        sm_state_get_u64(r) != disk->size_bytes)
        return r->error ? r->error : -ESTALE;
    if (disk->delta >= 0)
        sm_disk_map_wipe(&disk->map);
    while (!r->error && sm_state_left(r)) {
        uint64_t at = sm_state_get_u64(r), n = sm_state_get_u64(r);

        if (disk->delta < 0 || at >= disk->map.clusters || n > disk->map.clusters - at)
            return -EBADMSG;
        sm_disk_map_set(&disk->map, at, n);
    }
    sm_state_close(r);
    return r->error;
}
