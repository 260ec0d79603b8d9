/* SPDX-License-Identifier: Apache-2.0 */
/* See round.h. */
#include "round.h"

#include <stdlib.h>

int sm_poll_add(struct sm_poll *p, int fd, short events)
{
    if (p->count == p->cap) {
        unsigned cap = p->cap ? p->cap * 2 : 64;
        struct pollfd *fds = realloc(p->fds, cap * sizeof(*fds));

        if (!fds) {
            sm_poll_at(p, p->now_ns + 10000000);
            return -1;
        }
        p->fds = fds;
        p->cap = cap;
    }
    p->fds[p->count] = (struct pollfd){ .fd = fd, .events = events };
    return (int)p->count++;
}

void sm_poll_at(struct sm_poll *p, uint64_t deadline_ns)
{
    if (deadline_ns < p->deadline_ns)
        p->deadline_ns = deadline_ns;
}
