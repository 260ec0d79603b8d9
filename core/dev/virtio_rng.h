/* SPDX-License-Identifier: Apache-2.0 */
/* virtio-rng (VIRTIO 1.2, 5.4): getrandom(2), a bounded number of bytes each. */
#ifndef SM_VIRTIO_RNG_H
#define SM_VIRTIO_RNG_H

#include "dev/virtio.h"
#include "dev/virtio_mmio.h"

int sm_virtio_rng_create(const struct sm_virtio_env *env, struct sm_virtio_mmio **out);

#endif
