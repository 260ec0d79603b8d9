/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What every device is to the VM that holds it. The ops table is static and
 * const; save and load are part of it from the first day.
 *
 * Life: created with everything it needs (memory, irq, I/O thread) → attached
 * (bus ranges, irqfd, ioeventfds; core/vm.c) → reset, save, load only while
 * every vCPU is parked and the I/O threads are held → destroyed after the
 * vCPUs have been joined, before its I/O thread is destroyed (held or not):
 * a device takes its descriptors off that thread itself.
 */
#ifndef SM_DEVICE_H
#define SM_DEVICE_H

struct sm_state_writer;
struct sm_state_reader;
struct sm_device;

struct sm_device_ops {
    const char *type; /* "virtio-blk", "serial" … */
    void (*reset)(struct sm_device *dev);
    int (*save)(struct sm_device *dev, struct sm_state_writer *w);
    int (*load)(struct sm_device *dev, struct sm_state_reader *r);
    void (*destroy)(struct sm_device *dev);
};

struct sm_device {
    const struct sm_device_ops *ops;
    char name[24];          /* "blk0": unique in the VM */
    struct sm_device *next; /* owned by the VM */
};

#endif
