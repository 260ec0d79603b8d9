/* SPDX-License-Identifier: Apache-2.0 */
/* See nic_stream.h. */
#include "nic_stream.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define LENGTH_BYTES 4
#define SMALL_BYTES 2048 /* gathered until the round's end, sm_nic_stream_fill */
#define SECOND_NS 1000000000ull

static void hang_up(struct sm_nic *nic)
{
    close(nic->fd);
    nic->fd = -1;
    nic->in_at = nic->in_len = nic->out_at = nic->out_len = 0;
    nic->offloads = 0;
}

/* ---- to the worker ---- */

static void flush_out(struct sm_nic *nic)
{
    while (nic->out_len && nic->fd >= 0) {
        ssize_t n = send(nic->fd, nic->out + nic->out_at, nic->out_len, MSG_NOSIGNAL | MSG_DONTWAIT);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            if (errno != EAGAIN)
                hang_up(nic);
            return;
        }
        nic->out_at += (size_t)n;
        nic->out_len -= (size_t)n;
    }
    nic->out_at = 0;
    if (nic->out_cap > SM_NIC_FULL_BYTES) {
        free(nic->out);
        nic->out = NULL;
        nic->out_cap = 0;
    }
}

static bool make_room(struct sm_nic *nic, size_t len)
{
    if (nic->out_at + nic->out_len + len <= nic->out_cap)
        return true;
    if (nic->out_at) {
        memmove(nic->out, nic->out + nic->out_at, nic->out_len);
        nic->out_at = 0;
    }
    if (nic->out_len + len > nic->out_cap) {
        size_t cap = nic->out_cap ? nic->out_cap : 128 << 10;
        uint8_t *out;

        while (cap < nic->out_len + len)
            cap *= 2;
        if (nic->out_len + len > SM_NIC_OUT_BYTES || !(out = realloc(nic->out, cap)))
            return false;
        nic->out = out;
        nic->out_cap = cap;
    }
    return true;
}

void sm_nic_queue(struct sm_nic *nic, const struct sm_net_hdr *h, const uint8_t *frame, size_t len)
{
    size_t head = nic->vnet ? sizeof(*h) : 0, total = LENGTH_BYTES + head + len, sent = 0;
    uint8_t length[LENGTH_BYTES];
    struct iovec iov[3] = { { length, LENGTH_BYTES }, { (void *)h, head }, { (void *)frame, len } };
    struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 3 };

    if (nic->fd < 0 || len < SM_NET_MIN_FRAME || len > SM_NET_MAX_FRAME) {
        nic->in_dropped++;
        return;
    }
    sm_set_be32(length, (uint32_t)(head + len));
    if (total > SMALL_BYTES && nic->out_len)
        flush_out(nic);
    if (nic->fd < 0)
        return;
    if (total > SMALL_BYTES && !nic->out_len) {
        ssize_t n = sendmsg(nic->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);

        if (n < 0 && errno != EAGAIN && errno != EINTR) {
            hang_up(nic);
            return;
        }
        sent = n > 0 ? (size_t)n : 0;
        if (sent == total)
            return;
    }
    if (!make_room(nic, total - sent)) {
        nic->in_dropped++;
        if (sent)
            hang_up(nic); /* half a frame would be nonsense */
        return;
    }
    for (unsigned i = 0; i < 3; i++) {
        size_t skip = sent < iov[i].iov_len ? sent : iov[i].iov_len;

        sent -= skip;
        memcpy(nic->out + nic->out_at + nic->out_len, (uint8_t *)iov[i].iov_base + skip,
               iov[i].iov_len - skip);
        nic->out_len += iov[i].iov_len - skip;
    }
}

bool sm_nic_full(const struct sm_nic *nic)
{
    return nic->out_len > SM_NIC_FULL_BYTES;
}

/* ---- from the worker ---- */

