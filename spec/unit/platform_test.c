/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The PC's small devices with no hypervisor: the console ring, the serial port,
 * the CMOS clock, power, pvpanic; and each one's save and load.
 */
#include <errno.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "console_log.h"
#include "dev/power.h"
#include "dev/pvpanic.h"
#include "dev/rtc.h"
#include "dev/serial.h"
#include "state.h"
#include "test.h"

/* --- console ring ------------------------------------------------------- */

static void ring_keeps_order_and_counts_losses(void)
{
    struct sm_console_log log;
    uint64_t lost;
    char buf[64];

    CHECK_EQ(sm_console_log_init(&log, NULL, 8), 0);
    sm_console_log_write(&log, "abcdef", 6);
    CHECK_EQ(sm_console_log_read(&log, buf, 4, &lost), 4);
    CHECK(!memcmp(buf, "abcd", 4) && lost == 0);
    sm_console_log_write(&log, "ghijkl", 6); /* wraps, fits exactly */
    sm_console_log_write(&log, "m", 1);      /* pushes out "e" */
    CHECK_EQ(sm_console_log_read(&log, buf, 64, &lost), 8);
    CHECK(!memcmp(buf, "fghijklm", 8));
    CHECK_EQ(lost, 1);
    sm_console_log_write(&log, "0123456789abcdef", 16);
    CHECK_EQ(sm_console_log_read(&log, buf, 64, &lost), 8);
    CHECK(!memcmp(buf, "89abcdef", 8));
    CHECK_EQ(lost, 8);
    CHECK_EQ(sm_console_log_read(&log, buf, 64, &lost), 0);
    CHECK_EQ(lost, 0);
    sm_console_log_destroy(&log);
}

static void ring_is_announced_until_it_is_empty(void)
{
    struct sm_console_log log;
    struct sm_events ev;
    uint64_t lost;
    char buf[4];

    CHECK_EQ(sm_events_init(&ev), 0);
    CHECK_EQ(sm_console_log_init(&log, &ev, 64), 0);
    sm_console_log_write(&log, "hello", 5);
    CHECK_EQ(sm_events_take_bits(&ev), SM_EVENT_CONSOLE);
    sm_console_log_write(&log, "!", 1); /* not the first: already announced */
    CHECK_EQ(sm_events_take_bits(&ev), 0);
    CHECK_EQ(sm_console_log_read(&log, buf, 4, &lost), 4);
    CHECK_EQ(sm_events_take_bits(&ev), SM_EVENT_CONSOLE); /* two are left */
    CHECK_EQ(sm_console_log_read(&log, buf, 4, &lost), 2);
    CHECK_EQ(sm_events_take_bits(&ev), 0);
    CHECK_EQ(sm_console_log_input(&log, "x", 1), 0); /* nobody listens */
    sm_console_log_destroy(&log);
    sm_events_destroy(&ev);
}

/* --- serial ------------------------------------------------------------- */

struct port {
    struct sm_console_log log;
    struct sm_events ev;
    struct sm_serial *serial;
    int irq_fd;
};

static void port_open(struct port *p)
{
    struct sm_irq irq;

    CHECK_EQ(sm_events_init(&p->ev), 0);
    CHECK_EQ(sm_console_log_init(&p->log, &p->ev, 4096), 0);
    CHECK_EQ(sm_irq_open(&irq, NULL, 4), 0);
    p->irq_fd = irq.fd;
    CHECK_EQ(sm_serial_create(&p->log, &irq, &p->serial), 0);
}

static void port_close(struct port *p)
{
    struct sm_device *dev = sm_serial_device(p->serial);

    dev->ops->destroy(dev);
    sm_console_log_destroy(&p->log);
    sm_events_destroy(&p->ev);
}

static void out(struct port *p, unsigned reg, uint8_t value)
{
    sm_serial_bus_ops.write(p->serial, reg, 1, value);
}

static uint8_t in(struct port *p, unsigned reg)
{
    return (uint8_t)sm_serial_bus_ops.read(p->serial, reg, 1);
}

static uint64_t edges(struct port *p)
{
    uint64_t n = 0;

    return read(p->irq_fd, &n, sizeof(n)) == sizeof(n) ? n : 0;
}

static void serial_prints(void)
{
    struct port p;
    uint64_t lost;
    char buf[8];

    port_open(&p);
    CHECK_EQ(in(&p, 5) & 0x60, 0x60); /* ready to send, always */
    out(&p, 0, 'h');
    out(&p, 0, 'i');
    out(&p, 3, 0x83); /* divisor latch: not data */
    out(&p, 0, 1);
    out(&p, 1, 2);
    CHECK_EQ(in(&p, 0), 1);
    CHECK_EQ(in(&p, 1), 2);
    out(&p, 3, 0x03);
    CHECK_EQ(sm_console_log_read(&p.log, buf, 8, &lost), 2);
    CHECK(!memcmp(buf, "hi", 2));
    CHECK_EQ(edges(&p), 0); /* nothing enabled */
    out(&p, 7, 0x5a);
    CHECK_EQ(in(&p, 7), 0x5a);
    out(&p, 2, 0x01);
    CHECK_EQ(in(&p, 2), 0xc1); /* 16550A with FIFOs, no interrupt */
    port_close(&p);
}

