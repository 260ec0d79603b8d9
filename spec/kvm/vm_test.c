/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The VM and the KVM backend on a real /dev/kvm, with bare-metal guests: every
 * way out of a guest, and everything that is asked of a vCPU from outside.
 */
#include <dirent.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "dev/pvpanic.h"
#include "dev/power.h"
#include "rig.h"

/* --- accesses ----------------------------------------------------------- */

CODE16(code_access,
       "mov $0x1000, %dx\n"
       "mov $0x11, %al\n out %al, %dx\n"
       "mov $0x2222, %ax\n out %ax, %dx\n"
       "mov $0x33333333, %eax\n out %eax, %dx\n"
       "in %dx, %al\n mov $0x1004, %dx\n out %al, %dx\n" /* read 0 */
       "mov $0x1000, %dx\n in %dx, %ax\n mov $0x1004, %dx\n out %ax, %dx\n"
       "mov $0x1000, %dx\n in %dx, %eax\n mov $0x1004, %dx\n out %eax, %dx\n"
       "mov $0xb800, %ax\n mov %ax, %ds\n"
       "movl $0x44444444, (0x10)\n"
       "mov (0x20), %eax\n mov %eax, (0x24)\n" /* read 3 */
       "hlt\n");

static void accesses_of_every_width(void)
{
    static const struct rig_write want[] = {
        { SM_SPACE_PIO, 0, 0x11, 1 },          { SM_SPACE_PIO, 0, 0x2222, 2 },
        { SM_SPACE_PIO, 0, 0x33333333, 4 },    { SM_SPACE_PIO, 4, 100, 1 },
        { SM_SPACE_PIO, 4, 101, 2 },           { SM_SPACE_PIO, 4, 102, 4 },
        { SM_SPACE_MMIO, 0x10, 0x44444444, 4 }, { SM_SPACE_MMIO, 0x24, 103, 4 },
    };
    struct rig *r = rig_new(1, code_access, code_access_end);

    r->next_read = 100;
    CHECK_EQ(sm_vm_start(r->vm), 0);
    rig_wait(r, 8);
    for (unsigned i = 0; i < 8; i++) {
        CHECK_EQ(r->log[i].space, want[i].space);
        CHECK_EQ(r->log[i].off, want[i].off);
        CHECK_EQ(r->log[i].len, want[i].len);
        CHECK_EQ(r->log[i].value, want[i].value);
    }
    rig_free(r);
}

CODE16(code_rep,
       "xor %ax, %ax\n mov %ax, %ds\n mov %ax, %es\n cld\n"
       "mov $0x1000, %dx\n mov $0x4000, %di\n mov $40, %cx\n"
       "rep insl\n" /* 40 reads of 4 bytes into 0x4000 */
       "mov $0x4000, %si\n mov $40, %cx\n"
       "rep outsl\n"
       "hlt\n");

static void rep_is_delivered_item_by_item(void)
{
    struct rig *r = rig_new(1, code_rep, code_rep_end);

    r->next_read = 1000;
    CHECK_EQ(sm_vm_start(r->vm), 0);
    rig_wait(r, 40);
    for (unsigned i = 0; i < 40; i++) {
        CHECK_EQ(r->log[i].value, 1000 + i);
        CHECK_EQ(r->log[i].len, 4);
        CHECK_EQ(r->log[i].off, 0);
    }
    rig_free(r);
}

CODE16(code_cross,
       "mov $0xb800, %ax\n mov %ax, %ds\n"
       "movl $0x04030201, (0xfff)\n" /* one byte on a page, three on the next */
       "mov $0x1000, %dx\n mov $1, %al\n out %al, %dx\n hlt\n");

static void access_across_a_page_loses_nothing(void)
{
    struct rig *r = rig_new(1, code_cross, code_cross_end);
    uint8_t seen[4] = { 0 };
    unsigned i;

    CHECK_EQ(sm_vm_start(r->vm), 0);
    for (i = 1; i < 8; i++) {
        rig_wait(r, i);
        if (r->log[i - 1].space == SM_SPACE_PIO)
            break;
        for (unsigned b = 0; b < r->log[i - 1].len; b++)
            seen[r->log[i - 1].off + b - 0xfff] = (uint8_t)(r->log[i - 1].value >> (8 * b));
    }
    CHECK(seen[0] == 1 && seen[1] == 2 && seen[2] == 3 && seen[3] == 4);
    rig_free(r);
}

