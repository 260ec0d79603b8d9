/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sm-worker: one VM in a process of its own, with no Lua in it.
 *
 *     parent ── frames ──▶ main thread ── sm_machine_call ──▶ VM, devices
 *            ◀─ replies, events ──┘  ◀── event fd ── vCPU and I/O threads
 *
 * Frames are those of msg_socket.h. Replies are [id, true, result] or [id,
 * false, text, errno, misuse], in the order of the requests. An event is
 * taken from the VM only when everything before it has been sent, so a parent
 * that does not read holds up events where they are latched and counted.
 * A descriptor that comes with a request is the file of its `path`.
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
#include "msg_socket.h"
#include "vm.h"

#define KEEP_BYTES (64u << 10)        /* of free memory, more is given back */
#define BACKLOG_BYTES (1u << 20)      /* unsent replies that stop reading */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define THREAD_STACK_BYTES (8u << 20) /* a sanitizer's own data lies there too */
#else
#define THREAD_STACK_BYTES (256u << 10)
#endif
#define GRACE_SECONDS 10              /* to end in order, once the socket has */

struct worker {
    struct sm_machine *machine;
    struct sm_msg_socket sock;
    bool confined;
};

static int send_events(struct worker *w)
{
    struct sm_msg_writer *out = &w->sock.out;
    while (!sm_msg_socket_unsent(&w->sock)) {
        size_t at = sm_msg_socket_begin(&w->sock);
        sm_msg_put_array(out, 2);
        sm_msg_put_int(out, 0);
        int some = sm_machine_next_event(w->machine, out);
        if (some <= 0) {
            sm_msg_writer_rewind(out, at);
            return some;
        }
        sm_msg_socket_end(&w->sock, at);
        int err = sm_msg_socket_flush(&w->sock);
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

static int serve(void *arg, const struct sm_msg_request *r)
{
    struct worker *w = arg;
    struct sm_cmd_error err;
    struct sm_msg_writer *out = &w->sock.out;
    size_t at = sm_msg_socket_begin(&w->sock), head = out->len;
    if (w->sock.passed_fd >= 0) {
        sm_machine_pass_fd(w->machine, w->sock.passed_fd);
        w->sock.passed_fd = -1;
    }
    int code = sm_msg_is(&r->name, "vm.start") ? prepare_start(w, &err) : 0;
    if (!code) {
        sm_msg_put_array(out, 3);
        sm_msg_put_int(out, r->id);
        sm_msg_put_bool(out, true);
        code = sm_machine_call(w->machine, r->name.u.bytes.p, r->name.u.bytes.len, r->args,
                               r->args_len, out, &err);
    }
    if (code) {
        sm_msg_writer_rewind(out, head);
        put_failure(out, r->id, &err);
    }
    sm_msg_socket_end(&w->sock, at);
    return out->error;
}

/* ---- the loop ---- */

static int turn(struct worker *w)
{
    struct sm_msg_socket *s = &w->sock;
    bool unsent = sm_msg_socket_unsent(s), full = s->out.len - s->sent > BACKLOG_BYTES;
    struct pollfd fds[2] = {
        { .fd = s->fd, .events = (short)((full ? 0 : POLLIN) | (unsent ? POLLOUT : 0)) },
        { .fd = unsent ? -1 : sm_machine_event_fd(w->machine), .events = POLLIN },
    };
    if (poll(fds, 2, -1) < 0) {
        return errno == EINTR ? 0 : -errno;
    }
    int err = 0;
    if (fds[0].revents & POLLIN) {
        err = sm_msg_socket_receive(s, serve, w);
    } else if (fds[0].revents & (POLLHUP | POLLERR | POLLNVAL)) {
        err = -EPIPE;
    }
    if (!err && sm_msg_socket_unsent(s)) {
        err = sm_msg_socket_flush(s);
    }
    if (!err && fds[1].revents & POLLIN) {
        err = send_events(w);
    }
    return err;
}

static int run(int fd)
{
    struct worker w = { 0 };
    sm_msg_socket_init(&w.sock, fd, SM_CMD_MAX_MESSAGE_BYTES,
                       BACKLOG_BYTES + 2 * SM_CMD_MAX_MESSAGE_BYTES);
    int err = sm_machine_create(&w.machine);
    while (!err) {
        err = turn(&w);
    }
    /* Whatever cannot end in time is ended. */
    alarm(GRACE_SECONDS);
    sm_machine_destroy(w.machine);
    sm_msg_socket_free(&w.sock);
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
