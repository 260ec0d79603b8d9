/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-console (VIRTIO 1.2, 5.3): one port, no multiport. What the guest
 * prints goes into the VM's console log; the device becomes the log's input.
 */
#ifndef SM_VIRTIO_CONSOLE_H
#define SM_VIRTIO_CONSOLE_H

#include "console_log.h"
#include "dev/virtio.h"
#include "dev/virtio_mmio.h"

/* log outlives the device. */
int sm_virtio_console_create(const struct sm_virtio_env *env, struct sm_console_log *log,
                             struct sm_virtio_mmio **out);

/* Any thread: what is typed to the guest; returns how many bytes were taken
 * (the queue is bounded). sm_console_log_input ends here. */
size_t sm_virtio_console_input(struct sm_virtio_mmio *dev, const void *buf, size_t len);

#endif
