/* SPDX-License-Identifier: Apache-2.0 */
/* Booting Linux; see boot.h. */
#include "boot.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "dev/power.h"

#define PAGE 4096ull
#define INITRD_END_MAX 0xc0000000ull /* where low RAM ends at the latest */
#define E820_RAM 1u
#define E820_RESERVED 2u
#define E820_MAX 128u

#define START_INFO_MAGIC 0x336ec578u
#define MODLIST_GPA (SM_BOOT_START_INFO_GPA + 0x40)
#define MEMMAP_GPA (SM_BOOT_START_INFO_GPA + 0x80)
#define MEMMAP_MAX ((SM_BOOT_PARAMS_GPA - MEMMAP_GPA) / sizeof(struct memmap_entry))

struct start_info {
    uint32_t magic, version, flags, nr_modules;
    uint64_t modlist_paddr, cmdline_paddr, rsdp_paddr, memmap_paddr;
    uint32_t memmap_entries, reserved;
};

struct modlist_entry {
    uint64_t paddr, size, cmdline_paddr, reserved;
};

struct memmap_entry {
    uint64_t addr, size;
    uint32_t type, reserved;
};

struct initrd {
    uint64_t gpa, len_bytes;
};

static int say(char *err, size_t errlen, int code, const char *what, const char *why)
{
    if (err && errlen)
        snprintf(err, errlen, "%s: %s", what, why);
    return code;
}

/* --- the memory map ----------------------------------------------------- */

struct memmap {
    unsigned count;
    struct memmap_entry entries[SM_MEM_MAX_REGIONS + 4];
};

static void memmap_add(struct memmap *map, uint64_t addr, uint64_t end, uint32_t type)
{
    if (end > addr)
        map->entries[map->count++] =
            (struct memmap_entry){ .addr = addr, .size = end - addr, .type = type };
}

/* RAM as it is mapped, with a PC's hole below 1 MiB, where ACPI lies. */
static void memmap_make(const struct sm_mem *mem, struct memmap *map)
{
    map->count = 0;
    for (unsigned i = 0; i < mem->count; i++) {
        const struct sm_mem_region *r = &mem->regions[i];
        uint64_t end = r->gpa + r->len_bytes;

        if (r->device)
            continue;
        if (r->gpa < SM_BOOT_LOW_RAM_END) {
            memmap_add(map, r->gpa, SM_BOOT_LOW_RAM_END, E820_RAM);
            memmap_add(map, SM_BOOT_ACPI_GPA, SM_BOOT_KERNEL_MIN, E820_RESERVED);
            memmap_add(map, SM_BOOT_KERNEL_MIN, end, E820_RAM);
        } else {
            memmap_add(map, r->gpa, end, E820_RAM);
        }
    }
}

/* --- files -------------------------------------------------------------- */

static int read_file(int fd, uint8_t *p, uint64_t len)
{
    uint64_t offset = 0;

    while (offset < len) {
        ssize_t n = pread(fd, p + offset, len - offset, (off_t)offset);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        offset += (uint64_t)n;
    }
    return 0;
}

/* End of the RAM that starts at 0. */
static uint64_t low_ram_end(const struct sm_mem *mem)
{
    uint64_t end = 0;

    for (unsigned i = 0; i < mem->count; i++)
        if (!mem->regions[i].device && mem->regions[i].gpa == 0)
            end = mem->regions[i].len_bytes;
    return end < INITRD_END_MAX ? end : INITRD_END_MAX;
}

static int initrd_place(struct sm_mem *mem, int fd, uint64_t kernel_end, struct initrd *out,
                        char *err, size_t errlen)
{
    uint64_t end = low_ram_end(mem), size;
    struct stat st;
    void *p;
    int r;

    if (fstat(fd, &st) < 0)
        return say(err, errlen, -errno, "initrd", strerror(errno));
    if (!S_ISREG(st.st_mode))
        return say(err, errlen, -EINVAL, "initrd", "not a regular file");
    size = (uint64_t)st.st_size;
    if (!size)
        return say(err, errlen, -EINVAL, "initrd", "empty file");
    if (kernel_end > end || size > end - kernel_end)
        return say(err, errlen, -ENOMEM, "initrd", "does not fit in memory beside the kernel");
    out->gpa = (end - size) & ~(PAGE - 1);
    out->len_bytes = size;
    p = out->gpa >= kernel_end ? sm_mem_ptr(mem, out->gpa, size) : NULL;
    if (!p)
        return say(err, errlen, -ENOMEM, "initrd", "does not fit in memory beside the kernel");
    r = read_file(fd, p, size);
    return r ? say(err, errlen, r, "initrd", strerror(-r)) : 0;
}

