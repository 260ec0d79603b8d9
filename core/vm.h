/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A virtual machine: memory, bus, vCPUs, devices and their threads.
 *
 * The platform (architecture decision, x86_64): RAM from 0 with a hole at
 * 3–4 GiB; virtio-mmio slots of 4 KiB from SM_VIRTIO_MMIO_BASE, each with its own GSI;
 * hardware-reduced ACPI describes all of it; COM1 at 0x3f8 (GSI 4).
 *
 * Run states, one table (core/vm.c), no flags beside it:
 *     created → running ⇄ paused → stopped; created|running|paused → stopped
 *
 * Threads. Every function here is for the thread that owns the VM, except
 * sm_vm_stop and sm_vm_state. vCPU threads are started, parked, by sm_vm_create
 * (so that registers can be set before the guest runs), and
 * joined by sm_vm_destroy.
 */
#ifndef SM_VM_H
#define SM_VM_H

#include <stdbool.h>
#include <stdint.h>

#include "backend.h"
#include "bus.h"
#include "event.h"
#include "io.h"
#include "irq.h"
#include "mem.h"
#include "dev/device.h"

#define SM_VIRTIO_MMIO_BASE 0xd0000000ull
#define SM_VIRTIO_MMIO_STRIDE 0x1000ull
#define SM_VIRTIO_MMIO_MAX 16 /* a GSI each, of the IOAPIC's 24 pins */

enum sm_run_state { SM_VM_CREATED, SM_VM_RUNNING, SM_VM_PAUSED, SM_VM_STOPPED };

/* Why a VM stopped. */
enum sm_stop {
    SM_STOP_NONE,
    SM_STOP_POWEROFF, /* ACPI S5, PSCI SYSTEM_OFF */
    SM_STOP_REBOOT,   /* ACPI reset register, 0xcf9, keyboard controller, PSCI SYSTEM_RESET */
    SM_STOP_PANIC,    /* told by pvpanic */
    SM_STOP_CRASH,    /* triple fault, or an exit the VMM cannot serve */
    SM_STOP_KILLED,   /* sm_vm_stop */
};

struct sm_trace;
struct sm_vm;

struct sm_vm_config {
    unsigned cpus;         /* 1 … SM_MAX_VCPUS */
    uint64_t memory_bytes; /* RAM; 0: none is mapped (the caller maps its own) */
};

struct sm_vm_status {
    enum sm_run_state state;
    enum sm_stop reason;
    char detail[96]; /* for people: "triple fault on vcpu 0" */
};

/* err: a buffer for one line of reason, may be NULL. */
int sm_vm_create(const struct sm_vm_config *cfg, struct sm_vm **out, char *err, size_t errlen);
/* Stops it, joins every thread, frees all. */
void sm_vm_destroy(struct sm_vm *vm);

struct sm_mem *sm_vm_mem(struct sm_vm *vm);
struct sm_bus *sm_vm_bus(struct sm_vm *vm);
struct sm_events *sm_vm_events(struct sm_vm *vm);
struct sm_hv *sm_vm_hv(struct sm_vm *vm);
struct sm_trace *sm_vm_trace(struct sm_vm *vm);
struct sm_console_log; /* core/console_log.h: what console.read drains */
struct sm_console_log *sm_vm_console(struct sm_vm *vm);
unsigned sm_vm_cpus(const struct sm_vm *vm);

/* The thread for streams (one a VM), or a fresh one for a device that blocks;
 * the VM destroys both. */
struct sm_io *sm_vm_io(struct sm_vm *vm);
int sm_vm_io_new(struct sm_vm *vm, const char *name, struct sm_io **out);

/* Devices: attach takes ownership. A virtio device takes the next mmio slot:
 * its address, its interrupt and one ioeventfd per queue are wired here and
 * described in the DSDT. -ENOSPC when slots are out. -EBUSY once started. */
struct sm_virtio_mmio;
int sm_vm_add_virtio(struct sm_vm *vm, struct sm_virtio_mmio *dev);
int sm_vm_next_irq(struct sm_vm *vm, struct sm_irq *irq); /* for that device */
int sm_vm_add_device(struct sm_vm *vm, struct sm_device *dev);
int sm_vm_add_serial(struct sm_vm *vm); /* COM1, onto sm_vm_console; once */

/* Linux (core/boot.h): vmlinux with a PVH note, or ELF entered at 64 bit. */
struct sm_boot_config {
    const char *kernel;  /* path of an ELF vmlinux */
    const char *initrd;  /* path or NULL */
    const char *cmdline;
};
int sm_vm_load_kernel(struct sm_vm *vm, const struct sm_boot_config *cfg, char *err,
                      size_t errlen);

/*
 * The whole machine but its memory, for a snapshot (core/snap.h): vCPUs,
 * interrupt controller, clock, devices. Save: paused. Load: into a new VM of
 * the same vCPUs and devices, its memory mapped; it then waits for sm_vm_start
 * with its devices held. The guest is told that it is a copy by a new
 * generation id. err gets one line.
 */
struct sm_state_writer;
struct sm_state_reader;
int sm_vm_save(struct sm_vm *vm, struct sm_state_writer *w, char *err, size_t errlen);
int sm_vm_load(struct sm_vm *vm, struct sm_state_reader *r, bool advance, char *err,
               size_t errlen);
