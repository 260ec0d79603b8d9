/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vsock between a fake driver and real unix sockets: both ways to connect,
 * credit, half-closes, slow ends, storms, mad guests, reset and load.
 */
#include "fake_driver.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "dev/virtio_vsock_conn.h"
#include "scratch.h"

#define RX 0
#define TX 1
#define EVENT 2
#define CID 3
#define QUEUE 128
#define HEAD ((uint32_t)sizeof(struct sm_vsock_header))
#define RX_DATA 4096u
#define GUEST_BUF (256u << 10)

static struct fake_driver d;
static uint64_t tx_head, tx_data, event_gpa;
static uint64_t rx_gpa[QUEUE]; /* by head */
static char path[64];

/* The guest's end of one stream. */
struct stream {
    uint32_t host_port, guest_port;
    uint32_t alloc, fwd;         /* what we say of our buffer */
    uint32_t dev_alloc, dev_fwd; /* what the device said last */
    uint32_t sent;
};

static void post_rx(uint64_t gpa)
{
    struct fake_buf bufs[2] = { { gpa, HEAD, true }, { gpa + HEAD, RX_DATA, true } };
    uint16_t head = d.queues[RX].next_desc % QUEUE;

    rx_gpa[head] = gpa;
    fake_send(&d, RX, bufs, 2);
}

static void post_event(void)
{
    fake_send(&d, EVENT, &(struct fake_buf){ event_gpa, 8, true }, 1);
}

static void start(unsigned rx_buffers)
{
    fake_start(&d, SM_VIRTIO_F_EVENT_IDX, 3, QUEUE);
    for (unsigned i = 0; i < rx_buffers; i++)
        post_rx(fake_alloc(&d, HEAD + RX_DATA));
    post_event();
}

static void create(unsigned rx_buffers)
{
    struct sm_virtio_env env = fake_env(&d, "vsock0");
    struct sm_vsock_config cfg = { .guest_cid = CID, .path = path };

    scratch_clear();
    snprintf(path, sizeof(path), "%s", scratch_path("v.sock"));
    CHECK_EQ(sm_virtio_vsock_create(&env, &cfg, &d.dev), 0);
    tx_head = fake_alloc(&d, 4096);
    tx_data = fake_alloc(&d, 256 << 10);
    event_gpa = fake_alloc(&d, 4096);
    start(rx_buffers);
}

static void send_raw(const struct sm_vsock_header *h, const void *data, uint32_t len)
{
    struct fake_buf bufs[2] = { { tx_head, HEAD, false }, { tx_data, len, false } };

    memcpy(fake_ptr(&d, tx_head), h, HEAD);
    if (len)
        memcpy(fake_ptr(&d, tx_data), data, len);
    fake_send(&d, TX, bufs, len ? 2 : 1);
    CHECK(fake_wait(&d, TX, NULL, NULL));
}

static struct sm_vsock_header head(const struct stream *s, uint16_t op, uint32_t flags,
                                   uint32_t len)
{
    return (struct sm_vsock_header){ .src_cid = CID,
                                     .dst_cid = 2,
                                     .src_port = s->guest_port,
                                     .dst_port = s->host_port,
                                     .len = len,
                                     .type = 1,
                                     .op = op,
                                     .flags = flags,
                                     .buf_alloc = s->alloc,
                                     .fwd_cnt = s->fwd };
}

static void send_op(struct stream *s, uint16_t op, uint32_t flags)
{
    struct sm_vsock_header h = head(s, op, flags, 0);

    send_raw(&h, NULL, 0);
}

static void send_data(struct stream *s, const void *data, uint32_t len)
{
    struct sm_vsock_header h = head(s, SM_VSOCK_RW, 0, len);

    s->sent += len;
    send_raw(&h, data, len);
}

/* The next packet; its payload in buf (RX_DATA bytes) when buf is given. */
static bool recv_packet(struct sm_vsock_header *h, uint8_t *buf)
{
    uint32_t id, used;
    uint64_t gpa;

    memset(h, 0, sizeof(*h));
    if (!fake_wait(&d, RX, &id, &used))
        return false;
    gpa = rx_gpa[id % QUEUE];
    memcpy(h, fake_ptr(&d, gpa), HEAD);
    CHECK_EQ(used, HEAD + h->len);
    CHECK(h->src_cid == 2 && h->dst_cid == CID);
    if (buf)
        memcpy(buf, fake_ptr(&d, gpa + HEAD), h->len);
    post_rx(gpa);
    return true;
}

/* The next packet is this one of this stream. */
static bool expect(struct stream *s, uint16_t op, struct sm_vsock_header *out)
{
    struct sm_vsock_header h;

    if (!recv_packet(&h, NULL) || h.op != op || h.dst_port != s->guest_port ||
        h.src_port != s->host_port) {
        fprintf(stderr, "expected op %u, got op %u %u:%u len %u\n", op, h.op, h.src_port,
                h.dst_port, h.len);
        return false;
    }
    s->dev_alloc = h.buf_alloc;
    s->dev_fwd = h.fwd_cnt;
    if (out)
        *out = h;
    return true;
}

