/* SPDX-License-Identifier: Apache-2.0 */
/* Work on a thread; see job.h. */
#include "job.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#include "wake.h"
#include "thread.h"

struct sm_image_job {
    /* Written before the thread starts. */
    sm_image_job_fn *run;
    void *arg;
    struct sm_wake wake;
    pthread_t thread;
    /* Owner's thread. */
    bool joined;
    /* Atomic. */
    struct sm_image_progress progress;
    atomic_bool done;
    /* Written by the worker before done, read after. */
    int ret;
    struct sm_image_error error;
};

static void *work(void *arg)
{
    struct sm_image_job *j = arg;

    j->ret = j->run(j->arg, &j->progress, &j->error);
    atomic_store(&j->done, true);
    sm_wake_set(&j->wake);
    return NULL;
}

static int spawn(struct sm_image_job *j)
{
    sigset_t all, old;
    int err;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    err = sm_thread_create(&j->thread, NULL, work, j);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return -err;
}

int sm_image_job_start(struct sm_image_job **out, sm_image_job_fn *run, void *arg)
{
    struct sm_image_job *j = calloc(1, sizeof(*j));
    int ret;

    if (!j)
        return -ENOMEM;
    j->run = run;
    j->arg = arg;
    ret = sm_wake_open(&j->wake);
    if (ret == 0) {
        ret = spawn(j);
        if (ret < 0)
            sm_wake_close(&j->wake);
    }
    if (ret < 0) {
        free(j);
        return ret;
    }
    *out = j;
    return 0;
}

int sm_image_job_fd(const struct sm_image_job *j)
{
    return j->wake.read_fd;
}

bool sm_image_job_done(const struct sm_image_job *j)
{
    return atomic_load(&j->done);
}

struct sm_image_progress *sm_image_job_progress(struct sm_image_job *j)
{
    return &j->progress;
}

int sm_image_job_wait(struct sm_image_job *j, const struct sm_image_error **e)
{
    if (!j->joined)
        pthread_join(j->thread, NULL);
    j->joined = true;
    *e = &j->error;
    return j->ret;
}

void sm_image_job_close(struct sm_image_job *j)
{
    const struct sm_image_error *e;

    atomic_store(&j->progress.cancel, true);
    sm_image_job_wait(j, &e);
    sm_wake_close(&j->wake);
    free(j);
}
