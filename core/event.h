/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a VM tells the thread that drives it: one pollable fd, three kinds.
 *
 *   state   latched bits, coalesced, never lost: the run state changed, the
 *           console has bytes, a device wants attention
 *   exit    a parked access that the driver owns: one reserved slot per vCPU
 *   notice  a bounded ring (traces, device errors); what does not fit is
 *           counted, and the loss is reported before any later notice
 *
 * Writers are vCPU and I/O threads; the reader is the one thread that owns the
 * VM. The reader clears the fd first and drains after, so a wake-up between
 * the two is never lost.
 */
#ifndef SM_EVENT_H
#define SM_EVENT_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "backend.h"

enum sm_event_bit {
    SM_EVENT_STATE = 1,   /* read sm_vm_state */
    SM_EVENT_CONSOLE = 2, /* console.read has bytes */
    SM_EVENT_DOORBELL = 4, /* a doorbell was rung */
    SM_EVENT_TRACE = 8,    /* the trace has records */
};

struct sm_notice {
    uint64_t time_ns;    /* CLOCK_MONOTONIC */
    const char *source;  /* static: "blk0", "vcpu1" … */
    const char *what;    /* static: "queue 0: descriptor loop" */
    uint64_t value;
};

#define SM_EVENT_NOTICES 256

struct sm_events {
    int fd;               /* eventfd, non-blocking */
    pthread_mutex_t lock; /* everything below */
    unsigned bits;
    struct sm_notice notices[SM_EVENT_NOTICES];
    unsigned head, count;
    uint64_t lost;
    uint64_t parked;      /* bit per vCPU with a parked exit */
};

int sm_events_init(struct sm_events *ev);
void sm_events_destroy(struct sm_events *ev);
void sm_events_set(struct sm_events *ev, unsigned bits);
void sm_events_park(struct sm_events *ev, unsigned vcpu);
/* source and what must be static strings. */
void sm_events_notice(struct sm_events *ev, const char *source, const char *what,
                      uint64_t value);

/* Reader: clear the fd, then take in this order until all are false. */
void sm_events_clear(struct sm_events *ev);
unsigned sm_events_take_bits(struct sm_events *ev);
int sm_events_take_parked(struct sm_events *ev); /* vCPU index or -1 */
uint64_t sm_events_take_lost(struct sm_events *ev);
bool sm_events_take_notice(struct sm_events *ev, struct sm_notice *out);

#endif