/* Nothing waits to be received. */
static bool quiet(void)
{
    fake_settle(&d);
    return fake_used_idx(&d, RX) == d.queues[RX].last_used;
}

static int listen_on(uint32_t port)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    snprintf(a.sun_path, sizeof(a.sun_path), "%s_%u", path, port);
    if (bind(fd, (struct sockaddr *)&a, sizeof(a)) || listen(fd, 1024))
        abort();
    return fd;
}

static int dial(void)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    memcpy(a.sun_path, path, strlen(path) + 1);
    if (connect(fd, (struct sockaddr *)&a, sizeof(a))) {
        close(fd);
        return -1;
    }
    return fd;
}

/* The guest dials the host. */
static struct stream guest_dials(uint32_t host_port, uint32_t guest_port)
{
    struct stream s = { .host_port = host_port,
                        .guest_port = guest_port,
                        .alloc = GUEST_BUF };

    send_op(&s, SM_VSOCK_REQUEST, 0);
    return s;
}

/* A stream that is open, and the host's end of it. */
static struct stream open_stream(int *host)
{
    int l = listen_on(1024);
    struct stream s = guest_dials(1024, 7000);

    CHECK(expect(&s, SM_VSOCK_RESPONSE, NULL));
    CHECK_EQ(s.dev_alloc, SM_VSOCK_BUF_BYTES);
    *host = accept(l, NULL, NULL);
    close(l);
    return s;
}

/* The host dials port 5 of the guest, which sees the request. */
static struct stream host_dials(int *host, const char *line)
{
    struct stream s = { .alloc = GUEST_BUF };
    struct sm_vsock_header h;

    *host = dial();
    CHECK_EQ(write(*host, line, strlen(line)), strlen(line));
    CHECK(recv_packet(&h, NULL));
    CHECK_EQ(h.op, SM_VSOCK_REQUEST);
    CHECK_EQ(h.dst_port, 5);
    CHECK(h.src_port >= 1u << 30);
    s.host_port = h.src_port;
    s.guest_port = 5;
    return s;
}

static bool read_all(int fd, void *buf, size_t len)
{
    uint8_t *p = buf;

    while (len) {
        ssize_t n = read(fd, p, len);

        if (n <= 0)
            return false;
        p += n;
        len -= (size_t)n;
    }
    return true;
}

static bool at_end(int fd)
{
    char c;

    return read(fd, &c, 1) == 0;
}

static void test_configuration(void)
{
    struct stat st;

    create(4);
    CHECK_EQ(fake_read(&d, 0x08), 19);
    CHECK_EQ(fake_read(&d, 0x100), CID);
    CHECK_EQ(fake_read(&d, 0x104), 0);
    CHECK(!stat(path, &st) && (st.st_mode & 07777) == 0600 && S_ISSOCK(st.st_mode));
    fake_destroy(&d);
    CHECK(access(path, F_OK));
}

static void test_bad_configurations(void)
{
    struct sm_virtio_env env = fake_env(&d, "vsock0");
    char longer[200];
    struct sm_vsock_config cfg = { .guest_cid = 2, .path = path };
    struct sm_virtio_mmio *other;
    int fd;

    scratch_clear();
    CHECK_EQ(sm_virtio_vsock_create(&env, &cfg, &other), -EINVAL);
    cfg.guest_cid = UINT32_MAX;
    CHECK_EQ(sm_virtio_vsock_create(&env, &cfg, &other), -EINVAL);
    cfg.guest_cid = CID;
    memset(longer, 'x', sizeof(longer));
    longer[100] = '\0';
    cfg.path = longer;
    CHECK_EQ(sm_virtio_vsock_create(&env, &cfg, &other), -ENAMETOOLONG);
    cfg.path = "/nowhere/at/all";
    CHECK_EQ(sm_virtio_vsock_create(&env, &cfg, &other), -ENOENT);

    /* a socket somebody listens on stays; one left by the dead goes */
    snprintf(path, sizeof(path), "%s", scratch_path("v.sock"));
    cfg.path = path;
    CHECK_EQ(sm_virtio_vsock_create(&env, &cfg, &d.dev), 0);
    CHECK_EQ(sm_virtio_vsock_create(&env, &cfg, &other), -EADDRINUSE);
    CHECK(!access(path, F_OK));
    fake_destroy(&d);
    env = fake_env(&d, "vsock0");
    scratch_write("v.sock", "precious", 8);
    CHECK_EQ(sm_virtio_vsock_create(&env, &cfg, &other), -EADDRINUSE);
    CHECK_EQ(unlink(path), 0);
    fd = listen_on(0);
    close(fd);
    CHECK_EQ(rename(scratch_path("v.sock_0"), path), 0);
    CHECK_EQ(sm_virtio_vsock_create(&env, &cfg, &d.dev), 0);
    fake_destroy(&d);
}

