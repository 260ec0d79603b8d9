/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bus: which device answers an MMIO or port access that left the guest.
 *
 * Two address spaces (MMIO, ports). Ranges are registered before the VM runs,
 * looked up without a lock on the vCPU's thread; handlers run on that thread
 * and lock their own device. What nobody owns reads as all ones and swallows
 * writes, as on a PC.
 */
#ifndef SM_BUS_H
#define SM_BUS_H

#include <stdint.h>

enum sm_space { SM_SPACE_MMIO, SM_SPACE_PIO };

/* off is relative to the range; len is 1, 2, 4 or 8 and off+len is inside. */
struct sm_bus_ops {
    uint64_t (*read)(void *dev, uint64_t off, unsigned len);
    void (*write)(void *dev, uint64_t off, unsigned len, uint64_t value);
};

struct sm_bus_range {
    uint64_t base, len_bytes;
    const struct sm_bus_ops *ops;
    void *dev;
};

#define SM_BUS_MAX_RANGES 64

struct sm_bus {
    unsigned count[2];
    struct sm_bus_range ranges[2][SM_BUS_MAX_RANGES]; /* sorted by base */
};

/* -EEXIST overlap, -EINVAL empty or wrapping, -ENOSPC. */
int sm_bus_add(struct sm_bus *bus, enum sm_space space, uint64_t base, uint64_t len_bytes,
               const struct sm_bus_ops *ops, void *dev);
int sm_bus_remove(struct sm_bus *bus, enum sm_space space, uint64_t base);
/* The range that holds all of an access, or NULL. */
const struct sm_bus_range *sm_bus_find(const struct sm_bus *bus, enum sm_space space,
                                       uint64_t addr, unsigned len);
/* An access that crosses a range's end goes to nobody. Returns whether some
 * device answered. */
int sm_bus_read(const struct sm_bus *bus, enum sm_space space, uint64_t addr, unsigned len,
                uint64_t *value);
int sm_bus_write(const struct sm_bus *bus, enum sm_space space, uint64_t addr, unsigned len,
                 uint64_t value);

#endif
