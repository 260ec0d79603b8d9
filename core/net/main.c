/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sm-net: the network of a VM, or a switch of several, in a process of its own.
 *
 *   parent ── requests ──▶ sm-net ── sockets, tap, unix ──▶ world
 *          ◀─ replies, events ─┤
 *   worker ═══ frames ═════════╛        (unix stream, one per card)
 *
 * Why a process. The worker is libc and pthread, and has no network at all; a
 * TCP/IP stack with a history of memory bugs belongs no closer to guest memory
 * than behind a socket, and the policy belongs where a guest that has taken
 * its worker over does not reach it. The price is one copy and two system
 * calls a frame, and frames are 64 KiB: `make bench` has the figures.
 *
 * A frame of the control socket is a length (u32, little-endian) and a message
 * (core/msg.h): [id, name, arguments] → [id, true, result] or [id, false,
 * text, errno]; events are [0, event]. Everything that needs a file or a
 * privilege is opened by requests before `net.confine`, and cards plugged in
 * after it can only be those of a switch. The process ends when the control
 * socket does.
 *
 * Threads: one; libslirp keeps globals, and so has one caller.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backends.h"
#include "confine.h"
#include "control.h"
#include "recv_fd.h"

#define LENGTH_BYTES 4
#define REQUEST_BYTES (1u << 20)
#define OUT_BYTES (4u << 20)
#define EVENTS_BYTES (256u << 10) /* a parent that does not read loses events */
#define ROUND_NS 600000000000ull

struct process {
    struct sm_control control;
    int fd, index;
    uint8_t *in;
    size_t in_len, sent;
};

/* ---- sending ---- */

static size_t frame_begin(struct sm_msg_writer *out)
{
    size_t at = out->len;

    sm_msg_put_raw(out, "\0\0\0", LENGTH_BYTES);
    return at;
}

static void frame_end(struct sm_msg_writer *out, size_t at)
{
    uint32_t len = (uint32_t)(out->len - at - LENGTH_BYTES);

    for (unsigned i = 0; i < LENGTH_BYTES && !out->error; i++)
        out->buf[at + i] = (uint8_t)(len >> (8 * i));
}

static int flush_out(struct process *p)
{
    struct sm_msg_writer *out = &p->control.out;

    while (p->sent < out->len) {
        ssize_t n = send(p->fd, out->buf + p->sent, out->len - p->sent, MSG_NOSIGNAL | MSG_DONTWAIT);

        if (n < 0)
            return errno == EAGAIN || errno == EINTR ? 0 : -errno;
        p->sent += (size_t)n;
    }
    p->sent = 0;
    sm_msg_writer_rewind(out, 0);
    return 0;
}

static void put_event(struct sm_nic *nic, const struct sm_nic_event *e, void *arg)
{
    struct sm_control *c = arg;
    struct sm_msg_writer *out = &c->out;
    size_t at;

    if (out->len > EVENTS_BYTES) {
        c->events_lost++;
        return;
    }
    at = frame_begin(out);
    sm_msg_put_array(out, 2);
    sm_msg_put_int(out, 0);
    sm_control_event(c, nic, e);
    frame_end(out, at);
}

/* ---- requests ---- */

static int serve(struct process *p, const uint8_t *msg, size_t len)
{
    struct sm_msg_writer *out = &p->control.out;
    struct sm_msg_reader r;
    struct sm_msg_value head, id, name;
    struct sm_msg_writer *result = &p->control.result;
    size_t at;
    int err;

    sm_msg_reader_init(&r, msg, len);
    if (sm_msg_check(msg, len) < 0 || sm_msg_next(&r, &head) < 0 || head.type != SM_MSG_ARRAY ||
        head.u.count != 3 || sm_msg_next(&r, &id) < 0 || id.type != SM_MSG_INT ||
        sm_msg_next(&r, &name) < 0 || name.type != SM_MSG_BYTES)
        return -EBADMSG;
    sm_msg_writer_rewind(result, 0);
    err = sm_control_request(&p->control, &name, &r);
    at = frame_begin(out);
    sm_msg_put_array(out, err ? 4 : 3);
    sm_msg_put_int(out, id.u.i);
    sm_msg_put_bool(out, !err);
    if (err) {
        sm_msg_put_str(out, p->control.err);
        sm_msg_put_int(out, -err);
    } else {
        sm_msg_put_raw(out, result->buf, result->len);
    }
    frame_end(out, at);
    return out->error;
}