static void unclaimed_access_reads_ones(void)
{
    CODE16(code_unclaimed, "mov $0x2000, %dx\n in %dx, %eax\n out %eax, %dx\n"
                           "mov $0x1000, %dx\n out %eax, %dx\n hlt\n");
    struct rig *r = rig_new(1, code_unclaimed, code_unclaimed_end);
    struct sm_vcpu_stats stats;

    CHECK_EQ(sm_vm_start(r->vm), 0);
    rig_wait(r, 1);
    CHECK_EQ(r->log[0].value, 0xffffffff);
    sm_vm_vcpu_stats(r->vm, 0, &stats);
    CHECK_EQ(stats.unclaimed, 2);
    rig_free(r);
}

/* --- ends --------------------------------------------------------------- */

static void end_case(const char *code, const char *end, enum sm_stop reason, const char *detail)
{
    struct rig *r = rig_new(1, code, end);
    struct sm_vm_status st;

    CHECK_EQ(sm_vm_start(r->vm), 0);
    st = rig_wait_stop(r);
    CHECK_EQ(st.state, SM_VM_STOPPED);
    CHECK_EQ(st.reason, reason);
    CHECK(strstr(st.detail, detail) != NULL);
    CHECK_EQ(sm_vm_start(r->vm), -EINVAL);
    CHECK_EQ(sm_vm_pause(r->vm), -EINVAL);
    CHECK_EQ(sm_vm_resume(r->vm), -EINVAL);
    rig_free(r);
}

static void every_end_has_its_name(void)
{
    CODE16(code_triple, "xor %ax, %ax\n mov %ax, %ds\n movl $0, (0x600)\n movw $0, (0x604)\n"
                        "lidt (0x600)\n int3\n");
    CODE16(code_s5, "mov $0x600, %dx\n mov $0x34, %al\n out %al, %dx\n 1: hlt\n jmp 1b\n");
    CODE16(code_reset, "mov $0x602, %dx\n mov $1, %al\n out %al, %dx\n 1: hlt\n jmp 1b\n");
    CODE16(code_cf9, "mov $0xcf9, %dx\n mov $0x6, %al\n out %al, %dx\n 1: hlt\n jmp 1b\n");
    CODE16(code_kbd, "in $0x64, %al\n test %al, %al\n jnz 1f\n mov $0xfe, %al\n out %al, $0x64\n"
                     "1: hlt\n jmp 1b\n");
    CODE16(code_panic, "mov $0x505, %dx\n in %dx, %al\n and $1, %al\n out %al, %dx\n"
                       "1: hlt\n jmp 1b\n");

    end_case(code_triple, code_triple_end, SM_STOP_CRASH, "triple fault on vcpu 0");
    end_case(code_s5, code_s5_end, SM_STOP_POWEROFF, "ACPI S5");
    end_case(code_reset, code_reset_end, SM_STOP_REBOOT, "ACPI reset register");
    end_case(code_cf9, code_cf9_end, SM_STOP_REBOOT, "0xcf9");
    end_case(code_kbd, code_kbd_end, SM_STOP_REBOOT, "keyboard");
    end_case(code_panic, code_panic_end, SM_STOP_PANIC, "pvpanic");
}

static void crash_kernel_is_not_an_end(void)
{
    CODE16(code_crash, "mov $0x505, %dx\n mov $2, %al\n out %al, %dx\n"
                       "mov $0x1000, %dx\n out %al, %dx\n hlt\n");
    struct rig *r = rig_new(1, code_crash, code_crash_end);
    struct sm_notice notice = { 0 };
    struct sm_vm_status st;

    CHECK_EQ(sm_vm_start(r->vm), 0);
    rig_wait(r, 1);
    sm_vm_state(r->vm, &st);
    CHECK_EQ(st.state, SM_VM_RUNNING);
    CHECK(sm_events_take_notice(sm_vm_events(r->vm), &notice));
    CHECK(notice.source && !strcmp(notice.source, "pvpanic"));
    rig_free(r);
}

