/* SPDX-License-Identifier: Apache-2.0 */
/* The network card over its stream backend: frames, offloads, back pressure,
 * and drivers and peers that lie. The test is the peer, on a socket pair. */
#include "dev/virtio_net.h"

#include <fcntl.h>
#include <sys/socket.h>

#include "dev/net_steer.h"

#include "fake_driver.h"

#define RX 0
#define TX 1
#define F_CSUM (1ull << 0)
#define F_GUEST_CSUM (1ull << 1)
#define F_GUEST_TSO4 (1ull << 7)
#define F_HOST_TSO4 (1ull << 11)
#define F_MRG_RXBUF (1ull << 15)
#define F_CTRL_VQ (1ull << 17)
#define F_MQ (1ull << 22)
#define HDR SM_NET_HDR_BYTES
#define ROOM (4u << 20)

static struct fake_driver d;
static uint64_t gpa; /* ROOM bytes of guest memory */
static int peer;
static uint8_t bytes[128 << 10];

/* The peer's end blocks, but not for ever. */
static void create_pairs(uint64_t features, bool vnet, unsigned pairs)
{
    static const uint8_t mac[6] = { 0x52, 0x54, 0, 1, 2, 3 };
    struct timeval wait = { .tv_sec = FAKE_WAIT_MS / 1000 };
    struct sm_virtio_env env = fake_env(&d, "net0");
    struct sm_virtio_net_config cfg = { .mtu = 65520, .pairs = pairs };
    int pair[2];

    memcpy(cfg.mac, mac, sizeof(mac));
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    fcntl(pair[0], F_SETFL, O_NONBLOCK);
    peer = pair[1];
    setsockopt(peer, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait));
    CHECK_EQ(sm_net_stream_create(pair[0], vnet, SM_NET_OFFLOAD_ALL, &cfg.net), 0);
    CHECK_EQ(sm_virtio_net_create(&env, &cfg, &d.dev), 0);
    gpa = fake_alloc(&d, ROOM);
    for (size_t i = 0; i < sizeof(bytes); i++)
        bytes[i] = (uint8_t)(i * 7 + i / 256);
    fake_start(&d, features, pairs > 1 ? 2 * pairs + 1 : 2, 256);
}

static void create(uint64_t features, bool vnet)
{
    create_pairs(features, vnet, 1);
}

static void destroy(void)
{
    close(peer);
    fake_destroy(&d);
}

static bool peer_read(void *buf, size_t len)
{
    return recv(peer, buf, len, MSG_WAITALL) == (ssize_t)len;
}

static uint32_t be32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* The next frame, after any word about offloads. */
static uint32_t peer_frame(uint8_t *buf)
{
    uint8_t head[4];

    do {
        uint32_t len;

        if (!peer_read(head, 4))
            return 0;
        len = be32(head);
        if (len > sizeof(bytes) || !peer_read(buf, len))
            return 0;
    } while (be32(head) == 4);
    return be32(head);
}

static void peer_write(const void *hdr, size_t hdr_len, const void *frame, size_t len)
{
    uint32_t total = (uint32_t)(hdr_len + len);
    uint8_t head[4] = { (uint8_t)(total >> 24), (uint8_t)(total >> 16), (uint8_t)(total >> 8),
                        (uint8_t)total };
    struct iovec iov[3] = { { head, 4 }, { (void *)hdr, hdr_len }, { (void *)frame, len } };

    CHECK_EQ(writev(peer, iov, 3), (ssize_t)(4 + total));
}

static void send_frame(const struct sm_net_hdr *h, size_t len)
{
    struct fake_buf bufs[2] = { { gpa, HDR, false }, { gpa + 4096, (uint32_t)len, false } };

    memcpy(fake_ptr(&d, gpa), h, HDR);
    memcpy(fake_ptr(&d, gpa + 4096), bytes, len);
    fake_send(&d, TX, bufs, 2);
}

