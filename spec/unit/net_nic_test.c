/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A card of sm-net between a worker (this test, on its socket) and a backend
 * that records what reaches it: nothing the policy denies does, and what is
 * held, repeated, answered or switched is so.
 */
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "net/backends.h"
#include "net/nic.h"
#include "test.h"

#define HDR SM_NET_HDR_BYTES

static struct sm_nic *nic;
static char dir[64];
static int worker = -1;
static struct sm_nic_event last_event;
static struct sm_flow event_flow;
static unsigned events;

/* ---- a backend ---- */

static struct {
    struct sm_backend backend;
    unsigned frames;
    uint8_t last[70000];
    size_t last_len;
    struct sm_net_hdr hdr;
} world;

static void world_send(struct sm_backend *b, const struct sm_net_hdr *h, uint8_t *frame, size_t len)
{
    (void)b;
    world.frames++;
    world.hdr = *h;
    memcpy(world.last, frame, len);
    world.last_len = len;
}

static void world_round(struct sm_backend *b, struct sm_poll *poll)
{
    (void)b;
    (void)poll;
}

static void world_destroy(struct sm_backend *b)
{
    (void)b;
}

static struct sm_backend_ops world_ops = { .type = "world", .send = world_send, .fill = world_round,
                                           .serve = world_round, .destroy = world_destroy };

static void on_event(struct sm_nic *n, const struct sm_nic_event *e, void *arg)
{
    (void)n;
    (void)arg;
    events++;
    last_event = *e;
    if (e->flow)
        event_flow = *e->flow;
}

/* ---- set-up ---- */

static int dial(const char *path)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    struct timeval wait = { .tv_sec = 20 };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    strcpy(addr.sun_path, path);
    CHECK_EQ(connect(fd, (struct sockaddr *)&addr, sizeof(addr)), 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait));
    return fd;
}

static void identity(struct sm_nic *n, uint8_t last, const char *ip)
{
    static const uint8_t mac[6] = { 2, 0x73, 0, 0, 0, 0 };

    memcpy(n->policy.mac, mac, 6);
    n->policy.mac[5] = last;
    sm_addr_parse(ip, &n->policy.ip4);
    n->event = on_event;
    n->vnet = true;
    n->mtu = 65520;
    n->ready = true;
    n->ready_ns = sm_io_now_ns();
}

static void turn(struct sm_nic *n)
{
    struct sm_poll p = { .now_ns = sm_io_now_ns(), .deadline_ns = ~0ull };

    sm_nic_fill(n, &p);
    poll(p.fds, p.count, 0);
    sm_nic_serve(n, &p);
    free(p.fds);
}

static void create(void)
{
    char path[96];

    strcpy(dir, "/tmp/sm-nic-XXXXXX");
    CHECK(mkdtemp(dir) != NULL);
    snprintf(path, sizeof(path), "%s/n", dir);
    CHECK_EQ(sm_nic_create("net0", path, &nic), 0);
    identity(nic, 1, "10.0.2.15");
    sm_addr_parse("10.0.2.2", &nic->policy.gw4);
    sm_addr_parse("10.0.2.3", &nic->policy.dns4);
    nic->policy.fallback = SM_DEFAULT_DENY_PRIVATE;
    memset(&world, 0, sizeof(world));
    world.backend = (struct sm_backend){ &world_ops, nic };
    world_ops.takes = 0;
    nic->backend = &world.backend;
    events = 0;
    worker = dial(path);
    turn(nic);
}

static void destroy(void)
{
    close(worker);
    sm_nic_destroy(nic);
    CHECK_EQ(rmdir(dir), 0); /* the socket is gone too */
}

/* ---- frames ---- */

static uint8_t frame[70000];

static size_t build(uint8_t mac, const char *src, const char *dst, uint8_t proto, const void *l4, size_t len)
{
    struct sm_addr s, d;
    uint8_t *h = frame + 14;

    sm_addr_parse(src, &s);
    sm_addr_parse(dst, &d);
    memset(frame, 0, 34);
    frame[0] = 0x52;
    frame[6] = 2;
    frame[7] = 0x73;
    frame[11] = mac;
    frame[12] = 8;
    h[0] = 0x45;
    sm_set_be16(h + 2, (uint16_t)(20 + len));
    h[8] = 64;
    h[9] = proto;
    memcpy(h + 12, s.b, 4);
    memcpy(h + 16, d.b, 4);
    sm_set_be16(h + 10, sm_csum_fold(sm_csum_add(0, h, 20)));
    memcpy(frame + 34, l4, len);
    return 34 + len;
}

