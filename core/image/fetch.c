/* SPDX-License-Identifier: Apache-2.0 */
/* The fetcher: its thread, its queue, its results; see fetch.h. */
#include "fetch.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "transfer.h"
#include "wake.h"
#include "thread.h"

#define POLL_MS 60000

struct sm_fetcher {
    /* Set before the thread starts. */
    char *user_agent;
    unsigned parallel;
    CURLM *multi;
    pthread_t thread;
    struct sm_wake wake;
    atomic_bool stop;
    pthread_mutex_t lock;
    /* Under lock. */
    struct sm_transfer *live; /* every transfer without a result, newest first */
    struct sm_fetch_result *first, *last;
    uint64_t next_id;
    size_t pending; /* submitted, result not collected */
    /* Fetcher thread. */
    unsigned files; /* running transfers into files */
};

/* libcurl wants its global set-up exactly once, before any thread uses it. */
static pthread_once_t curl_once = PTHREAD_ONCE_INIT;

static void curl_set_up(void)
{
    curl_global_init(CURL_GLOBAL_DEFAULT);
}

static void push_result(struct sm_fetcher *f, struct sm_transfer *t)
{
    struct sm_fetch_result *r = t->result;
    struct sm_transfer **p;

    pthread_mutex_lock(&f->lock);
    for (p = &f->live; *p != t; p = &(*p)->next)
        ;
    *p = t->next;
    r->id = t->id;
    r->next = NULL;
    if (f->last)
        f->last->next = r;
    else
        f->first = r;
    f->last = r;
    sm_wake_set(&f->wake);
    pthread_mutex_unlock(&f->lock);
}

/* Takes a transfer out of curl and gives its result to the owner. */
static void finish(struct sm_fetcher *f, struct sm_transfer *t)
{
    if (t->state == SM_TRANSFER_ACTIVE)
        curl_multi_remove_handle(f->multi, t->easy);
    if (t->state != SM_TRANSFER_WAITING && t->spec.file)
        f->files--;
    push_result(f, t);
    sm_transfer_free(t);
}

static void activate(struct sm_fetcher *f, struct sm_transfer *t)
{
    if (curl_multi_add_handle(f->multi, t->easy) != CURLM_OK) {
        sm_transfer_abort(t, "starting the transfer failed", false);
        finish(f, t);
        return;
    }
    t->state = SM_TRANSFER_ACTIVE;
}

static void hash_more(struct sm_fetcher *f, struct sm_transfer *t)
{
    int ret = sm_transfer_hash_step(t);

    if (ret == 0)
        return;
    if (ret < 0) {
        sm_transfer_abort(t, NULL, false);
        finish(f, t);
    } else if (sm_transfer_is_whole(t)) {
        sm_transfer_end(t, CURLE_OK);
        finish(f, t);
    } else {
        activate(f, t);
    }
}

static void begin(struct sm_fetcher *f, struct sm_transfer *t)
{
    if (t->spec.file && f->files >= f->parallel)
        return;
    if (sm_transfer_begin(t, f->user_agent) < 0) {
        sm_transfer_abort(t, NULL, false);
        finish(f, t);
        return;
    }
    f->files += t->spec.file != NULL;
    t->state = SM_TRANSFER_HASHING;
    if (!t->spec.offset)
        activate(f, t);
}

/* One round over every live transfer; true when one of them wants more at once. */
static bool advance(struct sm_fetcher *f)
{
    struct sm_transfer **all, *t;
    size_t n = 0, count = 0;
    bool busy = false;

    pthread_mutex_lock(&f->lock);
    for (t = f->live; t; t = t->next)
        n++;
    all = malloc((n + 1) * sizeof(*all));
    for (t = f->live; t && all; t = t->next)
        all[n - ++count] = t; /* oldest first */
    pthread_mutex_unlock(&f->lock);
    /* Only this thread takes transfers off the list, so the copy stays good. */
    for (size_t i = 0; i < count; i++) {
        t = all[i];
        if (atomic_load(&t->cancel)) {
            sm_transfer_abort(t, "cancelled", false);
            finish(f, t);
        } else if (t->state == SM_TRANSFER_WAITING) {
            begin(f, t);
        } else if (t->state == SM_TRANSFER_HASHING) {
            hash_more(f, t);
        }
    }
    free(all);
    pthread_mutex_lock(&f->lock);
    for (t = f->live; t; t = t->next)
        busy |= t->state == SM_TRANSFER_HASHING ||
                (t->state == SM_TRANSFER_WAITING && f->files < f->parallel);
    pthread_mutex_unlock(&f->lock);
    return busy;
}

static bool collect(struct sm_fetcher *f)
{
    bool any = false;
    CURLMsg *m;
    int left;

    while ((m = curl_multi_info_read(f->multi, &left))) {
        char *p = NULL;

        if (m->msg != CURLMSG_DONE)
            continue;
        curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, &p);
        sm_transfer_end((struct sm_transfer *)(void *)p, m->data.result);
        finish(f, (struct sm_transfer *)(void *)p);
        any = true;
    }
    return any;
}

static void *serve(void *arg)
{
    struct sm_fetcher *f = arg;

    while (!atomic_load(&f->stop)) {
        bool busy = advance(f);
        int running;

        curl_multi_perform(f->multi, &running);
        busy |= collect(f);
        if (!busy)
            curl_multi_poll(f->multi, NULL, 0, POLL_MS, NULL);
    }
    while (f->live) {
        sm_transfer_abort(f->live, "cancelled", false);
        finish(f, f->live);
    }
    return NULL;
}

