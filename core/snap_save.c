/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Writing snapshots; see snap.h.
 *
 * Which pages of RAM may hold something is asked of the kernel, so that
 * memory nobody touched is neither read nor made resident: /proc/self/pagemap
 * knows what this process touched (present or swapped out), and where a region
 * lies over a file, as after a lazy restore, the file's own extents count too
 * and the pages that came out of diffs (snap_base.h); without those a second
 * snapshot would lose what was never faulted in. Every candidate is looked at,
 * and zero pages become holes. A diff takes the private pages alone, also those
 * that are zero now.
 *
 * The file holds a page already, when it was copied while the VM ran: then only
 * what was written since is looked at, and written if it is not the same.
 */
#include "snap_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "crc32c.h"
#include "pagemap.h"
#include "snap_base.h"
#include "vm.h"

#define PAGE SM_SNAP_UNIT_BYTES
#define BATCH 4096      /* pages looked up at once */
#define RUN_BYTES (1u << 20) /* written at once */

/* One region on its way into the file. */
struct region {
    const struct sm_mem_region *mem; /* good for the call at hand, see look_again */
    struct sm_snap_area *area;
    uint8_t *bits;   /* of a diff: which pages are in it */
    uint8_t *copied; /* live: bits of the pages that were looked at while the VM ran */
    const uint8_t *file; /* live: what the file holds of it */
    uint64_t next;   /* live: where the copying goes on */
};

/* Some pages of a region, in a row. */
struct batch {
    uint64_t at; /* in the region */
    unsigned pages;
    bool known; /* entries are the kernel's words on them */
    uint64_t entries[BATCH];
    bool wanted[BATCH];
};

struct sm_snap_writer {
    struct sm_vm *vm;
    int fd;
    struct sm_snap_how how;
    bool tells_writes; /* SM_PAGE_SOFT_DIRTY can be believed */
    bool captured;
    const struct sm_snap_base *base; /* what the memory lies over, or NULL */
    struct sm_snap_header header;
    struct sm_snap_area areas[SM_SNAP_AREAS];
    unsigned area_count;
    struct region regions[SM_MEM_MAX_REGIONS];
    unsigned region_count;
    uint8_t *pages; /* of a diff: the bits of all regions */
    size_t pages_len;
    struct sm_state_writer state;
    struct sm_state_blobs blobs;
    struct batch batch; /* the one at hand */
};

static uint64_t align_up(uint64_t n, uint64_t to)
{
    return (n + to - 1) / to * to;
}

/* ---- which pages ---- */

/* Those that the file behind a region has data for. */
static void mark_file(const struct sm_mem_region *r, struct batch *b)
{
    uint64_t from = r->offset + b->at, end = from + (uint64_t)b->pages * PAGE;

    while (from < end) {
        off_t data = lseek(r->fd, (off_t)from, SEEK_DATA), hole;
        uint64_t stop;

        if (data < 0 && errno == ENXIO)
            return;
        if (data < 0)
            data = (off_t)from; /* cannot tell: all of it */
        if ((uint64_t)data >= end)
            return;
        hole = lseek(r->fd, data, SEEK_HOLE);
        stop = hole < 0 || (uint64_t)hole > end ? end : (uint64_t)hole;
        for (uint64_t p = (uint64_t)data / PAGE; p * PAGE < stop; p++)
            b->wanted[p - (r->offset + b->at) / PAGE] = true;
        from = stop > (uint64_t)data ? stop : end;
    }
}

/* And those that diffs brought. */
static void mark_diffs(const struct sm_snap_writer *w, const struct sm_mem_region *r,
                       struct batch *b)
{
    const uint8_t *bits = w->base ? sm_snap_base_bits(w->base, r->gpa) : NULL;

    for (unsigned i = 0; bits && i < b->pages; i++)
        b->wanted[i] |= sm_snap_bit(bits, b->at / PAGE + i);
}