static size_t tcp(const char *src, const char *dst, uint16_t sport, uint16_t dport, uint8_t flags, size_t data)
{
    static uint8_t t[66000];

    memset(t, 0, 20);
    sm_set_be16(t, sport);
    sm_set_be16(t + 2, dport);
    sm_set_be32(t + 4, 77);
    t[12] = 5 << 4;
    t[13] = flags;
    memset(t + 20, 'd', data);
    return build(1, src, dst, IPPROTO_TCP, t, 20 + data);
}

static void send_as(int fd, struct sm_nic *n, const struct sm_net_hdr *h, const void *f, size_t len)
{
    uint8_t head[4];
    struct iovec iov[3] = { { head, 4 }, { (void *)h, HDR }, { (void *)f, len } };

    sm_set_be32(head, (uint32_t)(HDR + len));
    CHECK_EQ(writev(fd, iov, 3), (ssize_t)(4 + HDR + len));
    turn(n);
}

static void guest(size_t len)
{
    send_as(worker, nic, &(struct sm_net_hdr){ 0 }, frame, len);
}

/* The next frame the guest gets, at the latest as the next round begins; its length, or
 * 0 when there is none. */
static size_t guest_gets_from(int fd, struct sm_nic *n, uint8_t *out)
{
    struct sm_poll p = { .now_ns = sm_io_now_ns(), .deadline_ns = ~0ull };
    uint8_t head[4];
    static uint8_t buf[70000];

    sm_nic_fill(n, &p);
    free(p.fds);
    if (recv(fd, head, 4, MSG_DONTWAIT) != 4)
        return 0;
    CHECK_EQ(recv(fd, buf, sm_be32(head), MSG_WAITALL), sm_be32(head));
    memcpy(out, buf + HDR, sm_be32(head) - HDR);
    return sm_be32(head) - HDR;
}

static uint8_t got[70000];

static size_t guest_gets(void)
{
    return guest_gets_from(worker, nic, got);
}

/* ---- tests ---- */

static void test_only_what_is_allowed_leaves(void)
{
    create();
    guest(tcp("10.0.2.15", "8.8.8.8", 1, 80, SM_TCP_SYN, 0));
    CHECK_EQ(world.frames, 1);
    guest(tcp("10.0.2.15", "10.1.2.3", 1, 80, SM_TCP_SYN, 0));
    CHECK_EQ(world.frames, 1);
    CHECK_EQ(events, 1);
    CHECK_EQ(last_event.kind, SM_NIC_BLOCKED);
    CHECK(guest_gets() > 0); /* a reset */
    CHECK(got[47] & SM_TCP_RST);
    guest(tcp("10.0.2.15", "10.1.2.3", 2, 80, SM_TCP_SYN, 0));
    CHECK_EQ(events, 1); /* said once */
    guest(tcp("10.0.2.99", "8.8.8.8", 1, 80, SM_TCP_SYN, 0));
    CHECK_EQ(world.frames, 1);
    destroy();
}

/* An offload may not make a backend write where the policy has read. */
static void test_offloads_are_checked(void)
{
    struct sm_net_hdr h = { .flags = SM_NET_HDR_NEEDS_CSUM, .csum_start = 34, .csum_offset = 16 };
    struct sm_packet p;
    size_t len;

    create();
    len = tcp("10.0.2.15", "8.8.8.8", 1, 80, SM_TCP_ACK, 100);
    send_as(worker, nic, &h, frame, len);
    CHECK_EQ(world.frames, 1);
    CHECK_EQ(world.hdr.flags, 0); /* this backend takes none: filled in */
    sm_packet_parse(world.last, world.last_len, &p);
    CHECK_EQ(sm_csum_l4(&p.src, &p.dst, IPPROTO_TCP, world.last + p.l4, p.len - p.l4), 0);
    h.csum_start = 14;
    send_as(worker, nic, &h, frame, len); /* would write over the destination */
    h.csum_start = 34;
    h.csum_offset = 2;
    send_as(worker, nic, &h, frame, len); /* … over the port */
    CHECK_EQ(world.frames, 1);
    h = (struct sm_net_hdr){ .flags = 1, .csum_start = 34, .csum_offset = 16, .gso_type = SM_NET_GSO_TCPV6,
                             .gso_size = 1000 };
    send_as(worker, nic, &h, frame, len);
    CHECK_EQ(world.frames, 1);
    h.gso_type = SM_NET_GSO_TCPV4;
    len = tcp("10.0.2.15", "8.8.8.8", 1, 80, SM_TCP_ACK, 65000);
    send_as(worker, nic, &h, frame, len);
    CHECK_EQ(world.frames, 2);
    CHECK_EQ(world.last_len, len);
    destroy();
}

