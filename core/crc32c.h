/* SPDX-License-Identifier: Apache-2.0 */
/*
 * CRC-32C (Castagnoli), the checksum of snapshots.
 *
 * It finds every single bit flip and every burst of up to 32 bits, which is
 * what disks and cut-off writes do. It is no signature: whoever can write a
 * snapshot can make its checksums right, so a snapshot is trusted as much as
 * the place it came from (docs in core/snap.h). A cryptographic hash would not
 * change that, costs ten times as much per restore, and needs a library that
 * the core does not link.
 *
 * Source: RFC 3720, appendix B.4.
 */
#ifndef SM_CRC32C_H
#define SM_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Continue a checksum; begin with 0. */
uint32_t sm_crc32c(uint32_t crc, const void *p, size_t len);

/* Checksum of something sparse: every unit (page, cluster) that is not all
 * zero, with its number, in ascending order. Holes do not matter. */
uint32_t sm_sum_add(uint32_t sum, uint64_t number, const void *p, size_t len);

#endif