static void test_config(void)
{
    uint64_t offered;

    create(0, true);
    CHECK_EQ(fake_read(&d, 0x08), 1);
    CHECK_EQ(sm_virtio_mmio_bus_ops.read(d.dev, 0x100, 4), 0x01005452);
    CHECK_EQ(sm_virtio_mmio_bus_ops.read(d.dev, 0x106, 2), 1);
    CHECK_EQ(sm_virtio_mmio_bus_ops.read(d.dev, 0x10a, 2), 65520);
    offered = fake_offered(&d);
    CHECK(offered & F_HOST_TSO4 && offered & F_MRG_RXBUF);
    destroy();
    /* A peer without headers cannot take offloads. */
    create(0, false);
    offered = fake_offered(&d);
    CHECK(!(offered & (F_CSUM | F_HOST_TSO4 | F_GUEST_TSO4)) && offered & F_MRG_RXBUF);
    destroy();
}

/* What the driver may be sent is told to the peer, first of all. */
static void test_offloads_are_told(void)
{
    uint8_t got[8];

    create(F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4, true);
    CHECK(peer_read(got, 8));
    CHECK_EQ(be32(got), 4);
    CHECK_EQ(got[4], SM_NET_OFFLOAD_CSUM | SM_NET_OFFLOAD_TSO4);
    destroy();
}

static void test_transmit(void)
{
    static uint8_t got[128 << 10];
    struct sm_net_hdr h = { .num_buffers = 9 };

    create(0, false);
    send_frame(&h, 1514);
    CHECK(fake_wait(&d, TX, NULL, NULL));
    CHECK_EQ(peer_frame(got), 1514);
    CHECK(!memcmp(got, bytes, 1514));
    destroy();
    create(F_CSUM | F_HOST_TSO4, true);
    h = (struct sm_net_hdr){ .flags = SM_NET_HDR_NEEDS_CSUM, .gso_type = SM_NET_GSO_TCPV4,
                             .hdr_len = 54, .gso_size = 1460, .csum_start = 34,
                             .csum_offset = 16 };
    send_frame(&h, 65549);
    CHECK_EQ(peer_frame(got), 65549 + HDR);
    CHECK(!memcmp(got, &h, HDR) && !memcmp(got + HDR, bytes, 65549));
    destroy();
}

/* A header that asks for what was not negotiated, or points outside, costs its
 * frame and nothing else; the next one passes. */
static void test_lying_headers(void)
{
    static const struct sm_net_hdr bad[] = {
        { .gso_type = SM_NET_GSO_TCPV4, .gso_size = 1460, .flags = 1 },
        { .gso_type = 3, .gso_size = 1460, .flags = 1 },
        { .gso_type = 0xff, .gso_size = 1, .flags = 1 },
        { .flags = 1, .csum_start = 90, .csum_offset = 9 },
        { .flags = 1, .csum_start = 0xffff, .csum_offset = 0xffff },
    };
    static uint8_t got[1024];
    struct sm_virtio_net_stats stats;
    unsigned n = sizeof(bad) / sizeof(bad[0]);

    create(F_CSUM, true);
    for (unsigned i = 0; i < n; i++) {
        send_frame(&bad[i], 100);
        CHECK(fake_wait(&d, TX, NULL, NULL));
    }
    send_frame(&(struct sm_net_hdr){ 0 }, 13); /* shorter than Ethernet */
    CHECK(fake_wait(&d, TX, NULL, NULL));
    send_frame(&(struct sm_net_hdr){ 0 }, 100);
    CHECK_EQ(peer_frame(got), 100 + HDR);
    fake_settle(&d);
    sm_virtio_net_stats(d.dev, &stats);
    CHECK_EQ(stats.tx_dropped, n + 1);
    CHECK_EQ(stats.tx_frames, 1);
    CHECK(!(fake_status(&d) & SM_VIRTIO_NEEDS_RESET));
    destroy();
}

static void test_no_room_for_a_header(void)
{
    create(0, true);
    fake_send(&d, TX, &(struct fake_buf){ gpa, HDR - 1, false }, 1);
    CHECK(fake_wait_dead(&d));
    destroy();
}

/* The peer does not read: the queue stops, nothing is lost, nothing grows. */
static void test_transmit_waits(void)
{
    static uint8_t got[128 << 10];
    struct sm_net_hdr h = { 0 };
    unsigned frames = 60;

    create(0, true);
    memcpy(fake_ptr(&d, gpa), &h, HDR);
    for (unsigned i = 0; i < frames; i++) {
        struct fake_buf bufs[2] = { { gpa, HDR, false }, { gpa + 4096 + i * 65536, i % 3 ? 500 + i : 60000, false } };

        memset(fake_ptr(&d, gpa + 4096 + i * 65536), (int)i, 60000);
        fake_send(&d, TX, bufs, 2);
    }
    fake_settle(&d);
    CHECK(fake_used_idx(&d, TX) < frames);
    for (unsigned i = 0; i < frames; i++) {
        uint32_t len = peer_frame(got);

        CHECK_EQ(len, (i % 3 ? 500 + i : 60000) + HDR);
        CHECK_EQ(got[HDR], i);
        CHECK_EQ(got[len - 1], i);
    }
    for (unsigned i = 0; i < frames; i++)
        CHECK(fake_wait(&d, TX, NULL, NULL));
    destroy();
}

