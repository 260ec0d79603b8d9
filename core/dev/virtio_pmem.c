/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-pmem; see virtio_pmem.h. Its one queue takes flush requests (5.19.6):
 * there is never anything to flush, so each is answered at once. The address
 * of the segment is in the configuration space.
 */
#include "dev/virtio_pmem.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backend.h"
#include "mem.h"
#include "state.h"

#define ID_PMEM 27
#define QUEUE_SIZE 64
#define BATCH 64
#define GPA_ALIGN (1ull << 30)
#define GPA_LOWEST (4ull << 30) /* above the hole of the devices */
#define GPA_END (1ull << 46)    /* every x86_64 host can address this much */

enum { REQ_FLUSH = 0 };
enum { RESP_OK = 0, RESP_EIO = 1 };

struct config {
    uint64_t start, size;
};

struct pmem {
    struct sm_virtio virtio;
    uint8_t *reserved, *hva; /* what was reserved; where the segment begins */
    uint64_t reserved_bytes, gpa, len_bytes;
    bool mapped; /* in the guest */
};

static int fail(char *err, size_t errlen, int code, const char *name, const char *what)
{
    if (err && errlen)
        snprintf(err, errlen, "%s: %s", name, what);
    return code;
}

/* ---- the queue ---- */

/* One flush request; returns its used length, or -1 for one that is none. */
static int64_t serve_chain(struct sm_virtq_chain *chain)
{
    uint32_t type, answer;

    if (chain->out_bytes < sizeof(type) || chain->in_bytes < sizeof(answer))
        return -1;
    sm_iov_read(chain->iov, chain->out, &type, sizeof(type));
    answer = type == REQ_FLUSH ? RESP_OK : RESP_EIO;
    return (int64_t)sm_iov_write(chain->iov + chain->out, chain->in, &answer, sizeof(answer));
}

static void pmem_kick(struct sm_virtio *v, unsigned queue)
{
    struct iovec iov[SM_VIRTQ_SEGS];
    struct sm_virtq_chain chain = { .iov = iov, .cap = SM_VIRTQ_SEGS };
    unsigned served = 0;

    do {
        while (served < BATCH && sm_virtio_pop(v, queue, &chain)) {
            int64_t len = serve_chain(&chain);

            if (len < 0) {
                sm_virtio_fail(v, queue, "a pmem request without its parts");
                return;
            }
            sm_virtio_push(v, queue, chain.head, (uint32_t)len);
            served++;
        }
        if (served == BATCH) {
            sm_virtio_again(v, queue);
            break;
        }
    } while (sm_virtio_kicks_on(v, queue));
    sm_virtio_notify(v, queue);
}

/* ---- the segment ---- */

static int check_extents(const struct sm_pmem_config *cfg, uint64_t *total, char *err,
                         size_t errlen)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);

    *total = 0;
    for (unsigned i = 0; i < cfg->extent_count; i++) {
        const struct sm_disk_extent *e = &cfg->extents[i];
        const char *name = e->path ? e->path : "extent";

        if (!e->path)
            return fail(err, errlen, -EINVAL, name, "a file is needed");
        if (!e->length_bytes || (e->offset | e->length_bytes) & (page - 1))
            return fail(err, errlen, -EINVAL, name, "not of whole pages");
        if (e->length_bytes > SM_DISK_MAX_BYTES - *total || e->offset > SM_DISK_MAX_BYTES)
            return fail(err, errlen, -EFBIG, name, "too large");
        *total += e->length_bytes;
    }
    if (!*total || *total % SM_PMEM_ALIGN_BYTES)
        return fail(err, errlen, -EINVAL, "extents", "not a multiple of 2 MiB in all");
    return 0;
}