static void test_the_script_decides(void)
{
    create();
    nic->policy.ask = true;
    guest(tcp("10.0.2.15", "10.1.2.3", 1, 80, SM_TCP_SYN, 0));
    CHECK_EQ(last_event.kind, SM_NIC_ASK);
    CHECK_EQ(world.frames, 0);
    guest(tcp("10.0.2.15", "10.1.2.3", 1, 80, SM_TCP_SYN, 0)); /* again: no second question */
    CHECK_EQ(events, 1);
    CHECK_EQ(sm_nic_decide(nic, event_flow.id, true), 0);
    CHECK_EQ(world.frames, 1); /* the held one */
    guest(tcp("10.0.2.15", "10.1.2.3", 1, 80, SM_TCP_ACK, 5));
    CHECK_EQ(world.frames, 2);
    CHECK_EQ(events, 1);
    guest(tcp("10.0.2.15", "10.1.2.3", 1, 81, SM_TCP_ACK, 5));
    CHECK_EQ(world.frames, 2);
    CHECK_EQ(sm_nic_decide(nic, event_flow.id, false), 0);
    CHECK_EQ(world.frames, 2);
    CHECK(guest_gets() > 0 && got[47] & SM_TCP_RST);
    CHECK_EQ(sm_nic_decide(nic, event_flow.id, true), -3);
    destroy();
}

/* A published port before its server: the guest's refusal stays here, and the
 * client's SYN is given to it again. */
static void test_early_client_waits(void)
{
    struct sm_net_hdr none = { 0 };
    size_t len;
    unsigned repeats = 0;

    create();
    len = tcp("10.0.2.2", "10.0.2.15", 5000, 8080, SM_TCP_SYN, 0);
    nic->now_ns = sm_io_now_ns();
    sm_nic_deliver(nic, &none, frame, len);
    CHECK_EQ(guest_gets(), len);
    guest(tcp("10.0.2.15", "10.0.2.2", 8080, 5000, SM_TCP_RST | SM_TCP_ACK, 0));
    CHECK_EQ(world.frames, 0);
    for (uint64_t end = sm_io_now_ns() + 20000000000ull; !repeats && sm_io_now_ns() < end;) {
        struct sm_poll p = { .now_ns = sm_io_now_ns(), .deadline_ns = ~0ull };

        sm_nic_fill(nic, &p);
        CHECK(p.deadline_ns < p.now_ns + 5000000000ull);
        free(p.fds);
        turn(nic);
        repeats += guest_gets() == len;
    }
    CHECK_EQ(repeats, 1);
    guest(tcp("10.0.2.15", "10.0.2.2", 8080, 5000, SM_TCP_SYN | SM_TCP_ACK, 0));
    CHECK_EQ(world.frames, 1);
    CHECK_EQ(nic->repeats, 0);
    /* It has answered once: from now on a refusal is one. */
    len = tcp("10.0.2.2", "10.0.2.15", 5001, 8080, SM_TCP_SYN, 0);
    sm_nic_deliver(nic, &none, frame, len);
    guest(tcp("10.0.2.15", "10.0.2.2", 8080, 5001, SM_TCP_RST | SM_TCP_ACK, 0));
    CHECK_EQ(world.frames, 2);
    destroy();
}

/* A worker that does not read: bounded, told to the backend, nothing torn. */
static void test_slow_worker(void)
{
    enum { ALL = 16 << 20 };
    struct sm_net_hdr none = { 0 };
    uint8_t *all = malloc(ALL);
    size_t len, frames = 0, have = 0, at;
    ssize_t r;

    create();
    len = tcp("10.0.2.2", "10.0.2.15", 5000, 8080, SM_TCP_ACK, 60000);
    for (unsigned i = 0; i < 200; i++)
        sm_nic_deliver(nic, &none, frame, len);
    CHECK(sm_nic_full(nic));
    CHECK(nic->in_dropped > 0);
    CHECK(nic->out_len <= 4u << 20);
    do {
        while ((r = recv(worker, all + have, ALL - have, MSG_DONTWAIT)) > 0)
            have += (size_t)r;
        turn(nic);
    } while (nic->out_len || recv(worker, all + have, 1, MSG_DONTWAIT | MSG_PEEK) > 0);
    for (at = 0; at + 4 + HDR + len <= have; at += 4 + HDR + len, frames++) {
        CHECK_EQ(sm_be32(all + at), HDR + len);
        CHECK(!memcmp(all + at + 4 + HDR, frame, len));
    }
    CHECK_EQ(at, have);
    free(all);
    CHECK_EQ(frames + nic->in_dropped, 200);
    CHECK(!sm_nic_full(nic));
    destroy();
}