/* The pages of a batch that may have to be stored. */
static int mark(const struct sm_snap_writer *w, const struct region *r, struct batch *b)
{
    b->known = sm_pagemap_read(w->vm, r->mem->hva + b->at, b->pages, b->entries);
    if (w->how.diff && !b->known)
        return -ENOTSUP;
    for (unsigned i = 0; i < b->pages; i++) {
        bool there = !b->known || b->entries[i] & (SM_PAGE_PRESENT | SM_PAGE_SWAPPED);

        b->wanted[i] = w->how.diff ? there && !(b->entries[i] & SM_PAGE_OF_FILE)
                                   : there || r->mem->kind == SM_MEM_FOREIGN;
    }
    if (w->how.diff)
        return 0;
    if (r->mem->fd >= 0)
        mark_file(r->mem, b);
    mark_diffs(w, r->mem, b);
    return 0;
}

/* Of those, the ones that the file has as they are now need not be looked at. */
static void leave_out_copied(const struct sm_snap_writer *w, const struct region *r,
                             struct batch *b)
{
    for (unsigned i = 0; w->tells_writes && b->known && i < b->pages; i++)
        if (sm_snap_bit(r->copied, b->at / PAGE + i) && !(b->entries[i] & SM_PAGE_SOFT_DIRTY))
            b->wanted[i] = false;
}

/* ---- writing them ---- */

static void set_bits(uint8_t *bits, const struct batch *b)
{
    uint64_t first = b->at / PAGE;

    for (unsigned i = 0; bits && i < b->pages; i++)
        if (b->wanted[i])
            bits[(first + i) / 8] |= (uint8_t)(1u << ((first + i) % 8));
}

/* Whether a page has to be written: a hole in the file is a page of zeros. */
static bool differs(const struct region *r, uint64_t page)
{
    const uint8_t *now = r->mem->hva + page * PAGE;

    if (r->copied && sm_snap_bit(r->copied, page))
        return memcmp(now, r->file + page * PAGE, PAGE) != 0;
    return !sm_snap_is_zero(now);
}

static int write_batch(const struct sm_snap_writer *w, const struct region *r,
                       const struct batch *b)
{
    unsigned run = 0;

    for (unsigned i = 0; i <= b->pages; i++) {
        bool keep = i < b->pages && b->wanted[i] && differs(r, b->at / PAGE + i);

        run += keep;
        if (run && (!keep || run * PAGE == RUN_BYTES)) {
            unsigned first = i + (keep ? 1 : 0) - run;
            uint64_t from = b->at + (uint64_t)first * PAGE;
            int err = sm_file_write(w->fd, r->mem->hva + from, (size_t)run * PAGE,
                                    r->area->offset + from);

            if (err)
                return err;
            run = 0;
        }
    }
    return 0;
}

static int save_batch(const struct sm_snap_writer *w, struct region *r, struct batch *b,
                      bool running)
{
    int err = mark(w, r, b);

    if (err)
        return err;
    set_bits(r->bits, b);
    if (!running && r->copied)
        leave_out_copied(w, r, b);
    err = write_batch(w, r, b);
    if (!err && running)
        set_bits(r->copied, b);
    return err;
}

/* From *at on, until max_bytes were looked at. */
static int save_region(struct sm_snap_writer *w, struct region *r, uint64_t *at,
                       uint64_t max_bytes, bool running)
{
    uint64_t end = r->mem->len_bytes, until = max_bytes < end - *at ? *at + max_bytes : end;

    while (*at < until) {
        uint64_t left = (end - *at) / PAGE;
        int err;

        w->batch.at = *at;
        w->batch.pages = left < BATCH ? (unsigned)left : BATCH;
        err = save_batch(w, r, &w->batch, running);
        if (err)
            return err;
        *at += (uint64_t)w->batch.pages * PAGE;
    }
    return 0;
}

/* ---- begin ---- */

static int begin_header(struct sm_snap_writer *w)
{
    struct sm_snap_header *h = &w->header;
    struct timespec now;

    memcpy(h->magic, sm_snap_magic, sizeof(h->magic));
    h->version = w->how.diff ? 2 : 1;
    h->header_bytes = SM_SNAP_HEADER_BYTES;
    h->page_bytes = (uint32_t)sysconf(_SC_PAGESIZE);
    h->cpus = sm_vm_cpus(w->vm);
    clock_gettime(CLOCK_REALTIME, &now);
    h->created_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    memcpy(h->arch, SM_SNAP_ARCH, sizeof(SM_SNAP_ARCH));
    if (w->how.diff)
        memcpy(h->parent, sm_snap_base_id(w->base), sizeof(h->parent));
    if (getrandom(h->id, sizeof(h->id), 0) != sizeof(h->id))
        return -EIO;
    return sm_hv_fingerprint(sm_vm_hv(w->vm), h->fingerprint, sizeof(h->fingerprint));
}