static int map_extent(const struct sm_disk_extent *e, uint8_t *at, char *err, size_t errlen)
{
    struct stat st;
    int ret = 0, fd = open(e->path, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return fail(err, errlen, -errno, e->path, strerror(errno));
    if (fstat(fd, &st) < 0)
        ret = fail(err, errlen, -errno, e->path, strerror(errno));
    else if (!S_ISREG(st.st_mode))
        ret = fail(err, errlen, -EINVAL, e->path, "not a regular file");
    else if ((uint64_t)st.st_size < e->offset ||
             (uint64_t)st.st_size - e->offset < e->length_bytes)
        ret = fail(err, errlen, -ERANGE, e->path, "shorter than its extent");
    else if (mmap(at, e->length_bytes, PROT_READ, MAP_SHARED | MAP_FIXED, fd,
                  (off_t)e->offset) == MAP_FAILED)
        ret = fail(err, errlen, -errno, e->path, strerror(errno));
    close(fd);
    return ret;
}

static int map_host(struct pmem *p, const struct sm_pmem_config *cfg, char *err, size_t errlen)
{
    uint64_t at = 0;
    uint8_t *r;

    /* One address space for all files, aligned as the guest sees it, so that
     * the host can use huge pages where its file system has them. */
    r = mmap(NULL, p->len_bytes + SM_PMEM_ALIGN_BYTES, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (r == MAP_FAILED)
        return fail(err, errlen, -errno, "segment", strerror(errno));
    p->reserved = r;
    p->reserved_bytes = p->len_bytes + SM_PMEM_ALIGN_BYTES;
    p->hva = r + (-(uintptr_t)r & (SM_PMEM_ALIGN_BYTES - 1));
    for (unsigned i = 0; i < cfg->extent_count; i++) {
        int ret = map_extent(&cfg->extents[i], p->hva + at, err, errlen);

        if (ret < 0)
            return ret;
        at += cfg->extents[i].length_bytes;
    }
    return 0;
}

static int map_guest(struct pmem *p, char *err, size_t errlen)
{
    struct sm_mem *mem = p->virtio.mem;
    uint64_t end = GPA_LOWEST;
    struct sm_mem_desc desc = {
        .len_bytes = p->len_bytes,
        .kind = SM_MEM_FOREIGN,
        .prot = SM_PROT_READ,
        .hva = p->hva,
        .device = true,
    };
    int ret;

    for (unsigned i = 0; i < mem->count; i++) {
        const struct sm_mem_region *r = &mem->regions[i];

        if (r->gpa + r->len_bytes > end)
            end = r->gpa + r->len_bytes;
    }
    if (end > GPA_END - GPA_ALIGN || p->len_bytes > GPA_END - GPA_ALIGN - end)
        return fail(err, errlen, -ENOSPC, "segment", "no room in the guest's address space");
    desc.gpa = (end + GPA_ALIGN - 1) / GPA_ALIGN * GPA_ALIGN;
    ret = sm_mem_map(mem, &desc);
    if (ret < 0)
        return fail(err, errlen, ret, "segment", strerror(-ret));
    p->gpa = desc.gpa;
    p->mapped = true;
    return 0;
}

static void pmem_free(struct pmem *p)
{
    if (p->mapped)
        sm_mem_unmap(p->virtio.mem, p->gpa);
    if (p->reserved)
        munmap(p->reserved, p->reserved_bytes);
    sm_virtio_fini(&p->virtio);
    free(p);
}

static void pmem_destroy(struct sm_virtio *v)
{
    pmem_free((struct pmem *)v);
}

/* Where the segment lies is the guest's knowledge; it must not move. */
static void pmem_save(struct sm_virtio *v, struct sm_state_writer *w)
{
    struct pmem *p = (struct pmem *)v;

    sm_state_begin(w, "pmem", 1);
    sm_state_put_u64(w, p->gpa);
    sm_state_put_u64(w, p->len_bytes);
    sm_state_end(w);
}

static int pmem_load(struct sm_virtio *v, struct sm_state_reader *r)
{
    struct pmem *p = (struct pmem *)v;
    uint64_t gpa, len;

    if (sm_state_open(r, "pmem") != 1)
        return -EBADMSG;
    gpa = sm_state_get_u64(r);
    len = sm_state_get_u64(r);
    sm_state_close(r);
    return r->error ? r->error : gpa == p->gpa && len == p->len_bytes ? 0 : -ESTALE;
}

static const struct sm_virtio_class pmem_class = {
    .device = SM_VIRTIO_DEVICE_OPS("virtio-pmem"),
    .id = ID_PMEM,
    .queues = 1,
    .queue_size = QUEUE_SIZE,
    .kick = pmem_kick,
    .save = pmem_save,
    .load = pmem_load,
    .destroy = pmem_destroy,
};

int sm_virtio_pmem_create(const struct sm_virtio_env *env, const struct sm_pmem_config *cfg,
                          struct sm_virtio_mmio **out, char *err, size_t errlen)
{
    struct pmem *p = calloc(1, sizeof(*p));
    struct config config;
    int ret;

    if (!p)
        return fail(err, errlen, -ENOMEM, "segment", "out of memory");
    ret = check_extents(cfg, &p->len_bytes, err, errlen);
    if (ret == 0)
        ret = sm_virtio_init(&p->virtio, env, &pmem_class, 0);
    if (ret < 0) {
        free(p);
        return ret;
    }
    ret = map_host(p, cfg, err, errlen);
    if (ret == 0)
        ret = map_guest(p, err, errlen);
    if (ret == 0) {
        config = (struct config){ .start = p->gpa, .size = p->len_bytes };
        memcpy(p->virtio.config, &config, sizeof(config));
        p->virtio.config_bytes = sizeof(config);
        ret = sm_virtio_mmio_create(&p->virtio, out);
    }
    if (ret < 0)
        pmem_free(p);
    return ret;
}