static void test_guest_dials(void)
{
    struct sm_vsock_header h;
    struct stream s;
    uint8_t buf[RX_DATA];
    int host;

    create(8);
    s = open_stream(&host);
    send_data(&s, "to the host", 11);
    CHECK(read_all(host, buf, 11) && !memcmp(buf, "to the host", 11));
    CHECK_EQ(write(host, "to the guest", 12), 12);
    CHECK(recv_packet(&h, buf));
    CHECK(h.op == SM_VSOCK_RW && h.len == 12 && !memcmp(buf, "to the guest", 12));
    CHECK_EQ(h.fwd_cnt, 11);
    CHECK_EQ(h.type, 1);
    CHECK(quiet());
    close(host);
    fake_destroy(&d);
}

static void test_nobody_listens(void)
{
    struct stream s;

    create(8);
    s = guest_dials(99, 7000);
    CHECK(expect(&s, SM_VSOCK_RST, NULL));
    CHECK(quiet());
    fake_destroy(&d);
}

static void test_host_dials(void)
{
    struct sm_vsock_header h;
    char line[64] = { 0 }, want[64];
    struct stream s;
    int host;
    uint8_t buf[RX_DATA];

    create(8);
    /* what follows the line is the stream's, even in the same write */
    s = host_dials(&host, "CONNECT 5\nhello");
    CHECK(quiet());
    send_op(&s, SM_VSOCK_RESPONSE, 0);
    snprintf(want, sizeof(want), "OK %u\n", s.host_port);
    CHECK(read_all(host, line, strlen(want)) && !strcmp(line, want));
    CHECK(recv_packet(&h, buf));
    CHECK(h.op == SM_VSOCK_RW && h.len == 5 && !memcmp(buf, "hello", 5));
    send_data(&s, "yes", 3);
    CHECK(read_all(host, buf, 3) && !memcmp(buf, "yes", 3));
    close(host);
    fake_destroy(&d);
}

static void test_guest_refuses(void)
{
    struct stream s;
    int host;

    create(8);
    s = host_dials(&host, "CONNECT 5\n");
    send_op(&s, SM_VSOCK_RST, 0);
    CHECK(at_end(host));
    CHECK(quiet());
    close(host);
    fake_destroy(&d);
}

static void test_client_gives_up(void)
{
    struct stream s;
    int host;

    create(8);
    s = host_dials(&host, "CONNECT 5\n");
    close(host);
    CHECK(expect(&s, SM_VSOCK_RST, NULL));
    send_op(&s, SM_VSOCK_RESPONSE, 0); /* too late */
    CHECK(expect(&s, SM_VSOCK_RST, NULL));
    fake_destroy(&d);
}

static void test_bad_lines(void)
{
    static const char *const lines[] = {
        "CONNECT\n",
        "CONNECT \n",
        "CONNECT x\n",
        "connect 5\n",
        "CONNECT -5\n",
        "CONNECT 5 \n",
        "CONNECT 4294967296\n",
        "GET / HTTP/1.0\r\n\r\n",
        "\n",
        "CONNECT 5\r\n",
        "CONNECT 00000000000000000000000000000005\n",
        "CONNECT 99999999999999999999999",
    };

    create(8);
    for (unsigned i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
        int fd = dial();
        char c;

        CHECK(write(fd, lines[i], strlen(lines[i])) > 0);
        if (strchr(lines[i], '\n') == NULL)
            CHECK(write(fd, "9999999999", 10) > 0);
        /* closed, by EOF or, with bytes it did not want, by a reset */
        CHECK(read(fd, &c, 1) <= 0);
        close(fd);
    }
    CHECK(quiet());
    /* in pieces is fine */
    int fd = dial();
    struct sm_vsock_header h;
    for (const char *p = "CONNECT 5\n"; *p; p++)
        CHECK_EQ(write(fd, p, 1), 1);
    CHECK(recv_packet(&h, NULL) && h.op == SM_VSOCK_REQUEST);
    close(fd);
    fake_destroy(&d);
}

static void test_no_driver(void)
{
    int fd;

    create(8);
    fake_write(&d, 0x70, 0);
    fd = dial();
    CHECK(fd >= 0);
    CHECK(at_end(fd));
    close(fd);
    fake_destroy(&d);
}

