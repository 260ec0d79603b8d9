/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A split virtqueue, seen from the device, with a hostile driver on the other
 * side (VIRTIO 1.2, 2.7).
 *
 *      descriptor table        available ring (driver writes)
 *      ┌──────────────┐        ┌───────┬─────┬──────────────┬────────────┐
 *      │ addr len f n │ ◀───── │ flags │ idx │ ring[size]   │ used_event │
 *      └──────────────┘        └───────┴─────┴──────────────┴────────────┘
 *      used ring (device writes)
 *      ┌───────┬─────┬────────────────────┬─────────────┐
 *      │ flags │ idx │ ring[size] {id,len}│ avail_event │
 *      └───────┴─────┴────────────────────┴─────────────┘
 *
 * Verbs: setup → pop (one chain as iovecs) → push (its used length) → notify?
 * and, when the ring is empty, kicks on → look once more → sleep.
 *
 * What the driver may do to us: anything, at any time, from another CPU.
 *   - The three rings are turned into pointers once, whole, at setup.
 *   - A descriptor is copied once and only the copy is looked at.
 *   - A chain ends after at most SM_VIRTQ_SEGS descriptors, a direct one after
 *     `size`; one level of indirect table, inside one region of RAM.
 *   - What is popped and not yet pushed never exceeds `size`.
 *   - Nonsense sets `fault`, and the queue gives nothing until set up again.
 * The bytes a chain points at may change under the reader: a device copies a
 * header before it checks it.
 *
 * Threads. One at a time: the device's I/O thread, or, while that is held,
 * whoever holds it. Rings are shared with the guest: index and flag fields are
 * accessed by __atomic only. Where a store has to be seen before a later load
 * (Dekker, with the driver's full barrier as partner) both are SEQ_CST, which
 * sanitizers understand and a fence is not.
 */
#ifndef SM_VIRTQUEUE_H
#define SM_VIRTQUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct sm_mem;

#define SM_VIRTQ_SIZE 256 /* most entries of a ring, a power of two */
#define SM_VIRTQ_SEGS 256 /* most buffers of a chain */

enum {
    SM_VIRTQ_DESC_NEXT = 1,
    SM_VIRTQ_DESC_WRITE = 2, /* device writes */
    SM_VIRTQ_DESC_INDIRECT = 4,
    SM_VIRTQ_AVAIL_NO_INTERRUPT = 1,
    SM_VIRTQ_USED_NO_NOTIFY = 1,
};

struct sm_virtq_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

struct sm_virtq {
    const struct sm_mem *mem;
    const char *fault; /* static text; dead until set up again */
    uint16_t size;     /* 0: not set up */
    bool event_idx, indirect;
    uint16_t next_avail; /* next available entry to take */
    uint16_t next_used;  /* next used entry to fill */
    uint16_t signalled;  /* next_used when the driver was last considered */
    uint64_t desc_gpa, avail_gpa, used_gpa;
    const uint8_t *desc;
    uint8_t *avail, *used;
};

/*
 * One request. The caller provides the array and sets iov and cap; pop fills
 * the rest. Readable buffers come first: iov[0 … out), then iov[out … out+in).
 */
struct sm_virtq_chain {
    struct iovec *iov;
    unsigned cap;
    uint16_t head;
    unsigned out, in; /* buffers the device reads, writes */
    uint64_t out_bytes, in_bytes;
};

/* size is a power of two up to SM_VIRTQ_SIZE; the addresses are aligned (2.7:
 * 16, 2 and 4 bytes). -EINVAL otherwise, -EFAULT when a ring is not in RAM. */
int sm_virtq_setup(struct sm_virtq *vq, const struct sm_mem *mem, uint16_t size,
                   uint64_t desc_gpa, uint64_t avail_gpa, uint64_t used_gpa,
                   bool event_idx, bool indirect);
void sm_virtq_clear(struct sm_virtq *vq);

/* 1: a chain; 0: none; -EBADMSG: the driver wrote nonsense, see fault;
 * -ENOBUFS: the chain has more buffers than chain->cap (it stays there). */
int sm_virtq_pop(struct sm_virtq *vq, struct sm_virtq_chain *chain);
/* Give the newest n chains back, as if never popped. */
void sm_virtq_unpop(struct sm_virtq *vq, unsigned n);
/* Done with a chain: `written` bytes of its writable part hold data. */
void sm_virtq_push(struct sm_virtq *vq, uint16_t head, uint32_t written);
/* The same in two steps, for buffers that the driver must see all at once. */
void sm_virtq_fill(struct sm_virtq *vq, uint16_t head, uint32_t written);
void sm_virtq_publish(struct sm_virtq *vq);
/* After one or more pushes: whether the driver wants an interrupt. */
bool sm_virtq_should_notify(struct sm_virtq *vq);

/* Tell the driver that no kick is needed (a hint). */
void sm_virtq_kicks_off(struct sm_virtq *vq);
/* Ask for a kick for the next buffer. True: there is already one, which will
 * not be kicked for; pop again. */
bool sm_virtq_kicks_on(struct sm_virtq *vq);
/* The same for the next buffer after those available now (sm_virtq_seen). True:
 * one has been added since. */
uint16_t sm_virtq_seen(const struct sm_virtq *vq);
bool sm_virtq_kicks_on_after(struct sm_virtq *vq, uint16_t seen);

/* Popped and not pushed yet. */
static inline unsigned sm_virtq_taken(const struct sm_virtq *vq)
{
    return (uint16_t)(vq->next_avail - vq->next_used);
}

/* Helpers over iovecs. Copies stop at the shorter side; the count is returned.
 * skip cuts `bytes` off the front in place and returns what is left of n. */
size_t sm_iov_read(const struct iovec *iov, unsigned n, void *buf, size_t len);
size_t sm_iov_write(const struct iovec *iov, unsigned n, const void *buf, size_t len);
unsigned sm_iov_skip(struct iovec **iov, unsigned n, size_t bytes);

#endif
