/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The CMOS clock of a PC (MC146818) at ports 0x70/0x71: it answers with the
 * host's UTC time, in BCD and 24-hour mode, and never says "update in
 * progress". Setting it, alarms and interrupts do nothing. ACPI tells kernels
 * that it is not there, for the paravirtual clock is better; it answers anyway,
 * because a kernel that looks regardless would wait a second for its silence.
 *
 * Threads. vCPU threads; one lock. Source: Motorola MC146818 data sheet.
 */
#ifndef SM_RTC_H
#define SM_RTC_H

#include "bus.h"
#include "dev/device.h"

#define SM_RTC_PORT 0x70
#define SM_RTC_PORTS 2

struct sm_rtc;

extern const struct sm_bus_ops sm_rtc_bus_ops; /* dev: struct sm_rtc * */

int sm_rtc_create(struct sm_rtc **out);
struct sm_device *sm_rtc_device(struct sm_rtc *rtc);

#endif
