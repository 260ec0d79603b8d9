/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Inside of virtio-vsock: the connections and what its three files share.
 * virtio_vsock.c speaks the packets, virtio_vsock_conn.c the sockets of streams,
 * virtio_vsock_host.c gets host clients as far as a stream.
 * Everything here belongs to the I/O thread.
 */
#ifndef SM_VIRTIO_VSOCK_CONN_H
#define SM_VIRTIO_VSOCK_CONN_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/un.h>

#include "dev/virtio_vsock.h"

#define SM_VSOCK_BUCKETS 256 /* a power of two */
#define SM_VSOCK_RESETS 2048 /* RSTs that wait for a buffer; see tx_may_go */
#define SM_VSOCK_RX_BATCH 64 /* packets of one read */
#define SM_VSOCK_RX_IOV (2 * SM_VIRTQ_SEGS)

/* 5.10.6 */
enum sm_vsock_op {
    SM_VSOCK_REQUEST = 1,
    SM_VSOCK_RESPONSE = 2,
    SM_VSOCK_RST = 3,
    SM_VSOCK_SHUTDOWN = 4,
    SM_VSOCK_RW = 5,
    SM_VSOCK_CREDIT_UPDATE = 6,
    SM_VSOCK_CREDIT_REQUEST = 7,
};
enum { SM_VSOCK_TYPE_STREAM = 1 };
enum { SM_VSOCK_SHUT_RCV = 1, SM_VSOCK_SHUT_SEND = 2, SM_VSOCK_SHUT_BOTH = 3 };

struct sm_vsock_header {
    uint64_t src_cid, dst_cid;
    uint32_t src_port, dst_port, len;
    uint16_t type, op;
    uint32_t flags, buf_alloc, fwd_cnt;
} __attribute__((packed));
_Static_assert(sizeof(struct sm_vsock_header) == 44, "5.10.6");

/*
 * accept ─▶ HELLO ─ CONNECT line ─▶ REQUESTED ─ RESPONSE ─▶ OPEN ◀─ guest's REQUEST
 * OPEN ─ both ways shut by the host ─▶ CLOSING ─ guest's RST ─▶ freed
 * OPEN ─ shut or reset by the guest ─▶ freed, or LINGER until the host has read all
 */
enum sm_vsock_state {
    SM_VSOCK_HELLO,     /* a host client that has not said where to; no ports yet */
    SM_VSOCK_REQUESTED, /* the guest has not answered yet */
    SM_VSOCK_OPEN,
    SM_VSOCK_CLOSING, /* no socket any more */
    SM_VSOCK_LINGER,  /* no ports any more */
};

struct sm_vsock;

struct sm_vsock_conn {
    struct sm_vsock *dev;
    enum sm_vsock_state state;
    int fd; /* -1 when closed */
    struct sm_io_watch watch;
    uint32_t host_port, guest_port;
    uint64_t deadline_ns; /* HELLO and REQUESTED */

    /* Host to guest: bytes sent, and the guest's last word on its buffer.
     * All counters are free running, modulo 2^32 (5.10.6.3). */
    uint32_t sent, peer_fwd, peer_alloc;
    bool asked;  /* CREDIT_REQUEST went out since the credit ran out */
    size_t want; /* how much to read at once */

    /* Guest to host: bytes received, passed on, and what of it the guest
     * knows. received - forwarded bytes wait in buf. */
    uint32_t received, forwarded, told;
    uint8_t *buf; /* ring of SM_VSOCK_BUF_BYTES while not empty */
    size_t buf_head, buf_count;

    unsigned pending; /* bit 1 << op: packets to send */
    unsigned shut;    /* SHUT_* flags that the host has earned */
    bool request_sent;
    bool readable, writable; /* edge-triggered: until EAGAIN */
    bool hung_up;            /* the host's end is gone; what it wrote may not be */
    bool guest_sent_all, guest_reads_no_more;

    bool hashed, queued; /* in a bucket; in the ready list */
    struct sm_vsock_conn *next_in_bucket;
    struct sm_vsock_conn *prev, *next;             /* all */
    struct sm_vsock_conn *prev_ready, *next_ready; /* those with something to send */
};

struct sm_vsock_reset {
    uint32_t host_port, guest_port;
    uint16_t type;
};