/* --- commands from outside ---------------------------------------------- */

static int read_rip(struct sm_hv_vcpu *vcpu, void *arg)
{
    return sm_hv_reg_get(vcpu, SM_X86_RIP, arg);
}

CODE16(code_spin, "xor %ax, %ax\n mov %ax, %ds\n 1: lock incl (0x500)\n jmp 1b\n");
CODE16(code_halt, "sti\n 1: hlt\n jmp 1b\n");
/* Reads must be consecutive, whatever happens between: else a write. */
CODE16(code_io, "xor %ax, %ax\n mov %ax, %ds\n mov $0x1000, %dx\n in %dx, %eax\n"
                "1: mov %eax, %ebx\n in %dx, %eax\n inc %ebx\n lock incl (0x500)\n"
                "cmp %eax, %ebx\n je 1b\n out %eax, %dx\n hlt\n");

/* A storm of commands: each must come back, and the guest go on after. */
static void storm(const char *code, const char *end, bool progresses)
{
    struct rig *r = rig_new(1, code, end);
    uint32_t before;

    CHECK_EQ(sm_vm_start(r->vm), 0);
    for (unsigned i = 0; i < 1500; i++) {
        uint64_t rip = 0;

        CHECK_EQ(sm_vm_vcpu_call(r->vm, 0, read_rip, &rip), 0);
        CHECK(rip >= RIG_CODE && rip <= RIG_CODE + (uint64_t)(end - code));
        if (i % 5)
            continue;
        CHECK_EQ(sm_vm_pause(r->vm), 0);
        before = rig_ram32(r, 0x500);
        CHECK_EQ(sm_vm_vcpu_call(r->vm, 0, read_rip, &rip), 0);
        CHECK_EQ(rig_ram32(r, 0x500), before);
        CHECK_EQ(sm_vm_resume(r->vm), 0);
        if (progresses && i % 50 == 0) {
            struct timespec until = rig_deadline(), now;

            do
                clock_gettime(CLOCK_REALTIME, &now);
            while (rig_ram32(r, 0x500) == before && now.tv_sec < until.tv_sec);
            CHECK(rig_ram32(r, 0x500) != before);
        }
    }
    CHECK_EQ(rig_writes(r), 0);
    rig_free(r);
}

static void kicks_are_never_lost_spinning(void)
{
    storm(code_spin, code_spin_end, true);
}

static void kicks_are_never_lost_halted(void)
{
    storm(code_halt, code_halt_end, false);
}

static void no_read_is_lost_or_repeated(void)
{
    storm(code_io, code_io_end, true);
}

static void the_host_program_keeps_its_signals(void)
{
    struct sigaction before, after;
    sigset_t mask_before, mask_after;
    struct rig *r;
    uint64_t rip;

    sigaction(SIGRTMIN, NULL, &before);
    pthread_sigmask(SIG_SETMASK, NULL, &mask_before);
    r = rig_new(2, code_spin, code_spin_end);
    CHECK_EQ(sm_vm_start(r->vm), 0);
    for (unsigned i = 0; i < 100; i++)
        CHECK_EQ(sm_vm_vcpu_call(r->vm, i % 2, read_rip, &rip), 0);
    rig_free(r);
    sigaction(SIGRTMIN, NULL, &after);
    pthread_sigmask(SIG_SETMASK, NULL, &mask_after);
    CHECK(before.sa_handler == after.sa_handler && after.sa_handler == SIG_DFL);
    for (int sig = 1; sig <= SIGRTMAX; sig++)
        CHECK_EQ(sigismember(&mask_before, sig), sigismember(&mask_after, sig));
}

struct reg_pair {
    uint64_t reg, value;
};

static int reg_round_trip(struct sm_hv_vcpu *vcpu, void *arg)
{
    struct reg_pair *p = arg;
    uint64_t back = 0;
    int err = sm_hv_reg_set(vcpu, p->reg, p->value);

    if (!err)
        err = sm_hv_reg_get(vcpu, p->reg, &back);
    p->value = back;
    return err;
}

