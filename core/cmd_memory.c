/* SPDX-License-Identifier: Apache-2.0 */
/* Commands on guest memory. */
#include "cmd_call.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
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
static int open_backing(struct sm_call *call, const char *path, uint64_t offset, uint64_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
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
    if ((path != NULL) != (desc.kind == SM_MEM_FILE)) {
        return sm_call_misuse(call, "path: goes with kind 'file', and only with it");
    }
    if (!path && desc.offset) {
        return sm_call_misuse(call, "offset: goes with kind 'file', and only with it");
    }
    if (path) {
        desc.fd = open_backing(call, path, desc.offset, desc.len_bytes);
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
