/* SPDX-License-Identifier: Apache-2.0 */
/*
 * HTTP transfers on one thread around libcurl's multi interface.
 *
 *   owner's thread                    fetcher thread
 *   submit ── queue ── wakeup ──────▶ start · rehash a resumed prefix
 *   progress, cancel (atomics)        curl_multi_perform / _poll
 *   next ◀── results, wake fd ─────── verify · finish
 *
 * A request's body goes to memory (bounded) or, for status 200 and 206, to a
 * file, which is hashed as it is written. Any other status keeps its body in
 * memory and leaves the file alone. Only http and https, no redirects followed,
 * no cookies, no netrc, no credentials in URLs: where to go, with what header,
 * and whether to try again is the caller's policy.
 *
 * A file sink, with what the server answers to `Range: bytes=<offset>-`:
 *   206 with the right Content-Range   appended, the prefix having been hashed
 *   200                                started over from byte 0
 *   416                                an error; the file is removed
 * A body that is too long, or whole with the wrong digest, and a local write
 * error remove the file. A broken or stalled transfer keeps it for a resume.
 * The file has been synced when the result says it is whole.
 *
 * Every submitted request yields exactly one result, cancelled ones included.
 * Locks: one mutex over the queue, the list of live transfers and the results.
 */
#ifndef SM_IMAGE_FETCH_H
#define SM_IMAGE_FETCH_H

#include "digest.h"

#define SM_FETCH_QUEUE_MAX 4096u

struct sm_fetch_spec {
    const char *url;
    const char *method;         /* NULL: GET, or POST with a body */
    const char *const *headers; /* "Name: value", no line breaks */
    size_t n_headers;
    const void *body; /* NULL: none */
    size_t body_bytes;
    const char *cafile; /* authorities besides the system's, or NULL */
    const char *certfile, *keyfile; /* who we are (PEM), or NULL */
    bool insecure;      /* accept any certificate */
    uint64_t limit_bytes; /* of a body in memory, or of a file without size */
    const char *file;     /* NULL: memory */
    uint64_t offset;      /* bytes of the file to keep */
    bool has_size;
    uint64_t size; /* of the whole file */
    const char *digest; /* of the whole body, or NULL */
    uint32_t low_speed_bytes, low_speed_seconds; /* slower for so long: stalled */
    uint32_t connect_timeout_ms;
    uint32_t timeout_ms; /* 0: none */
};

struct sm_fetch_header {
    char *name, *value;
};

struct sm_fetch_result {
    struct sm_fetch_result *next;
    uint64_t id;
    long status; /* 0: no response */
    struct sm_fetch_header *headers; /* of the final response, in order */
    size_t n_headers;
    uint8_t *body;
    size_t body_bytes;
    uint64_t bytes; /* of the body in memory, or of the file as it now is */
    char digest[SM_DIGEST_TEXT]; /* "" when not known */
    struct sm_image_error error; /* "" when there is none */
    bool transient; /* trying again may help */
    bool to_file;   /* the body went to the file */
    int curl_code;
};

struct sm_fetcher;

int sm_fetcher_open(struct sm_fetcher **out, unsigned parallel, const char *user_agent,
                    struct sm_image_error *e);
/* Cancels everything, joins the thread, drops uncollected results. */
void sm_fetcher_close(struct sm_fetcher *f);

/* Copies spec. */
int sm_fetcher_submit(struct sm_fetcher *f, const struct sm_fetch_spec *spec, uint64_t *id,
                      struct sm_image_error *e);

/* The next result, or NULL; never waits. Freed with sm_fetch_result_free. */
struct sm_fetch_result *sm_fetcher_next(struct sm_fetcher *f);
void sm_fetch_result_free(struct sm_fetch_result *r);

/* Readable while there are results. */
int sm_fetcher_fd(const struct sm_fetcher *f);

/* False when the request is unknown or has ended. total 0: not known. */
bool sm_fetcher_progress(struct sm_fetcher *f, uint64_t id, uint64_t *now, uint64_t *total);
bool sm_fetcher_cancel(struct sm_fetcher *f, uint64_t id);
/* Submitted and without a collected result. */
size_t sm_fetcher_pending(struct sm_fetcher *f);

#endif