static void registers_round_trip(void)
{
    static const struct reg_pair pairs[] = {
        { SM_X86_RAX, 0x1122334455667788 }, { SM_X86_R15, ~0ull },
        { SM_X86_RFLAGS, 0x202 },           { SM_X86_CS, 0x1230 },
        { SM_X86_CS_BASE, 0x12300 },        { SM_X86_DS_ATTR, 0xffffull | 0x93ull << 32 },
        { SM_X86_GDT_BASE, 0x5000 },        { SM_X86_IDT_LIMIT, 0x3ff },
        { SM_REG_MSR | 0xc0000102, 0x7000 }, /* KERNEL_GS_BASE */
    };
    struct rig *r = rig_new(1, code_halt, code_halt_end);
    struct reg_pair bad = { SM_X86_REGS, 0 };

    for (unsigned i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++) {
        struct reg_pair p = pairs[i];

        CHECK_EQ(sm_vm_vcpu_call(r->vm, 0, reg_round_trip, &p), 0);
        CHECK_EQ(p.value, pairs[i].value);
    }
    CHECK_EQ(sm_vm_vcpu_call(r->vm, 0, reg_round_trip, &bad), -EINVAL);
    for (uint64_t i = 0; i < SM_X86_REGS; i++)
        CHECK(sm_hv_reg_name(i) && sm_hv_reg_find(sm_hv_reg_name(i)) == (int64_t)i);
    CHECK_EQ(sm_hv_reg_find("rxx"), -EINVAL);
    rig_free(r);
}

static int step_on(struct sm_hv_vcpu *vcpu, void *arg)
{
    struct sm_hv_debug debug = { .step = *(bool *)arg };

    return sm_hv_vcpu_debug(vcpu, &debug);
}

static int take_parked(struct rig *r)
{
    struct timespec until = rig_deadline(), now;
    int index;

    do {
        struct pollfd pfd = { sm_vm_events(r->vm)->fd, POLLIN, 0 };

        poll(&pfd, 1, 1000);
        sm_events_clear(sm_vm_events(r->vm));
        index = sm_events_take_parked(sm_vm_events(r->vm));
        clock_gettime(CLOCK_REALTIME, &now);
    } while (index < 0 && now.tv_sec < until.tv_sec);
    return index;
}

static void single_steps_park_the_vcpu(void)
{
    CODE16(code_nops, "1: nop\n nop\n nop\n jmp 1b\n");
    struct rig *r = rig_new(1, code_nops, code_nops_end);
    bool on = true;
    uint64_t last = RIG_CODE, rip;

    CHECK_EQ(sm_vm_vcpu_call(r->vm, 0, step_on, &on), 0);
    CHECK_EQ(sm_vm_start(r->vm), 0);
    for (unsigned i = 0; i < 20; i++) {
        CHECK_EQ(take_parked(r), 0);
        CHECK_EQ(sm_vm_vcpu_call(r->vm, 0, read_rip, &rip), 0);
        CHECK_EQ(rip, last == RIG_CODE + 3 ? RIG_CODE : last + 1);
        last = rip;
        CHECK_EQ(sm_vm_vcpu_continue(r->vm, 0, false), 0);
    }
    rig_free(r);
}

/* --- SMP, interrupts, doorbells ------------------------------------------ */

/* INIT and SIPI (vector 0x11: 0x11000) to all others, by x2APIC. */
CODE16(code_smp, "mov $0x1b, %ecx\n rdmsr\n or $0xc00, %eax\n wrmsr\n"
                 "mov $0x830, %ecx\n xor %edx, %edx\n mov $0xc4500, %eax\n wrmsr\n"
                 "mov $0xc4611, %eax\n wrmsr\n"
                 "1: hlt\n jmp 1b\n");
/* Each tells its APIC id as CPUID leaf 1 has it, then counts. */
CODE16(code_ap, "mov $1, %eax\n cpuid\n shr $24, %ebx\n mov %bl, %al\n"
                "mov $0x1000, %dx\n out %al, %dx\n"
                "xor %ax, %ax\n mov %ax, %ds\n 1: lock incl (0x500)\n jmp 1b\n");

