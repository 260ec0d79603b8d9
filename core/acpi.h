/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ACPI tables for an x86 guest: the description of this machine.
 *
 * Hardware-reduced ACPI, so no PM timer, no SCI, no fixed buttons: an RSDP, an
 * XSDT, a FADT (sleep control and status, reset register), a MADT (local APICs,
 * one IOAPIC) and a DSDT:
 *   LNRO0005  a virtio-mmio slot each, edge, active high
 *   PNP0501   COM1
 *   QEMU0001  pvpanic
 *   VMGENID   the generation id of a clone, told by an ACPI event device
 *   \_S5      how to power off
 *
 * Building is a pure function of the configuration: the tables are written
 * into a buffer as they will lie at `gpa`, the RSDP first.
 * Source: ACPI 6.4; virtio 1.2, 4.2.2 has no ACPI id, LNRO0005 is Linux's.
 */
#ifndef SM_ACPI_H
#define SM_ACPI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SM_ACPI_MAX_VIRTIO 32

struct sm_acpi_virtio {
    uint64_t gpa; /* below 4 GiB */
    uint32_t len_bytes;
    uint32_t gsi;
};

struct sm_acpi_config {
    unsigned cpus;
    bool serial, pvpanic;
    uint64_t vmgenid_gpa; /* 16 bytes; 0: none */
    uint32_t ged_gsi;     /* the event device's line, when there is a vmgenid */
    unsigned virtio_count;
    struct sm_acpi_virtio virtio[SM_ACPI_MAX_VIRTIO];
};

#define SM_ACPI_IOAPIC_GPA 0xfec00000u
#define SM_ACPI_LAPIC_GPA 0xfee00000u

/* -ENOSPC when cap is too small, -EINVAL for a configuration out of range. */
int sm_acpi_build(const struct sm_acpi_config *cfg, uint64_t gpa, uint8_t *buf, size_t cap,
                  size_t *len);

#endif
