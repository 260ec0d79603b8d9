/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The state of a whole VM but its memory: sections in the order they are
 * loaded.
 *
 *   machine   number of vCPUs and devices, whether there is a generation id
 *   clock     three readings, taken before the vCPUs'
 *   vCPUs     vCPU 0 first
 *   backend   interrupt controllers; they come after the local APICs
 *   devices   "device" (type and name), then its own sections
 *
 * A device's load kicks its queues and raises what was on its way; with the
 * I/O threads held, both happen once the VM starts. The generation id is
 * renewed last: its interrupt must find the controllers loaded, and the guest
 * must find a new id before its first instruction.
 *
 * Threads: the VM's owner.
 */
#include "vm_impl.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "snap_base.h"
#include "state.h"

#define TYPE_BYTES 24
#define GENERATION_BYTES 16

int sm_vm_pagemap_fd(const struct sm_vm *vm)
{
    return vm->pagemap_fd;
}

int sm_vm_clear_refs_fd(const struct sm_vm *vm)
{
    return vm->clear_refs_fd;
}

struct sm_snap_base *sm_vm_base(const struct sm_vm *vm)
{
    return vm->base;
}

void sm_vm_set_base(struct sm_vm *vm, struct sm_snap_base *base)
{
    if (vm->base != base)
        sm_snap_base_free(vm->base);
    vm->base = base;
}

__attribute__((format(printf, 4, 5))) static int say(char *err, size_t errlen, int code,
                                                     const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    if (err && errlen) {
        vsnprintf(err, errlen, fmt, ap);
        for (char *c = err; *c; c++) /* names come from the file: one line, in print */
            *c = *c < ' ' || *c == 127 ? '?' : *c;
    }
    va_end(ap);
    return code;
}

static enum sm_run_state state_of(struct sm_vm *vm)
{
    struct sm_vm_status status;

    sm_vm_state(vm, &status);
    return status.state;
}

void sm_vm_lift_breakpoints(struct sm_vm *vm, bool lift)
{
    for (unsigned id = 0; id < SM_DEBUG_POINTS; id++)
        if (vm->debug.points[id].used)
            sm_debug_lift(&vm->debug, id, lift);
}

/* ---- save ---- */

static void save_machine(struct sm_vm *vm, struct sm_state_writer *w)
{
    uint32_t devices = 0;

    for (const struct sm_device *d = vm->devices; d; d = d->next)
        devices++;
    sm_state_begin(w, "machine", 1);
    sm_state_put_u32(w, vm->cpus);
    sm_state_put_u32(w, devices);
    sm_state_put_u8(w, vm->kernel_loaded);
    sm_state_end(w);
}

static int save_clock(struct sm_vm *vm, struct sm_state_writer *w)
{
    struct sm_clock clock;
    int err = sm_hv_clock_get(vm->hv, &clock);

    if (err)
        return err;
    sm_state_begin(w, "clock", 1);
    sm_state_put_u64(w, clock.guest_ticks);
    sm_state_put_u64(w, clock.host_ns);
    sm_state_put_u64(w, clock.wall_ns);
    sm_state_end(w);
    return 0;
}

static int save_vcpu(struct sm_hv_vcpu *vcpu, void *arg)
{
    return sm_hv_vcpu_save(vcpu, arg);
}

static int save_device(struct sm_device *dev, struct sm_state_writer *w)
{
    char type[TYPE_BYTES] = "", name[sizeof(dev->name)] = "";

    snprintf(type, sizeof(type), "%s", dev->ops->type);
    snprintf(name, sizeof(name), "%s", dev->name);
    sm_state_begin(w, "device", 1);
    sm_state_put_bytes(w, type, sizeof(type));
    sm_state_put_bytes(w, name, sizeof(name));
    sm_state_end(w);
    return dev->ops->save(dev, w);
}

int sm_vm_save(struct sm_vm *vm, struct sm_state_writer *w, char *err, size_t errlen)
{
    int r;

    if (state_of(vm) != SM_VM_PAUSED)
        return say(err, errlen, -EINVAL, "the VM is not paused");
    save_machine(vm, w);
    r = save_clock(vm, w);
    if (r)
        return say(err, errlen, r, "the clock: %s", strerror(-r));
    for (unsigned i = 0; i < vm->cpus; i++) {
        r = sm_vm_vcpu_call(vm, i, save_vcpu, w);
        if (r)
            return say(err, errlen, r, "vcpu %u: %s", i, strerror(-r));
    }
    r = sm_hv_save(vm->hv, w);
    if (r)
        return say(err, errlen, r, "the interrupt controllers: %s", strerror(-r));
    for (struct sm_device *d = vm->devices; d; d = d->next) {
        r = save_device(d, w);
        if (r)
            return say(err, errlen, r, "%s: %s", d->name,
                       r == -ENOTSUP ? "what it writes to is no overlay"
                       : r == -EBUSY ? "vhost works on its queues, so it cannot be saved"
                                     : strerror(-r));
    }
    return w->error ? say(err, errlen, w->error, "%s", strerror(-w->error)) : 0;
}

/* ---- load ---- */

struct load {
    struct sm_state_reader *r;
    uint64_t advance_ns;
};

static int load_vcpu(struct sm_hv_vcpu *vcpu, void *arg)
{
    struct load *load = arg;

    return sm_hv_vcpu_load(vcpu, load->r, load->advance_ns);
}

