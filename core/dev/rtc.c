/* SPDX-License-Identifier: Apache-2.0 */
/* The CMOS clock; see rtc.h. */
#include "dev/rtc.h"

#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "state.h"

enum {
    SECONDS = 0x00,
    MINUTES = 0x02,
    HOURS = 0x04,
    WEEKDAY = 0x06,
    DAY = 0x07,
    MONTH = 0x08,
    YEAR = 0x09,
    STATUS_A = 0x0a,
    STATUS_B = 0x0b,
    STATUS_C = 0x0c,
    STATUS_D = 0x0d,
    CENTURY = 0x32,
};

#define A_32KHZ_1024HZ 0x26
#define B_24H 0x02
#define D_VALID 0x80

struct sm_rtc {
    struct sm_device dev;
    pthread_mutex_t lock; /* everything below */
    uint8_t index;
    uint8_t ram[128];
};

static struct sm_rtc *rtc_of(struct sm_device *dev)
{
    return (struct sm_rtc *)((char *)dev - offsetof(struct sm_rtc, dev));
}

static uint8_t bcd(int value)
{
    return (uint8_t)(value / 10 << 4 | value % 10);
}

static uint8_t cmos_read(const struct sm_rtc *rtc)
{
    time_t now = time(NULL);
    struct tm tm;

    gmtime_r(&now, &tm);
    switch (rtc->index) {
    case SECONDS:
        return bcd(tm.tm_sec > 59 ? 59 : tm.tm_sec);
    case MINUTES:
        return bcd(tm.tm_min);
    case HOURS:
        return bcd(tm.tm_hour);
    case WEEKDAY:
        return bcd(tm.tm_wday + 1);
    case DAY:
        return bcd(tm.tm_mday);
    case MONTH:
        return bcd(tm.tm_mon + 1);
    case YEAR:
        return bcd(tm.tm_year % 100);
    case CENTURY:
        return bcd((tm.tm_year + 1900) / 100);
    case STATUS_A:
        return A_32KHZ_1024HZ;
    case STATUS_B:
        return B_24H;
    case STATUS_C:
        return 0;
    case STATUS_D:
        return D_VALID;
    default:
        return rtc->ram[rtc->index];
    }
}

static uint64_t rtc_read(void *dev, uint64_t off, unsigned len)
{
    struct sm_rtc *rtc = dev;
    uint64_t value = 0xff; /* the index is write-only */

    (void)len;
    pthread_mutex_lock(&rtc->lock);
    if (off == 1)
        value = cmos_read(rtc);
    pthread_mutex_unlock(&rtc->lock);
    return value;
}

static void rtc_write(void *dev, uint64_t off, unsigned len, uint64_t value)
{
    struct sm_rtc *rtc = dev;

    (void)len;
    pthread_mutex_lock(&rtc->lock);
    if (off == 0)
        rtc->index = value & 0x7f; /* bit 7 masks NMI */
    else
        rtc->ram[rtc->index] = (uint8_t)value;
    pthread_mutex_unlock(&rtc->lock);
}

const struct sm_bus_ops sm_rtc_bus_ops = { rtc_read, rtc_write };

static void rtc_reset(struct sm_device *dev)
{
    struct sm_rtc *rtc = rtc_of(dev);

    pthread_mutex_lock(&rtc->lock);
    rtc->index = 0;
    memset(rtc->ram, 0, sizeof(rtc->ram));
    pthread_mutex_unlock(&rtc->lock);
}

static int rtc_save(struct sm_device *dev, struct sm_state_writer *w)
{
    struct sm_rtc *rtc = rtc_of(dev);

    pthread_mutex_lock(&rtc->lock);
    sm_state_begin(w, "rtc", 1);
    sm_state_put_u8(w, rtc->index);
    sm_state_put_bytes(w, rtc->ram, sizeof(rtc->ram));
    sm_state_end(w);
    pthread_mutex_unlock(&rtc->lock);
    return w->error;
}

static int rtc_load(struct sm_device *dev, struct sm_state_reader *r)
{
    struct sm_rtc *rtc = rtc_of(dev);

    if (sm_state_open(r, "rtc") != 1)
        return -EBADMSG;
    pthread_mutex_lock(&rtc->lock);
    rtc->index = sm_state_get_u8(r) & 0x7f;
    sm_state_get_bytes(r, rtc->ram, sizeof(rtc->ram));
    pthread_mutex_unlock(&rtc->lock);
    sm_state_close(r);
    return r->error;
}

static void rtc_destroy(struct sm_device *dev)
{
    struct sm_rtc *rtc = rtc_of(dev);

    pthread_mutex_destroy(&rtc->lock);
    free(rtc);
}

static const struct sm_device_ops rtc_ops = {
    .type = "rtc",
    .reset = rtc_reset,
    .save = rtc_save,
    .load = rtc_load,
    .destroy = rtc_destroy,
};

int sm_rtc_create(struct sm_rtc **out)
{
    struct sm_rtc *rtc = calloc(1, sizeof(*rtc));

    if (!rtc)
        return -ENOMEM;
    rtc->dev.ops = &rtc_ops;
    strcpy(rtc->dev.name, "rtc");
    pthread_mutex_init(&rtc->lock, NULL);
    *out = rtc;
    return 0;
}

struct sm_device *sm_rtc_device(struct sm_rtc *rtc)
{
    return &rtc->dev;
}
