/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of a VM: what vm.c and its parts, vm_*.c, share; nobody else includes it. */
#ifndef SM_VM_IMPL_H
#define SM_VM_IMPL_H

#include "boot.h"
#include "claim.h"
#include "console_log.h"
#include "debug.h"
#include "trace.h"
#include "vcpu.h"
#include "vm.h"

#define SM_VM_IOS 32
#define SM_GED_GSI 9 /* the line of the ACPI event device */

struct sm_virtio_slot {
    struct sm_virtio_mmio *dev;
    uint64_t gpa;
    uint32_t gsi;
};

struct sm_vm {
    unsigned cpus;
    struct sm_hv *hv;
    struct sm_mem mem;
    struct sm_bus bus;
    struct sm_events events;
    struct sm_console_log console;
    struct sm_debug debug;
    struct sm_trace trace;

    pthread_mutex_t state_lock;
    struct sm_vm_status status; /* locked */

    /* The owner's, below. */
    unsigned started_vcpus;
    struct sm_vcpu vcpus[SM_MAX_VCPUS];
    struct sm_io *ios[SM_VM_IOS];
    unsigned io_count;
    bool io_held;
    struct sm_device *devices; /* newest first */
    struct sm_virtio_slot virtio[SM_VIRTIO_MMIO_MAX];
    unsigned virtio_count;
    struct sm_clock stopped_at; /* the I/O thread's, with its timer */
    struct sm_io_timer clock_timer; /* armed while the clock is stopped */
    uint32_t next_gsi, last_gsi; /* last: given by sm_vm_next_irq */
    struct sm_claims claims;
    bool has_serial;
    bool kernel_loaded; /* there are ACPI tables and a generation id */
    bool loaded;        /* from a snapshot; not started yet */
    int pagemap_fd;     /* which pages were touched; -1: unknown */
    int clear_refs_fd;  /* begins to tell which are written; -1: cannot */
    struct sm_snap_base *base; /* the snapshot its memory lies over, or NULL */
    struct sm_boot_entry entry;
};

/* Hold every I/O thread between two callbacks; idempotent. */
void sm_vm_io_hold_all(struct sm_vm *vm);
void sm_vm_io_release_all(struct sm_vm *vm);

/* vm_platform.c. The devices that every machine has. */
int sm_vm_add_platform(struct sm_vm *vm);
/* The tables and a fresh generation id, into the guest's memory. */
int sm_vm_write_acpi(struct sm_vm *vm);
/* The doorbells of all virtio queues; a backend that has none (-ENOTSUP) lets the
 * writes exit to the bus, whose device serves them as well. */
int sm_vm_add_ioeventfds(struct sm_vm *vm);

#endif
