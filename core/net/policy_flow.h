/* SPDX-License-Identifier: Apache-2.0 */
/* The bounded table of flows behind policy.c: a hash, and a list from the
 * newest to the oldest, which makes room. */
#ifndef SM_NET_POLICY_FLOW_H
#define SM_NET_POLICY_FLOW_H

#include "policy.h"

struct sm_flow *sm_flow_find(struct sm_policy *p, uint8_t proto, const struct sm_addr *remote,
                             uint16_t local_port, uint16_t remote_port);
/* Never fails: the oldest goes. */
struct sm_flow *sm_flow_add(struct sm_policy *p, uint8_t proto, const struct sm_addr *remote,
                            uint16_t local_port, uint16_t remote_port, uint64_t now_ns);
void sm_flow_touch(struct sm_policy *p, struct sm_flow *f);
void sm_flow_drop(struct sm_policy *p, struct sm_flow *f);

#endif
