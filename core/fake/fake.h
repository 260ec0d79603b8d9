/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fake backend: core/backend.h with no hypervisor behind it, for specs.
 *
 * A fake vCPU does one of two things:
 *
 *   plays a script   an array of exits set by sm_fake_script, so that C specs
 *                    can drive the run loop through every exit there is,
 *                    faults and hostile ones included;
 *   interprets       the instructions at RIP, a small subset of x86 real mode
 *                    (fake_cpu.c), from the memory that was mapped. The same
 *                    bare-metal program then runs here, in a worker built with
 *                    this backend, and on KVM: one spec, every target.
 *
 * It is strict where hardware is lax: registers read before the last access
 * was settled are -EBUSY here (KVM would return stale ones), a call from the
 * wrong thread is -EPERM.
 *
 * Threads: as the contract says; the hooks below may be called from any
 * thread at any time.
 */
#ifndef SM_FAKE_H
#define SM_FAKE_H

#include <pthread.h>
#include <stdatomic.h>

#include "backend.h"

#define SM_FAKE_MAPS 32
#define SM_FAKE_GSIS 64
#define SM_FAKE_DOORBELLS 128
#define SM_FAKE_MSRS 16
#define SM_FAKE_READS 16

enum sm_fake_step_kind {
    SM_FAKE_EXIT,      /* leave with .exit */
    SM_FAKE_WAIT_KICK, /* stay in the guest until kicked */
};

struct sm_fake_step {
    enum sm_fake_step_kind kind;
    struct sm_exit exit;
};

/* Give vCPU `index` its script (copied); after the last step it waits for
 * kicks. Before or after the vCPU exists. -ENOMEM. */
int sm_fake_script(struct sm_hv *hv, unsigned index, const struct sm_fake_step *steps,
                   unsigned count);
/* How many scripted steps vCPU `index` has taken. */
unsigned sm_fake_steps_done(struct sm_hv *hv, unsigned index);
/* The value that completed the vCPU's n-th read (of the first SM_FAKE_READS);
 * false when there was none yet. */
bool sm_fake_read_value(struct sm_hv *hv, unsigned index, unsigned n, uint64_t *value);

/* Interrupts seen on a line: level now, rising edges so far (irqfd writes not
 * counted: read the eventfd), the irqfd or -1. */
struct sm_fake_line {
    bool level;
    uint64_t edges;
    int irqfd;
};
struct sm_fake_line sm_fake_irq(struct sm_hv *hv, uint32_t gsi);

/* A recorded mapping; false when there are no more. */
struct sm_fake_map {
    uint64_t gpa, len_bytes;
    uint8_t *hva;
    unsigned prot;
    bool log_dirty;
    uint64_t *dirty; /* a bit per page, when logged */
};
bool sm_fake_mapping(struct sm_hv *hv, unsigned n, struct sm_fake_map *out);

/* ---- private to core/fake ---- */

struct sm_fake_doorbell {
    uint64_t gpa;
    unsigned len;
    uint32_t data;
    int fd;
};

struct sm_fake_script {
    struct sm_fake_step *steps;
    unsigned count, done;
};

struct sm_hv {
    pthread_mutex_t lock; /* everything below */
    struct sm_fake_map maps[SM_FAKE_MAPS];
    unsigned map_count;
    struct sm_fake_line lines[SM_FAKE_GSIS];
    struct sm_fake_doorbell doorbells[SM_FAKE_DOORBELLS];
    unsigned doorbell_count;
    struct sm_fake_script scripts[SM_MAX_VCPUS];
    struct sm_hv_vcpu *vcpus[SM_MAX_VCPUS];
    uint64_t reads[SM_MAX_VCPUS][SM_FAKE_READS];
    unsigned read_count[SM_MAX_VCPUS];
    int64_t clock_offset;
};

/* What the last access still owes the vCPU; retired by run or settle. */
struct sm_fake_pending {
    bool active;
    int reg;         /* where a read goes, -1: nowhere */
    unsigned len;    /* bytes of it */
    bool completed;  /* the read has been answered */
    uint64_t data;
    uint64_t next_rip;
};

struct sm_hv_vcpu {
    struct sm_hv *hv;
    unsigned index;
    pthread_t thread;     /* its owner */
    pthread_cond_t wake;  /* with hv->lock, for kicks */
    atomic_bool kicked;
    /* owned by the vCPU's thread */
    uint64_t regs[SM_X86_END];
    struct {
        uint64_t index, value;
    } msrs[SM_FAKE_MSRS];
    unsigned msr_count;
    bool halted; /* in HLT: no interrupt is delivered here, so until entered anew */
    bool flat32; /* entered in protected mode: operands and addresses of 32 bit */
    struct sm_hv_debug debug;
    bool skip_break; /* the breakpoint at RIP was reported */
    int watched;     /* the watchpoint the current instruction hit, or -1 */
    struct sm_fake_pending pending;
};

struct sm_exit sm_fake_interpret(struct sm_hv_vcpu *vcpu);
/* Whether there was an access to retire. */
bool sm_fake_retire(struct sm_hv_vcpu *vcpu);
struct sm_exit sm_fake_debug_exit(const struct sm_hv_vcpu *vcpu, enum sm_debug_why why,
                                  unsigned point);
/* Host pointer to RAM behind [gpa, gpa+len), with dirty logging; NULL: MMIO. */
uint8_t *sm_fake_ram(struct sm_hv *hv, uint64_t gpa, unsigned len, bool write);
/* Signal a doorbell that matches; false: the write is an exit. */
bool sm_fake_ring(struct sm_hv *hv, uint64_t gpa, unsigned len, uint64_t data);

#endif
