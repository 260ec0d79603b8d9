/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio over MMIO, version 2 (VIRTIO 1.2, 4.2): the register page in front of
 * a virtio device, and what the VM needs to attach one:
 *
 *     struct sm_virtio_env env = { mem, io, events, irq, "blk0" };
 *     sm_virtio_blk_create(&env, &cfg, &dev);
 *     sm_bus_add(bus, SM_SPACE_MMIO, base, SM_VIRTIO_MMIO_BYTES, &sm_virtio_mmio_bus_ops,
 * dev); for each q of sm_virtio_mmio_queues(dev): sm_hv_ioeventfd(hv, base +
 * SM_VIRTIO_MMIO_NOTIFY, 4, q, queue_fd(dev, q), true);
 *
 * Without ioeventfd a QueueNotify write reaches the bus and does the same.
 *
 * The device page answers 32-bit accesses to registers; the configuration
 * space from 0x100 any width. It has no shared memory regions.
 */
#ifndef SM_VIRTIO_MMIO_H
#define SM_VIRTIO_MMIO_H

#include "bus.h"
#include "dev/device.h"

struct sm_virtio;
struct sm_virtio_mmio;

#define SM_VIRTIO_MMIO_BYTES 0x1000
#define SM_VIRTIO_MMIO_NOTIFY 0x50

extern const struct sm_bus_ops sm_virtio_mmio_bus_ops; /* dev: struct sm_virtio_mmio * */

unsigned sm_virtio_mmio_queues(const struct sm_virtio_mmio *mmio);
int sm_virtio_mmio_queue_fd(const struct sm_virtio_mmio *mmio, unsigned queue);
/* The device to hold, reset, save, load and destroy. Destroyed after the bus
 * range and the ioeventfds are gone and before its I/O thread is: destroying
 * runs on that thread. */
struct sm_device *sm_virtio_mmio_device(struct sm_virtio_mmio *mmio);

/* For device types (virtio.h): the page in front of v. On failure v is left
 * as it is. */
int sm_virtio_mmio_create(struct sm_virtio *v, struct sm_virtio_mmio **out);
struct sm_virtio *sm_virtio_mmio_virtio(struct sm_virtio_mmio *mmio);

/* The generic part of every class's ops table. */
void sm_virtio_device_reset(struct sm_device *dev);
int sm_virtio_device_save(struct sm_device *dev, struct sm_state_writer *w);
int sm_virtio_device_load(struct sm_device *dev, struct sm_state_reader *r);
void sm_virtio_device_destroy(struct sm_device *dev);
#define SM_VIRTIO_DEVICE_OPS(name)                                                       \
    {                                                                                    \
        .type = (name), .reset = sm_virtio_device_reset, .save = sm_virtio_device_save,  \
        .load = sm_virtio_device_load, .destroy = sm_virtio_device_destroy,              \
    }

#endif
