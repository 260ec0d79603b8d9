/* SPDX-License-Identifier: Apache-2.0 */
/* Address dispatch; see bus.h. */
#include "bus.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>

int sm_bus_add(struct sm_bus *bus, enum sm_space space, uint64_t base, uint64_t len_bytes,
               const struct sm_bus_ops *ops, void *dev)
{
    struct sm_bus_range *ranges = bus->ranges[space];
    unsigned n = bus->count[space], i = 0;

    if (!len_bytes || base + (len_bytes - 1) < base)
        return -EINVAL;
    if (n == SM_BUS_MAX_RANGES)
        return -ENOSPC;
    while (i < n && ranges[i].base < base)
        i++;
    if (i < n && ranges[i].base - base < len_bytes)
        return -EEXIST;
    if (i > 0 && base - ranges[i - 1].base < ranges[i - 1].len_bytes)
        return -EEXIST;
    memmove(&ranges[i + 1], &ranges[i], (n - i) * sizeof(*ranges));
    ranges[i] = (struct sm_bus_range){ base, len_bytes, ops, dev };
    bus->count[space] = n + 1;
    return 0;
}

int sm_bus_remove(struct sm_bus *bus, enum sm_space space, uint64_t base)
{
    struct sm_bus_range *ranges = bus->ranges[space];

    for (unsigned i = 0; i < bus->count[space]; i++) {
        if (ranges[i].base != base)
            continue;
        bus->count[space]--;
        memmove(&ranges[i], &ranges[i + 1], (bus->count[space] - i) * sizeof(*ranges));
        return 0;
    }
    return -ENOENT;
}

/* Binary search: the last range that begins at or below addr. */
const struct sm_bus_range *sm_bus_find(const struct sm_bus *bus, enum sm_space space,
                                       uint64_t addr, unsigned len)
{
    const struct sm_bus_range *ranges = bus->ranges[space];
    unsigned lo = 0, hi = bus->count[space];

    while (lo < hi) {
        unsigned mid = (lo + hi) / 2;

        if (ranges[mid].base <= addr)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo == 0)
        return NULL;
    ranges += lo - 1;
    if (addr - ranges->base >= ranges->len_bytes ||
        len > ranges->len_bytes - (addr - ranges->base))
        return NULL;
    return ranges;
}

static uint64_t mask(unsigned len)
{
    return len >= 8 ? UINT64_MAX : (1ull << (len * 8)) - 1;
}

int sm_bus_read(const struct sm_bus *bus, enum sm_space space, uint64_t addr, unsigned len,
                uint64_t *value)
{
    const struct sm_bus_range *r = sm_bus_find(bus, space, addr, len);

    if (!r || !r->ops->read) {
        *value = mask(len);
        return 0;
    }
    *value = r->ops->read(r->dev, addr - r->base, len) & mask(len);
    return 1;
}

int sm_bus_write(const struct sm_bus *bus, enum sm_space space, uint64_t addr, unsigned len,
                 uint64_t value)
{
    const struct sm_bus_range *r = sm_bus_find(bus, space, addr, len);

    if (!r || !r->ops->write)
        return 0;
    r->ops->write(r->dev, addr - r->base, len, value & mask(len));
    return 1;
}