static void eight_cpus_run_and_pause(void)
{
    struct rig *r = rig_new(8, code_smp, code_smp_end);
    unsigned seen = 0;

    rig_put(r, 0x11000, code_ap, code_ap_end);
    CHECK_EQ(sm_vm_start(r->vm), 0);
    rig_wait(r, 7);
    for (unsigned i = 0; i < 7; i++)
        seen |= 1u << r->log[i].value;
    CHECK_EQ(seen, 0xfe);
    for (unsigned i = 0; i < 60; i++) {
        uint32_t before;
        uint64_t rip;

        CHECK_EQ(sm_vm_pause(r->vm), 0);
        before = rig_ram32(r, 0x500);
        CHECK_EQ(sm_vm_vcpu_call(r->vm, i % 8, read_rip, &rip), 0);
        CHECK_EQ(rig_ram32(r, 0x500), before);
        CHECK_EQ(sm_vm_resume(r->vm), 0);
        CHECK_EQ(sm_vm_vcpu_call(r->vm, i % 8, read_rip, &rip), 0);
    }
    rig_free(r);
}

/* PIC to vector 0x20, IRQ 5 open; each interrupt is told at the port. */
CODE16(code_irq, "cli\n xor %ax, %ax\n mov %ax, %ds\n mov %ax, %ss\n mov $0x800, %sp\n"
                 "movw $0x1800, (0x94)\n movw $0, (0x96)\n" /* vector 0x25 */
                 "mov $0x11, %al\n out %al, $0x20\n mov $0x20, %al\n out %al, $0x21\n"
                 "mov $0x04, %al\n out %al, $0x21\n mov $0x01, %al\n out %al, $0x21\n"
                 "mov $0xdf, %al\n out %al, $0x21\n"
                 "mov $0x1004, %dx\n out %al, %dx\n" /* ready */
                 "1: sti\n hlt\n jmp 1b\n");
CODE16(code_isr, "push %ax\n push %dx\n mov $0x20, %al\n out %al, $0x20\n"
                 "mov $0x1000, %dx\n out %al, %dx\n pop %dx\n pop %ax\n iret\n");

static void irqfd_interrupts_a_halted_guest(void)
{
    struct rig *r = rig_new(1, code_irq, code_irq_end);
    struct sm_irq irq;

    rig_put(r, 0x1800, code_isr, code_isr_end);
    CHECK_EQ(sm_vm_next_irq(r->vm, &irq), 0);
    CHECK_EQ(irq.gsi, 5);
    CHECK(irq.fd >= 0);
    CHECK_EQ(sm_vm_start(r->vm), 0);
    rig_wait(r, 1);
    for (unsigned i = 0; i < 200; i++) {
        sm_irq_raise(&irq);
        rig_wait(r, 2 + i);
        if (i % 20 == 0) { /* raised while paused: not lost either */
            CHECK_EQ(sm_vm_pause(r->vm), 0);
            CHECK_EQ(rig_writes(r), 2 + i);
            CHECK_EQ(sm_vm_resume(r->vm), 0);
        }
    }
    CHECK_EQ(rig_writes(r), 201);
    sm_irq_close(&irq);
    rig_free(r);
}

static void gsis_run_out_politely(void)
{
    struct rig *r = rig_new(1, code_halt, code_halt_end);
    struct sm_irq irqs[32];
    unsigned n = 0;
    int err;

    while (n < 32 && !(err = sm_vm_next_irq(r->vm, &irqs[n]))) {
        CHECK(irqs[n].gsi != 8 && irqs[n].gsi != 9 && irqs[n].gsi < 24);
        n++;
    }
    CHECK_EQ(err, -ENOSPC);
    CHECK(n >= SM_VIRTIO_MMIO_MAX);
    while (n--)
        sm_irq_close(&irqs[n]);
    rig_free(r);
}

CODE16(code_bell, "mov $0xb800, %ax\n mov %ax, %ds\n mov $50, %cx\n"
                  "1: movl $1, (0x50)\n loop 1b\n"
                  "movl $2, (0x50)\n movl $3, (0x50)\n hlt\n");

