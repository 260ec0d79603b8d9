/* SPDX-License-Identifier: Apache-2.0 */
/* Claimed bus ranges; see claim.h. */
#include "claim.h"

#include <errno.h>
#include <stddef.h>

const struct sm_bus_ops sm_claim_bus_ops = { NULL, NULL };

static struct sm_claim *same_range(struct sm_claims *claims, enum sm_space space, uint64_t base,
                                   uint64_t len_bytes)
{
    for (unsigned i = 0; i < claims->count; i++) {
        struct sm_claim *c = &claims->items[i];

        if (c->space == space && c->base == base && c->len_bytes == len_bytes)
            return c;
    }
    return NULL;
}

int sm_claim_add(struct sm_claims *claims, struct sm_bus *bus, enum sm_space space,
                 uint64_t base, uint64_t len_bytes, unsigned *id)
{
    struct sm_claim *c = same_range(claims, space, base, len_bytes);
    int err;

    if (c) {
        if (atomic_load(&c->open))
            return -EEXIST;
    } else {
        if (claims->count == SM_CLAIMS)
            return -ENOSPC;
        c = &claims->items[claims->count];
        err = sm_bus_add(bus, space, base, len_bytes, &sm_claim_bus_ops, c);
        if (err)
            return err;
        c->id = claims->count++;
        c->space = space;
        c->base = base;
        c->len_bytes = len_bytes;
    }
    atomic_store(&c->open, true);
    *id = c->id;
    return 0;
}

int sm_claim_release(struct sm_claims *claims, unsigned id)
{
    if (id >= claims->count || !atomic_exchange(&claims->items[id].open, false))
        return -ENOENT;
    return 0;
}

struct sm_claim *sm_claim_find(const struct sm_bus *bus, enum sm_space space, uint64_t addr,
                               unsigned len)
{
    const struct sm_bus_range *r = sm_bus_find(bus, space, addr, len);
    struct sm_claim *c;

    if (!r || r->ops != &sm_claim_bus_ops)
        return NULL;
    c = r->dev;
    return atomic_load(&c->open) ? c : NULL;
}
