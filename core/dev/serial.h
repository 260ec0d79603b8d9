/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A 16550A serial port, for early messages and a console that needs no driver.
 *
 * What is written goes to the console ring at once, so the transmitter is
 * always empty; what is typed waits in a bounded queue, larger than the real
 * FIFO. The interrupt line is edge triggered (irq.h): an edge is raised each
 * time a cause becomes new, and when bytes arrive. Modem lines say that a
 * terminal is there; loop-back works, for drivers probe with it.
 *
 * Threads. Registers are accessed on vCPU threads, input comes from any
 * thread; one lock covers the device.
 * Source: National Semiconductor PC16550D data sheet.
 */
#ifndef SM_SERIAL_H
#define SM_SERIAL_H

#include "bus.h"
#include "console_log.h"
#include "dev/device.h"
#include "irq.h"

#define SM_SERIAL_PORT 0x3f8
#define SM_SERIAL_PORTS 8
#define SM_SERIAL_GSI 4

struct sm_serial;

extern const struct sm_bus_ops sm_serial_bus_ops; /* dev: struct sm_serial * */

/* Takes over *irq (closed with the device), also on failure. The console
 * outlives the device. */
int sm_serial_create(struct sm_console_log *console, const struct sm_irq *irq,
                     struct sm_serial **out);
struct sm_device *sm_serial_device(struct sm_serial *serial);
/* Type to the guest; sm_console_input_fn. */
size_t sm_serial_input(void *serial, const void *buf, size_t len);

#endif
