/* SPDX-License-Identifier: Apache-2.0 */
/* See msg_socket.h. */
#include "msg_socket.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define LENGTH_BYTES 4
#define FIRST_BYTES 512
#define KEEP_BYTES (64u << 10) /* a larger buffer is given back at once */

void sm_msg_socket_init(struct sm_msg_socket *s, int fd, size_t in_max, size_t out_max)
{
    *s = (struct sm_msg_socket){ .fd = fd, .passed_fd = -1, .in_max = in_max };
    sm_msg_writer_init(&s->out, out_max);
}

void sm_msg_socket_free(struct sm_msg_socket *s)
{
    if (s->passed_fd >= 0)
        close(s->passed_fd);
    sm_msg_writer_free(&s->out);
    free(s->in);
}

/* ---- sending ---- */

size_t sm_msg_socket_begin(struct sm_msg_socket *s)
{
    size_t at = s->out.len;

    sm_msg_put_raw(&s->out, "\0\0\0", LENGTH_BYTES);
    return at;
}

void sm_msg_socket_end(struct sm_msg_socket *s, size_t begun)
{
    uint32_t len = (uint32_t)(s->out.len - begun - LENGTH_BYTES);

    for (unsigned i = 0; i < LENGTH_BYTES && !s->out.error; i++)
        s->out.buf[begun + i] = (uint8_t)(len >> (8 * i));
}

bool sm_msg_socket_unsent(const struct sm_msg_socket *s)
{
    return s->sent < s->out.len;
}

int sm_msg_socket_flush(struct sm_msg_socket *s)
{
    while (sm_msg_socket_unsent(s)) {
        ssize_t n = send(s->fd, s->out.buf + s->sent, s->out.len - s->sent,
                         MSG_DONTWAIT | MSG_NOSIGNAL);

        if (n < 0)
            return errno == EAGAIN || errno == EINTR ? 0 : -errno;
        s->sent += (size_t)n;
    }
    s->sent = 0;
    if (s->out.cap > KEEP_BYTES)
        sm_msg_writer_free(&s->out);
    sm_msg_writer_rewind(&s->out, 0);
    return 0;
}

/* ---- receiving ---- */

/* recv(2), and the descriptor that came along: the last one. */
static ssize_t receive_some(struct sm_msg_socket *s, void *buf, size_t len)
{
    union {
        struct cmsghdr head;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec iov = { buf, len };
    struct msghdr msg = {
        .msg_iov = &iov,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };
    ssize_t n = recvmsg(s->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&msg) : NULL;

    if (!c || c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
        return n;
    /* There is room for two where CMSG_SPACE aligns. */
    for (size_t at = 0; at + sizeof(int) <= c->cmsg_len - CMSG_LEN(0); at += sizeof(int)) {
        if (s->passed_fd >= 0)
            close(s->passed_fd);
        memcpy(&s->passed_fd, CMSG_DATA(c) + at, sizeof(int));
    }
    return n;
}

static size_t frame_length(const struct sm_msg_socket *s)
{
    size_t len = 0;

    for (unsigned i = 0; i < LENGTH_BYTES; i++)
        len |= (size_t)s->in[i] << (8 * i);
    return len;
}

static int grow_in(struct sm_msg_socket *s, size_t cap)
{
    uint8_t *in;

    if (cap <= s->in_cap)
        return 0;
    in = realloc(s->in, cap);
    if (!in)
        return -ENOMEM;
    s->in = in;
    s->in_cap = cap;
    return 0;
}

static int parse(const uint8_t *msg, size_t len, struct sm_msg_request *out)
{
    struct sm_msg_reader r;
    struct sm_msg_value head, id;

    sm_msg_reader_init(&r, msg, len);
    if (sm_msg_check(msg, len) < 0 || sm_msg_next(&r, &head) < 0 ||
        head.type != SM_MSG_ARRAY || head.u.count != 3 || sm_msg_next(&r, &id) < 0 ||
        id.type != SM_MSG_INT || sm_msg_next(&r, &out->name) < 0 ||
        out->name.type != SM_MSG_BYTES)
        return -EBADMSG;
    out->id = id.u.i;
    out->args = msg + r.pos;
    out->args_len = len - r.pos;
    return 0;
}

int sm_msg_socket_receive(struct sm_msg_socket *s,
                          int (*serve)(void *arg, const struct sm_msg_request *r), void *arg)
{
    struct sm_msg_request request;
    size_t want = LENGTH_BYTES;
    ssize_t n;
    int err;

    if (s->in_len >= LENGTH_BYTES) {
        want += frame_length(s);
        if (want - LENGTH_BYTES > s->in_max)
            return -EMSGSIZE;
    }
    err = grow_in(s, want < FIRST_BYTES ? FIRST_BYTES : want);
    if (err < 0)
        return err;
    n = receive_some(s, s->in + s->in_len, want - s->in_len);
    if (n == 0)
        return -EPIPE;
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    s->in_len += (size_t)n;
    if (s->in_len < LENGTH_BYTES || s->in_len < LENGTH_BYTES + frame_length(s))
        return 0;
    err = parse(s->in + LENGTH_BYTES, s->in_len - LENGTH_BYTES, &request);
    if (!err)
        err = serve(arg, &request);
    s->in_len = 0;
    if (s->in_cap > KEEP_BYTES) {
        free(s->in);
        s->in = NULL;
        s->in_cap = 0;
    }
    return err;
}
