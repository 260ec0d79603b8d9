/* SPDX-License-Identifier: Apache-2.0 */
/* Reading snapshots; see snap.h. Writing is in snap_save.c. */
#include "snap_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "crc32c.h"
#include "vm.h"

#define CHUNK_BYTES (1u << 20)

const char sm_snap_magic[8] = { 'S', 'M', 'S', 'N', 'A', 'P', '\r', '\n' };

struct sm_snap {
    int fd;
    struct sm_snap_info info;
    uint8_t *state, *meta; /* a byte more than they hold, so never NULL */
    size_t state_len, meta_len;
    struct sm_snap_area areas[SM_SNAP_AREAS];
    unsigned area_count;
};

int sm_snap_say(char *err, size_t errlen, int code, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    if (err && errlen) {
        vsnprintf(err, errlen, fmt, ap);
        for (char *c = err; *c; c++) /* names come from the file: one line, in print */
            *c = *c < ' ' || *c == 127 ? '?' : *c;
    }
    va_end(ap);
    return code;
}

static int read_at(int fd, void *buf, size_t len, uint64_t offset)
{
    uint8_t *p = buf;

    while (len) {
        ssize_t n = pread(fd, p, len, (off_t)offset);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EBADMSG;
        p += n;
        len -= (size_t)n;
        offset += (uint64_t)n;
    }
    return 0;
}

/* ---- opening ---- */

static bool terminated(const char *text, size_t size)
{
    return memchr(text, 0, size) != NULL;
}

static int check_header(const struct sm_snap_header *h, uint64_t file_bytes, char *err,
                        size_t errlen)
{
    if (memcmp(h->magic, sm_snap_magic, sizeof(h->magic)) != 0)
        return sm_snap_say(err, errlen, -EBADMSG, "this is no snapshot");
    if (h->crc != sm_crc32c(0, h, offsetof(struct sm_snap_header, crc)))
        return sm_snap_say(err, errlen, -EBADMSG, "damaged: its header does not match its checksum");
    if (h->version != SM_SNAP_VERSION)
        return sm_snap_say(err, errlen, -ENOTSUP, "of format %u, this sm reads %u", h->version,
                           SM_SNAP_VERSION);
    if (h->file_bytes != file_bytes)
        return sm_snap_say(err, errlen, -EBADMSG, "damaged: %llu bytes long, it should be %llu",
                           (unsigned long long)file_bytes, (unsigned long long)h->file_bytes);
    if (h->header_bytes != SM_SNAP_HEADER_BYTES || !terminated(h->arch, sizeof(h->arch)) ||
        !terminated(h->fingerprint, sizeof(h->fingerprint)))
        return sm_snap_say(err, errlen, -EBADMSG, "damaged: its header makes no sense");
    return 0;
}

/* A section into memory, held against its checksum. */
static int read_section(int fd, const struct sm_snap_section *s, uint64_t file_bytes, uint64_t max,
                        const char *name, uint8_t **out, char *err, size_t errlen)
{
    uint8_t *p;
    int e;

    if (s->offset < SM_SNAP_HEADER_BYTES || s->offset > file_bytes ||
        s->len_bytes > file_bytes - s->offset || s->len_bytes > max)
        return sm_snap_say(err, errlen, -EBADMSG, "damaged: its %s is not where it should be", name);
    p = malloc((size_t)s->len_bytes + 1);
    if (!p)
        return sm_snap_say(err, errlen, -ENOMEM, "out of memory");
    e = read_at(fd, p, (size_t)s->len_bytes, s->offset);
    if (e) {
        free(p);
        return sm_snap_say(err, errlen, e, "its %s cannot be read: %s", name, strerror(-e));
    }
    if (sm_crc32c(0, p, (size_t)s->len_bytes) != s->crc) {
        free(p);
        return sm_snap_say(err, errlen, -EBADMSG, "damaged: its %s does not match its checksum",
                           name);
    }
    *out = p;
    return 0;
}

