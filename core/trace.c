/* SPDX-License-Identifier: Apache-2.0 */
/* Tracing; see trace.h. */
#include "trace.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "event.h"

void sm_trace_init(struct sm_trace *trace, struct sm_events *events)
{
    memset(trace, 0, sizeof(*trace));
    trace->events = events;
    pthread_mutex_init(&trace->lock, NULL);
}

void sm_trace_destroy(struct sm_trace *trace)
{
    free(trace->ring);
    pthread_mutex_destroy(&trace->lock);
}

int sm_trace_set(struct sm_trace *trace, unsigned kinds, uint64_t first, uint64_t last)
{
    int err = 0;

    pthread_mutex_lock(&trace->lock);
    if (kinds && !trace->ring) {
        trace->ring = calloc(SM_TRACE_RING, sizeof(*trace->ring));
        err = trace->ring ? 0 : -ENOMEM;
    }
    pthread_mutex_unlock(&trace->lock);
    if (err)
        return err;
    atomic_store(&trace->first, first);
    atomic_store(&trace->last, last);
    atomic_store(&trace->on, kinds);
    return 0;
}

uint64_t sm_trace_now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static bool wanted(const struct sm_trace *trace, const struct sm_trace_record *r)
{
    return r->kind != SM_TRACE_EXIT ||
           (r->address >= atomic_load(&trace->first) && r->address <= atomic_load(&trace->last));
}

void sm_trace_put(struct sm_trace *trace, const struct sm_trace_record *record)
{
    bool wake = false;

    if (!wanted(trace, record))
        return;
    pthread_mutex_lock(&trace->lock);
    /* A loss is told before what follows it, so nothing follows until then. */
    if (!trace->ring || trace->lost || trace->count == SM_TRACE_RING) {
        trace->lost++;
    } else {
        wake = trace->count == 0;
        trace->ring[(trace->head + trace->count++) % SM_TRACE_RING] = *record;
    }
    pthread_mutex_unlock(&trace->lock);
    if (wake)
        sm_events_set(trace->events, SM_EVENT_TRACE);
}

void sm_trace_irq(struct sm_trace *trace, uint32_t gsi)
{
    if (!trace)
        return;
    if (gsi < SM_TRACE_GSIS)
        atomic_fetch_add_explicit(&trace->irqs[gsi], 1, memory_order_relaxed);
    if (sm_trace_on(trace, SM_TRACE_IRQ)) {
        struct sm_trace_record r = {
            .kind = SM_TRACE_IRQ, .time_ns = sm_trace_now_ns(), .what = "raise", .number = gsi,
        };

        sm_trace_put(trace, &r);
    }
}

bool sm_trace_take(struct sm_trace *trace, struct sm_trace_record *out)
{
    bool has;

    pthread_mutex_lock(&trace->lock);
    has = trace->count > 0;
    if (has) {
        *out = trace->ring[trace->head];
        trace->head = (trace->head + 1) % SM_TRACE_RING;
        trace->count--;
    }
    pthread_mutex_unlock(&trace->lock);
    return has;
}

uint64_t sm_trace_take_lost(struct sm_trace *trace)
{
    uint64_t lost = 0;

    pthread_mutex_lock(&trace->lock);
    if (!trace->count) { /* they were lost behind what is still there */
        lost = trace->lost;
        trace->lost = 0;
    }
    pthread_mutex_unlock(&trace->lock);
    return lost;
}
