/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Network cards, set up as the host says: no DHCP, no router advertisement, no
 * duplicate address detection, so that the first packet can go at once. A card
 * is known by its MAC address, for its name is the kernel's affair.
 */
#include "agent.h"
#include "kabi.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define CARD_TRIES 200 /* times 10 ms: a driver may still be probing */

/* "1.2.3.4/24" → binary address and prefix. */
static int parse_prefix(const char *text, int family, void *addr, unsigned *prefix)
{
    char copy[64];
    char *slash, *end;

    if (strlen(text) >= sizeof(copy))
        return -EINVAL;
    strcpy(copy, text);
    slash = strchr(copy, '/');
    if (!slash)
        return -EINVAL;
    *slash++ = 0;
    unsigned long n = strtoul(slash, &end, 10);
    if (!*slash || *end || n > (family == AF_INET ? 32 : 128) || inet_pton(family, copy, addr) != 1)
        return -EINVAL;
    *prefix = (unsigned)n;
    return 0;
}

static int find_card(int fd, const uint8_t mac[6], char name[IFNAMSIZ])
{
    for (int tries = 0; tries < CARD_TRIES; tries++) {
        struct if_nameindex *all = if_nameindex();
        int rc = -ENODEV;

        for (struct if_nameindex *i = all; i && i->if_index && rc; i++) {
            struct ifreq r = { 0 };

            strncpy(r.ifr_name, i->if_name, IFNAMSIZ - 1);
            if (ioctl(fd, SIOCGIFHWADDR, &r) == 0 && r.ifr_hwaddr.sa_family == ARPHRD_ETHER &&
                !memcmp(r.ifr_hwaddr.sa_data, mac, 6)) {
                memcpy(name, r.ifr_name, IFNAMSIZ);
                rc = 0;
            }
        }
        if_freenameindex(all);
        if (rc == 0)
            return 0;
        poll(NULL, 0, 10);
    }
    return -ENODEV;
}

static void set_option(const char *card, const char *option, const char *value)
{
    char path[128];

    snprintf(path, sizeof(path), "/proc/sys/net/ipv6/conf/%s/%s", card, option);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return; /* a kernel without IPv6 */
    if (write(fd, value, strlen(value)) < 0)
        errno = 0;
    close(fd);
}

static int set4(int fd, const char *card, const struct sm_net_req *q)
{
    struct ifreq r = { 0 };
    struct sockaddr_in a = { .sin_family = AF_INET };
    unsigned prefix;
    int rc = parse_prefix(q->ip4, AF_INET, &a.sin_addr, &prefix);

    if (rc)
        return rc;
    strcpy(r.ifr_name, card);
    memcpy(&r.ifr_addr, &a, sizeof(a));
    if (ioctl(fd, SIOCSIFADDR, &r) < 0)
        return -errno;
    a.sin_addr.s_addr = htonl(prefix ? ~0u << (32 - prefix) : 0);
    memcpy(&r.ifr_netmask, &a, sizeof(a));
    if (ioctl(fd, SIOCSIFNETMASK, &r) < 0)
        return -errno;
    if (!q->gw4[0])
        return 0;
    struct rtentry route = { .rt_flags = RTF_UP | RTF_GATEWAY, .rt_dev = (char *)card };
    struct sockaddr_in any = { .sin_family = AF_INET };
    if (inet_pton(AF_INET, q->gw4, &a.sin_addr) != 1)
        return -EINVAL;
    memcpy(&route.rt_dst, &any, sizeof(any));
    memcpy(&route.rt_genmask, &any, sizeof(any));
    memcpy(&route.rt_gateway, &a, sizeof(a));
    return ioctl(fd, SIOCADDRT, &route) < 0 && errno != EEXIST ? -errno : 0;
}

static int set6(const char *card, const struct sm_net_req *q)
{
    struct kabi_in6_ifreq r = { .ifindex = (int)if_nametoindex(card) };
    struct kabi_in6_rtmsg route = { .metric = 1024, .flags = RTF_UP | RTF_GATEWAY,
                                    .ifindex = r.ifindex };
    unsigned prefix;
    int rc = parse_prefix(q->ip6, AF_INET6, r.addr, &prefix);
    int fd = rc ? -1 : socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0)
        return rc; /* no IPv6 in this kernel is no reason to fail */
    r.prefix = prefix;
    if (ioctl(fd, SIOCSIFADDR, &r) < 0 && errno != EEXIST)
        rc = -errno;
    if (!rc && q->gw6[0]) {
        if (inet_pton(AF_INET6, q->gw6, route.gateway) != 1)
            rc = -EINVAL;
        else if (ioctl(fd, SIOCADDRT, &route) < 0 && errno != EEXIST)
            rc = -errno;
    }
    close(fd);
    return rc;
}

static int set_card(int fd, const struct sm_net_req *q)
{
    struct ifreq r = { 0 };
    char card[IFNAMSIZ] = "";
    int rc = find_card(fd, q->mac, card);

    if (rc)
        return rc;
    set_option(card, "accept_ra", "0");
    set_option(card, "dad_transmits", "0");
    set_option(card, "accept_dad", "0");
    strcpy(r.ifr_name, card);
    if (q->mtu) {
        r.ifr_mtu = (int)q->mtu;
        if (ioctl(fd, SIOCSIFMTU, &r) < 0)
            return -errno;
    }
    if (ioctl(fd, SIOCGIFFLAGS, &r) < 0)
        return -errno;
    r.ifr_flags |= IFF_UP;
    if (ioctl(fd, SIOCSIFFLAGS, &r) < 0)
        return -errno;
    rc = q->ip4[0] ? set4(fd, card, q) : 0;
    return rc || !q->ip6[0] ? rc : set6(card, q);
}

int sm_setup_net(const struct sm_boot_req *req, const char **what)
{
    int rc = 0;
    int fd = req->net_count ? socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0) : -1;

    if (!req->net_count)
        return 0;
    *what = "network card";
    if (fd < 0)
        return -errno;
    for (unsigned i = 0; i < req->net_count && !rc; i++)
        rc = set_card(fd, &req->nets[i]);
    close(fd);
    return rc;
}