static void test_rate(void)
{
    size_t len;

    create();
    nic->rate_packets = 10;
    len = tcp("10.0.2.15", "8.8.8.8", 1, 80, SM_TCP_ACK, 100);
    for (unsigned i = 0; i < 50; i++)
        guest(len);
    /* A burst is taken in whole reads, but not the rest. */
    CHECK(world.frames < 20);
    destroy();
}

static void test_nonsense_hangs_up(void)
{
    create();
    CHECK_EQ(write(worker, "\xff\xff\xff\xff", 4), 4);
    turn(nic);
    CHECK_EQ(nic->fd, -1);
    destroy();
}

static void test_name_not_on_the_list(void)
{
    static const uint8_t q[] = { 0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 'x', 0, 0, 1, 0, 1 };
    uint8_t u[8 + sizeof(q)];

    create();
    nic->policy.fallback = SM_DEFAULT_DENY;
    sm_set_be16(u, 999);
    sm_set_be16(u + 2, 53);
    sm_set_be16(u + 4, sizeof(u));
    sm_set_be16(u + 6, 0);
    memcpy(u + 8, q, sizeof(q));
    guest(build(1, "10.0.2.15", "10.0.2.3", IPPROTO_UDP, u, sizeof(u)));
    CHECK_EQ(world.frames, 0);
    CHECK_EQ(last_event.kind, SM_NIC_NAME);
    CHECK_EQ(guest_gets(), 34 + sizeof(u));
    CHECK_EQ(sm_be16(got + 42), 0x1234);
    CHECK_EQ(got[45] & 15, SM_DNS_REFUSED);
    destroy();
}

/* Two cards and a hub: what is for the other arrives, what lies does not. */
static void test_hub(void)
{
    struct sm_nic *two[2];
    struct sm_hub *hub;
    int fd[2];
    char path[96];
    struct sm_net_hdr none = { 0 };
    struct sm_net_hdr partial = { .flags = SM_NET_HDR_NEEDS_CSUM, .csum_start = 34, .csum_offset = 16 };
    struct sm_packet p;
    size_t len;

    strcpy(dir, "/tmp/sm-nic-XXXXXX");
    CHECK(mkdtemp(dir) != NULL);
    CHECK_EQ(sm_hub_create(&hub), 0);
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof(path), "%s/%d", dir, i);
        CHECK_EQ(sm_nic_create("net", path, &two[i]), 0);
        identity(two[i], (uint8_t)(i + 1), i ? "10.77.0.3" : "10.77.0.2");
        two[i]->policy.link = true;
        CHECK_EQ(sm_hub_plug(hub, two[i], &two[i]->backend), 0);
        fd[i] = dial(path);
        turn(two[i]);
    }
    len = tcp("10.77.0.2", "10.77.0.3", 1, 80, SM_TCP_SYN, 4);
    memcpy(frame, two[1]->policy.mac, 6);
    send_as(fd[0], two[0], &partial, frame, len);
    CHECK_EQ(guest_gets_from(fd[1], two[1], got), len);
    sm_packet_parse(got, len, &p);
    CHECK_EQ(sm_csum_l4(&p.src, &p.dst, IPPROTO_TCP, got + p.l4, p.len - p.l4), 0);
    frame[5] = 9; /* nobody */
    send_as(fd[0], two[0], &none, frame, len);
    CHECK_EQ(guest_gets_from(fd[1], two[1], got), 0);
    memcpy(frame, two[1]->policy.mac, 6);
    frame[11] = 2; /* in the other's name */
    send_as(fd[0], two[0], &none, frame, len);
    CHECK_EQ(guest_gets_from(fd[1], two[1], got), 0);
    CHECK_EQ(guest_gets_from(fd[0], two[0], got), 0);
    for (int i = 0; i < 2; i++) {
        close(fd[i]);
        sm_nic_destroy(two[i]);
    }
    sm_hub_destroy(hub);
    CHECK_EQ(rmdir(dir), 0);
}

int main(void)
{
    TEST(test_only_what_is_allowed_leaves);
    TEST(test_offloads_are_checked);
    TEST(test_the_script_decides);
    TEST(test_early_client_waits);
    TEST(test_slow_worker);
    TEST(test_rate);
    TEST(test_nonsense_hangs_up);
    TEST(test_name_not_on_the_list);
    TEST(test_hub);
    return test_report();
}
