/* SPDX-License-Identifier: Apache-2.0 */
/* Doorbells; see doorbell.h. */
#include "doorbell.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "vm.h"

static void on_ring(struct sm_io_watch *watch, uint32_t events)
{
    struct sm_doorbell *bell = watch->dev;
    eventfd_t n;

    (void)events;
    if (eventfd_read(bell->fd, &n) == 0) {
        atomic_fetch_add(&bell->count, n);
        sm_events_set(sm_vm_events(bell->vm), SM_EVENT_DOORBELL);
    }
}

static int watch_it(void *arg)
{
    struct sm_doorbell *bell = arg;

    return sm_io_watch(sm_vm_io(bell->vm), &bell->watch, bell->fd, EPOLLIN, on_ring, bell);
}

static int unwatch_it(void *arg)
{
    struct sm_doorbell *bell = arg;

    sm_io_unwatch(sm_vm_io(bell->vm), &bell->watch);
    return 0;
}

int sm_doorbell_open(struct sm_doorbell *bell, struct sm_vm *vm, uint64_t gpa, unsigned len,
                     uint32_t value)
{
    int err;

    *bell = (struct sm_doorbell){ .vm = vm, .gpa = gpa, .len = len, .value = value };
    bell->watch.fd = -1;
    bell->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (bell->fd < 0) {
        err = -errno;
        goto fail;
    }
    err = sm_hv_ioeventfd(sm_vm_hv(vm), gpa, len, value, bell->fd, true);
    if (err)
        goto fail_fd;
    err = sm_io_call(sm_vm_io(vm), watch_it, bell);
    if (err)
        goto fail_ioeventfd;
    return 0;
fail_ioeventfd:
    sm_hv_ioeventfd(sm_vm_hv(vm), gpa, len, value, bell->fd, false);
fail_fd:
    close(bell->fd);
fail:
    bell->vm = NULL;
    return err;
}

void sm_doorbell_close(struct sm_doorbell *bell)
{
    if (!bell->vm)
        return;
    sm_hv_ioeventfd(sm_vm_hv(bell->vm), bell->gpa, bell->len, bell->value, bell->fd, false);
    sm_io_call(sm_vm_io(bell->vm), unwatch_it, bell);
    close(bell->fd);
    bell->vm = NULL;
}
