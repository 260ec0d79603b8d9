/* SPDX-License-Identifier: Apache-2.0 */
/* See pcap.h; the format is draft-ietf-opsawg-pcap. */
#include "pcap.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAGIC_NS 0xa1b23c4du
#define LINK_ETHERNET 1
#define SNAP 262144u
#define BUFFER (256u << 10)

struct sm_pcap {
    int fd;
    bool broken;
    uint64_t lost;
    size_t len;
    uint8_t buf[BUFFER];
};

int sm_pcap_new(int fd, struct sm_pcap **out)
{
    struct {
        uint32_t magic;
        uint16_t major, minor;
        uint32_t zone, figures, snap, link;
    } head = { MAGIC_NS, 2, 4, 0, 0, SNAP, LINK_ETHERNET };
    struct sm_pcap *p = calloc(1, sizeof(*p));

    if (!p) {
        close(fd);
        return -ENOMEM;
    }
    p->fd = fd;
    memcpy(p->buf, &head, sizeof(head));
    p->len = sizeof(head);
    sm_pcap_flush(p);
    *out = p;
    return 0;
}

int sm_pcap_open(const char *path, struct sm_pcap **out)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    return fd < 0 ? -errno : sm_pcap_new(fd, out);
}

/* A socket never makes the network wait. */
static ssize_t put(int fd, const void *buf, size_t len)
{
    ssize_t n = send(fd, buf, len, MSG_DONTWAIT | MSG_NOSIGNAL);

    return n < 0 && errno == ENOTSOCK ? write(fd, buf, len) : n;
}

bool sm_pcap_flush(struct sm_pcap *p)
{
    size_t at = 0;

    while (at < p->len && !p->broken) {
        ssize_t n = put(p->fd, p->buf + at, p->len - at);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            break;
        if (n <= 0)
            p->broken = true;
        else
            at += (size_t)n;
    }
    if (p->broken)
        p->len = at = 0;
    memmove(p->buf, p->buf + at, p->len - at);
    p->len -= at;
    return !p->broken;
}

int sm_pcap_waits_for(const struct sm_pcap *p)
{
    return p->len ? p->fd : -1;
}

void sm_pcap_frame(struct sm_pcap *p, const void *frame, size_t len)
{
    struct timespec t;
    uint32_t head[4];

    if (p->len + sizeof(head) + len > BUFFER)
        sm_pcap_flush(p);
    if (p->broken || p->len + sizeof(head) + len > BUFFER) {
        p->lost++;
        return;
    }
    clock_gettime(CLOCK_REALTIME, &t);
    head[0] = (uint32_t)t.tv_sec;
    head[1] = (uint32_t)t.tv_nsec;
    head[2] = head[3] = (uint32_t)len;
    memcpy(p->buf + p->len, head, sizeof(head));
    memcpy(p->buf + p->len + sizeof(head), frame, len);
    p->len += sizeof(head) + len;
}

uint64_t sm_pcap_lost(const struct sm_pcap *p)
{
    return p->lost;
}

void sm_pcap_close(struct sm_pcap *p)
{
    if (!p)
        return;
    sm_pcap_flush(p);
    close(p->fd);
    free(p);
}
