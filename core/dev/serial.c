/* SPDX-License-Identifier: Apache-2.0 */
/* A 16550A serial port; see serial.h. */
#include "dev/serial.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

#define INPUT_BYTES 4096u

enum { RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR };

#define IER_RDI 0x01
#define IER_THRI 0x02
#define IER_RLSI 0x04
#define IER_MASK 0x0f
#define IIR_NONE 0x01
#define IIR_THRI 0x02
#define IIR_RDI 0x04
#define IIR_FIFO 0xc0
#define FCR_ENABLE 0x01
#define FCR_CLEAR_RX 0x02
#define LCR_DLAB 0x80
#define MCR_MASK 0x1f
#define MCR_LOOP 0x10
#define LSR_DR 0x01
#define LSR_THRE 0x20
#define LSR_TEMT 0x40
#define MSR_CTS 0x10
#define MSR_DSR 0x20
#define MSR_DCD 0x80

struct sm_serial {
    struct sm_device dev;
    struct sm_console_log *console;
    struct sm_irq irq;
    pthread_mutex_t lock; /* everything below */
    uint8_t ier, fcr, lcr, mcr, scr, dll, dlm;
    bool thr_pending; /* "transmitter empty" was not yet told */
    bool refused;     /* input was turned away: tell when there is room */
    uint8_t input[INPUT_BYTES];
    uint32_t head, count;
};

static struct sm_serial *serial_of(struct sm_device *dev)
{
    return (struct sm_serial *)((char *)dev - offsetof(struct sm_serial, dev));
}

/* The cause an IIR read would tell now. */
static uint8_t cause(const struct sm_serial *s)
{
    if ((s->ier & IER_RDI) && s->count)
        return IIR_RDI;
    if ((s->ier & IER_THRI) && s->thr_pending)
        return IIR_THRI;
    return IIR_NONE;
}

static uint8_t msr_value(const struct sm_serial *s)
{
    if (!(s->mcr & MCR_LOOP))
        return MSR_DCD | MSR_DSR | MSR_CTS;
    /* DTR→DSR, RTS→CTS, OUT1→RI, OUT2→DCD */
    return (uint8_t)((s->mcr & 1) << 5 | (s->mcr & 2) << 3 | (s->mcr & 4) << 4 |
                     (s->mcr & 8) << 4);
}

static uint8_t input_pop(struct sm_serial *s)
{
    uint8_t byte;

    if (!s->count)
        return 0;
    byte = s->input[s->head];
    s->head = (s->head + 1) % INPUT_BYTES;
    s->count--;
    return byte;
}

static size_t input_push(struct sm_serial *s, const uint8_t *buf, size_t len)
{
    size_t n = 0;

    for (; n < len && s->count < INPUT_BYTES; n++) {
        s->input[(s->head + s->count) % INPUT_BYTES] = buf[n];
        s->count++;
    }
    return n;
}

static uint8_t iir_read(struct sm_serial *s)
{
    uint8_t value = cause(s);

    if (value == IIR_THRI)
        s->thr_pending = false;
    return value | ((s->fcr & FCR_ENABLE) ? IIR_FIFO : 0);
}

static uint8_t reg_read(struct sm_serial *s, unsigned reg)
{
    switch (reg) {
    case RBR_THR:
        return s->lcr & LCR_DLAB ? s->dll : input_pop(s);
    case IER:
        return s->lcr & LCR_DLAB ? s->dlm : s->ier;
    case IIR_FCR:
        return iir_read(s);
    case LCR:
        return s->lcr;
    case MCR:
        return s->mcr;
    case LSR:
        return (uint8_t)(LSR_THRE | LSR_TEMT | (s->count ? LSR_DR : 0));
    case MSR:
        return msr_value(s);
    default:
        return s->scr;
    }
}

static uint64_t serial_read(void *dev, uint64_t off, unsigned len)
{
    struct sm_serial *s = dev;
    uint64_t value = 0;
    bool room;

    pthread_mutex_lock(&s->lock);
    /* A wide access is as many byte accesses, as on the ISA bus. */
    for (unsigned i = 0; i < len; i++)
        value |= (uint64_t)reg_read(s, (unsigned)off + i) << (8 * i);
    room = s->refused && s->count <= INPUT_BYTES / 2;
    if (room)
        s->refused = false;
    pthread_mutex_unlock(&s->lock);
    if (room)
        sm_console_log_room(s->console);
    return value;
}

/* Returns whether the byte goes out to the console. */
static bool thr_write(struct sm_serial *s, uint8_t value)
{
    if (s->lcr & LCR_DLAB) {
        s->dll = value;
        return false;
    }
    s->thr_pending = true; /* sent at once: empty again */
    if (!(s->mcr & MCR_LOOP))
        return true;
    input_push(s, &value, 1);
    return false;
}

static void ier_write(struct sm_serial *s, uint8_t value)
{
    if (s->lcr & LCR_DLAB) {
        s->dlm = value;
        return;
    }
    /* Enabling the interrupt of an empty transmitter raises it. */
    if (!(s->ier & IER_THRI) && (value & IER_THRI))
        s->thr_pending = true;
    s->ier = value & IER_MASK;
}

