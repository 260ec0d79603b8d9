/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The connection to the host: dial, frames in, frames out.
 *
 * Frames in are taken as they come; handling one never blocks (stdin that a
 * process does not take is kept in its channel, at most a window of it). Out
 * frames go to one queue, flushed once a turn. The queue has no limit for
 * control frames, which answer the host's own; data is only read from a
 * process while the queue is short, so it never holds much.
 */
#include "agent.h"
#include "kabi.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <unistd.h>

#define IN_ROOM_BYTES (2 * (SM_FRAME_PAYLOAD_MAX + SM_FRAME_HEADER_BYTES))
#define OUT_FULL_BYTES SM_FRAME_PAYLOAD_MAX

int sm_link_dial(struct sm_agent *a, int *fd_out)
{
    struct kabi_sockaddr_vm addr = {
        .family = KABI_AF_VSOCK,
        .port = SM_PROTO_VSOCK_PORT,
        .cid = KABI_VMADDR_CID_HOST,
    };
    a->marks[SM_MARK_DIAL] = sm_now_ns();
    int fd = socket(KABI_AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    if (connect(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0 && errno != EINPROGRESS) {
        int rc = -errno;
        close(fd);
        return rc;
    }
    *fd_out = fd;
    return 0;
}

int sm_link_finish(int fd, int timeout_ms)
{
    struct pollfd p = { .fd = fd, .events = POLLOUT };
    int n = poll(&p, 1, timeout_ms);
    if (n == 0)
        return -ETIMEDOUT;
    if (n < 0)
        return -errno;
    int error = 0;
    socklen_t len = sizeof(error);
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) < 0)
        return -errno;
    return -error;
}

bool sm_link_full(const struct sm_agent *a)
{
    return a->out.len >= OUT_FULL_BYTES;
}

void sm_link_send(struct sm_agent *a, uint8_t type, uint8_t flags, uint16_t chan,
                  const void *payload, size_t len)
{
    if (a->link.fd < 0)
        return;
    uint8_t head[SM_FRAME_HEADER_BYTES];
    sm_frame_header(head, (uint32_t)len, type, flags, chan);
    if (sm_buf_reserve(&a->out, sizeof(head) + len)) {
        sm_log(a, "out of memory for a frame: connection dropped");
        shutdown(a->link.fd, SHUT_RDWR);
        return;
    }
    sm_buf_append(&a->out, head, sizeof(head));
    sm_buf_append(&a->out, payload, len);
}

void sm_link_failed(struct sm_agent *a, uint16_t chan, int error, uint32_t stage,
                    const char *text)
{
    uint8_t bytes[8 + 512];
    size_t len = text ? strnlen(text, 512) : 0;
    sm_put32(bytes, (uint32_t)error);
    sm_put32(bytes + 4, stage);
    if (len)
        memcpy(bytes + 8, text, len);
    sm_link_send(a, SM_FAILED, 0, chan, bytes, 8 + len);
}

static void put_mark(struct sm_buf *b, uint32_t id, uint64_t value)
{
    uint8_t bytes[12];
    sm_put32(bytes, id);
    sm_put64(bytes + 4, value);
    sm_field_put(b, SM_HELLO_MARK, bytes, sizeof(bytes));
}

static void send_hello(struct sm_agent *a)
{
    struct sm_buf b = { 0 };
    struct utsname u;
    sm_field_put_u32(&b, SM_HELLO_VERSION, SM_PROTO_VERSION);
    sm_field_put_u32(&b, SM_HELLO_GENERATION, a->generation);
    sm_field_put_u32(&b, SM_HELLO_BOOTED, a->booted && a->vm);
    if (uname(&u) == 0)
        sm_field_put(&b, SM_HELLO_KERNEL, u.release, (uint32_t)strlen(u.release));
    for (uint32_t id = SM_MARK_KERNEL_ZERO; id <= SM_MARK_HELLO; id++)
        put_mark(&b, id, a->marks[id]);
    sm_link_send(a, SM_HELLO, 0, 0, b.bytes, b.len);
    sm_buf_free(&b);
}

