/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of snapshots: the file's layout, for core/snap*.c. Written as it is, on
 * little-endian machines. */
#ifndef SM_SNAP_IMPL_H
#define SM_SNAP_IMPL_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "file.h"
#include "mem.h"
#include "snap.h"
#include "state.h"

#define SM_SNAP_HEADER_BYTES 4096u
#define SM_SNAP_UNIT_BYTES 4096u /* of sums: a page of RAM, a cluster of a disk */
#define SM_SNAP_ALIGN (2ull << 20)
#define SM_SNAP_STATE_MAX (256ull << 20)
#define SM_SNAP_AREAS (SM_MEM_MAX_REGIONS + SM_STATE_BLOBS)

enum { SM_SNAP_RAM = 1, SM_SNAP_BLOB = 2 };

#if defined(__x86_64__)
#define SM_SNAP_ARCH "x86_64"
#elif defined(__aarch64__)
#define SM_SNAP_ARCH "aarch64"
#endif

struct sm_snap_section {
    uint64_t offset, len_bytes;
    uint32_t crc, zero;
};

struct sm_snap_header {
    char magic[8];
    uint32_t version, header_bytes, page_bytes, cpus;
    uint64_t file_bytes, ram_bytes, created_ns;
    uint8_t id[SM_SNAP_ID_BYTES], parent[SM_SNAP_ID_BYTES];
    struct sm_snap_section state, meta, index;
    char arch[16], fingerprint[160];
    struct sm_snap_section pages; /* from version 2 on */
    uint8_t zero[SM_SNAP_HEADER_BYTES - 356];
    uint32_t crc; /* of all before it */
};
_Static_assert(sizeof(struct sm_snap_header) == SM_SNAP_HEADER_BYTES, "no padding");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "written as it is");

struct sm_snap_area {
    uint32_t kind, prot;
    uint64_t gpa, len_bytes, offset;
    uint32_t sum, zero;
};
_Static_assert(sizeof(struct sm_snap_area) == 40, "no padding");

struct sm_snap {
    int fd;
    struct sm_snap_header header;
    struct sm_snap_info info;
    uint8_t *state, *meta; /* a byte more than they hold, so never NULL */
    struct sm_snap_area areas[SM_SNAP_AREAS];
    unsigned area_count;
    uint8_t *pages;                       /* of a diff; else NULL */
    const uint8_t *area_pages[SM_SNAP_AREAS]; /* into it, for each area of RAM */
};

extern const char sm_snap_magic[8];

/* Bytes of the bits of so much RAM. */
static inline uint64_t sm_snap_bits_bytes(uint64_t ram_bytes)
{
    return (ram_bytes / SM_SNAP_UNIT_BYTES + 7) / 8;
}

static inline bool sm_snap_bit(const uint8_t *bits, uint64_t page)
{
    return bits[page / 8] >> (page % 8) & 1;
}

/* The next run of set bits in [*from, end), of at most max pages: its length, and
 * where it begins in *from; 0: there is none. */
uint64_t sm_snap_run(const uint8_t *bits, uint64_t *from, uint64_t end, uint64_t max);

bool sm_snap_is_zero(const uint8_t *page);
/* The next page at or after `at` that may hold data; end: none does. */
uint64_t sm_snap_next_data(int fd, uint64_t at, uint64_t end);

/* The sum of what an area of a file holds. buf: SM_SNAP_CHUNK_BYTES. */
#define SM_SNAP_CHUNK_BYTES (1u << 20)
int sm_snap_sum(int fd, const struct sm_snap_area *a, uint8_t *buf, uint32_t *sum,
                struct sm_snap_progress *progress);
/* So many bytes are done; progress may be NULL. */
void sm_snap_did(struct sm_snap_progress *progress, uint64_t bytes);
/* What all areas of a file come to. */
uint64_t sm_snap_area_bytes(const struct sm_snap *snap);

/* Pages [page, page + n) of an area of RAM as the newest file of a chain has them. */
int sm_snap_gather(struct sm_snap *const *links, unsigned count, unsigned area, uint64_t page,
                   unsigned n, uint8_t *buf);

/* The parents of a snapshot are those that it needs, in order and of its shape. */
int sm_snap_check_chain(const struct sm_snap *snap, struct sm_snap *const *parents,
                        unsigned count, char *err, size_t errlen);

__attribute__((format(printf, 4, 5))) int sm_snap_say(char *err, size_t errlen, int code,
                                                      const char *fmt, ...);

#endif