/* The device never sends more than the guest has room for. */
static void test_credit_towards_the_guest(void)
{
    static uint8_t out[10000];
    struct sm_vsock_header h;
    uint32_t got = 0;
    struct stream s;
    int host;

    create(16);
    s = open_stream(&host);
    s.alloc = 1000;
    send_op(&s, SM_VSOCK_CREDIT_UPDATE, 0);
    CHECK_EQ(write(host, out, sizeof(out)), sizeof(out));
    while (got < 1000 && recv_packet(&h, NULL) && h.op == SM_VSOCK_RW)
        got += h.len;
    CHECK_EQ(got, 1000);
    CHECK(expect(&s, SM_VSOCK_CREDIT_REQUEST, NULL));
    CHECK(quiet());
    s.fwd = 400;
    send_op(&s, SM_VSOCK_CREDIT_UPDATE, 0);
    while (got < 1400 && recv_packet(&h, NULL) && h.op == SM_VSOCK_RW)
        got += h.len;
    CHECK_EQ(got, 1400);
    CHECK(expect(&s, SM_VSOCK_CREDIT_REQUEST, NULL));
    s.fwd = 5000; /* more than was sent: no room, whatever it means */
    send_op(&s, SM_VSOCK_CREDIT_UPDATE, 0);
    CHECK(quiet());
    s.fwd = 1400;
    s.alloc = GUEST_BUF;
    send_op(&s, SM_VSOCK_CREDIT_UPDATE, 0);
    while (got < sizeof(out) && recv_packet(&h, NULL) && h.op == SM_VSOCK_RW)
        got += h.len;
    CHECK_EQ(got, sizeof(out));
    close(host);
    fake_destroy(&d);
}

/* A host that does not read: the guest's credit ends, nobody else suffers,
 * and every byte arrives in the end. */
static void test_slow_host(void)
{
    static uint8_t block[8192], got[8192];
    struct sm_vsock_header h;
    struct stream s, other;
    uint32_t total;
    int host, l, second;

    create(32);
    s = open_stream(&host);
    for (;;) {
        /* all that has been told is that dev_fwd bytes have gone on */
        if (s.sent - s.dev_fwd + sizeof(block) > s.dev_alloc) {
            if (quiet())
                break;
            CHECK(expect(&s, SM_VSOCK_CREDIT_UPDATE, NULL));
            continue;
        }
        for (unsigned i = 0; i < sizeof(block); i++)
            block[i] = (uint8_t)((s.sent + i) % 251);
        send_data(&s, block, sizeof(block));
    }
    total = s.sent;
    CHECK(total > SM_VSOCK_BUF_BYTES); /* the socket holds some more */

    l = listen_on(2000);
    other = guest_dials(2000, 7001);
    CHECK(expect(&other, SM_VSOCK_RESPONSE, NULL));
    second = accept(l, NULL, NULL);
    send_data(&other, "me", 2);
    CHECK(read_all(second, got, 2));

    for (uint32_t at = 0; at < total; at += sizeof(got)) {
        CHECK(read_all(host, got, sizeof(got)));
        for (unsigned i = 0; i < sizeof(got); i++)
            if (got[i] != (uint8_t)((at + i) % 251)) {
                CHECK(!"bytes out of order");
                break;
            }
    }
    while (s.dev_fwd != total && recv_packet(&h, NULL)) {
        CHECK_EQ(h.op, SM_VSOCK_CREDIT_UPDATE);
        s.dev_fwd = h.fwd_cnt;
        if (total - s.dev_fwd < SM_VSOCK_BUF_BYTES / 4)
            break; /* small steps are not told by themselves */
    }
    send_op(&s, SM_VSOCK_CREDIT_REQUEST, 0);
    CHECK(expect(&s, SM_VSOCK_CREDIT_UPDATE, NULL));
    CHECK_EQ(s.dev_fwd, total);
    close(host);
    close(second);
    close(l);
    fake_destroy(&d);
}

/* A guest that sends without credit loses the stream and nothing else. */
static void test_guest_overruns_credit(void)
{
    static uint8_t block[65536];
    struct sm_vsock_header h = { 0 };
    struct stream s;
    int host;

    create(32);
    s = open_stream(&host);
    for (unsigned i = 0; i < 40 && h.op != SM_VSOCK_RST; i++) {
        send_data(&s, block, sizeof(block));
        while (!quiet() && recv_packet(&h, NULL) && h.op != SM_VSOCK_RST)
            CHECK_EQ(h.op, SM_VSOCK_CREDIT_UPDATE);
    }
    CHECK_EQ(h.op, SM_VSOCK_RST);
    CHECK(!(fake_status(&d) & SM_VIRTIO_NEEDS_RESET));
    close(host);
    fake_destroy(&d);
}

static void test_guest_half_closes(void)
{
    uint8_t buf[RX_DATA];
    struct sm_vsock_header h;
    struct stream s;
    int host;

    create(8);
    s = open_stream(&host);
    send_data(&s, "last", 4);
    send_op(&s, SM_VSOCK_SHUTDOWN, SM_VSOCK_SHUT_SEND);
    CHECK(read_all(host, buf, 4) && at_end(host));
    CHECK_EQ(write(host, "answer", 6), 6); /* the other way is open */
    CHECK(recv_packet(&h, buf) && h.len == 6);
    send_op(&s, SM_VSOCK_SHUTDOWN, SM_VSOCK_SHUT_BOTH);
    CHECK(expect(&s, SM_VSOCK_RST, NULL));
    CHECK_EQ(send(host, "x", 1, MSG_NOSIGNAL), -1);
    send_data(&s, "zombie", 6);
    CHECK(expect(&s, SM_VSOCK_RST, NULL));
    close(host);
    fake_destroy(&d);
}