static void send_booted(struct sm_agent *a)
{
    struct sm_buf b = { 0 };
    for (uint32_t id = SM_MARK_BOOT; id <= SM_MARK_BOOTED; id++)
        put_mark(&b, id, a->marks[id]);
    sm_link_send(a, SM_BOOTED, 0, 0, b.bytes, b.len);
    sm_buf_free(&b);
}

void sm_boot(struct sm_agent *a, const uint8_t *data, size_t len)
{
    struct sm_boot_req req;
    uint32_t stage = SM_STAGE_REQUEST;
    const char *what = "BOOT";
    a->marks[SM_MARK_BOOT] = sm_now_ns();
    int rc = a->booted ? -EALREADY : sm_boot_parse(data, len, &req);
    if (rc == 0 && a->vm) {
        if (req.has_clock)
            sm_setup_clock(req.clock_ns);
        sm_setup_entropy(req.entropy, req.entropy_len);
        rc = sm_root_switch(a, &req, &stage, &what);
        a->marks[SM_MARK_ROOT] = sm_now_ns();
        if (rc == 0) {
            sm_setup_system(&req);
            stage = SM_STAGE_NET;
            rc = sm_setup_net(&req, &what);
        }
        if (rc == 0) {
            stage = SM_STAGE_MOUNT;
            rc = sm_setup_mounts(&req, &what);
            sm_freeze_init();
        }
        if (rc == 0 && req.root == SM_ROOT_READONLY) {
            what = "read-only root";
            rc = sm_root_seal();
        }
    }
    if (rc == 0) {
        if (req.has_grace)
            a->grace_ms = req.grace_ms;
        a->booted = true;
        a->marks[SM_MARK_BOOTED] = sm_now_ns();
        send_booted(a);
    } else {
        sm_log(a, "boot: %s: %s", what, strerror(-rc));
        sm_link_failed(a, 0, -rc, stage, what);
    }
    if (rc != -EALREADY)
        sm_boot_free(&req);
}

/*
 * A copy of a machine is told who it is: the wall clock before all else, for
 * where nothing could be frozen what ran when it was copied runs already; then fresh
 * randomness, so that the random numbers of two copies part ways even where the kernel
 * cannot be told of a new generation; then its names. Its source's connections end. The
 * workload goes on after that.
 */
static void resume(struct sm_agent *a, const uint8_t *data, size_t len)
{
    struct sm_boot_req req;
    int rc = sm_boot_parse(data, len, &req);
    if (rc == 0 && !a->booted)
        rc = -EINVAL;
    if (rc == 0 && a->vm) {
        if (req.has_clock)
            sm_setup_clock(req.clock_ns);
        sm_setup_entropy(req.entropy, req.entropy_len);
        sm_setup_identity(&req);
        sm_end_connections();
        sm_thaw();
    }
    if (rc == 0)
        send_booted(a);
    else
        sm_link_failed(a, 0, -rc, SM_STAGE_REQUEST, "RESUME");
    sm_boot_free(&req);
}

static void signal_chan(struct sm_agent *a, struct sm_chan *c, const struct sm_frame *f)
{
    int sig = (int)sm_get32(f->payload);
    if (c->waiting)
        sm_chan_fail(a, c, ECANCELED, SM_STAGE_CHAIN, "cancelled");
    else if (c->pid > 0 && !c->reaped)
        kill(f->flags & SM_FLAG_GROUP ? -c->pid : c->pid, sig);
}

static void resize_chan(struct sm_chan *c, const struct sm_frame *f)
{
    c->exec.rows = sm_get16(f->payload);
    c->exec.columns = sm_get16(f->payload + 2);
    if (c->tty >= 0) {
        struct kabi_winsize w = { .row = c->exec.rows, .col = c->exec.columns };
        kabi_set_winsize(c->tty, &w);
    }
}

