/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernel loader on hostile files: it never reads or writes outside the
 * file and the guest's memory (ASan), and what it accepts keeps its promises.
 */
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "boot.h"

#define RAM (8ull << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t *ram;
    static int fd = -1;
    struct sm_mem_desc desc = { .len_bytes = RAM, .kind = SM_MEM_FOREIGN, .fd = -1 };
    struct sm_mem mem;
    struct sm_elf elf;
    char err[128] = "";

    if (!ram) {
        ram = aligned_alloc(4096, RAM);
        fd = memfd_create("elf", MFD_CLOEXEC);
    }
    if (ftruncate(fd, 0) || pwrite(fd, data, size, 0) != (ssize_t)size)
        return 0;
    sm_mem_init(&mem, NULL);
    desc.hva = ram;
    if (sm_mem_map(&mem, &desc))
        abort();
    if (sm_elf_load(&mem, fd, &elf, err, sizeof(err)) == 0) {
        if (!elf.high || elf.high > RAM)
            abort();
    } else if (!err[0]) {
        abort(); /* refused without a word */
    }
    sm_mem_destroy(&mem);
    return 0;
}
