/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The user-mode network: libslirp, the TCP/IP stack that makes ordinary
 * sockets of a guest's connections. No privilege is needed.
 *
 * Its own DNS is off (ours is in front of it), its host loopback is reached by
 * the gateway's address alone, and only what the policy let pass comes here.
 * It has no offloads: with an MTU of 65520 it needs none, a segment is as
 * large as any.
 *
 * Threads: one; libslirp keeps globals.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <slirp/libslirp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "backends.h"

#define MAX_DESCRIPTORS 4096 /* as sm-net limits itself, confine.c */
#define NOTHING_MS 1000      /* libslirp's longest wait, when it waits for no time of its own */

struct timer {
    SlirpTimerCb cb;
    void *cb_opaque;
    int64_t expire_ms; /* -1: not armed */
    struct user *user;
    struct timer *next;
};

struct user {
    struct sm_backend backend;
    Slirp *slirp;
    struct timer *timers;
    struct sm_poll *poll; /* while in fill and serve */
    uint64_t now_ns;
};

static uint64_t now_ns(void)
{
    return sm_io_now_ns();
}

/* ---- callbacks of libslirp ---- */

static ssize_t send_packet(const void *buf, size_t len, void *opaque)
{
    struct user *u = opaque;
    struct sm_net_hdr h = { .flags = SM_NET_HDR_DATA_VALID }; /* it computed them */

    sm_nic_deliver(u->backend.nic, &h, buf, len);
    return (ssize_t)len;
}

static void guest_error(const char *msg, void *opaque)
{
    (void)msg; /* a guest could fill a disk with these */
    (void)opaque;
}

static int64_t clock_get_ns(void *opaque)
{
    (void)opaque;
    return (int64_t)now_ns();
}

static void *timer_new(SlirpTimerCb cb, void *cb_opaque, void *opaque)
{
    struct user *u = opaque;
    struct timer *t = calloc(1, sizeof(*t));

    if (t) {
        *t = (struct timer){ cb, cb_opaque, -1, u, u->timers };
        u->timers = t;
    }
    return t;
}

static void timer_free(void *timer, void *opaque)
{
    struct user *u = opaque;
    struct timer **at = &u->timers;

    while (*at && *at != timer)
        at = &(*at)->next;
    if (*at)
        *at = (*at)->next;
    free(timer);
}

static void timer_mod(void *timer, int64_t expire_ms, void *opaque)
{
    (void)opaque;
    if (timer)
        ((struct timer *)timer)->expire_ms = expire_ms;
}

static void nothing_fd(int fd, void *opaque)
{
    (void)fd;
    (void)opaque;
}

static void nothing(void *opaque)
{
    (void)opaque;
}

static const SlirpCb callbacks = {
    .send_packet = send_packet,
    .guest_error = guest_error,
    .clock_get_ns = clock_get_ns,
    .timer_new = timer_new,
    .timer_free = timer_free,
    .timer_mod = timer_mod,
    .register_poll_fd = nothing_fd,
    .unregister_poll_fd = nothing_fd,
    .notify = nothing,
};

/* ---- the loop ---- */

static bool is_listening(int fd)
{
    int yes = 0;
    socklen_t len = sizeof(yes);

    return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &yes, &len) == 0 && yes;
}

static int add_poll(int fd, int events, void *opaque)
{
    struct user *u = opaque;
    short e = 0;

    /* Whoever connects before the guest is there waits in the backlog. */
    if (!u->backend.nic->ready && is_listening(fd))
        return -1;
    if (sm_nic_full(u->backend.nic))
        events &= ~(SLIRP_POLL_IN | SLIRP_POLL_PRI);
    if (events & SLIRP_POLL_IN)
        e |= POLLIN;
    if (events & SLIRP_POLL_OUT)
        e |= POLLOUT;
    if (events & SLIRP_POLL_PRI)
        e |= POLLPRI;
    return e ? sm_poll_add(u->poll, fd, e) : -1;
}

static int get_revents(int index, void *opaque)
{
    struct user *u = opaque;
    short got = sm_poll_got(u->poll, index);
    int e = 0;

    if (got & POLLIN)
        e |= SLIRP_POLL_IN;
    if (got & POLLOUT)
        e |= SLIRP_POLL_OUT;
    if (got & POLLPRI)
        e |= SLIRP_POLL_PRI;
    if (got & POLLERR)
        e |= SLIRP_POLL_ERR;
    if (got & POLLHUP)
        e |= SLIRP_POLL_HUP;
    return e;
}

static void user_fill(struct sm_backend *b, struct sm_poll *poll)
{
    struct user *u = (struct user *)b;
    uint32_t timeout_ms = 600000;

    u->poll = poll;
    slirp_pollfds_fill(u->slirp, &timeout_ms, add_poll, u);
    if (timeout_ms < NOTHING_MS) /* it ticks while there is a TCP socket, a published port's too */
        sm_poll_at(poll, poll->now_ns + (uint64_t)timeout_ms * 1000000);
    for (struct timer *t = u->timers; t; t = t->next)
        if (t->expire_ms >= 0)
            sm_poll_at(poll, (uint64_t)t->expire_ms * 1000000);
}