static int begin_live(struct sm_snap_writer *w, struct region *r)
{
    void *file = mmap(NULL, r->mem->len_bytes, PROT_READ, MAP_SHARED, w->fd, (off_t)r->area->offset);

    if (file == MAP_FAILED)
        return -errno;
    r->file = file;
    r->copied = calloc(1, (size_t)sm_snap_bits_bytes(r->mem->len_bytes));
    return r->copied ? 0 : -ENOMEM;
}

/* Where every region goes. */
static int lay_out(struct sm_snap_writer *w)
{
    const struct sm_mem *mem = sm_vm_mem(w->vm);
    uint64_t at = SM_SNAP_ALIGN;
    size_t bits = 0;
    int err = 0;

    for (unsigned i = 0; i < mem->count; i++) {
        const struct sm_mem_region *r = &mem->regions[i];

        if (r->device) /* a device's window comes back with the device */
            continue;
        w->areas[w->area_count] = (struct sm_snap_area){ .kind = SM_SNAP_RAM,
                                                         .prot = r->prot,
                                                         .gpa = r->gpa,
                                                         .len_bytes = r->len_bytes,
                                                         .offset = at };
        w->regions[w->region_count++] =
            (struct region){ .mem = r, .area = &w->areas[w->area_count++] };
        w->header.ram_bytes += r->len_bytes;
        w->pages_len += w->how.diff ? sm_snap_bits_bytes(r->len_bytes) : 0;
        at = align_up(at + r->len_bytes, SM_SNAP_ALIGN);
    }
    w->blobs = (struct sm_state_blobs){ .fd = w->fd, .end = at };
    w->pages = w->how.diff ? calloc(1, w->pages_len + 1) : NULL;
    if (w->how.diff && !w->pages)
        return -ENOMEM;
    /* So that what is laid over the file never reaches beyond its end. */
    if (ftruncate(w->fd, (off_t)at) < 0)
        return -errno;
    for (unsigned i = 0; !err && i < w->region_count; i++) {
        struct region *r = &w->regions[i];

        r->bits = w->how.diff ? w->pages + bits : NULL;
        bits += sm_snap_bits_bytes(r->mem->len_bytes);
        if (w->how.live)
            err = begin_live(w, r);
    }
    return err;
}

static int begin(struct sm_snap_writer *w, char *err, size_t errlen)
{
    struct stat st;
    int e;

    if (fstat(w->fd, &st) < 0)
        return sm_snap_say(err, errlen, -errno, "%s", strerror(errno));
    /* Writing over the file this very VM runs from would spoil both. */
    if (!S_ISREG(st.st_mode) || st.st_size != 0)
        return sm_snap_say(err, errlen, -EEXIST, "it is not an empty file");
    w->base = sm_vm_base(w->vm);
    if (w->how.diff && (!w->base || !sm_snap_base_fits(w->base, sm_vm_mem(w->vm))))
        return sm_snap_say(err, errlen, -ESRCH, "its memory lies over no snapshot");
    e = begin_header(w);
    if (!e)
        e = lay_out(w);
    if (e)
        return sm_snap_say(err, errlen, e, "%s", strerror(-e));
    if (w->how.live)
        w->tells_writes = sm_pagemap_tell_writes(w->vm);
    return 0;
}

int sm_snap_begin(struct sm_vm *vm, int fd, const struct sm_snap_how *how,
                  struct sm_snap_writer **out, char *err, size_t errlen)
{
    struct sm_snap_writer *w = calloc(1, sizeof(*w));
    int e;

    if (!w) {
        close(fd);
        return sm_snap_say(err, errlen, -ENOMEM, "out of memory");
    }
    w->vm = vm;
    w->fd = fd;
    w->how = *how;
    sm_state_writer_init(&w->state);
    e = begin(w, err, errlen);
    if (e)
        sm_snap_writer_close(w);
    else
        *out = w;
    return e;
}

