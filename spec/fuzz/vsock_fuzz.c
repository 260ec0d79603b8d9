/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A vsock driver that says anything, with real unix sockets on the other side.
 * The input is a script: packets with fields near the truth or far from it,
 * receive buffers of any shape, host programs that dial, write, read and hang
 * up, resets, and a save that is loaded again. What must hold: no crash, no
 * leak, and the device answers its thread at the end of each script.
 */
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "dev/virtio_vsock_conn.h"
#include "fake_driver.h"
#include "scratch.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { RX, TX, EVENT, QUEUE = 64, HOSTS = 4, PORT = 1024 };

static struct fake_driver d;
static char path[64];
static uint64_t buffers;
static int listener, hosts[HOSTS];

struct script {
    const uint8_t *p;
    size_t left;
};

static uint32_t take(struct script *s, unsigned bytes)
{
    uint32_t v = 0;

    for (unsigned i = 0; i < bytes && s->left; i++, s->left--)
        v |= (uint32_t)*s->p++ << 8 * i;
    return v;
}

/* Mostly a port that is in use. */
static uint32_t port(struct script *s)
{
    uint32_t v = take(s, 1);

    if (v < 64)
        return PORT;
    if (v < 128)
        return 1u << 30 | (v & 3); /* given to a host that dialled */
    return v < 192 ? v & 7 : take(s, 4);
}

static void unix_name(struct sockaddr_un *a, const char *tail)
{
    memset(a, 0, sizeof(*a));
    a->sun_family = AF_UNIX;
    snprintf(a->sun_path, sizeof(a->sun_path), "%s%s", path, tail);
}

static int new_socket(void)
{
    return socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
}

static void packet(struct script *s)
{
    static const uint16_t ops[] = { SM_VSOCK_REQUEST, SM_VSOCK_RESPONSE, SM_VSOCK_RST,
                                    SM_VSOCK_SHUTDOWN, SM_VSOCK_RW, SM_VSOCK_RW,
                                    SM_VSOCK_CREDIT_UPDATE, SM_VSOCK_CREDIT_REQUEST };
    uint8_t kind = (uint8_t)take(s, 1);
    uint32_t len = take(s, 1) * (kind & 64 ? 257 : 1);
    uint64_t gpa = buffers + (take(s, 1) & 15) * 4096;
    struct sm_vsock_header h = {
        .src_cid = kind & 8 ? take(s, 2) : 3,
        .dst_cid = kind & 16 ? take(s, 2) : 2,
        .src_port = port(s),
        .dst_port = port(s),
        .len = kind & 32 ? take(s, 4) : len,
        .type = kind & 128 ? (uint16_t)take(s, 1) : 1,
        .op = kind & 128 ? (uint16_t)take(s, 2) : ops[kind & 7],
        .flags = take(s, 1) & 3,
        .buf_alloc = take(s, 1) << (take(s, 1) & 31),
        .fwd_cnt = take(s, 2),
    };
    struct fake_buf bufs[3] = { { gpa, sizeof(h), false }, { gpa + 64, len, false },
                                { gpa, take(s, 1), true } };

    memcpy(fake_ptr(&d, gpa), &h, sizeof(h));
    if (kind & 32)
        bufs[0].len = take(s, 1);
    fake_send(&d, TX, bufs, take(s, 1) < 250 ? 2 : 3);
}

static void receive_buffer(struct script *s)
{
    uint64_t gpa = buffers + (16 + (take(s, 1) & 15)) * 4096;
    uint32_t len = take(s, 1) * 16;
    struct fake_buf bufs[2] = { { gpa, len < 16 ? len : 44, true }, { gpa + 64, len, true } };

    fake_send(&d, RX, bufs, 2);
}

static void host(struct script *s)
{
    int *fd = &hosts[take(s, 1) % HOSTS];
    uint8_t what = (uint8_t)take(s, 1);
    struct sockaddr_un a;
    uint8_t buf[8192];
    ssize_t n = 0;

    switch (what & 7) {
    case 0:
        if (*fd >= 0)
            close(*fd);
        *fd = new_socket();
        unix_name(&a, "");
        n = connect(*fd, (struct sockaddr *)&a, sizeof(a));
        break;
    case 1:
        if (*fd >= 0)
            close(*fd);
        *fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        break;
    case 2: case 3:
        n = send(*fd, "CONNECT 5\nhello", what & 8 ? 15 : 10, MSG_NOSIGNAL);
        break;
    case 4:
        memset(buf, what, sizeof(buf));
        n = send(*fd, buf, take(s, 1) * 32, MSG_NOSIGNAL);
        break;
    case 5:
        n = recv(*fd, buf, sizeof(buf), MSG_DONTWAIT);
        break;
    case 6:
        shutdown(*fd, what >> 3 & 1 ? SHUT_WR : SHUT_RD);
        break;
    default:
        if (*fd >= 0)
            close(*fd);
        *fd = -1;
    }
    (void)n;
}

static void start(struct script *s)
{
    fake_negotiate(&d, SM_VIRTIO_F_VERSION_1 | (take(s, 1) & 1 ? SM_VIRTIO_F_EVENT_IDX : 0));
    d.next_gpa = buffers + 32 * 4096;
    for (unsigned q = 0; q < 3; q++)
        fake_queue(&d, q, QUEUE);
    fake_driver_ok(&d);
    for (unsigned i = take(s, 1) & 31; i; i--) {
        struct fake_buf bufs[2] = { { buffers + (16 + i % 16) * 4096, 44, true },
                                    { buffers + (16 + i % 16) * 4096 + 64, 4000, true } };

        fake_send(&d, RX, bufs, 2);
    }
    fake_send(&d, EVENT, &(struct fake_buf){ buffers + 15 * 4096, 8, true }, 1);
}

static void save_and_load(struct script *s)
{
    struct sm_state_writer w;

    fake_save(&d, &w);
    if (w.len && take(s, 1) & 1) /* a snapshot file is hostile, too */
        w.buf[take(s, 2) % w.len] ^= (uint8_t)take(s, 1);
    fake_load(&d, w.buf, w.len);
    sm_state_writer_free(&w);
}

static void begin(void)
{
    struct sockaddr_un a;

    if (!scratch_dir[0]) {
        scratch_begin();
        atexit(scratch_end);
    }
    snprintf(path, sizeof(path), "%s/v", scratch_dir);
    struct sm_virtio_env env = fake_env(&d, "vsock0");
    struct sm_vsock_config cfg = { .guest_cid = 3, .path = path };

    if (sm_virtio_vsock_create(&env, &cfg, &d.dev))
        abort();
    buffers = fake_alloc(&d, 32 * 4096);
    unix_name(&a, "_1024");
    listener = new_socket();
    if (bind(listener, (struct sockaddr *)&a, sizeof(a)) || listen(listener, 16))
        abort();
    for (unsigned i = 0; i < HOSTS; i++)
        hosts[i] = -1;
}

static void end(void)
{
    fake_settle(&d);
    fake_destroy(&d);
    close(listener);
    for (unsigned i = 0; i < HOSTS; i++)
        if (hosts[i] >= 0)
            close(hosts[i]);
    scratch_clear();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct script s = { data, size };

    begin();
    start(&s);
    while (s.left) {
        switch (take(&s, 1) % 16) {
        case 0: case 1: case 2: case 3: case 4: case 5: case 6: packet(&s); break;
        case 7: case 8: receive_buffer(&s); break;
        case 9: case 10: case 11: case 12: host(&s); break;
        case 13: fake_settle(&d); break;
        case 14: start(&s); break;
        default: save_and_load(&s);
        }
    }
    end();
    return 0;
}
