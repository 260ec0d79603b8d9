/* SPDX-License-Identifier: Apache-2.0 */
/* Reading snapshots; see snap.h. Writing is in snap_save.c. */
#include "snap_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "crc32c.h"
#include "snap_base.h"
#include "vm.h"
#include "working_set.h"

const char sm_snap_magic[8] = { 'S', 'M', 'S', 'N', 'A', 'P', '\r', '\n' };

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
    if (h->version < 1 || h->version > SM_SNAP_VERSION)
        return sm_snap_say(err, errlen, -ENOTSUP, "of format %u, this sm reads up to %u",
                           h->version, SM_SNAP_VERSION);
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
    e = sm_file_read(fd, p, (size_t)s->len_bytes, s->offset);
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

static bool has_id(const uint8_t *id)
{
    static const uint8_t none[SM_SNAP_ID_BYTES];

    return memcmp(id, none, sizeof(none)) != 0;
}

/* Of a diff: which pages are its own. */
static int read_pages(struct sm_snap *snap, const struct sm_snap_header *h, char *err, size_t errlen)
{
    uint64_t at = 0, want = 0;
    int e;

    if (h->version < 2)
        return 0;
    for (unsigned i = 0; i < snap->area_count; i++)
        if (snap->areas[i].kind == SM_SNAP_RAM)
            want += sm_snap_bits_bytes(snap->areas[i].len_bytes);
    if (h->pages.len_bytes != want || !want || !has_id(h->parent))
        return sm_snap_say(err, errlen, -EBADMSG, "damaged: its pages make no sense");
    e = read_section(snap->fd, &h->pages, h->file_bytes, want, "pages", &snap->pages, err, errlen);
    if (e)
        return e;
    for (unsigned i = 0; i < snap->area_count; i++) {
        if (snap->areas[i].kind != SM_SNAP_RAM)
            continue;
        snap->area_pages[i] = snap->pages + at;
        at += sm_snap_bits_bytes(snap->areas[i].len_bytes);
    }
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
    info->diff = h->version >= 2;
}

static int open_file(struct sm_snap *snap, char *err, size_t errlen)
{
    struct sm_snap_header *h = &snap->header;
    struct stat st;
    int e;

    if (fstat(snap->fd, &st) < 0)
        return sm_snap_say(err, errlen, -errno, "%s", strerror(errno));
    if (!S_ISREG(st.st_mode) || st.st_size < (off_t)sizeof(*h))
        return sm_snap_say(err, errlen, -EBADMSG, "this is no snapshot");
    e = sm_file_read(snap->fd, h, sizeof(*h), 0);
    if (e)
        return sm_snap_say(err, errlen, e, "it cannot be read: %s", strerror(-e));
    e = check_header(h, (uint64_t)st.st_size, err, errlen);
    if (!e)
        e = read_section(snap->fd, &h->state, h->file_bytes, SM_SNAP_STATE_MAX, "state",
                         &snap->state, err, errlen);
    if (!e)
        e = read_section(snap->fd, &h->meta, h->file_bytes, SM_SNAP_META_MAX, "description",
                         &snap->meta, err, errlen);
    if (!e)
        e = read_index(snap, h, err, errlen);
    if (!e)
        e = read_pages(snap, h, err, errlen);
    if (!e)
        fill_info(&snap->info, h);
    return e;
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
    free(snap->pages);
    free(snap);
}

const struct sm_snap_info *sm_snap_info(const struct sm_snap *snap)
{
    return &snap->info;
}

const void *sm_snap_meta(const struct sm_snap *snap, size_t *len)
{
    *len = (size_t)snap->header.meta.len_bytes;
    return snap->meta;
}

/* ---- verifying, and reading RAM ---- */

int sm_snap_sum(int fd, const struct sm_snap_area *a, uint8_t *buf, uint32_t *sum,
                struct sm_snap_progress *progress)
{
    uint64_t at = a->offset, end = a->offset + a->len_bytes, told = at;

    *sum = 0;
    while ((at = sm_snap_next_data(fd, at, end)) < end) {
        size_t len = end - at < SM_SNAP_CHUNK_BYTES ? (size_t)(end - at) : SM_SNAP_CHUNK_BYTES;
        int err = sm_file_read(fd, buf, len, at);

        if (err)
            return err;
        for (size_t i = 0; i < len; i += SM_SNAP_UNIT_BYTES)
            if (!sm_snap_is_zero(buf + i))
                *sum = sm_sum_add(*sum, (at + i - a->offset) / SM_SNAP_UNIT_BYTES, buf + i,
                                  SM_SNAP_UNIT_BYTES);
        at += len;
        sm_snap_did(progress, at - told);
        told = at;
    }
    sm_snap_did(progress, end - told);
    return 0;
}

