/* SPDX-License-Identifier: Apache-2.0 */
/*
 * TCP from the lab's loopback to the caller's, and back for published ports.
 *
 * A connection attempt to 127.0.0.1 that no socket in the lab would accept
 * is held in a netfilter queue while the keeper dials the same port outside.
 * If that fails the packet goes on and is refused as ever: the caller of
 * connect(2) sees the truth. If it succeeds the packet is marked and diverted
 * (TPROXY) to our listener, and the accepted socket is joined to the dialled
 * one. Our own connections to published ports carry OUR_MARK and are left
 * alone, so they cannot go round in circles.
 *
 * Sources: linux/netfilter/nfnetlink_queue.h, Documentation/networking/tproxy.
 */
#define _GNU_SOURCE
#include "labd.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <linux/netlink.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define OUR_MARK 0x5ab
#define DIVERT_MARK 0x5ac
#define QUEUE_NUMBER 0

/* An attempt that waits for the keeper's answer, then for accept(2). */
struct waiting {
    uint32_t chan;
    uint32_t packet_id;
    bool answered;
    uint16_t from, to; /* ports, host order */
    struct buf early;  /* frames that came before accept(2) */
    struct waiting *next;
};

static const char rules_format[] =
    "table ip lab {\n"
    " chain hold {\n"
    "  type filter hook prerouting priority -150;\n"
    "  iifname lo ip daddr 127.0.0.0/8 tcp flags & (syn | ack) == syn"
    " meta mark != %d jump decide\n"
    " }\n"
    " chain decide {\n"
    "  socket wildcard 0 accept\n"
    "  socket wildcard 1 accept\n"
    "  queue flags bypass to %d\n"
    " }\n"
    " chain divert {\n"
    "  type filter hook prerouting priority -140;\n"
    "  meta mark %d meta l4proto tcp tproxy to 127.0.0.1:%u accept\n"
    " }\n"
    "}\n";

static int load_rules(unsigned port)
{
    char rules[1024];
    int in[2], status = -1;
    bool sent;
    int len = snprintf(rules, sizeof rules, rules_format, OUR_MARK,
                       QUEUE_NUMBER, DIVERT_MARK, port);
    pid_t pid;

    if (pipe(in))
        return -errno;
    pid = fork();
    if (!pid) {
        dup2(in[0], 0);
        close(in[1]);
        execl("/usr/sbin/nft", "nft", "-f", "-", (char *)NULL);
        _exit(127);
    }
    close(in[0]);
    sent = write(in[1], rules, (size_t)len) == len;
    close(in[1]);
    return waitpid(pid, &status, 0) < 0 || status || !sent ? -EIO : 0;
}

/* --- the netfilter queue ------------------------------------------------ */

struct queue_message {
    struct nlmsghdr nl;
    struct nfgenmsg nf;
    char attributes[64];
};

static void message_init(struct queue_message *m, int type)
{
    memset(m, 0, sizeof *m);
    m->nl.nlmsg_len = offsetof(struct queue_message, attributes);
    m->nl.nlmsg_type = (uint16_t)(NFNL_SUBSYS_QUEUE << 8 | type);
    m->nl.nlmsg_flags = NLM_F_REQUEST;
    m->nf.nfgen_family = AF_UNSPEC;
    m->nf.version = NFNETLINK_V0;
    m->nf.res_id = htons(QUEUE_NUMBER);
}

static void message_add(struct queue_message *m, int type, const void *data,
                        size_t len)
{
    struct nlattr attr = {
        .nla_len = (uint16_t)(NLA_HDRLEN + len),
        .nla_type = (uint16_t)type,
    };
    char *at = (char *)m + m->nl.nlmsg_len;

    memcpy(at, &attr, sizeof attr);
    memcpy(at + NLA_HDRLEN, data, len);
    m->nl.nlmsg_len += (uint32_t)NLA_ALIGN(NLA_HDRLEN + len);
}

