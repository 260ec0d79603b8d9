/* SPDX-License-Identifier: Apache-2.0 */
/* See capture.h. */
#include "capture.h"

#include <errno.h>
#include <poll.h>

int sm_captures_add(struct sm_captures *c, struct sm_pcap *p, uint32_t *id)
{
    for (unsigned i = 0; i < SM_CAPTURES; i++) {
        if (c->list[i])
            continue;
        c->list[i] = p;
        c->ids[i] = *id = ++c->last_id;
        c->count++;
        return 0;
    }
    sm_pcap_close(p);
    return -ENOSPC;
}

static void end(struct sm_captures *c, unsigned i)
{
    sm_pcap_close(c->list[i]);
    c->list[i] = NULL;
    c->count--;
}

int64_t sm_captures_end(struct sm_captures *c, uint32_t id)
{
    for (unsigned i = 0; i < SM_CAPTURES; i++) {
        if (c->list[i] && c->ids[i] == id) {
            int64_t lost = (int64_t)sm_pcap_lost(c->list[i]);

            end(c, i);
            return lost;
        }
    }
    return -ENOENT;
}

void sm_captures_frame(struct sm_captures *c, const void *frame, size_t len)
{
    for (unsigned i = 0; c->count && i < SM_CAPTURES; i++)
        if (c->list[i])
            sm_pcap_frame(c->list[i], frame, len);
}

void sm_captures_fill(const struct sm_captures *c, struct sm_poll *poll)
{
    for (unsigned i = 0; c->count && i < SM_CAPTURES; i++)
        if (c->list[i] && sm_pcap_waits_for(c->list[i]) >= 0)
            sm_poll_add(poll, sm_pcap_waits_for(c->list[i]), POLLOUT);
}

void sm_captures_flush(struct sm_captures *c)
{
    for (unsigned i = 0; c->count && i < SM_CAPTURES; i++)
        if (c->list[i] && !sm_pcap_flush(c->list[i]))
            end(c, i);
}

void sm_captures_close(struct sm_captures *c)
{
    for (unsigned i = 0; i < SM_CAPTURES; i++)
        if (c->list[i])
            end(c, i);
}
