/* SPDX-License-Identifier: Apache-2.0 */
/* Breakpoints and watchpoints; see debug.h. */
#include "debug.h"

#include <errno.h>
#include <string.h>

#include "mem.h"

#define TRAP 0xcc /* x86: int3. arm64 will need four bytes (brk) */

void sm_debug_init(struct sm_debug *d, struct sm_mem *mem)
{
    memset(d, 0, sizeof(*d));
    d->mem = mem;
    pthread_mutex_init(&d->lock, NULL);
}

void sm_debug_destroy(struct sm_debug *d)
{
    pthread_mutex_destroy(&d->lock);
}

static bool in_hardware(const struct sm_debug_point *p)
{
    return p->used && p->kind != SM_DEBUG_SOFTWARE;
}

static bool well_formed(const struct sm_debug_point *p)
{
    if (p->kind != SM_DEBUG_WATCHPOINT)
        return true;
    return (p->len == 1 || p->len == 2 || p->len == 4 || p->len == 8) && !(p->addr & (p->len - 1u));
}

/* Locked. Where a new point may go, or -errno. */
static int find_room(const struct sm_debug *d, const struct sm_debug_point *point)
{
    unsigned hardware = 0;
    int room = -ENOSPC;

    for (unsigned i = SM_DEBUG_POINTS; i-- > 0;) {
        const struct sm_debug_point *p = &d->points[i];

        hardware += in_hardware(p);
        if (!p->used)
            room = (int)i;
        else if (p->kind == point->kind && p->addr == point->addr)
            return -EEXIST;
    }
    if (point->kind != SM_DEBUG_SOFTWARE && hardware >= SM_HV_DEBUG_POINTS)
        return -ENOSPC;
    return room;
}

/* Locked. */
static int plant(struct sm_debug *d, struct sm_debug_point *p)
{
    static const uint8_t trap = TRAP;
    int err = sm_mem_read(d->mem, p->gpa, &p->original, 1);

    return err ? err : sm_mem_write(d->mem, p->gpa, &trap, 1);
}

int sm_debug_add(struct sm_debug *d, const struct sm_debug_point *point, unsigned *id)
{
    struct sm_debug_point *p;
    int room, err = 0;

    if (!well_formed(point))
        return -EINVAL;
    pthread_mutex_lock(&d->lock);
    room = find_room(d, point);
    if (room >= 0) {
        p = &d->points[room];
        *p = *point;
        p->used = true;
        if (p->kind == SM_DEBUG_SOFTWARE)
            err = plant(d, p);
        p->used = !err;
        *id = (unsigned)room;
    }
    atomic_fetch_add(&d->generation, 1);
    pthread_mutex_unlock(&d->lock);
    return room < 0 ? room : err;
}

int sm_debug_remove(struct sm_debug *d, unsigned id)
{
    int err = -ENOENT;

    pthread_mutex_lock(&d->lock);
    if (id < SM_DEBUG_POINTS && d->points[id].used) {
        struct sm_debug_point *p = &d->points[id];

        err = 0;
        if (p->kind == SM_DEBUG_SOFTWARE)
            sm_mem_write(d->mem, p->gpa, &p->original, 1);
        p->used = false;
        atomic_fetch_add(&d->generation, 1);
    }
    pthread_mutex_unlock(&d->lock);
    return err;
}

void sm_debug_fill(struct sm_debug *d, struct sm_hv_debug *out, unsigned ids[SM_HV_DEBUG_POINTS])
{
    pthread_mutex_lock(&d->lock);
    for (unsigned i = 0; i < SM_DEBUG_POINTS; i++) {
        const struct sm_debug_point *p = &d->points[i];

        if (!p->used)
            continue;
        if (p->kind == SM_DEBUG_SOFTWARE) {
            out->soft = true;
        } else if (out->count < SM_HV_DEBUG_POINTS) {
            bool watch = p->kind == SM_DEBUG_WATCHPOINT;

            out->points[out->count].addr = p->addr;
            out->points[out->count].len = watch ? p->len : 1;
            out->points[out->count].watch = watch;
            out->points[out->count].read = p->read;
            ids[out->count++] = i;
        }
    }
    pthread_mutex_unlock(&d->lock);
}

int sm_debug_at(struct sm_debug *d, uint64_t addr)
{
    int found = -1;

    pthread_mutex_lock(&d->lock);
    for (unsigned i = 0; i < SM_DEBUG_POINTS && found < 0; i++) {
        const struct sm_debug_point *p = &d->points[i];

        if (p->used && p->kind != SM_DEBUG_WATCHPOINT && p->addr == addr)
            found = (int)i;
    }
    pthread_mutex_unlock(&d->lock);
    return found;
}

void sm_debug_lift(struct sm_debug *d, unsigned id, bool lift)
{
    static const uint8_t trap = TRAP;
    const struct sm_debug_point *p = &d->points[id];

    pthread_mutex_lock(&d->lock);
    if (p->used && p->kind == SM_DEBUG_SOFTWARE)
        sm_mem_write(d->mem, p->gpa, lift ? &p->original : &trap, 1);
    pthread_mutex_unlock(&d->lock);
}
