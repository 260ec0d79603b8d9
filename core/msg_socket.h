/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Requests, replies and events over a unix socket: how sm talks to a worker and to
 * sm-net. This is their end of it.
 *
 * A frame is a length (u32, little-endian) and a message (msg.h): a request
 * [id, name, arguments], a reply to it, or an event [0, event]. A request may bring a
 * descriptor (unix(7), SCM_RIGHTS).
 *
 * Nothing here waits. What the socket does not take yet is kept in `out`, what has come
 * of a request is kept until the rest has; no byte beyond it is read, so that a
 * descriptor is known to be the one of the request it came with.
 *
 * Threads: the caller's one.
 */
#ifndef SM_MSG_SOCKET_H
#define SM_MSG_SOCKET_H

#include "msg.h"

struct sm_msg_socket {
    int fd;
    int passed_fd;            /* that came with a request; -1: none, or taken */
    struct sm_msg_writer out; /* frames to be sent */
    size_t sent;              /* of out */
    uint8_t *in;              /* the frame being read */
    size_t in_len, in_cap, in_max;
};

struct sm_msg_request {
    int64_t id;
    struct sm_msg_value name; /* bytes */
    const uint8_t *args;      /* one message */
    size_t args_len;
};

/* in_max: bytes of the longest request; out_max: of all that is not sent. The socket
 * stays the caller's. */
void sm_msg_socket_init(struct sm_msg_socket *s, int fd, size_t in_max, size_t out_max);
void sm_msg_socket_free(struct sm_msg_socket *s);

/* A frame in `out`, around what is put there between the two. */
size_t sm_msg_socket_begin(struct sm_msg_socket *s);
void sm_msg_socket_end(struct sm_msg_socket *s, size_t begun);

bool sm_msg_socket_unsent(const struct sm_msg_socket *s);
/* 0: all is sent or the socket is full; -errno: it is gone. */
int sm_msg_socket_flush(struct sm_msg_socket *s);

/* Reads what has come of a request, and has it served once it is whole; what it is
 * made of is gone after that. 0; -EPIPE: the other end hung up; -EBADMSG, -EMSGSIZE: it
 * talks nonsense; what `serve` returns. */
int sm_msg_socket_receive(struct sm_msg_socket *s,
                          int (*serve)(void *arg, const struct sm_msg_request *r), void *arg);

#endif
