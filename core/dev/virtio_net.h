/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-net (VIRTIO 1.2, 5.1): pairs of queues in front of a backend (net.h),
 * mergeable receive buffers, checksum and segmentation offloads where the backend
 * takes them. A control queue only where there are several pairs, to say how many
 * are used: there is no filter to program, the backend's policy sees every frame
 * anyway.
 */
#ifndef SM_VIRTIO_NET_H
#define SM_VIRTIO_NET_H

#include "dev/net.h"
#include "dev/virtio.h"
#include "dev/virtio_mmio.h"

#define SM_VIRTIO_NET_MAX_PAIRS 8

struct sm_virtio_net_config {
    uint8_t mac[6];
    uint16_t mtu;       /* 68 … SM_NET_MAX_MTU; 0: not told */
    unsigned pairs;     /* … SM_VIRTIO_NET_MAX_PAIRS; 0 is 1 */
    struct sm_net *net; /* the device's on success */
};

/* Read without a lock: monotonic. */
struct sm_virtio_net_stats {
    uint64_t rx_frames, rx_bytes, tx_frames, tx_bytes;
    uint64_t rx_dropped; /* no driver, or a frame it cannot take */
    uint64_t tx_dropped; /* nonsense */
};

int sm_virtio_net_create(const struct sm_virtio_env *env, const struct sm_virtio_net_config *cfg,
                         struct sm_virtio_mmio **out);
void sm_virtio_net_stats(struct sm_virtio_mmio *dev, struct sm_virtio_net_stats *out);

#endif
