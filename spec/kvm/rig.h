/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A rig for bare-metal guests: a VM with a little RAM, a test device at ports
 * 0x1000–0x10ff and at 0xb8000 (memory), and 16-bit code assembled into this
 * program. The device records every write and answers reads from a counter.
 *
 * Waiting is for events (a condition), bounded so that a hang is a failure.
 */
#ifndef RIG_H
#define RIG_H

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "test.h"
#include "vm.h"

#define RIG_PORT 0x1000
#define RIG_MMIO 0xb8000
#define RIG_RAM 0x20000
#define RIG_CODE 0x1000
#define RIG_LOG 4096
#define RIG_TIMEOUT_S 120

/* 16-bit code as a blob: CODE16(name, "asm") gives name and name_end. */
#define CODE16(name, text)                                                         \
    extern const char name[], name##_end[];                                        \
    __asm__(".pushsection .rodata\n.code16\n.globl " #name "\n" #name ":\n" text  \
            "\n.globl " #name "_end\n" #name "_end:\n.code64\n.popsection\n")

struct rig_write {
    enum sm_space space;
    uint64_t off, value;
    unsigned len;
};

struct rig {
    struct sm_vm *vm;
    struct rig_side {
        struct rig *rig;
        enum sm_space space;
    } pio, mmio;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    unsigned long writes; /* all; the first RIG_LOG are in log */
    struct rig_write log[RIG_LOG];
    uint64_t next_read;
};

static uint64_t rig_on_read(void *dev, uint64_t off, unsigned len)
{
    struct rig *r = ((struct rig_side *)dev)->rig;
    uint64_t value;

    (void)off, (void)len;
    pthread_mutex_lock(&r->lock);
    value = r->next_read++;
    pthread_mutex_unlock(&r->lock);
    return value;
}

static void rig_on_write(void *dev, uint64_t off, unsigned len, uint64_t value)
{
    struct rig_side *side = dev;
    struct rig *r = side->rig;

    pthread_mutex_lock(&r->lock);
    if (r->writes < RIG_LOG)
        r->log[r->writes] = (struct rig_write){ side->space, off, value, len };
    r->writes++;
    pthread_cond_broadcast(&r->cond);
    pthread_mutex_unlock(&r->lock);
}

static const struct sm_bus_ops rig_ops = { rig_on_read, rig_on_write };

static int rig_enter(struct sm_hv_vcpu *vcpu, void *arg)
{
    (void)arg;
    return sm_hv_vcpu_enter(vcpu, SM_ENTRY_REAL16, RIG_CODE, 0);
}

static void rig_put(struct rig *r, uint64_t gpa, const char *code, const char *end)
{
    CHECK_EQ(sm_mem_write(sm_vm_mem(r->vm), gpa, code, (uint64_t)(end - code)), 0);
}

static struct rig *rig_new(unsigned cpus, const char *code, const char *end)
{
    struct rig *r = calloc(1, sizeof(*r));
    struct sm_vm_config cfg = { .cpus = cpus, .memory_bytes = RIG_RAM };
    char err[128] = "";

    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->cond, NULL);
    r->pio = (struct rig_side){ r, SM_SPACE_PIO };
    r->mmio = (struct rig_side){ r, SM_SPACE_MMIO };
    if (sm_vm_create(&cfg, &r->vm, err, sizeof(err))) {
        fprintf(stderr, "no VM: %s\n", err);
        exit(1);
    }
    CHECK_EQ(sm_bus_add(sm_vm_bus(r->vm), SM_SPACE_PIO, RIG_PORT, 0x100, &rig_ops, &r->pio), 0);
    CHECK_EQ(sm_bus_add(sm_vm_bus(r->vm), SM_SPACE_MMIO, RIG_MMIO, 0x4000, &rig_ops, &r->mmio),
             0);
    rig_put(r, RIG_CODE, code, end);
    CHECK_EQ(sm_vm_vcpu_call(r->vm, 0, rig_enter, NULL), 0);
    return r;
}

static void rig_free(struct rig *r)
{
    sm_vm_destroy(r->vm);
    pthread_cond_destroy(&r->cond);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

static struct timespec rig_deadline(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_REALTIME, &ts);
    ts.tv_sec += RIG_TIMEOUT_S;
    return ts;
}

/* Until the device has seen n writes in all. */
static void rig_wait(struct rig *r, unsigned long n)
{
    struct timespec until = rig_deadline();
    int err = 0;

    pthread_mutex_lock(&r->lock);
    while (r->writes < n && !err)
        err = pthread_cond_timedwait(&r->cond, &r->lock, &until);
    CHECK(r->writes >= n);
    pthread_mutex_unlock(&r->lock);
}

static unsigned long rig_writes(struct rig *r)
{
    unsigned long n;

    pthread_mutex_lock(&r->lock);
    n = r->writes;
    pthread_mutex_unlock(&r->lock);
    return n;
}

/* Until the VM has stopped. */
static struct sm_vm_status rig_wait_stop(struct rig *r)
{
    struct sm_events *ev = sm_vm_events(r->vm);
    struct timespec until = rig_deadline(), now;
    struct sm_vm_status st;

    for (;;) {
        sm_vm_state(r->vm, &st);
        clock_gettime(CLOCK_REALTIME, &now);
        if (st.state == SM_VM_STOPPED || now.tv_sec > until.tv_sec)
            return st;
        poll(&(struct pollfd){ ev->fd, POLLIN, 0 }, 1, 1000);
        sm_events_clear(ev);
    }
}

static uint32_t rig_ram32(struct rig *r, uint64_t gpa)
{
    return __atomic_load_n((uint32_t *)sm_mem_ptr(sm_vm_mem(r->vm), gpa, 4), __ATOMIC_ACQUIRE);
}

#endif
