/* SPDX-License-Identifier: Apache-2.0 */
/* The vCPU thread; see vcpu.h. */
#include "vcpu.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "claim.h"
#include "trace.h"
#include "thread.h"

static void count(_Atomic uint64_t *counter)
{
    /* One writer; readers want a value, not an order. */
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + 1,
                          memory_order_relaxed);
}

/* Put what the owner has to hear into the slot. Locked. */
static void tell_owner(struct sm_vcpu *v, const struct sm_vcpu_exit *exit)
{
    v->exit = *exit;
    v->untold = true;
    sm_events_park(sm_vm_events(v->vm), v->index);
}

/* Wait for the owner's answer to an access of a claimed range. */
static uint64_t await_answer(struct sm_vcpu *v, const struct sm_claim *claim,
                             const struct sm_exit *exit)
{
    struct sm_vcpu_exit told = {
        .kind = SM_VCPU_ACCESS,
        .claim = claim->id,
        .space = claim->space,
        .addr = exit->u.io.addr,
        .offset = exit->u.io.addr - claim->base,
        .len = exit->u.io.len,
        .write = exit->u.io.write,
        .data = exit->u.io.data,
    };
    uint64_t value;

    pthread_mutex_lock(&v->lock);
    v->answer = ~0ull;
    /* Read again under the lock that a release takes after it closed the
     * claim: either it is closed here, or the release sees us wait. */
    v->waits = !v->abandoned && v->want != SM_VCPU_QUIT && atomic_load(&claim->open);
    if (v->waits) {
        tell_owner(v, &told);
        pthread_cond_broadcast(&v->cond); /* for who waits until it is parked */
    }
    while (v->waits && v->want != SM_VCPU_QUIT)
        pthread_cond_wait(&v->cond, &v->lock);
    v->waits = v->untold = false;
    value = v->answer;
    pthread_mutex_unlock(&v->lock);
    return value;
}

static void serve_access(struct sm_vcpu *v, enum sm_space space, const struct sm_exit *exit)
{
    const struct sm_bus *bus = sm_vm_bus(v->vm);
    const struct sm_claim *claim;
    uint64_t value = ~0ull;
    int claimed;

    if (exit->u.io.write)
        claimed = sm_bus_write(bus, space, exit->u.io.addr, exit->u.io.len, exit->u.io.data);
    else
        claimed = sm_bus_read(bus, space, exit->u.io.addr, exit->u.io.len, &value);
    if (!claimed) {
        claim = sm_claim_find(bus, space, exit->u.io.addr, exit->u.io.len);
        if (claim) {
            count(&v->parked);
            value = await_answer(v, claim, exit);
        } else {
            count(&v->unclaimed);
        }
    }
    if (!exit->u.io.write)
        sm_hv_vcpu_complete(v->hv, value);
}

/* Hold this vCPU, if the owner is to hear of it. */
static void serve_debug(struct sm_vcpu *v, const struct sm_exit *exit)
{
    struct sm_vcpu_exit told;

    count(&v->debugs);
    if (!sm_vcpu_debug_exit(v, exit, &told))
        return;
    pthread_mutex_lock(&v->lock);
    v->held = true;
    v->step = false;
    if (v->want == SM_VCPU_RUN)
        v->want = SM_VCPU_PARK;
    atomic_store_explicit(&v->attention, true, memory_order_relaxed);
    tell_owner(v, &told);
    pthread_mutex_unlock(&v->lock);
}

static void crash(struct sm_vcpu *v, const char *what)
{
    char detail[96];

    snprintf(detail, sizeof(detail), "%s on vcpu %u", what, v->index);
    sm_vm_stop(v->vm, SM_STOP_CRASH, detail);
}

static void crash_fault(struct sm_vcpu *v, const struct sm_exit *exit)
{
    char what[80];

    snprintf(what, sizeof(what), "%s (%u, 0x%llx)", exit->u.fault.what, exit->u.fault.reason,
             (unsigned long long)exit->u.fault.detail);
    crash(v, what);
}

