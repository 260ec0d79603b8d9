/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A switch between the cards of this process. Each card's MAC address is known
 * beforehand, and its policy lets no other one out, so there is nothing to
 * learn and nothing to poison: a frame goes to the card it names, broadcasts
 * go to all others, the rest goes nowhere.
 *
 * Threads: one.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "backends.h"

#define PLUGS 64

struct plug {
    struct sm_backend backend;
    struct sm_hub *hub;
};

struct sm_hub {
    struct plug *plugs[PLUGS];
};

static void give(struct plug *to, const struct sm_net_hdr *hdr, uint8_t *frame, size_t len)
{
    struct sm_net_hdr h = *hdr;

    /* A checksum that was left out is right all the same: nothing touched it.
     * A driver that does not understand that gets it filled in. */
    if (h.flags & SM_NET_HDR_NEEDS_CSUM && !(to->backend.nic->offloads & SM_NET_OFFLOAD_CSUM)) {
        struct sm_packet p;

        sm_packet_parse(frame, len, &p);
        sm_nic_finish_csum(&h, frame, &p);
    }
    sm_nic_deliver(to->backend.nic, &h, frame, len);
}

static void hub_send(struct sm_backend *b, const struct sm_net_hdr *hdr, uint8_t *frame, size_t len)
{
    struct plug *from = (struct plug *)b;
    bool all = frame[0] & 1;

    if (hdr->gso_type)
        return; /* not offered: no guest may send it */
    for (unsigned i = 0; i < PLUGS; i++) {
        struct plug *to = from->hub->plugs[i];

        if (to && to != from && (all || !memcmp(frame, to->backend.nic->policy.mac, 6)))
            give(to, hdr, frame, len);
    }
}

static void hub_fill(struct sm_backend *b, struct sm_poll *poll)
{
    (void)b;
    (void)poll;
}

static void hub_unplug(struct sm_backend *b)
{
    struct plug *p = (struct plug *)b;

    for (unsigned i = 0; i < PLUGS; i++)
        if (p->hub->plugs[i] == p)
            p->hub->plugs[i] = NULL;
    free(p);
}

static const struct sm_backend_ops hub_ops = {
    .type = "switch",
    .send = hub_send,
    .fill = hub_fill,
    .serve = hub_fill,
    .destroy = hub_unplug,
    .takes = SM_NET_OFFLOAD_CSUM,
};

int sm_hub_create(struct sm_hub **out)
{
    *out = calloc(1, sizeof(**out));
    return *out ? 0 : -ENOMEM;
}

void sm_hub_destroy(struct sm_hub *hub)
{
    free(hub);
}

int sm_hub_plug(struct sm_hub *hub, struct sm_nic *nic, struct sm_backend **out)
{
    struct plug *p = NULL;

    for (unsigned i = 0; i < PLUGS && !p; i++) {
        if (hub->plugs[i])
            continue;
        p = calloc(1, sizeof(*p));
        if (!p)
            return -ENOMEM;
        p->backend = (struct sm_backend){ &hub_ops, nic };
        p->hub = hub;
        hub->plugs[i] = p;
        *out = &p->backend;
    }
    return p ? 0 : -ENOSPC;
}
