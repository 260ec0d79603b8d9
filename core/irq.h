/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An interrupt line of one device, edge triggered.
 *
 * Where the backend has irqfd, raising is one write to an eventfd, from any
 * thread; elsewhere it is a call. A device raises through this and nothing
 * else, so it can be tested with no hypervisor: with hv == NULL the eventfd
 * simply counts, and the spec reads it.
 */
#ifndef SM_IRQ_H
#define SM_IRQ_H

#include <stdint.h>

struct sm_hv;
struct sm_trace;

struct sm_irq {
    struct sm_hv *hv; /* NULL in device specs */
    uint32_t gsi;
    int fd; /* eventfd, or -1: raised by sm_hv_irq_line */
    struct sm_trace *trace; /* may be NULL */
};

int sm_irq_open(struct sm_irq *irq, struct sm_hv *hv, uint32_t gsi);
void sm_irq_close(struct sm_irq *irq);
/* One edge. Any thread; never blocks. */
void sm_irq_raise(struct sm_irq *irq);

#endif
