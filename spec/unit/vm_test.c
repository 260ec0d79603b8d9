/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The VM's run loop and run states on the fake backend: every exit there is
 * and what becomes of it, commands in every state, and threads that end.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "console_log.h"
#include "fake/fake.h"
#include "test.h"
#include "vm.h"

static struct sm_vm *vm_new(unsigned cpus)
{
    struct sm_vm_config cfg = { .cpus = cpus, .memory_bytes = 2u << 20 };
    struct sm_vm *vm = NULL;
    char err[128] = "";

    CHECK_EQ(sm_vm_create(&cfg, &vm, err, sizeof(err)), 0);
    if (!vm)
        exit(1);
    return vm;
}

static struct sm_fake_step exit_step(enum sm_exit_kind kind)
{
    return (struct sm_fake_step){ .kind = SM_FAKE_EXIT, .exit = { .kind = kind } };
}

static struct sm_fake_step io_step(enum sm_exit_kind kind, uint64_t addr, unsigned len, bool write,
                                   uint64_t data)
{
    struct sm_fake_step s = exit_step(kind);

    s.exit.u.io.addr = addr;
    s.exit.u.io.len = (uint8_t)len;
    s.exit.u.io.write = write;
    s.exit.u.io.data = data;
    return s;
}

static struct sm_vm_status wait_state(struct sm_vm *vm, enum sm_run_state state)
{
    struct sm_events *ev = sm_vm_events(vm);
    struct sm_vm_status st;

    for (unsigned i = 0; i < 30; i++) { /* of a second each */
        sm_vm_state(vm, &st);
        if (st.state == state)
            break;
        poll(&(struct pollfd){ ev->fd, POLLIN, 0 }, 1, 1000);
        sm_events_clear(ev);
    }
    CHECK_EQ(st.state, state);
    return st;
}

static struct sm_vm_status end_of(struct sm_fake_step step)
{
    struct sm_vm *vm = vm_new(1);
    struct sm_vm_status st;

    CHECK_EQ(sm_fake_script(sm_vm_hv(vm), 0, &step, 1), 0);
    CHECK_EQ(sm_vm_start(vm), 0);
    st = wait_state(vm, SM_VM_STOPPED);
    sm_vm_destroy(vm);
    return st;
}

static void every_fatal_exit_ends_the_vm(void)
{
    struct sm_fake_step fault = exit_step(SM_EXIT_FAULT);
    struct sm_vm_status st;

    st = end_of(exit_step(SM_EXIT_SHUTDOWN));
    CHECK_EQ(st.reason, SM_STOP_CRASH);
    CHECK(!strcmp(st.detail, "triple fault on vcpu 0"));
    st = end_of(exit_step(SM_EXIT_POWEROFF));
    CHECK_EQ(st.reason, SM_STOP_POWEROFF);
    st = end_of(exit_step(SM_EXIT_RESET));
    CHECK_EQ(st.reason, SM_STOP_REBOOT);
    st = end_of(exit_step(SM_EXIT_HALT));
    CHECK_EQ(st.reason, SM_STOP_CRASH);
    fault.exit.u.fault.reason = 17;
    fault.exit.u.fault.detail = 0xbad;
    fault.exit.u.fault.what = "made up";
    st = end_of(fault);
    CHECK_EQ(st.reason, SM_STOP_CRASH);
    CHECK(!strcmp(st.detail, "made up (17, 0xbad) on vcpu 0"));
    /* and those a guest makes by writing */
    st = end_of(io_step(SM_EXIT_PIO, 0x600, 1, true, 0x34));
    CHECK_EQ(st.reason, SM_STOP_POWEROFF);
    st = end_of(io_step(SM_EXIT_PIO, 0x64, 1, true, 0xfe));
    CHECK_EQ(st.reason, SM_STOP_REBOOT);
    st = end_of(io_step(SM_EXIT_PIO, 0x505, 1, true, 1));
    CHECK_EQ(st.reason, SM_STOP_PANIC);
}

