/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The console of a VM: what the guest printed and nobody has read yet, and the
 * way in for what is typed to it.
 *
 * A console device (serial, virtio-console) writes here from its vCPU or I/O
 * thread; the thread that owns the VM reads. The ring is bounded: when the
 * reader is slow the oldest bytes go, and their number is told with the next
 * read. SM_EVENT_CONSOLE is latched when the ring gets its first byte, when a
 * read leaves bytes behind, and when an input device has room again after it
 * refused some.
 *
 * Threads. Everything may be called from any thread; no lock is held across a
 * call into the input device.
 */
#ifndef SM_CONSOLE_LOG_H
#define SM_CONSOLE_LOG_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "event.h"

#define SM_CONSOLE_LOG_BYTES (64u << 10)

/* Takes what it has room for and returns how much that was. */
typedef size_t sm_console_input_fn(void *dev, const void *buf, size_t len);

struct sm_console_log {
    struct sm_events *events; /* NULL in device specs */
    pthread_mutex_t lock;     /* everything below */
    uint8_t *ring;
    size_t cap_bytes, head, count;
    uint64_t lost_bytes;
    sm_console_input_fn *input;
    void *input_dev;
};

/* -ENOMEM. */
int sm_console_log_init(struct sm_console_log *log, struct sm_events *events, size_t cap_bytes);
void sm_console_log_destroy(struct sm_console_log *log);

/* Device: append what the guest printed. */
void sm_console_log_write(struct sm_console_log *log, const void *buf, size_t len);
/* Reader: take up to len bytes, oldest first; *lost gets the bytes dropped
 * before them since the last read. */
size_t sm_console_log_read(struct sm_console_log *log, void *buf, size_t len, uint64_t *lost);

/* Where typed bytes go: the device set last (virtio-console over serial), set
 * before the VM starts. */
void sm_console_log_set_input(struct sm_console_log *log, sm_console_input_fn *fn, void *dev);
/* How many bytes the device took; 0 also when there is none. After less than
 * len, SM_EVENT_CONSOLE says when to try again. */
size_t sm_console_log_input(struct sm_console_log *log, const void *buf, size_t len);
/* Device: there is room again after input was refused. */
void sm_console_log_room(struct sm_console_log *log);

#endif
