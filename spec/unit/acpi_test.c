/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The ACPI tables, judged by ACPICA's own disassembler (iasl): every table is
 * accepted without a complaint, and says what it should.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "acpi.h"
#include "aml.h"
#include "test.h"

#define GPA 0xe0000u

static uint8_t tables[1 << 17];
static char dir[] = "/tmp/sm-acpi-XXXXXX";

static struct sm_acpi_config full(unsigned cpus, unsigned devices)
{
    struct sm_acpi_config cfg = {
        .cpus = cpus, .serial = true, .pvpanic = true, .vmgenid_gpa = 0xff000, .ged_gsi = 9,
        .virtio_count = devices,
    };

    for (unsigned i = 0; i < devices; i++)
        cfg.virtio[i] = (struct sm_acpi_virtio){ 0xd0000000u + i * 0x1000, 0x1000, 5 + i };
    return cfg;
}

static uint32_t u32(size_t at)
{
    return (uint32_t)tables[at] | (uint32_t)tables[at + 1] << 8 | (uint32_t)tables[at + 2] << 16 |
           (uint32_t)tables[at + 3] << 24;
}

static uint8_t sum(size_t at, size_t len)
{
    uint8_t s = 0;

    for (size_t i = 0; i < len; i++)
        s = (uint8_t)(s + tables[at + i]);
    return s;
}

/* Offset of the table with this signature, found as a kernel does: RSDP, XSDT,
 * FADT. 0 when it is not there. */
static size_t find(const char *signature, size_t len)
{
    size_t xsdt = u32(24) - GPA;

    CHECK(xsdt < len && !memcmp(tables + xsdt, "XSDT", 4));
    if (!strcmp(signature, "XSDT"))
        return xsdt;
    for (size_t at = xsdt + 36; at < xsdt + u32(xsdt + 4); at += 8) {
        size_t table = u32(at) - GPA;

        if (table < len && !memcmp(tables + table, signature, 4))
            return table;
        if (!strcmp(signature, "DSDT") && table < len && !memcmp(tables + table, "FACP", 4))
            return u32(table + 140) - GPA;
    }
    return 0;
}

/* The disassembly of a table, or NULL when iasl complains. */
static char *disassemble(const char *signature, size_t at)
{
    static char text[1 << 18];
    char path[96], command[256];
    FILE *f;
    size_t n;

    snprintf(path, sizeof(path), "%s/%s.dat", dir, signature);
    f = fopen(path, "w");
    if (!f)
        return NULL;
    fwrite(tables + at, 1, u32(at + 4), f);
    fclose(f);
    snprintf(command, sizeof(command), "cd %s && iasl -d %s.dat >log 2>&1 && ! grep -iE "
             "'error|warning|invalid' log", dir, signature);
    if (system(command))
        return NULL;
    snprintf(path, sizeof(path), "%s/%s.dsl", dir, signature);
    f = fopen(path, "r");
    if (!f)
        return NULL;
    n = fread(text, 1, sizeof(text) - 1, f);
    text[n] = 0;
    fclose(f);
    return strstr(text, "ERROR") || strstr(text, "Invalid") ? NULL : text;
}

static unsigned count(const char *text, const char *what)
{
    unsigned n = 0;

    for (; (text = strstr(text, what)); text++)
        n++;
    return n;
}

static void checksums_and_links_hold(void)
{
    static const char *const names[] = { "XSDT", "FACP", "APIC", "DSDT" };
    struct sm_acpi_config cfg = full(64, 16);
    size_t len = 0;

    CHECK_EQ(sm_acpi_build(&cfg, GPA, tables, sizeof(tables), &len), 0);
    CHECK(!memcmp(tables, "RSD PTR ", 8));
    CHECK_EQ(sum(0, 20), 0);
    CHECK_EQ(sum(0, 36), 0);
    for (unsigned i = 0; i < 4; i++) {
        size_t at = find(names[i], len);

        CHECK(at != 0 && at + u32(at + 4) <= len);
        CHECK_EQ(sum(at, u32(at + 4)), 0);
    }
}

static void dsdt_names_every_device(void)
{
    struct sm_acpi_config cfg = full(2, 16);
    size_t len = 0;
    char *text;

    CHECK_EQ(sm_acpi_build(&cfg, GPA, tables, sizeof(tables), &len), 0);
    text = disassemble("DSDT", find("DSDT", len));
    CHECK(text != NULL);
    if (!text)
        return;
    CHECK_EQ(count(text, "\"LNRO0005\""), 16);
    CHECK_EQ(count(text, "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive"), 18);
    CHECK(strstr(text, "0xD000F000") != NULL);
    CHECK(strstr(text, "EisaId (\"PNP0501\")") != NULL);
    CHECK(strstr(text, "\"QEMU0001\"") != NULL);
    CHECK(strstr(text, "0x0505") != NULL);
    CHECK(strstr(text, "\"ACPI0013\"") != NULL);
    CHECK(strstr(text, "Notify (\\_SB.VGEN, 0x80)") != NULL);
    CHECK(strstr(text, "0x000FF000") != NULL);
    CHECK(strstr(text, "Name (\\_S5, Package (0x04)") != NULL);
}

