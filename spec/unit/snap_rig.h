/* SPDX-License-Identifier: Apache-2.0 */
/* A machine with one of most devices on the fake backend, for snapshot tests. */
#ifndef SNAP_RIG_H
#define SNAP_RIG_H

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dev/disk.h"
#include "dev/virtio_blk.h"
#include "dev/virtio_console.h"
#include "dev/virtio_rng.h"
#include "snap.h"
#include "vm.h"

#define RIG_DISK_BYTES (1u << 20)
#define RIG_MEMORY (8u << 20)
#define RIG_PAGE 4096u

static inline struct sm_virtio_env rig_env(struct sm_vm *vm, struct sm_io *io, const char *name)
{
    struct sm_virtio_env env = {
        .mem = sm_vm_mem(vm), .io = io, .events = sm_vm_events(vm), .name = name
    };

    if (sm_vm_next_irq(vm, &env.irq))
        abort();
    return env;
}

/* base_fd -1: a disk of zeros, as a copy begins with. The disk stays the VM's. */
static inline struct sm_vm *rig_machine(unsigned cpus, uint64_t memory, int base_fd,
                                        const char *overlay, struct sm_disk **disk_out)
{
    struct sm_vm_config cfg = { .cpus = cpus, .memory_bytes = memory };
    struct sm_disk_extent extent = { .fd = base_fd, .length_bytes = RIG_DISK_BYTES };
    struct sm_disk_config disk_cfg = { .mode = SM_DISK_OVERLAY,
                                       .extents = &extent,
                                       .extent_count = base_fd >= 0,
                                       .size_bytes = RIG_DISK_BYTES,
                                       .overlay = overlay,
                                       .ephemeral = true };
    struct sm_blk_config blk = { .serial = "scratch" };
    struct sm_virtio_mmio *dev;
    struct sm_virtio_env env;
    struct sm_io *io;
    struct sm_vm *vm;

    if (sm_vm_create(&cfg, &vm, NULL, 0) || sm_vm_add_serial(vm))
        abort();
    env = rig_env(vm, sm_vm_io(vm), "rng0");
    if (sm_virtio_rng_create(&env, &dev) || sm_vm_add_virtio(vm, dev))
        abort();
    env = rig_env(vm, sm_vm_io(vm), "console0");
    if (sm_virtio_console_create(&env, sm_vm_console(vm), &dev) || sm_vm_add_virtio(vm, dev))
        abort();
    if (sm_disk_open(&disk_cfg, &blk.disk, NULL, 0) || sm_vm_io_new(vm, "blk0", &io))
        abort();
    env = rig_env(vm, io, "blk0");
    if (sm_virtio_blk_create(&env, &blk, &dev) || sm_vm_add_virtio(vm, dev))
        abort();
    if (disk_out)
        *disk_out = blk.disk;
    return vm;
}

/* Write a snapshot of a paused machine; fd stays the caller's. */
static inline int rig_write(struct sm_vm *vm, int fd, const struct sm_snap_how *how,
                            const char *meta, struct sm_snap_info *info, char *why, size_t len)
{
    struct sm_snap_writer *w;
    uint64_t stored;
    int err = sm_snap_begin(vm, fcntl(fd, F_DUPFD_CLOEXEC, 0), how, &w, why, len);

    if (err)
        return err;
    err = sm_snap_capture(w, why, len);
    if (!err)
        err = sm_snap_finish(w, meta, meta ? strlen(meta) : 0, false, info, &stored, why, len);
    sm_snap_writer_close(w);
    return err;
}

/* The file of a snapshot of a paused machine, in memory. */
static inline int rig_save(struct sm_vm *vm, const char *meta)
{
    struct sm_snap_how how = { 0 };
    struct sm_snap_info info;
    char why[200] = "";
    int fd = memfd_create("snap", MFD_CLOEXEC);

    if (rig_write(vm, fd, &how, meta, &info, why, sizeof(why))) {
        fprintf(stderr, "save: %s\n", why);
        abort();
    }
    return fd;
}

#endif
