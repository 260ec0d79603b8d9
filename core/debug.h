/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Breakpoints and watchpoints of a VM: one set, for every vCPU.
 *
 *   hardware     the processor compares (at most SM_HV_DEBUG_POINTS of these
 *                and watchpoints together); the guest cannot see them
 *   watchpoint   likewise, on data
 *   software     a breakpoint instruction in the guest's memory, as many as
 *                SM_DEBUG_POINTS; whoever reads that memory sees it
 *
 * A vCPU that is told to go on from a breakpoint steps off it first, with all
 * points lifted for that one instruction; another vCPU that runs there in that
 * moment passes a software breakpoint unseen.
 *
 * Threads. add and remove: the VM's owner, who makes every vCPU look again
 * (sm_vcpu_nudge) after them. The others: vCPU threads, before they enter the
 * guest; `generation` tells them whether anything changed.
 */
#ifndef SM_DEBUG_H
#define SM_DEBUG_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "backend.h"

struct sm_mem;

#define SM_DEBUG_POINTS 32

enum sm_debug_kind { SM_DEBUG_HARDWARE, SM_DEBUG_SOFTWARE, SM_DEBUG_WATCHPOINT };

struct sm_debug_point {
    bool used;
    enum sm_debug_kind kind;
    uint64_t addr; /* linear */
    uint64_t gpa;  /* software */
    uint8_t len;   /* watchpoint */
    bool read;     /* watchpoint: reads count too */
    uint8_t original;
};

struct sm_debug {
    struct sm_mem *mem;
    atomic_uint generation;
    pthread_mutex_t lock; /* points */
    struct sm_debug_point points[SM_DEBUG_POINTS];
};

void sm_debug_init(struct sm_debug *d, struct sm_mem *mem);
void sm_debug_destroy(struct sm_debug *d);

/* -ENOSPC: no more of that kind; -EEXIST: there already; -EINVAL: length or
 * alignment; -EFAULT: no memory to put a software breakpoint into. */
int sm_debug_add(struct sm_debug *d, const struct sm_debug_point *point, unsigned *id);
int sm_debug_remove(struct sm_debug *d, unsigned id); /* -ENOENT */

/* Fill the points of `out`; ids names them. */
void sm_debug_fill(struct sm_debug *d, struct sm_hv_debug *out,
                   unsigned ids[SM_HV_DEBUG_POINTS]);
/* The breakpoint (no watchpoint) at a linear address, or -1. */
int sm_debug_at(struct sm_debug *d, uint64_t addr);
/* Take a software breakpoint out of memory, and put it back if it still is
 * one; nothing for other kinds. */
void sm_debug_lift(struct sm_debug *d, unsigned id, bool lift);

#endif
