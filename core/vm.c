/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The virtual machine; see vm.h.
 *
 * Construction, in this order and for these reasons: the backend's VM, RAM,
 * vCPUs (on their threads, parked), the platform's devices (vm_platform.c), then
 * what the owner adds. ioeventfds are registered by sm_vm_start, after every memory slot
 * and vCPU, because the host kernel makes those wait for it (core/kvm/vm.c).
 * ACPI is written by sm_vm_start too, when all devices are known.
 *
 * Locks. `state_lock` covers the run state and is held while vCPUs are told to
 * run or park, so a stop from another thread and a start cannot cross. Order:
 * state_lock, then a vCPU's lock. It is never held across a callback.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "boot.h"
#include "console_log.h"
#include "vm_impl.h"

#define LOW_RAM_MAX (3ull << 30)
#define HIGH_RAM_GPA (4ull << 30)
#define MEMORY_MAX (1ull << 42)
#define FIRST_GSI 5
#define RESERVED_FDS 256

/* --- names and getters -------------------------------------------------- */

const char *sm_stop_name(enum sm_stop reason)
{
    static const char *const names[] = { "none",  "poweroff", "reboot",
                                         "panic", "crash",    "killed" };

    return reason <= SM_STOP_KILLED ? names[reason] : "unknown";
}

const char *sm_run_state_name(enum sm_run_state state)
{
    static const char *const names[] = { "created", "running", "paused", "stopped" };

    return state <= SM_VM_STOPPED ? names[state] : "unknown";
}

struct sm_mem *sm_vm_mem(struct sm_vm *vm)
{
    return &vm->mem;
}

struct sm_bus *sm_vm_bus(struct sm_vm *vm)
{
    return &vm->bus;
}

struct sm_events *sm_vm_events(struct sm_vm *vm)
{
    return &vm->events;
}

struct sm_hv *sm_vm_hv(struct sm_vm *vm)
{
    return vm->hv;
}

struct sm_console_log *sm_vm_console(struct sm_vm *vm)
{
    return &vm->console;
}

unsigned sm_vm_cpus(const struct sm_vm *vm)
{
    return vm->cpus;
}

void sm_vm_vcpu_stats(const struct sm_vm *vm, unsigned index, struct sm_vcpu_stats *out)
{
    const struct sm_vcpu *v = &vm->vcpus[index];

    memset(out, 0, sizeof(*out));
    if (index >= vm->started_vcpus)
        return;
    out->exits = atomic_load_explicit(&v->exits, memory_order_relaxed);
    out->mmio = atomic_load_explicit(&v->mmio, memory_order_relaxed);
    out->pio = atomic_load_explicit(&v->pio, memory_order_relaxed);
    out->halts = atomic_load_explicit(&v->halts, memory_order_relaxed);
    out->kicks = atomic_load_explicit(&v->kicks, memory_order_relaxed);
    out->unclaimed = atomic_load_explicit(&v->unclaimed, memory_order_relaxed);
    out->parked = atomic_load_explicit(&v->parked, memory_order_relaxed);
    out->debugs = atomic_load_explicit(&v->debugs, memory_order_relaxed);
}

/* --- run states --------------------------------------------------------- */

/* The one transition table: from each state, the bit of every state it may go
 * to. */
static const uint8_t transitions[] = {
    [SM_VM_CREATED] = 1 << SM_VM_RUNNING | 1 << SM_VM_STOPPED,
    [SM_VM_RUNNING] = 1 << SM_VM_PAUSED | 1 << SM_VM_STOPPED,
    [SM_VM_PAUSED] = 1 << SM_VM_RUNNING | 1 << SM_VM_STOPPED,
    [SM_VM_STOPPED] = 0,
};

static bool allowed(enum sm_run_state from, enum sm_run_state to)
{
    return transitions[from] >> to & 1;
}

/* state_lock held. */
static void request_all(struct sm_vm *vm, enum sm_vcpu_want want)
{
    for (unsigned i = 0; i < vm->started_vcpus; i++)
        sm_vcpu_request(&vm->vcpus[i], want);
}

/* Enter `to` when the table allows it and tell the vCPUs. Returns whether. */
static bool transition(struct sm_vm *vm, enum sm_run_state to, enum sm_vcpu_want want)
{
    bool ok;

    pthread_mutex_lock(&vm->state_lock);
    ok = allowed(vm->status.state, to);
    if (ok) {
        vm->status.state = to;
        request_all(vm, want);
    }
    pthread_mutex_unlock(&vm->state_lock);
    if (ok)
        sm_events_set(&vm->events, SM_EVENT_STATE);
    return ok;
}

void sm_vm_state(struct sm_vm *vm, struct sm_vm_status *out)
{
    pthread_mutex_lock(&vm->state_lock);
    *out = vm->status;
    pthread_mutex_unlock(&vm->state_lock);
}