int sm_snap_verify(struct sm_snap *snap, struct sm_snap_progress *progress, char *err,
                   size_t errlen)
{
    uint8_t *buf = malloc(SM_SNAP_CHUNK_BYTES);
    int e = buf ? 0 : -ENOMEM;

    if (progress && !progress->total_bytes) /* else it is one step of something longer */
        progress->total_bytes = sm_snap_area_bytes(snap);
    if (e)
        return sm_snap_say(err, errlen, e, "out of memory");
    for (unsigned i = 0; !e && i < snap->area_count; i++) {
        const struct sm_snap_area *a = &snap->areas[i];
        uint32_t sum = 0;

        e = sm_snap_sum(snap->fd, a, buf, &sum, progress);
        if (e)
            sm_snap_say(err, errlen, e, "it cannot be read: %s", strerror(-e));
        else if (sum != a->sum)
            e = sm_snap_say(err, errlen, -EBADMSG, "damaged: %s does not match its checksum",
                            a->kind == SM_SNAP_RAM ? "its memory" : "a disk in it");
    }
    free(buf);
    return e;
}

/* ---- chains ---- */

/* The same regions at the same places of the index. */
static bool same_ram(const struct sm_snap *a, const struct sm_snap *b)
{
    unsigned most = a->area_count > b->area_count ? a->area_count : b->area_count;

    for (unsigned i = 0; i < most; i++) {
        const struct sm_snap_area *x = &a->areas[i], *y = &b->areas[i];
        bool ram_x = i < a->area_count && x->kind == SM_SNAP_RAM;
        bool ram_y = i < b->area_count && y->kind == SM_SNAP_RAM;

        if (ram_x != ram_y ||
            (ram_x && (x->gpa != y->gpa || x->len_bytes != y->len_bytes)))
            return false;
    }
    return true;
}