void sm_snap_writer_close(struct sm_snap_writer *w)
{
    if (!w)
        return;
    for (unsigned i = 0; i < w->region_count; i++) {
        struct region *r = &w->regions[i];

        if (r->file)
            munmap((void *)r->file, r->area->len_bytes);
        free(r->copied);
    }
    sm_state_writer_free(&w->state);
    free(w->pages);
    close(w->fd);
    free(w);
}

/* ---- copy ---- */

/*
 * Between two calls the VM's owner may have added regions, or saved and rebased it
 * otherwise: then what the memory lies over is another file, which is fine for all but
 * a diff.
 */
static int look_again(struct sm_snap_writer *w, char *err, size_t errlen)
{
    const struct sm_mem *mem = sm_vm_mem(w->vm);
    unsigned count = 0;

    w->base = sm_vm_base(w->vm);
    if (w->how.diff && (!w->base || memcmp(sm_snap_base_id(w->base), w->header.parent,
                                           SM_SNAP_ID_BYTES) != 0))
        return sm_snap_say(err, errlen, -ESTALE, "its parent has changed meanwhile");
    for (unsigned i = 0; i < mem->count; i++)
        count += !mem->regions[i].device;
    for (unsigned i = 0; i < w->region_count; i++) {
        struct region *r = &w->regions[i];

        r->mem = sm_mem_region_at(mem, r->area->gpa);
        if (!r->mem || r->mem->len_bytes != r->area->len_bytes)
            count = UINT32_MAX;
    }
    if (count != w->region_count)
        return sm_snap_say(err, errlen, -ESTALE, "the memory map has changed meanwhile");
    return 0;
}

int sm_snap_copy(struct sm_snap_writer *w, uint64_t max_bytes, uint64_t *left, char *err,
                 size_t errlen)
{
    int e;

    *left = 0;
    if (!w->how.live || w->captured)
        return sm_snap_say(err, errlen, -EINVAL, "it is not being copied live");
    e = look_again(w, err, errlen);
    if (e)
        return e;
    for (unsigned i = 0; i < w->region_count; i++) {
        struct region *r = &w->regions[i];
        uint64_t before = r->next;

        e = save_region(w, r, &r->next, max_bytes, true);
        if (e)
            return sm_snap_say(err, errlen, e, "its memory: %s", strerror(-e));
        max_bytes -= r->next - before < max_bytes ? r->next - before : max_bytes;
        *left += r->mem->len_bytes - r->next;
    }
    return 0;
}

/* ---- capture ---- */

/* The memory holds what the file does, so where this fails nothing is lost: those
 * pages stay private. */
static void lay_over(struct sm_snap_writer *w)
{
    struct sm_mem *mem = sm_vm_mem(w->vm);
    struct sm_snap_base *base =
        w->how.diff ? sm_vm_base(w->vm) : sm_snap_base_new(w->header.id);
    int e = base ? 0 : -ENOMEM;

    for (unsigned i = 0; !e && i < w->region_count; i++) {
        const struct region *r = &w->regions[i];

        if (w->how.diff) {
            e = sm_snap_base_lay(base, mem, r->area, r->bits, w->fd, false);
        } else {
            e = sm_snap_base_add(base, r->area->gpa, r->area->len_bytes);
            if (!e)
                e = sm_mem_overlay(mem, r->mem, 0, r->area->len_bytes, w->fd, r->area->offset);
        }
    }
    if (e) { /* some of it is over a file, and a diff could not tell which */
        if (!w->how.diff)
            sm_snap_base_free(base);
        sm_vm_set_base(w->vm, NULL);
        return;
    }
    sm_snap_base_set_id(base, w->header.id);
    sm_vm_set_base(w->vm, base);
}

static int capture_ram(struct sm_snap_writer *w)
{
    int err = 0;

    sm_vm_lift_breakpoints(w->vm, true);
    for (unsigned i = 0; !err && i < w->region_count; i++) {
        uint64_t at = 0;

        err = save_region(w, &w->regions[i], &at, UINT64_MAX, false);
    }
    sm_vm_lift_breakpoints(w->vm, false);
    return err;
}

