/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The seam between virtio-net and what carries its frames.
 *
 *      virtio_net.c ── tx ──▶ backend        (guest → world)
 *                   ◀─ rx ───                (world → guest)
 *
 * Back pressure, both ways, without a queue in the device: tx says -EAGAIN and
 * calls `writable` later; rx says false, the backend keeps the frame and is
 * told by `pull` when the guest has buffers again.
 *
 * The worker's backend is a stream socket (net_stream.c): the user-mode stack,
 * taps, switches and the policy in front of them live behind it in a process of
 * their own, sm-net (core/net/main.c says why). Or it is the host's kernel, for a
 * tap that needs no policy (vhost_net.c).
 *
 * Threads: everything here is the device's I/O thread's, but create and
 * destroy, which come before and after it runs for this device.
 */
#ifndef SM_DEV_NET_H
#define SM_DEV_NET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "io.h"

/* virtio_net_hdr_v1 (5.1.6): in front of every frame. */
struct sm_net_hdr {
    uint8_t flags;    /* SM_NET_HDR_* */
    uint8_t gso_type; /* SM_NET_GSO_* */
    uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};
#define SM_NET_HDR_BYTES 12
_Static_assert(sizeof(struct sm_net_hdr) == SM_NET_HDR_BYTES, "5.1.6");

enum { SM_NET_HDR_NEEDS_CSUM = 1, SM_NET_HDR_DATA_VALID = 2 };
enum { SM_NET_GSO_NONE = 0, SM_NET_GSO_TCPV4 = 1, SM_NET_GSO_TCPV6 = 4, SM_NET_GSO_ECN = 0x80 };

/* What the receiving side of frames can take. */
enum {
    SM_NET_OFFLOAD_CSUM = 1, /* partial checksums */
    SM_NET_OFFLOAD_TSO4 = 2,
    SM_NET_OFFLOAD_TSO6 = 4,
    SM_NET_OFFLOAD_ECN = 8,
    SM_NET_OFFLOAD_ALL = 15,
};

#define SM_NET_MAX_MTU 65520
#define SM_NET_MIN_FRAME 14
/* An Ethernet header with a tag, and the largest IP packet (a TSO one). */
#define SM_NET_MAX_FRAME (18 + 65535 + 40)

struct sm_net;
struct sm_virtio;

/* The device's side, for the backend to call. */
struct sm_net_port {
    /* False: no buffers; keep the frame, pull comes. Frames for a guest whose
     * driver does not run are taken and lost. */
    bool (*rx)(void *dev, const struct sm_net_hdr *hdr, const void *frame, size_t len);
    void (*flush)(void *dev);           /* the last rx of a batch was made */
    void (*writable)(void *dev);        /* after tx said -EAGAIN */
    void (*gone)(void *dev, const char *why); /* no frame will ever come; once */
    void *dev;
};

struct sm_net_ops {
    const char *type;
    /* The driver runs and takes frames with these offloads; or stopped. */
    void (*start)(struct sm_net *net, unsigned offloads);
    void (*stop)(struct sm_net *net);
    /* iov[0] is a checked struct sm_net_hdr, the rest the frame. 0: taken (or
     * lost); -EAGAIN: not now, writable comes. */
    int (*tx)(struct sm_net *net, const struct iovec *iov, unsigned n, size_t bytes);
    void (*tx_done)(struct sm_net *net); /* the last tx of a batch was made; may be NULL */
    void (*pull)(struct sm_net *net);
    /* How many pairs of queues the driver uses from now on; may be NULL. */
    int (*use_pairs)(struct sm_net *net, unsigned pairs);
    /* NULL, or a backend that works on the rings of the first `pairs` itself, from
     * here to stop: no tx, no pull, no rx (vhost_net.c). */
    int (*take_rings)(struct sm_net *net, struct sm_virtio *v, unsigned pairs);
    void (*destroy)(struct sm_net *net);
};

/* Begins every backend. */
struct sm_net {
    const struct sm_net_ops *ops;
    unsigned offloads; /* what tx takes */
    struct sm_io *io;  /* the next two are set by the device */
    struct sm_net_port port;
};

/*
 * A stream socket: a length (u32, big-endian) in front of each frame, the
 * format of QEMU's stream backend and of passt. With vnet each frame begins
 * with its struct sm_net_hdr, offloads are possible, and a frame of four bytes
 * tells the peer the offloads (u32, little-endian) its frames may use. The
 * descriptor is non-blocking and becomes the backend's.
 */
int sm_net_stream_create(int fd, bool vnet, unsigned offloads, struct sm_net **out);
/* Connects to a unix socket; -errno. */
int sm_net_stream_connect(const char *path, bool vnet, unsigned offloads, struct sm_net **out);

#endif
