/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The virtio-mmio register page; see virtio_mmio.h. Register numbers and
 * behaviour are those of VIRTIO 1.2, 4.2.2. Handlers run on vCPU threads,
 * under the device's lock, but for those a running driver uses often
 * (QueueNotify, InterruptStatus, InterruptACK), which are atomic.
 */
#include "dev/virtio_mmio.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dev/virtio.h"
#include "state.h"

enum {
    MAGIC = 0x000,
    VERSION = 0x004,
    DEVICE_ID = 0x008,
    VENDOR_ID = 0x00c,
    DEVICE_FEATURES = 0x010,
    DEVICE_FEATURES_SEL = 0x014,
    DRIVER_FEATURES = 0x020,
    DRIVER_FEATURES_SEL = 0x024,
    QUEUE_SEL = 0x030,
    QUEUE_NUM_MAX = 0x034,
    QUEUE_NUM = 0x038,
    QUEUE_READY = 0x044,
    QUEUE_NOTIFY = SM_VIRTIO_MMIO_NOTIFY,
    INTERRUPT_STATUS = 0x060,
    INTERRUPT_ACK = 0x064,
    STATUS = 0x070,
    QUEUE_DESC_LOW = 0x080,
    QUEUE_DESC_HIGH = 0x084,
    QUEUE_DRIVER_LOW = 0x090,
    QUEUE_DRIVER_HIGH = 0x094,
    QUEUE_DEVICE_LOW = 0x0a0,
    QUEUE_DEVICE_HIGH = 0x0a4,
    SHM_LEN_LOW = 0x0b0,
    SHM_LEN_HIGH = 0x0b4,
    SHM_BASE_LOW = 0x0b8,
    SHM_BASE_HIGH = 0x0bc,
    CONFIG_GENERATION = 0x0fc,
    CONFIG = 0x100,
};

#define MAGIC_VALUE 0x74726976u  /* "virt" */
#define VENDOR_VALUE 0x20206d73u /* "sm  " */

struct sm_virtio_mmio {
    struct sm_device device;
    struct sm_virtio *virtio;
    /* under virtio->lock */
    uint32_t device_features_sel, driver_features_sel, queue_sel;
};

static uint32_t half(uint64_t value, uint32_t sel)
{
    return sel > 1 ? 0 : (uint32_t)(value >> (32 * sel));
}

static void set_half(uint64_t *value, bool high, uint32_t part)
{
    unsigned shift = high ? 32 : 0;

    *value = (*value & ~(0xffffffffull << shift)) | (uint64_t)part << shift;
}

/* The selected queue, or NULL. */
static struct sm_virtio_queue *selected(struct sm_virtio_mmio *m)
{
    struct sm_virtio *v = m->virtio;

    return m->queue_sel < v->queue_count ? &v->queues[m->queue_sel] : NULL;
}

static uint64_t read_config(const struct sm_virtio *v, uint64_t off, unsigned len)
{
    uint64_t value = 0;

    if (off < v->config_bytes) {
        unsigned left = v->config_bytes - (unsigned)off;

        memcpy(&value, v->config + off, len < left ? len : left);
    }
    return value;
}

static uint32_t read_register(struct sm_virtio_mmio *m, uint64_t off)
{
    struct sm_virtio *v = m->virtio;
    struct sm_virtio_queue *q = selected(m);

    switch (off) {
    case MAGIC:
        return MAGIC_VALUE;
    case VERSION:
        return 2;
    case DEVICE_ID:
        return v->class->id;
    case VENDOR_ID:
        return VENDOR_VALUE;
    case DEVICE_FEATURES:
        return half(v->offered, m->device_features_sel);
    case QUEUE_NUM_MAX:
        return q ? v->class->queue_size : 0;
    case QUEUE_READY:
        return q && q->ready;
    case STATUS:
        return __atomic_load_n(&v->status, __ATOMIC_RELAXED);
    case SHM_LEN_LOW:
    case SHM_LEN_HIGH:
    case SHM_BASE_LOW:
    case SHM_BASE_HIGH:
        return 0xffffffff; /* 4.2.2: no region of this id */
    case CONFIG_GENERATION:
        return __atomic_load_n(&v->generation, __ATOMIC_RELAXED);
    default:
        return 0;
    }
}

static uint64_t mmio_read(void *dev, uint64_t off, unsigned len)
{
    struct sm_virtio_mmio *m = dev;
    uint32_t value;

    if (off >= CONFIG)
        return read_config(m->virtio, off - CONFIG, len);
    if (len != 4)
        return 0;
    if (off == INTERRUPT_STATUS)
        return __atomic_load_n(&m->virtio->isr, __ATOMIC_ACQUIRE) |
               (__atomic_load_n(&m->virtio->taken, __ATOMIC_ACQUIRE) ? SM_VIRTIO_ISR_QUEUE : 0);
    pthread_mutex_lock(&m->virtio->lock);
    value = read_register(m, off);
    pthread_mutex_unlock(&m->virtio->lock);
    return value;
}