static int open_file(const char *path, const char *what, char *err, size_t errlen)
{
    /* O_NONBLOCK: a FIFO must not hang us. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    char line[128];

    if (fd >= 0)
        return fd;
    fd = -errno;
    snprintf(line, sizeof(line), "%s %.90s", what, path);
    return say(err, errlen, fd, line, strerror(-fd));
}

/* --- PVH entry ---------------------------------------------------------- */

static int start_info_write(struct sm_mem *mem, const struct initrd *initrd)
{
    struct start_info info = {
        .magic = START_INFO_MAGIC,
        .version = 1,
        .cmdline_paddr = SM_BOOT_CMDLINE_GPA,
        .rsdp_paddr = SM_BOOT_ACPI_GPA,
        .memmap_paddr = MEMMAP_GPA,
    };
    struct modlist_entry module = { .paddr = initrd->gpa, .size = initrd->len_bytes };
    struct memmap map;
    int err;

    memmap_make(mem, &map);
    if (map.count > MEMMAP_MAX)
        return -ENOSPC;
    info.memmap_entries = map.count;
    if (initrd->len_bytes) {
        info.nr_modules = 1;
        info.modlist_paddr = MODLIST_GPA;
    }
    err = sm_mem_write(mem, SM_BOOT_START_INFO_GPA, &info, sizeof(info));
    if (!err && initrd->len_bytes)
        err = sm_mem_write(mem, MODLIST_GPA, &module, sizeof(module));
    if (!err)
        err = sm_mem_write(mem, MEMMAP_GPA, map.entries, map.count * sizeof(map.entries[0]));
    return err;
}

/* --- 64-bit entry ------------------------------------------------------- */

/* Offsets in boot_params (the zero page). */
enum {
    BP_ACPI_RSDP = 0x070,
    BP_E820_COUNT = 0x1e8,
    BP_BOOT_FLAG = 0x1fe,
    BP_HEADER = 0x202,
    BP_LOADER_TYPE = 0x210,
    BP_RAMDISK = 0x218,
    BP_RAMDISK_SIZE = 0x21c,
    BP_CMDLINE = 0x228,
    BP_ALIGNMENT = 0x230,
    BP_E820 = 0x2d0,
};

static void poke(uint8_t *page, unsigned at, uint64_t v, unsigned bytes)
{
    memcpy(page + at, &v, bytes); /* little-endian host: this is x86 */
}

static void boot_params_fill(const struct sm_mem *mem, const struct initrd *initrd, uint8_t *page)
{
    struct memmap map;

    poke(page, BP_ACPI_RSDP, SM_BOOT_ACPI_GPA, 8);
    poke(page, BP_BOOT_FLAG, 0xaa55, 2);
    poke(page, BP_HEADER, 0x53726448, 4); /* "HdrS" */
    poke(page, BP_LOADER_TYPE, 0xff, 1);  /* unregistered */
    poke(page, BP_CMDLINE, SM_BOOT_CMDLINE_GPA, 4);
    poke(page, BP_ALIGNMENT, 0x1000000, 4);
    poke(page, BP_RAMDISK, initrd->gpa, 4);
    poke(page, BP_RAMDISK_SIZE, initrd->len_bytes, 4);
    memmap_make(mem, &map);
    for (unsigned i = 0; i < map.count && i < E820_MAX; i++) {
        unsigned at = BP_E820 + i * 20;

        poke(page, at, map.entries[i].addr, 8);
        poke(page, at + 8, map.entries[i].size, 8);
        poke(page, at + 16, map.entries[i].type, 4);
        page[BP_E820_COUNT] = (uint8_t)(i + 1);
    }
}

/* Six pages: a PML4, a PDPT and four directories of 2 MiB pages. */
static int page_tables_write(struct sm_mem *mem)
{
    uint64_t *pml4 = sm_mem_ptr(mem, SM_BOOT_PML4_GPA, 6 * PAGE);
    uint64_t *pdpt, *pd;

    if (!pml4)
        return -EFAULT;
    pdpt = pml4 + 512;
    pd = pdpt + 512;
    memset(pml4, 0, 2 * PAGE);
    pml4[0] = (SM_BOOT_PML4_GPA + PAGE) | 3; /* present, writable */
    for (unsigned i = 0; i < 4; i++)
        pdpt[i] = (SM_BOOT_PML4_GPA + (2 + i) * PAGE) | 3;
    for (uint64_t i = 0; i < 4 * 512; i++)
        pd[i] = i << 21 | 0x83; /* and 2 MiB */
    return 0;
}

static int linux64_write(struct sm_mem *mem, const struct initrd *initrd)
{
    /* null, unused, __BOOT_CS, __BOOT_DS */
    static const uint64_t gdt[4] = { 0, 0, 0x00af9b000000ffffull, 0x00cf93000000ffffull };
    uint8_t page[PAGE] = { 0 };
    int err;

    boot_params_fill(mem, initrd, page);
    err = sm_mem_write(mem, SM_BOOT_PARAMS_GPA, page, sizeof(page));
    if (!err)
        err = sm_mem_write(mem, SM_BOOT_GDT_GPA, gdt, sizeof(gdt));
    return err ? err : page_tables_write(mem);
}

/* ------------------------------------------------------------------------ */

static int cmdline_write(struct sm_mem *mem, const char *cmdline, char *err, size_t errlen)
{
    size_t len = cmdline ? strlen(cmdline) : 0;

    if (len >= SM_BOOT_CMDLINE_MAX)
        return say(err, errlen, -E2BIG, "kernel command line", "longer than 2047 bytes");
    if (sm_mem_write(mem, SM_BOOT_CMDLINE_GPA, len ? cmdline : "", len + 1))
        return say(err, errlen, -ENOMEM, "kernel", "no memory at address 0");
    return 0;
}

/* On hardware-reduced ACPI a Linux built with EFI believes that only EFI can
 * reboot; without EFI it jumps to the BIOS's reset vector in real mode. */
static int reset_vector_write(struct sm_mem *mem)
{
    static const uint8_t code[] = {
        0xba, SM_POWER_RESET & 0xff, SM_POWER_RESET >> 8, /* mov dx, reset register */
        0xb0, SM_POWER_RESET_VALUE,                       /* mov al, value */
        0xee,                                             /* out dx, al */
        0xf4,                                             /* hlt */
        0xeb, 0xfd,                                       /* jmp to the hlt */
    };

    return sm_mem_write(mem, SM_BOOT_RESET_GPA, code, sizeof(code));
}

static int load(struct sm_mem *mem, const struct sm_boot_config *cfg, int kernel_fd,
                int initrd_fd, struct sm_boot_entry *out, char *err, size_t errlen)
{
    struct initrd initrd = { 0 };
    struct sm_elf elf;
    int r;

    r = cmdline_write(mem, cfg->cmdline, err, errlen);
    if (!r)
        r = sm_elf_load(mem, kernel_fd, &elf, err, errlen);
    if (!r && initrd_fd >= 0)
        r = initrd_place(mem, initrd_fd, (elf.high + PAGE - 1) & ~(PAGE - 1), &initrd, err,
                         errlen);
    if (r)
        return r;
    if (elf.pvh_entry) {
        out->mode = SM_ENTRY_PVH;
        out->entry_gpa = elf.pvh_entry;
        out->info_gpa = SM_BOOT_START_INFO_GPA;
        r = start_info_write(mem, &initrd);
    } else {
        out->mode = SM_ENTRY_LINUX64;
        out->entry_gpa = elf.entry;
        out->info_gpa = SM_BOOT_PARAMS_GPA;
        r = linux64_write(mem, &initrd);
    }
    if (!r)
        r = reset_vector_write(mem);
    return r ? say(err, errlen, r, "kernel", "low memory is missing") : 0;
}

int sm_boot_load(struct sm_mem *mem, const struct sm_boot_config *cfg,
                 struct sm_boot_entry *out, char *err, size_t errlen)
{
    int kernel_fd, initrd_fd = -1, r;

    kernel_fd = open_file(cfg->kernel, "kernel", err, errlen);
    if (kernel_fd < 0)
        return kernel_fd;
    if (cfg->initrd) {
        initrd_fd = open_file(cfg->initrd, "initrd", err, errlen);
        if (initrd_fd < 0) {
            close(kernel_fd);
            return initrd_fd;
        }
    }
    r = load(mem, cfg, kernel_fd, initrd_fd, out, err, errlen);
    if (initrd_fd >= 0)
        close(initrd_fd);
    close(kernel_fd);
    return r;
}

int sm_boot_enter(struct sm_hv_vcpu *vcpu, const struct sm_boot_entry *entry)
{
    int err = sm_hv_vcpu_enter(vcpu, entry->mode, entry->entry_gpa, entry->info_gpa);

    if (err || entry->mode != SM_ENTRY_LINUX64)
        return err;
    err = sm_hv_reg_set(vcpu, SM_X86_CR3, SM_BOOT_PML4_GPA);
    if (!err)
        err = sm_hv_reg_set(vcpu, SM_X86_GDT_BASE, SM_BOOT_GDT_GPA);
    return err ? err : sm_hv_reg_set(vcpu, SM_X86_GDT_LIMIT, 31);
}