/* Every exit there is, and what becomes of it. */
static void serve(struct sm_vcpu *v, const struct sm_exit *exit)
{
    count(&v->exits);
    switch (exit->kind) {
    case SM_EXIT_KICKED: /* the loop looks at the mailbox */
        count(&v->kicks);
        break;
    case SM_EXIT_MMIO:
        count(&v->mmio);
        serve_access(v, SM_SPACE_MMIO, exit);
        break;
    case SM_EXIT_PIO:
        count(&v->pio);
        serve_access(v, SM_SPACE_PIO, exit);
        break;
    case SM_EXIT_HALT: /* only without an in-kernel interrupt controller */
        count(&v->halts);
        crash(v, "halted with no interrupt controller to wake it");
        break;
    case SM_EXIT_SHUTDOWN:
        crash(v, "triple fault");
        break;
    case SM_EXIT_POWEROFF:
        sm_vm_stop(v->vm, SM_STOP_POWEROFF, "system event");
        break;
    case SM_EXIT_RESET:
        sm_vm_stop(v->vm, SM_STOP_REBOOT, "system event");
        break;
    case SM_EXIT_DEBUG:
        serve_debug(v, exit);
        break;
    case SM_EXIT_FAULT:
        crash_fault(v, exit);
        break;
    }
}

static const char *exit_name(enum sm_exit_kind kind)
{
    static const char *const names[] = {
        [SM_EXIT_KICKED] = "kick", [SM_EXIT_MMIO] = "mmio", [SM_EXIT_PIO] = "pio",
        [SM_EXIT_HALT] = "halt", [SM_EXIT_SHUTDOWN] = "shutdown",
        [SM_EXIT_POWEROFF] = "poweroff", [SM_EXIT_RESET] = "reset",
        [SM_EXIT_DEBUG] = "debug", [SM_EXIT_FAULT] = "fault",
    };

    return names[kind];
}

/* As serve, and a record of it. */
static void serve_traced(struct sm_vcpu *v, struct sm_trace *trace, const struct sm_exit *exit)
{
    struct sm_trace_record r = {
        .kind = SM_TRACE_EXIT,
        .time_ns = sm_trace_now_ns(),
        .what = exit_name(exit->kind),
        .number = v->index,
    };

    if (exit->kind == SM_EXIT_MMIO || exit->kind == SM_EXIT_PIO) {
        r.address = exit->u.io.addr;
        r.size = exit->u.io.len;
        r.write = exit->u.io.write;
        r.value = exit->u.io.data;
    } else if (exit->kind == SM_EXIT_DEBUG) {
        r.address = exit->u.debug.pc;
    }
    serve(v, exit);
    r.duration_ns = sm_trace_now_ns() - r.time_ns;
    sm_trace_put(trace, &r);
}

/* In the guest until the mailbox wants something; ends at an instruction
 * boundary. A multi-part instruction is at most a page of REP items, so the
 * second loop is bounded. */
static void run_guest(struct sm_vcpu *v)
{
    struct sm_trace *trace = sm_vm_trace(v->vm);
    struct sm_exit exit;
    int err;

    sm_vcpu_debug_prepare(v);
    /* Pairs with the store in attention_set: what the command wrote before it
     * is seen after. */
    while (!atomic_load_explicit(&v->attention, memory_order_acquire)) {
        if (v->debug.stale)
            sm_vcpu_debug_apply(v);
        exit = sm_hv_vcpu_run(v->hv);
        if (sm_trace_on(trace, SM_TRACE_EXIT))
            serve_traced(v, trace, &exit);
        else
            serve(v, &exit);
    }
    while ((err = sm_hv_vcpu_settle(v->hv)) == -EAGAIN) {
        exit = sm_hv_vcpu_run(v->hv);
        serve(v, &exit);
    }
    if (err)
        crash(v, "cannot reach an instruction boundary");
    sm_vcpu_debug_leave(v);
}