static void accesses_reach_the_bus_and_are_counted(void)
{
    struct sm_vm *vm = vm_new(1);
    struct sm_fake_step steps[] = {
        io_step(SM_EXIT_PIO, 0x3f8, 1, true, 'k'),    /* serial */
        io_step(SM_EXIT_PIO, 0x3fd, 1, false, 0),     /* its status */
        io_step(SM_EXIT_PIO, 0x1234, 2, false, 0),    /* nobody */
        io_step(SM_EXIT_MMIO, 0xd0000000, 4, false, 0), /* no device in the slot */
        io_step(SM_EXIT_MMIO, 0xd0000000, 4, true, 7),
        exit_step(SM_EXIT_KICKED),
        io_step(SM_EXIT_PIO, 0x600, 1, true, 0x34),
    };
    struct sm_vcpu_stats stats;
    uint64_t value = 0, lost;
    char c = 0;

    CHECK_EQ(sm_vm_add_serial(vm), 0);
    CHECK_EQ(sm_vm_add_serial(vm), -EEXIST);
    CHECK_EQ(sm_fake_script(sm_vm_hv(vm), 0, steps, 7), 0);
    CHECK_EQ(sm_vm_start(vm), 0);
    wait_state(vm, SM_VM_STOPPED);
    CHECK_EQ(sm_console_log_read(sm_vm_console(vm), &c, 1, &lost), 1);
    CHECK_EQ(c, 'k');
    CHECK(sm_fake_read_value(sm_vm_hv(vm), 0, 0, &value));
    CHECK_EQ(value, 0x60);
    CHECK(sm_fake_read_value(sm_vm_hv(vm), 0, 1, &value));
    CHECK_EQ(value & 0xffff, 0xffff);
    CHECK(sm_fake_read_value(sm_vm_hv(vm), 0, 2, &value));
    CHECK_EQ(value & 0xffffffff, 0xffffffff);
    sm_vm_vcpu_stats(vm, 0, &stats);
    CHECK_EQ(stats.pio, 4);
    CHECK_EQ(stats.mmio, 2);
    CHECK_EQ(stats.unclaimed, 3);
    CHECK(stats.exits >= 7 && stats.kicks >= 1);
    sm_vm_destroy(vm);
}

static int add_one(struct sm_hv_vcpu *vcpu, void *arg)
{
    (void)vcpu;
    return ++*(int *)arg;
}

static const struct sm_fake_step wait_kick = { .kind = SM_FAKE_WAIT_KICK };

static void commands_come_back_in_every_state(void)
{
    struct sm_vm *vm = vm_new(3);
    int n = 0;

    for (unsigned i = 0; i < 3; i++)
        CHECK_EQ(sm_fake_script(sm_vm_hv(vm), i, &wait_kick, 1), 0);
    CHECK_EQ(sm_vm_vcpu_call(vm, 3, add_one, &n), -EINVAL);
    CHECK_EQ(sm_vm_vcpu_call(vm, 2, add_one, &n), 1); /* created */
    CHECK_EQ(sm_vm_pause(vm), -EINVAL);
    CHECK_EQ(sm_vm_resume(vm), -EINVAL);
    CHECK_EQ(sm_vm_start(vm), 0);
    CHECK_EQ(sm_vm_start(vm), -EINVAL);
    for (unsigned i = 0; i < 300; i++)
        CHECK_EQ(sm_vm_vcpu_call(vm, i % 3, add_one, &n), (int)i + 2); /* running */
    CHECK_EQ(sm_vm_resume(vm), -EINVAL);
    CHECK_EQ(sm_vm_pause(vm), 0);
    CHECK_EQ(sm_vm_pause(vm), -EINVAL);
    CHECK_EQ(sm_vm_vcpu_call(vm, 1, add_one, &n), 302); /* paused */
    CHECK_EQ(sm_vm_resume(vm), 0);
    for (unsigned i = 0; i < 100; i++) {
        CHECK_EQ(sm_vm_pause(vm), 0);
        CHECK_EQ(sm_vm_resume(vm), 0);
    }
    sm_vm_stop(vm, SM_STOP_KILLED, "enough");
    CHECK_EQ(sm_vm_vcpu_call(vm, 1, add_one, &n), 303); /* stopped */
    CHECK_EQ(sm_vm_start(vm), -EINVAL);
    CHECK_EQ(sm_vm_resume(vm), -EINVAL);
    sm_vm_destroy(vm);
}

static void the_first_reason_wins(void)
{
    struct sm_vm *vm = vm_new(1);
    struct sm_vm_status st;

    sm_vm_stop(vm, SM_STOP_PANIC, "first");
    sm_vm_stop(vm, SM_STOP_POWEROFF, "second");
    sm_vm_state(vm, &st);
    CHECK_EQ(st.reason, SM_STOP_PANIC);
    CHECK(!strcmp(st.detail, "first"));
    CHECK(!strcmp(sm_stop_name(st.reason), "panic"));
    CHECK(!strcmp(sm_run_state_name(st.state), "stopped"));
    CHECK_EQ(sm_vm_add_serial(vm), -EBUSY);
    sm_vm_destroy(vm);
}

