/* SPDX-License-Identifier: Apache-2.0 */
/* Guest memory regions; see mem.h. */
#include "mem.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "backend.h"

#define HUGE_BYTES (2u << 20)

void sm_mem_init(struct sm_mem *mem, struct sm_hv *hv)
{
    memset(mem, 0, sizeof(*mem));
    mem->hv = hv;
}

static void region_release(struct sm_mem_region *r)
{
    if (r->kind != SM_MEM_FOREIGN && r->hva)
        munmap(r->hva, r->len_bytes);
    if (r->fd >= 0)
        close(r->fd);
}

void sm_mem_destroy(struct sm_mem *mem)
{
    while (mem->count)
        sm_mem_unmap(mem, mem->regions[mem->count - 1].gpa);
}

/* Where a region of this range belongs, or -EEXIST when it meets another. */
static int insert_at(const struct sm_mem *mem, uint64_t gpa, uint64_t len)
{
    unsigned i = 0;

    while (i < mem->count && mem->regions[i].gpa < gpa)
        i++;
    if (i < mem->count && mem->regions[i].gpa - gpa < len)
        return -EEXIST;
    if (i > 0 && gpa - mem->regions[i - 1].gpa < mem->regions[i - 1].len_bytes)
        return -EEXIST;
    return (int)i;
}

static int host_prot(unsigned prot)
{
    return PROT_READ | (prot & SM_PROT_WRITE ? PROT_WRITE : 0);
}

/*
 * As mmap, but so that guest and host addresses are congruent modulo 2 MiB: only
 * then can a huge page of the host be one of the guest's second-level tables.
 * (Kernels before 6.7 align no anonymous mapping by themselves.)
 */
static void *map_congruent(uint64_t gpa, uint64_t len, int prot, int flags, int fd, off_t offset)
{
    uint8_t *room, *p;
    size_t head;

    if (len < HUGE_BYTES)
        return mmap(NULL, len, prot, flags, fd, offset);
    room = mmap(NULL, len + HUGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return room;
    head = (gpa - (uintptr_t)room) % HUGE_BYTES;
    p = mmap(room + head, len, prot, flags | MAP_FIXED, fd, offset);
    if (p == MAP_FAILED) {
        int err = errno;

        munmap(room, len + HUGE_BYTES);
        errno = err;
        return MAP_FAILED;
    }
    if (head)
        munmap(room, head);
    munmap(p + len, HUGE_BYTES - head);
    return p;
}

static int region_acquire(struct sm_mem_region *r, const struct sm_mem_desc *desc)
{
    int flags = MAP_PRIVATE | MAP_NORESERVE;
    int fd = -1;
    void *p;

    switch (desc->kind) {
    case SM_MEM_FOREIGN:
        if (!desc->hva)
            return -EINVAL;
        r->hva = desc->hva;
        return 0;
    case SM_MEM_ANON:
        flags |= MAP_ANONYMOUS;
        break;
    case SM_MEM_SHARED:
        flags = MAP_SHARED;
        if (desc->fd >= 0) {
            fd = fcntl(desc->fd, F_DUPFD_CLOEXEC, 0);
            if (fd < 0)
                return -errno;
            break;
        }
        fd = memfd_create("sm-ram", MFD_CLOEXEC);
        if (fd < 0)
            return -errno;
        if (ftruncate(fd, (off_t)desc->len_bytes) < 0) {
            int err = -errno;

            close(fd);
            return err;
        }
        break;
    case SM_MEM_FILE:
        fd = fcntl(desc->fd, F_DUPFD_CLOEXEC, 0);
        if (fd < 0)
            return -errno;
        break;
    default:
        return -EINVAL;
    }
    p = map_congruent(desc->gpa, desc->len_bytes, host_prot(r->prot), flags, fd, (off_t)desc->offset);
    if (p == MAP_FAILED) {
        int err = -errno;

        if (fd >= 0)
            close(fd);
        return err;
    }
    /* A child of the host program must not inherit a guest's memory. */
    madvise(p, desc->len_bytes, MADV_DONTFORK);
    if (desc->kind == SM_MEM_ANON)
        madvise(p, desc->len_bytes, MADV_HUGEPAGE);
    r->hva = p;
    r->fd = fd;
    return 0;
}

int sm_mem_map(struct sm_mem *mem, const struct sm_mem_desc *desc)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    struct sm_mem_region r = {
        .gpa = desc->gpa,
        .len_bytes = desc->len_bytes,
        .kind = desc->kind,
        .prot = desc->prot ? desc->prot : SM_PROT_RWX,
        .fd = -1,
        .offset = desc->offset,
        .device = desc->device,
    };
    int at, err;

    if (!r.len_bytes || (r.gpa | r.len_bytes | desc->offset) & (page - 1))
        return -EINVAL;
    if (r.gpa + r.len_bytes < r.gpa)
        return -EINVAL;
    if (mem->count == SM_MEM_MAX_REGIONS)
        return -ENOSPC;
    at = insert_at(mem, r.gpa, r.len_bytes);
    if (at < 0)
        return at;
    err = region_acquire(&r, desc);
    if (err)
        return err;
    if (mem->hv) {
        err = sm_hv_map(mem->hv, r.gpa, r.hva, r.len_bytes, r.prot, false);
        if (err) {
            region_release(&r);
            return err;
        }
    }
    memmove(&mem->regions[at + 1], &mem->regions[at],
            (mem->count - (unsigned)at) * sizeof(r));
    mem->regions[at] = r;
    mem->count++;
    return 0;
}

