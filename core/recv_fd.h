/* SPDX-License-Identifier: Apache-2.0 */
/* A unix socket over which a descriptor may come along (unix(7), SCM_RIGHTS).
 * Threads: any. */
#ifndef SM_RECV_FD_H
#define SM_RECV_FD_H

#include <sys/types.h>

/* recv(2) that does not wait. *fd: the one that came with these bytes, the caller's
 * from now on; -1: none. */
ssize_t sm_recv_fd(int sock, void *buf, size_t len, int *fd);

#endif
