/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The TCP connections of a machine are its own: a copy has a network that knows none of
 * them, so that who reads from one there would wait for ever. The kernel ends them, each
 * with an error for whoever holds it, before the copy's programs go on
 * (SOCK_DESTROY of sock_diag(7); CONFIG_INET_DIAG_DESTROY). Those over the loopback
 * stay: both of their ends are in the copy. So do listeners.
 *
 * Where the kernel cannot, a connection ends when the copy sends on it.
 */
#include "agent.h"
#include "kabi.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT1 and 2, CLOSE_WAIT, LAST_ACK, CLOSING:
 * numbers of include/net/tcp_states.h. */
#define STATES (1u << 1 | 1u << 2 | 1u << 3 | 1u << 4 | 1u << 5 | 1u << 8 | 1u << 9 | 1u << 11)
#define ENDED_MAX 65536

struct request {
    struct kabi_nlmsghdr head;
    struct kabi_inet_diag_req body;
};

struct sockets {
    struct kabi_inet_diag_id *list;
    size_t count;
};

static int ask(int fd, const struct request *r)
{
    struct kabi_sockaddr_nl kernel = { .family = KABI_AF_NETLINK };

    return sendto(fd, r, sizeof(*r), 0, (void *)&kernel, sizeof(kernel)) < 0 ? -errno : 0;
}

static bool is_loopback(uint8_t family, const struct kabi_inet_diag_id *id)
{
    static const uint8_t mapped[12] = { [10] = 0xff, [11] = 0xff }, one[16] = { [15] = 1 };
    const uint8_t *src = (const uint8_t *)id->src;

    if (family == AF_INET)
        return src[0] == 127;
    if (memcmp(src, mapped, sizeof(mapped)) == 0)
        return src[12] == 127;
    return memcmp(src, one, sizeof(one)) == 0;
}

static int keep(struct sockets *s, const struct kabi_inet_diag_id *id)
{
    if ((s->count & (s->count - 1)) == 0) {
        size_t room = s->count ? s->count * 2 : 1;
        void *grown = room > ENDED_MAX ? NULL : realloc(s->list, room * sizeof(*s->list));

        if (!grown)
            return -ENOMEM;
        s->list = grown;
    }
    s->list[s->count++] = *id;
    return 0;
}

/* One datagram of a dump. 1: that was the last. */
static int take(const uint8_t *p, size_t len, uint8_t family, struct sockets *s)
{
    while (len >= sizeof(struct kabi_nlmsghdr)) {
        struct kabi_nlmsghdr head;
        struct kabi_inet_diag_msg msg;
        size_t step;
        int rc = 0;

        memcpy(&head, p, sizeof(head));
        if (head.len < sizeof(head) || head.len > len)
            return -EPROTO;
        if (head.type == KABI_NLMSG_DONE || head.type == KABI_NLMSG_ERROR)
            return 1;
        if (head.len >= sizeof(head) + sizeof(msg)) {
            memcpy(&msg, p + sizeof(head), sizeof(msg));
            rc = is_loopback(family, &msg.id) ? 0 : keep(s, &msg.id);
        }
        if (rc < 0)
            return rc;
        step = ((size_t)head.len + 3) & ~(size_t)3;
        if (step >= len)
            break;
        p += step;
        len -= step;
    }
    return 0;
}

static struct request request(uint16_t type, uint16_t flags, uint8_t family)
{
    return (struct request){
        .head = { .len = sizeof(struct request), .type = type, .flags = KABI_NLM_F_REQUEST | flags },
        .body = { .family = family, .protocol = IPPROTO_TCP, .states = STATES },
    };
}

static int list(int fd, uint8_t family, struct sockets *s)
{
    struct request r = request(KABI_SOCK_DIAG_BY_FAMILY, KABI_NLM_F_DUMP, family);
    uint8_t *buf = malloc(32768);
    int rc = buf ? ask(fd, &r) : -ENOMEM;

    while (rc == 0) {
        ssize_t n = recv(fd, buf, 32768, 0);

        rc = n < 0 ? -errno : n == 0 ? -EPIPE : take(buf, (size_t)n, family, s);
    }
    free(buf);
    return rc < 0 ? rc : 0;
}

static void end_all(int fd, uint8_t family)
{
    struct sockets s = { 0 };
    uint8_t answer[512];

    if (list(fd, family, &s) < 0)
        s.count = 0; /* no such kernel */
    for (size_t i = 0; i < s.count; i++) {
        struct request r = request(KABI_SOCK_DESTROY, KABI_NLM_F_ACK, family);

        r.body.id = s.list[i];
        if (ask(fd, &r) < 0 || recv(fd, answer, sizeof(answer), 0) < 0)
            break;
    }
    free(s.list);
}

void sm_end_connections(void)
{
    /* Answers are there when the request returns; nobody is waited for. */
    int fd = socket(KABI_AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK,
                    KABI_NETLINK_SOCK_DIAG);

    if (fd < 0)
        return;
    end_all(fd, AF_INET);
    end_all(fd, AF_INET6);
    close(fd);
}
