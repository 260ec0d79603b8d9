/* SPDX-License-Identifier: Apache-2.0 */
/* The life of a virtio device and of its queues; see virtio.h. */
#include "dev/virtio.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "event.h"
#include "state.h"
#include "trace.h"

#define DRIVER_BITS                                                                      \
    (SM_VIRTIO_ACKNOWLEDGE | SM_VIRTIO_DRIVER | SM_VIRTIO_DRIVER_OK |                    \
     SM_VIRTIO_FEATURES_OK | SM_VIRTIO_FAILED)

static uint8_t status_of(const struct sm_virtio *v)
{
    return __atomic_load_n(&v->status, __ATOMIC_RELAXED);
}

static void drain(int fd)
{
    uint64_t n;
    ssize_t got = read(fd, &n, sizeof(n));

    (void)got; /* EAGAIN: nothing was there */
}

int sm_virtio_init(struct sm_virtio *v, const struct sm_virtio_env *env,
                   const struct sm_virtio_class *class, uint64_t features)
{
    v->class = class;
    snprintf(v->name, sizeof(v->name), "%s", env->name);
    v->mem = env->mem;
    v->io = env->io;
    v->events = env->events;
    v->trace = env->trace;
    v->irq = env->irq;
    if (!v->queue_count)
        v->queue_count = class->queues;
    v->offered = features | SM_VIRTIO_F_COMMON;
    pthread_mutex_init(&v->lock, NULL);
    for (unsigned i = 0; i < v->queue_count; i++) {
        struct sm_virtio_queue *q = &v->queues[i];

        q->virtio = v;
        q->index = i;
        q->watch.fd = -1;
        q->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (q->kick_fd < 0) {
            int err = -errno;

            while (i--)
                close(v->queues[i].kick_fd);
            pthread_mutex_destroy(&v->lock);
            return err;
        }
    }
    return 0;
}

void sm_virtio_fini(struct sm_virtio *v)
{
    for (unsigned i = 0; i < v->queue_count; i++)
        close(v->queues[i].kick_fd);
    pthread_mutex_destroy(&v->lock);
}

static void interrupt(struct sm_virtio *v, uint8_t cause)
{
    /* Before the edge: the handler that the edge starts reads it. */
    __atomic_fetch_or(&v->isr, cause, __ATOMIC_RELEASE);
    sm_irq_raise(&v->irq);
}

bool sm_virtio_pop(struct sm_virtio *v, unsigned queue, struct sm_virtq_chain *chain)
{
    struct sm_virtq *vq = &v->queues[queue].vq;
    int r;

    if (status_of(v) & SM_VIRTIO_NEEDS_RESET)
        return false;
    r = sm_virtq_pop(vq, chain);
    if (r < 0)
        sm_virtio_fail(v, queue, vq->fault ? vq->fault : "chain of too many buffers");
    return r > 0;
}

void sm_virtio_push(struct sm_virtio *v, unsigned queue, uint16_t head, uint32_t written)
{
    __atomic_fetch_add(&v->requests, 1, __ATOMIC_RELAXED);
    if (sm_trace_on(v->trace, SM_TRACE_REQUEST) && !v->traces_itself) {
        struct sm_trace_record r = {
            .kind = SM_TRACE_REQUEST,
            .time_ns = sm_trace_now_ns(),
            .what = "done",
            .number = queue,
            .size = written,
        };

        memcpy(r.device, v->name, sizeof(r.device) - 1);
        sm_trace_put(v->trace, &r);
    }
    sm_virtq_push(&v->queues[queue].vq, head, written);
}

void sm_virtio_notify(struct sm_virtio *v, unsigned queue)
{
    if (sm_virtq_should_notify(&v->queues[queue].vq))
        interrupt(v, SM_VIRTIO_ISR_QUEUE);
}

void sm_virtio_kicks_off(struct sm_virtio *v, unsigned queue)
{
    sm_virtq_kicks_off(&v->queues[queue].vq);
}

bool sm_virtio_kicks_on(struct sm_virtio *v, unsigned queue)
{
    /* A dead device has nothing more to pop, whatever its rings say. */
    return !(status_of(v) & SM_VIRTIO_NEEDS_RESET) &&
           sm_virtq_kicks_on(&v->queues[queue].vq);
}

void sm_virtio_again(struct sm_virtio *v, unsigned queue)
{
    sm_virtio_kick(v, queue);
}

void sm_virtio_kick(struct sm_virtio *v, unsigned queue)
{
    uint64_t one = 1;

    if (queue < v->queue_count) {
        ssize_t n = write(v->queues[queue].kick_fd, &one, sizeof(one));

        (void)n; /* full: a kick is pending anyway */
    }
}