static enum sm_run_state state_of(struct sm_vm *vm)
{
    struct sm_vm_status status;

    sm_vm_state(vm, &status);
    return status.state;
}

void sm_vm_stop(struct sm_vm *vm, enum sm_stop reason, const char *detail)
{
    bool first;

    pthread_mutex_lock(&vm->state_lock);
    first = allowed(vm->status.state, SM_VM_STOPPED);
    if (first) {
        vm->status.state = SM_VM_STOPPED;
        vm->status.reason = reason;
        snprintf(vm->status.detail, sizeof(vm->status.detail), "%s", detail ? detail : "");
        request_all(vm, SM_VCPU_PARK);
        for (unsigned i = 0; i < vm->started_vcpus; i++)
            sm_vcpu_abandon(&vm->vcpus[i], SM_CLAIMS);
    }
    pthread_mutex_unlock(&vm->state_lock);
    if (first)
        sm_events_set(&vm->events, SM_EVENT_STATE);
}

void sm_vm_io_hold_all(struct sm_vm *vm)
{
    if (vm->io_held)
        return;
    for (unsigned i = 0; i < vm->io_count; i++)
        sm_io_hold(vm->ios[i]);
    vm->io_held = true;
}

void sm_vm_io_release_all(struct sm_vm *vm)
{
    if (!vm->io_held)
        return;
    for (unsigned i = 0; i < vm->io_count; i++)
        sm_io_release(vm->ios[i]);
    vm->io_held = false;
}

/* --- creation ----------------------------------------------------------- */

static int say(char *err, size_t errlen, int code, const char *what)
{
    if (err && errlen)
        snprintf(err, errlen, "%s: %s", what, strerror(-code));
    return code;
}

static int map_ram(struct sm_vm *vm, uint64_t bytes)
{
    struct sm_mem_desc low = { .kind = SM_MEM_ANON, .fd = -1 };
    struct sm_mem_desc high = low;
    int err;

    if (!bytes)
        return 0;
    low.len_bytes = bytes < LOW_RAM_MAX ? bytes : LOW_RAM_MAX;
    high.gpa = HIGH_RAM_GPA;
    high.len_bytes = bytes - low.len_bytes;
    err = sm_mem_map(&vm->mem, &low);
    if (!err && high.len_bytes)
        err = sm_mem_map(&vm->mem, &high);
    return err;
}

/* A process with threads pays a grace period each time its descriptor table
 * grows; grow it once, now. */
static void reserve_fds(int fd)
{
    int high = fcntl(fd, F_DUPFD_CLOEXEC, RESERVED_FDS);

    if (high >= 0)
        close(high);
}

static int start_vcpus(struct sm_vm *vm)
{
    int err = 0, one;

    while (!err && vm->started_vcpus < vm->cpus) {
        err = sm_vcpu_start(&vm->vcpus[vm->started_vcpus], vm, vm->started_vcpus, vm->cpus);
        if (!err)
            vm->started_vcpus++;
    }
    for (unsigned i = 0; i < vm->started_vcpus; i++) {
        one = sm_vcpu_wait_ready(&vm->vcpus[i]);
        if (!err)
            err = one;
    }
    return err;
}

static int build(struct sm_vm *vm, const struct sm_vm_config *cfg, char *err, size_t errlen)
{
    int r = sm_events_init(&vm->events);

    if (r)
        return say(err, errlen, r, "cannot create an eventfd");
    reserve_fds(vm->events.fd);
    r = sm_console_log_init(&vm->console, &vm->events, SM_CONSOLE_LOG_BYTES);
    if (r)
        return say(err, errlen, r, "cannot allocate the console");
    r = sm_hv_create(&vm->hv);
    if (r)
        return say(err, errlen, r, r == -ENOENT || r == -EACCES ? "/dev/kvm" : "cannot create a VM");
    sm_mem_init(&vm->mem, vm->hv);
    r = map_ram(vm, cfg->memory_bytes);
    if (r)
        return say(err, errlen, r, "cannot map the guest's memory");
    r = start_vcpus(vm);
    if (r)
        return say(err, errlen, r, "cannot create a vCPU");
    r = sm_vm_io_new(vm, "io", &vm->ios[0]);
    if (!r)
        r = sm_vm_add_platform(vm);
    return r ? say(err, errlen, r, "cannot create the machine") : 0;
}

