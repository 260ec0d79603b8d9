/* SPDX-License-Identifier: Apache-2.0 */
/* Commands for faults on demand, tracing, and a look at the devices. */
#include "cmd_call.h"

#include <errno.h>
#include <math.h>
#include <string.h>

#include "dev/fault.h"
#include "dev/virtio_mmio.h"
#include "dev/virtio_vsock.h"
#include "trace.h"

static void put_uint(struct sm_msg_writer *w, const char *key, uint64_t value)
{
    sm_msg_put_str(w, key);
    sm_msg_put_uint(w, value);
}

static void put_str(struct sm_msg_writer *w, const char *key, const char *value)
{
    sm_msg_put_str(w, key);
    sm_msg_put_str(w, value);
}

static void put_bool(struct sm_msg_writer *w, const char *key, bool value)
{
    sm_msg_put_str(w, key);
    sm_msg_put_bool(w, value);
}

/* ---- disks ---- */

static const unsigned op_bits[] = { /* in the order of fault.add's operations */
    SM_FAULT_READ | SM_FAULT_WRITE | SM_FAULT_FLUSH | SM_FAULT_ZERO,
    SM_FAULT_READ, SM_FAULT_WRITE, SM_FAULT_FLUSH, SM_FAULT_ZERO,
};
static const char *const op_names[] = { "any", "read", "write", "flush", "zero" };
static const char *const action_names[] = { "fail", "delay", "tear", "corrupt" };

static struct sm_faults *faults_of(struct sm_call *call, unsigned *disk)
{
    *disk = (unsigned)sm_call_uint(call, "disk", 0);
    if (*disk >= call->m->disks || *disk >= SM_CMD_FAULTY_DISKS) {
        sm_call_fail(call, -ENOENT, "there is no blk%u", *disk);
        return NULL;
    }
    return call->m->faults[*disk];
}

static int take_probability(struct sm_call *call, double *out)
{
    const struct sm_arg *arg = sm_call_arg(call, "probability");
    *out = arg->given ? arg->v.d : 1;
    if (isnan(*out) || *out < 0 || *out > 1) {
        return sm_call_misuse(call, "probability: expected a number from 0 to 1, got %g", *out);
    }
    return 0;
}

int sm_cmd_fault_add(struct sm_call *call)
{
    unsigned disk, id;
    struct sm_faults *faults = faults_of(call, &disk);
    if (!faults) {
        return call->err->code;
    }
    struct sm_fault_rule rule = {
        .ops = op_bits[sm_call_uint(call, "operation", 0)],
        .action = (enum sm_fault_action)sm_call_uint(call, "action", 0),
        .silent = sm_call_bool(call, "silent", false),
        .first = sm_call_uint(call, "first", 0),
        .last = sm_call_uint(call, "last", UINT64_MAX),
        .skip = sm_call_uint(call, "skip", 0),
        .count = sm_call_uint(call, "count", 0),
        .ends = sm_call_arg(call, "count")->given,
        .delay_ns = sm_call_uint(call, "delay_ms", 0) * 1000000u,
        .random = sm_call_uint(call, "seed", 0),
    };
    int err = take_probability(call, &rule.probability);
    if (err) {
        return err;
    }
    if (rule.last < rule.first) {
        return sm_call_misuse(call, "last: expected at least first");
    }
    if ((rule.action == SM_FAULT_DELAY) != (rule.delay_ns != 0)) {
        return sm_call_misuse(call, "delay_ms: goes with action 'delay', and only with it");
    }
    if (rule.silent && rule.action != SM_FAULT_TEAR) {
        return sm_call_misuse(call, "silent: goes with action 'tear', and only with it");
    }
    err = sm_faults_add(faults, &rule, &id);
    if (err < 0) {
        return sm_call_fail(call, err, "blk%u: no more rules", disk);
    }
    sm_msg_put_uint(call->out, id);
    return 0;
}