void sm_virtio_fail(struct sm_virtio *v, unsigned queue, const char *what)
{
    uint8_t old = __atomic_fetch_or(&v->status, SM_VIRTIO_NEEDS_RESET, __ATOMIC_RELAXED);

    if (old & SM_VIRTIO_NEEDS_RESET)
        return;
    /* The name lives as long as the device, which the VM keeps until its end. */
    if (v->events)
        sm_events_notice(v->events, v->name, what, queue);
    if (old & SM_VIRTIO_DRIVER_OK)
        interrupt(v, SM_VIRTIO_ISR_CONFIG); /* 2.1.2 */
}

int sm_virtio_take(struct sm_virtio *v, unsigned queue)
{
    if (v->irq.fd < 0)
        return -ENOTSUP;
    v->queues[queue].taken = true;
    /* Who raises the interrupt cannot set the ISR: the register always says that a
     * queue may have something, which is allowed to be wrong. */
    __atomic_store_n(&v->taken, true, __ATOMIC_RELEASE);
    return 0;
}

static void on_kick(struct sm_io_watch *watch, uint32_t events)
{
    struct sm_virtio_queue *q = watch->dev;

    (void)events;
    drain(q->kick_fd);
    if (!(status_of(q->virtio) & SM_VIRTIO_NEEDS_RESET))
        q->virtio->class->kick(q->virtio, q->index);
}

/* I/O thread. */
static int start(void *arg)
{
    struct sm_virtio *v = arg;

    v->running = true;
    if (v->class->start)
        v->class->start(v);
    for (unsigned i = 0; i < v->queue_count; i++) {
        struct sm_virtio_queue *q = &v->queues[i];

        if (!q->vq.size)
            continue;
        if (!q->taken && sm_io_watch(v->io, &q->watch, q->kick_fd, EPOLLIN, on_kick, q))
            sm_virtio_fail(v, i, "cannot watch the queue");
        /* What was made available before DRIVER_OK, or before a save, is not
         * kicked for again. */
        sm_virtio_kick(v, i);
    }
    return 0;
}

/* I/O thread. */
static void stop_queue(struct sm_virtio_queue *q)
{
    sm_io_unwatch(q->virtio->io, &q->watch);
    drain(q->kick_fd);
    sm_virtq_clear(&q->vq);
}

/* I/O thread. */
static int stop(void *arg)
{
    struct sm_virtio *v = arg;

    for (unsigned i = 0; i < v->queue_count; i++)
        stop_queue(&v->queues[i]);
    if (v->running && v->class->stop)
        v->class->stop(v);
    v->running = false;
    for (unsigned i = 0; i < v->queue_count; i++)
        v->queues[i].taken = false;
    __atomic_store_n(&v->taken, false, __ATOMIC_RELEASE);
    return 0;
}

/* Queues that others work on are stopped together. */
static int stop_one(void *arg)
{
    struct sm_virtio_queue *q = arg;

    if (q->taken)
        return stop(q->virtio);
    stop_queue(q);
    return 0;
}

static void reset_locked(struct sm_virtio *v)
{
    sm_io_call(v->io, stop, v);
    __atomic_store_n(&v->status, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&v->isr, 0, __ATOMIC_RELAXED);
    v->features = 0;
    for (unsigned i = 0; i < v->queue_count; i++) {
        struct sm_virtio_queue *q = &v->queues[i];

        q->size = 0;
        q->ready = false;
        q->desc_gpa = q->avail_gpa = q->used_gpa = 0;
    }
}

void sm_virtio_set_status(struct sm_virtio *v, uint8_t value)
{
    uint8_t old = status_of(v);
    uint8_t set = value & DRIVER_BITS & (uint8_t)~old;

    if (!value) {
        if (old)
            reset_locked(v);
        return;
    }
    /* 3.1.1: the steps in order. A set of features that is not ours, or
     * without VERSION_1, leaves FEATURES_OK clear, which the driver reads
     * back (2.2.2). */
    if (set & SM_VIRTIO_FEATURES_OK &&
        ((v->features & ~v->offered) || !(v->features & SM_VIRTIO_F_VERSION_1)))
        set &= (uint8_t)~SM_VIRTIO_FEATURES_OK;
    if (!((old | set) & SM_VIRTIO_FEATURES_OK))
        set &= (uint8_t)~SM_VIRTIO_DRIVER_OK;
    __atomic_fetch_or(&v->status, set, __ATOMIC_RELAXED);
    if (set & SM_VIRTIO_DRIVER_OK)
        sm_io_call(v->io, start, v);
}

static int setup_queue(struct sm_virtio *v, struct sm_virtio_queue *q)
{
    return sm_virtq_setup(&q->vq, v->mem, q->size, q->desc_gpa, q->avail_gpa, q->used_gpa,
                          sm_virtio_has(v, SM_VIRTIO_F_EVENT_IDX),
                          sm_virtio_has(v, SM_VIRTIO_F_INDIRECT_DESC));
}