int sm_vm_create(const struct sm_vm_config *cfg, struct sm_vm **out, char *err, size_t errlen)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    struct sm_vm *vm;
    int r;

    if (!cfg->cpus || cfg->cpus > SM_MAX_VCPUS)
        return say(err, errlen, -EINVAL, "number of CPUs");
    if (cfg->memory_bytes % page || cfg->memory_bytes > MEMORY_MAX)
        return say(err, errlen, -EINVAL, "size of memory");
    vm = calloc(1, sizeof(*vm));
    if (!vm)
        return say(err, errlen, -ENOMEM, "cannot allocate a VM");
    vm->events.fd = -1;
    /* Now: a confined worker opens nothing. Without it a save reads all. */
    vm->pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    vm->clear_refs_fd = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
    vm->cpus = cfg->cpus;
    vm->next_gsi = FIRST_GSI;
    pthread_mutex_init(&vm->state_lock, NULL);
    sm_debug_init(&vm->debug, &vm->mem);
    sm_trace_init(&vm->trace, &vm->events);
    r = build(vm, cfg, err, errlen);
    if (r) {
        sm_vm_destroy(vm);
        return r;
    }
    *out = vm;
    return 0;
}

void sm_vm_destroy(struct sm_vm *vm)
{
    struct sm_device *dev;

    if (!vm)
        return;
    sm_vm_stop(vm, SM_STOP_KILLED, "");
    for (unsigned i = 0; i < vm->started_vcpus; i++)
        sm_vcpu_request(&vm->vcpus[i], SM_VCPU_QUIT);
    for (unsigned i = 0; i < vm->started_vcpus; i++)
        sm_vcpu_join(&vm->vcpus[i]);
    /* Devices leave their I/O threads by running on them. */
    sm_vm_io_release_all(vm);
    while ((dev = vm->devices)) {
        vm->devices = dev->next;
        dev->ops->destroy(dev);
    }
    for (unsigned i = 0; i < vm->io_count; i++)
        sm_io_destroy(vm->ios[i]);
    sm_mem_destroy(&vm->mem);
    if (vm->hv)
        sm_hv_destroy(vm->hv);
    sm_console_log_destroy(&vm->console);
    if (vm->events.fd >= 0)
        sm_events_destroy(&vm->events);
    sm_debug_destroy(&vm->debug);
    sm_trace_destroy(&vm->trace);
    if (vm->pagemap_fd >= 0)
        close(vm->pagemap_fd);
    if (vm->clear_refs_fd >= 0)
        close(vm->clear_refs_fd);
    sm_vm_set_base(vm, NULL);
    pthread_mutex_destroy(&vm->state_lock);
    free(vm);
}

/* --- devices ------------------------------------------------------------ */

struct sm_io *sm_vm_io(struct sm_vm *vm)
{
    return vm->ios[0];
}

int sm_vm_io_new(struct sm_vm *vm, const char *name, struct sm_io **out)
{
    int err;

    if (vm->io_count == SM_VM_IOS)
        return -ENOSPC;
    err = sm_io_create(&vm->ios[vm->io_count], name);
    if (err)
        return err;
    *out = vm->ios[vm->io_count++];
    return 0;
}

int sm_vm_add_device(struct sm_vm *vm, struct sm_device *dev)
{
    if (state_of(vm) != SM_VM_CREATED) {
        dev->ops->destroy(dev);
        return -EBUSY;
    }
    dev->next = vm->devices;
    vm->devices = dev;
    return 0;
}

/* --- boot and run ------------------------------------------------------- */

static int enter_kernel(struct sm_hv_vcpu *vcpu, void *arg)
{
    return sm_boot_enter(vcpu, arg);
}

int sm_vm_load_kernel(struct sm_vm *vm, const struct sm_boot_config *cfg, char *err,
                      size_t errlen)
{
    int r;

    if (state_of(vm) != SM_VM_CREATED || vm->kernel_loaded || vm->loaded)
        return say(err, errlen, -EBUSY, "kernel");
    r = sm_boot_load(&vm->mem, cfg, &vm->entry, err, errlen);
    if (r)
        return r;
    r = sm_vm_vcpu_call(vm, 0, enter_kernel, &vm->entry);
    if (r)
        return say(err, errlen, r, "cannot set the boot registers");
    vm->kernel_loaded = true;
    return 0;
}

int sm_vm_start(struct sm_vm *vm)
{
    int err = 0;

    if (state_of(vm) != SM_VM_CREATED)
        return -EINVAL;
    if (vm->kernel_loaded && !vm->loaded)
        err = sm_vm_write_acpi(vm);
    if (!err)
        err = sm_vm_add_ioeventfds(vm);
    if (err)
        return err;
    sm_vm_io_release_all(vm); /* held since a load */
    return transition(vm, SM_VM_RUNNING, SM_VCPU_RUN) ? 0 : -EINVAL;
}