int sm_cmd_fault_remove(struct sm_call *call)
{
    unsigned disk;
    struct sm_faults *faults = faults_of(call, &disk);
    if (!faults) {
        return call->err->code;
    }
    int err = sm_faults_remove(faults, (unsigned)sm_call_uint(call, "fault", 0));
    return err < 0 ? sm_call_fail(call, err, "blk%u: no such fault", disk) : 0;
}

static const char *op_name(unsigned ops)
{
    for (unsigned i = 0; i < sizeof(op_bits) / sizeof(op_bits[0]); i++) {
        if (op_bits[i] == ops) {
            return op_names[i];
        }
    }
    return "any";
}

int sm_cmd_fault_list(struct sm_call *call)
{
    struct sm_fault_rule rules[SM_CMD_FAULTY_DISKS * SM_FAULT_RULES];
    struct { unsigned disk, id; } at[SM_CMD_FAULTY_DISKS * SM_FAULT_RULES];
    uint32_t n = 0;
    for (unsigned d = 0; d < call->m->disks && d < SM_CMD_FAULTY_DISKS; d++) {
        for (unsigned id = 0; id < SM_FAULT_RULES; id++) {
            if (sm_faults_get(call->m->faults[d], id, &rules[n])) {
                at[n].disk = d;
                at[n++].id = id;
            }
        }
    }
    sm_msg_put_array(call->out, n);
    for (uint32_t i = 0; i < n; i++) {
        sm_msg_put_map(call->out, 6);
        put_uint(call->out, "disk", at[i].disk);
        put_uint(call->out, "fault", at[i].id);
        put_str(call->out, "operation", op_name(rules[i].ops));
        put_str(call->out, "action", action_names[rules[i].action]);
        put_uint(call->out, "matched", rules[i].matched);
        put_uint(call->out, "hits", rules[i].hits);
    }
    return 0;
}

/* ---- vsock ---- */

int sm_cmd_vsock_fault(struct sm_call *call)
{
    static const enum sm_vsock_fault whats[] = {
        SM_VSOCK_FAULT_RESET, SM_VSOCK_FAULT_STALL, SM_VSOCK_FAULT_GO
    };
    struct sm_vm_slot slot;
    enum sm_vsock_fault what = whats[sm_call_uint(call, "action", 0)];
    for (unsigned i = 0; sm_vm_slot(call->m->vm, i, &slot); i++) {
        int n = sm_virtio_vsock_fault(slot.dev, what, (uint32_t)sm_call_uint(call, "port", 0));
        if (n >= 0) {
            sm_msg_put_int(call->out, n);
            return 0;
        }
    }
    return sm_call_fail(call, -ENODEV, "the VM has no vsock");
}

/* ---- the clock ---- */

int sm_cmd_clock_fault(struct sm_call *call)
{
    bool stop = sm_call_uint(call, "action", 0) == 0;
    int err = sm_vm_clock_stop(call->m->vm, stop);
    if (err == -EALREADY) {
        return sm_call_fail(call, err, stop ? "the clock is stopped already" : "the clock is going");
    }
    return err ? sm_call_fail(call, err, "the clock: %s", strerror(-err)) : 0;
}

/* ---- devices ---- */

static void put_queue(struct sm_msg_writer *w, const struct sm_virtio_queue *q)
{
    sm_msg_put_map(w, 5);
    put_bool(w, "ready", q->ready);
    put_uint(w, "size", q->size);
    put_uint(w, "desc", q->desc_gpa);
    put_uint(w, "avail", q->avail_gpa);
    put_uint(w, "used", q->used_gpa);
}

/* What the driver set is behind the device's lock. */
static void put_device(struct sm_msg_writer *w, struct sm_vm *vm, const struct sm_vm_slot *slot)
{
    struct sm_virtio *v = sm_virtio_mmio_virtio(slot->dev);
    uint64_t irqs = slot->gsi < SM_TRACE_GSIS
                        ? atomic_load_explicit(&sm_vm_trace(vm)->irqs[slot->gsi], memory_order_relaxed)
                        : 0;
    sm_msg_put_map(w, 8);
    put_str(w, "name", v->name);
    put_uint(w, "gpa", slot->gpa);
    put_uint(w, "gsi", slot->gsi);
    put_uint(w, "requests", __atomic_load_n(&v->requests, __ATOMIC_RELAXED));
    put_uint(w, "interrupts", irqs);
    pthread_mutex_lock(&v->lock);
    put_uint(w, "status", __atomic_load_n(&v->status, __ATOMIC_RELAXED));
    put_uint(w, "features", v->features);
    sm_msg_put_str(w, "queues");
    sm_msg_put_array(w, v->queue_count);
    for (unsigned i = 0; i < v->queue_count; i++) {
        put_queue(w, &v->queues[i]);
    }
    pthread_mutex_unlock(&v->lock);
}

