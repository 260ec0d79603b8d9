/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Booting Linux on x86_64: an uncompressed vmlinux is copied to where its
 * program headers want it and entered directly, at its PVH entry when it has
 * the note, at its 64-bit entry otherwise. The initrd goes to the top of low
 * memory. Nothing is decompressed in the guest.
 *
 * Low memory, set once for both entries:
 *   0x00500  GDT (64-bit entry)
 *   0x06000  hvm_start_info, module list, memory map (PVH)
 *   0x07000  boot_params (64-bit entry)
 *   0x09000  page tables, identity map of 4 GiB (64-bit entry)
 *   0x20000  command line
 *   0xe0000  ACPI tables, RSDP first
 *   0xff000  VM generation id
 *   0xffff0  the reset vector: code that asks the reset register
 *
 * The kernel file is hostile: sizes, offsets and addresses are checked before
 * the first byte is copied. RAM of a new VM is zero, so a segment's zeroed tail
 * is not written; a VM takes one kernel, once.
 *
 * Threads. The owner's, before the VM starts.
 * Sources: xen/include/public/arch-x86/hvm/start_info.h, Linux
 * Documentation/x86/boot.rst.
 */
#ifndef SM_BOOT_H
#define SM_BOOT_H

#include <stddef.h>
#include <stdint.h>

#include "backend.h"
#include "mem.h"
#include "vm.h"

#define SM_BOOT_GDT_GPA 0x500ull
#define SM_BOOT_START_INFO_GPA 0x6000ull
#define SM_BOOT_PARAMS_GPA 0x7000ull
#define SM_BOOT_PML4_GPA 0x9000ull
#define SM_BOOT_CMDLINE_GPA 0x20000ull
#define SM_BOOT_CMDLINE_MAX 2048u /* with the NUL; COMMAND_LINE_SIZE */
#define SM_BOOT_ACPI_GPA 0xe0000ull
#define SM_BOOT_ACPI_BYTES 0x1f000ull
#define SM_BOOT_VMGENID_GPA 0xff000ull
#define SM_BOOT_RESET_GPA 0xffff0ull
#define SM_BOOT_KERNEL_MIN 0x100000ull
#define SM_BOOT_LOW_RAM_END 0xa0000ull

/* Where vCPU 0 starts. */
struct sm_boot_entry {
    enum sm_entry_mode mode;
    uint64_t entry_gpa, info_gpa;
};

/* Loads everything but ACPI, which needs the devices (core/vm.c). err gets one
 * line. */
int sm_boot_load(struct sm_mem *mem, const struct sm_boot_config *cfg,
                 struct sm_boot_entry *out, char *err, size_t errlen);
/* On vCPU 0's thread. */
int sm_boot_enter(struct sm_hv_vcpu *vcpu, const struct sm_boot_entry *entry);

/* The kernel file (core/boot_elf.c). */
struct sm_elf {
    uint64_t entry;     /* e_entry, physical for a vmlinux */
    uint64_t pvh_entry; /* 0: no note */
    uint64_t high;      /* end of the highest segment */
};

/* Checks and copies the segments of the ELF file behind fd. */
int sm_elf_load(struct sm_mem *mem, int fd, struct sm_elf *out, char *err, size_t errlen);

#endif