static int queue_open(void)
{
    struct nfqnl_msg_config_cmd bind_queue = { .command = NFQNL_CFG_CMD_BIND };
    struct nfqnl_msg_config_params params = {
        .copy_range = htonl(128),
        .copy_mode = NFQNL_COPY_PACKET,
    };
    struct queue_message m;
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK,
                    NETLINK_NETFILTER);

    if (fd < 0)
        return -errno;
    message_init(&m, NFQNL_MSG_CONFIG);
    message_add(&m, NFQA_CFG_CMD, &bind_queue, sizeof bind_queue);
    message_add(&m, NFQA_CFG_PARAMS, &params, sizeof params);
    if (send(fd, &m, m.nl.nlmsg_len, 0) < 0) {
        int err = -errno;

        close(fd);
        return err;
    }
    return fd;
}

static void queue_verdict(struct labnet *n, uint32_t packet_id, int verdict,
                          uint32_t mark)
{
    struct nfqnl_msg_verdict_hdr hdr = {
        .verdict = htonl((uint32_t)verdict),
        .id = packet_id,
    };
    struct queue_message m;

    mark = htonl(mark);
    message_init(&m, NFQNL_MSG_VERDICT);
    message_add(&m, NFQA_VERDICT_HDR, &hdr, sizeof hdr);
    if (mark)
        message_add(&m, NFQA_MARK, &mark, sizeof mark);
    if (send(n->queue, &m, m.nl.nlmsg_len, 0) < 0)
        perror("labd: verdict");
}

static void packet_held(struct labnet *n, uint32_t packet_id,
                        const unsigned char *ip, size_t len)
{
    size_t ip_len = len ? (size_t)(ip[0] & 15) * 4 : 0;
    uint16_t from, to;
    struct waiting *w;

    if (len < 20 || len < ip_len + 4) {
        queue_verdict(n, packet_id, NF_ACCEPT, 0);
        return;
    }
    from = (uint16_t)(ip[ip_len] << 8 | ip[ip_len + 1]);
    to = (uint16_t)(ip[ip_len + 2] << 8 | ip[ip_len + 3]);
    for (w = n->waiting; w; w = w->next)
        if (w->from == from && w->to == to) {
            /* Sent again while we are still asking. */
            queue_verdict(n, packet_id, NF_DROP, 0);
            return;
        }
    w = calloc(1, sizeof *w);
    if (!w) {
        queue_verdict(n, packet_id, NF_ACCEPT, 0);
        return;
    }
    w->chan = n->next_chan;
    n->next_chan += 2;
    w->packet_id = packet_id;
    w->from = from;
    w->to = to;
    w->next = n->waiting;
    n->waiting = w;
    link_send(n->relays.link, w->chan, F_DIAL, 0, &to, sizeof to);
}

static void message_parse(struct labnet *n, const char *message, size_t len)
{
    size_t at = NLMSG_HDRLEN + sizeof(struct nfgenmsg), payload_len = 0;
    const unsigned char *payload = NULL;
    struct nfqnl_msg_packet_hdr hdr;
    bool have_hdr = false;

    while (at + NLA_HDRLEN <= len) {
        struct nlattr attr;

        memcpy(&attr, message + at, sizeof attr);
        if (attr.nla_len < NLA_HDRLEN || at + attr.nla_len > len)
            break;
        if ((attr.nla_type & NLA_TYPE_MASK) == NFQA_PACKET_HDR) {
            memcpy(&hdr, message + at + NLA_HDRLEN, sizeof hdr);
            have_hdr = true;
        } else if ((attr.nla_type & NLA_TYPE_MASK) == NFQA_PAYLOAD) {
            payload = (const unsigned char *)message + at + NLA_HDRLEN;
            payload_len = attr.nla_len - NLA_HDRLEN;
        }
        at += NLA_ALIGN(attr.nla_len);
    }
    if (have_hdr)
        packet_held(n, hdr.packet_id, payload, payload_len);
}

static void queue_read(struct labnet *n)
{
    char chunk[8192];
    ssize_t len;

    while ((len = recv(n->queue, chunk, sizeof chunk, 0)) > 0) {
        size_t at = 0;

        while (at + NLMSG_HDRLEN <= (size_t)len) {
            struct nlmsghdr nl;

            memcpy(&nl, chunk + at, sizeof nl);
            if (nl.nlmsg_len < NLMSG_HDRLEN || at + nl.nlmsg_len > (size_t)len)
                break;
            if ((nl.nlmsg_type & 255) == NFQNL_MSG_PACKET)
                message_parse(n, chunk + at, nl.nlmsg_len);
            at += NLMSG_ALIGN(nl.nlmsg_len);
        }
    }
}

