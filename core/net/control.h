/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What can be asked of sm-net: cards opened, ports published, verdicts, counts.
 *
 *   net.open     a card: {nic, tap}      net.publish  a port: its number
 *   net.ready    connections may come    net.decide   a flow's verdict
 *   net.stats    counters                net.close    a card
 *   net.capture  a card's frames into the descriptor that came along: {capture}, its id;
 *                with an id: {lost}, and no more
 *   net.confine  nothing more is opened
 *
 * Threads: one.
 */
#ifndef SM_NET_CONTROL_H
#define SM_NET_CONTROL_H

#include "backends.h"
#include "msg.h"

#define SM_CONTROL_NICS 64

struct sm_control {
    struct sm_nic *nics[SM_CONTROL_NICS];
    struct sm_hub *hub;
    struct sm_msg_writer result; /* of the request being served: it may cause events */
    uint64_t events_lost;
    void (*event)(struct sm_nic *nic, const struct sm_nic_event *e, void *event_arg);
    void *event_arg;
    int passed_fd; /* that came with the request being served; -1: none */
    char err[256];
};

/* Appends the result to `result`; 0 or -errno with err filled in. */
int sm_control_request(struct sm_control *c, const struct sm_msg_value *name,
                       const struct sm_msg_reader *args);
/* Appends the event, a map, to `w`. */
void sm_control_event(struct sm_control *c, struct sm_nic *nic, const struct sm_nic_event *e,
                      struct sm_msg_writer *w);
void sm_control_close(struct sm_control *c);

#endif