static void test_guest_stops_reading(void)
{
    uint8_t buf[8];
    struct stream s;
    int host;

    create(8);
    s = open_stream(&host);
    send_op(&s, SM_VSOCK_SHUTDOWN, SM_VSOCK_SHUT_RCV);
    CHECK_EQ(send(host, "x", 1, MSG_NOSIGNAL), -1);
    send_data(&s, "still", 5);
    CHECK(read_all(host, buf, 5));
    close(host);
    CHECK(expect(&s, SM_VSOCK_SHUTDOWN, NULL));
    fake_destroy(&d);
}

static void test_host_half_closes(void)
{
    struct sm_vsock_header h;
    uint8_t buf[RX_DATA];
    struct stream s;
    int host;

    create(8);
    s = open_stream(&host);
    CHECK_EQ(write(host, "bye", 3), 3);
    shutdown(host, SHUT_WR);
    CHECK(recv_packet(&h, buf) && h.op == SM_VSOCK_RW && h.len == 3);
    CHECK(expect(&s, SM_VSOCK_SHUTDOWN, &h));
    CHECK_EQ(h.flags, SM_VSOCK_SHUT_SEND);
    send_data(&s, "more", 4);
    CHECK(read_all(host, buf, 4));
    close(host);
    CHECK(expect(&s, SM_VSOCK_SHUTDOWN, &h));
    CHECK_EQ(h.flags, SM_VSOCK_SHUT_BOTH);
    send_data(&s, "crossed", 7); /* before it heard: dropped */
    CHECK(quiet());
    send_op(&s, SM_VSOCK_RST, 0);
    CHECK(quiet());
    s = guest_dials(1024, 7000); /* the port is free again; nobody listens */
    CHECK(expect(&s, SM_VSOCK_RST, NULL));
    fake_destroy(&d);
}

/* What the host wrote before it closed arrives, also when the guest had no
 * room for it then. */
static void test_host_closes_with_data_waiting(void)
{
    static uint8_t out[50000];
    struct sm_vsock_header h = { 0 };
    uint32_t got = 0;
    struct stream s;
    int host;

    create(32);
    s = open_stream(&host);
    s.alloc = 10;
    send_op(&s, SM_VSOCK_CREDIT_UPDATE, 0);
    CHECK_EQ(write(host, out, sizeof(out)), sizeof(out));
    close(host);
    while (got < 10 && recv_packet(&h, NULL))
        got += h.len;
    CHECK_EQ(got, 10);
    CHECK(expect(&s, SM_VSOCK_CREDIT_REQUEST, NULL));
    s.alloc = GUEST_BUF;
    send_op(&s, SM_VSOCK_CREDIT_UPDATE, 0);
    while (recv_packet(&h, NULL) && h.op == SM_VSOCK_RW)
        got += h.len;
    CHECK_EQ(got, sizeof(out));
    CHECK(h.op == SM_VSOCK_SHUTDOWN && h.flags == SM_VSOCK_SHUT_BOTH);
    fake_destroy(&d);
}

static void test_host_stops_reading(void)
{
    struct sm_vsock_header h;
    struct stream s;
    int host;

    create(8);
    s = open_stream(&host);
    shutdown(host, SHUT_RD);
    send_data(&s, "lost", 4);
    CHECK(expect(&s, SM_VSOCK_SHUTDOWN, &h));
    CHECK_EQ(h.flags, SM_VSOCK_SHUT_RCV);
    CHECK_EQ(write(host, "but", 3), 3);
    CHECK(recv_packet(&h, NULL) && h.op == SM_VSOCK_RW && h.len == 3);
    CHECK_EQ(h.fwd_cnt, 4);
    close(host);
    fake_destroy(&d);
}

/* The guest closes while the host is slow: confirmed at once, its port can be
 * used again, and the host still reads every byte. */
static void test_lingering_bytes(void)
{
    static uint8_t block[65536], got[65536];
    struct stream s, again;
    uint32_t total;
    int host, l;

    create(64);
    s = open_stream(&host);
    while (s.sent - s.dev_fwd + sizeof(block) <= s.dev_alloc) {
        send_data(&s, block, sizeof(block));
        while (!quiet())
            CHECK(expect(&s, SM_VSOCK_CREDIT_UPDATE, NULL));
    }
    total = s.sent;
    send_op(&s, SM_VSOCK_SHUTDOWN, SM_VSOCK_SHUT_BOTH);
    CHECK(expect(&s, SM_VSOCK_RST, NULL));
    l = open(path, O_RDONLY); /* no such thing: a socket */
    CHECK(l < 0);
    unlink(scratch_path("v.sock_1024"));
    l = listen_on(1024);
    again = guest_dials(1024, 7000);
    CHECK(expect(&again, SM_VSOCK_RESPONSE, NULL));
    for (uint32_t at = 0; at < total; at += sizeof(got))
        CHECK(read_all(host, got, sizeof(got)));
    CHECK(at_end(host));
    close(host);
    close(l);
    fake_destroy(&d);
}

