/* SPDX-License-Identifier: Apache-2.0 */
/* The forwarder; see resolver.h. */
#include "resolver.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#define TRY_NS 2500000000ull
#define TRIES 3
#define ANSWER_BYTES 65535

void sm_resolver_init(struct sm_resolver *r, void (*answer)(const struct sm_resolver_answer *, void *),
                      void *arg)
{
    memset(r, 0, sizeof(*r));
    r->answer = answer;
    r->arg = arg;
    for (unsigned i = 0; i < SM_RESOLVER_QUESTIONS; i++)
        r->questions[i].fd = -1;
}

int sm_resolver_add_server(struct sm_resolver *r, const char *text)
{
    struct sockaddr_storage *s;
    struct sm_addr a;
    char host[64];
    unsigned port = 53;
    int end = 0;

    if (r->server_count == SM_RESOLVER_SERVERS)
        return -ENOSPC;
    s = &r->servers[r->server_count];
    if (strlen(text) >= sizeof(host))
        return -EINVAL;
    strcpy(host, text);
    if (!sm_addr_parse(host, &a)) {
        if ((sscanf(text, "[%45[0-9a-fA-F:.]]:%5u%n", host, &port, &end) != 2 &&
             sscanf(text, "%15[0-9.]:%5u%n", host, &port, &end) != 2) ||
            text[end] || !port || port > 65535 || !sm_addr_parse(host, &a))
            return -EINVAL;
    }
    memset(s, 0, sizeof(*s));
    if (a.family == 4) {
        struct sockaddr_in *in = (struct sockaddr_in *)s;

        in->sin_family = AF_INET;
        in->sin_port = htons((uint16_t)port);
        memcpy(&in->sin_addr, a.b, 4);
    } else {
        struct sockaddr_in6 *in = (struct sockaddr_in6 *)s;

        in->sin6_family = AF_INET6;
        in->sin6_port = htons((uint16_t)port);
        memcpy(&in->sin6_addr, a.b, 16);
    }
    r->server_count++;
    return 0;
}

static void finish(struct sm_resolver_question *q)
{
    if (q->fd >= 0)
        close(q->fd);
    free(q->frame);
    q->frame = NULL;
    q->fd = -1;
}

static void deliver(struct sm_resolver *r, struct sm_resolver_question *q, const uint8_t *msg,
                    size_t len)
{
    struct sm_resolver_answer a = {
        .msg = msg, .len = len, .question = &q->question, .frame = q->frame, .frame_len = q->frame_len,
    };

    r->answer(&a, r->arg);
    finish(q);
}

static void give_up(struct sm_resolver *r, struct sm_resolver_question *q)
{
    uint8_t msg[SM_RESOLVER_BYTES];
    size_t len = q->frame_len - q->msg_at;

    memcpy(msg, q->frame + q->msg_at, len);
    deliver(r, q, msg, sm_dns_empty(msg, &q->question, SM_DNS_SERVFAIL));
}

/* Send it to the next server; false when there is none left. */
static bool try_next(struct sm_resolver *r, struct sm_resolver_question *q, uint64_t now)
{
    uint8_t msg[SM_RESOLVER_BYTES];
    size_t len = q->frame_len - q->msg_at;

    while (q->tries < TRIES && r->server_count) {
        const struct sockaddr_storage *s = &r->servers[q->tries++ % r->server_count];

        if (q->fd >= 0)
            close(q->fd);
        q->fd = socket(s->ss_family, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (q->fd < 0 || getrandom(&q->id, sizeof(q->id), 0) != sizeof(q->id))
            return false;
        memcpy(msg, q->frame + q->msg_at, len);
        sm_set_be16(msg, q->id);
        q->deadline_ns = now + TRY_NS;
        if (connect(q->fd, (const struct sockaddr *)s,
                    s->ss_family == AF_INET ? sizeof(struct sockaddr_in)
                                            : sizeof(struct sockaddr_in6)) == 0 &&
            send(q->fd, msg, len, MSG_NOSIGNAL) == (ssize_t)len)
            return true;
    }
    return false;
}

void sm_resolver_ask(struct sm_resolver *r, const uint8_t *frame, size_t frame_len, size_t msg_at,
                     const struct sm_dns_question *question, uint64_t now_ns)
{
    struct sm_resolver_question *q = NULL;

    if (frame_len - msg_at > SM_RESOLVER_BYTES)
        return;
    for (unsigned i = 0; i < SM_RESOLVER_QUESTIONS && !q; i++)
        if (!r->questions[i].frame)
            q = &r->questions[i];
    if (!q)
        return; /* it asks again */
    q->frame = malloc(frame_len);
    if (!q->frame)
        return;
    memcpy(q->frame, frame, frame_len);
    q->frame_len = frame_len;
    q->msg_at = msg_at;
    q->question = *question;
    q->tries = 0;
    q->poll_index = -1;
    if (!try_next(r, q, now_ns))
        give_up(r, q);
}

void sm_resolver_fill(struct sm_resolver *r, struct sm_poll *poll)
{
    for (unsigned i = 0; i < SM_RESOLVER_QUESTIONS; i++) {
        struct sm_resolver_question *q = &r->questions[i];

        q->poll_index = -1;
        if (q->frame) {
            q->poll_index = sm_poll_add(poll, q->fd, POLLIN);
            sm_poll_at(poll, q->deadline_ns);
        }
    }
}

static void receive(struct sm_resolver *r, struct sm_resolver_question *q, uint64_t now)
{
    uint8_t msg[ANSWER_BYTES];
    ssize_t n = recv(q->fd, msg, sizeof(msg), 0);

    if (n < 0) { /* such as refused: there is nobody */
        if (errno != EAGAIN && errno != EINTR && !try_next(r, q, now))
            give_up(r, q);
        return;
    }
    if (n < SM_DNS_HEADER || sm_be16(msg) != q->id ||
        sm_dns_response(msg, (size_t)n, q->frame + q->msg_at, q->frame_len - q->msg_at, &q->question))
        return; /* not the answer; go on waiting */
    sm_set_be16(msg, q->question.id);
    deliver(r, q, msg, (size_t)n);
}

void sm_resolver_serve(struct sm_resolver *r, struct sm_poll *poll, uint64_t now_ns)
{
    for (unsigned i = 0; i < SM_RESOLVER_QUESTIONS; i++) {
        struct sm_resolver_question *q = &r->questions[i];

        if (q->frame && sm_poll_got(poll, q->poll_index))
            receive(r, q, now_ns);
        else if (q->frame && now_ns >= q->deadline_ns && !try_next(r, q, now_ns))
            give_up(r, q);
    }
}

void sm_resolver_close(struct sm_resolver *r)
{
    for (unsigned i = 0; i < SM_RESOLVER_QUESTIONS; i++)
        finish(&r->questions[i]);
}
