/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest's clock, stopped on demand: a timer of the I/O thread sets the
 * paravirtual clock back to where it was, again and again. Between two of its
 * turns the clock runs on and is then behind itself, which a kernel that kept
 * time in between reads as "no time has passed" (Linux:
 * CONFIG_CLOCKSOURCE_VALIDATE_LAST_CYCLE); of two readings without that, the
 * later one can be behind by as much.
 */
#include <errno.h>

#include "vm_impl.h"

static void turn_back(struct sm_io_timer *timer)
{
    struct sm_vm *vm = timer->dev;
    struct sm_vm_status status;

    sm_vm_state(vm, &status);
    if (status.state == SM_VM_STOPPED)
        return;
    (void)sm_hv_clock_set(vm->hv, &vm->stopped_at, false);
    sm_io_arm(vm->ios[0], timer, sm_io_now_ns() + SM_CLOCK_STOP_NS);
}

static int begin(void *arg)
{
    struct sm_vm *vm = arg;
    int err;

    if (vm->clock_timer.deadline_ns)
        return -EALREADY;
    err = sm_hv_clock_get(vm->hv, &vm->stopped_at);
    if (err)
        return err;
    vm->clock_timer.fn = turn_back;
    vm->clock_timer.dev = vm;
    sm_io_arm(vm->ios[0], &vm->clock_timer, sm_io_now_ns() + SM_CLOCK_STOP_NS);
    return 0;
}

static int end(void *arg)
{
    struct sm_vm *vm = arg;

    if (!vm->clock_timer.deadline_ns)
        return -EALREADY;
    sm_io_disarm(vm->ios[0], &vm->clock_timer);
    return sm_hv_clock_set(vm->hv, &vm->stopped_at, false);
}

int sm_vm_clock_stop(struct sm_vm *vm, bool stop)
{
    return sm_io_call(vm->ios[0], stop ? begin : end, vm);
}