static uint64_t wall_since(const struct sm_clock *then)
{
    struct timespec ts;
    uint64_t now;

    clock_gettime(CLOCK_REALTIME, &ts);
    now = (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
    return now > then->wall_ns ? now - then->wall_ns : 0;
}

static int load_device(struct sm_device *dev, struct sm_state_reader *r, char *err, size_t errlen)
{
    char type[TYPE_BYTES], name[sizeof(dev->name)];
    int e;

    if (sm_state_open(r, "device") != 1)
        return say(err, errlen, -EBADMSG, "damaged state: no device where one should be");
    sm_state_get_bytes(r, type, sizeof(type));
    sm_state_get_bytes(r, name, sizeof(name));
    type[sizeof(type) - 1] = name[sizeof(name) - 1] = 0;
    sm_state_close(r);
    if (strcmp(type, dev->ops->type) != 0 || strcmp(name, dev->name) != 0)
        return say(err, errlen, -ESTALE, "it has %.24s (%.24s) where this machine has %s (%s)", name,
                   type, dev->name, dev->ops->type);
    e = dev->ops->load(dev, r);
    if (e || r->error)
        return say(err, errlen, e ? e : r->error, "%s: %s", dev->name,
                   e == -ESTALE ? "it is of another shape" : "damaged state");
    return 0;
}

/* Tell the guest that it is not the one it was. */
static int renew_generation(struct sm_vm *vm)
{
    uint8_t *id = sm_mem_ptr(&vm->mem, SM_BOOT_VMGENID_GPA, GENERATION_BYTES);
    int err;

    if (!id)
        return -EFAULT;
    if (getrandom(id, GENERATION_BYTES, 0) != GENERATION_BYTES)
        return -EIO;
    err = sm_hv_irq_line(vm->hv, SM_GED_GSI, true);
    return err ? err : sm_hv_irq_line(vm->hv, SM_GED_GSI, false);
}

static int load_machine(struct sm_vm *vm, struct sm_state_reader *r, char *err, size_t errlen)
{
    uint32_t cpus, devices, have = 0;

    for (const struct sm_device *d = vm->devices; d; d = d->next)
        have++;
    if (sm_state_open(r, "machine") != 1)
        return say(err, errlen, -EBADMSG, "damaged state: no machine");
    cpus = sm_state_get_u32(r);
    devices = sm_state_get_u32(r);
    vm->kernel_loaded = sm_state_get_u8(r);
    sm_state_close(r);
    if (r->error)
        return say(err, errlen, r->error, "damaged state: no machine");
    if (cpus != vm->cpus)
        return say(err, errlen, -ESTALE, "it has %u vCPUs, this machine %u", cpus, vm->cpus);
    if (devices != have)
        return say(err, errlen, -ESTALE, "it has %u devices, this machine %u", devices, have);
    return 0;
}

static int load_all(struct sm_vm *vm, struct sm_state_reader *r, bool advance, char *err,
                    size_t errlen)
{
    struct load load = { .r = r };
    struct sm_clock clock;
    int e = load_machine(vm, r, err, errlen);

    if (e)
        return e;
    if (sm_state_open(r, "clock") != 1)
        return say(err, errlen, -EBADMSG, "damaged state: no clock");
    clock.guest_ticks = sm_state_get_u64(r);
    clock.host_ns = sm_state_get_u64(r);
    clock.wall_ns = sm_state_get_u64(r);
    sm_state_close(r);
    if (advance)
        load.advance_ns = wall_since(&clock);
    for (unsigned i = 0; i < vm->cpus; i++) {
        e = sm_vm_vcpu_call(vm, i, load_vcpu, &load);
        if (e)
            return say(err, errlen, e, "vcpu %u: %s", i,
                       e == -EBADMSG ? "damaged state" : strerror(-e));
    }
    e = sm_hv_load(vm->hv, r);
    if (e)
        return say(err, errlen, e, "the interrupt controllers: %s",
                   e == -EBADMSG ? "damaged state" : strerror(-e));
    e = sm_hv_clock_set(vm->hv, &clock, advance);
    if (e)
        return say(err, errlen, e, "the clock: %s", strerror(-e));
    for (struct sm_device *d = vm->devices; d; d = d->next) {
        e = load_device(d, r, err, errlen);
        if (e)
            return e;
    }
    if (r->error || r->pos != r->len)
        return say(err, errlen, -EBADMSG, "damaged state: something follows its end");
    if (!vm->kernel_loaded)
        return 0;
    e = renew_generation(vm);
    return e ? say(err, errlen, e, "the generation id: %s", strerror(-e)) : 0;
}

int sm_vm_load(struct sm_vm *vm, struct sm_state_reader *r, bool advance, char *err,
               size_t errlen)
{
    int e;

    if (state_of(vm) != SM_VM_CREATED || vm->kernel_loaded || vm->loaded)
        return say(err, errlen, -EBUSY, "the VM is not new");
    vm->loaded = true;
    sm_vm_io_hold_all(vm);
    e = load_all(vm, r, advance, err, errlen);
    if (e) /* half a machine must never run */
        sm_vm_stop(vm, SM_STOP_KILLED, "its snapshot could not be loaded");
    return e;
}
