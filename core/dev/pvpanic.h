/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pvpanic: how a guest kernel says that it panicked. One byte at a port that
 * the DSDT names (QEMU0001): a read tells which events are known, a write
 * tells one. It is the only source of a panic; console text never is.
 *
 * Threads. vCPU threads; the callback is made on them. No state.
 * Source: QEMU docs/specs/pvpanic.
 */
#ifndef SM_PVPANIC_H
#define SM_PVPANIC_H

#include <stdbool.h>

#include "bus.h"
#include "dev/device.h"

#define SM_PVPANIC_PORT 0x505
#define SM_PVPANIC_PANICKED 1
#define SM_PVPANIC_CRASH_LOADED 2

struct sm_pvpanic;

extern const struct sm_bus_ops sm_pvpanic_bus_ops; /* dev: struct sm_pvpanic * */

/* handled: the guest has a crash kernel and goes on with that. */
int sm_pvpanic_create(void (*panicked)(void *arg, bool handled), void *arg,
                      struct sm_pvpanic **out);
struct sm_device *sm_pvpanic_device(struct sm_pvpanic *pvpanic);

#endif