static bool reg_write(struct sm_serial *s, unsigned reg, uint8_t value)
{
    switch (reg) {
    case RBR_THR:
        return thr_write(s, value);
    case IER:
        ier_write(s, value);
        break;
    case IIR_FCR:
        s->fcr = value & FCR_ENABLE;
        if (value & FCR_CLEAR_RX)
            s->head = s->count = 0;
        break;
    case LCR:
        s->lcr = value;
        break;
    case MCR:
        s->mcr = value & MCR_MASK;
        break;
    case SCR:
        s->scr = value;
        break;
    default: /* LSR and MSR are read-only */
        break;
    }
    return false;
}

static void serial_write(void *dev, uint64_t off, unsigned len, uint64_t value)
{
    struct sm_serial *s = dev;
    uint8_t out[8], before;
    unsigned n = 0;
    bool edge;

    pthread_mutex_lock(&s->lock);
    before = cause(s);
    for (unsigned i = 0; i < len; i++) {
        uint8_t byte = (uint8_t)(value >> (8 * i));

        if (reg_write(s, (unsigned)off + i, byte))
            out[n++] = byte;
    }
    edge = cause(s) != IIR_NONE && cause(s) != before;
    pthread_mutex_unlock(&s->lock);
    if (n)
        sm_console_log_write(s->console, out, n);
    if (edge)
        sm_irq_raise(&s->irq);
}

const struct sm_bus_ops sm_serial_bus_ops = { serial_read, serial_write };

size_t sm_serial_input(void *dev, const void *buf, size_t len)
{
    struct sm_serial *s = dev;
    bool raise;
    size_t n;

    pthread_mutex_lock(&s->lock);
    n = input_push(s, buf, len);
    s->refused = n < len;
    raise = n && (s->ier & IER_RDI);
    pthread_mutex_unlock(&s->lock);
    if (raise)
        sm_irq_raise(&s->irq);
    return n;
}

/* --- device ------------------------------------------------------------- */

static void serial_reset(struct sm_device *dev)
{
    struct sm_serial *s = serial_of(dev);

    pthread_mutex_lock(&s->lock);
    s->ier = s->fcr = s->lcr = s->mcr = s->scr = s->dlm = 0;
    s->dll = 1; /* 115200 baud */
    s->thr_pending = s->refused = false;
    s->head = s->count = 0;
    pthread_mutex_unlock(&s->lock);
}

static int serial_save(struct sm_device *dev, struct sm_state_writer *w)
{
    struct sm_serial *s = serial_of(dev);

    pthread_mutex_lock(&s->lock);
    sm_state_begin(w, "serial", 1);
    sm_state_put_u8(w, s->ier);
    sm_state_put_u8(w, s->fcr);
    sm_state_put_u8(w, s->lcr);
    sm_state_put_u8(w, s->mcr);
    sm_state_put_u8(w, s->scr);
    sm_state_put_u8(w, s->dll);
    sm_state_put_u8(w, s->dlm);
    sm_state_put_u8(w, s->thr_pending);
    sm_state_put_u32(w, s->count);
    for (uint32_t i = 0; i < s->count; i++)
        sm_state_put_u8(w, s->input[(s->head + i) % INPUT_BYTES]);
    sm_state_end(w);
    pthread_mutex_unlock(&s->lock);
    return w->error;
}

static int serial_load(struct sm_device *dev, struct sm_state_reader *r)
{
    struct sm_serial *s = serial_of(dev);
    bool raise;

    if (sm_state_open(r, "serial") != 1)
        return -EBADMSG;
    pthread_mutex_lock(&s->lock);
    s->ier = sm_state_get_u8(r) & IER_MASK;
    s->fcr = sm_state_get_u8(r) & FCR_ENABLE;
    s->lcr = sm_state_get_u8(r);
    s->mcr = sm_state_get_u8(r) & MCR_MASK;
    s->scr = sm_state_get_u8(r);
    s->dll = sm_state_get_u8(r);
    s->dlm = sm_state_get_u8(r);
    s->thr_pending = sm_state_get_u8(r) != 0;
    s->head = 0;
    s->count = sm_state_get_u32(r);
    if (s->count > INPUT_BYTES) {
        s->count = 0;
        r->error = -EBADMSG;
    }
    sm_state_get_bytes(r, s->input, s->count);
    sm_state_close(r);
    /* An edge that was on its way when we saved is made again. */
    raise = !r->error && cause(s) != IIR_NONE;
    pthread_mutex_unlock(&s->lock);
    if (raise)
        sm_irq_raise(&s->irq);
    return r->error;
}

static void serial_destroy(struct sm_device *dev)
{
    struct sm_serial *s = serial_of(dev);

    sm_console_log_set_input(s->console, NULL, NULL);
    sm_irq_close(&s->irq);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

static const struct sm_device_ops serial_ops = {
    .type = "serial",
    .reset = serial_reset,
    .save = serial_save,
    .load = serial_load,
    .destroy = serial_destroy,
};

int sm_serial_create(struct sm_console_log *console, const struct sm_irq *irq,
                     struct sm_serial **out)
{
    struct sm_serial *s = calloc(1, sizeof(*s));

    if (!s) {
        struct sm_irq gone = *irq;

        sm_irq_close(&gone);
        return -ENOMEM;
    }
    s->dev.ops = &serial_ops;
    strcpy(s->dev.name, "serial0");
    s->console = console;
    s->irq = *irq;
    pthread_mutex_init(&s->lock, NULL);
    serial_reset(&s->dev);
    *out = s;
    return 0;
}

struct sm_device *sm_serial_device(struct sm_serial *s)
{
    return &s->dev;
}
