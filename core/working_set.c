/* SPDX-License-Identifier: Apache-2.0 */
/* The working set of a snapshot; see working_set.h. */
#include "working_set.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "crc32c.h"
#include "pagemap.h"
#include "snap_base.h"
#include "snap_impl.h"
#include "vm.h"

#define PAGE SM_SNAP_UNIT_BYTES
#define BATCH 4096 /* pages looked up, and 256 read, at once */
#define READ_BATCH 256
/* Pages between two that were touched that are taken along: the kernel maps so many
 * around a fault of a file, and a range costs a mapping. */
#define GAP 16

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

static const char magic[8] = { 'S', 'M', 'W', 'S', 'E', 'T', '\r', '\n' };

struct header {
    char magic[8];
    uint32_t version, range_count;
    uint64_t pages;
    uint8_t id[SM_SNAP_ID_BYTES];
    uint32_t ranges_crc, sum; /* sum: of the pages, as those of an area */
    uint8_t zero[12];
    uint32_t crc; /* of all before it */
};
_Static_assert(sizeof(struct header) == 64, "no padding");

struct sm_working_set {
    int fd;
    struct header header;
    struct sm_working_range *ranges;
};

static uint64_t data_offset(const struct header *h)
{
    uint64_t end = sizeof(*h) + (uint64_t)h->range_count * sizeof(struct sm_working_range);

    return (end + PAGE - 1) / PAGE * PAGE;
}

/* ---- recording ---- */

struct collector {
    struct sm_working_range *out;
    unsigned count, max;
};

static int collect(struct collector *c, uint64_t region, uint64_t gpa)
{
    struct sm_working_range *last = c->count ? &c->out[c->count - 1] : NULL;

    if (last && last->gpa >= region && gpa - (last->gpa + last->len_bytes) < GAP * PAGE) {
        last->len_bytes = gpa + PAGE - last->gpa;
        return 0;
    }
    if (c->count == c->max)
        return -E2BIG;
    c->out[c->count++] = (struct sm_working_range){ gpa, PAGE };
    return 0;
}

static int collect_region(struct sm_vm *vm, const struct sm_mem_region *r, struct collector *c)
{
    uint64_t entries[BATCH];
    int err = 0;

    for (uint64_t at = 0; !err && at < r->len_bytes; at += (uint64_t)BATCH * PAGE) {
        uint64_t left = (r->len_bytes - at) / PAGE;
        unsigned n = left < BATCH ? (unsigned)left : BATCH;

        if (!sm_pagemap_read(vm, r->hva + at, n, entries))
            return -ENOTSUP;
        for (unsigned i = 0; !err && i < n; i++)
            if (entries[i] & (SM_PAGE_PRESENT | SM_PAGE_SWAPPED))
                err = collect(c, r->gpa, r->gpa + at + (uint64_t)i * PAGE);
    }
    return err;
}

int sm_working_set_touched(struct sm_vm *vm, struct sm_working_range *out, unsigned max)
{
    const struct sm_snap_base *base = sm_vm_base(vm);
    const struct sm_mem *mem = sm_vm_mem(vm);
    struct collector c = { .out = out, .max = max };
    int err = base && sm_snap_base_fits(base, mem) ? 0 : -ESRCH;

    for (unsigned i = 0; !err && i < mem->count; i++)
        if (!mem->regions[i].device)
            err = collect_region(vm, &mem->regions[i], &c);
    return err ? err : (int)c.count;
}

/* ---- writing ---- */

/* The area of RAM that a range lies in; -1: none. */
static int area_of(const struct sm_snap *snap, const struct sm_working_range *r)
{
    for (unsigned i = 0; i < snap->area_count; i++) {
        const struct sm_snap_area *a = &snap->areas[i];

        if (a->kind == SM_SNAP_RAM && r->gpa - a->gpa < a->len_bytes &&
            r->len_bytes <= a->len_bytes - (r->gpa - a->gpa))
            return (int)i;
    }
    return -1;
}

