/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which pair of queues a frame for the guest goes to (VIRTIO 1.2, 5.1.6.5.6):
 * the one on which the guest last sent something of the same flow, so that both
 * directions are served by one of its CPUs. Flows share 256 entries; two in one
 * entry cost locality, nothing else.
 *
 * Threads: the device's I/O thread.
 */
#ifndef SM_DEV_NET_STEER_H
#define SM_DEV_NET_STEER_H

#include <stddef.h>
#include <stdint.h>

#define SM_NET_STEER_ENTRIES 256
/* Bytes of a frame that are looked at: a tag, IPv6, two ports. */
#define SM_NET_STEER_BYTES (18 + 40 + 4)

struct sm_net_steer {
    uint8_t pair[SM_NET_STEER_ENTRIES];
};

/* Of a frame's first bytes; the same for both directions of a flow. What is no
 * TCP or UDP goes by its addresses, what is no IP is 0. */
unsigned sm_net_steer_entry(const uint8_t *frame, size_t len);

#endif
