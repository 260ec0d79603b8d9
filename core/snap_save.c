/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Writing snapshots; see snap.h.
 *
 * Which pages of RAM may hold something is asked of the kernel, so that
 * memory nobody touched is neither read nor made resident: /proc/self/pagemap
 * knows what this process touched (present or swapped out), and where a region
 * lies over a file, as after a lazy restore, the file's own extents count too;
 * without those a second snapshot would lose what was never faulted in. Every
 * candidate is looked at, and zero pages become holes.
 */
#include "snap_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "crc32c.h"
#include "vm.h"

#define PAGE SM_SNAP_UNIT_BYTES
#define BATCH 512       /* pages looked up at once */
#define RUN_BYTES (1u << 20) /* written at once */
#define PAGE_PRESENT (1ull << 63)
#define PAGE_SWAPPED (1ull << 62)

struct saver {
    struct sm_vm *vm;
    int fd;
    uint64_t stored_bytes;
    struct sm_snap_header header;
    struct sm_snap_area areas[SM_SNAP_AREAS];
    unsigned area_count;
};

static int write_at(struct saver *s, const void *buf, size_t len, uint64_t offset)
{
    const uint8_t *p = buf;

    s->stored_bytes += len;
    while (len) {
        ssize_t n = pwrite(s->fd, p, len, (off_t)offset);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        p += n;
        len -= (size_t)n;
        offset += (uint64_t)n;
    }
    return 0;
}

static uint64_t align_up(uint64_t n, uint64_t to)
{
    return (n + to - 1) / to * to;
}

/* ---- RAM ---- */

/* Mark the pages of a batch that this process has touched; all when unknown. */
static void mark_touched(struct saver *s, const uint8_t *hva, unsigned pages, bool *wanted)
{
    uint64_t entries[BATCH];
    off_t at = (off_t)((uintptr_t)hva / PAGE * sizeof(entries[0]));
    int fd = sm_vm_pagemap_fd(s->vm);
    size_t len = pages * sizeof(entries[0]);
    bool known = fd >= 0 && pread(fd, entries, len, at) == (ssize_t)len;

    for (unsigned i = 0; i < pages; i++)
        wanted[i] = !known || entries[i] & (PAGE_PRESENT | PAGE_SWAPPED);
}

/* And those that the file behind them has data for. */
static void mark_file(const struct sm_mem_region *r, uint64_t at, unsigned pages, bool *wanted)
{
    uint64_t from = r->offset + at, end = from + (uint64_t)pages * PAGE;

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
            wanted[p - (r->offset + at) / PAGE] = true;
        from = stop > (uint64_t)data ? stop : end;
    }
}

static bool is_zero(const uint8_t *p)
{
    return p[0] == 0 && memcmp(p, p + 1, PAGE - 1) == 0;
}

static int save_batch(struct saver *s, const struct sm_mem_region *r, struct sm_snap_area *a,
                      uint64_t at, unsigned pages)
{
    bool wanted[BATCH];
    const uint8_t *hva = r->hva + at;
    unsigned run = 0;

    if (r->kind == SM_MEM_FOREIGN)
        memset(wanted, true, sizeof(wanted));
    else
        mark_touched(s, hva, pages, wanted);
    if (r->fd >= 0)
        mark_file(r, at, pages, wanted);
    for (unsigned i = 0; i <= pages; i++) {
        bool keep = i < pages && wanted[i] && !is_zero(hva + (uint64_t)i * PAGE);

        if (keep) {
            a->sum = sm_sum_add(a->sum, at / PAGE + i, hva + (uint64_t)i * PAGE, PAGE);
            run++;
        }
        if (run && (!keep || run * PAGE == RUN_BYTES)) {
            unsigned first = i + (keep ? 1 : 0) - run;
            int err = write_at(s, hva + (uint64_t)first * PAGE, (size_t)run * PAGE,
                               a->offset + at + (uint64_t)first * PAGE);

            if (err)
                return err;
            run = 0;
        }
    }
    return 0;
}

static int save_region(struct saver *s, const struct sm_mem_region *r, struct sm_snap_area *a)
{
    for (uint64_t at = 0; at < r->len_bytes; at += (uint64_t)BATCH * PAGE) {
        uint64_t left = (r->len_bytes - at) / PAGE;
        int err = save_batch(s, r, a, at, left < BATCH ? (unsigned)left : BATCH);

        if (err)
            return err;
    }
    return 0;
}

/* Every region; *end is where the file then ends. */
static int save_ram(struct saver *s, uint64_t *end, char *err, size_t errlen)
{
    const struct sm_mem *mem = sm_vm_mem(s->vm);
    uint64_t at = SM_SNAP_ALIGN;

    for (unsigned i = 0; i < mem->count; i++) {
        const struct sm_mem_region *r = &mem->regions[i];
        struct sm_snap_area *a = &s->areas[s->area_count];
        int e;

        if (r->device) /* a device's window comes back with the device */
            continue;
        s->area_count++;
        *a = (struct sm_snap_area){ .kind = SM_SNAP_RAM,
                                    .prot = r->prot,
                                    .gpa = r->gpa,
                                    .len_bytes = r->len_bytes,
                                    .offset = at };
        e = save_region(s, r, a);
        if (e)
            return sm_snap_say(err, errlen, e, "its memory: %s", strerror(-e));
        s->header.ram_bytes += r->len_bytes;
        at = align_up(at + r->len_bytes, SM_SNAP_ALIGN);
    }
    *end = at;
    return 0;
}