static void test_packets_that_make_no_sense(void)
{
    struct stream s, none = { 1, 1, 0, 0, 0, 0, 0 };
    struct sm_vsock_header h;
    int host;

    create(16);
    send_op(&none, SM_VSOCK_RW, 0);
    CHECK(expect(&none, SM_VSOCK_RST, NULL));
    send_op(&none, SM_VSOCK_SHUTDOWN, 3);
    CHECK(expect(&none, SM_VSOCK_RST, NULL));
    send_op(&none, SM_VSOCK_RESPONSE, 0);
    CHECK(expect(&none, SM_VSOCK_RST, NULL));
    send_op(&none, 77, 0);
    CHECK(expect(&none, SM_VSOCK_RST, NULL));
    send_op(&none, SM_VSOCK_RST, 0); /* no answer to a RST */
    CHECK(quiet());
    h = head(&none, SM_VSOCK_REQUEST, 0, 0);
    h.type = 2; /* SEQPACKET */
    send_raw(&h, NULL, 0);
    CHECK(recv_packet(&h, NULL) && h.op == SM_VSOCK_RST && h.type == 2);
    h = head(&none, SM_VSOCK_REQUEST, 0, 0);
    h.src_cid = 9;
    send_raw(&h, NULL, 0);
    h = head(&none, SM_VSOCK_REQUEST, 0, 0);
    h.dst_cid = 9;
    send_raw(&h, NULL, 0);
    CHECK(quiet());

    s = open_stream(&host); /* an unknown operation ends a stream */
    send_op(&s, 77, 0);
    CHECK(expect(&s, SM_VSOCK_RST, NULL));
    CHECK(at_end(host));
    close(host);
    unlink(scratch_path("v.sock_1024"));
    s = open_stream(&host); /* so does asking for it again */
    send_op(&s, SM_VSOCK_REQUEST, 0);
    CHECK(expect(&s, SM_VSOCK_RST, NULL));
    close(host);
    unlink(scratch_path("v.sock_1024"));
    s = open_stream(&host); /* and data after the end */
    send_op(&s, SM_VSOCK_SHUTDOWN, SM_VSOCK_SHUT_SEND);
    send_data(&s, "more", 4);
    CHECK(expect(&s, SM_VSOCK_RST, NULL));
    close(host);
    s = host_dials(&host, "CONNECT 5\n"); /* data before the beginning */
    send_data(&s, "more", 4);
    CHECK(expect(&s, SM_VSOCK_RST, NULL));
    CHECK(at_end(host));
    close(host);
    CHECK(!(fake_status(&d) & SM_VIRTIO_NEEDS_RESET));
    fake_destroy(&d);
}

static void test_broken_queues(void)
{
    struct sm_vsock_header h = {
        .src_cid = CID, .dst_cid = 2, .len = 100, .type = 1, .op = SM_VSOCK_RW
    };
    struct fake_buf bufs[2] = { { 0, HEAD, false }, { 0, 99, false } };
    struct stream s;
    int host;

    create(0);
    bufs[0].gpa = tx_head;
    bufs[1].gpa = tx_data;
    memcpy(fake_ptr(&d, tx_head), &h, sizeof(h));
    fake_send(&d, TX, bufs, 2); /* promises 100 bytes, has 99 */
    CHECK(fake_wait_dead(&d));
    start(0);
    bufs[0].len = HEAD - 1; /* no whole header */
    fake_send(&d, TX, bufs, 1);
    CHECK(fake_wait_dead(&d));
    start(0);
    fake_send(&d, RX, &(struct fake_buf){ tx_data, HEAD - 1, true }, 1);
    guest_dials(1, 1);
    CHECK(fake_wait_dead(&d));
    start(2);
    s = open_stream(&host); /* a header fits, data does not */
    fake_send(&d, RX, &(struct fake_buf){ tx_data, HEAD, true }, 1);
    CHECK_EQ(write(host, "0123456789", 10), 10);
    fake_settle(&d);
    (void)s;
    close(host);
    start(8);
    s = guest_dials(99, 7000);
    CHECK(expect(&s, SM_VSOCK_RST, NULL));
    fake_destroy(&d);
}

/* Replies without buffers to put them in: the guest's own transmit queue
 * stops, and nothing is lost. */
