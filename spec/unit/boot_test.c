/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernel loader: what a good vmlinux gets, and that a bad one is refused
 * with a line that says why and with nothing copied.
 */
#include <elf.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "boot.h"
#include "test.h"

#define RAM (16ull << 20)
#define KERNEL 0x1000000ull
#define TEXT_BYTES 0x2000u

/* A small vmlinux: two segments and a note, in one struct. */
struct image {
    Elf64_Ehdr eh;
    Elf64_Phdr ph[3];
    struct {
        Elf64_Nhdr head;
        char name[4];
        uint64_t desc;
    } note;
    uint8_t text[TEXT_BYTES];
};

static struct image good_image(bool pvh)
{
    struct image im;

    memset(&im, 0, sizeof(im));
    memcpy(im.eh.e_ident, ELFMAG, SELFMAG);
    im.eh.e_ident[EI_CLASS] = ELFCLASS64;
    im.eh.e_ident[EI_DATA] = ELFDATA2LSB;
    im.eh.e_type = ET_EXEC;
    im.eh.e_machine = EM_X86_64;
    im.eh.e_entry = 0x200000;
    im.eh.e_phoff = offsetof(struct image, ph);
    im.eh.e_phentsize = sizeof(Elf64_Phdr);
    im.eh.e_phnum = 3;
    im.ph[0] = (Elf64_Phdr){ .p_type = PT_LOAD,
                             .p_offset = offsetof(struct image, text),
                             .p_paddr = 0x200000,
                             .p_filesz = 0x1000,
                             .p_memsz = 0x1000 };
    im.ph[1] = (Elf64_Phdr){ .p_type = PT_LOAD,
                             .p_offset = offsetof(struct image, text) + 0x1000,
                             .p_paddr = 0x400000,
                             .p_filesz = 0x1000,
                             .p_memsz = 0x5000 };
    im.ph[2] = (Elf64_Phdr){ .p_type = PT_NOTE,
                             .p_offset = offsetof(struct image, note),
                             .p_filesz = sizeof(im.note) };
    im.note.head = (Elf64_Nhdr){ .n_namesz = 4, .n_descsz = 8, .n_type = 18 };
    memcpy(im.note.name, pvh ? "Xen" : "Foo", 4);
    im.note.desc = 0x200040;
    memset(im.text, 0xcc, sizeof(im.text));
    return im;
}

static int file_with(const void *p, size_t len)
{
    int fd = memfd_create("kernel", MFD_CLOEXEC);

    CHECK(fd >= 0 && write(fd, p, len) == (ssize_t)len);
    return fd;
}

static void path_of(int fd, char path[32])
{
    snprintf(path, 32, "/proc/self/fd/%d", fd);
}

static void ram_map(struct sm_mem *mem, uint64_t bytes)
{
    struct sm_mem_desc desc = { .len_bytes = bytes, .kind = SM_MEM_ANON, .fd = -1 };

    sm_mem_init(mem, NULL);
    CHECK_EQ(sm_mem_map(mem, &desc), 0);
}

static uint64_t peek(struct sm_mem *mem, uint64_t gpa, unsigned len)
{
    uint64_t v = 0;

    CHECK_EQ(sm_mem_read(mem, gpa, &v, len), 0);
    return v;
}

static int load_fd(struct sm_mem *mem, int kernel, int initrd, const char *cmdline,
                   struct sm_boot_entry *entry, char err[128])
{
    char kernel_path[32], initrd_path[32];
    struct sm_boot_config cfg = { .kernel = kernel_path, .cmdline = cmdline };

    path_of(kernel, kernel_path);
    if (initrd >= 0) {
        path_of(initrd, initrd_path);
        cfg.initrd = initrd_path;
    }
    err[0] = 0;
    return sm_boot_load(mem, &cfg, entry, err, 128);
}

