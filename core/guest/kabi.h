/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The few kernel structures and numbers that musl does not declare, so that the
 * agent needs no kernel headers: <linux/vm_sockets.h>, <linux/random.h>,
 * <linux/netlink.h>, <linux/inet_diag.h>; the terminal's size is here to keep ioctl in one place.
 */
#ifndef SM_GUEST_KABI_H
#define SM_GUEST_KABI_H

#include <stdint.h>
#include <sys/ioctl.h>

#define KABI_AF_VSOCK 40
#define KABI_VMADDR_CID_HOST 2

struct kabi_sockaddr_vm {
    uint16_t family, reserved;
    uint32_t port, cid;
    uint8_t flags, zero[3];
};

#define KABI_AF_NETLINK 16
#define KABI_NETLINK_KOBJECT_UEVENT 15

struct kabi_sockaddr_nl {
    uint16_t family, pad;
    uint32_t pid, groups;
};

struct kabi_nlmsghdr {
    uint32_t len;
    uint16_t type, flags;
    uint32_t seq, pid;
};
#define KABI_NLM_F_REQUEST 0x001
#define KABI_NLM_F_ACK 0x004
#define KABI_NLM_F_DUMP 0x300
#define KABI_NLMSG_ERROR 2
#define KABI_NLMSG_DONE 3

/* <linux/sock_diag.h>, <linux/inet_diag.h> */
#define KABI_NETLINK_SOCK_DIAG 4
#define KABI_SOCK_DIAG_BY_FAMILY 20
#define KABI_SOCK_DESTROY 21

struct kabi_inet_diag_id {
    uint16_t sport, dport;
    uint32_t src[4], dst[4], ifindex, cookie[2];
};

struct kabi_inet_diag_req {
    uint8_t family, protocol, ext, pad;
    uint32_t states;
    struct kabi_inet_diag_id id;
};

struct kabi_inet_diag_msg {
    uint8_t family, state, timer, retrans;
    struct kabi_inet_diag_id id;
    uint32_t expires, rqueue, wqueue, uid, inode;
};

/* <linux/ipv6.h>, <linux/ipv6_route.h> */
struct kabi_in6_ifreq {
    uint8_t addr[16];
    uint32_t prefix;
    int ifindex;
};

struct kabi_in6_rtmsg {
    uint8_t dst[16], src[16], gateway[16];
    uint32_t type;
    uint16_t dst_len, src_len;
    uint32_t metric;
    unsigned long info;
    uint32_t flags;
    int ifindex;
};

struct kabi_ucred {
    int pid;
    uint32_t uid, gid;
};

#define KABI_RNDADDENTROPY 0x40085203 /* _IOW('R', 3, int[2]) */
#define KABI_RNDRESEEDCRNG 0x5207     /* _IO('R', 7) */

struct kabi_winsize {
    uint16_t row, col, xpixel, ypixel;
};

static inline int kabi_set_winsize(int fd, const struct kabi_winsize *w)
{
    return ioctl(fd, TIOCSWINSZ, w);
}

#endif
