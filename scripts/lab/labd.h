/* SPDX-License-Identifier: Apache-2.0 */
/* The network half of labd (labnet.c); see there. */
#ifndef LAB_LABD_H
#define LAB_LABD_H

#include "mux.h"

#include <limits.h>
#include <poll.h>

struct labnet {
    struct link *host;
    bool counting;
    struct relay *relays;
};

void labnet_start(struct labnet *n);
void labnet_frame(struct labnet *n, const struct frame *f, const char *data);
size_t labnet_poll_count(const struct labnet *n);
void labnet_poll_fill(struct labnet *n, struct pollfd *fds, size_t *count);
void labnet_turn(struct labnet *n, const struct pollfd *fds, size_t count);

#endif
