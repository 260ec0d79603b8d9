/* SPDX-License-Identifier: Apache-2.0 */
/* Events towards the owner of a VM; see event.h. */
#include "event.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

int sm_events_init(struct sm_events *ev)
{
    memset(ev, 0, sizeof(*ev));
    ev->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (ev->fd < 0)
        return -errno;
    pthread_mutex_init(&ev->lock, NULL);
    return 0;
}

void sm_events_destroy(struct sm_events *ev)
{
    if (ev->fd < 0)
        return;
    close(ev->fd);
    ev->fd = -1;
    pthread_mutex_destroy(&ev->lock);
}

static void wake(struct sm_events *ev)
{
    uint64_t one = 1;
    ssize_t n = write(ev->fd, &one, sizeof(one));

    (void)n; /* a full counter is a pending wake-up */
}

void sm_events_set(struct sm_events *ev, unsigned bits)
{
    bool fresh;

    pthread_mutex_lock(&ev->lock);
    fresh = (ev->bits & bits) != bits;
    ev->bits |= bits;
    pthread_mutex_unlock(&ev->lock);
    if (fresh)
        wake(ev);
}

void sm_events_park(struct sm_events *ev, unsigned vcpu)
{
    pthread_mutex_lock(&ev->lock);
    ev->parked |= 1ull << vcpu;
    pthread_mutex_unlock(&ev->lock);
    wake(ev);
}

void sm_events_notice(struct sm_events *ev, const char *source, const char *what,
                      uint64_t value)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    pthread_mutex_lock(&ev->lock);
    if (ev->count == SM_EVENT_NOTICES) {
        ev->lost++;
    } else {
        unsigned slot = (ev->head + ev->count++) % SM_EVENT_NOTICES;

        ev->notices[slot] = (struct sm_notice){
            .time_ns = (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec,
            .source = source,
            .what = what,
            .value = value,
        };
    }
    pthread_mutex_unlock(&ev->lock);
    wake(ev);
}

void sm_events_clear(struct sm_events *ev)
{
    uint64_t n;
    ssize_t got = read(ev->fd, &n, sizeof(n));

    (void)got;
}

unsigned sm_events_take_bits(struct sm_events *ev)
{
    unsigned bits;

    pthread_mutex_lock(&ev->lock);
    bits = ev->bits;
    ev->bits = 0;
    pthread_mutex_unlock(&ev->lock);
    return bits;
}

int sm_events_take_parked(struct sm_events *ev)
{
    int index = -1;

    pthread_mutex_lock(&ev->lock);
    if (ev->parked) {
        index = __builtin_ctzll(ev->parked);
        ev->parked &= ev->parked - 1;
    }
    pthread_mutex_unlock(&ev->lock);
    return index;
}

uint64_t sm_events_take_lost(struct sm_events *ev)
{
    uint64_t lost;

    pthread_mutex_lock(&ev->lock);
    lost = ev->lost;
    ev->lost = 0;
    pthread_mutex_unlock(&ev->lock);
    return lost;
}

bool sm_events_take_notice(struct sm_events *ev, struct sm_notice *out)
{
    bool got = false;

    pthread_mutex_lock(&ev->lock);
    /* A loss is told before any later notice: the reader asks for it first. */
    if (ev->count && !ev->lost) {
        *out = ev->notices[ev->head];
        ev->head = (ev->head + 1) % SM_EVENT_NOTICES;
        ev->count--;
        got = true;
    }
    pthread_mutex_unlock(&ev->lock);
    return got;
}