static void serial_transmit_interrupts(void)
{
    struct port p;

    port_open(&p);
    out(&p, 1, 0x02);
    CHECK_EQ(edges(&p), 1); /* empty already */
    CHECK_EQ(in(&p, 2) & 0x0f, 0x02);
    CHECK_EQ(in(&p, 2) & 0x0f, 0x01); /* told once */
    for (unsigned i = 0; i < 16; i++)
        out(&p, 0, 'x'); /* a FIFO's worth is one interrupt */
    CHECK_EQ(edges(&p), 1);
    CHECK_EQ(in(&p, 2) & 0x0f, 0x02);
    out(&p, 1, 0);
    out(&p, 0, 'x');
    CHECK_EQ(edges(&p), 0);
    out(&p, 1, 0x02);
    CHECK_EQ(edges(&p), 1);
    port_close(&p);
}

static void serial_takes_what_is_typed(void)
{
    static char big[8192];
    struct port p;
    unsigned n = 0;

    port_open(&p);
    out(&p, 1, 0x01);
    CHECK_EQ(sm_serial_input(p.serial, "ab", 2), 2);
    CHECK_EQ(edges(&p), 1);
    CHECK_EQ(in(&p, 2) & 0x0f, 0x04);
    CHECK_EQ(in(&p, 5) & 1, 1);
    CHECK_EQ(in(&p, 0), 'a');
    CHECK_EQ(in(&p, 0), 'b');
    CHECK_EQ(in(&p, 5) & 1, 0);
    CHECK_EQ(in(&p, 2) & 0x0f, 0x01);
    CHECK_EQ(in(&p, 0), 0); /* nothing there */

    memset(big, 'z', sizeof(big));
    sm_events_take_bits(&p.ev);
    CHECK_EQ(sm_serial_input(p.serial, big, sizeof(big)), 4096); /* bounded */
    CHECK_EQ(sm_serial_input(p.serial, "q", 1), 0);
    while (!(sm_events_take_bits(&p.ev) & SM_EVENT_CONSOLE) && n < 5000) {
        CHECK_EQ(in(&p, 0), 'z');
        n++;
    }
    CHECK_EQ(n, 2048); /* told when half is free */
    out(&p, 2, 0x03);  /* clear the receive FIFO */
    CHECK_EQ(in(&p, 5) & 1, 0);
    port_close(&p);
}

static void serial_loops_back(void)
{
    struct port p;
    uint64_t lost;
    char buf[4];

    port_open(&p);
    CHECK_EQ(in(&p, 6), 0xb0);
    out(&p, 4, 0x10 | 0x0a); /* loop, RTS and OUT2, as Linux's probe does */
    CHECK_EQ(in(&p, 6) & 0xf0, 0x90);
    out(&p, 0, 'L');
    CHECK_EQ(in(&p, 0), 'L');
    CHECK_EQ(sm_console_log_read(&p.log, buf, 4, &lost), 0);
    port_close(&p);
}

static void serial_state_moves(void)
{
    struct port p, q;
    struct sm_state_writer w;
    struct sm_state_reader r;
    struct sm_device *from, *to;

    port_open(&p);
    port_open(&q);
    from = sm_serial_device(p.serial);
    to = sm_serial_device(q.serial);
    out(&p, 3, 0x1b);
    out(&p, 7, 0x77);
    out(&p, 1, 0x01);
    sm_serial_input(p.serial, "typed", 5);
    sm_state_writer_init(&w);
    CHECK_EQ(from->ops->save(from, &w), 0);
    sm_state_reader_init(&r, w.buf, w.len);
    CHECK_EQ(to->ops->load(to, &r), 0);
    CHECK_EQ(edges(&q), 1); /* the pending interrupt is made again */
    CHECK_EQ(in(&q, 3), 0x1b);
    CHECK_EQ(in(&q, 7), 0x77);
    CHECK_EQ(in(&q, 0), 't');
    /* Cut short anywhere, it is refused and the device still works. */
    for (size_t len = 0; len < w.len; len++) {
        sm_state_reader_init(&r, w.buf, len);
        CHECK(to->ops->load(to, &r) < 0);
        in(&q, 0);
    }
    to->ops->reset(to);
    CHECK_EQ(in(&q, 3), 0);
    CHECK_EQ(in(&q, 5) & 1, 0);
    sm_state_writer_free(&w);
    port_close(&p);
    port_close(&q);
}

/* --- clock -------------------------------------------------------------- */

