/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest's side of a virtio device, without a guest: plain memory in a
 * struct sm_mem with no hypervisor, register accesses through the device's
 * bus table, interrupts read from its eventfd. It can behave like a driver
 * (fake_start, fake_send, fake_wait) and, through the raw ring accessors, like
 * one that went mad.
 *
 * Waits end by an interrupt or fail after FAKE_WAIT_MS; nothing sleeps.
 */
#ifndef SM_FAKE_DRIVER_H
#define SM_FAKE_DRIVER_H

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dev/virtio.h"
#include "dev/virtio_mmio.h"
#include "event.h"
#include "mem.h"
#include "state.h"
#include "test.h"

#define FAKE_UNUSED __attribute__((unused))
#define FAKE_WAIT_MS 20000
#define FAKE_RAM_GPA 0x100000ull
#define FAKE_RAM_BYTES (16ull << 20)
#define FAKE_QUEUES 8

struct fake_queue {
    uint16_t size;
    uint64_t desc_gpa, avail_gpa, used_gpa;
    uint16_t avail, last_used; /* our idx; what we have taken from used */
    uint16_t next_desc;        /* descriptors are handed out round and round */
};

struct fake_driver {
    struct sm_mem mem;
    struct sm_io *io;
    struct sm_events events;
    struct sm_irq irq; /* the device's copy is the owner */
    struct sm_virtio_mmio *dev;
    uint64_t next_gpa;
    uint64_t features;
    struct fake_queue queues[FAKE_QUEUES];
};

struct fake_buf {
    uint64_t gpa;
    uint32_t len;
    bool write;
};

/* Memory, threads and interrupt; env is what a device is created from. */
static FAKE_UNUSED struct sm_virtio_env fake_env(struct fake_driver *d, const char *name)
{
    struct sm_mem_desc ram = { .gpa = FAKE_RAM_GPA,
                               .len_bytes = FAKE_RAM_BYTES,
                               .kind = SM_MEM_ANON };

    memset(d, 0, sizeof(*d));
    sm_mem_init(&d->mem, NULL);
    if (sm_mem_map(&d->mem, &ram) || sm_io_create(&d->io, name) ||
        sm_events_init(&d->events) || sm_irq_open(&d->irq, NULL, 5))
        abort();
    d->next_gpa = FAKE_RAM_GPA;
    return (struct sm_virtio_env){
        .mem = &d->mem, .io = d->io, .events = &d->events, .irq = d->irq, .name = name
    };
}

static FAKE_UNUSED void fake_destroy(struct fake_driver *d)
{
    if (d->dev) {
        struct sm_device *dev = sm_virtio_mmio_device(d->dev);

        dev->ops->destroy(dev);
    } else {
        sm_irq_close(&d->irq);
    }
    sm_io_destroy(d->io);
    sm_events_destroy(&d->events);
    sm_mem_destroy(&d->mem);
}

static FAKE_UNUSED void *fake_ptr(struct fake_driver *d, uint64_t gpa)
{
    return sm_mem_ptr(&d->mem, gpa, 1);
}

/* Guest memory that nobody else has; page aligned. */
static FAKE_UNUSED uint64_t fake_alloc(struct fake_driver *d, uint64_t bytes)
{
    uint64_t gpa = d->next_gpa;

    d->next_gpa += (bytes + 4095) & ~4095ull;
    if (d->next_gpa > FAKE_RAM_GPA + FAKE_RAM_BYTES)
        abort();
    return gpa;
}

static FAKE_UNUSED uint32_t fake_read(struct fake_driver *d, uint64_t reg)
{
    return (uint32_t)sm_virtio_mmio_bus_ops.read(d->dev, reg, 4);
}

static FAKE_UNUSED void fake_write(struct fake_driver *d, uint64_t reg, uint32_t value)
{
    sm_virtio_mmio_bus_ops.write(d->dev, reg, 4, value);
}

static FAKE_UNUSED uint32_t fake_status(struct fake_driver *d)
{
    return fake_read(d, 0x70);
}

static FAKE_UNUSED uint64_t fake_offered(struct fake_driver *d)
{
    uint64_t low, high;

    fake_write(d, 0x14, 0);
    low = fake_read(d, 0x10);
    fake_write(d, 0x14, 1);
    high = fake_read(d, 0x10);
    return low | high << 32;
}

/* Reset to FEATURES_OK; false when the device refuses the features. */
static FAKE_UNUSED bool fake_negotiate(struct fake_driver *d, uint64_t features)
{
    fake_write(d, 0x70, 0);
    fake_write(d, 0x70, SM_VIRTIO_ACKNOWLEDGE);
    fake_write(d, 0x70, SM_VIRTIO_ACKNOWLEDGE | SM_VIRTIO_DRIVER);
    fake_write(d, 0x24, 0);
    fake_write(d, 0x20, (uint32_t)features);
    fake_write(d, 0x24, 1);
    fake_write(d, 0x20, (uint32_t)(features >> 32));
    fake_write(d, 0x70, SM_VIRTIO_ACKNOWLEDGE | SM_VIRTIO_DRIVER | SM_VIRTIO_FEATURES_OK);
    d->features = features;
    memset(d->queues, 0, sizeof(d->queues));
    return fake_status(d) & SM_VIRTIO_FEATURES_OK;
}

