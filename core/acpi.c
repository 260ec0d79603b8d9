/* SPDX-License-Identifier: Apache-2.0 */
/* ACPI tables; see acpi.h. */
#include "acpi.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "aml.h"
#include "dev/power.h"
#include "dev/pvpanic.h"
#include "dev/serial.h"

#define HEADER_BYTES 36
#define RSDP_BYTES 36
#define FADT_BYTES 276
#define OP_NOTIFY 0x86
#define OP_IF 0xa0
#define OP_LEQUAL 0x93
#define OP_ARG0 0x68
#define OP_PACKAGE 0x12

/* FADT, IA-PC boot architecture flags: what is not there need not be probed. */
#define BOOT_VGA_NOT_PRESENT (1u << 2)
#define BOOT_NO_CMOS_RTC (1u << 5)
/* FADT, fixed feature flags. */
#define FADT_WBINVD (1u << 0)
#define FADT_PWR_BUTTON (1u << 4) /* set: no fixed power button */
#define FADT_SLP_BUTTON (1u << 5) /* set: no fixed sleep button */
#define FADT_RESET_REG (1u << 10)
#define FADT_HW_REDUCED (1u << 20)

enum { SPACE_IO = 1 };

static uint8_t sum(const uint8_t *p, size_t len)
{
    uint8_t s = 0;

    while (len--)
        s = (uint8_t)(s + *p++);
    return s;
}

static void poke_u16(uint8_t *p, uint16_t v)
{
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}

static void poke_u32(uint8_t *p, uint32_t v)
{
    poke_u16(p, (uint16_t)v);
    poke_u16(p + 2, (uint16_t)(v >> 16));
}

static void poke_u64(uint8_t *p, uint64_t v)
{
    poke_u32(p, (uint32_t)v);
    poke_u32(p + 4, (uint32_t)(v >> 32));
}

/* A register of one byte in the port space. */
static void poke_gas(uint8_t *p, uint16_t port)
{
    p[0] = SPACE_IO;
    p[1] = 8; /* bits wide */
    p[2] = 0;
    p[3] = 1; /* byte access */
    poke_u64(p + 4, port);
}

static size_t table_begin(struct sm_aml *out, const char *signature, uint8_t revision)
{
    size_t at = out->len;

    sm_aml_bytes(out, signature, 4);
    sm_aml_u32(out, 0); /* length, table_end */
    sm_aml_u8(out, revision);
    sm_aml_u8(out, 0); /* checksum, table_end */
    sm_aml_bytes(out, "SM    ", 6);
    sm_aml_bytes(out, "SMMICROV", 8);
    sm_aml_u32(out, 1);
    sm_aml_bytes(out, "SM  ", 4);
    sm_aml_u32(out, 1);
    return at;
}

/* Pads to 16 bytes, so that the next table is aligned. */
static void table_end(struct sm_aml *out, size_t at)
{
    uint8_t *table = out->buf + at;
    size_t len = out->len - at;

    if (out->overflow)
        return;
    poke_u32(table + 4, (uint32_t)len);
    table[9] = 0;
    table[9] = (uint8_t)-sum(table, len);
    while (out->len % 16 && !out->overflow)
        sm_aml_u8(out, 0);
}

/* --- DSDT --------------------------------------------------------------- */

static void virtio_device(struct sm_aml *out, const struct sm_acpi_virtio *dev, unsigned index)
{
    struct sm_aml_resources res;
    char seg[8];
    size_t mark;

    snprintf(seg, sizeof(seg), "VR%02X", index & 0xff);
    mark = sm_aml_device(out, seg);
    sm_aml_name(out, "_HID");
    sm_aml_string(out, "LNRO0005");
    sm_aml_name(out, "_UID");
    sm_aml_int(out, index);
    sm_aml_name(out, "_CRS");
    res = sm_aml_resources_begin(out);
    sm_aml_memory32(out, (uint32_t)dev->gpa, dev->len_bytes);
    sm_aml_interrupt(out, dev->gsi);
    sm_aml_resources_end(out, res);
    sm_aml_end(out, mark);
}