/* 0 when the rate allows more, else when it will. */
static uint64_t wait_for_rate(struct sm_nic *nic)
{
    uint64_t since = nic->now_ns - nic->tokens_ns;
    uint64_t wait = 0;

    if (!nic->rate_bytes && !nic->rate_packets)
        return 0;
    if (since > SECOND_NS)
        since = SECOND_NS;
    /* A tenth of a second may be saved up. */
    nic->tokens_ns = nic->now_ns;
    nic->tokens_bytes += (int64_t)((double)nic->rate_bytes * (double)since / 1e9);
    nic->tokens_packets += (int64_t)((double)nic->rate_packets * 1000 * (double)since / 1e9);
    if (nic->tokens_bytes > (int64_t)nic->rate_bytes / 10)
        nic->tokens_bytes = (int64_t)nic->rate_bytes / 10;
    if (nic->tokens_packets > (int64_t)nic->rate_packets * 100)
        nic->tokens_packets = (int64_t)nic->rate_packets * 100;
    if (nic->rate_bytes && nic->tokens_bytes < 0)
        wait = (uint64_t)((double)-nic->tokens_bytes * 1e9 / (double)nic->rate_bytes);
    if (nic->rate_packets && nic->tokens_packets < 0) {
        uint64_t w = (uint64_t)((double)-nic->tokens_packets * 1e6 / (double)nic->rate_packets);

        wait = w > wait ? w : wait;
    }
    return wait ? nic->now_ns + wait + 1000000 : 0;
}

static void take_offloads(struct sm_nic *nic, const uint8_t *p)
{
    nic->offloads = (unsigned)(p[0] | p[1] << 8 | p[2] << 16 | (unsigned)p[3] << 24) & SM_NET_OFFLOAD_ALL;
    if (nic->backend && nic->backend->ops->offloads)
        nic->backend->ops->offloads(nic->backend, nic->offloads);
}

/* Every whole frame in the buffer. False: nonsense. */
static bool take_frames(struct sm_nic *nic)
{
    size_t head = nic->vnet ? SM_NET_HDR_BYTES : 0;

    while (nic->in_len >= LENGTH_BYTES) {
        uint8_t *p = nic->in + nic->in_at;
        struct sm_net_hdr h = { 0 };
        uint32_t len = sm_be32(p);

        if ((len != 4 || !nic->vnet) && (len < head + SM_NET_MIN_FRAME || len > head + SM_NET_MAX_FRAME))
            return false;
        if (nic->in_len < LENGTH_BYTES + len)
            break;
        nic->in_at += LENGTH_BYTES + len;
        nic->in_len -= LENGTH_BYTES + len;
        if (len == 4) {
            take_offloads(nic, p + LENGTH_BYTES);
            continue;
        }
        memcpy(&h, p + LENGTH_BYTES, head);
        nic->tokens_bytes -= nic->rate_bytes ? (int64_t)len : 0;
        nic->tokens_packets -= nic->rate_packets ? 1000 : 0;
        if (nic->backend)
            sm_nic_out(nic, &h, p + LENGTH_BYTES + head, len - head);
        if (nic->fd < 0)
            return true;
    }
    return true;
}

static void read_in(struct sm_nic *nic)
{
    ssize_t n;

    if (!nic->in_len)
        nic->in_at = 0;
    if (nic->in_at > SM_NIC_IN_BYTES / 2) {
        memmove(nic->in, nic->in + nic->in_at, nic->in_len);
        nic->in_at = 0;
    }
    n = recv(nic->fd, nic->in + nic->in_at + nic->in_len, SM_NIC_IN_BYTES - nic->in_at - nic->in_len,
             MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        hang_up(nic);
        return;
    }
    nic->in_len += (size_t)n;
    if (!take_frames(nic) && nic->fd >= 0)
        hang_up(nic);
}

/* ---- the loop ---- */

void sm_nic_stream_fill(struct sm_nic *nic, struct sm_poll *poll)
{
    uint64_t wait = wait_for_rate(nic);
    short events = 0;

    nic->index = nic->listen_index = -1;
    flush_out(nic);
    if (nic->fd < 0) {
        nic->listen_index = sm_poll_add(poll, nic->listen_fd, POLLIN);
        return;
    }
    if (wait)
        sm_poll_at(poll, wait);
    else
        events |= POLLIN;
    if (nic->out_len)
        events |= POLLOUT;
    nic->index = sm_poll_add(poll, nic->fd, events);
}

void sm_nic_stream_serve(struct sm_nic *nic, struct sm_poll *poll)
{
    if (nic->listen_index >= 0 && sm_poll_got(poll, nic->listen_index)) {
        nic->fd = accept4(nic->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        return;
    }
    if (nic->index < 0 || nic->fd < 0)
        return;
    if (sm_poll_got(poll, nic->index) & POLLOUT)
        flush_out(nic);
    if (nic->fd >= 0 && sm_poll_got(poll, nic->index) & (POLLIN | POLLHUP | POLLERR))
        read_in(nic);
}