/* Locked; unlocked while fn runs. */
static void run_call(struct sm_vcpu *v)
{
    int (*fn)(struct sm_hv_vcpu *, void *) = v->call_fn;
    void *arg = v->call_arg;
    int result;

    pthread_mutex_unlock(&v->lock);
    result = fn(v->hv, arg);
    pthread_mutex_lock(&v->lock);
    v->call_result = result;
    v->call_fn = NULL;
    v->call_done = true;
    pthread_cond_broadcast(&v->cond);
}

static void phase_set(struct sm_vcpu *v, enum sm_vcpu_phase phase)
{
    v->phase = phase;
    pthread_cond_broadcast(&v->cond);
}

/* Locked. */
static void serve_mailbox(struct sm_vcpu *v)
{
    for (;;) {
        /* Cleared under the lock its setters hold: nothing newer is lost. */
        atomic_store_explicit(&v->attention, false, memory_order_relaxed);
        if (v->call_fn) {
            run_call(v);
        } else if (v->want == SM_VCPU_QUIT) {
            return;
        } else if (v->want == SM_VCPU_RUN) {
            v->debug.stepping = v->step;
            v->debug.leaving |= v->leave;
            v->leave = false;
            phase_set(v, SM_VCPU_BUSY);
            pthread_mutex_unlock(&v->lock);
            run_guest(v);
            pthread_mutex_lock(&v->lock);
        } else {
            if (v->phase != SM_VCPU_PARKED)
                phase_set(v, SM_VCPU_PARKED);
            pthread_cond_wait(&v->cond, &v->lock);
        }
    }
}

static void *vcpu_main(void *arg)
{
    struct sm_vcpu *v = arg;
    struct sm_hv_vcpu *hv = NULL;
    char name[16];
    int err;

    snprintf(name, sizeof(name), "sm-vcpu%u", v->index);
    pthread_setname_np(pthread_self(), name);
    err = sm_hv_vcpu_create(sm_vm_hv(v->vm), v->index, v->cpus, &hv);

    pthread_mutex_lock(&v->lock);
    v->hv = hv;
    v->error = err;
    if (!err)
        serve_mailbox(v);
    v->hv = NULL; /* no kick from here on */
    phase_set(v, SM_VCPU_GONE);
    pthread_mutex_unlock(&v->lock);
    if (!err)
        sm_hv_vcpu_destroy(hv);
    return NULL;
}

