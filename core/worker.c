/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sm-worker: one VM in a process of its own, with no Lua in it.
 *
 *     parent ── frames ──▶ main thread ── sm_machine_call ──▶ VM, devices
 *            ◀─ replies, events ──┘  ◀── event fd ── vCPU and I/O threads
 *
 * A frame is a length (u32, little-endian) and a message. Requests are
 * [id, name, arguments]; replies [id, true, result] or [id, false, text,
 * errno, misuse], in the order of the requests; events [0, event]. An event is
 * taken from the VM only when everything before it has been sent, so a parent
 * that does not read holds up events where they are latched and counted.
 * A request may bring a descriptor (SCM_RIGHTS): the file of its `path`.
 *
 * The worker ends when its socket does: the parent may close it, exit or be
 * killed. It has left the parent's session, so a terminal's signals pass it
 * by. Before the guest runs it confines itself (confine.h); descriptors other
 * than its standard ones and the socket are closed at the start.
 *
 * Threads: everything here is the main thread's.
 */
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "cmd.h"
#include "confine.h"
#include "recv_fd.h"
#include "vm.h"

#define LENGTH_BYTES 4
#define KEEP_BYTES (64u << 10)        /* a larger buffer is given back at once */
#define BACKLOG_BYTES (1u << 20)      /* unsent replies that stop reading */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define THREAD_STACK_BYTES (8u << 20) /* a sanitizer's own data lies there too */
#else
#define THREAD_STACK_BYTES (256u << 10)
#endif
#define GRACE_SECONDS 10              /* to end in order, once the socket has */

struct worker {
    struct sm_machine *machine;
    int fd;
    uint8_t *in; /* the frame being read */
    size_t in_len, in_cap;
    struct sm_msg_writer out; /* frames to be sent */
    size_t sent;              /* of out */
    bool confined;
};

/* ---- sending ---- */

/* Room for a length in front of a message; returns where it is. */
static size_t frame_begin(struct sm_msg_writer *out)
{
    size_t at = out->len;
    sm_msg_put_raw(out, "\0\0\0", LENGTH_BYTES);
    return at;
}

static void frame_end(struct sm_msg_writer *out, size_t at)
{
    uint32_t len = (uint32_t)(out->len - at - LENGTH_BYTES);
    for (unsigned i = 0; i < LENGTH_BYTES && !out->error; i++) {
        out->buf[at + i] = (uint8_t)(len >> (8 * i));
    }
}

/* 0: all is sent or the socket is full; -errno: it is gone. */
static int flush_out(struct worker *w)
{
    while (w->sent < w->out.len) {
        ssize_t n = send(w->fd, w->out.buf + w->sent, w->out.len - w->sent,
                         MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0) {
            return errno == EAGAIN || errno == EINTR ? 0 : -errno;
        }
        w->sent += (size_t)n;
    }
    w->sent = 0;
    if (w->out.cap > KEEP_BYTES) {
        sm_msg_writer_free(&w->out);
    }
    sm_msg_writer_rewind(&w->out, 0);
    return 0;
}

static bool unsent(const struct worker *w)
{
    return w->sent < w->out.len;
}

static int send_events(struct worker *w)
{
    while (!unsent(w)) {
        size_t at = frame_begin(&w->out);
        sm_msg_put_array(&w->out, 2);
        sm_msg_put_int(&w->out, 0);
        int some = sm_machine_next_event(w->machine, &w->out);
        if (some <= 0) {
            sm_msg_writer_rewind(&w->out, at);
            return some;
        }
        frame_end(&w->out, at);
        int err = flush_out(w);
        if (err < 0) {
            return err;
        }
    }
    return 0;
}

/* ---- requests ---- */