/* Frames about a request. One that is over already is no mistake: it raced. */
static int chan_frame(struct sm_agent *a, const struct sm_frame *f)
{
    struct sm_chan *c = sm_chan_find(a, f->chan);
    uint32_t stream;
    switch (f->type) {
    case SM_STDIN:
        if (c)
            sm_chan_stdin(a, c, f->payload, f->len);
        return 0;
    case SM_STDIN_EOF:
        if (c)
            sm_chan_stdin_eof(a, c);
        return 0;
    case SM_RESIZE:
        if (f->len != 4)
            return -EPROTO;
        if (c)
            resize_chan(c, f);
        return 0;
    case SM_SIGNAL:
        if (f->len != 4)
            return -EPROTO;
        if (c)
            signal_chan(a, c, f);
        return 0;
    case SM_CREDIT:
        if (f->len != 8)
            return -EPROTO;
        stream = sm_get32(f->payload);
        if (stream != 1 && stream != 2)
            return -EPROTO;
        if (c)
            sm_chan_credit(a, c, stream - 1, sm_get32(f->payload + 4));
        return 0;
    default:
        return -EPROTO;
    }
}

static void refuse(struct sm_agent *a, const struct sm_frame *f)
{
    sm_link_send(a, SM_REFUSED, 0, f->chan, &f->type, 1);
}

static int request_done(struct sm_agent *a, uint8_t type, uint16_t chan, const uint8_t *data,
                        size_t len)
{
    if ((type == SM_BOOT || type == SM_RESUME) != (chan == 0))
        return -EPROTO;
    if (type == SM_BOOT)
        sm_boot(a, data, len);
    else if (type == SM_RESUME)
        resume(a, data, len);
    else
        sm_chan_open(a,
                     type == SM_EXEC       ? SM_CHAN_EXEC
                     : type == SM_FILE_PUT ? SM_CHAN_PUT
                                           : SM_CHAN_GET,
                     chan, data, len);
    return 0;
}

/* A request may span frames; its parts come without others between them. */
static int request_frame(struct sm_agent *a, const struct sm_frame *f)
{
    bool more = f->flags & SM_FLAG_MORE;
    if (a->request_type == 0 && !more)
        return request_done(a, f->type, f->chan, f->payload, f->len);
    if (a->request_type && (a->request_type != f->type || a->request_chan != f->chan))
        return -EPROTO;
    if (a->request.len + f->len > SM_REQUEST_MAX_BYTES)
        return -E2BIG;
    int rc = sm_buf_append(&a->request, f->payload, f->len);
    a->request_type = f->type;
    a->request_chan = f->chan;
    if (rc || more)
        return rc;
    rc = request_done(a, f->type, f->chan, sm_buf_head(&a->request), a->request.len);
    sm_buf_free(&a->request);
    a->request_type = 0;
    return rc;
}

static void freeze(struct sm_agent *a)
{
    uint8_t bytes[4];
    sm_put32(bytes, (uint32_t)-(a->vm ? sm_freeze() : -EOPNOTSUPP));
    sm_link_send(a, SM_FROZEN, 0, 0, bytes, sizeof(bytes));
}

static int control_frame(struct sm_agent *a, const struct sm_frame *f)
{
    uint32_t reason;
    switch (f->type) {
    case SM_CLOCK:
        if (f->len != 8)
            return -EPROTO;
        if (a->vm)
            sm_setup_clock(sm_get64(f->payload));
        return 0;
    case SM_SHUTDOWN:
        if (f->len != 12)
            return -EPROTO;
        reason = sm_get32(f->payload);
        if (reason != SM_BYE_POWEROFF && reason != SM_BYE_REBOOT)
            return -EPROTO;
        a->end_asked = true;
        sm_end_begin(a, reason, 0, sm_get32(f->payload + 4), sm_get32(f->payload + 8),
                     "asked by the host");
        return 0;
    case SM_PING:
        if (f->len > 64)
            return -EPROTO;
        sm_link_send(a, SM_PONG, 0, 0, f->payload, f->len);
        return 0;
    case SM_FREEZE:
        if (f->len)
            return -EPROTO;
        freeze(a);
        return 0;
    case SM_THAW:
        if (f->len)
            return -EPROTO;
        sm_thaw();
        return 0;
    case SM_BYE:
        a->bye_read = true;
        return 0;
    default:
        refuse(a, f);
        return 0;
    }
}

