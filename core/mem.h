/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Guest memory: which host memory lies behind which guest-physical address.
 *
 * A region is an object (anonymous, memfd or private file mapping) at a gpa.
 * The guest is hostile, so there is one way from a gpa to a pointer,
 * sm_mem_ptr: the whole range lies in one region, or NULL.
 *
 * Threads. Regions are added before the VM runs or while every vCPU and every
 * device is paused; lookups take no lock.
 */
#ifndef SM_MEM_H
#define SM_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct sm_hv;

#define SM_MEM_MAX_REGIONS 32

enum sm_mem_kind {
    SM_MEM_ANON,    /* private anonymous */
    SM_MEM_SHARED,  /* memfd, or a file when fd is one; MAP_SHARED */
    SM_MEM_FILE,    /* MAP_PRIVATE of a file */
    SM_MEM_FOREIGN, /* the caller's pointer, not unmapped by us */
};

struct sm_mem_region {
    uint64_t gpa;
    uint64_t len_bytes;
    uint8_t *hva;
    enum sm_mem_kind kind;
    unsigned prot; /* enum sm_prot */
    int fd;        /* memfd or file, -1 */
    uint64_t offset; /* in it */
    bool device;   /* not RAM: a DAX window, a pmem segment */
    bool log_dirty;
};

struct sm_mem {
    struct sm_hv *hv; /* NULL: no guest behind it (device specs) */
    unsigned count;
    struct sm_mem_region regions[SM_MEM_MAX_REGIONS]; /* sorted by gpa */
};

/* What to map. FILE takes fd (dup'ed) and offset, SHARED may (fd -1: a memfd);
 * FOREIGN takes hva. */
struct sm_mem_desc {
    uint64_t gpa;
    uint64_t len_bytes; /* multiple of the page size */
    enum sm_mem_kind kind;
    unsigned prot; /* 0 means RWX */
    int fd;
    uint64_t offset;
    void *hva;
    bool device;
};

void sm_mem_init(struct sm_mem *mem, struct sm_hv *hv);
/* Unmaps everything from the guest and the host. */
void sm_mem_destroy(struct sm_mem *mem);
/* -EINVAL alignment, -EEXIST overlap, -ENOSPC too many, -ENOMEM. */
int sm_mem_map(struct sm_mem *mem, const struct sm_mem_desc *desc);
int sm_mem_unmap(struct sm_mem *mem, uint64_t gpa);
/* Of the region that begins at gpa; -ENOENT. Both while no vCPU runs. */
int sm_mem_protect(struct sm_mem *mem, uint64_t gpa, unsigned prot);
int sm_mem_log_dirty(struct sm_mem *mem, uint64_t gpa, bool on);
/*
 * Lay a part of a file over a part of a region whose memory is ours alone (ANON
 * or FILE): a private view of the file from then on, what was there is gone. Over
 * the whole of it the region becomes one of that file. The backend must follow the
 * host's page tables, as KVM does; no vCPU runs. -EINVAL.
 */
int sm_mem_overlay(struct sm_mem *mem, const struct sm_mem_region *region, uint64_t at,
                   uint64_t len_bytes, int fd, uint64_t offset);
/* The region that begins at gpa, or NULL. */
const struct sm_mem_region *sm_mem_region_at(const struct sm_mem *mem, uint64_t gpa);

/* [gpa, gpa+len) as a host pointer, or NULL when any byte of it is not RAM of
 * one region that the guest may write. len 0 gives NULL. */
void *sm_mem_ptr(const struct sm_mem *mem, uint64_t gpa, uint64_t len);

/* The same for bytes that are only read: also of read-only device memory (a
 * pmem segment), whose pages a guest may hand to a device as any others. */
const void *sm_mem_source(const struct sm_mem *mem, uint64_t gpa, uint64_t len);

/* Copy across regions. -EFAULT when any byte is missing; nothing is copied
 * then. */
int sm_mem_read(const struct sm_mem *mem, uint64_t gpa, void *buf, uint64_t len);
int sm_mem_write(const struct sm_mem *mem, uint64_t gpa, const void *buf, uint64_t len);

/* Bytes of RAM (device regions not counted). */
uint64_t sm_mem_ram_bytes(const struct sm_mem *mem);

#endif
