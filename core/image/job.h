/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One piece of work on a thread of its own: ingest, merge or hash a file.
 *
 * The owner's thread starts it, may poll its descriptor, read its progress,
 * cancel it, and must close it, which cancels and joins. The work touches only
 * its argument, which must outlive the job. All signals are blocked in it.
 */
#ifndef SM_IMAGE_JOB_H
#define SM_IMAGE_JOB_H

#include "image.h"

struct sm_image_job;

typedef int sm_image_job_fn(void *arg, struct sm_image_progress *p, struct sm_image_error *e);

int sm_image_job_start(struct sm_image_job **out, sm_image_job_fn *run, void *arg);

/* Readable, and stays so, once the work has ended. */
int sm_image_job_fd(const struct sm_image_job *j);
bool sm_image_job_done(const struct sm_image_job *j);
struct sm_image_progress *sm_image_job_progress(struct sm_image_job *j);

/* Waits for the end; what run returned, and its error. */
int sm_image_job_wait(struct sm_image_job *j, const struct sm_image_error **e);

void sm_image_job_close(struct sm_image_job *j);

#endif