/* One frame over many buffers, all of them seen at once. */
static void test_receive_merged(void)
{
    struct sm_net_hdr h = { .flags = SM_NET_HDR_DATA_VALID }, got;
    uint32_t used, id, total = 0;
    uint16_t before;

    create(F_MRG_RXBUF | F_GUEST_CSUM | SM_VIRTIO_F_EVENT_IDX, true);
    before = fake_used_idx(&d, RX);
    peer_write(&h, HDR, bytes, 50000);
    for (unsigned i = 0; i < 32; i++) {
        fake_send(&d, RX, &(struct fake_buf){ gpa + i * 4096, 1500, true }, 1);
        if (i < 12) {
            fake_settle(&d);
            CHECK_EQ(fake_used_idx(&d, RX), before); /* not enough yet */
        }
    }
    /* 34 buffers of 1500 hold 50012 bytes */
    for (unsigned i = 32; i < 34; i++)
        fake_send(&d, RX, &(struct fake_buf){ gpa + i * 4096, 1500, true }, 1);
    CHECK(fake_wait(&d, RX, &id, &used));
    memcpy(&got, fake_ptr(&d, gpa), HDR);
    CHECK_EQ(got.num_buffers, 34);
    CHECK_EQ(got.flags, SM_NET_HDR_DATA_VALID);
    CHECK_EQ(fake_used_idx(&d, RX), (uint16_t)(before + 34));
    CHECK(!memcmp(fake_ptr(&d, gpa + HDR), bytes, 1500 - HDR));
    for (unsigned i = 0; i < 34; i++) {
        if (i)
            CHECK(fake_wait(&d, RX, &id, &used));
        CHECK(!memcmp((uint8_t *)fake_ptr(&d, gpa + i * 4096) + (i ? 0 : HDR),
                      bytes + total - (i ? HDR : 0), used - (i ? 0 : HDR)));
        total += used;
    }
    CHECK_EQ(total, 50000 + HDR);
    destroy();
}

/* Without MRG_RXBUF a frame has one buffer, or none at all. */
static void test_receive_single(void)
{
    uint32_t used;

    create(0, false);
    fake_send(&d, RX, &(struct fake_buf){ gpa, 200, true }, 1);
    peer_write(NULL, 0, bytes, 300); /* does not fit, is lost */
    peer_write(NULL, 0, bytes + 1, 100);
    CHECK(fake_wait(&d, RX, NULL, &used));
    CHECK_EQ(used, 100 + HDR);
    CHECK(!memcmp(fake_ptr(&d, gpa + HDR), bytes + 1, 100));
    destroy();
}

/* Offloads that the driver did not ask for never reach it. */
static void test_receive_filters_offloads(void)
{
    struct sm_net_hdr gso = { .gso_type = SM_NET_GSO_TCPV4, .gso_size = 100, .flags = 1 };
    struct sm_net_hdr valid = { .flags = SM_NET_HDR_DATA_VALID }, got;

    create(0, true);
    fake_send(&d, RX, &(struct fake_buf){ gpa, 2000, true }, 1);
    peer_write(&gso, HDR, bytes, 500);
    peer_write(&valid, HDR, bytes, 100);
    CHECK(fake_wait(&d, RX, NULL, NULL));
    memcpy(&got, fake_ptr(&d, gpa), HDR);
    CHECK_EQ(got.flags, 0);
    CHECK_EQ(got.gso_type, 0);
    destroy();
}

