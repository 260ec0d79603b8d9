/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a card can be plugged into. Each create gives a backend that is the
 * card's from then on, or -errno.
 */
#ifndef SM_NET_BACKENDS_H
#define SM_NET_BACKENDS_H

#include <sys/socket.h>

#include "nic.h"

/* user.c: libslirp; addresses come from the card's policy. */
int sm_user_create(struct sm_nic *nic, struct sm_backend **out);
/* Connections to host (address and port; 0 is any free one, told back) go to
 * the guest's port. They wait in the host's backlog until the card is ready. */
int sm_user_publish(struct sm_backend *b, bool udp, struct sockaddr_storage *host,
                    uint16_t guest_port);

/* tap.c: a tap device of that name, made if it may be; `name` gets its real one. */
int sm_tap_create(struct sm_nic *nic, char name[16], struct sm_backend **out);

/* wire.c: a unix socket of another program that takes frames in QEMU's stream
 * format (passt, QEMU). */
int sm_wire_create(struct sm_nic *nic, const char *path, struct sm_backend **out);

/* hub.c: the cards of this process that are plugged into the same hub. */
struct sm_hub;
int sm_hub_create(struct sm_hub **out);
int sm_hub_plug(struct sm_hub *hub, struct sm_nic *nic, struct sm_backend **out);
void sm_hub_destroy(struct sm_hub *hub); /* after every card */

#endif
