/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-console; see virtio_console.h.
 *
 * Output goes from the guest's buffers into the console log, which drops old
 * bytes rather than wait. Input waits in a small ring until the guest offers
 * buffers; `lock` guards that ring, because anybody may type. It is a leaf:
 * nothing is called with it held.
 */
#include "dev/virtio_console.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

#define ID_CONSOLE 3
#define RX 0
#define TX 1
#define QUEUE_SIZE 64
#define BATCH 32
#define INPUT_BYTES 16384u /* a power of two */

struct console {
    struct sm_virtio virtio;
    struct sm_console_log *log;
    pthread_mutex_t lock; /* the three below, and refused */
    uint8_t input[INPUT_BYTES];
    uint32_t head, tail; /* free running: tail - head bytes wait */
    bool refused;        /* somebody waits for room */
};

static size_t console_input(void *dev, const void *buf, size_t len)
{
    struct console *c = dev;
    const uint8_t *p = buf;
    size_t room;

    pthread_mutex_lock(&c->lock);
    room = INPUT_BYTES - (c->tail - c->head);
    if (len > room) {
        len = room;
        c->refused = true;
    }
    for (size_t i = 0; i < len; i++)
        c->input[c->tail++ % INPUT_BYTES] = p[i];
    pthread_mutex_unlock(&c->lock);
    if (len)
        sm_virtio_kick(&c->virtio, RX);
    return len;
}

/* Move waiting input into a chain; returns how much. */
static uint32_t take_input(struct console *c, const struct sm_virtq_chain *chain)
{
    uint32_t done = 0;

    pthread_mutex_lock(&c->lock);
    for (unsigned i = 0; i < chain->in; i++) {
        const struct iovec *v = &chain->iov[chain->out + i];
        uint8_t *to = v->iov_base;

        for (size_t k = 0; k < v->iov_len && c->head != c->tail; k++, done++)
            to[k] = c->input[c->head++ % INPUT_BYTES];
    }
    pthread_mutex_unlock(&c->lock);
    return done;
}

static bool has_input(struct console *c)
{
    bool has;

    pthread_mutex_lock(&c->lock);
    has = c->head != c->tail;
    pthread_mutex_unlock(&c->lock);
    return has;
}

/* Tell who was refused that there is room, without our lock. */
static void tell_room(struct console *c)
{
    bool tell;

    pthread_mutex_lock(&c->lock);
    tell = c->refused && c->tail - c->head <= INPUT_BYTES / 2;
    if (tell)
        c->refused = false;
    pthread_mutex_unlock(&c->lock);
    if (tell)
        sm_console_log_room(c->log);
}

static void kick_rx(struct console *c)
{
    struct sm_virtio *v = &c->virtio;
    struct iovec iov[SM_VIRTQ_SEGS];
    struct sm_virtq_chain chain = { .iov = iov, .cap = SM_VIRTQ_SEGS };
    unsigned served = 0;

    do {
        while (served < BATCH && has_input(c) && sm_virtio_pop(v, RX, &chain)) {
            sm_virtio_push(v, RX, chain.head, take_input(c, &chain));
            served++;
        }
        if (served == BATCH) {
            sm_virtio_again(v, RX);
            break;
        }
    } while (has_input(c) && sm_virtio_kicks_on(v, RX));
    sm_virtio_notify(v, RX);
    tell_room(c);
}

static void kick_tx(struct console *c)
{
    struct sm_virtio *v = &c->virtio;
    struct iovec iov[SM_VIRTQ_SEGS];
    struct sm_virtq_chain chain = { .iov = iov, .cap = SM_VIRTQ_SEGS };
    unsigned served = 0;

    do {
        while (served < BATCH && sm_virtio_pop(v, TX, &chain)) {
            for (unsigned i = 0; i < chain.out; i++)
                sm_console_log_write(c->log, iov[i].iov_base, iov[i].iov_len);
            sm_virtio_push(v, TX, chain.head, 0);
            served++;
        }
        if (served == BATCH) {
            sm_virtio_again(v, TX);
            break;
        }
    } while (sm_virtio_kicks_on(v, TX));
    sm_virtio_notify(v, TX);
}

static void console_kick(struct sm_virtio *v, unsigned queue)
{
    if (queue == RX)
        kick_rx((struct console *)v);
    else
        kick_tx((struct console *)v);
}

/* What was typed and not taken is part of the machine. */
static void console_save(struct sm_virtio *v, struct sm_state_writer *w)
{
    struct console *c = (struct console *)v;

    sm_state_begin(w, "vconsole", 1);
    pthread_mutex_lock(&c->lock);
    for (uint32_t i = c->head; i != c->tail; i++)
        sm_state_put_u8(w, c->input[i % INPUT_BYTES]);
    pthread_mutex_unlock(&c->lock);
    sm_state_end(w);
}

static int console_load(struct sm_virtio *v, struct sm_state_reader *r)
{
    struct console *c = (struct console *)v;
    size_t len;

    if (sm_state_open(r, "vconsole") != 1)
        return -EBADMSG;
    len = sm_state_left(r);
    if (len > INPUT_BYTES)
        return -EBADMSG;
    pthread_mutex_lock(&c->lock);
    sm_state_get_bytes(r, c->input, len);
    c->head = 0;
    c->tail = (uint32_t)len;
    pthread_mutex_unlock(&c->lock);
    sm_state_close(r);
    return r->error;
}

static void console_free(struct console *c)
{
    sm_virtio_fini(&c->virtio);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

static void console_destroy(struct sm_virtio *v)
{
    struct console *c = (struct console *)v;

    sm_console_log_set_input(c->log, NULL, NULL);
    console_free(c);
}

static const struct sm_virtio_class console_class = {
    .device = SM_VIRTIO_DEVICE_OPS("virtio-console"),
    .id = ID_CONSOLE,
    .queues = 2,
    .queue_size = QUEUE_SIZE,
    .kick = console_kick,
    .save = console_save,
    .load = console_load,
    .destroy = console_destroy,
};

int sm_virtio_console_create(const struct sm_virtio_env *env, struct sm_console_log *log,
                             struct sm_virtio_mmio **out)
{
    struct console *c = calloc(1, sizeof(*c));
    int err;

    if (!c)
        return -ENOMEM;
    pthread_mutex_init(&c->lock, NULL);
    c->log = log;
    err = sm_virtio_init(&c->virtio, env, &console_class, 0);
    if (err) {
        pthread_mutex_destroy(&c->lock);
        free(c);
        return err;
    }
    err = sm_virtio_mmio_create(&c->virtio, out);
    if (err) {
        console_free(c);
        return err;
    }
    sm_console_log_set_input(log, console_input, c);
    return 0;
}

size_t sm_virtio_console_input(struct sm_virtio_mmio *dev, const void *buf, size_t len)
{
    return console_input(sm_virtio_mmio_virtio(dev), buf, len);
}
