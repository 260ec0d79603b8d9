/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The lab's wire: many byte streams over one.
 *
 *   client --unix socket--+
 *   client --unix socket--+-- keeper --virtio-serial-- labd --+-- command
 *   TCP on loopback ------+                                   +-- TCP in the lab
 *
 * Everything is a frame: a fixed header and up to FRAME_MAX bytes. A channel
 * is one command or one TCP connection; the keeper gives the numbers (odd
 * ones for what starts outside, even ones for what starts in the lab).
 * Each stream of a channel has its own credit, so that a reader that stops
 * reading stalls only itself and no buffer grows past WINDOW_BYTES.
 *
 * One thread, poll(2), non-blocking descriptors. Both ends are built from the
 * same tree on the same machine: the header is in native byte order.
 */
#ifndef LAB_MUX_H
#define LAB_MUX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Machines that speak another version are left alone. */
#define LAB_PROTOCOL 2

#define FRAME_MAX (8u << 20)
#define WINDOW_BYTES (256u << 10)
#define CHUNK_BYTES (32u << 10)

enum frame_type {
    F_READY = 1, /* labd -> keeper: boot is over */
    F_OPEN,      /* client -> labd: run a command (see request.h) */
    F_OPENED,    /* the answer to OPEN, CONNECT, DIAL: it runs */
    F_FAIL,      /* the answer: int32 errno, then text */
    F_DATA,
    F_EOF,     /* no more data in this stream */
    F_BROKEN,  /* the stream's reader is gone: the writer shall see EPIPE */
    F_CREDIT,  /* uint32: so many more bytes of this stream may be sent */
    F_SIGNAL,  /* uint8 signal, uint8 whole group? */
    F_WINSIZE, /* uint16 rows, uint16 columns */
    F_EXIT,    /* int32 wait status: the channel's last word */
    F_CLOSE,   /* the peer is gone: tear the channel down */
    F_CONNECT, /* keeper -> labd: uint16 port of the lab's loopback */
    F_DIAL,    /* labd -> keeper: uint16 port of the caller's loopback */
    F_PUBLISH, /* client -> keeper: uint16 port outside, uint16 port inside */
    F_CLOCK,   /* keeper -> labd: int64 ns since 1970 */
    F_STOP,    /* client -> keeper -> labd: power off */
    F_KILL,    /* client -> keeper: power cut */
    F_STATUS,  /* client -> keeper: one F_TEXT comes back */
    F_TEXT,
};

struct frame {
    uint32_t chan;
    uint8_t type;
    uint8_t stream;
    uint16_t zero;
    uint32_t len;
};

/* A queue of bytes. */
struct buf {
    char *bytes;
    size_t start, len, cap;
};

int buf_add(struct buf *b, const void *data, size_t len);
void buf_take(struct buf *b, size_t len);
void buf_free(struct buf *b);

/* A framed, non-blocking descriptor. */
struct link {
    int fd;
    int err; /* once set, the link is dead */
    struct buf in, out;
};

void link_init(struct link *l, int fd);
void link_close(struct link *l);
/* Queues one frame and tries to send; errors show up in l->err. */
void link_send(struct link *l, uint32_t chan, int type, int stream,
               const void *data, size_t len);
void link_flush(struct link *l);
/* Reads what there is; end of file sets err to EPIPE. */
void link_fill(struct link *l);
/* The next whole frame, or false. *data is valid until the next link call. */
bool link_next(struct link *l, struct frame *f, const char **data);
/* The first (up to) four bytes of a frame, as a number. */
uint32_t frame_u32(const struct frame *f, const char *data);
short link_events(const struct link *l);

/* fd -> frames. */
struct src {
    int fd; /* -1: closed */
    uint8_t stream;
    bool keep; /* somebody else closes fd */
    uint32_t credit;
};

void src_init(struct src *s, int fd, int stream);
bool src_wants(const struct src *s);
/* Reads once and sends. Returns bytes moved, 0 when none were there, -1 when
 * the stream has ended (EOF was sent, fd closed). */
long src_pump(struct src *s, struct link *l, uint32_t chan);
void src_close(struct src *s);

/* frames -> fd. */
struct dst {
    int fd; /* -1: closed; what arrives is thrown away and acknowledged */
    uint8_t stream;
    bool eof;
    bool keep;   /* somebody else closes fd */
    bool socket; /* shut down at the end */
    bool shared; /* with other processes: stays in blocking mode */
    uint32_t unacked;
    struct buf buf;
};

void dst_init(struct dst *d, int fd, int stream);
void dst_add(struct dst *d, struct link *l, uint32_t chan, const void *data,
             size_t len);
void dst_eof(struct dst *d);
bool dst_wants(const struct dst *d);
/* Writes what it can; closes fd after the last byte of an ended stream. */
void dst_pump(struct dst *d, struct link *l, uint32_t chan);
void dst_close(struct dst *d);

int set_nonblock(int fd);

#endif
