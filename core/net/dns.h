/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DNS messages (RFC 1035), as far as a forwarder must look into them: the
 * question's name, the addresses of an answer. Both sides are hostile.
 */
#ifndef SM_NET_DNS_H
#define SM_NET_DNS_H

#include "packet.h"

#define SM_DNS_HEADER 12
#define SM_DNS_NAME 256

enum { SM_DNS_SERVFAIL = 2, SM_DNS_NXDOMAIN = 3, SM_DNS_REFUSED = 5 };

struct sm_dns_question {
    uint16_t id;
    char name[SM_DNS_NAME]; /* dotted, without the last dot; "." is "" */
    size_t end;             /* offset behind the question */
};

/* A query with one question. 0 or -EBADMSG. */
int sm_dns_query(const uint8_t *msg, size_t len, struct sm_dns_question *out);
/* A response to that question (id aside). -EBADMSG; -ENOENT: another's. */
int sm_dns_response(const uint8_t *msg, size_t len, const uint8_t *query, size_t query_len,
                    const struct sm_dns_question *q);
/*
 * Every address of the answer section; fn says whether to go on. -EBADMSG when
 * the records make no sense.
 */
int sm_dns_addresses(const uint8_t *msg, size_t len, size_t at,
                     bool (*fn)(const struct sm_addr *addr, uint32_t ttl_s, void *arg), void *arg);
/* An answer without records, over the query itself. Its length. */
size_t sm_dns_empty(uint8_t *query, const struct sm_dns_question *q, unsigned rcode);

#endif
