/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lab: the outer half of scripts/with-kvm.
 *
 *   lab keep DIR IDLE_SECONDS -- QEMU…   start a machine and own it
 *   lab run SOCKET [-t|-T] [-p OUT:IN]… [-r RETRY-COMMAND]… -- COMMAND…
 *   lab ping SOCKET                      is there a machine?
 *   lab stop|kill|status SOCKET
 */
#define _GNU_SOURCE
#include "lab.h"
#include "mux.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int lab_connect(const char *socket_path)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int fd;

    if (strlen(socket_path) >= sizeof addr.sun_path)
        return -ENAMETOOLONG;
    strcpy(addr.sun_path, socket_path);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    if (connect(fd, (struct sockaddr *)&addr, sizeof addr)) {
        int err = -errno;

        close(fd);
        return err;
    }
    return fd;
}

/* Sends one control frame, prints the answer, waits for the end. */
static int control(const char *path, int type)
{
    int fd = lab_connect(path);
    struct link l;

    if (fd < 0)
        return 1;
    link_init(&l, fd);
    link_send(&l, 0, type, 0, "", 0);
    while (!l.err) {
        struct pollfd p = { .fd = fd, .events = link_events(&l) };
        struct frame f;
        const char *data;

        poll(&p, 1, -1);
        link_flush(&l);
        link_fill(&l);
        while (link_next(&l, &f, &data))
            if (f.type == F_TEXT)
                fwrite(data, 1, f.len, stdout);
    }
    link_close(&l);
    return 0;
}

static int usage(void)
{
    fprintf(stderr, "usage: lab keep|run|ping|stop|kill|status …\n");
    return 125;
}

int main(int argc, char **argv)
{
    const char *verb = argc > 2 ? argv[1] : "";

    if (!strcmp(verb, "keep"))
        return keep_main(argc - 2, argv + 2);
    if (!strcmp(verb, "run"))
        return run_main(argc - 2, argv + 2);
    if (!strcmp(verb, "ping")) {
        int fd = lab_connect(argv[2]);

        return fd < 0;
    }
    if (!strcmp(verb, "stop"))
        return control(argv[2], F_STOP);
    if (!strcmp(verb, "kill"))
        return control(argv[2], F_KILL);
    if (!strcmp(verb, "status"))
        return control(argv[2], F_STATUS);
    return usage();
}