/* A descriptor comes with the request whose first byte it came with; the parent sends
 * nothing else before that is answered. */
static int receive(struct process *p)
{
    int fd;
    ssize_t n = sm_recv_fd(p->fd, p->in + p->in_len, REQUEST_BYTES - p->in_len, &fd);
    size_t at = 0;

    if (n == 0)
        return -EPIPE;
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    if (fd >= 0) {
        if (p->control.passed_fd >= 0)
            close(p->control.passed_fd);
        p->control.passed_fd = fd;
    }
    p->in_len += (size_t)n;
    while (p->in_len - at >= LENGTH_BYTES) {
        const uint8_t *f = p->in + at;
        size_t len = (size_t)f[0] | (size_t)f[1] << 8 | (size_t)f[2] << 16 | (size_t)f[3] << 24;
        int err;

        if (len > REQUEST_BYTES - LENGTH_BYTES)
            return -EMSGSIZE;
        if (p->in_len - at < LENGTH_BYTES + len)
            break;
        err = serve(p, f + LENGTH_BYTES, len);
        if (err)
            return err;
        at += LENGTH_BYTES + len;
    }
    memmove(p->in, p->in + at, p->in_len - at);
    p->in_len -= at;
    return 0;
}

/* ---- the loop ---- */

static int round_(struct process *p, struct sm_poll *poll_)
{
    struct sm_control *c = &p->control;
    uint64_t now = sm_io_now_ns(), wait;
    int err = 0;

    poll_->count = 0;
    poll_->now_ns = now;
    poll_->deadline_ns = now + ROUND_NS;
    for (unsigned i = 0; i < SM_CONTROL_NICS; i++)
        if (c->nics[i])
            sm_nic_fill(c->nics[i], poll_);
    p->index = sm_poll_add(poll_, p->fd, (short)(POLLIN | (c->out.len ? POLLOUT : 0)));
    now = sm_io_now_ns();
    wait = poll_->deadline_ns > now ? (poll_->deadline_ns - now + 999999) / 1000000 : 0;
    if (poll(poll_->fds, poll_->count, (int)wait) < 0 && errno != EINTR)
        return -errno;
    poll_->now_ns = sm_io_now_ns();
    for (unsigned i = 0; i < SM_CONTROL_NICS; i++)
        if (c->nics[i])
            sm_nic_serve(c->nics[i], poll_);
    if (sm_poll_got(poll_, p->index) & (POLLIN | POLLHUP | POLLERR))
        err = receive(p);
    return err ? err : flush_out(p);
}

static int run(int fd)
{
    struct process p = { .fd = fd, .in = malloc(REQUEST_BYTES), .control.passed_fd = -1 };
    struct sm_poll poll_ = { 0 };
    int err = p.in ? 0 : -ENOMEM;

    sm_msg_writer_init(&p.control.out, OUT_BYTES);
    sm_msg_writer_init(&p.control.result, OUT_BYTES / 2);
    p.control.event = put_event;
    while (!err)
        err = round_(&p, &poll_);
    sm_control_close(&p.control);
    sm_msg_writer_free(&p.control.out);
    sm_msg_writer_free(&p.control.result);
    free(poll_.fds);
    free(p.in);
    return err == -EPIPE || err == -ECONNRESET ? 0 : err;
}

int main(int argc, char **argv)
{
    int type, err;
    socklen_t len = sizeof(type);
    char title[16];

    if (argc > 2 || getsockopt(3, SOL_SOCKET, SO_TYPE, &type, &len) < 0 || type != SOCK_STREAM) {
        fputs("usage: sm-net [NAME]\n"
              "Started by sm with a socket on descriptor 3; not by hand.\n", stderr);
        return 2;
    }
    snprintf(title, sizeof(title), "sm-net %s", argc > 1 ? argv[1] : "vm");
    prctl(PR_SET_NAME, title);
    setsid();
    umask(077); /* sockets and captures are the user's own */
    signal(SIGPIPE, SIG_IGN);
    fcntl(3, F_SETFD, FD_CLOEXEC);
    close_range(4, ~0u, 0);
    err = run(3);
    if (err < 0) {
        fprintf(stderr, "sm-net: %s\n", strerror(-err));
        return 1;
    }
    return 0;
}