int sm_mem_unmap(struct sm_mem *mem, uint64_t gpa)
{
    for (unsigned i = 0; i < mem->count; i++) {
        struct sm_mem_region *r = &mem->regions[i];

        if (r->gpa != gpa)
            continue;
        if (mem->hv)
            sm_hv_unmap(mem->hv, gpa);
        region_release(r);
        mem->count--;
        memmove(r, r + 1, (mem->count - i) * sizeof(*r));
        return 0;
    }
    return -ENOENT;
}

static struct sm_mem_region *region_at(struct sm_mem *mem, uint64_t gpa)
{
    for (unsigned i = 0; i < mem->count; i++)
        if (mem->regions[i].gpa == gpa)
            return &mem->regions[i];
    return NULL;
}

const struct sm_mem_region *sm_mem_region_at(const struct sm_mem *mem, uint64_t gpa)
{
    return region_at((struct sm_mem *)mem, gpa);
}

int sm_mem_protect(struct sm_mem *mem, uint64_t gpa, unsigned prot)
{
    struct sm_mem_region *r = region_at(mem, gpa);
    int err;

    if (!r)
        return -ENOENT;
    /* Our own mapping only ever gets wider: a device may hold a pointer to a
     * queue in here. Nothing new is handed out, see sm_mem_ptr. */
    if (prot & SM_PROT_WRITE && r->kind != SM_MEM_FOREIGN &&
        mprotect(r->hva, r->len_bytes, host_prot(prot)) < 0)
        return -errno;
    err = mem->hv ? sm_hv_protect(mem->hv, gpa, prot, r->log_dirty) : 0;
    if (!err)
        r->prot = prot;
    return err;
}

int sm_mem_log_dirty(struct sm_mem *mem, uint64_t gpa, bool on)
{
    struct sm_mem_region *r = region_at(mem, gpa);
    int err;

    if (!r)
        return -ENOENT;
    err = mem->hv ? sm_hv_protect(mem->hv, gpa, r->prot, on) : 0;
    if (!err)
        r->log_dirty = on;
    return err;
}