/* --- connections -------------------------------------------------------- */

static int listen_transparent(unsigned *port)
{
    struct sockaddr_in addr;
    socklen_t len = sizeof addr;
    int one = 1, fd = loopback_socket(0, &addr);

    if (fd < 0)
        return -errno;
    if (setsockopt(fd, SOL_IP, IP_TRANSPARENT, &one, sizeof one) ||
        bind(fd, (struct sockaddr *)&addr, sizeof addr) || listen(fd, 256) ||
        getsockname(fd, (struct sockaddr *)&addr, &len)) {
        int err = -errno;

        close(fd);
        return err;
    }
    *port = ntohs(addr.sin_port);
    return fd;
}

void labnet_start(struct labnet *n)
{
    unsigned port = 0;

    n->next_chan = 2;
    n->queue = -1;
    n->listener = listen_transparent(&port);
    if (n->listener < 0 || load_rules(port) || (n->queue = queue_open()) < 0)
        fprintf(stderr, "labd: the caller's loopback is out of reach\n");
}

static void waiting_free(struct waiting **at)
{
    struct waiting *w = *at;

    *at = w->next;
    buf_free(&w->early);
    free(w);
}

static void replay(struct labnet *n, struct buf *early)
{
    struct frame f;

    while (early->len >= sizeof f) {
        memcpy(&f, early->bytes + early->start, sizeof f);
        relays_frame(&n->relays, &f, early->bytes + early->start + sizeof f);
        buf_take(early, sizeof f + f.len);
    }
}

static void diverted(struct labnet *n)
{
    struct sockaddr_in peer, own;
    socklen_t peer_len = sizeof peer, own_len = sizeof own;
    int fd = accept4(n->listener, (struct sockaddr *)&peer, &peer_len,
                     SOCK_CLOEXEC | SOCK_NONBLOCK);
    struct waiting **at = &n->waiting;

    if (fd < 0)
        return;
    getsockname(fd, (struct sockaddr *)&own, &own_len);
    while (*at && ((*at)->from != ntohs(peer.sin_port) ||
                   (*at)->to != ntohs(own.sin_port)))
        at = &(*at)->next;
    if (!*at) {
        close(fd);
        return;
    }
    relays_add(&n->relays, fd, (*at)->chan, true);
    replay(n, &(*at)->early);
    waiting_free(at);
}

static void waiting_frame(struct labnet *n, struct waiting **at,
                          const struct frame *f, const char *data)
{
    struct waiting *w = *at;

    if (f->type == F_OPENED) {
        w->answered = true;
        queue_verdict(n, w->packet_id, NF_ACCEPT, DIVERT_MARK);
    } else if (f->type == F_FAIL && !w->answered) {
        queue_verdict(n, w->packet_id, NF_ACCEPT, 0);
        waiting_free(at);
    } else if (buf_add(&w->early, f, sizeof *f) ||
               buf_add(&w->early, data, f->len)) {
        n->relays.link->err = ENOMEM;
    }
}

void labnet_frame(struct labnet *n, const struct frame *f, const char *data)
{
    if (f->type == F_CONNECT) {
        relays_dial(&n->relays, f->chan, (uint16_t)frame_u32(f, data),
                    OUR_MARK);
        return;
    }
    for (struct waiting **at = &n->waiting; *at; at = &(*at)->next)
        if ((*at)->chan == f->chan) {
            waiting_frame(n, at, f, data);
            return;
        }
    relays_frame(&n->relays, f, data);
}

size_t labnet_poll_count(const struct labnet *n)
{
    return 2 + relays_count(&n->relays);
}

void labnet_poll_fill(struct labnet *n, struct pollfd *fds, size_t *count)
{
    fds[(*count)++] = (struct pollfd){ .fd = n->queue, .events = POLLIN };
    fds[(*count)++] = (struct pollfd){ .fd = n->listener, .events = POLLIN };
    *count += relays_poll(&n->relays, fds + *count);
}

void labnet_turn(struct labnet *n, const struct pollfd *fds, size_t count)
{
    if (poll_revents(fds, count, n->queue))
        queue_read(n);
    if (poll_revents(fds, count, n->listener))
        diverted(n);
    relays_turn(&n->relays, fds, count);
}