static bool area_fits(const struct sm_snap_area *a, uint64_t end)
{
    return (a->kind == SM_SNAP_RAM || a->kind == SM_SNAP_BLOB) && a->len_bytes &&
           a->offset >= SM_SNAP_HEADER_BYTES && !(a->offset % SM_SNAP_UNIT_BYTES) &&
           !(a->len_bytes % SM_SNAP_UNIT_BYTES) && a->offset <= end &&
           a->len_bytes <= end - a->offset;
}

static int read_index(struct sm_snap *snap, const struct sm_snap_header *h, char *err,
                      size_t errlen)
{
    uint64_t ram = 0;
    unsigned kinds[3] = { 0 };
    uint8_t *raw;
    int e = read_section(snap->fd, &h->index, h->file_bytes, sizeof(snap->areas), "index", &raw,
                         err, errlen);

    if (e)
        return e;
    if (h->index.len_bytes % sizeof(snap->areas[0]))
        e = -EBADMSG;
    else
        memcpy(snap->areas, raw, (size_t)h->index.len_bytes);
    free(raw);
    snap->area_count = (unsigned)(h->index.len_bytes / sizeof(snap->areas[0]));
    for (unsigned i = 0; !e && i < snap->area_count; i++) {
        const struct sm_snap_area *a = &snap->areas[i];

        if (!area_fits(a, h->state.offset))
            e = -EBADMSG;
        else if (a->kind == SM_SNAP_RAM)
            ram += a->len_bytes;
        if (!e)
            kinds[a->kind]++;
    }
    if (e || ram != h->ram_bytes || kinds[SM_SNAP_RAM] > SM_MEM_MAX_REGIONS ||
        kinds[SM_SNAP_BLOB] > SM_STATE_BLOBS)
        return sm_snap_say(err, errlen, -EBADMSG, "damaged: its index makes no sense");
    return 0;
}

static void fill_info(struct sm_snap_info *info, const struct sm_snap_header *h)
{
    info->version = h->version;
    memcpy(info->arch, h->arch, sizeof(info->arch));
    memcpy(info->fingerprint, h->fingerprint, sizeof(info->fingerprint));
    memcpy(info->id, h->id, sizeof(info->id));
    memcpy(info->parent, h->parent, sizeof(info->parent));
    info->cpus = h->cpus;
    info->page_bytes = h->page_bytes;
    info->created_ns = h->created_ns;
    info->ram_bytes = h->ram_bytes;
    info->file_bytes = h->file_bytes;
}

static int open_file(struct sm_snap *snap, char *err, size_t errlen)
{
    struct sm_snap_header h;
    struct stat st;
    int e;

    if (fstat(snap->fd, &st) < 0)
        return sm_snap_say(err, errlen, -errno, "%s", strerror(errno));
    if (!S_ISREG(st.st_mode) || st.st_size < (off_t)sizeof(h))
        return sm_snap_say(err, errlen, -EBADMSG, "this is no snapshot");
    e = read_at(snap->fd, &h, sizeof(h), 0);
    if (e)
        return sm_snap_say(err, errlen, e, "it cannot be read: %s", strerror(-e));
    e = check_header(&h, (uint64_t)st.st_size, err, errlen);
    if (!e)
        e = read_section(snap->fd, &h.state, h.file_bytes, SM_SNAP_STATE_MAX, "state",
                         &snap->state, err, errlen);
    if (!e)
        e = read_section(snap->fd, &h.meta, h.file_bytes, SM_SNAP_META_MAX, "description",
                         &snap->meta, err, errlen);
    if (!e)
        e = read_index(snap, &h, err, errlen);
    if (e)
        return e;
    snap->state_len = (size_t)h.state.len_bytes;
    snap->meta_len = (size_t)h.meta.len_bytes;
    fill_info(&snap->info, &h);
    return 0;
}

