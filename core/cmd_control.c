/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Commands that let the owner take part in running the guest: bus ranges of
 * its own, doorbells, one vCPU held, stepped or let go, breakpoints.
 */
#include "cmd_call.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "debug.h"

static int check_vcpu(struct sm_call *call, unsigned *index)
{
    *index = (unsigned)sm_call_uint(call, "vcpu", 0);
    if (*index >= sm_vm_cpus(call->m->vm)) {
        return sm_call_misuse(call, "vcpu: expected less than %u, got %u",
                              sm_vm_cpus(call->m->vm), *index);
    }
    return 0;
}

/* ---- bus ---- */

int sm_cmd_bus_claim(struct sm_call *call)
{
    enum sm_space space = sm_call_uint(call, "space", 0) ? SM_SPACE_PIO : SM_SPACE_MMIO;
    uint64_t base = sm_call_uint(call, "base", 0), size = sm_call_uint(call, "size", 0);
    unsigned id;
    if (space == SM_SPACE_PIO && (base > 0xffff || size > 0x10000 - base)) {
        return sm_call_misuse(call, "base + size: ports end at 0xffff");
    }
    int err = sm_vm_claim(call->m->vm, space, base, size, &id);
    if (err < 0) {
        const char *why = err == -EEXIST   ? "something owns part of this range already"
                          : err == -ENOSPC ? "no more ranges"
                          : err == -EINVAL ? "the range wraps"
                                           : strerror(-err);
        return sm_call_fail(call, err, "0x%" PRIx64 " + 0x%" PRIx64 ": %s", base, size, why);
    }
    sm_msg_put_uint(call->out, id);
    return 0;
}

int sm_cmd_bus_release(struct sm_call *call)
{
    int err = sm_vm_release(call->m->vm, (unsigned)sm_call_uint(call, "claim", 0));
    return err < 0 ? sm_call_fail(call, err, "no such claim") : 0;
}

int sm_cmd_vcpu_answer(struct sm_call *call)
{
    unsigned index;
    int err = check_vcpu(call, &index);
    if (err) {
        return err;
    }
    err = sm_vm_vcpu_answer(call->m->vm, index, sm_call_uint(call, "value", UINT64_MAX),
                            sm_call_bool(call, "hold", false));
    return err < 0 ? sm_call_fail(call, err, "vcpu %u waits for no answer", index) : 0;
}

/* ---- doorbells ---- */

int sm_cmd_doorbell_add(struct sm_call *call)
{
    unsigned len = (unsigned)sm_call_uint(call, "len", 0);
    bool valued = sm_call_arg(call, "value")->given;
    if (len & (len - 1u) || valued != (len != 0)) {
        return sm_call_misuse(call, "len: 1, 2, 4 or 8, and goes with value; both absent: any write");
    }
    struct sm_doorbell *bell = call->m->doorbells;
    unsigned id = 0;
    while (id < SM_DOORBELLS && bell[id].vm) {
        id++;
    }
    uint64_t gpa = sm_call_uint(call, "gpa", 0);
    int err = id == SM_DOORBELLS
                  ? -ENOSPC
                  : sm_doorbell_open(&bell[id], call->m->vm, gpa, len,
                                     (uint32_t)sm_call_uint(call, "value", 0));
    if (err < 0) {
        const char *why = err == -ENOSPC   ? "no more doorbells"
                          : err == -EEXIST ? "there is one already"
                                           : strerror(-err);
        return sm_call_fail(call, err, "0x%" PRIx64 ": %s", gpa, why);
    }
    sm_msg_put_uint(call->out, id);
    return 0;
}

int sm_cmd_doorbell_remove(struct sm_call *call)
{
    uint64_t id = sm_call_uint(call, "doorbell", 0);
    if (id >= SM_DOORBELLS || !call->m->doorbells[id].vm) {
        return sm_call_fail(call, -ENOENT, "no such doorbell");
    }
    sm_doorbell_close(&call->m->doorbells[id]);
    return 0;
}

/* ---- one vCPU ---- */

int sm_cmd_vcpu_hold(struct sm_call *call)
{
    unsigned index;
    int err = check_vcpu(call, &index);
    if (err) {
        return err;
    }
    err = sm_vm_vcpu_hold(call->m->vm, index);
    return err < 0 ? sm_call_fail(call, err, "vcpu %u waits for an answer", index) : 0;
}

static int let_go(struct sm_call *call, bool step)
{
    unsigned index;
    int err = check_vcpu(call, &index);
    if (err) {
        return err;
    }
    err = sm_vm_vcpu_continue(call->m->vm, index, step);
    return err < 0 ? sm_call_fail(call, err, "vcpu %u is not held", index) : 0;
}

int sm_cmd_vcpu_continue(struct sm_call *call)
{
    return let_go(call, false);
}

int sm_cmd_vcpu_step(struct sm_call *call)
{
    return let_go(call, true);
}

struct place {
    uint64_t linear, gpa;
};

static int translate(struct sm_hv_vcpu *vcpu, void *arg)
{
    struct place *place = arg;
    return sm_hv_translate(vcpu, place->linear, &place->gpa);
}