/* A field of the selected queue; constant once the queue is ready. */
static void write_queue(struct sm_virtio_mmio *m, uint64_t off, uint32_t value)
{
    struct sm_virtio_queue *q = selected(m);

    if (!q)
        return;
    if (off == QUEUE_READY) {
        sm_virtio_queue_ready(m->virtio, m->queue_sel, value & 1);
        return;
    }
    if (q->ready)
        return;
    switch (off) {
    case QUEUE_NUM:
        q->size = value > 0xffff ? 0 : (uint16_t)value;
        break;
    case QUEUE_DESC_LOW:
    case QUEUE_DESC_HIGH:
        set_half(&q->desc_gpa, off == QUEUE_DESC_HIGH, value);
        break;
    case QUEUE_DRIVER_LOW:
    case QUEUE_DRIVER_HIGH:
        set_half(&q->avail_gpa, off == QUEUE_DRIVER_HIGH, value);
        break;
    case QUEUE_DEVICE_LOW:
    case QUEUE_DEVICE_HIGH:
        set_half(&q->used_gpa, off == QUEUE_DEVICE_HIGH, value);
        break;
    }
}

static void write_register(struct sm_virtio_mmio *m, uint64_t off, uint32_t value)
{
    struct sm_virtio *v = m->virtio;

    switch (off) {
    case DEVICE_FEATURES_SEL:
        m->device_features_sel = value;
        break;
    case DRIVER_FEATURES_SEL:
        m->driver_features_sel = value;
        break;
    case DRIVER_FEATURES:
        /* Fixed by FEATURES_OK (3.1.1, step 5). */
        if (m->driver_features_sel < 2 &&
            !(__atomic_load_n(&v->status, __ATOMIC_RELAXED) & SM_VIRTIO_FEATURES_OK))
            set_half(&v->features, m->driver_features_sel, value);
        break;
    case QUEUE_SEL:
        m->queue_sel = value;
        break;
    case STATUS:
        sm_virtio_set_status(v, (uint8_t)value);
        break;
    default:
        write_queue(m, off, value);
        break;
    }
}

static void mmio_write(void *dev, uint64_t off, unsigned len, uint64_t value)
{
    struct sm_virtio_mmio *m = dev;
    struct sm_virtio *v = m->virtio;

    /* No device of ours has a configuration field to write. */
    if (off >= CONFIG || len != 4)
        return;
    if (off == QUEUE_NOTIFY) {
        sm_virtio_kick(v, (uint32_t)value);
    } else if (off == INTERRUPT_ACK) {
        __atomic_fetch_and(&v->isr, (uint8_t)~value, __ATOMIC_ACQ_REL);
    } else {
        pthread_mutex_lock(&v->lock);
        write_register(m, off, (uint32_t)value);
        pthread_mutex_unlock(&v->lock);
    }
}

const struct sm_bus_ops sm_virtio_mmio_bus_ops = { mmio_read, mmio_write };

int sm_virtio_mmio_create(struct sm_virtio *v, struct sm_virtio_mmio **out)
{
    struct sm_virtio_mmio *m = calloc(1, sizeof(*m));

    if (!m)
        return -ENOMEM;
    m->device.ops = &v->class->device;
    snprintf(m->device.name, sizeof(m->device.name), "%s", v->name);
    m->virtio = v;
    *out = m;
    return 0;
}

unsigned sm_virtio_mmio_queues(const struct sm_virtio_mmio *mmio)
{
    return mmio->virtio->queue_count;
}

int sm_virtio_mmio_queue_fd(const struct sm_virtio_mmio *mmio, unsigned queue)
{
    if (queue >= mmio->virtio->queue_count)
        return -EINVAL;
    return mmio->virtio->queues[queue].kick_fd;
}

struct sm_device *sm_virtio_mmio_device(struct sm_virtio_mmio *mmio)
{
    return &mmio->device;
}

struct sm_virtio *sm_virtio_mmio_virtio(struct sm_virtio_mmio *mmio)
{
    return mmio->virtio;
}

/* The device is the page's first member. */
static struct sm_virtio_mmio *from_device(struct sm_device *dev)
{
    return (struct sm_virtio_mmio *)dev;
}

static void reset_selectors(struct sm_virtio_mmio *m)
{
    m->device_features_sel = m->driver_features_sel = m->queue_sel = 0;
}

void sm_virtio_device_reset(struct sm_device *dev)
{
    reset_selectors(from_device(dev));
    sm_virtio_reset(from_device(dev)->virtio);
}

int sm_virtio_device_save(struct sm_device *dev, struct sm_state_writer *w)
{
    struct sm_virtio_mmio *m = from_device(dev);

    sm_state_begin(w, "virtmmio", 1);
    sm_state_put_u32(w, m->device_features_sel);
    sm_state_put_u32(w, m->driver_features_sel);
    sm_state_put_u32(w, m->queue_sel);
    sm_state_end(w);
    sm_virtio_save(m->virtio, w);
    return w->error;
}

int sm_virtio_device_load(struct sm_device *dev, struct sm_state_reader *r)
{
    struct sm_virtio_mmio *m = from_device(dev);
    int err;

    if (sm_state_open(r, "virtmmio") != 1)
        r->error = -EBADMSG;
    m->device_features_sel = sm_state_get_u32(r);
    m->driver_features_sel = sm_state_get_u32(r);
    m->queue_sel = sm_state_get_u32(r);
    sm_state_close(r);
    err = r->error ? r->error : sm_virtio_load(m->virtio, r);
    if (err)
        sm_virtio_device_reset(dev);
    return err;
}

void sm_virtio_device_destroy(struct sm_device *dev)
{
    struct sm_virtio_mmio *m = from_device(dev);
    struct sm_virtio *v = m->virtio;

    sm_virtio_reset(v);
    sm_irq_close(&v->irq);
    v->class->destroy(v);
    free(m);
}