int sm_snap_open(int fd, struct sm_snap **out, char *err, size_t errlen)
{
    struct sm_snap *snap = calloc(1, sizeof(*snap));
    int e;

    if (!snap) {
        close(fd);
        return sm_snap_say(err, errlen, -ENOMEM, "out of memory");
    }
    snap->fd = fd;
    e = open_file(snap, err, errlen);
    if (e) {
        sm_snap_close(snap);
        return e;
    }
    *out = snap;
    return 0;
}

void sm_snap_close(struct sm_snap *snap)
{
    if (!snap)
        return;
    close(snap->fd);
    free(snap->state);
    free(snap->meta);
    free(snap);
}

const struct sm_snap_info *sm_snap_info(const struct sm_snap *snap)
{
    return &snap->info;
}

const void *sm_snap_meta(const struct sm_snap *snap, size_t *len)
{
    *len = snap->meta_len;
    return snap->meta;
}

/* ---- verifying, and reading RAM ---- */

static bool is_zero(const uint8_t *p)
{
    return p[0] == 0 && memcmp(p, p + 1, SM_SNAP_UNIT_BYTES - 1) == 0;
}

/* From `at` on, where the file has data: unit-aligned, at most `end`. */
static uint64_t next_data(int fd, uint64_t at, uint64_t end)
{
    off_t found = lseek(fd, (off_t)at, SEEK_DATA);

    if (found < 0)
        return errno == ENXIO ? end : at;
    if ((uint64_t)found >= end)
        return end;
    return (uint64_t)found - (uint64_t)found % SM_SNAP_UNIT_BYTES;
}

static int sum_area(int fd, const struct sm_snap_area *a, uint8_t *buf, uint32_t *sum)
{
    uint64_t at = a->offset, end = a->offset + a->len_bytes;

    *sum = 0;
    while ((at = next_data(fd, at, end)) < end) {
        size_t len = end - at < CHUNK_BYTES ? (size_t)(end - at) : CHUNK_BYTES;
        int err = read_at(fd, buf, len, at);

        if (err)
            return err;
        for (size_t i = 0; i < len; i += SM_SNAP_UNIT_BYTES)
            if (!is_zero(buf + i))
                *sum = sm_sum_add(*sum, (at + i - a->offset) / SM_SNAP_UNIT_BYTES, buf + i,
                                  SM_SNAP_UNIT_BYTES);
        at += len;
    }
    return 0;
}

int sm_snap_verify(struct sm_snap *snap, char *err, size_t errlen)
{
    uint8_t *buf = malloc(CHUNK_BYTES);
    int e = buf ? 0 : -ENOMEM;

    if (e)
        return sm_snap_say(err, errlen, e, "out of memory");
    for (unsigned i = 0; !e && i < snap->area_count; i++) {
        const struct sm_snap_area *a = &snap->areas[i];
        uint32_t sum = 0;

        e = sum_area(snap->fd, a, buf, &sum);
        if (e)
            sm_snap_say(err, errlen, e, "it cannot be read: %s", strerror(-e));
        else if (sum != a->sum)
            e = sm_snap_say(err, errlen, -EBADMSG, "damaged: %s does not match its checksum",
                            a->kind == SM_SNAP_RAM ? "its memory" : "a disk in it");
    }
    free(buf);
    return e;
}

/* ---- loading ---- */

static int check_host(const struct sm_snap *snap, struct sm_vm *vm, char *err, size_t errlen)
{
    char here[sizeof(snap->info.fingerprint)] = "";
    int e;

    if (strcmp(snap->info.arch, SM_SNAP_ARCH) != 0)
        return sm_snap_say(err, errlen, -ENOEXEC, "it is of %s, this machine is %s",
                           snap->info.arch, SM_SNAP_ARCH);
    if (snap->info.page_bytes != (uint32_t)sysconf(_SC_PAGESIZE))
        return sm_snap_say(err, errlen, -ENOEXEC, "it is of a machine with pages of %u bytes",
                           snap->info.page_bytes);
    e = sm_hv_fingerprint(sm_vm_hv(vm), here, sizeof(here));
    if (e)
        return sm_snap_say(err, errlen, e, "%s", strerror(-e));
    if (strcmp(snap->info.fingerprint, here) != 0)
        return sm_snap_say(err, errlen, -ENOEXEC, "it was taken on another CPU (%s; here: %s)",
                           snap->info.fingerprint, here);
    return 0;
}

