/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A vCPU's thread: the run loop and the mailbox that commands come through.
 *
 *   owner thread                      vCPU thread
 *   want = RUN | PARK | QUIT ──┐
 *   call = {fn, arg} ──────────┤ lock
 *   attention = true, kick ────┴──▶ run → exit → bus … attention? → settle →
 *                                    serve the mailbox → run, or sleep parked
 *
 * `attention` is the one thing the loop looks at between two exits. A command
 * sets it before it kicks, and a kick is never lost (backend.h), so either the
 * loop sees the flag before it enters the guest, or the kick gets it out.
 *
 * Two things stop a vCPU alone, and are told to the owner through the one
 * reserved slot, `exit` (sm_events_park wakes it; nothing is allocated):
 *   an access to a claimed range   the thread waits in the middle of the
 *                                  instruction for sm_vcpu_answer; a stop of
 *                                  the VM gives it the bus's default
 *   a debug exit                   the vCPU is held, at an instruction
 *                                  boundary, until sm_vcpu_continue
 *
 * Threads. start, call, wait, hold, continue, answer and join: the VM's owner.
 * request, abandon and nudge: any thread, the vCPU's own included (a device
 * handler that stops the VM).
 */
#ifndef SM_VCPU_H
#define SM_VCPU_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "debug.h"
#include "vm.h"

enum sm_vcpu_want { SM_VCPU_PARK, SM_VCPU_RUN, SM_VCPU_QUIT };

enum sm_vcpu_phase { SM_VCPU_STARTING, SM_VCPU_BUSY, SM_VCPU_PARKED, SM_VCPU_GONE };

/* The vCPU thread's own: what it asked the backend for (core/vcpu_debug.c). */
struct sm_vcpu_debug {
    struct sm_hv_debug set;
    unsigned ids[SM_HV_DEBUG_POINTS]; /* of set.points */
    unsigned generation;
    bool stale;    /* to be set anew before the guest is entered */
    bool stepping; /* the owner wants the next instruction */
    bool leaving;  /* a breakpoint where we stand is to be passed */
    int lifted;    /* the breakpoint being passed, or -1 */
};

struct sm_vcpu {
    struct sm_vm *vm;
    unsigned index, cpus;
    pthread_t thread;
    atomic_bool attention; /* set by commands, cleared by the thread; both locked */
    _Atomic uint64_t exits, mmio, pio, halts, kicks, unclaimed, parked, debugs;

    pthread_mutex_t lock; /* everything below */
    pthread_cond_t cond;
    enum sm_vcpu_want want;
    enum sm_vcpu_phase phase;
    struct sm_hv_vcpu *hv; /* NULL before and after its life */
    int error;             /* why it could not be created */
    int (*call_fn)(struct sm_hv_vcpu *vcpu, void *arg); /* NULL: no call */
    void *call_arg;
    int call_result;
    bool call_done;
    bool held;      /* stopped alone: RUN does not reach it */
    bool step;      /* after one instruction it is held again */
    bool leave;     /* it goes on after having been held */
    bool waits;     /* in an access, for the answer */
    bool abandoned; /* no answers any more */
    bool untold;    /* exit has not been taken */
    uint64_t answer;
    struct sm_vcpu_exit exit;

    struct sm_vcpu_debug debug; /* the thread's */
};

/* Starts the thread, parked. -errno when there is no thread to be had. */
int sm_vcpu_start(struct sm_vcpu *v, struct sm_vm *vm, unsigned index, unsigned cpus);
/* Waits until it exists; what creating it in the backend gave. */
int sm_vcpu_wait_ready(struct sm_vcpu *v);
void sm_vcpu_request(struct sm_vcpu *v, enum sm_vcpu_want want);
/* -EBUSY: it does not get there, for it waits for an answer. */
int sm_vcpu_wait_parked(struct sm_vcpu *v);
/* -EBUSY: it waits for an answer. */
int sm_vcpu_call(struct sm_vcpu *v, int (*fn)(struct sm_hv_vcpu *vcpu, void *arg), void *arg);
/* After QUIT was requested. */
void sm_vcpu_join(struct sm_vcpu *v);

/* Stop it alone; -EBUSY: it waits for an answer. */
int sm_vcpu_hold(struct sm_vcpu *v);
/* Let a held one go on when it is told to RUN, for one instruction with step.
 * -EINVAL: it is not held. */
int sm_vcpu_release(struct sm_vcpu *v, bool step);
/* The value an access waits for (ignored by a write); with hold it is held
 * behind that instruction. -ENOENT: none waits. */
int sm_vcpu_answer(struct sm_vcpu *v, uint64_t value, bool hold);
/* No answer comes any more, for this claim (SM_CLAIMS: any, ever). */
void sm_vcpu_abandon(struct sm_vcpu *v, unsigned claim);
/* Look at the mailbox and the breakpoints again. */
void sm_vcpu_nudge(struct sm_vcpu *v);
/* What it stopped for; false when that is over or has been taken. */
bool sm_vcpu_take_exit(struct sm_vcpu *v, struct sm_vcpu_exit *out);

/* core/vcpu_debug.c, for the thread. */
void sm_vcpu_debug_prepare(struct sm_vcpu *v); /* about to run the guest */
void sm_vcpu_debug_apply(struct sm_vcpu *v);   /* debug.stale */
/* Whether the owner is to hear of a debug exit; fills `out`. */
bool sm_vcpu_debug_exit(struct sm_vcpu *v, const struct sm_exit *exit, struct sm_vcpu_exit *out);
/* Leaving the guest for the mailbox. */
void sm_vcpu_debug_leave(struct sm_vcpu *v);

#endif
