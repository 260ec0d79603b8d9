/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Doorbells of the VM's owner: a guest write to an address that costs no exit.
 * The kernel counts it in an eventfd (sm_hv_ioeventfd), the VM's I/O thread
 * adds the count up and sets SM_EVENT_DOORBELL; the owner takes it.
 *
 * Threads. `count` is atomic; all else is the owner's.
 */
#ifndef SM_DOORBELL_H
#define SM_DOORBELL_H

#include <stdatomic.h>
#include <stdint.h>

#include "io.h"

struct sm_vm;

#define SM_DOORBELLS 16

struct sm_doorbell {
    struct sm_vm *vm; /* NULL: free */
    uint64_t gpa;
    unsigned len; /* 0: any */
    uint32_t value;
    int fd;
    struct sm_io_watch watch;
    _Atomic uint64_t count; /* rung and not taken */
};

/* len 0: a write of any length and value; else of that length and value. */
int sm_doorbell_open(struct sm_doorbell *bell, struct sm_vm *vm, uint64_t gpa, unsigned len,
                     uint32_t value);
/* Idempotent. */
void sm_doorbell_close(struct sm_doorbell *bell);

#endif