int sm_vcpu_start(struct sm_vcpu *v, struct sm_vm *vm, unsigned index, unsigned cpus)
{
    sigset_t all, old;
    int err;

    memset(v, 0, sizeof(*v));
    v->vm = vm;
    v->index = index;
    v->cpus = cpus;
    v->debug.lifted = -1;
    pthread_mutex_init(&v->lock, NULL);
    pthread_cond_init(&v->cond, NULL);
    /* The host program's signals are for its own threads. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    err = sm_thread_create(&v->thread, NULL, vcpu_main, v);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (err) {
        pthread_cond_destroy(&v->cond);
        pthread_mutex_destroy(&v->lock);
    }
    return -err;
}

int sm_vcpu_wait_ready(struct sm_vcpu *v)
{
    int err;

    pthread_mutex_lock(&v->lock);
    while (v->phase == SM_VCPU_STARTING)
        pthread_cond_wait(&v->cond, &v->lock);
    err = v->error;
    pthread_mutex_unlock(&v->lock);
    return err;
}

/* Locked. */
static void attention_set(struct sm_vcpu *v)
{
    atomic_store_explicit(&v->attention, true, memory_order_release);
    pthread_cond_broadcast(&v->cond);
    if (v->hv && v->phase == SM_VCPU_BUSY)
        sm_hv_vcpu_kick(v->hv);
}

void sm_vcpu_request(struct sm_vcpu *v, enum sm_vcpu_want want)
{
    pthread_mutex_lock(&v->lock);
    if (v->held && want == SM_VCPU_RUN)
        want = SM_VCPU_PARK; /* until it is released */
    if (v->want != SM_VCPU_QUIT && v->want != want) {
        v->want = want;
        attention_set(v);
    }
    pthread_mutex_unlock(&v->lock);
}

/* Locked. */
static int wait_parked(struct sm_vcpu *v)
{
    while ((v->phase == SM_VCPU_BUSY && !v->waits) || v->phase == SM_VCPU_STARTING)
        pthread_cond_wait(&v->cond, &v->lock);
    return v->phase == SM_VCPU_BUSY ? -EBUSY : 0;
}

int sm_vcpu_wait_parked(struct sm_vcpu *v)
{
    int err;

    pthread_mutex_lock(&v->lock);
    err = wait_parked(v);
    pthread_mutex_unlock(&v->lock);
    return err;
}

int sm_vcpu_hold(struct sm_vcpu *v)
{
    enum sm_vcpu_want before;
    int err;

    pthread_mutex_lock(&v->lock);
    before = v->want;
    v->held = true;
    if (v->want == SM_VCPU_RUN) {
        v->want = SM_VCPU_PARK;
        attention_set(v);
    }
    err = wait_parked(v);
    if (err) {
        v->held = false;
        if (v->want == SM_VCPU_PARK)
            v->want = before;
    }
    pthread_mutex_unlock(&v->lock);
    return err;
}

int sm_vcpu_release(struct sm_vcpu *v, bool step)
{
    int err = -EINVAL;

    pthread_mutex_lock(&v->lock);
    if (v->held) {
        v->held = v->untold = false;
        v->step = step;
        v->leave = true;
        err = 0;
    }
    pthread_mutex_unlock(&v->lock);
    return err;
}

int sm_vcpu_answer(struct sm_vcpu *v, uint64_t value, bool hold)
{
    int err = -ENOENT;

    pthread_mutex_lock(&v->lock);
    if (v->waits) {
        v->answer = value;
        v->waits = false;
        if (hold) {
            v->held = true;
            if (v->want == SM_VCPU_RUN)
                v->want = SM_VCPU_PARK;
            atomic_store_explicit(&v->attention, true, memory_order_relaxed);
        }
        pthread_cond_broadcast(&v->cond);
        err = 0;
    }
    pthread_mutex_unlock(&v->lock);
    return err;
}

void sm_vcpu_abandon(struct sm_vcpu *v, unsigned claim)
{
    pthread_mutex_lock(&v->lock);
    if (claim == SM_CLAIMS)
        v->abandoned = true;
    if (v->waits && (v->abandoned || v->exit.claim == claim)) {
        v->waits = false; /* the answer stays all ones */
        pthread_cond_broadcast(&v->cond);
    }
    pthread_mutex_unlock(&v->lock);
}

void sm_vcpu_nudge(struct sm_vcpu *v)
{
    pthread_mutex_lock(&v->lock);
    attention_set(v);
    pthread_mutex_unlock(&v->lock);
}

bool sm_vcpu_take_exit(struct sm_vcpu *v, struct sm_vcpu_exit *out)
{
    bool has;

    pthread_mutex_lock(&v->lock);
    has = v->untold;
    v->untold = false;
    if (has)
        *out = v->exit;
    pthread_mutex_unlock(&v->lock);
    return has;
}

int sm_vcpu_call(struct sm_vcpu *v, int (*fn)(struct sm_hv_vcpu *vcpu, void *arg), void *arg)
{
    int result = -ESRCH;

    pthread_mutex_lock(&v->lock);
    if (v->waits) {
        result = -EBUSY;
    } else if (v->phase != SM_VCPU_GONE) {
        v->call_fn = fn;
        v->call_arg = arg;
        v->call_done = false;
        attention_set(v);
        while (!v->call_done && !v->waits && v->phase != SM_VCPU_GONE)
            pthread_cond_wait(&v->cond, &v->lock);
        if (v->call_done) {
            result = v->call_result;
        } else {
            v->call_fn = NULL; /* the mailbox never saw it */
            result = v->waits ? -EBUSY : -ESRCH;
        }
    }
    pthread_mutex_unlock(&v->lock);
    return result;
}

void sm_vcpu_join(struct sm_vcpu *v)
{
    pthread_join(v->thread, NULL);
    pthread_cond_destroy(&v->cond);
    pthread_mutex_destroy(&v->lock);
}