/* ---- the rest ---- */

static int write_section(struct saver *s, struct sm_snap_section *section, const void *p,
                         size_t len, uint64_t *end)
{
    *section = (struct sm_snap_section){ .offset = *end,
                                         .len_bytes = len,
                                         .crc = sm_crc32c(0, p, len) };
    *end += len;
    return write_at(s, p, len, section->offset);
}

static int write_tail(struct saver *s, const struct sm_state_writer *w,
                      const struct sm_snap_save *how, uint64_t end)
{
    struct sm_snap_header *h = &s->header;
    int err = write_section(s, &h->state, w->buf, w->len, &end);

    if (!err)
        err = write_section(s, &h->meta, how->meta ? how->meta : "", how->meta_len, &end);
    if (!err)
        err = write_section(s, &h->index, s->areas, s->area_count * sizeof(s->areas[0]), &end);
    h->file_bytes = end;
    h->crc = sm_crc32c(0, h, offsetof(struct sm_snap_header, crc));
    return err ? err : write_at(s, h, sizeof(*h), 0);
}

static int begin_header(struct saver *s, const struct sm_snap_save *how)
{
    struct sm_snap_header *h = &s->header;
    struct timespec now;

    memcpy(h->magic, sm_snap_magic, sizeof(h->magic));
    h->version = SM_SNAP_VERSION;
    h->header_bytes = SM_SNAP_HEADER_BYTES;
    h->page_bytes = (uint32_t)sysconf(_SC_PAGESIZE);
    h->cpus = sm_vm_cpus(s->vm);
    clock_gettime(CLOCK_REALTIME, &now);
    h->created_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    memcpy(h->arch, SM_SNAP_ARCH, sizeof(SM_SNAP_ARCH));
    if (how->parent)
        memcpy(h->parent, how->parent, sizeof(h->parent));
    if (getrandom(h->id, sizeof(h->id), 0) != sizeof(h->id))
        return -EIO;
    return sm_hv_fingerprint(sm_vm_hv(s->vm), h->fingerprint, sizeof(h->fingerprint));
}

static void add_blobs(struct saver *s, const struct sm_state_blobs *blobs)
{
    for (unsigned i = 0; i < blobs->count; i++)
        s->areas[s->area_count++] = (struct sm_snap_area){ .kind = SM_SNAP_BLOB,
                                                           .len_bytes = blobs->list[i].len_bytes,
                                                           .offset = blobs->list[i].offset,
                                                           .sum = blobs->list[i].sum };
}

static int save_all(struct saver *s, const struct sm_snap_save *how, char *err, size_t errlen)
{
    struct sm_state_blobs blobs = { .fd = s->fd };
    struct sm_state_writer w;
    int e = begin_header(s, how);

    if (e)
        return sm_snap_say(err, errlen, e, "%s", strerror(-e));
    sm_vm_lift_breakpoints(s->vm, true);
    e = save_ram(s, &blobs.end, err, errlen);
    sm_vm_lift_breakpoints(s->vm, false);
    if (e)
        return e;
    sm_state_writer_init(&w);
    w.blobs = &blobs;
    e = sm_vm_save(s->vm, &w, err, errlen);
    if (!e) {
        add_blobs(s, &blobs);
        e = write_tail(s, &w, how, blobs.end);
        if (!e && how->sync && fsync(s->fd) < 0)
            e = -errno;
        if (e)
            sm_snap_say(err, errlen, e, "%s", strerror(-e));
    }
    sm_state_writer_free(&w);
    return e;
}

int sm_snap_save(struct sm_vm *vm, int fd, const struct sm_snap_save *how,
                 struct sm_snap_info *out, uint64_t *stored_bytes, char *err, size_t errlen)
{
    struct sm_vm_status status;
    struct saver *s;
    struct stat st;
    int e;

    if (how->meta_len > SM_SNAP_META_MAX)
        return sm_snap_say(err, errlen, -EMSGSIZE, "a description of more than 1 MiB");
    if (fstat(fd, &st) < 0)
        return sm_snap_say(err, errlen, -errno, "%s", strerror(errno));
    /* Writing over the file this very VM runs from would spoil both. */
    if (!S_ISREG(st.st_mode) || st.st_size != 0)
        return sm_snap_say(err, errlen, -EEXIST, "it is not an empty file");
    sm_vm_state(vm, &status);
    if (status.state != SM_VM_PAUSED)
        return sm_snap_say(err, errlen, -EINVAL, "the VM is not paused");
    s = calloc(1, sizeof(*s));
    if (!s)
        return sm_snap_say(err, errlen, -ENOMEM, "out of memory");
    s->vm = vm;
    s->fd = fd;
    e = save_all(s, how, err, errlen);
    if (!e) {
        const struct sm_snap_header *h = &s->header;

        *out = (struct sm_snap_info){ .version = h->version,
                                      .cpus = h->cpus,
                                      .page_bytes = h->page_bytes,
                                      .created_ns = h->created_ns,
                                      .ram_bytes = h->ram_bytes,
                                      .file_bytes = h->file_bytes };
        memcpy(out->arch, h->arch, sizeof(out->arch));
        memcpy(out->fingerprint, h->fingerprint, sizeof(out->fingerprint));
        memcpy(out->id, h->id, sizeof(out->id));
        memcpy(out->parent, h->parent, sizeof(out->parent));
        *stored_bytes = s->stored_bytes;
    }
    free(s);
    return e;
}
