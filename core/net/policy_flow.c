/* SPDX-License-Identifier: Apache-2.0 */
/* The table of flows; see policy_flow.h. Links are indices + 1, 0 is none. */
#include "policy_flow.h"

#include <stdlib.h>
#include <string.h>

static uint32_t hash(uint8_t proto, const struct sm_addr *remote, uint16_t local, uint16_t port)
{
    uint32_t h = 2166136261u ^ proto;

    for (unsigned i = 0; i < 16; i++)
        h = (h ^ remote->b[i]) * 16777619u;
    h = (h ^ local) * 16777619u;
    h = (h ^ (local >> 8)) * 16777619u;
    h = (h ^ port) * 16777619u;
    h = (h ^ (port >> 8)) * 16777619u;
    return (h ^ h >> 15) % SM_POLICY_FLOWS;
}

static uint32_t number(const struct sm_policy *p, const struct sm_flow *f)
{
    return (uint32_t)(f - p->flows) + 1;
}

static uint32_t *bucket(struct sm_policy *p, const struct sm_flow *f)
{
    return &p->buckets[hash(f->proto, &f->remote, f->local_port, f->remote_port)];
}

struct sm_flow *sm_flow_find(struct sm_policy *p, uint8_t proto, const struct sm_addr *remote,
                             uint16_t local_port, uint16_t remote_port)
{
    uint32_t i = p->buckets[hash(proto, remote, local_port, remote_port)];

    for (; i; i = p->flows[i - 1].hash_next) {
        struct sm_flow *f = &p->flows[i - 1];

        if (f->proto == proto && f->local_port == local_port && f->remote_port == remote_port &&
            sm_addr_equal(&f->remote, remote))
            return f;
    }
    return NULL;
}

static void link_newest(struct sm_policy *p, struct sm_flow *f)
{
    f->newer = 0;
    f->older = p->newest;
    if (p->newest)
        p->flows[p->newest - 1].newer = number(p, f);
    p->newest = number(p, f);
    if (!p->oldest)
        p->oldest = p->newest;
}

static void unlink_age(struct sm_policy *p, struct sm_flow *f)
{
    if (f->newer)
        p->flows[f->newer - 1].older = f->older;
    else
        p->newest = f->older;
    if (f->older)
        p->flows[f->older - 1].newer = f->newer;
    else
        p->oldest = f->newer;
}

void sm_flow_touch(struct sm_policy *p, struct sm_flow *f)
{
    if (p->newest != number(p, f)) {
        unlink_age(p, f);
        link_newest(p, f);
    }
}

void sm_flow_drop(struct sm_policy *p, struct sm_flow *f)
{
    uint32_t *at = bucket(p, f);

    while (*at != number(p, f))
        at = &p->flows[*at - 1].hash_next;
    *at = f->hash_next;
    unlink_age(p, f);
    if (p->flow_gone)
        p->flow_gone(f, p->arg);
    free(f->held);
    memset(f, 0, sizeof(*f));
    /* The free list threads through `older`, its head is free_flow. */
    f->older = p->free_flow;
    p->free_flow = number(p, f);
    p->flow_count--;
}

struct sm_flow *sm_flow_add(struct sm_policy *p, uint8_t proto, const struct sm_addr *remote,
                            uint16_t local_port, uint16_t remote_port, uint64_t now_ns)
{
    struct sm_flow *f;
    uint32_t *at;

    if (p->flow_count == SM_POLICY_FLOWS)
        sm_flow_drop(p, &p->flows[p->oldest - 1]);
    if (p->free_flow) {
        f = &p->flows[p->free_flow - 1];
        p->free_flow = f->older;
    } else {
        f = &p->flows[p->flow_count];
    }
    *f = (struct sm_flow){
        .proto = proto, .used = true, .remote = *remote, .local_port = local_port,
        .remote_port = remote_port, .since_ns = now_ns, .seen_ns = now_ns,
    };
    f->id = ++p->next_id;
    p->flow_count++;
    at = bucket(p, f);
    f->hash_next = *at;
    *at = number(p, f);
    link_newest(p, f);
    return f;
}

struct sm_flow *sm_policy_flow(struct sm_policy *p, uint32_t id)
{
    for (uint32_t i = p->newest; i; i = p->flows[i - 1].older)
        if (p->flows[i - 1].id == id)
            return &p->flows[i - 1];
    return NULL;
}