/* Whole pages, ascending, so that none is in two. */
static bool in_order(const struct sm_working_range *ranges, unsigned count)
{
    uint64_t end = 0;

    for (unsigned i = 0; i < count; i++) {
        const struct sm_working_range *r = &ranges[i];

        if (!r->len_bytes || (r->gpa | r->len_bytes) % PAGE || r->gpa < end ||
            r->gpa + r->len_bytes < r->gpa)
            return false;
        end = r->gpa + r->len_bytes;
    }
    return true;
}

struct set_writer {
    struct sm_snap *const *links;
    unsigned count;
    int fd;
    uint8_t *buf; /* READ_BATCH pages */
    struct header header;
    uint64_t start; /* of the pages */
};

/* The next n pages of the file. */
static int put_pages(struct set_writer *w, unsigned n)
{
    for (unsigned i = 0; i < n; i++, w->header.pages++) {
        const uint8_t *page = w->buf + (size_t)i * PAGE;
        int err;

        if (sm_snap_is_zero(page))
            continue;
        w->header.sum = sm_sum_add(w->header.sum, w->header.pages, page, PAGE);
        err = sm_file_write(w->fd, page, PAGE, w->start + w->header.pages * PAGE);
        if (err)
            return err;
    }
    return 0;
}

static int put_range(struct set_writer *w, const struct sm_working_range *r)
{
    int area = area_of(w->links[w->count - 1], r), err = area < 0 ? -EINVAL : 0;
    uint64_t page = area < 0 ? 0 : (r->gpa - w->links[0]->areas[area].gpa) / PAGE;

    for (uint64_t left = r->len_bytes / PAGE; !err && left;) {
        unsigned n = left < READ_BATCH ? (unsigned)left : READ_BATCH;

        err = sm_snap_gather(w->links, w->count, (unsigned)area, page, n, w->buf);
        if (!err)
            err = put_pages(w, n);
        page += n;
        left -= n;
    }
    return err;
}

static int put_all(struct set_writer *w, const struct sm_working_range *ranges, unsigned count)
{
    struct header *h = &w->header;
    size_t len = count * sizeof(*ranges);
    int err = 0;

    memcpy(h->magic, magic, sizeof(h->magic));
    memcpy(h->id, w->links[w->count - 1]->info.id, sizeof(h->id));
    h->version = 1;
    h->range_count = count;
    h->ranges_crc = sm_crc32c(0, ranges, len);
    w->start = data_offset(h);
    for (unsigned i = 0; !err && i < count; i++)
        err = put_range(w, &ranges[i]);
    h->crc = sm_crc32c(0, h, offsetof(struct header, crc));
    if (!err && ftruncate(w->fd, (off_t)(w->start + h->pages * PAGE)) < 0)
        err = -errno;
    if (!err)
        err = sm_file_write(w->fd, ranges, len, sizeof(*h));
    return err ? err : sm_file_write(w->fd, h, sizeof(*h), 0);
}

int sm_working_set_write(struct sm_snap *const *links, unsigned count,
                         const struct sm_working_range *ranges, unsigned range_count, int fd)
{
    struct set_writer w = { .links = links, .count = count, .fd = fd };
    int err = sm_snap_check_chain(links[count - 1], links, count - 1, NULL, 0);

    if (!err && (!range_count || range_count > SM_WORKING_SET_RANGES || !in_order(ranges, range_count)))
        err = -EINVAL;
    if (err)
        return err;
    w.buf = malloc((size_t)READ_BATCH * PAGE);
    err = w.buf ? put_all(&w, ranges, range_count) : -ENOMEM;
    free(w.buf);
    return err;
}

/* ---- reading ---- */