static void serial_device(struct sm_aml *out)
{
    struct sm_aml_resources res;
    size_t mark = sm_aml_device(out, "COM1");

    sm_aml_name(out, "_HID");
    sm_aml_eisaid(out, "PNP0501");
    sm_aml_name(out, "_UID");
    sm_aml_int(out, 0);
    sm_aml_name(out, "_CRS");
    res = sm_aml_resources_begin(out);
    sm_aml_io(out, SM_SERIAL_PORT, SM_SERIAL_PORTS);
    sm_aml_interrupt(out, SM_SERIAL_GSI);
    sm_aml_resources_end(out, res);
    sm_aml_end(out, mark);
}

static void pvpanic_device(struct sm_aml *out)
{
    struct sm_aml_resources res;
    size_t mark = sm_aml_device(out, "PEVT");

    sm_aml_name(out, "_HID");
    sm_aml_string(out, "QEMU0001");
    sm_aml_name(out, "_CRS");
    res = sm_aml_resources_begin(out);
    sm_aml_io(out, SM_PVPANIC_PORT, 1);
    sm_aml_resources_end(out, res);
    sm_aml_end(out, mark);
}

static void vmgenid_device(struct sm_aml *out, uint64_t gpa)
{
    size_t mark = sm_aml_device(out, "VGEN"), package;

    sm_aml_name(out, "_HID");
    sm_aml_string(out, "SMVM0001");
    sm_aml_name(out, "_CID"); /* the specified one, and the one kernels match */
    package = sm_aml_begin(out, OP_PACKAGE);
    sm_aml_u8(out, 2);
    sm_aml_string(out, "VM_Gen_Counter");
    sm_aml_string(out, "VMGENCTR");
    sm_aml_end(out, package);
    sm_aml_name(out, "_DDN");
    sm_aml_string(out, "VM_Gen_Counter");
    sm_aml_name(out, "ADDR");
    package = sm_aml_begin(out, OP_PACKAGE);
    sm_aml_u8(out, 2);
    sm_aml_int(out, (uint32_t)gpa);
    sm_aml_int(out, gpa >> 32);
    sm_aml_end(out, package);
    sm_aml_end(out, mark);
}

/* The event device: one line, whose only meaning is "the generation changed". */
static void event_device(struct sm_aml *out, uint32_t gsi)
{
    struct sm_aml_resources res;
    size_t mark = sm_aml_device(out, "GED0"), method, cond;

    sm_aml_name(out, "_HID");
    sm_aml_string(out, "ACPI0013");
    sm_aml_name(out, "_UID");
    sm_aml_int(out, 0);
    sm_aml_name(out, "_CRS");
    res = sm_aml_resources_begin(out);
    sm_aml_interrupt(out, gsi);
    sm_aml_resources_end(out, res);
    method = sm_aml_method(out, "_EVT", 1);
    cond = sm_aml_begin(out, OP_IF);
    sm_aml_u8(out, OP_LEQUAL);
    sm_aml_u8(out, OP_ARG0);
    sm_aml_int(out, gsi);
    sm_aml_u8(out, OP_NOTIFY);
    sm_aml_path(out, "\\_SB_.VGEN");
    sm_aml_int(out, 0x80);
    sm_aml_end(out, cond);
    sm_aml_end(out, method);
    sm_aml_end(out, mark);
}

static void dsdt(struct sm_aml *out, const struct sm_acpi_config *cfg)
{
    size_t at = table_begin(out, "DSDT", 2), scope, package;

    scope = sm_aml_scope(out, "\\_SB_");
    for (unsigned i = 0; i < cfg->virtio_count; i++)
        virtio_device(out, &cfg->virtio[i], i);
    if (cfg->serial)
        serial_device(out);
    if (cfg->pvpanic)
        pvpanic_device(out);
    if (cfg->vmgenid_gpa) {
        vmgenid_device(out, cfg->vmgenid_gpa);
        event_device(out, cfg->ged_gsi);
    }
    sm_aml_end(out, scope);
    sm_aml_name(out, "\\_S5_");
    package = sm_aml_begin(out, OP_PACKAGE);
    sm_aml_u8(out, 4);
    sm_aml_int(out, SM_POWER_S5);
    sm_aml_int(out, SM_POWER_S5);
    sm_aml_int(out, 0);
    sm_aml_int(out, 0);
    sm_aml_end(out, package);
    table_end(out, at);
}

