/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Threads that leave the host program's signals alone: a signal sent to the
 * process is for the host's threads, whose handlers know nothing of ours (nor
 * of our small stacks). What a thread raises itself (SIGSEGV …) stays as it is.
 */
#ifndef SM_THREAD_H
#define SM_THREAD_H

#include <pthread.h>
#include <signal.h>

/* pthread_create with every signal blocked in the new thread. An errno. */
static inline int sm_thread_create(pthread_t *thread, const pthread_attr_t *attr,
                                   void *(*run)(void *), void *arg)
{
    sigset_t all, before;
    int err;

    sigfillset(&all);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGFPE);
    sigdelset(&all, SIGILL);
    err = pthread_sigmask(SIG_SETMASK, &all, &before);
    if (err) {
        return err;
    }
    err = pthread_create(thread, attr, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return err;
}

#endif