static void test_replies_wait_for_buffers(void)
{
    uint64_t heads;
    unsigned sent = 0, got = 0;
    struct sm_vsock_header h = {
        .src_cid = CID, .dst_cid = 2, .type = 1, .op = SM_VSOCK_RW
    };

    create(0);
    heads = fake_alloc(&d, QUEUE * 64); /* one for each that can be in flight */
    while (sent < 3000) {
        struct fake_buf buf = { heads + sent % QUEUE * 64, HEAD, false };

        /* as many as the ring holds, without waiting for them */
        if ((uint16_t)(d.queues[TX].avail - fake_used_idx(&d, TX)) >= QUEUE) {
            fake_settle(&d);
            if ((uint16_t)(d.queues[TX].avail - fake_used_idx(&d, TX)) >= QUEUE)
                break;
            continue;
        }
        h.src_port = ++sent;
        memcpy(fake_ptr(&d, buf.gpa), &h, sizeof(h));
        fake_send(&d, TX, &buf, 1);
    }
    CHECK(sent < 3000); /* it did stop */
    CHECK(sent > 1000);
    for (unsigned i = 0; i < 16; i++)
        post_rx(fake_alloc(&d, HEAD + RX_DATA));
    while (got < sent && recv_packet(&h, NULL)) {
        CHECK_EQ(h.op, SM_VSOCK_RST);
        got++;
    }
    CHECK_EQ(got, sent);
    fake_destroy(&d);
}

/* More streams than the table holds are refused; those there are live on. */
static void test_table_is_bounded(void)
{
    static int hosts[SM_VSOCK_CONNS + 8];
    struct sm_vsock_header h;
    struct stream s;
    unsigned ok = 0;
    char byte;
    int l;

    create(32);
    l = listen_on(1024);
    for (unsigned i = 0; i < SM_VSOCK_CONNS + 8; i++) {
        s = guest_dials(1024, 10000 + i);
        CHECK(recv_packet(&h, NULL));
        CHECK_EQ(h.op, i < SM_VSOCK_CONNS ? SM_VSOCK_RESPONSE : SM_VSOCK_RST);
        if (h.op == SM_VSOCK_RESPONSE)
            hosts[ok++] = accept(l, NULL, NULL);
        if (test_bad)
            break;
    }
    CHECK_EQ(ok, SM_VSOCK_CONNS);
    s = (struct stream){ .host_port = 1024, .guest_port = 10000, .alloc = GUEST_BUF };
    send_data(&s, "x", 1);
    CHECK(read_all(hosts[0], &byte, 1));
    /* one that is only waiting for the guest's word makes room */
    close(hosts[1]);
    s.guest_port = 10001;
    CHECK(expect(&s, SM_VSOCK_SHUTDOWN, NULL));
    s = guest_dials(1024, 20000);
    CHECK(recv_packet(&h, NULL) && h.op == SM_VSOCK_RST && h.dst_port == 10001);
    CHECK(expect(&s, SM_VSOCK_RESPONSE, NULL));
    for (unsigned i = 0; i < ok; i++)
        if (i != 1)
            close(hosts[i]);
    close(l);
    fake_destroy(&d);
}

static void test_connection_storm(void)
{
    create(32);
    for (unsigned i = 0; i < 3000 && !test_bad; i++) {
        struct sm_vsock_header h;
        int fd = dial();

        CHECK(fd >= 0);
        if (i % 3 == 0)
            CHECK(write(fd, "CONNECT 5\n", 10) == 10);
        else if (i % 3 == 1)
            CHECK(write(fd, "CONN", 4) == 4);
        close(fd);
        while (!quiet())
            recv_packet(&h, NULL);
    }
    fake_destroy(&d);
}

static void test_reset_ends_streams(void)
{
    struct stream s;
    int host;

    create(8);
    s = open_stream(&host);
    fake_write(&d, 0x70, 0);
    CHECK(at_end(host));
    close(host);
    start(8);
    unlink(scratch_path("v.sock_1024"));
    s = open_stream(&host);
    send_data(&s, "x", 1);
    close(host);
    fake_destroy(&d);
}

/* After a load the guest hears TRANSPORT_RESET first, and nothing else until
 * it has handed the event's buffer back. */
static void test_load_resets_the_transport(void)
{
    struct fake_queue before[3];
    struct sm_vsock_header h;
    struct sm_state_writer w;
    uint32_t id = 7, used;
    struct stream s;
    int host, fd;

    create(8);
    s = open_stream(&host);
    memcpy(fake_ptr(&d, event_gpa), &id, sizeof(id));
    fake_save(&d, &w);
    memcpy(before, d.queues, sizeof(before));
    send_data(&s, "goes on", 7); /* a save alone disturbs nothing */
    memcpy(before, d.queues, sizeof(before));
    sm_state_writer_free(&w);
    fake_save(&d, &w);

    CHECK_EQ(fake_load(&d, w.buf, w.len), 0);
    memcpy(d.queues, before, sizeof(before));
    CHECK(read_all(host, &id, 4) && read_all(host, &id, 3) && at_end(host));
    close(host);
    CHECK(fake_wait(&d, EVENT, NULL, &used));
    CHECK_EQ(used, 4);
    memcpy(&id, fake_ptr(&d, event_gpa), sizeof(id));
    CHECK_EQ(id, 0);
    fd = dial();
    CHECK_EQ(write(fd, "CONNECT 5\n", 10), 10);
    send_data(&s, "old stream", 10);
    CHECK(quiet());
    post_event();
    CHECK(expect(&s, SM_VSOCK_RST, NULL));
    CHECK(recv_packet(&h, NULL) && h.op == SM_VSOCK_REQUEST);
    close(fd);
    sm_state_writer_free(&w);
    fake_destroy(&d);
}

