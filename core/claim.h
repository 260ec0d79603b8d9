/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bus ranges that belong to the VM's owner: an access parks its vCPU until the
 * owner answers (core/vcpu.h).
 *
 * A claim stays on the bus for the VM's life, because ranges are looked up
 * without a lock; released, it is closed, and an access gets what an access to
 * nobody gets. Claiming the same range again opens it again.
 *
 * Threads. add and release: the VM's owner, add while no vCPU runs. `open` is
 * atomic: vCPU threads read it.
 */
#ifndef SM_CLAIM_H
#define SM_CLAIM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "bus.h"

#define SM_CLAIMS 32

struct sm_claim {
    unsigned id;
    enum sm_space space;
    uint64_t base, len_bytes;
    atomic_bool open;
};

struct sm_claims {
    unsigned count;
    struct sm_claim items[SM_CLAIMS];
};

/* Has no handlers, so that the bus says nobody answered; sm_claim_find tells. */
extern const struct sm_bus_ops sm_claim_bus_ops;

/* As sm_bus_add; -EEXIST also when it is open already. */
int sm_claim_add(struct sm_claims *claims, struct sm_bus *bus, enum sm_space space,
                 uint64_t base, uint64_t len_bytes, unsigned *id);
int sm_claim_release(struct sm_claims *claims, unsigned id); /* -ENOENT */
/* The open claim that an access falls into, or NULL. */
struct sm_claim *sm_claim_find(const struct sm_bus *bus, enum sm_space space, uint64_t addr,
                               unsigned len);

#endif
