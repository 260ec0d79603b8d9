/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A tap device whose queues the host's kernel works on itself: frames go between
 * guest and host without passing through any process of ours. So nothing looks at
 * them either: no policy, no counters, no capture, no rate; whoever asks for it
 * has the guest on that network as it is.
 *
 *      guest's rings ═ vhost-net ═ tap        kicks: the queue's ioeventfd
 *                                             interrupts: the device's irqfd
 *
 * One vhost-net and one queue of the tap for each pair. Memory is told when the
 * driver starts: regions that come later are not known to vhost.
 *
 * Source: Linux include/uapi/linux/vhost.h, Documentation/networking/tuntap.rst.
 */
#ifndef SM_DEV_VHOST_NET_H
#define SM_DEV_VHOST_NET_H

#include "dev/net.h"

/* Opens everything, so before a worker confines itself. `name` is a tap that exists
 * or may be made. -errno, and what to do in `why`. */
int sm_vhost_net_create(const char *name, unsigned pairs, struct sm_net **out, char *why,
                        size_t why_bytes);

#endif
