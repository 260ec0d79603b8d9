/* SPDX-License-Identifier: Apache-2.0 */
/* Tap devices; see tap.h. */
#include "tap.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "dev/net.h"

int sm_tap_open(char name[SM_TAP_NAME_BYTES], bool several, int *fd)
{
    struct ifreq r = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
    int header = sizeof(struct sm_net_hdr), err;

    if (several)
        r.ifr_flags |= IFF_MULTI_QUEUE;
    memcpy(r.ifr_name, name, SM_TAP_NAME_BYTES - 1);
    *fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (*fd < 0)
        return -errno;
    if (ioctl(*fd, TUNSETIFF, &r) < 0 || ioctl(*fd, TUNSETVNETHDRSZ, &header) < 0) {
        err = -errno;
        close(*fd);
        *fd = -1;
        return err;
    }
    snprintf(name, SM_TAP_NAME_BYTES, "%s", r.ifr_name);
    sm_tap_set_offloads(*fd, 0);
    return 0;
}

const char *sm_tap_why(int err, bool several)
{
    switch (err) {
    case -EPERM:
    case -EACCES:
        return several ? "no permission; let root make it for you: "
                         "ip tuntap add mode tap multi_queue user $USER name NAME"
                       : "no permission; let root make it for you: "
                         "ip tuntap add mode tap user $USER name NAME";
    case -ENOENT:
        return "this machine has no /dev/net/tun";
    case -EBUSY:
        return "in use";
    case -EINVAL:
        return several ? "not made for several queues (ip tuntap add … multi_queue)"
                       : "made for several queues, or no tap";
    default:
        return strerror(-err);
    }
}

void sm_tap_set_offloads(int fd, unsigned offloads)
{
    unsigned long f = 0;

    if (offloads & SM_NET_OFFLOAD_CSUM) {
        f |= TUN_F_CSUM;
        f |= offloads & SM_NET_OFFLOAD_TSO4 ? TUN_F_TSO4 : 0;
        f |= offloads & SM_NET_OFFLOAD_TSO6 ? TUN_F_TSO6 : 0;
        if (f & (TUN_F_TSO4 | TUN_F_TSO6) && offloads & SM_NET_OFFLOAD_ECN)
            f |= TUN_F_TSO_ECN;
    }
    ioctl(fd, TUNSETOFFLOAD, f);
}
