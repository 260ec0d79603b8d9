/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A vCPU's thread and the debugger: which exits to ask the backend for, and
 * which of them the owner hears of.
 *
 *   told to go on from a breakpoint ─▶ lift all points, step once ─▶ put them
 *   back ─▶ on it goes (or, when the owner wanted one step, that was it)
 *
 * Threads: everything here runs on the vCPU's thread; see vcpu.h, debug.h.
 */
#include <string.h>

#include "vcpu.h"

static uint64_t linear_pc(struct sm_vcpu *v)
{
    uint64_t base = 0, rip = 0;

    sm_hv_reg_get(v->hv, SM_X86_CS_BASE, &base);
    sm_hv_reg_get(v->hv, SM_X86_RIP, &rip);
    return base + rip;
}

void sm_vcpu_debug_prepare(struct sm_vcpu *v)
{
    struct sm_debug *d = sm_vm_debug(v->vm);
    struct sm_vcpu_debug *own = &v->debug;
    int at;

    if (own->leaving && (own->set.count || own->set.soft ||
                         own->generation != atomic_load(&d->generation))) {
        at = sm_debug_at(d, linear_pc(v));
        if (at >= 0) {
            own->lifted = at;
            own->stale = true;
        }
    }
    own->leaving = false;
    if (own->generation != atomic_load(&d->generation) || own->stepping != own->set.step)
        own->stale = true;
}

void sm_vcpu_debug_apply(struct sm_vcpu *v)
{
    struct sm_debug *d = sm_vm_debug(v->vm);
    struct sm_vcpu_debug *own = &v->debug;
    bool inject = own->set.inject;

    own->stale = false;
    own->generation = atomic_load(&d->generation);
    memset(&own->set, 0, sizeof(own->set));
    own->set.step = own->stepping || own->lifted >= 0;
    if (own->lifted >= 0) {
        sm_debug_lift(d, (unsigned)own->lifted, true);
    } else {
        sm_debug_fill(d, &own->set, own->ids);
        own->set.inject = inject;
    }
    if (sm_hv_vcpu_debug(v->hv, &own->set))
        sm_events_notice(sm_vm_events(v->vm), "debug", "the backend refuses these breakpoints",
                         v->index);
    if (inject) { /* once */
        own->set.inject = false;
        own->stale = true;
    }
}

/* The instruction under a lifted breakpoint has been executed, or will be
 * tried again later. */
static void put_back(struct sm_vcpu *v)
{
    if (v->debug.lifted < 0)
        return;
    sm_debug_lift(sm_vm_debug(v->vm), (unsigned)v->debug.lifted, false);
    v->debug.lifted = -1;
    v->debug.stale = true;
}

static bool soft_exit(struct sm_vcpu *v, struct sm_vcpu_exit *out)
{
    int at = sm_debug_at(sm_vm_debug(v->vm), out->pc);

    if (at < 0) {
        /* The guest's own. */
        v->debug.set.inject = v->debug.stale = true;
        return false;
    }
    out->kind = SM_VCPU_BREAK;
    out->point = (unsigned)at;
    return true;
}

bool sm_vcpu_debug_exit(struct sm_vcpu *v, const struct sm_exit *exit, struct sm_vcpu_exit *out)
{
    bool passed = v->debug.lifted >= 0;

    memset(out, 0, sizeof(*out));
    out->pc = exit->u.debug.pc;
    put_back(v);
    switch (exit->u.debug.why) {
    case SM_DEBUG_STEP:
        out->kind = SM_VCPU_STEP;
        return v->debug.stepping || !passed;
    case SM_DEBUG_SOFT:
        return soft_exit(v, out);
    case SM_DEBUG_BREAK:
    case SM_DEBUG_WATCH:
        out->kind = exit->u.debug.why == SM_DEBUG_BREAK ? SM_VCPU_BREAK : SM_VCPU_WATCH;
        if (exit->u.debug.point >= v->debug.set.count)
            return false; /* of a set that is no more */
        out->point = v->debug.ids[exit->u.debug.point];
        return true;
    }
    return false;
}

void sm_vcpu_debug_leave(struct sm_vcpu *v)
{
    if (v->debug.lifted >= 0) {
        v->debug.leaving = true; /* it did not get off yet */
        put_back(v);
    }
}