static void user_serve(struct sm_backend *b, struct sm_poll *poll)
{
    struct user *u = (struct user *)b;

    u->poll = poll;
    slirp_pollfds_poll(u->slirp, 0, get_revents, u);
    for (struct timer *t = u->timers, *next; t; t = next) {
        next = t->next;
        if (t->expire_ms >= 0 && (uint64_t)t->expire_ms * 1000000 <= poll->now_ns) {
            t->expire_ms = -1;
            t->cb(t->cb_opaque);
        }
    }
}

static void user_send(struct sm_backend *b, const struct sm_net_hdr *hdr, uint8_t *frame, size_t len)
{
    (void)hdr;
    slirp_input(((struct user *)b)->slirp, frame, (int)len);
}

static void user_destroy(struct sm_backend *b)
{
    struct user *u = (struct user *)b;

    slirp_cleanup(u->slirp);
    while (u->timers)
        timer_free(u->timers, u);
    free(u);
}

static const struct sm_backend_ops user_ops = {
    .type = "user",
    .send = user_send,
    .fill = user_fill,
    .serve = user_serve,
    .destroy = user_destroy,
};

int sm_user_create(struct sm_nic *nic, struct sm_backend **out)
{
    const struct sm_policy *p = &nic->policy;
    struct user *u = calloc(1, sizeof(*u));
    SlirpConfig cfg = {
        .version = 4,
        .in_enabled = p->ip4.family,
        .in6_enabled = p->ip6.family,
        .vprefix_len = (uint8_t)p->prefix6,
        .if_mtu = nic->mtu,
        .if_mru = nic->mtu,
        .disable_dns = true,
    };

    if (!u)
        return -ENOMEM;
    memcpy(&cfg.vnetwork, p->subnet4.b, 4);
    cfg.vnetmask.s_addr = htonl(p->prefix4 ? ~0u << (32 - p->prefix4) : 0);
    memcpy(&cfg.vhost, p->gw4.b, 4);
    memcpy(&cfg.vdhcp_start, p->ip4.b, 4);
    memcpy(&cfg.vnameserver, p->dns4.b, 4);
    memcpy(&cfg.vprefix_addr6, p->subnet6.b, 16);
    memcpy(&cfg.vhost6, p->gw6.b, 16);
    memcpy(&cfg.vnameserver6, p->dns6.b, 16);
    u->backend = (struct sm_backend){ &user_ops, nic };
    u->slirp = slirp_new(&cfg, &callbacks, u);
    if (!u->slirp) {
        free(u);
        return -EINVAL;
    }
    *out = &u->backend;
    return 0;
}

/* ---- published ports ---- */

static socklen_t size_of(const struct sockaddr_storage *s)
{
    return s->ss_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
}

static in_port_t *port_of(struct sockaddr_storage *s)
{
    return s->ss_family == AF_INET ? &((struct sockaddr_in *)s)->sin_port
                                   : &((struct sockaddr_in6 *)s)->sin6_port;
}

/* A port that is free now; libslirp does not say which one it got. */
static int free_port(bool udp, const struct sockaddr_storage *host, in_port_t *port)
{
    struct sockaddr_storage s = *host;
    socklen_t len = sizeof(s);
    int fd = socket(s.ss_family, (udp ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC, 0);
    int err = 0;

    if (fd < 0)
        return -errno;
    if (bind(fd, (struct sockaddr *)&s, size_of(&s)) < 0 ||
        getsockname(fd, (struct sockaddr *)&s, &len) < 0)
        err = -errno;
    *port = *port_of(&s);
    close(fd);
    return err;
}

/*
 * libslirp listens with a queue of one: of a burst of clients all others would think that
 * they are connected, or that nobody is there, and try again after seconds. It does not
 * tell its descriptor.
 */
static void lengthen_queue(const struct sockaddr_storage *host)
{
    for (int fd = 0; fd < MAX_DESCRIPTORS; fd++) {
        struct sockaddr_storage s;
        socklen_t len = sizeof(s);

        if (is_listening(fd) && getsockname(fd, (struct sockaddr *)&s, &len) == 0 &&
            len == size_of(host) && memcmp(&s, host, len) == 0) {
            listen(fd, SOMAXCONN); /* again: a new length */
            return;
        }
    }
}

int sm_user_publish(struct sm_backend *b, bool udp, struct sockaddr_storage *host,
                    uint16_t guest_port)
{
    struct user *u = (struct user *)b;
    const struct sm_policy *p = &b->nic->policy;
    struct sockaddr_storage guest = { .ss_family = host->ss_family };
    int flags = udp ? SLIRP_HOSTFWD_UDP : 0;
    bool any = !*port_of(host);

    if (guest.ss_family == AF_INET) {
        memcpy(&((struct sockaddr_in *)&guest)->sin_addr, p->ip4.b, 4);
    } else {
        memcpy(&((struct sockaddr_in6 *)&guest)->sin6_addr, p->ip6.b, 16);
        flags |= SLIRP_HOSTFWD_V6ONLY;
    }
    *port_of(&guest) = htons(guest_port);
    for (unsigned tries = 0;; tries++) {
        int err = any ? free_port(udp, host, port_of(host)) : 0;

        if (err)
            return err;
        errno = 0;
        if (slirp_add_hostxfwd(u->slirp, (struct sockaddr *)host, size_of(host),
                               (struct sockaddr *)&guest, size_of(&guest), flags) == 0) {
            if (!udp)
                lengthen_queue(host);
            return 0;
        }
        err = errno ? -errno : -EADDRINUSE;
        if (!any || tries == 16 || err != -EADDRINUSE)
            return err;
        *port_of(host) = 0;
    }
}
