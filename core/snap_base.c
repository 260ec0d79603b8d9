/* SPDX-License-Identifier: Apache-2.0 */
/* What a VM's memory lies over; see snap_base.h. */
#include "snap_base.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "snap_impl.h"

struct base_region {
    uint64_t gpa, len_bytes;
    uint8_t *bits; /* NULL: no diff has touched it */
};

struct sm_snap_base {
    uint8_t id[SM_SNAP_ID_BYTES];
    struct base_region regions[SM_MEM_MAX_REGIONS];
    unsigned count;
    unsigned views;
};

struct sm_snap_base *sm_snap_base_new(const uint8_t *id)
{
    struct sm_snap_base *base = calloc(1, sizeof(*base));

    if (base)
        sm_snap_base_set_id(base, id);
    return base;
}

void sm_snap_base_free(struct sm_snap_base *base)
{
    if (!base)
        return;
    for (unsigned i = 0; i < base->count; i++)
        free(base->regions[i].bits);
    free(base);
}

const uint8_t *sm_snap_base_id(const struct sm_snap_base *base)
{
    return base->id;
}

void sm_snap_base_set_id(struct sm_snap_base *base, const uint8_t *id)
{
    memcpy(base->id, id, sizeof(base->id));
}

int sm_snap_base_add(struct sm_snap_base *base, uint64_t gpa, uint64_t len_bytes)
{
    if (base->count == SM_MEM_MAX_REGIONS)
        return -ENOSPC;
    base->regions[base->count++] = (struct base_region){ .gpa = gpa, .len_bytes = len_bytes };
    return 0;
}

static struct base_region *find(const struct sm_snap_base *base, uint64_t gpa)
{
    for (unsigned i = 0; i < base->count; i++)
        if (base->regions[i].gpa == gpa)
            return (struct base_region *)&base->regions[i];
    return NULL;
}

const uint8_t *sm_snap_base_bits(const struct sm_snap_base *base, uint64_t gpa)
{
    const struct base_region *r = find(base, gpa);

    return r ? r->bits : NULL;
}

bool sm_snap_base_view(struct sm_snap_base *base, struct sm_mem *mem, const struct sm_mem_region *r,
                       uint64_t at, uint64_t len_bytes, int fd, uint64_t offset)
{
#ifdef __linux__
    if (base->views < SM_SNAP_VIEWS && sm_mem_overlay(mem, r, at, len_bytes, fd, offset) == 0) {
        base->views++;
        return true;
    }
#else /* only KVM follows a mapping that changes under it */
    (void)base;
    (void)mem;
#endif
    return false;
}

/* One run of pages. */
static int lay_run(struct sm_snap_base *base, struct sm_mem *mem, const struct sm_mem_region *r,
                   uint64_t at, uint64_t len, int fd, uint64_t offset, bool read)
{
    if (sm_snap_base_view(base, mem, r, at, len, fd, offset) || !read)
        return 0;
    if (!(r->prot & SM_PROT_WRITE))
        return -EACCES; /* nobody could have written it */
    return sm_file_read(fd, r->hva + at, (size_t)len, offset);
}

int sm_snap_base_lay(struct sm_snap_base *base, struct sm_mem *mem, const struct sm_snap_area *a,
                     const uint8_t *bits, int fd, bool read)
{
    const struct sm_mem_region *r = sm_mem_region_at(mem, a->gpa);
    struct base_region *own = find(base, a->gpa);
    uint64_t page = 0, n, end = a->len_bytes / SM_SNAP_UNIT_BYTES;

    if (!r || !own || r->len_bytes != a->len_bytes || own->len_bytes != a->len_bytes)
        return -EINVAL;
    if (!own->bits)
        own->bits = calloc(1, (size_t)sm_snap_bits_bytes(a->len_bytes));
    if (!own->bits)
        return -ENOMEM;
    for (; (n = sm_snap_run(bits, &page, end, end)) > 0; page += n) {
        uint64_t at = page * SM_SNAP_UNIT_BYTES;
        int err = lay_run(base, mem, r, at, n * SM_SNAP_UNIT_BYTES, fd, a->offset + at, read);

        if (err)
            return err;
    }
    for (uint64_t i = 0; i < sm_snap_bits_bytes(a->len_bytes); i++)
        own->bits[i] |= bits[i];
    return 0;
}

bool sm_snap_base_fits(const struct sm_snap_base *base, const struct sm_mem *mem)
{
    unsigned found = 0;

    for (unsigned i = 0; i < mem->count; i++) {
        const struct sm_mem_region *r = &mem->regions[i];
        const struct base_region *own = find(base, r->gpa);

        if (r->device)
            continue;
        if (!own || own->len_bytes != r->len_bytes || r->kind != SM_MEM_FILE)
            return false;
        found++;
    }
    return found == base->count;
}