void sm_virtio_queue_ready(struct sm_virtio *v, unsigned queue, bool ready)
{
    struct sm_virtio_queue *q = &v->queues[queue];
    uint8_t status = status_of(v);

    if (ready == q->ready)
        return;
    if (!ready) {
        /* 4.2.2.2: stopped when the driver reads 0 back. */
        sm_io_call(v->io, stop_one, q);
        q->ready = false;
        return;
    }
    /* 3.1.1: queues are set up between FEATURES_OK and DRIVER_OK. */
    if (!(status & SM_VIRTIO_FEATURES_OK) ||
        (status & (SM_VIRTIO_DRIVER_OK | SM_VIRTIO_NEEDS_RESET)))
        return;
    if (q->size > v->class->queue_size || setup_queue(v, q))
        sm_virtio_fail(v, queue, "queue of a bad size or outside of memory");
    else
        q->ready = true;
}

void sm_virtio_reset(struct sm_virtio *v)
{
    pthread_mutex_lock(&v->lock);
    reset_locked(v);
    pthread_mutex_unlock(&v->lock);
}

void sm_virtio_save(struct sm_virtio *v, struct sm_state_writer *w)
{
    pthread_mutex_lock(&v->lock);
    if (v->taken)
        w->error = -EBUSY;
    sm_state_begin(w, "virtio", 1);
    sm_state_put_u32(w, v->class->id);
    sm_state_put_u64(w, v->features);
    sm_state_put_u8(w, status_of(v));
    sm_state_put_u8(w, __atomic_load_n(&v->isr, __ATOMIC_RELAXED));
    sm_state_put_u32(w, v->generation);
    sm_state_put_u8(w, (uint8_t)v->queue_count);
    for (unsigned i = 0; i < v->queue_count; i++) {
        const struct sm_virtio_queue *q = &v->queues[i];

        sm_state_put_u16(w, q->size);
        sm_state_put_u8(w, q->ready);
        sm_state_put_u64(w, q->desc_gpa);
        sm_state_put_u64(w, q->avail_gpa);
        sm_state_put_u64(w, q->used_gpa);
        sm_state_put_u16(w, q->vq.next_avail);
        sm_state_put_u16(w, q->vq.next_used);
        sm_state_put_u16(w, q->vq.signalled);
    }
    sm_state_end(w);
    pthread_mutex_unlock(&v->lock);
    if (v->class->save)
        v->class->save(v, w);
}

/* A queue's part of the section: its set-up, then the rings it speaks of. */
static int load_queue(struct sm_virtio *v, struct sm_virtio_queue *q,
                      struct sm_state_reader *r)
{
    uint16_t next_avail, next_used;
    bool ready;

    q->size = sm_state_get_u16(r);
    ready = sm_state_get_u8(r);
    q->desc_gpa = sm_state_get_u64(r);
    q->avail_gpa = sm_state_get_u64(r);
    q->used_gpa = sm_state_get_u64(r);
    next_avail = sm_state_get_u16(r);
    next_used = sm_state_get_u16(r);
    if (r->error || !ready) {
        sm_state_get_u16(r);
        return r->error;
    }
    /* Nothing is in flight at a save: what was taken was given back. */
    if (q->size > v->class->queue_size || next_avail != next_used || setup_queue(v, q))
        return -EBADMSG;
    q->ready = true;
    q->vq.next_avail = next_avail;
    q->vq.next_used = next_used;
    q->vq.signalled = sm_state_get_u16(r);
    return r->error;
}

static int load_section(struct sm_virtio *v, struct sm_state_reader *r)
{
    if (sm_state_open(r, "virtio") != 1 || sm_state_get_u32(r) != v->class->id)
        return -EBADMSG;
    v->features = sm_state_get_u64(r);
    v->status = sm_state_get_u8(r);
    v->isr = sm_state_get_u8(r);
    v->generation = sm_state_get_u32(r);
    if (sm_state_get_u8(r) != v->queue_count)
        return -EBADMSG;
    if (v->status & SM_VIRTIO_FEATURES_OK && v->features & ~v->offered)
        return -EBADMSG;
    for (unsigned i = 0; i < v->queue_count; i++)
        if (load_queue(v, &v->queues[i], r))
            return -EBADMSG;
    sm_state_close(r);
    return r->error;
}

int sm_virtio_load(struct sm_virtio *v, struct sm_state_reader *r)
{
    int err;

    pthread_mutex_lock(&v->lock);
    reset_locked(v);
    err = load_section(v, r);
    if (!err && v->class->load)
        err = v->class->load(v, r);
    if (err) {
        reset_locked(v);
    } else {
        if (v->status & SM_VIRTIO_DRIVER_OK)
            sm_io_call(v->io, start, v);
        /* An edge that was on its way at the save is gone. */
        if (v->isr)
            sm_irq_raise(&v->irq);
    }
    pthread_mutex_unlock(&v->lock);
    return err;
}