void sm_cmd_put_devices(struct sm_machine *m, struct sm_msg_writer *w)
{
    struct sm_vm_slot slot;
    uint32_t n = 0;
    while (sm_vm_slot(m->vm, n, &slot)) {
        n++;
    }
    sm_msg_put_array(w, n);
    for (uint32_t i = 0; i < n && sm_vm_slot(m->vm, i, &slot); i++) {
        put_device(w, m->vm, &slot);
    }
}

int sm_cmd_device_list(struct sm_call *call)
{
    sm_cmd_put_devices(call->m, call->out);
    return 0;
}

/* ---- trace ---- */

int sm_cmd_trace_set(struct sm_call *call)
{
    unsigned kinds = (sm_call_bool(call, "exits", false) ? SM_TRACE_EXIT : 0u) |
                     (sm_call_bool(call, "requests", false) ? SM_TRACE_REQUEST : 0u) |
                     (sm_call_bool(call, "interrupts", false) ? SM_TRACE_IRQ : 0u);
    int err = sm_trace_set(sm_vm_trace(call->m->vm), kinds, sm_call_uint(call, "first", 0),
                           sm_call_uint(call, "last", UINT64_MAX));
    return err < 0 ? sm_call_fail(call, err, "%s", strerror(-err)) : 0;
}

static void put_request(struct sm_msg_writer *w, const struct sm_trace_record *r)
{
    put_str(w, "device", r->device);
    put_uint(w, "queue", r->number);
    put_uint(w, "sector", r->address);
    put_uint(w, "size", r->size);
    put_uint(w, "error", (uint64_t)r->error);
    put_bool(w, "fault", r->fault);
}

static void put_exit(struct sm_msg_writer *w, const struct sm_trace_record *r)
{
    put_uint(w, "vcpu", r->number);
    put_uint(w, "address", r->address);
    put_uint(w, "size", r->size);
    put_bool(w, "write", r->write);
    put_uint(w, "value", r->value);
}

static void put_record(struct sm_msg_writer *w, const struct sm_trace_record *r)
{
    static const struct {
        const char *name;
        uint32_t fields;
    } kinds[] = {
        [SM_TRACE_EXIT] = { "exit", 5 },
        [SM_TRACE_REQUEST] = { "request", 6 },
        [SM_TRACE_IRQ] = { "interrupt", 1 },
    };
    sm_msg_put_map(w, 5 + kinds[r->kind].fields);
    put_str(w, "type", "trace");
    put_str(w, "kind", kinds[r->kind].name);
    put_str(w, "what", r->what);
    put_uint(w, "time_ns", r->time_ns);
    put_uint(w, "duration_ns", r->duration_ns);
    switch (r->kind) {
    case SM_TRACE_EXIT: put_exit(w, r); return;
    case SM_TRACE_REQUEST: put_request(w, r); return;
    case SM_TRACE_IRQ: put_uint(w, "gsi", r->number); return;
    }
}

bool sm_cmd_put_trace(struct sm_machine *m, struct sm_msg_writer *w)
{
    struct sm_trace *trace = sm_vm_trace(m->vm);
    struct sm_trace_record record;
    uint64_t lost = sm_trace_take_lost(trace);
    if (lost) {
        sm_msg_put_map(w, 3);
        put_str(w, "type", "lost");
        put_str(w, "source", "trace");
        put_uint(w, "count", lost);
        return true;
    }
    if (sm_trace_take(trace, &record)) {
        put_record(w, &record);
        return true;
    }
    return false;
}
