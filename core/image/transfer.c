/* SPDX-License-Identifier: Apache-2.0 */
/* One HTTP transfer and its sink; see fetch.h for the rules, transfer.h. */
#include "transfer.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#define HEADERS_MAX 512u
#define HEADER_BYTES_MAX (256u << 10)
#define REFUSAL_BYTES_MAX (1u << 20) /* body of a status other than 200, 206 */
#define HASH_STEP_BYTES (8u << 20)
#define WRITEBACK_BYTES (16u << 20)

static char *copy(const char *s, bool *ok)
{
    char *c = s ? strdup(s) : NULL;

    if (s && !c)
        *ok = false;
    return c;
}

struct sm_transfer *sm_transfer_create(const struct sm_fetch_spec *spec)
{
    struct sm_transfer *t = calloc(1, sizeof(*t));
    char **headers;
    void *body;
    bool ok = true;

    if (!t)
        return NULL;
    t->fd = -1;
    t->spec = *spec;
    t->spec.url = copy(spec->url, &ok);
    t->spec.method = copy(spec->method, &ok);
    t->spec.cafile = copy(spec->cafile, &ok);
    t->spec.certfile = copy(spec->certfile, &ok);
    t->spec.keyfile = copy(spec->keyfile, &ok);
    t->spec.file = copy(spec->file, &ok);
    t->spec.digest = copy(spec->digest, &ok);
    t->spec.headers = NULL;
    t->spec.n_headers = 0;
    t->spec.body = NULL;
    headers = calloc(spec->n_headers + 1, sizeof(*headers));
    for (size_t i = 0; headers && i < spec->n_headers; i++)
        headers[i] = copy(spec->headers[i], &ok);
    t->spec.headers = (const char *const *)headers;
    t->spec.n_headers = headers ? spec->n_headers : 0;
    if (spec->body) {
        body = malloc(spec->body_bytes + 1);
        if (body)
            memcpy(body, spec->body, spec->body_bytes);
        t->spec.body = body;
        ok = ok && body;
    }
    t->result = calloc(1, sizeof(*t->result));
    if (!ok || !headers || !t->result) {
        sm_fetch_result_free(t->result);
        sm_transfer_free(t);
        return NULL;
    }
    return t;
}

void sm_transfer_free(struct sm_transfer *t)
{
    for (size_t i = 0; i < t->spec.n_headers; i++)
        free((char *)t->spec.headers[i]);
    free((char **)t->spec.headers);
    free((char *)t->spec.url);
    free((char *)t->spec.method);
    free((char *)t->spec.cafile);
    free((char *)t->spec.certfile);
    free((char *)t->spec.keyfile);
    free((char *)t->spec.file);
    free((char *)t->spec.digest);
    free((void *)t->spec.body);
    curl_easy_cleanup(t->easy);
    curl_slist_free_all(t->headers);
    sm_digest_close(&t->digest);
    if (t->fd >= 0)
        close(t->fd);
    free(t);
}

void sm_fetch_result_free(struct sm_fetch_result *r)
{
    if (!r)
        return;
    for (size_t i = 0; i < r->n_headers; i++) {
        free(r->headers[i].name);
        free(r->headers[i].value);
    }
    free(r->headers);
    free(r->body);
    free(r);
}

