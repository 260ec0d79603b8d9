/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The vmlinux loader. Headers are copied out of the file once and judged from
 * the copy; every number in them is the file's claim until checked against the
 * file's size and the guest's memory. Only when all segments fit is any copied.
 * Source: System V ABI, ELF-64 object file format; Xen, XEN_ELFNOTE_PHYS32_ENTRY.
 */
#include "boot.h"

#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "file.h"

#define PHDRS_MAX 64u
#define NOTES_MAX_BYTES 8192u
#define NOTE_PHYS32_ENTRY 18u

struct loader {
    struct sm_mem *mem;
    int fd;
    uint64_t file_bytes;
    Elf64_Ehdr ehdr;
    Elf64_Phdr phdrs[PHDRS_MAX];
    char *err;
    size_t errlen;
};

__attribute__((format(printf, 3, 4)))
static int refuse(struct loader *l, int code, const char *format, ...)
{
    va_list ap;

    if (l->err && l->errlen) {
        va_start(ap, format);
        vsnprintf(l->err, l->errlen, format, ap);
        va_end(ap);
    }
    return code;
}

static bool in_file(const struct loader *l, uint64_t offset, uint64_t len)
{
    return offset <= l->file_bytes && len <= l->file_bytes - offset;
}

static int read_headers(struct loader *l)
{
    Elf64_Ehdr *eh = &l->ehdr;
    uint64_t bytes;

    if (!in_file(l, 0, sizeof(*eh)) || sm_file_read(l->fd, eh, sizeof(*eh), 0) ||
        memcmp(eh->e_ident, ELFMAG, SELFMAG))
        return refuse(l, -ENOEXEC, "not a kernel: not an ELF file (a bzImage is unpacked first)");
    if (eh->e_ident[EI_CLASS] != ELFCLASS64 || eh->e_ident[EI_DATA] != ELFDATA2LSB ||
        eh->e_machine != EM_X86_64)
        return refuse(l, -ENOEXEC, "not a kernel for this machine: not a 64-bit x86 ELF file");
    if (eh->e_type != ET_EXEC)
        return refuse(l, -ENOEXEC, "not a kernel: an ELF file, but not a fixed executable");
    if (eh->e_phentsize != sizeof(Elf64_Phdr) || !eh->e_phnum || eh->e_phnum > PHDRS_MAX)
        return refuse(l, -ENOEXEC, "not a kernel: %u program headers of %u bytes", eh->e_phnum,
                      eh->e_phentsize);
    bytes = (uint64_t)eh->e_phnum * sizeof(Elf64_Phdr);
    if (!in_file(l, eh->e_phoff, bytes) || sm_file_read(l->fd, l->phdrs, bytes, eh->e_phoff))
        return refuse(l, -ENOEXEC, "kernel file is truncated: no program headers");
    return 0;
}

static bool overlaps_earlier(const struct loader *l, unsigned index)
{
    const Elf64_Phdr *a = &l->phdrs[index];

    for (unsigned i = 0; i < index; i++) {
        const Elf64_Phdr *b = &l->phdrs[i];

        /* Neither wraps: both were checked to be in memory. */
        if (b->p_type == PT_LOAD && b->p_memsz && a->p_paddr < b->p_paddr + b->p_memsz &&
            b->p_paddr < a->p_paddr + a->p_memsz)
            return true;
    }
    return false;
}

static int check_segment(struct loader *l, unsigned index, struct sm_elf *out)
{
    const Elf64_Phdr *ph = &l->phdrs[index];
    unsigned long long paddr = ph->p_paddr, memsz = ph->p_memsz;

    if (ph->p_filesz > ph->p_memsz || !in_file(l, ph->p_offset, ph->p_filesz))
        return refuse(l, -ENOEXEC, "kernel file is truncated: segment %u ends after the file",
                      index);
    if (paddr < SM_BOOT_KERNEL_MIN)
        return refuse(l, -ENOEXEC, "kernel wants address 0x%llx, which the VMM uses", paddr);
    if (!sm_mem_ptr(l->mem, paddr, memsz))
        return refuse(l, -ENOMEM,
                      "kernel does not fit in memory: it wants %llu KiB at 0x%llx", memsz >> 10,
                      paddr);
    if (overlaps_earlier(l, index))
        return refuse(l, -ENOEXEC, "not a kernel: its segments overlap");
    if (paddr + memsz > out->high)
        out->high = paddr + memsz;
    return 0;
}