struct sm_vsock {
    struct sm_virtio virtio;
    uint64_t guest_cid;
    char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
    int listen_fd; /* -1: no path */
    struct sm_io_watch listen_watch;
    struct sm_io_timer timer; /* deadlines, and the end of a pause of accepting */

    struct sm_vsock_conn *first; /* all */
    unsigned count;
    struct sm_vsock_conn *buckets[SM_VSOCK_BUCKETS];
    struct sm_vsock_conn *ready_first, *ready_last;
    uint32_t next_port;

    struct sm_vsock_reset resets[SM_VSOCK_RESETS]; /* ring */
    unsigned reset_head, reset_count;
    bool stalled;    /* a fault on demand: nothing moves */
    bool tx_stalled; /* the guest's packets wait until resets have gone */

    /* After a load: the guest must hear of it before anything else. */
    bool reset_event; /* TRANSPORT_RESET waits for a buffer */
    bool gated;       /* sent; until the guest gives the next event buffer */
    uint16_t event_seen;

    /* scratch of one read into many packets */
    struct iovec rx_iov[SM_VSOCK_RX_IOV], rx_data[SM_VSOCK_RX_IOV];
    struct {
        uint16_t head;
        unsigned iov, count; /* in rx_iov */
        size_t room;
    } rx[SM_VSOCK_RX_BATCH];
};

/* virtio_vsock.c */
/* Send what waits, as far as there are buffers. Not from within itself. */
void sm_vsock_pump(struct sm_vsock *d);
void sm_vsock_reset_later(struct sm_vsock *d, uint32_t host_port, uint32_t guest_port,
                          uint16_t type);

/* virtio_vsock_host.c */
int sm_vsock_listen(struct sm_vsock *d, const char *path);
int sm_vsock_unlisten(void *d);
/* A client in HELLO has said something. May free it. */
void sm_vsock_hello(struct sm_vsock_conn *c);
/* The guest accepted a host client's stream. May free it. */
void sm_vsock_accepted(struct sm_vsock_conn *c);

/* virtio_vsock_conn.c */
/* A connection around fd, which is closed when there is none; NULL then. */
struct sm_vsock_conn *sm_vsock_new(struct sm_vsock *d, int fd, enum sm_vsock_state state);
void sm_vsock_hash(struct sm_vsock_conn *c); /* its ports are known */
struct sm_vsock_conn *sm_vsock_find(struct sm_vsock *d, uint32_t host_port,
                                    uint32_t guest_port);
/* The guest wants a stream to host port; -errno refuses it. */
int sm_vsock_open(struct sm_vsock *d, uint32_t host_port, uint32_t guest_port,
                  struct sm_vsock_conn **out);
/* Both ends forget it: the socket is closed, the guest gets a RST. */
void sm_vsock_abort(struct sm_vsock_conn *c);
/* The guest is done with it; bytes on their way to the host still arrive. */
void sm_vsock_guest_gone(struct sm_vsock_conn *c);
void sm_vsock_free(struct sm_vsock_conn *c);
void sm_vsock_free_all(struct sm_vsock *d);

/* Bytes the guest has room for. */
uint32_t sm_vsock_credit(const struct sm_vsock_conn *c);
/* There is data that may be read and sent. */
bool sm_vsock_can_read(const struct sm_vsock_conn *c);
/* Read for the guest: bytes, or 0 when there are none now. */
size_t sm_vsock_read(struct sm_vsock_conn *c, const struct iovec *iov, unsigned count);
/* From the guest: into the socket, the rest into the buffer. -EPROTO: it had
 * no credit for that. The iovecs are used up. */
int sm_vsock_write(struct sm_vsock_conn *c, struct iovec *iov, unsigned count,
                   size_t len);
void sm_vsock_guest_shutdown(struct sm_vsock_conn *c, uint32_t flags);
/* The SHUTDOWN that says both ways has gone out. */
void sm_vsock_closing(struct sm_vsock_conn *c);

void sm_vsock_want(struct sm_vsock_conn *c, enum sm_vsock_op op); /* a packet to send */
void sm_vsock_ready(struct sm_vsock_conn *c); /* if it has something to send */
void sm_vsock_unready(struct sm_vsock_conn *c);

#endif
