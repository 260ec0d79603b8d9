/* SPDX-License-Identifier: Apache-2.0 */
/* The network card over its stream backend: frames, offloads, back pressure,
 * and drivers and peers that lie. The test is the peer, on a socket pair. */
#include "dev/virtio_net.h"

#include <fcntl.h>
#include <sys/socket.h>

#include "fake_driver.h"

#define RX 0
#define TX 1
#define F_CSUM (1ull << 0)
#define F_GUEST_CSUM (1ull << 1)
#define F_GUEST_TSO4 (1ull << 7)
#define F_HOST_TSO4 (1ull << 11)
#define F_MRG_RXBUF (1ull << 15)
#define HDR SM_NET_HDR_BYTES
#define ROOM (4u << 20)

static struct fake_driver d;
static uint64_t gpa; /* ROOM bytes of guest memory */
static int peer;
static uint8_t bytes[128 << 10];

/* The peer's end blocks, but not for ever. */
static void create(uint64_t features, bool vnet)
{
    static const uint8_t mac[6] = { 0x52, 0x54, 0, 1, 2, 3 };
    struct timeval wait = { .tv_sec = FAKE_WAIT_MS / 1000 };
    struct sm_virtio_env env = fake_env(&d, "net0");
    struct sm_virtio_net_config cfg = { .mtu = 65520 };
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
    fake_start(&d, features, 2, 256);
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
    unsigned frames = 40;

    create(0, true);
    memcpy(fake_ptr(&d, gpa), &h, HDR);
    for (unsigned i = 0; i < frames; i++) {
        struct fake_buf bufs[2] = { { gpa, HDR, false }, { gpa + 4096 + i * 65536, 60000, false } };

        memset(fake_ptr(&d, gpa + 4096 + i * 65536), (int)i, 60000);
        fake_send(&d, TX, bufs, 2);
    }
    fake_settle(&d);
    CHECK(fake_used_idx(&d, TX) < frames);
    for (unsigned i = 0; i < frames; i++) {
        CHECK_EQ(peer_frame(got), 60000 + HDR);
        CHECK_EQ(got[HDR], i);
        CHECK_EQ(got[HDR + 59999], i);
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
    return test_report();
}