static uint8_t cmos(struct sm_rtc *rtc, uint8_t index)
{
    sm_rtc_bus_ops.write(rtc, 0, 1, index);
    return (uint8_t)sm_rtc_bus_ops.read(rtc, 1, 1);
}

static int unbcd(uint8_t v)
{
    return (v >> 4) * 10 + (v & 15);
}

static void rtc_tells_the_time(void)
{
    struct sm_rtc *rtc;
    struct tm tm = { 0 };
    time_t before, told;

    CHECK_EQ(sm_rtc_create(&rtc), 0);
    do { /* not across a second's end */
        before = time(NULL);
        tm.tm_sec = unbcd(cmos(rtc, 0x80 | 0)); /* the NMI bit is no index */
        tm.tm_min = unbcd(cmos(rtc, 2));
        tm.tm_hour = unbcd(cmos(rtc, 4));
        tm.tm_mday = unbcd(cmos(rtc, 7));
        tm.tm_mon = unbcd(cmos(rtc, 8)) - 1;
        tm.tm_year = unbcd(cmos(rtc, 9)) + unbcd(cmos(rtc, 0x32)) * 100 - 1900;
    } while (time(NULL) != before);
    told = timegm(&tm);
    CHECK_EQ(told, before);
    CHECK_EQ(cmos(rtc, 0x0a) & 0x80, 0); /* never in an update */
    CHECK_EQ(cmos(rtc, 0x0b) & 0x06, 0x02);
    CHECK_EQ(cmos(rtc, 0x0d), 0x80);
    sm_rtc_bus_ops.write(rtc, 0, 1, 0x0f);
    sm_rtc_bus_ops.write(rtc, 1, 1, 0x0a);
    CHECK_EQ(cmos(rtc, 0x0f), 0x0a);
    sm_rtc_device(rtc)->ops->destroy(sm_rtc_device(rtc));
}

/* --- power -------------------------------------------------------------- */

struct ends {
    unsigned off, reset;
};

static void on_stop(void *arg, bool off, const char *how)
{
    struct ends *e = arg;

    (void)how;
    if (off)
        e->off++;
    else
        e->reset++;
}

static void power_ends_by_its_registers_only(void)
{
    struct ends e = { 0, 0 };
    struct sm_power *power;

    CHECK_EQ(sm_power_create(on_stop, &e, &power), 0);
    for (unsigned v = 0; v < 256; v++) {
        e.off = e.reset = 0;
        sm_power_acpi_ops.write(power, 0, 1, v);
        CHECK_EQ(e.off, (v & 0x20) && (v >> 2 & 7) == 5);
        CHECK_EQ(e.reset, 0);
        e.off = e.reset = 0;
        sm_power_acpi_ops.write(power, 2, 1, v);
        CHECK_EQ(e.reset, v == 1);
        e.reset = 0;
        sm_power_cf9_ops.write(power, 0, 1, v);
        CHECK_EQ(e.reset, (v & 4) != 0);
        e.reset = 0;
        sm_power_kbd_ops.write(power, 4, 1, v);
        CHECK_EQ(e.reset, v == 0xfe);
        e.reset = 0;
        sm_power_kbd_ops.write(power, 0, 1, v);
        CHECK_EQ(e.reset, 0);
        CHECK_EQ(e.off, 0);
    }
    CHECK_EQ(sm_power_kbd_ops.read(power, 4, 1), 0);
    sm_power_device(power)->ops->destroy(sm_power_device(power));
}

static void on_panic(void *arg, bool handled)
{
    unsigned *seen = arg;

    *seen |= handled ? 2 : 1;
}

static void pvpanic_tells_panics(void)
{
    unsigned seen = 0;
    struct sm_pvpanic *pv;

    CHECK_EQ(sm_pvpanic_create(on_panic, &seen, &pv), 0);
    CHECK_EQ(sm_pvpanic_bus_ops.read(pv, 0, 1), 3);
    sm_pvpanic_bus_ops.write(pv, 0, 1, 0xf8);
    CHECK_EQ(seen, 0);
    sm_pvpanic_bus_ops.write(pv, 0, 1, 2);
    CHECK_EQ(seen, 2);
    sm_pvpanic_bus_ops.write(pv, 0, 1, 1);
    CHECK_EQ(seen, 3);
    sm_pvpanic_device(pv)->ops->destroy(sm_pvpanic_device(pv));
}

int main(void)
{
    TEST(ring_keeps_order_and_counts_losses);
    TEST(ring_is_announced_until_it_is_empty);
    TEST(serial_prints);
    TEST(serial_transmit_interrupts);
    TEST(serial_takes_what_is_typed);
    TEST(serial_loops_back);
    TEST(serial_state_moves);
    TEST(rtc_tells_the_time);
    TEST(power_ends_by_its_registers_only);
    TEST(pvpanic_tells_panics);
    return test_report();
}