int sm_snap_check_chain(const struct sm_snap *snap, struct sm_snap *const *parents, unsigned count,
                        char *err, size_t errlen)
{
    if (snap->info.diff && !count)
        return sm_snap_say(err, errlen, -EINVAL, "it is a diff, and needs its parent");
    if (!snap->info.diff && count)
        return sm_snap_say(err, errlen, -EINVAL, "it is no diff, and has no parent");
    if (count >= SM_SNAP_CHAIN_MAX)
        return sm_snap_say(err, errlen, -E2BIG, "a chain of more than %u snapshots; flatten it",
                           SM_SNAP_CHAIN_MAX);
    for (unsigned i = count; i-- > 0; snap = parents[i]) {
        if (memcmp(snap->info.parent, parents[i]->info.id, SM_SNAP_ID_BYTES) != 0)
            return sm_snap_say(err, errlen, -ESTALE, "its parent is another snapshot");
        if (parents[i]->info.diff != (i > 0))
            return sm_snap_say(err, errlen, -ESTALE, "its chain does not begin with a whole one");
        if (!same_ram(snap, parents[i]))
            return sm_snap_say(err, errlen, -EBADMSG, "damaged: its parent is of another shape");
    }
    return 0;
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

/* The data of a file's area into memory. */
static int read_ram(int fd, const struct sm_snap_area *a, uint8_t *hva)
{
    uint64_t at = a->offset, end = a->offset + a->len_bytes;

    while ((at = sm_snap_next_data(fd, at, end)) < end) {
        off_t hole = lseek(fd, (off_t)at, SEEK_HOLE);
        uint64_t stop = hole < 0 || (uint64_t)hole > end ? end : (uint64_t)hole;
        int err = sm_file_read(fd, hva + (at - a->offset), (size_t)(stop - at), at);

        if (err)
            return err;
        at = (stop + SM_SNAP_UNIT_BYTES - 1) / SM_SNAP_UNIT_BYTES * SM_SNAP_UNIT_BYTES;
    }
    return 0;
}

/* And the pages of a diff over it. */
static int read_diff(int fd, const struct sm_snap_area *a, const uint8_t *bits, uint8_t *hva)
{
    uint64_t page = 0, n, end = a->len_bytes / SM_SNAP_UNIT_BYTES;

    for (; (n = sm_snap_run(bits, &page, end, end)) > 0; page += n) {
        uint64_t at = page * SM_SNAP_UNIT_BYTES;
        int err = sm_file_read(fd, hva + at, (size_t)(n * SM_SNAP_UNIT_BYTES), a->offset + at);

        if (err)
            return err;
    }
    return 0;
}

/* The files a machine is made of, from the one that is no diff on. */
struct chain {
    struct sm_snap *links[SM_SNAP_CHAIN_MAX];
    unsigned count;
};

/* Area i of every file; it is the same region in each. */
static int map_area(const struct chain *c, unsigned i, struct sm_vm *vm, struct sm_snap_base *base,
                    bool eager)
{
    struct sm_snap *first = c->links[0];
    const struct sm_snap_area *a = &first->areas[i];
    /* What is never written stays a view of the file. */
    unsigned prot = c->links[c->count - 1]->areas[i].prot;
    bool copy = eager && prot & SM_PROT_WRITE;
    struct sm_mem *mem = sm_vm_mem(vm);
    struct sm_mem_desc desc = {
        .gpa = a->gpa,
        .len_bytes = a->len_bytes,
        .kind = copy ? SM_MEM_ANON : SM_MEM_FILE,
        .prot = prot,
        .fd = copy ? -1 : first->fd,
        .offset = copy ? 0 : a->offset,
    };
    int err;

    if (!(prot & SM_PROT_READ) || prot & ~(unsigned)SM_PROT_RWX)
        return -EBADMSG;
    err = sm_mem_map(mem, &desc);
    if (!err && copy)
        err = read_ram(first->fd, a, sm_mem_ptr(mem, a->gpa, a->len_bytes));
    if (!err)
        err = sm_snap_base_add(base, a->gpa, a->len_bytes);
    for (unsigned l = 1; !err && l < c->count; l++) {
        const struct sm_snap *link = c->links[l];

        if (copy)
            err = read_diff(link->fd, &link->areas[i], link->area_pages[i],
                            sm_mem_ptr(mem, a->gpa, a->len_bytes));
        else
            err = sm_snap_base_lay(base, mem, &link->areas[i], link->area_pages[i], link->fd, true);
    }
    return err;
}

static int map_ram(const struct chain *c, struct sm_vm *vm, struct sm_snap_load *how)
{
    struct sm_snap_base *base = sm_snap_base_new(c->links[c->count - 1]->info.id);
    int err = base ? 0 : -ENOMEM;

    for (unsigned i = 0; !err && i < c->links[0]->area_count; i++)
        if (c->links[0]->areas[i].kind == SM_SNAP_RAM)
            err = map_area(c, i, vm, base, how->eager);
    if (!err && !how->eager && how->set)
        how->set_bytes = sm_working_set_lay(how->set, vm, base);
    if (err || how->eager) /* what was copied lies over nothing */
        sm_snap_base_free(base);
    else
        sm_vm_set_base(vm, base);
    return err;
}

static int load_into(struct sm_snap *snap, struct sm_vm *vm, struct sm_snap_load *how,
                     char *err, size_t errlen)
{
    struct sm_state_blobs blobs = { .fd = snap->fd };
    struct sm_state_reader r;
    struct chain chain = { .count = how->parent_count + 1 };
    int e = check_host(snap, vm, err, errlen);

    if (!e)
        e = sm_snap_check_chain(snap, how->parents, how->parent_count, err, errlen);
    if (e)
        return e;
    for (unsigned i = 0; i < how->parent_count; i++)
        chain.links[i] = how->parents[i];
    chain.links[how->parent_count] = snap;
    e = map_ram(&chain, vm, how);
    if (e)
        return sm_snap_say(err, errlen, e, "its memory cannot be mapped: %s", strerror(-e));
    for (unsigned i = 0; i < snap->area_count; i++) {
        const struct sm_snap_area *a = &snap->areas[i];

        if (a->kind == SM_SNAP_BLOB)
            blobs.list[blobs.count++] =
                (struct sm_state_blob){ a->offset, a->len_bytes, a->sum };
    }
    sm_state_reader_init(&r, snap->state, (size_t)snap->header.state.len_bytes);
    r.blobs = &blobs;
    return sm_vm_load(vm, &r, how->advance, err, errlen);
}

int sm_snap_load(struct sm_snap *snap, struct sm_vm *vm, struct sm_snap_load *how,
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
