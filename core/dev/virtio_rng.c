/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-rng; see virtio_rng.h. A request gets at most REQUEST_BYTES (5.4.6.1
 * lets a device give less than asked), and a kick serves at most BATCH of
 * them before other devices of the thread have their turn.
 */
#include "dev/virtio_rng.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>

#define ID_ENTROPY 4
#define REQUEST_BYTES 4096
#define BATCH 32

struct rng {
    struct sm_virtio virtio;
};

static uint32_t fill(const struct sm_virtq_chain *chain)
{
    uint32_t done = 0;

    for (unsigned i = 0; i < chain->in && done < REQUEST_BYTES; i++) {
        const struct iovec *v = &chain->iov[chain->out + i];
        size_t want =
            v->iov_len < REQUEST_BYTES - done ? v->iov_len : REQUEST_BYTES - done;
        ssize_t got = getrandom(v->iov_base, want, 0);

        if (got > 0)
            done += (uint32_t)got;
        if (got != (ssize_t)want)
            break;
    }
    return done;
}

static void rng_kick(struct sm_virtio *v, unsigned queue)
{
    struct iovec iov[SM_VIRTQ_SEGS];
    struct sm_virtq_chain chain = { .iov = iov, .cap = SM_VIRTQ_SEGS };
    unsigned served = 0;

    do {
        while (served < BATCH && sm_virtio_pop(v, queue, &chain)) {
            sm_virtio_push(v, queue, chain.head, fill(&chain));
            served++;
        }
        if (served == BATCH) {
            sm_virtio_again(v, queue);
            break;
        }
    } while (sm_virtio_kicks_on(v, queue));
    sm_virtio_notify(v, queue);
}

static void rng_destroy(struct sm_virtio *v)
{
    sm_virtio_fini(v);
    free(v);
}

static const struct sm_virtio_class rng_class = {
    .device = SM_VIRTIO_DEVICE_OPS("virtio-rng"),
    .id = ID_ENTROPY,
    .queues = 1,
    .queue_size = 64,
    .kick = rng_kick,
    .destroy = rng_destroy,
};

int sm_virtio_rng_create(const struct sm_virtio_env *env, struct sm_virtio_mmio **out)
{
    struct rng *rng = calloc(1, sizeof(*rng));
    int err;

    if (!rng)
        return -ENOMEM;
    err = sm_virtio_init(&rng->virtio, env, &rng_class, 0);
    if (err) {
        free(rng);
        return err;
    }
    err = sm_virtio_mmio_create(&rng->virtio, out);
    if (err)
        rng_destroy(&rng->virtio);
    return err;
}
