/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Our resolver: the guest's questions go to the host's servers, answers come
 * back through the policy, which learns from them.
 *
 * Each question has a socket of its own, so a random port beside the random
 * id. A server that does not answer in time is followed by the next.
 *
 * Threads: one.
 */
#ifndef SM_NET_RESOLVER_H
#define SM_NET_RESOLVER_H

#include <netinet/in.h>
#include <sys/socket.h>

#include "dns.h"
#include "round.h"

#define SM_RESOLVER_SERVERS 4
#define SM_RESOLVER_QUESTIONS 64
#define SM_RESOLVER_BYTES 4096 /* of a question */

struct sm_resolver_answer {
    const uint8_t *msg; /* with the guest's id */
    size_t len;
    const struct sm_dns_question *question;
    const uint8_t *frame; /* the guest's, as given to ask */
    size_t frame_len;
};

struct sm_resolver {
    struct sockaddr_storage servers[SM_RESOLVER_SERVERS];
    unsigned server_count;
    void (*answer)(const struct sm_resolver_answer *a, void *arg);
    void *arg;
    struct sm_resolver_question {
        int fd; /* -1: free */
        unsigned tries;
        uint16_t id;
        uint64_t deadline_ns;
        int poll_index;
        struct sm_dns_question question;
        uint8_t *frame; /* of the guest; the message is its tail */
        size_t frame_len, msg_at;
    } questions[SM_RESOLVER_QUESTIONS];
};

void sm_resolver_init(struct sm_resolver *r, void (*answer)(const struct sm_resolver_answer *, void *),
                      void *arg);
/* "1.2.3.4", "1.2.3.4:5353", "[::1]:53". -EINVAL, -ENOSPC. */
int sm_resolver_add_server(struct sm_resolver *r, const char *text);
/* The message is frame[msg_at …). Answers later, or at once when it cannot. */
void sm_resolver_ask(struct sm_resolver *r, const uint8_t *frame, size_t frame_len, size_t msg_at,
                     const struct sm_dns_question *q, uint64_t now_ns);
void sm_resolver_fill(struct sm_resolver *r, struct sm_poll *poll);
void sm_resolver_serve(struct sm_resolver *r, struct sm_poll *poll, uint64_t now_ns);
void sm_resolver_close(struct sm_resolver *r);

#endif