/* A guest is about to run for the first time. */
static int prepare_start(struct worker *w, struct sm_cmd_error *err)
{
    struct sm_vm *vm = sm_machine_vm(w->machine);
    struct sm_vm_status status;
    if (!vm || w->confined) {
        return 0; /* the command itself says what is wrong */
    }
    sm_vm_state(vm, &status);
    if (status.state != SM_VM_CREATED) {
        return 0;
    }
    struct sm_confinement done;
    int code = sm_confine(&done);
    if (code < 0) {
        *err = (struct sm_cmd_error){ .code = code };
        snprintf(err->text, sizeof(err->text), "vm.start: cannot confine the worker: %s",
                 strerror(-code));
        return code;
    }
    w->confined = true;
    sm_machine_set_confinement(w->machine, &done);
    return 0;
}

static void put_failure(struct sm_msg_writer *out, int64_t id, const struct sm_cmd_error *err)
{
    sm_msg_put_array(out, 5);
    sm_msg_put_int(out, id);
    sm_msg_put_bool(out, false);
    sm_msg_put_str(out, err->text);
    sm_msg_put_int(out, -err->code);
    sm_msg_put_bool(out, err->misuse);
}

static int serve(struct worker *w, int64_t id, const struct sm_msg_value *name,
                 const void *args, size_t args_len)
{
    struct sm_cmd_error err;
    struct sm_msg_writer *out = &w->out;
    size_t at = frame_begin(out), head = out->len;
    int code = sm_msg_is(name, "vm.start") ? prepare_start(w, &err) : 0;
    if (!code) {
        sm_msg_put_array(out, 3);
        sm_msg_put_int(out, id);
        sm_msg_put_bool(out, true);
        code = sm_machine_call(w->machine, name->u.bytes.p, name->u.bytes.len, args,
                               args_len, out, &err);
    }
    if (code) {
        sm_msg_writer_rewind(out, head);
        put_failure(out, id, &err);
    }
    frame_end(out, at);
    return out->error;
}

/* One request frame. -EBADMSG: the parent talks nonsense. */
static int handle(struct worker *w, const uint8_t *msg, size_t len)
{
    struct sm_msg_reader r;
    struct sm_msg_value head, id, name;
    sm_msg_reader_init(&r, msg, len);
    if (sm_msg_check(msg, len) < 0 || sm_msg_next(&r, &head) < 0 ||
        head.type != SM_MSG_ARRAY || head.u.count != 3 || sm_msg_next(&r, &id) < 0 ||
        id.type != SM_MSG_INT || sm_msg_next(&r, &name) < 0 || name.type != SM_MSG_BYTES) {
        return -EBADMSG;
    }
    return serve(w, id.u.i, &name, msg + r.pos, len - r.pos);
}

/* ---- receiving ---- */

static size_t frame_length(const struct worker *w)
{
    size_t len = 0;
    for (unsigned i = 0; i < LENGTH_BYTES; i++) {
        len |= (size_t)w->in[i] << (8 * i);
    }
    return len;
}

static int grow_in(struct worker *w, size_t cap)
{
    if (cap <= w->in_cap) {
        return 0;
    }
    uint8_t *in = realloc(w->in, cap);
    if (!in) {
        return -ENOMEM;
    }
    w->in = in;
    w->in_cap = cap;
    return 0;
}

/* A descriptor belongs to the frame whose bytes it came with. A second one replaces the
 * first. */
static ssize_t receive_some(struct worker *w, void *buf, size_t len)
{
    int fd;
    ssize_t n = sm_recv_fd(w->fd, buf, len, &fd);

    if (fd >= 0) {
        sm_machine_pass_fd(w->machine, fd);
    }
    return n;
}

/* Read what completes the current length or frame, no byte beyond it. */
static int receive(struct worker *w)
{
    size_t want = LENGTH_BYTES;
    if (w->in_len >= LENGTH_BYTES) {
        size_t len = frame_length(w);
        if (len > SM_CMD_MAX_MESSAGE_BYTES) {
            return -EMSGSIZE;
        }
        want += len;
    }
    int err = grow_in(w, want < 512 ? 512 : want);
    if (err < 0) {
        return err;
    }
    ssize_t n = receive_some(w, w->in + w->in_len, want - w->in_len);
    if (n == 0) {
        return -EPIPE;
    }
    if (n < 0) {
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    }
    w->in_len += (size_t)n;
    if (w->in_len < LENGTH_BYTES || w->in_len < LENGTH_BYTES + frame_length(w)) {
        return 0;
    }
    err = handle(w, w->in + LENGTH_BYTES, w->in_len - LENGTH_BYTES);
    w->in_len = 0;
    if (w->in_cap > KEEP_BYTES) {
        free(w->in);
        w->in = NULL;
        w->in_cap = 0;
    }
    return err;
}