/* Records the first error of ours; the return value suits every caller. */
static int fail(struct sm_transfer *t, int err, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

static int fail(struct sm_transfer *t, int err, const char *fmt, ...)
{
    va_list ap;

    if (!t->failed) {
        va_start(ap, fmt);
        vsnprintf(t->result->error.text, sizeof(t->result->error.text), fmt, ap);
        va_end(ap);
    }
    t->failed = true;
    return -err;
}

/* The server, or the file, is not to be believed: nothing of it stays. */
#define distrust(t, ...) ((t)->discard = true, fail((t), EBADMSG, __VA_ARGS__))

/* Headers. */

static int keep_header(struct sm_transfer *t, const char *p, size_t len)
{
    struct sm_fetch_result *r = t->result;
    const char *colon = memchr(p, ':', len), *v;
    struct sm_fetch_header h;

    if (!colon)
        return 0;
    if (r->n_headers == HEADERS_MAX || (t->header_bytes += len) > HEADER_BYTES_MAX)
        return fail(t, EBADMSG, "the response has too many headers");
    if (r->n_headers == t->headers_cap) {
        size_t cap = t->headers_cap ? t->headers_cap * 2 : 16;
        void *q = realloc(r->headers, cap * sizeof(*r->headers));

        if (!q)
            return fail(t, ENOMEM, "out of memory");
        r->headers = q;
        t->headers_cap = cap;
    }
    for (v = colon + 1; v < p + len && (*v == ' ' || *v == '\t'); v++)
        ;
    h.name = strndup(p, (size_t)(colon - p));
    h.value = strndup(v, (size_t)(p + len - v));
    if (!h.name || !h.value) {
        free(h.name);
        free(h.value);
        return fail(t, ENOMEM, "out of memory");
    }
    r->headers[r->n_headers++] = h;
    return 0;
}

static size_t on_header(char *p, size_t size, size_t n, void *arg)
{
    struct sm_transfer *t = arg;
    size_t len = size * n;

    if (t->body_begun)
        return size * n; /* trailers */
    if (len >= 5 && !memcmp(p, "HTTP/", 5)) {
        /* An interim response came before: only the final one counts. */
        while (t->result->n_headers) {
            struct sm_fetch_header *h = &t->result->headers[--t->result->n_headers];

            free(h->name);
            free(h->value);
        }
        return size * n;
    }
    while (len && (p[len - 1] == '\r' || p[len - 1] == '\n' || p[len - 1] == ' ' ||
                   p[len - 1] == '\t'))
        len--;
    return keep_header(t, p, len) < 0 ? 0 : size * n;
}

static const char *find_header(const struct sm_fetch_result *r, const char *name)
{
    for (size_t i = 0; i < r->n_headers; i++)
        if (!strcasecmp(r->headers[i].name, name))
            return r->headers[i].value;
    return NULL;
}

/* The sink. */

static uint64_t file_limit(const struct sm_transfer *t)
{
    return t->spec.has_size ? t->spec.size : t->spec.limit_bytes;
}

static int restart_file(struct sm_transfer *t)
{
    if (ftruncate(t->fd, 0) < 0)
        return fail(t, errno, "%s: %s", t->spec.file, strerror(errno));
    t->at = 0;
    t->synced = 0;
    return sm_digest_reset(&t->digest) < 0 ? fail(t, EIO, "hashing failed") : 0;
}

/* RFC 9110 14.4: "bytes first-last/complete", complete may be "*". */
static int check_range(struct sm_transfer *t)
{
    const char *v = find_header(t->result, "Content-Range");
    uint64_t first, last, complete;
    int n;

    if (!t->spec.offset || !v)
        return distrust(t, "partial content without a %s", v ? "range asked for" : "range");
    n = sscanf(v, "bytes %" SCNu64 "-%" SCNu64 "/%" SCNu64, &first, &last, &complete);
    if (n < 2 || first != t->spec.offset || last < first)
        return distrust(t, "the range '%s' is not what was asked for",
                        sm_image_quote(v, strlen(v)).text);
    if (n == 3 && t->spec.has_size && complete != t->spec.size)
        return distrust(t, "the server has %" PRIu64 " bytes, not %" PRIu64, complete,
                        t->spec.size);
    return 0;
}

static int begin_body(struct sm_transfer *t)
{
    curl_off_t length = -1;
    uint64_t limit;
    int ret = 0;

    t->body_begun = true;
    curl_easy_getinfo(t->easy, CURLINFO_RESPONSE_CODE, &t->result->status);
    curl_easy_getinfo(t->easy, CURLINFO_CONTENT_LENGTH_DOWNLOAD_T, &length);
    t->result->to_file = t->spec.file &&
                         (t->result->status == 200 || t->result->status == 206);
    if (!t->result->to_file) {
        if (t->spec.file && t->result->status == 416)
            return distrust(t, "the server refused the range from byte %" PRIu64,
                            t->spec.offset);
        t->at = 0;
        return sm_digest_reset(&t->digest) < 0 ? fail(t, EIO, "hashing failed") : 0;
    }
    ret = t->result->status == 206 ? check_range(t) : restart_file(t);
    limit = file_limit(t);
    if (ret == 0 && length >= 0 && (uint64_t)length > limit - t->at)
        return distrust(t, "the server announces %" PRIu64 " bytes, not %" PRIu64,
                        t->at + (uint64_t)length, limit);
    if (ret == 0)
        atomic_store(&t->total, t->spec.has_size ? t->spec.size
                                                 : length > 0 ? t->at + (uint64_t)length : 0);
    return ret;
}

static int to_memory(struct sm_transfer *t, const void *data, size_t len)
{
    struct sm_fetch_result *r = t->result;
    uint64_t limit = t->spec.file ? REFUSAL_BYTES_MAX : t->spec.limit_bytes;

    if (len > limit - r->body_bytes)
        return fail(t, EFBIG, "the body is longer than %" PRIu64 " bytes", limit);
    if (r->body_bytes + len > t->body_cap) {
        size_t cap = t->body_cap ? t->body_cap : 4096;
        uint8_t *q;

        while (cap < r->body_bytes + len)
            cap *= 2;
        q = realloc(r->body, cap);
        if (!q)
            return fail(t, ENOMEM, "out of memory");
        r->body = q;
        t->body_cap = cap;
    }
    memcpy(r->body + r->body_bytes, data, len);
    r->body_bytes += len;
    return 0;
}

static int to_file(struct sm_transfer *t, const void *data, size_t len)
{
    int ret;

    if (len > file_limit(t) - t->at)
        return distrust(t, "the body is longer than %" PRIu64 " bytes", file_limit(t));
    ret = sm_image_write_all(t->fd, data, len, t->at);
    if (ret < 0) {
        t->discard = true;
        return fail(t, -ret, "%s: %s", t->spec.file, strerror(-ret));
    }
#ifdef __linux__
    /* Write back as we go, or the final fsync stops every other transfer. */
    if (t->at + len - t->synced >= WRITEBACK_BYTES) {
        sync_file_range(t->fd, (off_t)t->synced, (off_t)(t->at + len - t->synced),
                        SYNC_FILE_RANGE_WRITE);
        t->synced = t->at + len;
    }
#endif
    return 0;
}

static size_t on_body(char *p, size_t size, size_t n, void *arg)
{
    struct sm_transfer *t = arg;
    size_t len = size * n;
    int ret = t->body_begun ? 0 : begin_body(t);

    if (ret == 0)
        ret = t->result->to_file ? to_file(t, p, len) : to_memory(t, p, len);
    if (ret == 0 && sm_digest_update(&t->digest, p, len) < 0)
        ret = fail(t, EIO, "hashing failed");
    if (ret < 0)
        return 0;
    t->at += len;
    atomic_store(&t->now, t->at);
    return len;
}

/* Set-up. */

static int open_file(struct sm_transfer *t)
{
    struct stat st;

    t->fd = open(t->spec.file, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (t->fd < 0 || fstat(t->fd, &st) < 0)
        return fail(t, errno, "%s: %s", t->spec.file, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return fail(t, EINVAL, "%s: not a regular file", t->spec.file);
    if ((uint64_t)st.st_size < t->spec.offset)
        return fail(t, EINVAL, "%s: shorter than the offset %" PRIu64, t->spec.file,
                    t->spec.offset);
    if (t->spec.offset > file_limit(t))
        return distrust(t, "%s: longer than %" PRIu64 " bytes", t->spec.file, file_limit(t));
    if (ftruncate(t->fd, (off_t)t->spec.offset) < 0)
        return fail(t, errno, "%s: %s", t->spec.file, strerror(errno));
    return 0;
}

static bool add_header(struct sm_transfer *t, const char *line)
{
    struct curl_slist *l = curl_slist_append(t->headers, line);

    if (l)
        t->headers = l;
    return l != NULL;
}

static CURLcode set_request(struct sm_transfer *t)
{
    const struct sm_fetch_spec *s = &t->spec;
    const char *method = s->method;
    CURL *c = t->easy;
    CURLcode r = CURLE_OK;

    if (!method)
        method = s->body ? "POST" : "GET";
    if (s->body) {
        r = curl_easy_setopt(c, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)s->body_bytes);
        if (!r)
            r = curl_easy_setopt(c, CURLOPT_POSTFIELDS, s->body);
        if (!r && !add_header(t, "Expect:"))
            r = CURLE_OUT_OF_MEMORY;
    }
    if (r)
        return r;
    if (!strcmp(method, "HEAD"))
        return curl_easy_setopt(c, CURLOPT_NOBODY, 1L);
    if (strcmp(method, s->body ? "POST" : "GET"))
        return curl_easy_setopt(c, CURLOPT_CUSTOMREQUEST, method);
    return CURLE_OK;
}

static CURLcode set_protocols(CURL *c)
{
#if LIBCURL_VERSION_NUM >= 0x075500
    return curl_easy_setopt(c, CURLOPT_PROTOCOLS_STR, "http,https");
#else
    return curl_easy_setopt(c, CURLOPT_PROTOCOLS, (long)(CURLPROTO_HTTP | CURLPROTO_HTTPS));
#endif
}

static CURLcode set_range(struct sm_transfer *t)
{
    char range[32];

    if (!t->spec.offset)
        return CURLE_OK;
    snprintf(range, sizeof(range), "%" PRIu64 "-", t->spec.offset);
    return curl_easy_setopt(t->easy, CURLOPT_RANGE, range);
}

static CURLcode set_options(struct sm_transfer *t, const char *user_agent)
{
    const struct sm_fetch_spec *s = &t->spec;
    CURL *c = t->easy;
    CURLcode r = set_protocols(c);

#define SET(option, value)                                                                     \
    do {                                                                                       \
        if (!r)                                                                                \
            r = curl_easy_setopt(c, option, value);                                            \
    } while (0)
    SET(CURLOPT_URL, s->url);
    SET(CURLOPT_PRIVATE, (char *)t);
    SET(CURLOPT_NOSIGNAL, 1L);
    SET(CURLOPT_FOLLOWLOCATION, 0L);
    SET(CURLOPT_DISALLOW_USERNAME_IN_URL, 1L);
    SET(CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);
    SET(CURLOPT_HTTP_CONTENT_DECODING, 0L);
    SET(CURLOPT_BUFFERSIZE, 256L << 10);
    SET(CURLOPT_TCP_KEEPALIVE, 1L);
    SET(CURLOPT_ERRORBUFFER, t->curl_error);
    SET(CURLOPT_HEADERFUNCTION, on_header);
    SET(CURLOPT_HEADERDATA, t);
    SET(CURLOPT_WRITEFUNCTION, on_body);
    SET(CURLOPT_WRITEDATA, t);
    SET(CURLOPT_USERAGENT, user_agent);
    SET(CURLOPT_LOW_SPEED_LIMIT, (long)s->low_speed_bytes);
    SET(CURLOPT_LOW_SPEED_TIME, (long)s->low_speed_seconds);
    SET(CURLOPT_CONNECTTIMEOUT_MS, (long)s->connect_timeout_ms);
    SET(CURLOPT_TIMEOUT_MS, (long)s->timeout_ms);
    SET(CURLOPT_SSL_VERIFYPEER, s->insecure ? 0L : 1L);
    SET(CURLOPT_SSL_VERIFYHOST, s->insecure ? 0L : 2L);
    if (s->cafile)
        SET(CURLOPT_CAINFO, s->cafile);
    if (s->certfile)
        SET(CURLOPT_SSLCERT, s->certfile);
    if (s->keyfile)
        SET(CURLOPT_SSLKEY, s->keyfile);
    for (size_t i = 0; !r && i < s->n_headers; i++)
        if (!add_header(t, s->headers[i]))
            r = CURLE_OUT_OF_MEMORY;
    if (!r)
        r = set_request(t);
    if (!r)
        r = set_range(t);
    SET(CURLOPT_HTTPHEADER, t->headers);
#undef SET
    return r;
}

int sm_transfer_begin(struct sm_transfer *t, const char *user_agent)
{
    enum sm_digest_kind kind = t->spec.digest ? sm_digest_parse(t->spec.digest)
                                              : SM_DIGEST_SHA256;
    CURLcode r;

    if (t->spec.file && open_file(t) < 0)
        return -EIO;
    if (sm_digest_open(&t->digest, kind) < 0)
        return fail(t, ENOMEM, "hashing is not available");
    t->easy = curl_easy_init();
    if (!t->easy)
        return fail(t, ENOMEM, "out of memory");
    r = set_options(t, user_agent);
    if (r)
        return fail(t, EINVAL, "%s", curl_easy_strerror(r));
    atomic_store(&t->total, t->spec.has_size ? t->spec.size : 0);
    return 0;
}

int sm_transfer_hash_step(struct sm_transfer *t)
{
    uint64_t end = t->at + HASH_STEP_BYTES;
    uint8_t buf[65536];

    if (end > t->spec.offset)
        end = t->spec.offset;
    while (t->at < end) {
        size_t want = end - t->at < sizeof(buf) ? (size_t)(end - t->at) : sizeof(buf);
        ssize_t n = pread(t->fd, buf, want, (off_t)t->at);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return fail(t, EIO, "%s: %s", t->spec.file, n < 0 ? strerror(errno) : "file shrank");
        if (sm_digest_update(&t->digest, buf, (size_t)n) < 0)
            return fail(t, EIO, "hashing failed");
        t->at += (uint64_t)n;
    }
    t->synced = t->at;
    atomic_store(&t->now, t->at);
    return t->at == t->spec.offset;
}

bool sm_transfer_is_whole(const struct sm_transfer *t)
{
    return t->spec.file && t->spec.has_size && t->spec.offset == t->spec.size &&
           t->spec.size > 0;
}

/* The end. */

static void verify(struct sm_transfer *t)
{
    struct sm_fetch_result *r = t->result;
    bool wanted = t->spec.digest && (r->to_file || (!t->spec.file && r->status / 100 == 2));

    if (r->to_file && t->spec.has_size && t->at != t->spec.size) {
        r->transient = true;
        fail(t, EBADMSG, "the body ends after %" PRIu64 " of %" PRIu64 " bytes", t->at,
             t->spec.size);
        return;
    }
    if (sm_digest_text(&t->digest, r->digest) < 0) {
        fail(t, EIO, "hashing failed");
        return;
    }
    if (wanted && strcmp(r->digest, t->spec.digest))
        distrust(t, "digest is %s, not %s", r->digest, t->spec.digest);
    else if (r->to_file && fsync(t->fd) < 0)
        distrust(t, "%s: %s", t->spec.file, strerror(errno));
}

static void close_sink(struct sm_transfer *t)
{
    struct sm_fetch_result *r = t->result;
    struct stat st;

    r->bytes = r->body_bytes;
    if (t->fd < 0)
        return;
    r->bytes = fstat(t->fd, &st) == 0 ? (uint64_t)st.st_size : 0;
    /* An empty file that we made for nothing goes too. */
    if (t->discard || (!r->bytes && (t->failed || !r->to_file))) {
        unlink(t->spec.file);
        r->bytes = 0;
    }
    close(t->fd);
    t->fd = -1;
}

/* Failures of the way, not of the request: the next attempt may fare better. */
static bool is_transient(CURLcode code)
{
    switch (code) {
    case CURLE_COULDNT_RESOLVE_PROXY:
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_CONNECT:
    case CURLE_HTTP2:
    case CURLE_PARTIAL_FILE:
    case CURLE_OPERATION_TIMEDOUT:
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_GOT_NOTHING:
    case CURLE_SEND_ERROR:
    case CURLE_RECV_ERROR:
    case CURLE_AGAIN:
    case CURLE_HTTP2_STREAM:
        return true;
    default:
        return false;
    }
}

void sm_transfer_end(struct sm_transfer *t, CURLcode code)
{
    struct sm_fetch_result *r = t->result;

    if (sm_transfer_is_whole(t) && t->state == SM_TRANSFER_HASHING) {
        r->status = 206;
        r->to_file = true;
        t->body_begun = true;
    }
    r->curl_code = (int)code;
    if (code == CURLE_OK && !t->body_begun)
        begin_body(t);
    if (t->easy && !r->status)
        curl_easy_getinfo(t->easy, CURLINFO_RESPONSE_CODE, &r->status);
    if (code != CURLE_OK && !t->failed) {
        r->transient = is_transient(code);
        fail(t, EIO, "%s", t->curl_error[0] ? t->curl_error : curl_easy_strerror(code));
    }
    if (!t->failed)
        verify(t);
    close_sink(t);
}

void sm_transfer_abort(struct sm_transfer *t, const char *why, bool transient)
{
    if (why)
        fail(t, ECANCELED, "%s", why);
    t->result->transient = transient;
    t->result->curl_code = CURLE_ABORTED_BY_CALLBACK;
    close_sink(t);
}