/* Point the device at rings anywhere. */
static FAKE_UNUSED void fake_queue_at(struct fake_driver *d, unsigned q, uint32_t size,
                                      uint64_t desc, uint64_t avail, uint64_t used)
{
    fake_write(d, 0x30, q);
    fake_write(d, 0x38, size);
    fake_write(d, 0x80, (uint32_t)desc);
    fake_write(d, 0x84, (uint32_t)(desc >> 32));
    fake_write(d, 0x90, (uint32_t)avail);
    fake_write(d, 0x94, (uint32_t)(avail >> 32));
    fake_write(d, 0xa0, (uint32_t)used);
    fake_write(d, 0xa4, (uint32_t)(used >> 32));
    fake_write(d, 0x44, 1);
    if (q < FAKE_QUEUES)
        d->queues[q] = (struct fake_queue){
            .size = (uint16_t)size, .desc_gpa = desc, .avail_gpa = avail, .used_gpa = used
        };
}

static FAKE_UNUSED void fake_queue(struct fake_driver *d, unsigned q, uint16_t size)
{
    uint64_t desc = fake_alloc(d, 16ull * size), avail = fake_alloc(d, 6 + 2ull * size);
    uint64_t used = fake_alloc(d, 6 + 8ull * size);

    memset(fake_ptr(d, desc), 0, 16ull * size);
    memset(fake_ptr(d, avail), 0, 6 + 2ull * size);
    memset(fake_ptr(d, used), 0, 6 + 8ull * size);
    fake_queue_at(d, q, size, desc, avail, used);
}

static FAKE_UNUSED void fake_driver_ok(struct fake_driver *d)
{
    fake_write(d, 0x70, fake_status(d) | SM_VIRTIO_DRIVER_OK);
}

/* All of it: negotiate, `queues` queues of `size`, DRIVER_OK. */
static FAKE_UNUSED void fake_start(struct fake_driver *d, uint64_t features,
                                   unsigned queues, uint16_t size)
{
    CHECK(fake_negotiate(d, features | SM_VIRTIO_F_VERSION_1));
    for (unsigned q = 0; q < queues; q++)
        fake_queue(d, q, size);
    fake_driver_ok(d);
}

/* Raw ring fields. */
static FAKE_UNUSED struct sm_virtq_desc *fake_desc(struct fake_driver *d, unsigned q,
                                                   uint16_t i)
{
    return (struct sm_virtq_desc *)fake_ptr(d, d->queues[q].desc_gpa) + i;
}

static FAKE_UNUSED uint16_t *fake_avail(struct fake_driver *d, unsigned q)
{
    return fake_ptr(d, d->queues[q].avail_gpa);
}

static FAKE_UNUSED uint16_t *fake_used(struct fake_driver *d, unsigned q)
{
    return fake_ptr(d, d->queues[q].used_gpa);
}

static FAKE_UNUSED uint16_t fake_used_idx(struct fake_driver *d, unsigned q)
{
    return __atomic_load_n(fake_used(d, q) + 1, __ATOMIC_SEQ_CST);
}

/* Make a head available, without a kick. */
static FAKE_UNUSED void fake_publish(struct fake_driver *d, unsigned q, uint16_t head)
{
    struct fake_queue *fq = &d->queues[q];
    uint16_t *avail = fake_avail(d, q);

    __atomic_store_n(&avail[2 + fq->avail % fq->size], head, __ATOMIC_RELAXED);
    fq->avail++;
    __atomic_store_n(&avail[1], fq->avail, __ATOMIC_SEQ_CST);
}

/* Kick as a driver does: only when the device wants it (2.7.10). */
static FAKE_UNUSED void fake_kick(struct fake_driver *d, unsigned q)
{
    struct fake_queue *fq = &d->queues[q];
    uint16_t *used = fake_used(d, q);
    bool wanted;

    if (d->features & SM_VIRTIO_F_EVENT_IDX) {
        uint16_t event = __atomic_load_n(used + 2 + 4 * fq->size, __ATOMIC_SEQ_CST);

        /* one buffer a kick */
        wanted = (uint16_t)(fq->avail - event - 1) < 1;
    } else {
        wanted = !(__atomic_load_n(used, __ATOMIC_SEQ_CST) & SM_VIRTQ_USED_NO_NOTIFY);
    }
    if (wanted)
        fake_write(d, SM_VIRTIO_MMIO_NOTIFY, q);
}

/* A chain of buffers, direct or through an indirect table; published and
 * kicked. Returns its head. */