static int find_place(struct sm_call *call, struct place *place)
{
    unsigned index;
    int err = check_vcpu(call, &index);
    if (err) {
        return err;
    }
    err = sm_vm_vcpu_call(call->m->vm, index, translate, place);
    if (err < 0) {
        return sm_call_fail(call, err, "0x%" PRIx64 ": %s", place->linear,
                            err == -EFAULT  ? "not mapped there"
                            : err == -EBUSY ? "the vcpu waits for an answer"
                                            : strerror(-err));
    }
    return 0;
}

int sm_cmd_vcpu_translate(struct sm_call *call)
{
    struct place place = { .linear = sm_call_uint(call, "address", 0) };
    int err = find_place(call, &place);
    if (!err) {
        sm_msg_put_uint(call->out, place.gpa);
    }
    return err;
}

/* ---- breakpoints ---- */

int sm_cmd_breakpoint_add(struct sm_call *call)
{
    struct sm_debug_point point = {
        .kind = (enum sm_debug_kind)sm_call_uint(call, "kind", SM_DEBUG_HARDWARE),
        .addr = sm_call_uint(call, "address", 0),
        .len = (uint8_t)sm_call_uint(call, "len", 1),
        .read = sm_call_bool(call, "read", false),
    };
    bool watch = point.kind == SM_DEBUG_WATCHPOINT;
    if (!watch && (sm_call_arg(call, "len")->given || sm_call_arg(call, "read")->given)) {
        return sm_call_misuse(call, "len, read: go with kind 'watch', and only with it");
    }
    if (point.kind == SM_DEBUG_SOFTWARE) {
        struct place place = { .linear = point.addr };
        int err = find_place(call, &place);
        if (err) {
            return err;
        }
        point.gpa = place.gpa;
    }
    unsigned id;
    int err = sm_vm_add_point(call->m->vm, &point, &id);
    if (err < 0) {
        const char *why = err == -ENOSPC   ? "no more of this kind"
                          : err == -EEXIST ? "there is one already"
                          : err == -EINVAL ? "len is 1, 2, 4 or 8, and the address a multiple of it"
                          : err == -EFAULT ? "no memory there that can be written"
                                           : strerror(-err);
        return sm_call_fail(call, err, "0x%" PRIx64 ": %s", point.addr, why);
    }
    sm_msg_put_uint(call->out, id);
    return 0;
}

int sm_cmd_breakpoint_remove(struct sm_call *call)
{
    uint64_t id = sm_call_uint(call, "breakpoint", 0);
    int err = id < SM_DEBUG_POINTS ? sm_vm_remove_point(call->m->vm, (unsigned)id) : -ENOENT;
    return err < 0 ? sm_call_fail(call, err, "no such breakpoint") : 0;
}

/* ---- their events ---- */

static void put_pair(struct sm_msg_writer *w, const char *key, uint64_t value)
{
    sm_msg_put_str(w, key);
    sm_msg_put_uint(w, value);
}

static void put_access(struct sm_msg_writer *w, const struct sm_vcpu_exit *exit)
{
    sm_msg_put_str(w, exit->space == SM_SPACE_PIO ? "pio" : "mmio");
    put_pair(w, "claim", exit->claim);
    put_pair(w, "address", exit->addr);
    put_pair(w, "offset", exit->offset);
    put_pair(w, "len", exit->len);
    sm_msg_put_str(w, "write");
    sm_msg_put_bool(w, exit->write);
    if (exit->write) {
        put_pair(w, "value", exit->data);
    }
}

bool sm_cmd_put_exit(struct sm_machine *m, struct sm_msg_writer *w)
{
    static const char *const reasons[] = {
        [SM_VCPU_STEP] = "step", [SM_VCPU_BREAK] = "breakpoint", [SM_VCPU_WATCH] = "watchpoint",
    };
    struct sm_vcpu_exit exit;
    int vcpu;
    do {
        vcpu = sm_events_take_parked(sm_vm_events(m->vm));
        if (vcpu < 0) {
            return false;
        }
    } while (!sm_vm_vcpu_take_exit(m->vm, (unsigned)vcpu, &exit));
    bool access = exit.kind == SM_VCPU_ACCESS, point = !access && exit.kind != SM_VCPU_STEP;
    sm_msg_put_map(w, access ? 8u + exit.write : 4u + point);
    sm_msg_put_str(w, "type");
    sm_msg_put_str(w, "exit");
    put_pair(w, "vcpu", (uint64_t)vcpu);
    sm_msg_put_str(w, "reason");
    if (access) {
        put_access(w, &exit);
        return true;
    }
    sm_msg_put_str(w, reasons[exit.kind]);
    put_pair(w, "pc", exit.pc);
    if (point) {
        put_pair(w, "breakpoint", exit.point);
    }
    return true;
}

bool sm_cmd_put_doorbell(struct sm_machine *m, struct sm_msg_writer *w)
{
    for (unsigned i = 0; i < SM_DOORBELLS; i++) {
        uint64_t n = m->doorbells[i].vm ? atomic_exchange(&m->doorbells[i].count, 0) : 0;
        if (n) {
            sm_msg_put_map(w, 3);
            sm_msg_put_str(w, "type");
            sm_msg_put_str(w, "doorbell");
            put_pair(w, "doorbell", i);
            put_pair(w, "count", n);
            return true;
        }
    }
    return false;
}