/* A peer that talks nonsense, or ends, leaves a card without a cable. */
static void test_peer_breaks(void)
{
    struct sm_notice notice = { 0 };
    uint8_t huge[8] = { 0x7f, 0xff, 0xff, 0xff };
    struct sm_net_hdr h = { 0 };

    create(0, true);
    CHECK_EQ(write(peer, huge, sizeof(huge)), (ssize_t)sizeof(huge));
    fake_settle(&d);
    while (!sm_events_take_notice(&d.events, &notice))
        fake_settle(&d);
    CHECK(strstr(notice.what, "bad length") != NULL);
    send_frame(&h, 100);
    CHECK(fake_wait(&d, TX, NULL, NULL));
    CHECK(!(fake_status(&d) & SM_VIRTIO_NEEDS_RESET));
    destroy();
}

/* A reset and a second life; a saved card comes back working. */
static void test_lives(void)
{
    static uint8_t got[2048];
    struct sm_state_writer w;
    struct sm_net_hdr h = { 0 };

    create(0, true);
    fake_start(&d, 0, 2, 64);
    send_frame(&h, 100);
    CHECK_EQ(peer_frame(got), 100 + HDR);
    CHECK(fake_wait(&d, TX, NULL, NULL));
    fake_save(&d, &w);
    CHECK_EQ(fake_load(&d, w.buf, w.len), 0);
    sm_state_writer_free(&w);
    send_frame(&h, 200);
    CHECK_EQ(peer_frame(got), 200 + HDR);
    fake_send(&d, RX, &(struct fake_buf){ gpa, 2000, true }, 1);
    peer_write(&h, HDR, bytes, 60);
    CHECK(fake_wait(&d, RX, NULL, NULL));
    destroy();
}

/* ---- several pairs of queues ---- */

#define PAIRS 2
#define CTRL (2 * PAIRS)
#define FLOW_BYTES 60

/* A command of the control queue; its answer. */
static uint8_t command(unsigned queue, uint8_t class, uint8_t cmd, uint16_t pairs)
{
    struct fake_buf bufs[3] = { { gpa, 2, false }, { gpa + 16, 2, false }, { gpa + 32, 1, true } };
    uint8_t head[2] = { class, cmd };

    memcpy(fake_ptr(&d, gpa), head, 2);
    memcpy(fake_ptr(&d, gpa + 16), &pairs, 2);
    *(uint8_t *)fake_ptr(&d, gpa + 32) = 0xaa;
    fake_send(&d, queue, bufs, 3);
    CHECK(fake_wait(&d, queue, NULL, NULL));
    return *(uint8_t *)fake_ptr(&d, gpa + 32);
}

/* TCP over IPv4, from the guest or to it. */
static void flow_frame(uint8_t *f, uint16_t port, bool out)
{
    static const uint8_t ours[4] = { 10, 0, 2, 15 }, theirs[4] = { 192, 0, 2, 1 };
    uint16_t local = (uint16_t)(port << 8 | port >> 8), far = 0x5000; /* 80 */

    memset(f, 0, FLOW_BYTES);
    f[12] = 8;
    f[14] = 0x45;
    f[23] = 6;
    memcpy(f + 26, out ? ours : theirs, 4);
    memcpy(f + 30, out ? theirs : ours, 4);
    memcpy(f + 34, out ? &local : &far, 2);
    memcpy(f + 36, out ? &far : &local, 2);
}

static void send_flow(unsigned queue, uint16_t port)
{
    struct fake_buf buf = { gpa, HDR + FLOW_BYTES, false };
    static uint8_t got[256];

    memset(fake_ptr(&d, gpa), 0, HDR);
    flow_frame((uint8_t *)fake_ptr(&d, gpa) + HDR, port, true);
    fake_send(&d, queue, &buf, 1);
    CHECK(fake_wait(&d, queue, NULL, NULL));
    CHECK_EQ(peer_frame(got), HDR + FLOW_BYTES);
}

/* The queue that a frame of the flow comes in by. */
static unsigned receive_flow(uint16_t port)
{
    struct sm_net_hdr h = { 0 };
    uint8_t frame[FLOW_BYTES];
    uint16_t before[PAIRS];

    for (unsigned i = 0; i < PAIRS; i++) {
        fake_send(&d, 2 * i, &(struct fake_buf){ gpa + 4096 * (1 + i), 2000, true }, 1);
        before[i] = fake_used_idx(&d, 2 * i);
    }
    flow_frame(frame, port, false);
    peer_write(&h, HDR, frame, sizeof(frame));
    do
        CHECK(fake_interrupt(&d) >= 0);
    while (fake_used_idx(&d, 0) == before[0] && fake_used_idx(&d, 2) == before[1]);
    return fake_used_idx(&d, 0) != before[0] ? 0 : 2;
}

