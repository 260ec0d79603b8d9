/* SPDX-License-Identifier: Apache-2.0 */
/* Theory of operation: console_log.h. */
#include "console_log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int sm_console_log_init(struct sm_console_log *log, struct sm_events *events, size_t cap_bytes)
{
    memset(log, 0, sizeof(*log));
    log->ring = malloc(cap_bytes);
    if (!log->ring)
        return -ENOMEM;
    log->events = events;
    log->cap_bytes = cap_bytes;
    pthread_mutex_init(&log->lock, NULL);
    return 0;
}

void sm_console_log_destroy(struct sm_console_log *log)
{
    if (!log->ring)
        return;
    pthread_mutex_destroy(&log->lock);
    free(log->ring);
    log->ring = NULL;
}

static void notify(struct sm_console_log *log)
{
    if (log->events)
        sm_events_set(log->events, SM_EVENT_CONSOLE);
}

/* Make room for len bytes by dropping the oldest. Locked. */
static void drop_oldest(struct sm_console_log *log, size_t len)
{
    size_t room = log->cap_bytes - log->count;
    if (len <= room)
        return;
    size_t drop = len - room;
    log->head = (log->head + drop) % log->cap_bytes;
    log->count -= drop;
    log->lost_bytes += drop;
}

void sm_console_log_write(struct sm_console_log *log, const void *buf, size_t len)
{
    const uint8_t *p = buf;
    if (!len)
        return;
    pthread_mutex_lock(&log->lock);
    if (len > log->cap_bytes) {
        log->lost_bytes += len - log->cap_bytes;
        p += len - log->cap_bytes;
        len = log->cap_bytes;
    }
    drop_oldest(log, len);
    bool first = log->count == 0;
    size_t tail = (log->head + log->count) % log->cap_bytes;
    size_t part = log->cap_bytes - tail < len ? log->cap_bytes - tail : len;
    memcpy(log->ring + tail, p, part);
    memcpy(log->ring, p + part, len - part);
    log->count += len;
    pthread_mutex_unlock(&log->lock);
    if (first)
        notify(log);
}

size_t sm_console_log_read(struct sm_console_log *log, void *buf, size_t len, uint64_t *lost)
{
    uint8_t *p = buf;
    pthread_mutex_lock(&log->lock);
    if (len > log->count)
        len = log->count;
    size_t part = log->cap_bytes - log->head < len ? log->cap_bytes - log->head : len;
    memcpy(p, log->ring + log->head, part);
    memcpy(p + part, log->ring, len - part);
    log->head = (log->head + len) % log->cap_bytes;
    log->count -= len;
    bool more = log->count > 0;
    *lost = log->lost_bytes;
    log->lost_bytes = 0;
    pthread_mutex_unlock(&log->lock);
    if (more)
        notify(log);
    return len;
}

void sm_console_log_set_input(struct sm_console_log *log, sm_console_input_fn *fn, void *dev)
{
    pthread_mutex_lock(&log->lock);
    log->input = fn;
    log->input_dev = dev;
    pthread_mutex_unlock(&log->lock);
}

size_t sm_console_log_input(struct sm_console_log *log, const void *buf, size_t len)
{
    pthread_mutex_lock(&log->lock);
    sm_console_input_fn *fn = log->input;
    void *dev = log->input_dev;
    pthread_mutex_unlock(&log->lock);
    return fn && len ? fn(dev, buf, len) : 0;
}

void sm_console_log_room(struct sm_console_log *log)
{
    notify(log);
}