/* Bulk, both ways at once, with ends that run on their own threads. */
struct bulk {
    int fd;
    uint32_t bytes, bad;
};

static void *bulk_writer(void *arg)
{
    struct bulk *b = arg;
    static uint8_t buf[60000];

    for (uint32_t at = 0; at < b->bytes;) {
        uint32_t len =
            b->bytes - at < sizeof(buf) ? b->bytes - at : (uint32_t)sizeof(buf);

        for (uint32_t i = 0; i < len; i++)
            buf[i] = (uint8_t)((at + i) * 2654435761u >> 24);
        for (uint32_t done = 0; done < len;) {
            ssize_t n = write(b->fd, buf + done, len - done);

            if (n <= 0)
                return NULL;
            done += (uint32_t)n;
        }
        at += len;
    }
    shutdown(b->fd, SHUT_WR);
    return NULL;
}

static void *bulk_reader(void *arg)
{
    struct bulk *b = arg;
    static uint8_t buf[50000];
    ssize_t n;

    while ((n = read(b->fd, buf, sizeof(buf))) > 0) {
        for (ssize_t i = 0; i < n; i++)
            b->bad += buf[i] != (uint8_t)((b->bytes + (uint32_t)i) * 2654435761u >> 24);
        b->bytes += (uint32_t)n;
    }
    return NULL;
}

/* The guest echoes: what it has got and not sent back fills its buffer, and
 * that is what it tells the device. */
static void echo(struct stream *s, uint32_t total)
{
    uint8_t *back = malloc(total + RX_DATA);
    struct sm_vsock_header h;
    uint32_t got = 0, told = 0;
    bool end = false;

    while (!(end && s->sent == got) && !test_bad) {
        uint32_t room = s->dev_alloc - (s->sent - s->dev_fwd);
        uint32_t len = got - s->sent < room ? got - s->sent : room;

        if (len) {
            s->fwd = s->sent;
            send_data(s, back + s->sent, len < 30000 ? len : 30000);
            continue;
        }
        if (got - told >= GUEST_BUF / 4) {
            told = s->fwd = s->sent;
            send_op(s, SM_VSOCK_CREDIT_UPDATE, 0);
        }
        if (!recv_packet(&h, back + got)) {
            CHECK(!"no packet");
            break;
        }
        s->dev_fwd = h.fwd_cnt;
        if (h.op == SM_VSOCK_RW)
            got += h.len;
        CHECK(got - s->fwd <= GUEST_BUF);
        end = end || h.op == SM_VSOCK_SHUTDOWN;
    }
    CHECK_EQ(got, total);
    free(back);
}

static void test_bulk(void)
{
    struct bulk in = { .bytes = 24u << 20 }, out = { 0 };
    pthread_t writer, reader;
    struct stream s;
    int host;

    create(48);
    s = open_stream(&host);
    in.fd = out.fd = host;
    pthread_create(&writer, NULL, bulk_writer, &in);
    pthread_create(&reader, NULL, bulk_reader, &out);
    echo(&s, in.bytes);
    send_op(&s, SM_VSOCK_SHUTDOWN, SM_VSOCK_SHUT_SEND);
    pthread_join(writer, NULL);
    pthread_join(reader, NULL);
    CHECK_EQ(out.bytes, in.bytes);
    CHECK_EQ(out.bad, 0);
    close(host);
    fake_destroy(&d);
}

int main(void)
{
    struct rlimit lim = { 0 };

    getrlimit(RLIMIT_NOFILE, &lim);
    lim.rlim_cur = lim.rlim_max;
    setrlimit(RLIMIT_NOFILE, &lim);
    scratch_begin();
    TEST(test_configuration);
    TEST(test_bad_configurations);
    TEST(test_guest_dials);
    TEST(test_nobody_listens);
    TEST(test_host_dials);
    TEST(test_guest_refuses);
    TEST(test_client_gives_up);
    TEST(test_bad_lines);
    TEST(test_no_driver);
    TEST(test_credit_towards_the_guest);
    TEST(test_slow_host);
    TEST(test_guest_overruns_credit);
    TEST(test_guest_half_closes);
    TEST(test_guest_stops_reading);
    TEST(test_host_half_closes);
    TEST(test_host_closes_with_data_waiting);
    TEST(test_host_stops_reading);
    TEST(test_lingering_bytes);
    TEST(test_packets_that_make_no_sense);
    TEST(test_broken_queues);
    TEST(test_replies_wait_for_buffers);
    TEST(test_table_is_bounded);
    TEST(test_connection_storm);
    TEST(test_reset_ends_streams);
    TEST(test_load_resets_the_transport);
    TEST(test_bulk);
    scratch_end();
    return test_report();
}
