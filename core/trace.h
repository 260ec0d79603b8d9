/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tracing: what a VM's vCPUs and devices do, as a stream of records.
 *
 * Off, a place that could trace costs one relaxed load and a branch. On, it
 * fills a record of a bounded ring, which the owner drains as events; what
 * does not fit is counted, and told before anything later. Interrupts are
 * counted always: a raise is a system call, the count is nothing beside it.
 *
 * Threads. `on`, the filter and the counters are atomic; the ring has a lock.
 * sm_trace_set and take: the VM's owner. put: any thread.
 */
#ifndef SM_TRACE_H
#define SM_TRACE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct sm_events;

enum sm_trace_kind { SM_TRACE_EXIT = 1, SM_TRACE_REQUEST = 2, SM_TRACE_IRQ = 4 };

struct sm_trace_record {
    enum sm_trace_kind kind;
    uint64_t time_ns, duration_ns; /* CLOCK_MONOTONIC */
    const char *what;              /* static: "pio", "write" … */
    char device[16];               /* REQUEST: who; EXIT: "" */
    unsigned number;               /* EXIT: vCPU; REQUEST: queue; IRQ: GSI */
    uint64_t address;              /* EXIT; REQUEST of a disk: sector */
    uint64_t value;                /* EXIT: what was written or read */
    uint64_t size;                 /* EXIT: bytes; REQUEST: sectors or bytes */
    bool write;                    /* EXIT */
    int error;                     /* REQUEST: -errno the guest was given */
    bool fault;                    /* REQUEST: a fault on demand had its way */
};

#define SM_TRACE_RING 4096
#define SM_TRACE_GSIS 64

struct sm_trace {
    struct sm_events *events;
    atomic_uint on; /* enum sm_trace_kind */
    _Atomic uint64_t first, last; /* EXIT: addresses that are told */
    _Atomic uint64_t irqs[SM_TRACE_GSIS];
    pthread_mutex_t lock; /* below */
    struct sm_trace_record *ring; /* NULL until first switched on */
    unsigned head, count;
    uint64_t lost;
};

void sm_trace_init(struct sm_trace *trace, struct sm_events *events);
void sm_trace_destroy(struct sm_trace *trace);
int sm_trace_set(struct sm_trace *trace, unsigned kinds, uint64_t first, uint64_t last);

static inline bool sm_trace_on(const struct sm_trace *trace, enum sm_trace_kind kind)
{
    return trace &&
           __builtin_expect(atomic_load_explicit(&trace->on, memory_order_relaxed) & kind, 0);
}
uint64_t sm_trace_now_ns(void);
void sm_trace_put(struct sm_trace *trace, const struct sm_trace_record *record);
void sm_trace_irq(struct sm_trace *trace, uint32_t gsi); /* trace may be NULL */

bool sm_trace_take(struct sm_trace *trace, struct sm_trace_record *out);
uint64_t sm_trace_take_lost(struct sm_trace *trace);

#endif