static void *stop_it(void *arg)
{
    sm_vm_stop(arg, SM_STOP_KILLED, "from another thread");
    return NULL;
}

static void a_stop_may_cross_anything(void)
{
    for (unsigned i = 0; i < 60; i++) {
        struct sm_vm *vm = vm_new(1 + i % 4);
        pthread_t thread;

        for (unsigned c = 0; c < 1 + i % 4; c++)
            CHECK_EQ(sm_fake_script(sm_vm_hv(vm), c, &wait_kick, 1), 0);
        if (i % 2)
            CHECK_EQ(sm_vm_start(vm), 0);
        pthread_create(&thread, NULL, stop_it, vm);
        if (i % 2) {
            if (sm_vm_pause(vm) == 0)
                sm_vm_resume(vm);
        } else {
            sm_vm_start(vm);
        }
        pthread_join(thread, NULL);
        wait_state(vm, SM_VM_STOPPED);
        sm_vm_destroy(vm);
    }
}

static void a_debug_exit_parks_one_vcpu(void)
{
    struct sm_vm *vm = vm_new(2);
    struct sm_fake_step steps[] = { exit_step(SM_EXIT_DEBUG), exit_step(SM_EXIT_POWEROFF) };
    struct sm_vm_status st;
    int n = 0, parked = -1;

    CHECK_EQ(sm_fake_script(sm_vm_hv(vm), 0, steps, 2), 0);
    CHECK_EQ(sm_fake_script(sm_vm_hv(vm), 1, &wait_kick, 1), 0);
    CHECK_EQ(sm_vm_vcpu_continue(vm, 0, false), -EINVAL);
    CHECK_EQ(sm_vm_start(vm), 0);
    for (unsigned i = 0; i < 30 && parked < 0; i++) {
        poll(&(struct pollfd){ sm_vm_events(vm)->fd, POLLIN, 0 }, 1, 1000);
        sm_events_clear(sm_vm_events(vm));
        parked = sm_events_take_parked(sm_vm_events(vm));
    }
    CHECK_EQ(parked, 0);
    CHECK_EQ(sm_vm_vcpu_call(vm, 0, add_one, &n), 1);
    sm_vm_state(vm, &st);
    CHECK_EQ(st.state, SM_VM_RUNNING);
    CHECK_EQ(sm_vm_vcpu_continue(vm, 0, false), 0);
    CHECK_EQ(wait_state(vm, SM_VM_STOPPED).reason, SM_STOP_POWEROFF);
    sm_vm_destroy(vm);
}

static uint64_t guest_ns(struct sm_vm *vm)
{
    struct sm_clock clock;

    CHECK_EQ(sm_hv_clock_get(sm_vm_hv(vm), &clock), 0);
    return clock.guest_ticks;
}

static void pass_time(uint64_t ns)
{
    uint64_t until = sm_io_now_ns() + ns;

    while (sm_io_now_ns() < until)
        poll(NULL, 0, 10);
}

/* In halves, for the thread that turns the clock back may be late. */
static void a_stopped_clock_stands_and_goes_on_from_there(void)
{
    const uint64_t span = 400000000;
    struct sm_vm *vm = vm_new(1);
    uint64_t then, gone;

    CHECK_EQ(sm_vm_clock_stop(vm, false), -EALREADY);
    then = guest_ns(vm);
    CHECK_EQ(sm_vm_clock_stop(vm, true), 0);
    CHECK_EQ(sm_vm_clock_stop(vm, true), -EALREADY);
    pass_time(span);
    CHECK_EQ(sm_vm_clock_stop(vm, false), 0);
    gone = guest_ns(vm) - then;
    CHECK(gone < span / 2);
    then = guest_ns(vm);
    pass_time(span);
    CHECK(guest_ns(vm) - then >= span);
    sm_vm_destroy(vm);
}

int main(void)
{
    TEST(every_fatal_exit_ends_the_vm);
    TEST(accesses_reach_the_bus_and_are_counted);
    TEST(commands_come_back_in_every_state);
    TEST(the_first_reason_wins);
    TEST(a_stop_may_cross_anything);
    TEST(a_debug_exit_parks_one_vcpu);
    TEST(a_stopped_clock_stands_and_goes_on_from_there);
    return test_report();
}