static void a_bare_machine_has_a_bare_dsdt(void)
{
    struct sm_acpi_config cfg = { .cpus = 1 };
    size_t len = 0;
    char *text;

    CHECK_EQ(sm_acpi_build(&cfg, GPA, tables, sizeof(tables), &len), 0);
    text = disassemble("DSDT", find("DSDT", len));
    CHECK(text != NULL);
    CHECK(text && !strstr(text, "Device ("));
    CHECK(text && strstr(text, "\\_S5") != NULL);
}

static void fadt_is_hardware_reduced(void)
{
    struct sm_acpi_config cfg = full(1, 0);
    size_t len = 0;
    char *text;

    CHECK_EQ(sm_acpi_build(&cfg, GPA, tables, sizeof(tables), &len), 0);
    text = disassemble("FACP", find("FACP", len));
    CHECK(text != NULL);
    if (!text)
        return;
    CHECK(strstr(text, "Hardware Reduced (V5) : 1") != NULL);
    CHECK(strstr(text, "Reset Register Supported (V2) : 1") != NULL);
    CHECK(strstr(text, "0000000000000600") != NULL); /* sleep control */
    CHECK(strstr(text, "0000000000000601") != NULL); /* sleep status */
    CHECK(strstr(text, "0000000000000602") != NULL); /* reset */
    CHECK(strstr(text, "CMOS RTC Not Present (V5) : 1") != NULL);
    CHECK(strstr(text, "8042 Present on ports 60/64 (V2) : 0") != NULL);
}

static void madt_has_every_cpu(void)
{
    struct sm_acpi_config cfg = full(64, 0);
    size_t len = 0;
    char *text;

    CHECK_EQ(sm_acpi_build(&cfg, GPA, tables, sizeof(tables), &len), 0);
    text = disassemble("APIC", find("APIC", len));
    CHECK(text != NULL);
    if (!text)
        return;
    CHECK_EQ(count(text, "[Processor Local APIC]"), 64);
    CHECK_EQ(count(text, "[I/O APIC]"), 1);
    CHECK(strstr(text, "Local Apic ID : 3F") != NULL);
    CHECK(strstr(text, "FEC00000") != NULL);
}

static void what_does_not_fit_is_refused(void)
{
    struct sm_acpi_config cfg = full(4, 8), bad;
    size_t len = 0, need;

    CHECK_EQ(sm_acpi_build(&cfg, GPA, tables, sizeof(tables), &len), 0);
    need = len;
    for (size_t cap = 0; cap < need; cap++)
        CHECK_EQ(sm_acpi_build(&cfg, GPA, tables, cap, &len), -ENOSPC);
    CHECK_EQ(sm_acpi_build(&cfg, GPA, tables, need, &len), 0);
    bad = cfg;
    bad.cpus = 0;
    CHECK_EQ(sm_acpi_build(&bad, GPA, tables, sizeof(tables), &len), -EINVAL);
    bad = cfg;
    bad.virtio_count = SM_ACPI_MAX_VIRTIO + 1;
    CHECK_EQ(sm_acpi_build(&bad, GPA, tables, sizeof(tables), &len), -EINVAL);
    bad = cfg;
    bad.virtio[0].gpa = 1ull << 32;
    CHECK_EQ(sm_acpi_build(&bad, GPA, tables, sizeof(tables), &len), -EINVAL);
}

/* PkgLength at every size where its form changes: 1, 2 and 3 bytes. */
static void package_lengths_are_exact(void)
{
    static uint8_t buf[1 << 17], body[1 << 17];
    static const size_t sizes[] = { 0, 1, 61, 62, 63, 64, 4093, 4094, 4095, 4096, 70000 };

    for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        struct sm_aml aml = { .buf = buf, .cap = sizeof(buf) };
        size_t mark = sm_aml_begin(&aml, 0x10), length, n;

        sm_aml_bytes(&aml, body, sizes[i]);
        sm_aml_end(&aml, mark);
        n = buf[1] >> 6;
        length = n ? buf[1] & 15u : buf[1] & 63u;
        for (size_t b = 0; b < n; b++)
            length |= (size_t)buf[2 + b] << (4 + 8 * b);
        CHECK_EQ(length, 1 + n + sizes[i]);
        CHECK_EQ(aml.len, 1 + length);
    }
}

int main(void)
{
    char command[64];

    if (!mkdtemp(dir) || system("iasl -v >/dev/null 2>&1")) {
        fprintf(stderr, "acpi: this test needs iasl (acpica-tools)\n");
        return 1;
    }
    TEST(checksums_and_links_hold);
    TEST(dsdt_names_every_device);
    TEST(a_bare_machine_has_a_bare_dsdt);
    TEST(fadt_is_hardware_reduced);
    TEST(madt_has_every_cpu);
    TEST(what_does_not_fit_is_refused);
    TEST(package_lengths_are_exact);
    snprintf(command, sizeof(command), "rm -rf %s", dir);
    CHECK_EQ(system(command), 0);
    return test_report();
}
