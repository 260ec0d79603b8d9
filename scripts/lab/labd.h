/* SPDX-License-Identifier: Apache-2.0 */
/* The parts of labd: its network (labnet.c), and hold_kvm.c; see there. */
#ifndef LAB_LABD_H
#define LAB_LABD_H

#include "relay.h"

#include <limits.h>

struct waiting;

struct labnet {
    struct relays relays;
    int queue;    /* nfnetlink queue, or -1 */
    int listener; /* where diverted connections arrive */
    uint32_t next_chan;
    struct waiting *waiting;
};

/* Never given back. -1, and errno, when there is no KVM. */
int hold_kvm(void);

void labnet_start(struct labnet *n);
void labnet_frame(struct labnet *n, const struct frame *f, const char *data);
size_t labnet_poll_count(const struct labnet *n);
void labnet_poll_fill(struct labnet *n, struct pollfd *fds, size_t *count);
void labnet_turn(struct labnet *n, const struct pollfd *fds, size_t count);

#endif
