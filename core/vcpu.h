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
 * Threads. start, call, wait and join: the VM's owner. request: any thread,
 * the vCPU's own included (a device handler that stops the VM).
 */
#ifndef SM_VCPU_H
#define SM_VCPU_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "vm.h"

enum sm_vcpu_want { SM_VCPU_PARK, SM_VCPU_RUN, SM_VCPU_QUIT };

enum sm_vcpu_phase { SM_VCPU_STARTING, SM_VCPU_BUSY, SM_VCPU_PARKED, SM_VCPU_GONE };

struct sm_vcpu {
    struct sm_vm *vm;
    unsigned index, cpus;
    pthread_t thread;
    atomic_bool attention; /* set by commands, cleared by the thread; both locked */
    _Atomic uint64_t exits, mmio, pio, halts, kicks, unclaimed;

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
};

/* Starts the thread, parked. -errno when there is no thread to be had. */
int sm_vcpu_start(struct sm_vcpu *v, struct sm_vm *vm, unsigned index, unsigned cpus);
/* Waits until it exists; what creating it in the backend gave. */
int sm_vcpu_wait_ready(struct sm_vcpu *v);
void sm_vcpu_request(struct sm_vcpu *v, enum sm_vcpu_want want);
void sm_vcpu_wait_parked(struct sm_vcpu *v);
int sm_vcpu_call(struct sm_vcpu *v, int (*fn)(struct sm_hv_vcpu *vcpu, void *arg), void *arg);
/* After QUIT was requested. */
void sm_vcpu_join(struct sm_vcpu *v);

#endif