int sm_snap_capture(struct sm_snap_writer *w, char *err, size_t errlen)
{
    struct sm_vm_status status;
    int e;

    sm_vm_state(w->vm, &status);
    if (status.state != SM_VM_PAUSED)
        return sm_snap_say(err, errlen, -EINVAL, "the VM is not paused");
    if (w->captured)
        return sm_snap_say(err, errlen, -EALREADY, "it is captured");
    e = look_again(w, err, errlen);
    if (e)
        return e;
    e = capture_ram(w);
    if (e)
        return sm_snap_say(err, errlen, e, "its memory: %s", strerror(-e));
    w->state.blobs = &w->blobs;
    e = sm_vm_save(w->vm, &w->state, err, errlen);
    if (e)
        return e;
    w->captured = true;
    if (w->how.rebase)
        lay_over(w);
    return 0;
}

/* ---- finish ---- */

static int write_section(struct sm_snap_writer *w, struct sm_snap_section *section, const void *p,
                         size_t len, uint64_t *end)
{
    *section = (struct sm_snap_section){ .offset = *end,
                                         .len_bytes = len,
                                         .crc = sm_crc32c(0, p, len) };
    *end += len;
    return sm_file_write(w->fd, p, len, section->offset);
}

static int write_tail(struct sm_snap_writer *w, const void *meta, size_t meta_len)
{
    struct sm_snap_header *h = &w->header;
    uint64_t end = w->blobs.end;
    int err = write_section(w, &h->state, w->state.buf, w->state.len, &end);

    if (!err)
        err = write_section(w, &h->meta, meta ? meta : "", meta_len, &end);
    if (!err)
        err = write_section(w, &h->index, w->areas, w->area_count * sizeof(w->areas[0]), &end);
    if (!err && w->how.diff)
        err = write_section(w, &h->pages, w->pages, w->pages_len, &end);
    h->file_bytes = end;
    h->crc = sm_crc32c(0, h, offsetof(struct sm_snap_header, crc));
    return err ? err : sm_file_write(w->fd, h, sizeof(*h), 0);
}

/* Of memory and disks, as the file has them: there is time for it now. */
static int sum_areas(struct sm_snap_writer *w)
{
    uint8_t *buf = malloc(SM_SNAP_CHUNK_BYTES);
    int err = buf ? 0 : -ENOMEM;

    for (unsigned i = 0; i < w->blobs.count; i++)
        w->areas[w->area_count++] = (struct sm_snap_area){ .kind = SM_SNAP_BLOB,
                                                           .len_bytes = w->blobs.list[i].len_bytes,
                                                           .offset = w->blobs.list[i].offset };
    for (unsigned i = 0; !err && i < w->area_count; i++)
        err = sm_snap_sum(w->fd, &w->areas[i], buf, &w->areas[i].sum, NULL);
    free(buf);
    return err;
}

int sm_snap_finish(struct sm_snap_writer *w, const void *meta, size_t meta_len, bool sync,
                   struct sm_snap_info *out, uint64_t *stored_bytes, char *err, size_t errlen)
{
    const struct sm_snap_header *h = &w->header;
    struct stat st;
    int e;

    if (meta_len > SM_SNAP_META_MAX)
        return sm_snap_say(err, errlen, -EMSGSIZE, "a description of more than 1 MiB");
    if (!w->captured)
        return sm_snap_say(err, errlen, -EINVAL, "there is nothing captured");
    /* A disk may end in a hole. */
    e = ftruncate(w->fd, (off_t)w->blobs.end) < 0 ? -errno : sum_areas(w);
    if (!e)
        e = write_tail(w, meta, meta_len);
    if (!e && sync && fsync(w->fd) < 0)
        e = -errno;
    if (!e && fstat(w->fd, &st) < 0)
        e = -errno;
    if (e)
        return sm_snap_say(err, errlen, e, "%s", strerror(-e));
    *stored_bytes = (uint64_t)st.st_blocks * 512;
    *out = (struct sm_snap_info){ .version = h->version,
                                  .cpus = h->cpus,
                                  .page_bytes = h->page_bytes,
                                  .created_ns = h->created_ns,
                                  .ram_bytes = h->ram_bytes,
                                  .file_bytes = h->file_bytes,
                                  .diff = w->how.diff };
    memcpy(out->arch, h->arch, sizeof(out->arch));
    memcpy(out->fingerprint, h->fingerprint, sizeof(out->fingerprint));
    memcpy(out->id, h->id, sizeof(out->id));
    memcpy(out->parent, h->parent, sizeof(out->parent));
    return 0;
}