static void pvh_kernel_is_loaded_and_described(void)
{
    struct image im = good_image(true);
    int kernel = file_with(&im, sizeof(im)), initrd = file_with("initrd!", 7);
    struct sm_boot_entry entry;
    struct sm_mem mem;
    char err[128], text[16] = "";
    uint64_t modlist, memmap, rd;

    ram_map(&mem, RAM);
    CHECK_EQ(load_fd(&mem, kernel, initrd, "quiet init=/x", &entry, err), 0);
    CHECK_EQ(entry.mode, SM_ENTRY_PVH);
    CHECK_EQ(entry.entry_gpa, 0x200040);
    CHECK_EQ(entry.info_gpa, SM_BOOT_START_INFO_GPA);
    CHECK_EQ(peek(&mem, 0x200000, 4), 0xcccccccc);
    CHECK_EQ(peek(&mem, 0x400ffc, 8), 0xcccccccc); /* and zero after the file part */

    CHECK_EQ(peek(&mem, SM_BOOT_START_INFO_GPA, 4), 0x336ec578);
    CHECK_EQ(peek(&mem, SM_BOOT_START_INFO_GPA + 4, 4), 1);
    CHECK_EQ(peek(&mem, SM_BOOT_START_INFO_GPA + 12, 4), 1); /* modules */
    CHECK_EQ(peek(&mem, SM_BOOT_START_INFO_GPA + 32, 8), SM_BOOT_ACPI_GPA);
    modlist = peek(&mem, SM_BOOT_START_INFO_GPA + 16, 8);
    rd = peek(&mem, modlist, 8);
    CHECK_EQ(peek(&mem, modlist + 8, 8), 7);
    CHECK(rd % 4096 == 0 && rd >= 0x405000 && rd + 7 <= RAM);
    CHECK_EQ(sm_mem_read(&mem, rd, text, 7), 0);
    CHECK(!strcmp(text, "initrd!"));
    CHECK_EQ(sm_mem_read(&mem, peek(&mem, SM_BOOT_START_INFO_GPA + 24, 8), text, 14), 0);
    CHECK(!strcmp(text, "quiet init=/x"));

    memmap = peek(&mem, SM_BOOT_START_INFO_GPA + 40, 8);
    CHECK_EQ(peek(&mem, SM_BOOT_START_INFO_GPA + 48, 4), 3);
    CHECK_EQ(peek(&mem, memmap, 8), 0);
    CHECK_EQ(peek(&mem, memmap + 8, 8), 0xa0000);
    CHECK_EQ(peek(&mem, memmap + 16, 4), 1);
    CHECK_EQ(peek(&mem, memmap + 24, 8), 0xe0000); /* ACPI is reserved */
    CHECK_EQ(peek(&mem, memmap + 24 + 16, 4), 2);
    CHECK_EQ(peek(&mem, memmap + 48, 8), 0x100000);
    CHECK_EQ(peek(&mem, memmap + 56, 8), RAM - 0x100000);
    sm_mem_destroy(&mem);
    close(kernel);
    close(initrd);
}

static void kernel_without_the_note_enters_in_long_mode(void)
{
    struct image im = good_image(false);
    int kernel = file_with(&im, sizeof(im)), initrd = file_with("initrd!", 7);
    struct sm_boot_entry entry;
    struct sm_mem mem;
    char err[128];

    ram_map(&mem, RAM);
    CHECK_EQ(load_fd(&mem, kernel, initrd, NULL, &entry, err), 0);
    CHECK_EQ(entry.mode, SM_ENTRY_LINUX64);
    CHECK_EQ(entry.entry_gpa, 0x200000);
    CHECK_EQ(entry.info_gpa, SM_BOOT_PARAMS_GPA);
    CHECK_EQ(peek(&mem, SM_BOOT_PARAMS_GPA + 0x1fe, 2), 0xaa55);
    CHECK_EQ(peek(&mem, SM_BOOT_PARAMS_GPA + 0x202, 4), 0x53726448);
    CHECK_EQ(peek(&mem, SM_BOOT_PARAMS_GPA + 0x21c, 4), 7);
    CHECK_EQ(peek(&mem, SM_BOOT_PARAMS_GPA + 0x070, 8), SM_BOOT_ACPI_GPA);
    CHECK_EQ(peek(&mem, SM_BOOT_PARAMS_GPA + 0x1e8, 1), 3);
    /* Walk the identity map to 3 GiB + 2 MiB. */
    uint64_t pdpt = peek(&mem, SM_BOOT_PML4_GPA, 8) & ~0xfffull;
    uint64_t pd = peek(&mem, pdpt + 3 * 8, 8) & ~0xfffull;
    CHECK_EQ(peek(&mem, pd + 8, 8), 0xc0200083);
    sm_mem_destroy(&mem);
    close(kernel);
    close(initrd);
}