static FAKE_UNUSED uint16_t fake_send(struct fake_driver *d, unsigned q,
                                      const struct fake_buf *bufs, unsigned n)
{
    struct fake_queue *fq = &d->queues[q];
    bool indirect = d->features & SM_VIRTIO_F_INDIRECT_DESC && n > 1;
    uint16_t head = fq->next_desc % fq->size;
    struct sm_virtq_desc *table = NULL;
    uint64_t table_gpa = 0;

    if (indirect) {
        table_gpa = fake_alloc(d, n * sizeof(*table));
        table = fake_ptr(d, table_gpa);
        *fake_desc(d, q, head) =
            (struct sm_virtq_desc){ table_gpa, (uint32_t)(n * sizeof(*table)),
                                    SM_VIRTQ_DESC_INDIRECT, 0 };
    }
    for (unsigned i = 0; i < n; i++) {
        uint16_t at = indirect ? (uint16_t)i : (uint16_t)((head + i) % fq->size);
        uint16_t next =
            indirect ? (uint16_t)(i + 1) : (uint16_t)((head + i + 1) % fq->size);
        uint16_t flags = (bufs[i].write ? SM_VIRTQ_DESC_WRITE : 0) |
                         (i + 1 < n ? SM_VIRTQ_DESC_NEXT : 0);

        *(indirect ? &table[at] : fake_desc(d, q, at)) =
            (struct sm_virtq_desc){ bufs[i].gpa, bufs[i].len, flags, next };
    }
    fq->next_desc = (uint16_t)(fq->next_desc + (indirect ? 1 : n));
    fake_publish(d, q, head);
    fake_kick(d, q);
    return head;
}

/* Wait for one interrupt; its causes, acknowledged (0: it was for an earlier
 * life), or -1 after FAKE_WAIT_MS. */
static FAKE_UNUSED int fake_interrupt(struct fake_driver *d)
{
    struct pollfd p = { .fd = d->irq.fd, .events = POLLIN };
    uint32_t isr;
    uint64_t n;

    if (poll(&p, 1, FAKE_WAIT_MS) != 1 || read(d->irq.fd, &n, sizeof(n)) != sizeof(n))
        return -1;
    isr = fake_read(d, 0x60);
    fake_write(d, 0x64, isr);
    return (int)isr;
}

/* The next used entry, asking for interrupts as a driver does. False after
 * FAKE_WAIT_MS, or when the device needs a reset. */
static FAKE_UNUSED bool fake_wait(struct fake_driver *d, unsigned q, uint32_t *id,
                                  uint32_t *len)
{
    struct fake_queue *fq = &d->queues[q];
    uint16_t *avail = fake_avail(d, q);
    uint32_t *elem;

    for (;;) {
        /* Our wish first, then look again: the partner of should_notify. */
        __atomic_store_n(&avail[2 + fq->size], fq->last_used, __ATOMIC_SEQ_CST);
        if (fake_used_idx(d, q) != fq->last_used)
            break;
        if (fake_status(d) & SM_VIRTIO_NEEDS_RESET)
            return false;
        if (fake_interrupt(d) < 0 && fake_used_idx(d, q) == fq->last_used)
            return false;
    }
    elem = (uint32_t *)(fake_used(d, q) + 2) + 2 * (fq->last_used % fq->size);
    fq->last_used++;
    if (id)
        *id = elem[0];
    if (len)
        *len = elem[1];
    return true;
}

/* Wait until the device has given up on us. */
static FAKE_UNUSED bool fake_wait_dead(struct fake_driver *d)
{
    while (!(fake_status(d) & SM_VIRTIO_NEEDS_RESET))
        if (fake_interrupt(d) < 0)
            return false;
    return true;
}

static int fake_nothing(void *arg)
{
    (void)arg;
    return 0;
}

/* The I/O thread has done what was asked of it before. */
static FAKE_UNUSED void fake_settle(struct fake_driver *d)
{
    /* Twice: a call is served after the callbacks of one round, and a
     * callback may have kicked its own queue. */
    for (int i = 0; i < 4; i++)
        sm_io_call(d->io, fake_nothing, NULL);
}

/* Hold, save, and hand the state over. */
static FAKE_UNUSED void fake_save(struct fake_driver *d, struct sm_state_writer *w)
{
    struct sm_device *dev = sm_virtio_mmio_device(d->dev);

    sm_state_writer_init(w);
    sm_io_hold(d->io);
    CHECK_EQ(dev->ops->save(dev, w), 0);
    sm_io_release(d->io);
}

static FAKE_UNUSED int fake_load(struct fake_driver *d, const void *buf, size_t len)
{
    struct sm_device *dev = sm_virtio_mmio_device(d->dev);
    struct sm_state_reader r;
    int err;

    sm_state_reader_init(&r, buf, len);
    sm_io_hold(d->io);
    err = dev->ops->load(dev, &r);
    sm_io_release(d->io);
    return err;
}

#endif
