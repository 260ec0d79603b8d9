/* SPDX-License-Identifier: Apache-2.0 */
/* A wake-up descriptor; see wake.h. */
#include "wake.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/eventfd.h>

int sm_wake_open(struct sm_wake *w)
{
    w->read_fd = w->write_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return w->read_fd < 0 ? -errno : 0;
}
#else
int sm_wake_open(struct sm_wake *w)
{
    int fds[2];

    w->read_fd = w->write_fd = -1;
    if (pipe(fds) < 0)
        return -errno;
    for (int i = 0; i < 2; i++) {
        fcntl(fds[i], F_SETFD, FD_CLOEXEC);
        fcntl(fds[i], F_SETFL, O_NONBLOCK);
    }
    w->read_fd = fds[0];
    w->write_fd = fds[1];
    return 0;
}
#endif

void sm_wake_close(struct sm_wake *w)
{
    if (w->write_fd != w->read_fd && w->write_fd >= 0)
        close(w->write_fd);
    if (w->read_fd >= 0)
        close(w->read_fd);
    w->read_fd = w->write_fd = -1;
}

void sm_wake_set(struct sm_wake *w)
{
    uint64_t one = 1;
    ssize_t n;

    /* A full pipe or counter is readable already: nothing to retry but EINTR. */
    do
        n = write(w->write_fd, &one, sizeof(one));
    while (n < 0 && errno == EINTR);
}

void sm_wake_clear(struct sm_wake *w)
{
    uint64_t buf[64];
    ssize_t n;

    do
        n = read(w->read_fd, buf, sizeof(buf));
    while (n == (ssize_t)sizeof(buf) || (n < 0 && errno == EINTR));
}