static void test_pairs_are_asked_for(void)
{
    create_pairs(F_MQ | F_CTRL_VQ, true, PAIRS);
    CHECK_EQ(sm_virtio_mmio_bus_ops.read(d.dev, 0x108, 2), PAIRS);
    CHECK((fake_offered(&d) & (F_MQ | F_CTRL_VQ)) == (F_MQ | F_CTRL_VQ));
    CHECK_EQ(command(CTRL, 4, 0, 2), 0);
    CHECK_EQ(command(CTRL, 4, 0, 1), 0);
    CHECK_EQ(command(CTRL, 4, 0, 0), 1);
    CHECK_EQ(command(CTRL, 4, 0, PAIRS + 1), 1);
    CHECK_EQ(command(CTRL, 4, 1, 1), 1); /* no such command */
    CHECK_EQ(command(CTRL, 0, 0, 1), 1); /* no such class */
    destroy();
    /* Without MQ the control queue is the third, and there is one pair. */
    create_pairs(F_CTRL_VQ, true, PAIRS);
    CHECK_EQ(command(2, 4, 0, 1), 1);
    destroy();
    create(0, true);
    CHECK(!(fake_offered(&d) & (F_MQ | F_CTRL_VQ)));
    destroy();
}

/* A flow comes back where it was sent from, once the driver uses that pair. */
static void test_flows_keep_their_pair(void)
{
    create_pairs(F_MQ | F_CTRL_VQ | F_MRG_RXBUF, true, PAIRS);
    send_flow(3, 1000); /* before it was asked for: the first pair */
    CHECK_EQ(receive_flow(1000), 0);
    CHECK_EQ(command(CTRL, 4, 0, 2), 0);
    for (uint16_t port = 1000; port < 1020; port++) {
        send_flow(port & 1 ? 3 : 1, port);
        CHECK_EQ(receive_flow(port), port & 1 ? 2 : 0);
    }
    send_flow(1, 1001); /* it has moved to another CPU */
    CHECK_EQ(receive_flow(1001), 0);
    send_flow(3, 1001);
    CHECK_EQ(command(CTRL, 4, 0, 1), 0);
    CHECK_EQ(receive_flow(1001), 0);
    destroy();
}

/* A copy uses the pairs that its source used; a state that says more is refused. */
static void test_pairs_are_saved(void)
{
    struct sm_state_writer w;

    create_pairs(F_MQ | F_CTRL_VQ | F_MRG_RXBUF, true, PAIRS);
    CHECK_EQ(command(CTRL, 4, 0, 2), 0);
    fake_save(&d, &w);
    CHECK_EQ(fake_load(&d, w.buf, w.len), 0);
    send_flow(3, 1001);
    CHECK_EQ(receive_flow(1001), 2);
    /* the last byte of the state is their number */
    CHECK_EQ(w.buf[w.len - 1], 2);
    w.buf[w.len - 1] = PAIRS + 1;
    CHECK(fake_load(&d, w.buf, w.len) < 0);
    sm_state_writer_free(&w);
    destroy();
}

static void test_entries_of_flows(void)
{
    uint8_t out[FLOW_BYTES], in[FLOW_BYTES], tagged[FLOW_BYTES + 4];
    unsigned seen[SM_NET_STEER_ENTRIES] = { 0 }, most = 0;

    for (uint16_t port = 1; port < 4096; port++) {
        unsigned e;

        flow_frame(out, port, true);
        flow_frame(in, port, false);
        e = sm_net_steer_entry(out, sizeof(out));
        CHECK_EQ(sm_net_steer_entry(in, sizeof(in)), e);
        seen[e]++;
        most = seen[e] > most ? seen[e] : most;
    }
    CHECK(most < 64); /* 16 on average */
    memcpy(tagged, out, 12);
    memcpy(tagged + 12, (uint8_t[]){ 0x81, 0, 0, 5 }, 4);
    memcpy(tagged + 16, out + 12, FLOW_BYTES - 12);
    CHECK_EQ(sm_net_steer_entry(tagged, sizeof(tagged)), sm_net_steer_entry(out, sizeof(out)));
    for (size_t len = 0; len <= sizeof(out); len++) /* whatever is cut off: an entry */
        CHECK(sm_net_steer_entry(out, len) < SM_NET_STEER_ENTRIES);
    out[14] = 0x4f; /* a header that reaches beyond the frame */
    CHECK(sm_net_steer_entry(out, sizeof(out)) < SM_NET_STEER_ENTRIES);
}