static int check(struct sm_working_set *set)
{
    struct header *h = &set->header;
    uint64_t pages = 0;
    struct stat st;
    size_t len;
    int err;

    if (fstat(set->fd, &st) < 0)
        return -errno;
    if (!S_ISREG(st.st_mode) || sm_file_read(set->fd, h, sizeof(*h), 0) ||
        memcmp(h->magic, magic, sizeof(magic)) != 0 ||
        h->crc != sm_crc32c(0, h, offsetof(struct header, crc)) || h->version != 1 ||
        !h->range_count || h->range_count > SM_WORKING_SET_RANGES)
        return -EBADMSG;
    len = h->range_count * sizeof(*set->ranges);
    set->ranges = malloc(len);
    err = set->ranges ? sm_file_read(set->fd, set->ranges, len, sizeof(*h)) : -ENOMEM;
    if (err)
        return err == -EIO ? -EBADMSG : err;
    if (h->ranges_crc != sm_crc32c(0, set->ranges, len) || !in_order(set->ranges, h->range_count))
        return -EBADMSG;
    for (unsigned i = 0; i < h->range_count; i++)
        pages += set->ranges[i].len_bytes / PAGE;
    /* A page beyond the end of its file kills who reads it. */
    if (pages != h->pages || pages > (uint64_t)st.st_size / PAGE ||
        (uint64_t)st.st_size != data_offset(h) + pages * PAGE)
        return -EBADMSG;
    return 0;
}

int sm_working_set_open(int fd, struct sm_working_set **out)
{
    struct sm_working_set *set = calloc(1, sizeof(*set));
    int err;

    if (!set) {
        close(fd);
        return -ENOMEM;
    }
    set->fd = fd;
    err = check(set);
    if (err) {
        sm_working_set_close(set);
        return err;
    }
    *out = set;
    return 0;
}

void sm_working_set_close(struct sm_working_set *set)
{
    if (!set)
        return;
    close(set->fd);
    free(set->ranges);
    free(set);
}

int sm_working_set_verify(struct sm_working_set *set)
{
    struct sm_snap_area all = { .len_bytes = set->header.pages * PAGE,
                                .offset = data_offset(&set->header) };
    uint8_t *buf = malloc(SM_SNAP_CHUNK_BYTES);
    uint32_t sum;
    int err = buf ? sm_snap_sum(set->fd, &all, buf, &sum, NULL) : -ENOMEM;

    free(buf);
    if (err)
        return err;
    return sum == set->header.sum ? 0 : -EBADMSG;
}

void sm_working_set_prefetch(const struct sm_working_set *set)
{
#ifdef POSIX_FADV_WILLNEED
    posix_fadvise(set->fd, (off_t)data_offset(&set->header),
                  (off_t)(set->header.pages * PAGE), POSIX_FADV_WILLNEED);
#endif
}

/* The region that a range lies in, its memory ours alone; NULL: none. */
static const struct sm_mem_region *region_of(const struct sm_mem *mem,
                                             const struct sm_working_range *range)
{
    for (unsigned i = 0; i < mem->count; i++) {
        const struct sm_mem_region *r = &mem->regions[i];

        if (!r->device && range->gpa - r->gpa < r->len_bytes &&
            range->len_bytes <= r->len_bytes - (range->gpa - r->gpa))
            return r;
    }
    return NULL;
}

uint64_t sm_working_set_lay(const struct sm_working_set *set, struct sm_vm *vm,
                            struct sm_snap_base *base)
{
    struct sm_mem *mem = sm_vm_mem(vm);
    uint64_t at = data_offset(&set->header), laid = 0;

    if (memcmp(set->header.id, sm_snap_base_id(base), SM_SNAP_ID_BYTES) != 0)
        return 0;
    for (unsigned i = 0; i < set->header.range_count; i++) {
        const struct sm_working_range *range = &set->ranges[i];
        const struct sm_mem_region *r = region_of(mem, range);

        if (r && sm_snap_base_view(base, mem, r, range->gpa - r->gpa, range->len_bytes, set->fd, at)) {
            madvise(r->hva + (range->gpa - r->gpa), range->len_bytes, MADV_POPULATE_READ);
            laid += range->len_bytes;
        }
        at += range->len_bytes;
    }
    return laid;
}