/* The data of a region into anonymous memory. */
static int read_ram(int fd, const struct sm_snap_area *a, uint8_t *hva)
{
    uint64_t at = a->offset, end = a->offset + a->len_bytes;

    while ((at = next_data(fd, at, end)) < end) {
        off_t hole = lseek(fd, (off_t)at, SEEK_HOLE);
        uint64_t stop = hole < 0 || (uint64_t)hole > end ? end : (uint64_t)hole;
        int err = read_at(fd, hva + (at - a->offset), (size_t)(stop - at), at);

        if (err)
            return err;
        at = (stop + SM_SNAP_UNIT_BYTES - 1) / SM_SNAP_UNIT_BYTES * SM_SNAP_UNIT_BYTES;
    }
    return 0;
}

static int map_ram(struct sm_snap *snap, struct sm_vm *vm, bool eager)
{
    struct sm_mem *mem = sm_vm_mem(vm);

    for (unsigned i = 0; i < snap->area_count; i++) {
        const struct sm_snap_area *a = &snap->areas[i];
        /* What is never written stays a view of the file. */
        bool copy = eager && a->prot & SM_PROT_WRITE;
        struct sm_mem_desc desc = {
            .gpa = a->gpa,
            .len_bytes = a->len_bytes,
            .kind = copy ? SM_MEM_ANON : SM_MEM_FILE,
            .prot = a->prot,
            .fd = copy ? -1 : snap->fd,
            .offset = copy ? 0 : a->offset,
        };
        int err;

        if (a->kind != SM_SNAP_RAM)
            continue;
        if (!(a->prot & SM_PROT_READ) || a->prot & ~(unsigned)SM_PROT_RWX)
            return -EBADMSG;
        err = sm_mem_map(mem, &desc);
        if (!err && copy)
            err = read_ram(snap->fd, a, sm_mem_ptr(mem, a->gpa, a->len_bytes));
        if (err)
            return err;
    }
    return 0;
}

static int load_into(struct sm_snap *snap, struct sm_vm *vm, const struct sm_snap_load *how,
                     char *err, size_t errlen)
{
    struct sm_state_blobs blobs = { .fd = snap->fd };
    struct sm_state_reader r;
    int e = check_host(snap, vm, err, errlen);

    if (e)
        return e;
    e = map_ram(snap, vm, how->eager);
    if (e)
        return sm_snap_say(err, errlen, e, "its memory cannot be mapped: %s", strerror(-e));
    for (unsigned i = 0; i < snap->area_count; i++) {
        const struct sm_snap_area *a = &snap->areas[i];

        if (a->kind == SM_SNAP_BLOB)
            blobs.list[blobs.count++] =
                (struct sm_state_blob){ a->offset, a->len_bytes, a->sum };
    }
    sm_state_reader_init(&r, snap->state, snap->state_len);
    r.blobs = &blobs;
    return sm_vm_load(vm, &r, how->advance, err, errlen);
}

int sm_snap_load(struct sm_snap *snap, struct sm_vm *vm, const struct sm_snap_load *how,
                 char *err, size_t errlen)
{
    int e;

    if (sm_mem_ram_bytes(sm_vm_mem(vm)))
        return sm_snap_say(err, errlen, -EBUSY, "the VM has memory of its own");
    e = load_into(snap, vm, how, err, errlen);
    if (e) /* what was to be a copy must not run as anything else */
        sm_vm_stop(vm, SM_STOP_KILLED, "its snapshot could not be loaded");
    return e;
}
