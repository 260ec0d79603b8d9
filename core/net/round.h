/* SPDX-License-Identifier: Apache-2.0 */
/* One round of poll(2): who waits says for what, then asks what came. A stack
 * that wants poll semantics (libslirp) sets the form of the whole loop. */
#ifndef SM_NET_ROUND_H
#define SM_NET_ROUND_H

#include <poll.h>
#include <stdint.h>

struct sm_poll {
    struct pollfd *fds;
    unsigned count, cap;
    uint64_t now_ns, deadline_ns; /* the earliest anybody asked for */
};

/* The index to ask with, or -1 (out of memory: asked again next round). */
int sm_poll_add(struct sm_poll *p, int fd, short events);
void sm_poll_at(struct sm_poll *p, uint64_t deadline_ns);
static inline short sm_poll_got(const struct sm_poll *p, int index)
{
    return index < 0 ? 0 : p->fds[index].revents;
}

#endif