int sm_vm_pause(struct sm_vm *vm)
{
    int err = -EINVAL, one;

    /* vCPUs first: one of them may be waiting for an I/O thread. */
    pthread_mutex_lock(&vm->state_lock);
    if (allowed(vm->status.state, SM_VM_PAUSED)) {
        request_all(vm, SM_VCPU_PARK);
        err = 0;
    }
    pthread_mutex_unlock(&vm->state_lock);
    for (unsigned i = 0; !err && i < vm->started_vcpus; i++) {
        one = sm_vcpu_wait_parked(&vm->vcpus[i]);
        err = err ? err : one;
    }
    if (err == -EBUSY) {
        pthread_mutex_lock(&vm->state_lock);
        if (vm->status.state == SM_VM_RUNNING)
            request_all(vm, SM_VCPU_RUN);
        pthread_mutex_unlock(&vm->state_lock);
    }
    if (err)
        return err;
    if (!transition(vm, SM_VM_PAUSED, SM_VCPU_PARK))
        return -EINVAL;
    sm_vm_io_hold_all(vm);
    return 0;
}

int sm_vm_resume(struct sm_vm *vm)
{
    if (state_of(vm) != SM_VM_PAUSED)
        return -EINVAL;
    sm_vm_io_release_all(vm);
    return transition(vm, SM_VM_RUNNING, SM_VCPU_RUN) ? 0 : -EINVAL;
}

int sm_vm_vcpu_call(struct sm_vm *vm, unsigned index,
                    int (*fn)(struct sm_hv_vcpu *vcpu, void *arg), void *arg)
{
    if (index >= vm->started_vcpus)
        return -EINVAL;
    return sm_vcpu_call(&vm->vcpus[index], fn, arg);
}

/* --- one vCPU alone ----------------------------------------------------- */

int sm_vm_vcpu_continue(struct sm_vm *vm, unsigned index, bool step)
{
    int err = -EINVAL;

    if (index >= vm->started_vcpus)
        return -EINVAL;
    pthread_mutex_lock(&vm->state_lock);
    if (vm->status.state == SM_VM_RUNNING || vm->status.state == SM_VM_PAUSED) {
        err = sm_vcpu_release(&vm->vcpus[index], step);
        if (!err && vm->status.state == SM_VM_RUNNING)
            sm_vcpu_request(&vm->vcpus[index], SM_VCPU_RUN);
    }
    pthread_mutex_unlock(&vm->state_lock);
    return err;
}

int sm_vm_vcpu_hold(struct sm_vm *vm, unsigned index)
{
    return index < vm->started_vcpus ? sm_vcpu_hold(&vm->vcpus[index]) : -EINVAL;
}

int sm_vm_vcpu_answer(struct sm_vm *vm, unsigned index, uint64_t value, bool hold)
{
    return index < vm->started_vcpus ? sm_vcpu_answer(&vm->vcpus[index], value, hold) : -EINVAL;
}

bool sm_vm_vcpu_take_exit(struct sm_vm *vm, unsigned index, struct sm_vcpu_exit *out)
{
    return index < vm->started_vcpus && sm_vcpu_take_exit(&vm->vcpus[index], out);
}

int sm_vm_claim(struct sm_vm *vm, enum sm_space space, uint64_t base, uint64_t len_bytes,
                unsigned *id)
{
    return sm_claim_add(&vm->claims, &vm->bus, space, base, len_bytes, id);
}

int sm_vm_release(struct sm_vm *vm, unsigned id)
{
    int err = sm_claim_release(&vm->claims, id);

    for (unsigned i = 0; !err && i < vm->started_vcpus; i++)
        sm_vcpu_abandon(&vm->vcpus[i], id);
    return err;
}

struct sm_trace *sm_vm_trace(struct sm_vm *vm)
{
    return &vm->trace;
}

bool sm_vm_slot(const struct sm_vm *vm, unsigned n, struct sm_vm_slot *out)
{
    if (n >= vm->virtio_count)
        return false;
    *out = (struct sm_vm_slot){ vm->virtio[n].dev, vm->virtio[n].gpa, vm->virtio[n].gsi };
    return true;
}

struct sm_debug *sm_vm_debug(struct sm_vm *vm)
{
    return &vm->debug;
}

static void nudge_all(struct sm_vm *vm)
{
    for (unsigned i = 0; i < vm->started_vcpus; i++)
        sm_vcpu_nudge(&vm->vcpus[i]);
}

int sm_vm_add_point(struct sm_vm *vm, const struct sm_debug_point *point, unsigned *id)
{
    int err = sm_debug_add(&vm->debug, point, id);

    if (!err)
        nudge_all(vm);
    return err;
}

int sm_vm_remove_point(struct sm_vm *vm, unsigned id)
{
    int err = sm_debug_remove(&vm->debug, id);

    if (!err)
        nudge_all(vm);
    return err;
}