/* --- fixed tables ------------------------------------------------------- */

static void fadt(struct sm_aml *out, uint64_t dsdt_gpa)
{
    static const uint8_t zero[FADT_BYTES - HEADER_BYTES];
    size_t at = table_begin(out, "FACP", 6);
    uint8_t *t;

    sm_aml_bytes(out, zero, sizeof(zero));
    if (out->overflow)
        return;
    t = out->buf + at;
    poke_u16(t + 109, BOOT_VGA_NOT_PRESENT | BOOT_NO_CMOS_RTC);
    poke_u32(t + 112, FADT_WBINVD | FADT_PWR_BUTTON | FADT_SLP_BUTTON | FADT_RESET_REG |
                          FADT_HW_REDUCED);
    poke_gas(t + 116, SM_POWER_RESET);
    t[128] = SM_POWER_RESET_VALUE;
    t[131] = 4; /* minor version */
    poke_u64(t + 140, dsdt_gpa);
    poke_gas(t + 244, SM_POWER_SLEEP_CONTROL);
    poke_gas(t + 256, SM_POWER_SLEEP_STATUS);
    table_end(out, at);
}

static void madt(struct sm_aml *out, unsigned cpus)
{
    size_t at = table_begin(out, "APIC", 5);

    sm_aml_u32(out, SM_ACPI_LAPIC_GPA);
    sm_aml_u32(out, 0); /* no 8259 to mask */
    for (unsigned i = 0; i < cpus; i++) {
        sm_aml_u8(out, 0); /* local APIC */
        sm_aml_u8(out, 8);
        sm_aml_u8(out, (uint8_t)i); /* processor uid */
        sm_aml_u8(out, (uint8_t)i); /* APIC id */
        sm_aml_u32(out, 1);         /* enabled */
    }
    sm_aml_u8(out, 1); /* IOAPIC */
    sm_aml_u8(out, 12);
    sm_aml_u8(out, 0); /* id, as KVM's resets */
    sm_aml_u8(out, 0);
    sm_aml_u32(out, SM_ACPI_IOAPIC_GPA);
    sm_aml_u32(out, 0); /* first GSI */
    table_end(out, at);
}

static void xsdt(struct sm_aml *out, const uint64_t *tables, unsigned count)
{
    size_t at = table_begin(out, "XSDT", 1);

    for (unsigned i = 0; i < count; i++)
        sm_aml_u64(out, tables[i]);
    table_end(out, at);
}

static void rsdp(uint8_t *p, uint64_t xsdt_gpa)
{
    memcpy(p, "RSD PTR ", 8);
    memcpy(p + 9, "SM    ", 6);
    p[15] = 2;
    poke_u32(p + 20, RSDP_BYTES);
    poke_u64(p + 24, xsdt_gpa);
    p[8] = (uint8_t)-sum(p, 20);
    p[32] = (uint8_t)-sum(p, RSDP_BYTES);
}

static bool config_ok(const struct sm_acpi_config *cfg)
{
    if (!cfg->cpus || cfg->cpus > 255 || cfg->virtio_count > SM_ACPI_MAX_VIRTIO)
        return false;
    for (unsigned i = 0; i < cfg->virtio_count; i++)
        if (cfg->virtio[i].gpa >> 32)
            return false;
    return true;
}

int sm_acpi_build(const struct sm_acpi_config *cfg, uint64_t gpa, uint8_t *buf, size_t cap,
                  size_t *len)
{
    struct sm_aml out = { .buf = buf, .cap = cap };
    uint64_t dsdt_gpa, xsdt_gpa, tables[2];
    static const uint8_t room[48]; /* for the RSDP, 16-byte aligned */

    if (!config_ok(cfg))
        return -EINVAL;
    sm_aml_bytes(&out, room, sizeof(room));
    dsdt_gpa = gpa + out.len;
    dsdt(&out, cfg);
    tables[0] = gpa + out.len;
    fadt(&out, dsdt_gpa);
    tables[1] = gpa + out.len;
    madt(&out, cfg->cpus);
    xsdt_gpa = gpa + out.len;
    xsdt(&out, tables, 2);
    if (out.overflow)
        return -ENOSPC;
    rsdp(buf, xsdt_gpa);
    *len = out.len;
    return 0;
}
