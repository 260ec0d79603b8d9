/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One transfer of the fetcher: its copy of the request, its curl handle, its
 * sink. Used by fetch.c and transfer.c only. After creation everything belongs
 * to the fetcher thread but the atomics, and the list link, which fetch.c locks.
 */
#ifndef SM_IMAGE_TRANSFER_H
#define SM_IMAGE_TRANSFER_H

#include <curl/curl.h>

#include "fetch.h"

enum sm_transfer_state {
    SM_TRANSFER_WAITING, /* for its turn */
    SM_TRANSFER_HASHING, /* the prefix of a resumed file */
    SM_TRANSFER_ACTIVE,  /* in the multi handle */
};

struct sm_transfer {
    struct sm_transfer *next; /* live list, under the fetcher's mutex */
    uint64_t id;
    struct sm_fetch_spec spec; /* strings owned */
    enum sm_transfer_state state;
    CURL *easy;
    struct curl_slist *headers;
    struct sm_fetch_result *result;
    size_t headers_cap, body_cap, header_bytes;
    int fd;
    uint64_t at; /* bytes hashed and, in a file, written */
    uint64_t synced;
    struct sm_digest digest;
    bool body_begun;
    bool failed; /* result->error is ours, not curl's */
    bool discard; /* the file must go */
    char curl_error[CURL_ERROR_SIZE];
    _Atomic uint64_t now, total;
    atomic_bool cancel;
};

/* A copy of spec, ready to begin; NULL without memory. */
struct sm_transfer *sm_transfer_create(const struct sm_fetch_spec *spec);
/* Frees everything but the result. */
void sm_transfer_free(struct sm_transfer *t);

/* Opens the file and the handle. -errno with the result's error set. */
int sm_transfer_begin(struct sm_transfer *t, const char *user_agent);
/* Hashes a piece of the prefix; 1 when all of it is done, 0 for more. */
int sm_transfer_hash_step(struct sm_transfer *t);
/* Nothing is left to ask for: the prefix is the whole file. */
bool sm_transfer_is_whole(const struct sm_transfer *t);
/* Verifies and closes the sink; fills the result. */
void sm_transfer_end(struct sm_transfer *t, CURLcode code);
/* Ends it for a reason of ours. */
void sm_transfer_abort(struct sm_transfer *t, const char *why, bool transient);

#endif
