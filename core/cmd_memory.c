/* SPDX-License-Identifier: Apache-2.0 */
/* Commands on guest memory. */
#include "cmd_call.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* In the order of memory.map's kinds. */
static const enum sm_mem_kind kinds[] = { SM_MEM_ANON, SM_MEM_SHARED, SM_MEM_FILE };
static const char *const kind_names[] = {
    [SM_MEM_ANON] = "anon", [SM_MEM_SHARED] = "shared",
    [SM_MEM_FILE] = "file", [SM_MEM_FOREIGN] = "foreign",
};

/* A mapping past the end of its file would kill us with SIGBUS. */
static int open_backing(struct sm_call *call, const char *path, int how, uint64_t offset,
                        uint64_t size)
{
    int fd = open(path, how | O_CLOEXEC);
    if (fd < 0) {
        int err = -errno;
        return sm_call_fail(call, err, "%s: %s", path, strerror(-err));
    }
    struct stat st;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        close(fd);
        return sm_call_fail(call, -EINVAL, "%s: not a regular file", path);
    }
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t have = ((uint64_t)st.st_size + page - 1) / page * page;
    if (offset > have || size > have - offset) {
        close(fd);
        return sm_call_fail(call, -EINVAL, "%s: shorter than offset + size", path);
    }
    return fd;
}

static const char *map_reason(int err)
{
    switch (-err) {
    case EINVAL: return "gpa, size and offset must be whole pages and not wrap";
    case EEXIST: return "there is memory already in this range";
    case ENOSPC: return "no more regions";
    default: return strerror(-err);
    }
}

int sm_cmd_memory_map(struct sm_call *call)
{
    const char *path = sm_call_str(call, "path");
    struct sm_mem_desc desc = {
        .gpa = sm_call_uint(call, "gpa", 0),
        .len_bytes = sm_call_uint(call, "size", 0),
        .kind = kinds[sm_call_uint(call, "kind", 0)],
        .prot = sm_call_bool(call, "readonly", false) ? SM_PROT_READ | SM_PROT_EXEC
                                                       : SM_PROT_RWX,
        .fd = -1,
        .offset = sm_call_uint(call, "offset", 0),
        .device = sm_call_bool(call, "device", false),
    };
    bool shared = desc.kind == SM_MEM_SHARED;
    if (path ? desc.kind == SM_MEM_ANON : desc.kind == SM_MEM_FILE) {
        return sm_call_misuse(call, "path: goes with kind 'file' or 'shared', and only with them");
    }
    if (!path && desc.offset) {
        return sm_call_misuse(call, "offset: goes with path, and only with it");
    }
    if (path) {
        int how = shared && desc.prot & SM_PROT_WRITE ? O_RDWR : O_RDONLY;
        desc.fd = open_backing(call, path, how, desc.offset, desc.len_bytes);
        if (desc.fd < 0) {
            return desc.fd;
        }
    }
    int err = sm_mem_map(sm_vm_mem(call->m->vm), &desc);
    if (desc.fd >= 0) {
        close(desc.fd);
    }
    if (err < 0) {
        return sm_call_fail(call, err, "0x%" PRIx64 " + 0x%" PRIx64 ": %s", desc.gpa,
                            desc.len_bytes, map_reason(err));
    }
    return 0;
}

static int no_memory(struct sm_call *call, int err, uint64_t gpa, uint64_t len)
{
    return sm_call_fail(call, err, "0x%" PRIx64 " + %" PRIu64 ": %s", gpa, len,
                        err == -EFAULT ? "no memory there" : strerror(-err));
}

int sm_cmd_memory_read(struct sm_call *call)
{
    uint64_t gpa = sm_call_uint(call, "gpa", 0), len = sm_call_uint(call, "len", 0);
    void *buf = sm_msg_put_strbuf(call->out, (size_t)len);
    if (!buf) {
        return 0; /* the dispatcher sees the writer's error */
    }
    int err = sm_mem_read(sm_vm_mem(call->m->vm), gpa, buf, len);
    return err < 0 ? no_memory(call, err, gpa, len) : 0;
}

int sm_cmd_memory_write(struct sm_call *call)
{
    uint64_t gpa = sm_call_uint(call, "gpa", 0);
    const struct sm_arg *data = sm_call_arg(call, "data");
    int err = sm_mem_write(sm_vm_mem(call->m->vm), gpa, data->v.bytes.p, data->v.bytes.len);
    return err < 0 ? no_memory(call, err, gpa, data->v.bytes.len) : 0;
}

int sm_cmd_memory_regions(struct sm_call *call)
{
    const struct sm_mem *mem = sm_vm_mem(call->m->vm);
    struct sm_msg_writer *w = call->out;
    sm_msg_put_array(w, mem->count);
    for (unsigned i = 0; i < mem->count; i++) {
        const struct sm_mem_region *r = &mem->regions[i];
        sm_msg_put_map(w, 5);
        sm_msg_put_str(w, "gpa");
        sm_msg_put_uint(w, r->gpa);
        sm_msg_put_str(w, "size");
        sm_msg_put_uint(w, r->len_bytes);
        sm_msg_put_str(w, "kind");
        sm_msg_put_str(w, kind_names[r->kind]);
        sm_msg_put_str(w, "readonly");
        sm_msg_put_bool(w, !(r->prot & SM_PROT_WRITE));
        sm_msg_put_str(w, "device");
        sm_msg_put_bool(w, r->device);
    }
    return 0;
}

