/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Opening and closing a disk; see disk.h. Each step says in err what it was
 * about and returns -errno; what a failed one has made is removed.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "dev/disk_impl.h"

#define SECTOR 512u

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
    struct sm_disk_part *e = &disk->extents[disk->extent_count];
    const char *name = from->path ? from->path : "extent";
    bool write = disk->mode == SM_DISK_DIRECT;
    off_t file_end;

    *e = (struct sm_disk_part){ .fd = -1,
                                .len = from->length_bytes,
                                .offset = from->offset };
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
        struct sm_disk_part *e = &disk->extents[i];
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
    disk->delta = disk->map.fd = disk->lower_fd = -1;
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
    sm_disk_drop_lower(disk);
    sm_disk_map_free(&disk->map);
    if (disk->delta >= 0)
        close(disk->delta); /* last: it is the lock */
    free(disk);
    return err;
}
