/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Opening a tap device, with a virtio_net_hdr_v1 in front of each frame. One that
 * exists and is owned by the user needs no privilege, making one needs
 * CAP_NET_ADMIN. For sm-net, which puts its policy in front of it, and for cards
 * whose queues the host's kernel serves (dev/vhost_net.h).
 *
 * Source: Linux Documentation/networking/tuntap.rst.
 */
#ifndef SM_TAP_H
#define SM_TAP_H

#include <stdbool.h>

#define SM_TAP_NAME_BYTES 16 /* IFNAMSIZ */

/* A non-blocking descriptor; `name` gets the device's real one. several: one of
 * several queues of the device, which must have been made so. -errno. */
int sm_tap_open(char name[SM_TAP_NAME_BYTES], bool several, int *fd);
/* What that errno means here, with what to do. */
const char *sm_tap_why(int err, bool several);
/* SM_NET_OFFLOAD_*: what the guest's driver takes. */
void sm_tap_set_offloads(int fd, unsigned offloads);

#endif