/* The image, changed, is refused with a line that contains `why`; guest memory
 * above the boot area stays untouched. */
static void refused(const struct image *im, size_t len, int code, const char *why)
{
    int kernel = file_with(im, len);
    struct sm_elf elf;
    struct sm_mem mem;
    char err[160] = "";
    const uint8_t *ram;

    ram_map(&mem, RAM);
    CHECK_EQ(sm_elf_load(&mem, kernel, &elf, err, sizeof(err)), code);
    if (!strstr(err, why)) {
        fprintf(stderr, "said: %s\n", err);
        CHECK(!"the line says why");
    }
    ram = sm_mem_ptr(&mem, 0x200000, TEXT_BYTES);
    for (unsigned i = 0; i < TEXT_BYTES; i++)
        if (ram[i]) {
            CHECK(!"nothing was copied");
            break;
        }
    sm_mem_destroy(&mem);
    close(kernel);
}

static void hostile_kernels_are_refused(void)
{
    const struct image good = good_image(true);
    struct image im;

#define CASE(change, len, code, why)      \
    do {                                  \
        im = good;                        \
        change;                           \
        refused(&im, (len), (code), why); \
    } while (0)

    CASE((void)0, 0, -ENOEXEC, "not an ELF");
    CASE((void)0, 40, -ENOEXEC, "not an ELF");
    CASE(memcpy(&im, "MZ", 2), sizeof(im), -ENOEXEC, "bzImage");
    CASE(im.eh.e_ident[EI_CLASS] = ELFCLASS32, sizeof(im), -ENOEXEC, "64-bit x86");
    CASE(im.eh.e_machine = EM_AARCH64, sizeof(im), -ENOEXEC, "64-bit x86");
    CASE(im.eh.e_type = ET_DYN, sizeof(im), -ENOEXEC, "fixed executable");
    CASE(im.eh.e_phnum = 0, sizeof(im), -ENOEXEC, "program headers");
    CASE(im.eh.e_phnum = 0xffff, sizeof(im), -ENOEXEC, "program headers");
    CASE(im.eh.e_phentsize = 1, sizeof(im), -ENOEXEC, "program headers");
    CASE(im.eh.e_phoff = ~0ull - 8, sizeof(im), -ENOEXEC, "truncated");
    CASE((void)0, sizeof(im) - TEXT_BYTES / 2 - 1, -ENOEXEC, "truncated");
    CASE(im.ph[0].p_offset = ~0ull - 0x10, sizeof(im), -ENOEXEC, "truncated");
    CASE(im.ph[0].p_filesz = ~0ull, sizeof(im), -ENOEXEC, "truncated");
    CASE(im.ph[0].p_memsz = 1, sizeof(im), -ENOEXEC, "truncated");
    CASE(im.ph[1].p_memsz = ~0ull, sizeof(im), -ENOMEM, "does not fit");
    CASE(im.ph[1].p_paddr = ~0ull - 0xfff, sizeof(im), -ENOMEM, "does not fit");
    CASE(im.ph[1].p_paddr = RAM - 0x1000, sizeof(im), -ENOMEM, "does not fit");
    CASE(im.ph[1].p_paddr = 0x9000, sizeof(im), -ENOEXEC, "which the VMM uses");
    CASE(im.ph[1].p_paddr = 0xff000, sizeof(im), -ENOEXEC, "which the VMM uses");
    CASE(im.ph[1].p_paddr = 0x200800, sizeof(im), -ENOEXEC, "overlap");
    CASE(im.ph[0].p_type = im.ph[1].p_type = PT_NULL, sizeof(im), -ENOEXEC, "nothing to load");
    CASE(im.note.desc = 0x300000, sizeof(im), -ENOEXEC, "entry is outside");
    CASE(im.note.desc = 0x401000, sizeof(im), -ENOEXEC, "entry is outside"); /* in the bss */
    CASE((im.note.name[0] = 'x', im.eh.e_entry = 0), sizeof(im), -ENOEXEC, "entry is outside");
#undef CASE
}

