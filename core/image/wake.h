/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A file descriptor that becomes readable when something is to be collected: an
 * eventfd on Linux, a pipe elsewhere. Set from any thread; clear before looking,
 * so that nothing set in between is lost. It stays open until its owner closes
 * it, because an event loop may still poll it.
 */
#ifndef SM_IMAGE_WAKE_H
#define SM_IMAGE_WAKE_H

struct sm_wake {
    int read_fd, write_fd;
};

int sm_wake_open(struct sm_wake *w);
void sm_wake_close(struct sm_wake *w);
void sm_wake_set(struct sm_wake *w);
void sm_wake_clear(struct sm_wake *w);

#endif
