/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The same program as an ordinary process: a TCP stream of this machine joined
 * to standard input and output, so that the host reaches a port through the
 * agent, without a network.
 *
 *   init --connect PORT   to 127.0.0.1, else ::1; "connected" on stderr first
 *   init --listen PORT    a line on stdout for the port, then one a connection;
 *                         each waits to be taken
 *   init --take PORT      the oldest of those, as --connect
 *
 * A connection goes from the one to the other over an abstract unix socket.
 * The exit code is an errno.
 */
#include "agent.h"
#include "kabi.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define BUFFER_BYTES 65536
#define WAITING 64 /* connections not taken yet; more wait in the kernel */

static int fail(const char *what)
{
    int error = errno ? errno : EIO;
    fprintf(stderr, "%s: %s\n", what, strerror(error));
    return error;
}

static int write_all(int fd, const char *p, size_t len)
{
    while (len) {
        ssize_t n = write(fd, p, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        p += n;
        len -= (size_t)n;
    }
    return 0;
}

/* Both ways until both have ended; each end is told as it comes. */
static int join_streams(int sock)
{
    static char buf[BUFFER_BYTES];
    bool in = true, out = true;
    fputs("connected\n", stderr);
    while (in || out) {
        struct pollfd p[2] = { { .fd = in ? 0 : -1, .events = POLLIN },
                               { .fd = out ? sock : -1, .events = POLLIN } };
        if (poll(p, 2, -1) < 0 && errno != EINTR)
            return fail("poll");
        if (p[0].revents) {
            ssize_t n = read(0, buf, sizeof(buf));
            if (n > 0 && write_all(sock, buf, (size_t)n)) {
                in = false; /* nobody reads there; what comes may still be of use */
            } else if (n <= 0) {
                shutdown(sock, SHUT_WR);
                in = false;
            }
        }
        if (p[1].revents) {
            ssize_t n = read(sock, buf, sizeof(buf));
            if (n < 0)
                return fail("read");
            if (n > 0 && write_all(1, buf, (size_t)n))
                return fail("write");
            if (n == 0) {
                out = false;
                close(1);
            }
        }
    }
    return 0;
}

static int connect_tcp(uint16_t port)
{
    struct sockaddr_in four = { .sin_family = AF_INET, .sin_port = htons(port),
                                .sin_addr = { htonl(INADDR_LOOPBACK) } };
    struct sockaddr_in6 six = { .sin6_family = AF_INET6, .sin6_port = htons(port),
                                .sin6_addr = IN6ADDR_LOOPBACK_INIT };
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&four, sizeof(four)) == 0)
        return join_streams(fd);
    int first = errno;
    close(fd);
    fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&six, sizeof(six)) == 0)
        return join_streams(fd);
    errno = first;
    return fail("connect");
}

static socklen_t hand_over_name(uint16_t port, struct sockaddr_un *addr)
{
    *addr = (struct sockaddr_un){ .sun_family = AF_UNIX };
    int n = snprintf(addr->sun_path + 1, sizeof(addr->sun_path) - 1, "sm-listen-%u", port);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
}

union fd_message {
    char bytes[CMSG_SPACE(sizeof(int))];
    struct cmsghdr align;
};

static int take(uint16_t port)
{
    struct sockaddr_un addr;
    socklen_t len = hand_over_name(port, &addr);
    union fd_message control;
    char byte;
    struct iovec iov = { &byte, 1 };
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
                          .msg_controllen = sizeof(control.bytes) };
    int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), fd;
    if (s < 0 || connect(s, (struct sockaddr *)&addr, len) < 0)
        return fail("take");
    errno = ECONNABORTED;
    if (recvmsg(s, &msg, 0) != 1 || !CMSG_FIRSTHDR(&msg))
        return fail("take");
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(fd));
    close(s);
    return join_streams(fd);
}

/* Any user of the guest may connect to an abstract socket; only root takes. */
static void hand_over(int taker, int fd)
{
    union fd_message control = { .bytes = { 0 } };
    struct kabi_ucred who = { .uid = ~0u };
    socklen_t len = sizeof(who);
    char byte = 0;
    struct iovec iov = { &byte, 1 };
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
                          .msg_controllen = sizeof(control.bytes) };
    if (getsockopt(taker, SOL_SOCKET, SO_PEERCRED, &who, &len) < 0 || who.uid != geteuid())
        return;
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(fd));
    memcpy(CMSG_DATA(c), &fd, sizeof(fd));
    if (sendmsg(taker, &msg, MSG_NOSIGNAL) < 0)
        errno = 0; /* it went away; so does the connection */
}

static int listen_tcp(uint16_t port)
{
    struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
    struct sockaddr_in any4 = { .sin_family = AF_INET, .sin_port = htons(port) };
    struct sockaddr_un addr;
    socklen_t len = hand_over_name(port, &addr);
    int waiting[WAITING], count = 0, one = 1;
    int tcp = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool six = tcp >= 0;
    if (!six)
        tcp = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int take_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(tcp, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (tcp < 0 || take_fd < 0 ||
        (six ? bind(tcp, (struct sockaddr *)&any, sizeof(any))
             : bind(tcp, (struct sockaddr *)&any4, sizeof(any4))) < 0 ||
        listen(tcp, 128) < 0 || bind(take_fd, (struct sockaddr *)&addr, len) < 0 ||
        listen(take_fd, 128) < 0)
        return fail("listen");
    if (write_all(1, "listening\n", 10))
        return EPIPE;
    for (;;) {
        struct pollfd p[3] = { { .fd = count < WAITING ? tcp : -1, .events = POLLIN },
                               { .fd = count ? take_fd : -1, .events = POLLIN },
                               { .fd = 0, .events = POLLIN } };
        if (poll(p, 3, -1) < 0 && errno != EINTR)
            return fail("poll");
        if (p[2].revents)
            return 0; /* the host is done with it */
        if (p[0].revents) {
            int fd = accept4(tcp, NULL, NULL, SOCK_CLOEXEC);
            if (fd >= 0) {
                waiting[count++] = fd;
                if (write_all(1, "accepted\n", 9))
                    return EPIPE;
            }
        }
        if (p[1].revents) {
            int taker = accept4(take_fd, NULL, NULL, SOCK_CLOEXEC);
            if (taker < 0)
                continue;
            hand_over(taker, waiting[0]);
            close(waiting[0]);
            close(taker);
            memmove(waiting, waiting + 1, sizeof(waiting[0]) * (size_t)--count);
        }
    }
}

int sm_pipe_main(int argc, char **argv)
{
    char *end = NULL;
    unsigned long port = argc == 3 ? strtoul(argv[2], &end, 10) : 0;
    if (!end || *end || port < 1 || port > 65535) {
        fprintf(stderr, "usage: init --connect|--listen|--take PORT\n");
        return EINVAL;
    }
    signal(SIGPIPE, SIG_IGN);
    if (!strcmp(argv[1], "--connect"))
        return connect_tcp((uint16_t)port);
    return !strcmp(argv[1], "--take") ? take((uint16_t)port) : listen_tcp((uint16_t)port);
}
