/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What every virtio device shares: feature negotiation, the life of the
 * device and of its queues, interrupts, save and load. The registers in front
 * of it are in virtio_mmio.h; a device type is a struct that begins with a
 * struct sm_virtio and a static const struct sm_virtio_class.
 *
 *   vCPU threads                         the device's I/O thread
 *   registers → status machine ─ call ─▶ start, stop  (nothing of the old life
 *   kick → eventfd of the queue ───────▶ class->kick   runs after a reset)
 *                    ISR, interrupt ◀─── push, notify, fail
 *
 * Threads. `lock` serialises register accesses of vCPU threads and owns what
 * the driver sets up; the I/O thread never takes it (a vCPU waits for the I/O
 * thread while it holds it). Queues and everything of a device type belong to
 * the I/O thread. status, isr and generation are atomic. While vCPUs are
 * parked and the I/O thread is held, save, load and reset may come from any
 * one thread.
 */
#ifndef SM_VIRTIO_H
#define SM_VIRTIO_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "dev/device.h"
#include "dev/virtqueue.h"
#include "io.h"
#include "irq.h"

struct sm_events;
struct sm_mem;
struct sm_virtio;
struct sm_virtio_mmio;

#define SM_VIRTIO_QUEUES 17 /* most queues of a device: a card of eight pairs */
#define SM_VIRTIO_CONFIG_BYTES 64

/* Device status, 2.1. */
enum {
    SM_VIRTIO_ACKNOWLEDGE = 1,
    SM_VIRTIO_DRIVER = 2,
    SM_VIRTIO_DRIVER_OK = 4,
    SM_VIRTIO_FEATURES_OK = 8,
    SM_VIRTIO_NEEDS_RESET = 64,
    SM_VIRTIO_FAILED = 128,
};

/* Feature bits of every device, 6. */
#define SM_VIRTIO_F_INDIRECT_DESC (1ull << 28)
#define SM_VIRTIO_F_EVENT_IDX (1ull << 29)
#define SM_VIRTIO_F_VERSION_1 (1ull << 32)
#define SM_VIRTIO_F_COMMON                                                               \
    (SM_VIRTIO_F_INDIRECT_DESC | SM_VIRTIO_F_EVENT_IDX | SM_VIRTIO_F_VERSION_1)

/* ISR, 4.2.2. */
enum { SM_VIRTIO_ISR_QUEUE = 1, SM_VIRTIO_ISR_CONFIG = 2 };

/*
 * What a device is built from. mem, io and events outlive it. irq becomes the
 * device's on success (closed when it is destroyed) and stays the caller's on
 * failure. name is copied.
 */
struct sm_virtio_env {
    struct sm_mem *mem;
    struct sm_io *io;
    struct sm_events *events; /* may be NULL */
    struct sm_irq irq;
    const char *name; /* "blk0" */
    struct sm_trace *trace; /* may be NULL */
};

/*
 * One device type. start, kick and stop run on the I/O thread, or with it
 * held. Between stop and start a queue gives nothing. Optional ones are NULL.
 */
struct sm_virtio_class {
    struct sm_device_ops device; /* SM_VIRTIO_DEVICE_OPS("virtio-…") */
    uint32_t id;                 /* 5 */
    unsigned queues;
    uint16_t queue_size;                /* most entries, for all queues */
    void (*start)(struct sm_virtio *v); /* DRIVER_OK; every queue is kicked next */
    void (*stop)(struct sm_virtio *v);  /* reset, or before load and destroy */
    void (*kick)(struct sm_virtio *v, unsigned queue);
    void (*save)(struct sm_virtio *v, struct sm_state_writer *w);
    int (*load)(struct sm_virtio *v, struct sm_state_reader *r);
    void (*destroy)(struct sm_virtio *v); /* frees the struct that holds v */
};

struct sm_virtio_queue {
    struct sm_virtio *virtio;
    unsigned index;
    int kick_fd; /* eventfd: ioeventfd, QueueNotify, or ourselves */
    struct sm_io_watch watch;
    bool taken; /* another works on its ring, from start to stop; its kicks are not ours */
    struct sm_virtq vq;
    /* what the driver set, under lock; taken over when the queue is started */
    uint16_t size;
    bool ready;
    uint64_t desc_gpa, avail_gpa, used_gpa;
};

struct sm_virtio {
    const struct sm_virtio_class *class;
    char name[24];
    struct sm_mem *mem;
    struct sm_io *io;
    struct sm_events *events;
    struct sm_irq irq;
    pthread_mutex_t lock;
    uint64_t offered, features; /* offered is constant; features under lock */
    uint8_t status;             /* atomic */
    uint8_t isr;                /* atomic */
    uint32_t generation;        /* atomic; config never changes so far */
    uint64_t requests;          /* atomic: chains given back */
    struct sm_trace *trace;     /* may be NULL */
    bool traces_itself;         /* the device type tells more of a request */
    bool running;               /* I/O thread */
    bool taken;                 /* atomic: some queue is */
    uint8_t config[SM_VIRTIO_CONFIG_BYTES];
    unsigned config_bytes;
    unsigned queue_count; /* set before init, or the class's */
    struct sm_virtio_queue queues[SM_VIRTIO_QUEUES];
};

/* For device types. The struct is zeroed before. */
int sm_virtio_init(struct sm_virtio *v, const struct sm_virtio_env *env,
                   const struct sm_virtio_class *class, uint64_t features);
/* After stop; the irq is left alone. */
void sm_virtio_fini(struct sm_virtio *v);

/* I/O thread: the virtqueue verbs. What the driver spoilt becomes
 * DEVICE_NEEDS_RESET, and pop answers 0 until the reset. */
bool sm_virtio_pop(struct sm_virtio *v, unsigned queue, struct sm_virtq_chain *chain);
void sm_virtio_push(struct sm_virtio *v, unsigned queue, uint16_t head, uint32_t written);
void sm_virtio_notify(struct sm_virtio *v, unsigned queue);
/* Kicks are not needed while a queue is being worked on; with them on again,
 * true means that there is more already. */
void sm_virtio_kicks_off(struct sm_virtio *v, unsigned queue);
bool sm_virtio_kicks_on(struct sm_virtio *v, unsigned queue);
/* Come back to class->kick soon, after other work of this thread. */
void sm_virtio_again(struct sm_virtio *v, unsigned queue);
/* For start: the rings of a queue are worked on by another, who has its kick_fd and
 * the interrupt's descriptor; it stops before class->stop returns. A device with such
 * a queue is not saved. -ENOTSUP: an interrupt has no descriptor here. */
int sm_virtio_take(struct sm_virtio *v, unsigned queue);
/* The driver broke the rules (2.1.2): what is a static sentence. */
void sm_virtio_fail(struct sm_virtio *v, unsigned queue, const char *what);
/* Whether the driver negotiated it; constant while running. */
static inline bool sm_virtio_has(const struct sm_virtio *v, uint64_t feature)
{
    return (v->features & feature) == feature;
}

/* For the transport, with lock held. */
void sm_virtio_set_status(struct sm_virtio *v, uint8_t value);
void sm_virtio_queue_ready(struct sm_virtio *v, unsigned queue, bool ready);
void sm_virtio_kick(struct sm_virtio *v, unsigned queue); /* no lock needed */

/* For the holder of the VM, everything held. */
void sm_virtio_reset(struct sm_virtio *v);
void sm_virtio_save(struct sm_virtio *v, struct sm_state_writer *w);
int sm_virtio_load(struct sm_virtio *v, struct sm_state_reader *r);

#endif
