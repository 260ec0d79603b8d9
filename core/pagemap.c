/* SPDX-License-Identifier: Apache-2.0 */
/* What the kernel knows of pages; see pagemap.h. */
#include "pagemap.h"

#include <sys/mman.h>
#include <unistd.h>

#include "vm.h"

#define PAGE_BYTES 4096u

bool sm_pagemap_read(const struct sm_vm *vm, const uint8_t *hva, unsigned pages,
                     uint64_t *entries)
{
    off_t at = (off_t)((uintptr_t)hva / PAGE_BYTES * sizeof(entries[0]));
    size_t len = pages * sizeof(entries[0]);
    int fd = sm_vm_pagemap_fd(vm);

    return fd >= 0 && pread(fd, entries, len, at) == (ssize_t)len;
}

/*
 * A page of our own shows whether it does: without the support clear_refs is silent
 * and every page seems clean.
 */
bool sm_pagemap_tell_writes(const struct sm_vm *vm)
{
    int fd = sm_vm_clear_refs_fd(vm);
    volatile uint8_t *probe = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const uint8_t *page = (const uint8_t *)probe;
    uint64_t before, after;
    bool told = false;

    if (probe == MAP_FAILED)
        return false;
    *probe = 1;
    if (fd >= 0 && pwrite(fd, "4", 1, 0) == 1 && sm_pagemap_read(vm, page, 1, &before)) {
        *probe = 2;
        told = sm_pagemap_read(vm, page, 1, &after) && !(before & SM_PAGE_SOFT_DIRTY) &&
               after & SM_PAGE_SOFT_DIRTY;
    }
    munmap((void *)page, PAGE_BYTES);
    return told;
}