static int check_segments(struct loader *l, struct sm_elf *out)
{
    for (unsigned i = 0; i < l->ehdr.e_phnum; i++) {
        int err;

        if (l->phdrs[i].p_type != PT_LOAD || !l->phdrs[i].p_memsz)
            continue;
        err = check_segment(l, i, out);
        if (err)
            return err;
    }
    return out->high ? 0 : refuse(l, -ENOEXEC, "not a kernel: nothing to load");
}

/* Each note: namesz, descsz, type, name and desc padded to 4. */
static uint64_t find_pvh_note(const uint8_t *notes, size_t len)
{
    size_t at = 0;

    while (len - at >= sizeof(Elf64_Nhdr)) {
        Elf64_Nhdr nh;
        size_t name_at = at + sizeof(nh), desc_at;
        uint64_t desc = 0;

        memcpy(&nh, notes + at, sizeof(nh));
        if (nh.n_namesz > len || nh.n_descsz > len)
            return 0;
        desc_at = name_at + ((nh.n_namesz + 3u) & ~3u);
        if (desc_at > len || nh.n_descsz > len - desc_at)
            return 0;
        if (nh.n_type == NOTE_PHYS32_ENTRY && nh.n_namesz == 4 &&
            !memcmp(notes + name_at, "Xen", 4) && (nh.n_descsz == 4 || nh.n_descsz == 8)) {
            memcpy(&desc, notes + desc_at, nh.n_descsz);
            return desc;
        }
        at = desc_at + ((nh.n_descsz + 3u) & ~3u);
        if (at > len)
            return 0;
    }
    return 0;
}

static void read_notes(struct loader *l, struct sm_elf *out)
{
    uint8_t notes[NOTES_MAX_BYTES];

    for (unsigned i = 0; i < l->ehdr.e_phnum && !out->pvh_entry; i++) {
        const Elf64_Phdr *ph = &l->phdrs[i];
        uint64_t len = ph->p_filesz < sizeof(notes) ? ph->p_filesz : sizeof(notes);

        if (ph->p_type != PT_NOTE || !in_file(l, ph->p_offset, len) ||
            sm_file_read(l->fd, notes, len, ph->p_offset))
            continue;
        out->pvh_entry = find_pvh_note(notes, len);
    }
}

static bool in_segments(const struct loader *l, uint64_t gpa)
{
    for (unsigned i = 0; i < l->ehdr.e_phnum; i++) {
        const Elf64_Phdr *ph = &l->phdrs[i];

        if (ph->p_type == PT_LOAD && gpa >= ph->p_paddr && gpa - ph->p_paddr < ph->p_filesz)
            return true;
    }
    return false;
}

static int copy_segments(struct loader *l)
{
    for (unsigned i = 0; i < l->ehdr.e_phnum; i++) {
        const Elf64_Phdr *ph = &l->phdrs[i];
        int err;

        if (ph->p_type != PT_LOAD || !ph->p_filesz)
            continue;
        err = sm_file_read(l->fd, sm_mem_ptr(l->mem, ph->p_paddr, ph->p_memsz), ph->p_filesz,
                      ph->p_offset);
        if (err)
            return refuse(l, err, "cannot read the kernel: %s", strerror(-err));
    }
    return 0;
}

int sm_elf_load(struct sm_mem *mem, int fd, struct sm_elf *out, char *err, size_t errlen)
{
    struct loader l = { .mem = mem, .fd = fd, .err = err, .errlen = errlen };
    struct stat st;
    int r;

    memset(out, 0, sizeof(*out));
    if (fstat(fd, &st) < 0)
        return refuse(&l, -errno, "cannot read the kernel: %s", strerror(errno));
    if (!S_ISREG(st.st_mode))
        return refuse(&l, -EINVAL, "not a kernel: not a regular file");
    l.file_bytes = (uint64_t)st.st_size;
    r = read_headers(&l);
    if (!r)
        r = check_segments(&l, out);
    if (r)
        return r;
    read_notes(&l, out);
    out->entry = l.ehdr.e_entry;
    if (!in_segments(&l, out->pvh_entry ? out->pvh_entry : out->entry))
        return refuse(&l, -ENOEXEC, "not a kernel: its entry is outside of it");
    return copy_segments(&l);
}
