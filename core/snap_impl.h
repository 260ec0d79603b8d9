/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of snapshots: the file's layout, for snap.c and snap_save.c. Written as
 * it is, on little-endian machines. */
#ifndef SM_SNAP_IMPL_H
#define SM_SNAP_IMPL_H

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

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
    uint8_t zero[SM_SNAP_HEADER_BYTES - 332];
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

extern const char sm_snap_magic[8];

__attribute__((format(printf, 4, 5))) int sm_snap_say(char *err, size_t errlen, int code,
                                                      const char *fmt, ...);

#endif