static void doorbell_rings_without_an_exit(void)
{
    struct rig *r = rig_new(1, code_bell, code_bell_end);
    int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    struct sm_vcpu_stats stats;
    uint64_t count = 0;

    CHECK_EQ(sm_hv_ioeventfd(sm_vm_hv(r->vm), RIG_MMIO + 0x50, 4, 1, fd, true), 0);
    CHECK_EQ(sm_vm_start(r->vm), 0);
    rig_wait(r, 2);
    CHECK_EQ(r->log[0].value, 2);
    CHECK_EQ(r->log[1].value, 3);
    CHECK_EQ(read(fd, &count, sizeof(count)), 8);
    CHECK_EQ(count, 50);
    sm_vm_vcpu_stats(r->vm, 0, &stats);
    CHECK_EQ(stats.mmio, 2);
    CHECK_EQ(sm_hv_ioeventfd(sm_vm_hv(r->vm), RIG_MMIO + 0x50, 4, 1, fd, false), 0);
    rig_free(r);
    close(fd);
}

/* --- life --------------------------------------------------------------- */

static unsigned entries(const char *path)
{
    DIR *dir = opendir(path);
    unsigned n = 0;

    while (dir && readdir(dir))
        n++;
    if (dir)
        closedir(dir);
    return n;
}

static void *stop_soon(void *arg)
{
    sm_vm_stop(arg, SM_STOP_KILLED, "by another thread");
    return NULL;
}

static void nothing_is_left_of_many_vms(void)
{
    unsigned fds = 0, threads = 0;

    for (unsigned i = 0; i < 25; i++) {
        struct rig *r = rig_new(1 + i % 4, code_spin, code_spin_end);
        pthread_t thread;

        if (i % 3)
            CHECK_EQ(sm_vm_start(r->vm), 0);
        if (i % 3 == 2) { /* a stop that crosses a pause */
            pthread_create(&thread, NULL, stop_soon, r->vm);
            sm_vm_pause(r->vm);
            pthread_join(thread, NULL);
        }
        rig_free(r);
        if (i == 2) { /* after each kind has run once */
            fds = entries("/proc/self/fd");
            threads = entries("/proc/self/task");
        }
    }
    CHECK_EQ(entries("/proc/self/fd"), fds);
    CHECK_EQ(entries("/proc/self/task"), threads);
}

static void bad_configurations_are_refused(void)
{
    static const struct sm_vm_config bad[] = {
        { .cpus = 0, .memory_bytes = 1 << 20 },
        { .cpus = SM_MAX_VCPUS + 1, .memory_bytes = 1 << 20 },
        { .cpus = 1, .memory_bytes = 12345 },
        { .cpus = 1, .memory_bytes = 1ull << 60 },
    };

    for (unsigned i = 0; i < 4; i++) {
        struct sm_vm *vm = NULL;
        char err[128] = "";

        CHECK_EQ(sm_vm_create(&bad[i], &vm, err, sizeof(err)), -EINVAL);
        CHECK(vm == NULL && err[0]);
    }
}

int main(void)
{
    alarm(500); /* a lost kick is a failure, not a hang */
    TEST(accesses_of_every_width);
    TEST(rep_is_delivered_item_by_item);
    TEST(access_across_a_page_loses_nothing);
    TEST(unclaimed_access_reads_ones);
    TEST(every_end_has_its_name);
    TEST(crash_kernel_is_not_an_end);
    TEST(kicks_are_never_lost_spinning);
    TEST(kicks_are_never_lost_halted);
    TEST(no_read_is_lost_or_repeated);
    TEST(the_host_program_keeps_its_signals);
    TEST(registers_round_trip);
    TEST(single_steps_park_the_vcpu);
    TEST(eight_cpus_run_and_pause);
    TEST(irqfd_interrupts_a_halted_guest);
    TEST(gsis_run_out_politely);
    TEST(doorbell_rings_without_an_exit);
    TEST(nothing_is_left_of_many_vms);
    TEST(bad_configurations_are_refused);
    return test_report();
}
