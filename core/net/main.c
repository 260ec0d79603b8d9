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
 * The control socket's frames are those of core/msg_socket.h; a reply is [id, true,
 * result] or [id, false, text, errno]. Everything that needs a file or a
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
#include "msg_socket.h"

#define REQUEST_BYTES (1u << 20)
#define OUT_BYTES (4u << 20)
#define EVENTS_BYTES (256u << 10) /* a parent that does not read loses events */
#define ROUND_NS 600000000000ull

struct process {
    struct sm_control control;
    struct sm_msg_socket sock;
    int index; /* of the socket among those polled */
};

/* ---- events ---- */

static void put_event(struct sm_nic *nic, const struct sm_nic_event *e, void *arg)
{
    struct process *p = arg;
    struct sm_msg_writer *out = &p->sock.out;
    size_t at;

    if (out->len > EVENTS_BYTES) {
        p->control.events_lost++;
        return;
    }
    at = sm_msg_socket_begin(&p->sock);
    sm_msg_put_array(out, 2);
    sm_msg_put_int(out, 0);
    sm_control_event(&p->control, nic, e, out);
    sm_msg_socket_end(&p->sock, at);
}

/* ---- requests ---- */

static int serve(void *arg, const struct sm_msg_request *r)
{
    struct process *p = arg;
    struct sm_msg_writer *out = &p->sock.out, *result = &p->control.result;
    struct sm_msg_reader args;
    size_t at;
    int err;

    sm_msg_reader_init(&args, r->args, r->args_len);
    sm_msg_writer_rewind(result, 0);
    p->control.passed_fd = p->sock.passed_fd;
    p->sock.passed_fd = -1;
    err = sm_control_request(&p->control, &r->name, &args);
    if (p->control.passed_fd >= 0)
        close(p->control.passed_fd); /* nobody wanted it */
    at = sm_msg_socket_begin(&p->sock);
    sm_msg_put_array(out, err ? 4 : 3);
    sm_msg_put_int(out, r->id);
    sm_msg_put_bool(out, !err);
    if (err) {
        sm_msg_put_str(out, p->control.err);
        sm_msg_put_int(out, -err);
    } else {
        sm_msg_put_raw(out, result->buf, result->len);
    }
    sm_msg_socket_end(&p->sock, at);
    return out->error;
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
    p->index = sm_poll_add(poll_, p->sock.fd,
                           (short)(POLLIN | (sm_msg_socket_unsent(&p->sock) ? POLLOUT : 0)));
    now = sm_io_now_ns();
    wait = poll_->deadline_ns > now ? (poll_->deadline_ns - now + 999999) / 1000000 : 0;
    if (poll(poll_->fds, poll_->count, (int)wait) < 0 && errno != EINTR)
        return -errno;
    poll_->now_ns = sm_io_now_ns();
    for (unsigned i = 0; i < SM_CONTROL_NICS; i++)
        if (c->nics[i])
            sm_nic_serve(c->nics[i], poll_);
    if (sm_poll_got(poll_, p->index) & (POLLIN | POLLHUP | POLLERR))
        err = sm_msg_socket_receive(&p->sock, serve, p);
    return err ? err : sm_msg_socket_flush(&p->sock);
}

static int run(int fd)
{
    struct process p = { .control.passed_fd = -1 };
    struct sm_poll poll_ = { 0 };
    int err = 0;

    sm_msg_socket_init(&p.sock, fd, REQUEST_BYTES, OUT_BYTES);
    sm_msg_writer_init(&p.control.result, OUT_BYTES / 2);
    p.control.event = put_event;
    p.control.event_arg = &p;
    while (!err)
        err = round_(&p, &poll_);
    sm_control_close(&p.control);
    sm_msg_socket_free(&p.sock);
    sm_msg_writer_free(&p.control.result);
    free(poll_.fds);
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