int sm_mem_overlay(struct sm_mem *mem, const struct sm_mem_region *region, uint64_t at,
                   uint64_t len_bytes, int fd, uint64_t offset)
{
    struct sm_mem_region *r = region_at(mem, region->gpa);
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    int own = -1;

    if (!r || (r->kind != SM_MEM_ANON && r->kind != SM_MEM_FILE) || !len_bytes ||
        at > r->len_bytes || len_bytes > r->len_bytes - at ||
        (at | len_bytes | offset) & (page - 1))
        return -EINVAL;
    if (len_bytes == r->len_bytes) {
        own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        if (own < 0)
            return -errno;
    }
    if (mmap(r->hva + at, len_bytes, host_prot(r->prot), MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED,
             fd, (off_t)offset) == MAP_FAILED) {
        int err = -errno;

        if (own >= 0)
            close(own);
        return err;
    }
    madvise(r->hva + at, len_bytes, MADV_DONTFORK);
    if (own >= 0) {
        if (r->fd >= 0)
            close(r->fd);
        r->fd = own;
        r->offset = offset;
        r->kind = SM_MEM_FILE;
    }
    return 0;
}

/* The region that holds gpa, or NULL. */
static const struct sm_mem_region *find(const struct sm_mem *mem, uint64_t gpa)
{
    for (unsigned i = 0; i < mem->count; i++) {
        const struct sm_mem_region *r = &mem->regions[i];

        /* Unsigned: a gpa below the region wraps and fails the test too. */
        if (gpa - r->gpa < r->len_bytes)
            return r;
    }
    return NULL;
}

static void *whole(const struct sm_mem_region *r, uint64_t gpa, uint64_t len)
{
    if (!len || len > r->len_bytes - (gpa - r->gpa))
        return NULL;
    return r->hva + (gpa - r->gpa);
}

void *sm_mem_ptr(const struct sm_mem *mem, uint64_t gpa, uint64_t len)
{
    const struct sm_mem_region *r = find(mem, gpa);

    return r && !r->device && r->prot & SM_PROT_WRITE ? whole(r, gpa, len) : NULL;
}

const void *sm_mem_source(const struct sm_mem *mem, uint64_t gpa, uint64_t len)
{
    const struct sm_mem_region *r = find(mem, gpa);

    return r && !(r->device && r->prot & SM_PROT_WRITE) ? whole(r, gpa, len) : NULL;
}

/* How many of len bytes at gpa lie in r. */
static uint64_t part(const struct sm_mem_region *r, uint64_t gpa, uint64_t len)
{
    uint64_t left = r->len_bytes - (gpa - r->gpa);

    return len < left ? len : left;
}

static int present(const struct sm_mem *mem, uint64_t gpa, uint64_t len)
{
    while (len) {
        const struct sm_mem_region *r = find(mem, gpa);
        uint64_t n;

        if (!r)
            return 0;
        n = part(r, gpa, len);
        gpa += n;
        len -= n;
    }
    return 1;
}

int sm_mem_read(const struct sm_mem *mem, uint64_t gpa, void *buf, uint64_t len)
{
    uint8_t *out = buf;

    if (gpa + len < gpa || !present(mem, gpa, len))
        return -EFAULT;
    while (len) {
        const struct sm_mem_region *r = find(mem, gpa);
        uint64_t n = part(r, gpa, len);

        memcpy(out, r->hva + (gpa - r->gpa), n);
        gpa += n;
        out += n;
        len -= n;
    }
    return 0;
}

int sm_mem_write(const struct sm_mem *mem, uint64_t gpa, const void *buf, uint64_t len)
{
    const uint8_t *in = buf;

    if (gpa + len < gpa || !present(mem, gpa, len))
        return -EFAULT;
    for (unsigned i = 0; i < mem->count; i++) {
        const struct sm_mem_region *r = &mem->regions[i];

        if (!(r->prot & SM_PROT_WRITE) && gpa < r->gpa + r->len_bytes && r->gpa < gpa + len)
            return -EFAULT;
    }
    while (len) {
        const struct sm_mem_region *r = find(mem, gpa);
        uint64_t n = part(r, gpa, len);

        memcpy(r->hva + (gpa - r->gpa), in, n);
        gpa += n;
        in += n;
        len -= n;
    }
    return 0;
}

uint64_t sm_mem_ram_bytes(const struct sm_mem *mem)
{
    uint64_t total = 0;

    for (unsigned i = 0; i < mem->count; i++)
        if (!mem->regions[i].device)
            total += mem->regions[i].len_bytes;
    return total;
}