/* Notes that lie about their sizes are no notes: the 64-bit entry is used. */
static void lying_notes_are_ignored(void)
{
    static const uint32_t sizes[][2] = {
        { 4, 0xffffffff }, { 0xffffffff, 8 }, { 0xfffffffd, 0xfffffffd }, { 4, 9000 }, { 4, 3 },
    };

    for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        struct image im = good_image(true);
        struct sm_elf elf;
        struct sm_mem mem;
        int kernel;

        im.note.head.n_namesz = sizes[i][0];
        im.note.head.n_descsz = sizes[i][1];
        kernel = file_with(&im, sizeof(im));
        ram_map(&mem, RAM);
        CHECK_EQ(sm_elf_load(&mem, kernel, &elf, NULL, 0), 0);
        CHECK_EQ(elf.pvh_entry, 0);
        sm_mem_destroy(&mem);
        close(kernel);
    }
}

static void bad_boot_files_say_so(void)
{
    struct image im = good_image(true);
    int kernel = file_with(&im, sizeof(im)), empty = file_with("", 0), big = file_with("x", 1);
    char err[128], *line = malloc(3000);
    struct sm_boot_config cfg = { .kernel = "/nonexistent/vmlinux" };
    struct sm_boot_entry entry;
    struct sm_mem mem;

    ram_map(&mem, RAM);
    CHECK_EQ(sm_boot_load(&mem, &cfg, &entry, err, sizeof(err)), -ENOENT);
    CHECK(strstr(err, "/nonexistent/vmlinux") != NULL);
    cfg.kernel = "/tmp";
    CHECK(sm_boot_load(&mem, &cfg, &entry, err, sizeof(err)) < 0);
    CHECK(strstr(err, "not a regular file") != NULL);

    CHECK_EQ(load_fd(&mem, kernel, empty, "", &entry, err), -EINVAL);
    CHECK(strstr(err, "initrd") && strstr(err, "empty"));
    CHECK_EQ(ftruncate(big, (off_t)RAM), 0);
    CHECK_EQ(load_fd(&mem, kernel, big, "", &entry, err), -ENOMEM);
    CHECK(strstr(err, "initrd") && strstr(err, "fit"));
    memset(line, 'a', 2999);
    line[2999] = 0;
    CHECK_EQ(load_fd(&mem, kernel, -1, line, &entry, err), -E2BIG);
    line[2047] = 0;
    CHECK_EQ(load_fd(&mem, kernel, -1, line, &entry, err), 0);
    sm_mem_destroy(&mem);
    ram_map(&mem, 0x4000); /* not even room for the boot area */
    CHECK_EQ(load_fd(&mem, kernel, -1, "", &entry, err), -ENOMEM);
    sm_mem_destroy(&mem);
    free(line);
    close(kernel);
    close(empty);
    close(big);
}

int main(void)
{
    TEST(pvh_kernel_is_loaded_and_described);
    TEST(kernel_without_the_note_enters_in_long_mode);
    TEST(hostile_kernels_are_refused);
    TEST(lying_notes_are_ignored);
    TEST(bad_boot_files_say_so);
    return test_report();
}
