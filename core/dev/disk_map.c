/* SPDX-License-Identifier: Apache-2.0 */
/* The map of a copy-on-write disk and its log; see disk_map.h. */
#include "dev/disk_map.h"

#include "crc32c.h"
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "dev/disk.h"

#define VERSION 1
#define PENDING 16384     /* ranges between two commits */
#define LONG_RECORDS 4096 /* a log shorter than this is not worth rewriting */
#define CHUNK 512         /* records written or read at a time */

static const char magic[8] = { 's', 'm', 'd', 'i', 's', 'k', 'm', '1' };

struct header {
    char magic[8];
    uint32_t version, cluster_bytes;
    uint64_t size_bytes;
    char base_id[SM_DISK_BASE_ID_BYTES];
    uint32_t pad, crc;
};

struct record {
    uint64_t start, count;
    uint32_t batch, crc;
};

_Static_assert(sizeof(struct header) == 160 && sizeof(struct record) == 24, "no padding");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "written as it is");

int sm_disk_map_init(struct sm_disk_map *map, uint64_t size_bytes)
{
    void *p;

    memset(map, 0, sizeof(*map));
    map->fd = -1;
    map->size_bytes = size_bytes;
    map->clusters = (size_bytes + SM_DISK_CLUSTER_BYTES - 1) / SM_DISK_CLUSTER_BYTES;
    map->bits_bytes = (map->clusters + 63) / 64 * 8;
    p = mmap(NULL, map->bits_bytes, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return -ENOMEM;
    map->bits = p;
    return 0;
}

void sm_disk_map_free(struct sm_disk_map *map)
{
    if (map->bits)
        munmap(map->bits, map->bits_bytes);
    if (map->fd >= 0)
        close(map->fd);
    free(map->path);
    free(map->pending);
    memset(map, 0, sizeof(*map));
    map->fd = -1;
}

bool sm_disk_map_has(const struct sm_disk_map *map, uint64_t cluster)
{
    return map->bits[cluster / 64] >> (cluster % 64) & 1;
}

uint64_t sm_disk_map_run(const struct sm_disk_map *map, uint64_t start, uint64_t most,
                         bool *present)
{
    uint64_t end = start + most, at = start;

    *present = sm_disk_map_has(map, start);
    while (at < end) {
        uint64_t word = map->bits[at / 64];
        unsigned left = 64 - at % 64;

        /* ones mark the clusters that differ from the first */
        if (*present)
            word = ~word;
        word >>= at % 64;
        if (word) {
            at += (unsigned)__builtin_ctzll(word);
            break;
        }
        at += left;
    }
    return (at < end ? at : end) - start;
}

static void set_bits(struct sm_disk_map *map, uint64_t start, uint64_t count)
{
    while (count) {
        unsigned shift = start % 64;
        unsigned n = 64 - shift < count ? 64 - shift : (unsigned)count;
        uint64_t mask = n == 64 ? ~0ull : ((1ull << n) - 1) << shift;

        map->bits[start / 64] |= mask;
        start += n;
        count -= n;
    }
}

bool sm_disk_map_room(const struct sm_disk_map *map)
{
    return map->fd < 0 || map->stale || map->pending_count < PENDING;
}

static void note(struct sm_disk_map *map, uint64_t start, uint64_t count)
{
    struct sm_disk_range *last = NULL;

    if (map->fd < 0 || map->stale)
        return;
    if (map->pending_count)
        last = &map->pending[map->pending_count - 1];
    if (last && last->start + last->count == start)
        last->count += count;
    else if (map->pending_count < PENDING)
        map->pending[map->pending_count++] = (struct sm_disk_range){ start, count };
    else
        map->stale = true; /* never lost: the next commit writes it all */
}

void sm_disk_map_set(struct sm_disk_map *map, uint64_t start, uint64_t count)
{
    uint64_t end = start + count;

    /* Only what is new is noted. */
    while (start < end) {
        bool present;
        uint64_t n = sm_disk_map_run(map, start, end - start, &present);

        if (!present) {
            set_bits(map, start, n);
            note(map, start, n);
        }
        start += n;
    }
}

void sm_disk_map_wipe(struct sm_disk_map *map)
{
    madvise(map->bits, map->bits_bytes, MADV_DONTNEED);
    map->pending_count = 0;
    map->stale = true;
}

static void seal(struct record *r, uint64_t start, uint64_t count, uint32_t batch)
{
    *r = (struct record){ .start = start, .count = count, .batch = batch };
    r->crc = sm_crc32c(0, r, sizeof(*r) - sizeof(r->crc));
}

static void seal_header(struct header *h, const struct sm_disk_map *map)
{
    memset(h, 0, sizeof(*h));
    memcpy(h->magic, magic, sizeof(magic));
    h->version = VERSION;
    h->cluster_bytes = SM_DISK_CLUSTER_BYTES;
    h->size_bytes = map->size_bytes;
    memcpy(h->base_id, map->base_id, sizeof(h->base_id));
    h->crc = sm_crc32c(0, h, sizeof(*h) - sizeof(h->crc));
}

/* A buffer of records on its way to a file. */
struct out {
    int fd;
    uint64_t end, records;
    uint32_t batch;
    unsigned count;
    struct record buf[CHUNK];
};

static int out_flush(struct out *o)
{
    size_t len = o->count * sizeof(struct record);
    int err = len ? sm_file_write(o->fd, o->buf, len, o->end) : 0;

    if (!err) {
        o->end += len;
        o->records += o->count;
        o->count = 0;
    }
    return err;
}

static int out_put(struct out *o, uint64_t start, uint64_t count)
{
    seal(&o->buf[o->count++], start, count, o->batch);
    return o->count == CHUNK ? out_flush(o) : 0;
}

/* Every run of set bits, as one batch. */
static int write_whole(struct sm_disk_map *map, struct out *o)
{
    struct header h;
    uint64_t at = 0;
    int err;

    seal_header(&h, map);
    err = sm_file_write(o->fd, &h, sizeof(h), 0);
    o->end = sizeof(h);
    while (!err && at < map->clusters) {
        bool present;
        uint64_t n = sm_disk_map_run(map, at, map->clusters - at, &present);

        if (present)
            err = out_put(o, at, n);
        at += n;
    }
    return err ? err : out_flush(o);
}

static int sync_folder(const char *path)
{
    char *copy = strdup(path);
    char *slash = copy ? strrchr(copy, '/') : NULL;
    int fd, err = 0;

    if (!copy)
        return -ENOMEM;
    if (slash)
        slash[slash == copy] = '\0';
    fd = open(slash ? copy : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || fsync(fd) < 0)
        err = -errno;
    if (fd >= 0)
        close(fd);
    free(copy);
    return err;
}

/* A new log in the place of the old one. */
static int rewrite(struct sm_disk_map *map)
{
    struct out *o = calloc(1, sizeof(*o));
    char *tmp = NULL;
    int err;

    if (!o || asprintf(&tmp, "%s.new", map->path) < 0) {
        free(o);
        return -ENOMEM;
    }
    o->batch = 1;
    o->fd = open(tmp, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    err = o->fd < 0 ? -errno : write_whole(map, o);
    if (!err && (fsync(o->fd) < 0 || rename(tmp, map->path) < 0))
        err = -errno;
    if (err) {
        if (o->fd >= 0) {
            close(o->fd);
            unlink(tmp);
        }
    } else {
        if (map->fd >= 0)
            close(map->fd);
        map->fd = o->fd;
        map->end = o->end;
        map->records = map->rewritten = o->records;
        map->batch = 1;
        map->pending_count = 0;
        map->stale = false;
        err = sync_folder(map->path);
    }
    free(tmp);
    free(o);
    return err;
}

static int append(struct sm_disk_map *map)
{
    struct out *o = calloc(1, sizeof(*o));
    int err = 0;

    if (!o)
        return -ENOMEM;
    o->fd = map->fd;
    o->end = map->end;
    o->batch = map->batch + 1;
    for (unsigned i = 0; !err && i < map->pending_count; i++)
        err = out_put(o, map->pending[i].start, map->pending[i].count);
    if (!err)
        err = out_flush(o);
    if (!err && fdatasync(map->fd) < 0)
        err = -errno;
    if (err) {
        /* Half a batch may be there: begin anew next time. */
        map->stale = true;
    } else {
        map->end = o->end;
        map->records += o->records;
        map->batch++;
        map->pending_count = 0;
    }
    free(o);
    return err;
}

int sm_disk_map_commit(struct sm_disk_map *map)
{
    if (map->fd < 0)
        return 0;
    if (map->stale || map->records > 2 * map->rewritten + LONG_RECORDS)
        return rewrite(map);
    return map->pending_count ? append(map) : 0;
}

static int prepare_log(struct sm_disk_map *map, const char *path, const char *base_id)
{
    size_t len = base_id ? strlen(base_id) : 0;

    if (len >= sizeof(map->base_id))
        return -EINVAL;
    memcpy(map->base_id, base_id ? base_id : "", len + 1);
    map->path = strdup(path);
    map->pending = calloc(PENDING, sizeof(*map->pending));
    return map->path && map->pending ? 0 : -ENOMEM;
}

int sm_disk_map_create_log(struct sm_disk_map *map, const char *path, const char *base_id)
{
    int err = prepare_log(map, path, base_id);

    return err ? err : rewrite(map);
}

static bool record_good(const struct sm_disk_map *map, const struct record *r)
{
    return r->crc == sm_crc32c(0, r, sizeof(*r) - sizeof(r->crc)) && r->count &&
           r->start < map->clusters && r->count <= map->clusters - r->start;
}

/* Take the records in order until one is bad; see whether that may be. */
static int replay(struct sm_disk_map *map)
{
    struct record *buf = malloc(CHUNK * sizeof(*buf));
    uint64_t at = sizeof(struct header);
    struct stat st;
    bool torn = false;
    ssize_t n;
    int err = 0;

    if (!buf)
        return -ENOMEM;
    map->end = at;
    while (!err && (n = pread(map->fd, buf, CHUNK * sizeof(*buf), (off_t)at)) > 0) {
        size_t count = (size_t)n / sizeof(*buf);

        if (!count)
            break; /* part of a record */
        for (size_t i = 0; i < count; i++) {
            struct record *r = &buf[i];

            if (!record_good(map, r)) {
                torn = true;
            } else if (!torn) {
                set_bits(map, r->start, r->count);
                map->batch = r->batch;
                map->records++;
                map->end = at + (i + 1) * sizeof(*r);
            } else if (r->batch > map->batch + 1) {
                err = -EBADMSG;
                break;
            }
        }
        at += count * sizeof(*buf);
    }
    if (!err && n < 0)
        err = -errno;
    /* What a torn batch left could come to life behind the next one. */
    if (!err && (fstat(map->fd, &st) < 0 || (uint64_t)st.st_size != map->end))
        map->stale = true;
    free(buf);
    return err;
}

int sm_disk_map_open_log(struct sm_disk_map *map, const char *path, const char *base_id)
{
    struct header h, want;
    int err = prepare_log(map, path, base_id);

    if (err)
        return err;
    map->fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (map->fd < 0)
        return -errno;
    if (pread(map->fd, &h, sizeof(h), 0) != (ssize_t)sizeof(h) ||
        memcmp(h.magic, magic, sizeof(magic)) || h.version != VERSION ||
        h.crc != sm_crc32c(0, &h, sizeof(h) - sizeof(h.crc)))
        return -EBADMSG;
    seal_header(&want, map);
    if (memcmp(&h, &want, sizeof(h)))
        return -ESTALE;
    return replay(map);
}
