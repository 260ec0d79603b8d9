/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the kernel knows of the pages of this process: Documentation/admin-guide/mm/
 * pagemap.rst and soft-dirty.rst. The files are opened before a worker is confined and
 * are the VM's.
 *
 * Threads: the VM's owner.
 */
#ifndef SM_PAGEMAP_H
#define SM_PAGEMAP_H

#include <stdbool.h>
#include <stdint.h>

struct sm_vm;

#define SM_PAGE_PRESENT (1ull << 63)
#define SM_PAGE_SWAPPED (1ull << 62)
#define SM_PAGE_OF_FILE (1ull << 61) /* else: private, written since it was mapped */
#define SM_PAGE_SOFT_DIRTY (1ull << 55) /* written since sm_pagemap_tell_writes */

/* One entry a page; false: this system does not say. */
bool sm_pagemap_read(const struct sm_vm *vm, const uint8_t *hva, unsigned pages,
                     uint64_t *entries);
/* Have the kernel tell from now on what is written, by whomever; false: it does not. */
bool sm_pagemap_tell_writes(const struct sm_vm *vm);

#endif
