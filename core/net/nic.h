/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One network card of a guest, in sm-net: the worker's stream on one side, a
 * backend on the other, the policy in between.
 *
 *   worker ═ stream ═▶ parser ▶ policy ▶ capture ▶ backend     (out)
 *          ◀═════════ capture ◀ flows ◀──────────── backend     (in)
 *
 * Nothing reaches a backend but through sm_nic's own out path, and the policy
 * is in it: a worker that a guest has taken over is on the wrong side of it.
 *
 * Back pressure: out, the worker's stream is read only while the backend takes
 * frames and the rate allows; in, a bounded queue, and backends do not read
 * from the world while sm_nic_full.
 *
 * Threads: one.
 */
#ifndef SM_NET_NIC_H
#define SM_NET_NIC_H

#include "dev/net.h"
#include "capture.h"
#include "policy.h"
#include "resolver.h"
#include "round.h"

struct sm_nic;
struct sm_backend;

struct sm_backend_ops {
    const char *type;
    /* A frame of the guest that the policy let pass; writable memory. */
    void (*send)(struct sm_backend *b, const struct sm_net_hdr *hdr, uint8_t *frame, size_t len);
    void (*fill)(struct sm_backend *b, struct sm_poll *poll);
    void (*serve)(struct sm_backend *b, struct sm_poll *poll);
    void (*offloads)(struct sm_backend *b, unsigned offloads); /* of the guest; may be NULL */
    void (*destroy)(struct sm_backend *b);
    unsigned takes; /* SM_NET_OFFLOAD_* of frames it is sent */
};

struct sm_backend {
    const struct sm_backend_ops *ops;
    struct sm_nic *nic;
};

enum sm_nic_event_kind {
    SM_NIC_BLOCKED,   /* a new flow was refused: flow, why */
    SM_NIC_ASK,       /* flow waits for sm_nic_decide */
    SM_NIC_REBINDING, /* an answer was kept back: name, addr */
    SM_NIC_NAME,      /* a name may not be asked for: name */
    SM_NIC_GONE,      /* the backend cannot go on: why */
};

struct sm_nic_event {
    enum sm_nic_event_kind kind;
    const struct sm_flow *flow;
    const char *why, *name;
    struct sm_addr addr;
};

#define SM_NIC_REASONS 48
#define SM_NIC_SAID 64

struct sm_nic {
    char name[24];
    char path[108]; /* of the listening socket */
    int listen_fd, fd;
    unsigned offloads; /* what the guest's driver takes */
    unsigned mtu;
    bool vnet;  /* frames carry a struct sm_net_hdr */
    bool ready; /* the guest's addresses are set: connections may come */
    uint64_t ready_ns;
    struct sm_policy policy;
    struct sm_resolver resolver;
    struct sm_backend *backend;
    struct sm_captures captures;
    void (*event)(struct sm_nic *nic, const struct sm_nic_event *e, void *arg);
    void *arg;

    uint64_t now_ns;
    int listen_index, index;
    size_t in_at, in_len, out_at, out_len, out_cap;
    uint8_t *in, *out;
    unsigned repeats; /* flows with a SYN to repeat */
    uint64_t served[65536 / 64]; /* ports of the guest that have answered */
    uint32_t said[SM_NIC_SAID];  /* hashes of what was said already */
    unsigned next_said;
    uint64_t rate_bytes, rate_packets; /* a second; 0: no limit */
    int64_t tokens_bytes, tokens_packets;
    uint64_t tokens_ns;

    uint64_t out_frames, out_bytes, in_frames, in_bytes, dns_questions;
    uint64_t in_dropped; /* the queue was full, or no guest */
    struct {
        const char *why;
        uint64_t count;
    } drops[SM_NIC_REASONS];
};

/* Listens at path; -errno. The policy's identity and the rest are the caller's
 * to fill in before the first round. */
int sm_nic_create(const char *name, const char *path, struct sm_nic **out);
void sm_nic_destroy(struct sm_nic *nic);
void sm_nic_fill(struct sm_nic *nic, struct sm_poll *poll);
void sm_nic_serve(struct sm_nic *nic, struct sm_poll *poll);

/* For backends: a frame for the guest; whether it should wait with more. */
void sm_nic_deliver(struct sm_nic *nic, const struct sm_net_hdr *hdr, const uint8_t *frame,
                    size_t len);
bool sm_nic_full(const struct sm_nic *nic);
/* Fill in a checksum left to us; the header then says nothing any more. */
void sm_nic_finish_csum(struct sm_net_hdr *hdr, uint8_t *frame, const struct sm_packet *p);

/* The script's answer for a flow. -ESRCH: it is gone. */
int sm_nic_decide(struct sm_nic *nic, uint32_t flow_id, bool allow);

#endif