/* ---- a backend that works on the rings itself ---- */

static struct {
    struct sm_net net;
    unsigned started, stopped, pairs;
} taker;

static int take(struct sm_net *net, struct sm_virtio *v, unsigned pairs)
{
    (void)net;
    taker.pairs = pairs;
    for (unsigned q = 0; q < 2 * pairs; q++)
        CHECK_EQ(sm_virtio_take(v, q), 0);
    return 0;
}

static int no_tx(struct sm_net *net, const struct iovec *iov, unsigned n, size_t len)
{
    (void)net, (void)iov, (void)n, (void)len;
    CHECK(!"a frame came by");
    return 0;
}

static void no_pull(struct sm_net *net)
{
    (void)net;
    CHECK(!"a kick came by");
}

static void taker_start(struct sm_net *net, unsigned offloads)
{
    (void)net, (void)offloads;
    taker.started++;
}

static void taker_stop(struct sm_net *net)
{
    (void)net;
    taker.stopped++;
}

static void taker_destroy(struct sm_net *net)
{
    (void)net;
}

static void test_rings_of_another(void)
{
    static const struct sm_net_ops ops = { .type = "taker", .start = taker_start, .stop = taker_stop,
                                           .tx = no_tx, .pull = no_pull, .take_rings = take,
                                           .destroy = taker_destroy };
    struct sm_virtio_env env = fake_env(&d, "net0");
    struct sm_virtio_net_config cfg = { .mac = { 2 }, .net = &taker.net, .pairs = PAIRS };
    struct sm_state_writer w;

    memset(&taker, 0, sizeof(taker));
    taker.net.ops = &ops;
    CHECK_EQ(sm_virtio_net_create(&env, &cfg, &d.dev), 0);
    gpa = fake_alloc(&d, ROOM);
    CHECK_EQ(fake_read(&d, 0x60), 0);
    fake_start(&d, F_MQ | F_CTRL_VQ, CTRL + 1, 64);
    CHECK_EQ(taker.pairs, PAIRS);
    /* The register says a queue, whoever raised the interrupt; kicks are not ours. */
    CHECK_EQ(fake_read(&d, 0x60), SM_VIRTIO_ISR_QUEUE);
    fake_write(&d, 0x64, SM_VIRTIO_ISR_QUEUE);
    CHECK_EQ(fake_read(&d, 0x60), SM_VIRTIO_ISR_QUEUE);
    fake_send(&d, 1, &(struct fake_buf){ gpa, 100, false }, 1);
    CHECK_EQ(command(CTRL, 4, 0, 2), 0); /* but the control queue's are */
    CHECK_EQ(fake_used_idx(&d, 1), 0);
    sm_state_writer_init(&w);
    CHECK_EQ(sm_virtio_device_save(sm_virtio_mmio_device(d.dev), &w), -EBUSY);
    sm_state_writer_free(&w);
    /* One queue taken away: they are all given back before it is. */
    fake_write(&d, 0x30, 0);
    fake_write(&d, 0x44, 0);
    CHECK_EQ(taker.stopped, 1);
    CHECK_EQ(fake_read(&d, 0x44), 0);
    fake_start(&d, 0, 2, 64);
    CHECK_EQ(taker.started, 2);
    CHECK_EQ(taker.pairs, 1);
    fake_write(&d, 0x70, 0);
    CHECK_EQ(taker.stopped, 2);
    CHECK_EQ(fake_read(&d, 0x60), 0);
    fake_destroy(&d);
}

int main(void)
{
    TEST(test_config);
    TEST(test_offloads_are_told);
    TEST(test_transmit);
    TEST(test_lying_headers);
    TEST(test_no_room_for_a_header);
    TEST(test_transmit_waits);
    TEST(test_receive_merged);
    TEST(test_receive_single);
    TEST(test_receive_filters_offloads);
    TEST(test_peer_breaks);
    TEST(test_lives);
    TEST(test_pairs_are_asked_for);
    TEST(test_flows_keep_their_pair);
    TEST(test_pairs_are_saved);
    TEST(test_entries_of_flows);
    TEST(test_rings_of_another);
    return test_report();
}