static int spawn(struct sm_fetcher *f)
{
    sigset_t all, old;
    int err;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    err = sm_thread_create(&f->thread, NULL, serve, f);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return -err;
}

static void release(struct sm_fetcher *f)
{
    struct sm_fetch_result *r;

    while ((r = f->first)) {
        f->first = r->next;
        sm_fetch_result_free(r);
    }
    curl_multi_cleanup(f->multi);
    sm_wake_close(&f->wake);
    pthread_mutex_destroy(&f->lock);
    free(f->user_agent);
    free(f);
}

int sm_fetcher_open(struct sm_fetcher **out, unsigned parallel, const char *user_agent,
                    struct sm_image_error *e)
{
    struct sm_fetcher *f = calloc(1, sizeof(*f));
    int ret = -ENOMEM;

    pthread_once(&curl_once, curl_set_up);
    if (!f)
        return sm_image_fail(e, ENOMEM, "out of memory");
    pthread_mutex_init(&f->lock, NULL);
    f->wake.read_fd = f->wake.write_fd = -1;
    f->parallel = parallel;
    f->next_id = 1;
    f->user_agent = strdup(user_agent);
    f->multi = curl_multi_init();
    if (f->user_agent && f->multi)
        ret = sm_wake_open(&f->wake);
    if (ret == 0)
        ret = spawn(f);
    if (ret < 0) {
        release(f);
        return sm_image_fail(e, -ret, "fetcher: %s", strerror(-ret));
    }
    *out = f;
    return 0;
}

void sm_fetcher_close(struct sm_fetcher *f)
{
    atomic_store(&f->stop, true);
    curl_multi_wakeup(f->multi);
    pthread_join(f->thread, NULL);
    release(f);
}

static int check_spec(const struct sm_fetch_spec *s, struct sm_image_error *e)
{
    for (size_t i = 0; i < s->n_headers; i++)
        if (strpbrk(s->headers[i], "\r\n") || !strchr(s->headers[i], ':'))
            return sm_image_fail(e, EINVAL, "header %zu is malformed", i + 1);
    if (s->method && s->method[strspn(s->method, "ABCDEFGHIJKLMNOPQRSTUVWXYZ")])
        return sm_image_fail(e, EINVAL, "the method is malformed");
    if (s->digest && sm_digest_parse(s->digest) == SM_DIGEST_NONE)
        return sm_image_fail(e, EINVAL, "the digest is malformed");
    if (s->file && !s->has_size && !s->limit_bytes)
        return sm_image_fail(e, EINVAL, "a file needs a size or a limit");
    return 0;
}

int sm_fetcher_submit(struct sm_fetcher *f, const struct sm_fetch_spec *spec, uint64_t *id,
                      struct sm_image_error *e)
{
    struct sm_transfer *t;
    int ret = check_spec(spec, e);

    if (ret < 0)
        return ret;
    t = sm_transfer_create(spec);
    if (!t)
        return sm_image_fail(e, ENOMEM, "out of memory");
    pthread_mutex_lock(&f->lock);
    if (f->pending < SM_FETCH_QUEUE_MAX) {
        *id = t->id = f->next_id++;
        t->next = f->live;
        f->live = t;
        f->pending++;
    } else {
        ret = -EAGAIN;
    }
    pthread_mutex_unlock(&f->lock);
    if (ret < 0) {
        sm_fetch_result_free(t->result);
        sm_transfer_free(t);
        return sm_image_fail(e, EAGAIN, "more than %u requests are waiting",
                             SM_FETCH_QUEUE_MAX);
    }
    curl_multi_wakeup(f->multi);
    return 0;
}

struct sm_fetch_result *sm_fetcher_next(struct sm_fetcher *f)
{
    struct sm_fetch_result *r;

    pthread_mutex_lock(&f->lock);
    r = f->first;
    if (r) {
        f->first = r->next;
        f->pending--;
    }
    if (!f->first) {
        f->last = NULL;
        sm_wake_clear(&f->wake);
    }
    pthread_mutex_unlock(&f->lock);
    return r;
}

int sm_fetcher_fd(const struct sm_fetcher *f)
{
    return f->wake.read_fd;
}

static struct sm_transfer *find(struct sm_fetcher *f, uint64_t id)
{
    struct sm_transfer *t = f->live;

    while (t && t->id != id)
        t = t->next;
    return t;
}

bool sm_fetcher_progress(struct sm_fetcher *f, uint64_t id, uint64_t *now, uint64_t *total)
{
    struct sm_transfer *t;

    pthread_mutex_lock(&f->lock);
    t = find(f, id);
    if (t) {
        *now = atomic_load(&t->now);
        *total = atomic_load(&t->total);
    }
    pthread_mutex_unlock(&f->lock);
    return t != NULL;
}

bool sm_fetcher_cancel(struct sm_fetcher *f, uint64_t id)
{
    struct sm_transfer *t;

    pthread_mutex_lock(&f->lock);
    t = find(f, id);
    if (t)
        atomic_store(&t->cancel, true);
    pthread_mutex_unlock(&f->lock);
    if (t)
        curl_multi_wakeup(f->multi);
    return t != NULL;
}

size_t sm_fetcher_pending(struct sm_fetcher *f)
{
    size_t n;

    pthread_mutex_lock(&f->lock);
    n = f->pending;
    pthread_mutex_unlock(&f->lock);
    return n;
}