static int handle(struct sm_agent *a, const struct sm_frame *f)
{
    switch (f->type) {
    case SM_BOOT:
    case SM_RESUME:
    case SM_EXEC:
    case SM_FILE_PUT:
    case SM_FILE_GET:
        return request_frame(a, f);
    case SM_STDIN:
    case SM_STDIN_EOF:
    case SM_RESIZE:
    case SM_SIGNAL:
    case SM_CREDIT:
        return chan_frame(a, f);
    default:
        return f->chan ? (refuse(a, f), 0) : control_frame(a, f);
    }
}

/* 0 to go on, -errno when the connection is of no more use. */
static int take_input(struct sm_agent *a)
{
    int rc = sm_buf_reserve(&a->in, IN_ROOM_BYTES);
    if (rc)
        return rc;
    ssize_t n = read(a->link.fd, sm_buf_tail(&a->in), sm_buf_room(&a->in));
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    if (n == 0)
        return -EPIPE;
    a->in.len += (size_t)n;
    struct sm_frame f;
    long used;
    while ((used = sm_frame_next(sm_buf_head(&a->in), a->in.len, &f)) > 0) {
        rc = handle(a, &f);
        if (rc)
            return rc;
        sm_buf_consume(&a->in, (size_t)used);
    }
    return (int)used;
}

int sm_link_flush(struct sm_agent *a)
{
    while (a->link.fd >= 0 && a->out.len > 0) {
        ssize_t n = write(a->link.fd, sm_buf_head(&a->out), a->out.len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            break;
        if (n < 0)
            return -errno;
        sm_buf_consume(&a->out, (size_t)n);
    }
    if (a->link.fd < 0)
        return 0;
    return sm_source_listen(&a->link, a->epoll, EPOLLIN | (a->out.len ? EPOLLOUT : 0));
}

static void link_ready(struct sm_agent *a, void *arg, uint32_t events)
{
    (void)arg;
    int rc = 0;
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        rc = take_input(a);
    if (rc == 0 && events & EPOLLOUT)
        rc = sm_link_flush(a);
    if (rc) {
        if (rc == -EPROTO || rc == -E2BIG)
            sm_log(a, "the host broke the protocol: connection dropped");
        sm_link_lost(a);
    }
}

int sm_link_attach(struct sm_agent *a, int fd)
{
    int rc = sm_source_add(a, &a->link, a->epoll, fd, EPOLLIN, link_ready, NULL);
    if (rc) {
        close(fd);
        return rc;
    }
    a->marks[SM_MARK_HELLO] = sm_now_ns();
    send_hello(a);
    rc = sm_link_flush(a);
    if (rc)
        sm_source_close(&a->link);
    return rc;
}

/*
 * The stream broke. In a test that is the end. In a machine it is what a
 * restore looks like: what ran goes on running without its streams, and the
 * host is dialled again; a host that never answers has no use for us.
 */
void sm_link_lost(struct sm_agent *a)
{
    sm_source_close(&a->link);
    sm_buf_free(&a->in);
    sm_buf_free(&a->out);
    sm_buf_free(&a->request);
    a->request_type = 0;
    sm_chan_detach_all(a);
    if (!a->vm || a->end == SM_END_ACK)
        sm_power(a);
    memset(a->used, 0, sizeof(a->used));
    memset(a->succeeded, 0, sizeof(a->succeeded));
    a->generation++;
    for (int tries = 0, wait_ms = 1; tries < 400; tries++) {
        int fd, rc = sm_link_dial(a, &fd);
        if (rc == 0) {
            rc = sm_link_finish(fd, 2000);
            if (rc)
                close(fd);
            else if (sm_link_attach(a, fd) == 0)
                return;
        }
        poll(NULL, 0, wait_ms);
        wait_ms = wait_ms < 100 ? wait_ms * 2 : 100;
    }
    sm_log(a, "the host does not answer: power off");
    a->bye_reason = SM_BYE_FAILED;
    sm_root_leave(a);
    sm_power(a);
}