/* Take every software breakpoint out of the guest's memory, or put it back: a
 * copy has none. Paused. */
void sm_vm_lift_breakpoints(struct sm_vm *vm, bool lift);
/* /proc/self/pagemap, opened before the worker was confined; -1: none. */
int sm_vm_pagemap_fd(const struct sm_vm *vm);
int sm_vm_clear_refs_fd(const struct sm_vm *vm); /* /proc/self/clear_refs, likewise */
/* The snapshot whose file its memory lies over (core/snap_base.h), NULL: none. The
 * VM owns it; a new one takes the old one's place. */
struct sm_snap_base;
struct sm_snap_base *sm_vm_base(const struct sm_vm *vm);
void sm_vm_set_base(struct sm_vm *vm, struct sm_snap_base *base);

int sm_vm_start(struct sm_vm *vm); /* starts running */
/* Returns with every vCPU at an instruction boundary and devices held. -EBUSY:
 * an access waits for the owner's answer; nothing has changed. */
int sm_vm_pause(struct sm_vm *vm);
int sm_vm_resume(struct sm_vm *vm);
/* Any thread. The first reason wins; the vCPUs leave; devices stay readable. */
void sm_vm_stop(struct sm_vm *vm, enum sm_stop reason, const char *detail);
void sm_vm_state(struct sm_vm *vm, struct sm_vm_status *out);

/*
 * A fault: the guest's paravirtual clock stands still, give or take
 * SM_CLOCK_STOP_NS, and goes on from there when it is let go. Timers of the guest
 * do not come due meanwhile. A guest that counts by the TSC instead (Linux:
 * clocksource=tsc) does not notice. -EALREADY: it is so already.
 */
#define SM_CLOCK_STOP_NS 10000000ull
int sm_vm_clock_stop(struct sm_vm *vm, bool stop);

/* Run fn(vcpu, arg) on that vCPU's thread, at an instruction boundary, and
 * return its result; a running vCPU is kicked for it and goes on after. */
int sm_vm_vcpu_call(struct sm_vm *vm, unsigned index,
                    int (*fn)(struct sm_hv_vcpu *vcpu, void *arg), void *arg);

/*
 * A vCPU stopped alone. What for is in its slot: sm_events_take_parked names
 * the vCPU, sm_vm_vcpu_take_exit the reason.
 */
enum sm_vcpu_exit_kind { SM_VCPU_ACCESS, SM_VCPU_STEP, SM_VCPU_BREAK, SM_VCPU_WATCH };

struct sm_vcpu_exit {
    enum sm_vcpu_exit_kind kind;
    /* ACCESS: to a claimed range; waits for sm_vm_vcpu_answer */
    unsigned claim;
    enum sm_space space;
    uint64_t addr, offset, data;
    unsigned len;
    bool write;
    /* the others: the vCPU is held, until sm_vm_vcpu_continue */
    uint64_t pc;    /* linear */
    unsigned point; /* BREAK, WATCH: which */
};
bool sm_vm_vcpu_take_exit(struct sm_vm *vm, unsigned index, struct sm_vcpu_exit *out);

/* A held vCPU goes on, for one instruction with step; in a paused VM, once it
 * is resumed. -EINVAL: not held, or the VM neither runs nor is paused. */
int sm_vm_vcpu_continue(struct sm_vm *vm, unsigned index, bool step);
/* Hold one vCPU, in any state. -EBUSY: it waits for an answer. */
int sm_vm_vcpu_hold(struct sm_vm *vm, unsigned index);
/* What an access waits for; with hold the vCPU is held behind it. */
int sm_vm_vcpu_answer(struct sm_vm *vm, unsigned index, uint64_t value, bool hold);

/* Bus ranges of the owner (core/claim.h); added while no vCPU runs. */
int sm_vm_claim(struct sm_vm *vm, enum sm_space space, uint64_t base, uint64_t len_bytes,
                unsigned *id);
int sm_vm_release(struct sm_vm *vm, unsigned id);

/* Breakpoints and watchpoints (core/debug.h), in any state. */
struct sm_debug;
struct sm_debug_point;
struct sm_debug *sm_vm_debug(struct sm_vm *vm);
int sm_vm_add_point(struct sm_vm *vm, const struct sm_debug_point *point, unsigned *id);
int sm_vm_remove_point(struct sm_vm *vm, unsigned id);

/* What is in the n-th virtio slot; false: nothing. */
struct sm_vm_slot {
    struct sm_virtio_mmio *dev;
    uint64_t gpa;
    uint32_t gsi;
};
bool sm_vm_slot(const struct sm_vm *vm, unsigned n, struct sm_vm_slot *out);

/* Counters, monotonic; read without a lock. */
struct sm_vcpu_stats {
    uint64_t exits, mmio, pio, halts, kicks;
    uint64_t unclaimed; /* of mmio and pio: no device answered */
    uint64_t parked;    /* of mmio and pio: the owner answered */
    uint64_t debugs;
};
void sm_vm_vcpu_stats(const struct sm_vm *vm, unsigned index, struct sm_vcpu_stats *out);

const char *sm_stop_name(enum sm_stop reason);       /* "poweroff" … */
const char *sm_run_state_name(enum sm_run_state st); /* "running" … */

#endif
