/* SPDX-License-Identifier: Apache-2.0 */
/* The worker's stream of a card (dev/net.h has the format), behind nic.c. */
#ifndef SM_NET_NIC_STREAM_H
#define SM_NET_NIC_STREAM_H

#include "nic.h"

#define SM_NIC_IN_BYTES (512u << 10)
#define SM_NIC_OUT_BYTES (4u << 20)  /* most that waits for the worker */
#define SM_NIC_FULL_BYTES (1u << 20) /* backends wait from here on */

/* nic.c: a frame of the guest. */
void sm_nic_out(struct sm_nic *nic, struct sm_net_hdr *h, uint8_t *frame, size_t len);

void sm_nic_stream_fill(struct sm_nic *nic, struct sm_poll *poll);
void sm_nic_stream_serve(struct sm_nic *nic, struct sm_poll *poll);
/* A frame to the worker, now or behind those that wait. */
void sm_nic_queue(struct sm_nic *nic, const struct sm_net_hdr *h, const uint8_t *frame, size_t len);

#endif