/* ---- the loop ---- */

static int turn(struct worker *w)
{
    bool full = w->out.len - w->sent > BACKLOG_BYTES;
    struct pollfd fds[2] = {
        { .fd = w->fd, .events = (short)((full ? 0 : POLLIN) | (unsent(w) ? POLLOUT : 0)) },
        { .fd = unsent(w) ? -1 : sm_machine_event_fd(w->machine), .events = POLLIN },
    };
    if (poll(fds, 2, -1) < 0) {
        return errno == EINTR ? 0 : -errno;
    }
    int err = 0;
    if (fds[0].revents & POLLIN) {
        err = receive(w);
    } else if (fds[0].revents & (POLLHUP | POLLERR | POLLNVAL)) {
        err = -EPIPE;
    }
    if (!err && unsent(w)) {
        err = flush_out(w);
    }
    if (!err && fds[1].revents & POLLIN) {
        err = send_events(w);
    }
    return err;
}

static int run(int fd)
{
    struct worker w = { .fd = fd };
    sm_msg_writer_init(&w.out, BACKLOG_BYTES + 2 * SM_CMD_MAX_MESSAGE_BYTES);
    int err = sm_machine_create(&w.machine);
    while (!err) {
        err = turn(&w);
    }
    /* Whatever cannot end in time is ended. */
    alarm(GRACE_SECONDS);
    sm_machine_destroy(w.machine);
    sm_msg_writer_free(&w.out);
    free(w.in);
    return err == -EPIPE || err == -ECONNRESET ? 0 : err;
}

/* ---- the process ---- */

static void be_small(void)
{
    pthread_attr_t attr;
    mallopt(M_ARENA_MAX, 1);
    mallopt(M_MMAP_THRESHOLD, (int)KEEP_BYTES);
    mallopt(M_TRIM_THRESHOLD, (int)(2 * KEEP_BYTES));
    if (pthread_attr_init(&attr) == 0) {
        pthread_attr_setstacksize(&attr, THREAD_STACK_BYTES);
        pthread_setattr_default_np(&attr);
        pthread_attr_destroy(&attr);
    }
}

static void be_alone(int fd, const char *name)
{
    char title[16];
    snprintf(title, sizeof(title), "sm-worker %s", name);
    prctl(PR_SET_NAME, title);
    setsid();
    signal(SIGPIPE, SIG_IGN);
    if (fd > 3) {
        close_range(3, (unsigned)fd - 1, 0);
    }
    close_range((unsigned)fd + 1, ~0u, 0);
}

static int usage(void)
{
    fputs("usage: sm-worker [--fd N] [NAME]\n"
          "Started by sm with a socket on descriptor N (3); not by hand.\n", stderr);
    return 2;
}

int main(int argc, char **argv)
{
    int fd = 3, arg = 1;
    if (arg + 1 < argc && strcmp(argv[arg], "--fd") == 0) {
        char *end;
        long n = strtol(argv[arg + 1], &end, 10);
        if (*end || n < 3 || n > 1 << 20) {
            return usage();
        }
        fd = (int)n;
        arg += 2;
    }
    int type;
    socklen_t len = sizeof(type);
    if (argc - arg > 1 || getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) < 0 ||
        type != SOCK_STREAM || fcntl(fd, F_SETFD, FD_CLOEXEC) < 0) {
        return usage();
    }
    be_alone(fd, arg < argc ? argv[arg] : "vm");
    be_small();
    int err = run(fd);
    if (err < 0) {
        fprintf(stderr, "sm-worker: %s\n", strerror(-err));
        return 1;
    }
    return 0;
}