/* ---- search ---- */

#define SEARCH_DEFAULT_MAX 100

/* The part of [gpa, gpa + len) that lies in r, as an offset into it and a
 * length; len 0: all that follows. */
static uint64_t overlap(const struct sm_mem_region *r, uint64_t gpa, uint64_t len, uint64_t *from)
{
    uint64_t end = r->len_bytes;
    *from = gpa > r->gpa ? gpa - r->gpa : 0;
    if (len && gpa + len >= gpa && gpa + len < r->gpa + r->len_bytes) {
        end = gpa + len > r->gpa ? gpa + len - r->gpa : 0;
    }
    return *from < end ? end - *from : 0;
}

int sm_cmd_memory_search(struct sm_call *call)
{
    const struct sm_mem *mem = sm_vm_mem(call->m->vm);
    const struct sm_arg *pattern = sm_call_arg(call, "pattern");
    uint64_t gpa = sm_call_uint(call, "gpa", 0), len = sm_call_uint(call, "len", 0);
    uint64_t max = sm_call_uint(call, "max", SEARCH_DEFAULT_MAX), found[4096];
    uint32_t n = 0;
    if (!pattern->v.bytes.len) {
        return sm_call_misuse(call, "pattern: expected at least one byte");
    }
    for (unsigned i = 0; i < mem->count && n < max; i++) {
        const struct sm_mem_region *r = &mem->regions[i];
        uint64_t from, left = overlap(r, gpa, len, &from);
        const uint8_t *p = r->hva + from, *hit;
        while (n < max &&
               (hit = memmem(p, left, pattern->v.bytes.p, pattern->v.bytes.len)) != NULL) {
            found[n++] = r->gpa + (uint64_t)(hit - r->hva);
            left -= (uint64_t)(hit + 1 - p);
            p = hit + 1;
        }
    }
    sm_msg_put_array(call->out, n);
    for (uint32_t i = 0; i < n; i++) {
        sm_msg_put_uint(call->out, found[i]);
    }
    return 0;
}

/* ---- regions ---- */

static int no_region(struct sm_call *call, int err)
{
    return sm_call_fail(call, err, "0x%" PRIx64 ": %s", sm_call_uint(call, "gpa", 0),
                        err == -ENOENT ? "no region begins there" : strerror(-err));
}

int sm_cmd_memory_protect(struct sm_call *call)
{
    unsigned prot = sm_call_bool(call, "readonly", true) ? SM_PROT_READ | SM_PROT_EXEC : SM_PROT_RWX;
    int err = sm_mem_protect(sm_vm_mem(call->m->vm), sm_call_uint(call, "gpa", 0), prot);
    return err < 0 ? no_region(call, err) : 0;
}

int sm_cmd_memory_unmap(struct sm_call *call)
{
    int err = sm_mem_unmap(sm_vm_mem(call->m->vm), sm_call_uint(call, "gpa", 0));
    return err < 0 ? no_region(call, err) : 0;
}

int sm_cmd_memory_log(struct sm_call *call)
{
    int err = sm_mem_log_dirty(sm_vm_mem(call->m->vm), sm_call_uint(call, "gpa", 0),
                               sm_call_bool(call, "on", true));
    return err < 0 ? no_region(call, err) : 0;
}

static bool bit(const uint64_t *bitmap, uint64_t n)
{
    return bitmap[n / 64] >> (n % 64) & 1;
}

/* Neighbours are told as one; returns how many runs, and writes them when asked. */
static uint32_t put_runs(struct sm_msg_writer *w, uint64_t gpa, const uint64_t *bitmap,
                         uint64_t pages, uint64_t page)
{
    uint32_t runs = 0;
    for (uint64_t i = 0, n; i < pages; i += n) {
        for (n = 1; i + n < pages && bit(bitmap, i + n) == bit(bitmap, i); n++) {
        }
        if (bit(bitmap, i)) {
            runs++;
            if (w) {
                sm_msg_put_map(w, 2);
                sm_msg_put_str(w, "gpa");
                sm_msg_put_uint(w, gpa + i * page);
                sm_msg_put_str(w, "size");
                sm_msg_put_uint(w, n * page);
            }
        }
    }
    return runs;
}

int sm_cmd_memory_dirty(struct sm_call *call)
{
    const struct sm_mem *mem = sm_vm_mem(call->m->vm);
    const struct sm_mem_region *r = sm_mem_region_at(mem, sm_call_uint(call, "gpa", 0));
    if (!r || !r->log_dirty) {
        return r ? sm_call_fail(call, -EINVAL, "0x%" PRIx64 ": not logged (memory.log)", r->gpa)
                 : no_region(call, -ENOENT);
    }
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), pages = r->len_bytes / page;
    size_t words = (size_t)((pages + 63) / 64);
    uint64_t *bitmap = calloc(words, sizeof(*bitmap));
    if (!bitmap) {
        return sm_call_fail(call, -ENOMEM, "out of memory");
    }
    int err = sm_hv_dirty_log(mem->hv, r->gpa, bitmap, words);
    if (!err) {
        sm_msg_put_array(call->out, put_runs(NULL, r->gpa, bitmap, pages, page));
        put_runs(call->out, r->gpa, bitmap, pages, page);
    }
    free(bitmap);
    return err < 0 ? no_region(call, err) : 0;
}
