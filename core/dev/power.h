/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How an x86 guest ends its machine: the ACPI sleep control and reset
 * registers (hardware-reduced ACPI), the chipset's reset port and the keyboard
 * controller's reset line.
 *
 * Each has no state but the sleep status bit; the first that fires calls the
 * VM's stop. The keyboard controller is otherwise absent and reads as 0:
 * nothing to read, ready for a command.
 *
 * Threads. vCPU threads; the callback is made on them.
 * Source: ACPI 6.4, 4.8.3.7 and 4.8.3.6; Intel 82371AB (PIIX4) datasheet, RC.
 */
#ifndef SM_POWER_H
#define SM_POWER_H

#include <stdbool.h>

#include "bus.h"
#include "dev/device.h"

#define SM_POWER_PORT 0x600 /* sleep control, sleep status, reset: one byte each */
#define SM_POWER_PORTS 3
#define SM_POWER_SLEEP_CONTROL 0x600
#define SM_POWER_SLEEP_STATUS 0x601
#define SM_POWER_RESET 0x602
#define SM_POWER_RESET_VALUE 1
#define SM_POWER_S5 5 /* SLP_TYP of \_S5 */
#define SM_POWER_CF9 0xcf9
#define SM_POWER_KBD_DATA 0x60
#define SM_POWER_KBD_COMMAND 0x64

struct sm_power;

/* dev of each: struct sm_power * */
extern const struct sm_bus_ops sm_power_acpi_ops, sm_power_cf9_ops, sm_power_kbd_ops;

/* off: true when the guest powered off, false when it reset. */
int sm_power_create(void (*stop)(void *arg, bool off, const char *how), void *arg,
                    struct sm_power **out);
struct sm_device *sm_power_device(struct sm_power *power);

#endif
