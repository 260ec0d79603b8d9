/* SPDX-License-Identifier: Apache-2.0 */
/*
 * KVM: running a vCPU.
 *
 * The kick. SIGRTMIN is blocked in the vCPU's thread everywhere but inside
 * KVM_RUN, which unblocks it for its own duration (KVM_SET_SIGNAL_MASK). A
 * kick sets immediate_exit and sends the signal to the thread:
 *   - before KVM_RUN: the signal is pending, so KVM_RUN returns EINTR at once;
 *   - inside: it interrupts the guest, or the sleep of a halted vCPU;
 *   - after: it stays pending for the next KVM_RUN.
 * So it is never lost. It is never delivered either: KVM_RUN blocks it again
 * before it returns to user space, where it is drained with sigtimedwait. No
 * handler is installed in the host's program, and its other threads are not
 * concerned, for the signal is sent to one thread.
 *
 * Clear immediate_exit first and drain after: a kick that arrives between the
 * two leaves immediate_exit set or the signal pending, and one of them is
 * enough.
 *
 * Accesses. KVM hands out a REP port access as one exit with many items and a
 * memory access in fragments of any length; the contract wants 1, 2, 4 or 8
 * bytes at a time. sm_kvm_access walks such an exit piece by piece, without
 * entering the guest between them.
 */
#include "kvm.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* The kernel's sigset is 8 bytes, not glibc's 128. */
#define KERNEL_SIGSET_BYTES 8

static int kick_signal(void)
{
    return SIGRTMIN;
}

/* Inside KVM_RUN everything stays blocked but the kick. */
static int signal_mask_set(struct sm_hv_vcpu *vcpu)
{
    struct {
        struct kvm_signal_mask head;
        uint8_t set[KERNEL_SIGSET_BYTES];
    } arg;
    uint64_t set = ~0ull & ~(1ull << (kick_signal() - 1));

    memset(&arg, 0, sizeof(arg));
    arg.head.len = KERNEL_SIGSET_BYTES;
    /* sigset[] is flexible and starts where the head ends. */
    memcpy((uint8_t *)&arg + offsetof(struct kvm_signal_mask, sigset), &set, sizeof(set));
    return sm_kvm_ioctl(vcpu->fd, KVM_SET_SIGNAL_MASK, &arg);
}

static int kick_block(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, kick_signal());
    return -pthread_sigmask(SIG_BLOCK, &set, NULL);
}

int sm_hv_vcpu_create(struct sm_hv *hv, unsigned index, unsigned cpus, struct sm_hv_vcpu **out)
{
    struct sm_hv_vcpu *vcpu = calloc(1, sizeof(*vcpu));
    void *run;
    int err;

    if (!vcpu)
        return -ENOMEM;
    vcpu->hv = hv;
    vcpu->index = index;
    vcpu->thread = pthread_self();
    vcpu->fd = ioctl(hv->vm_fd, KVM_CREATE_VCPU, (unsigned long)index);
    if (vcpu->fd < 0) {
        err = -errno;
        goto fail;
    }
    fcntl(vcpu->fd, F_SETFD, FD_CLOEXEC);
    run = mmap(NULL, hv->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    if (run == MAP_FAILED) {
        err = -errno;
        goto fail;
    }
    vcpu->run = run;
    madvise(run, hv->run_bytes, MADV_DONTFORK);
    err = kick_block();
    if (!err)
        err = signal_mask_set(vcpu);
    if (!err)
        err = sm_kvm_arch_vcpu_create(vcpu, cpus);
    if (err)
        goto fail;
    *out = vcpu;
    return 0;
fail:
    sm_hv_vcpu_destroy(vcpu);
    return err;
}

static void kicks_drain(void)
{
    static const struct timespec zero;
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, kick_signal());
    while (sigtimedwait(&set, NULL, &zero) > 0)
        ;
}

void sm_hv_vcpu_destroy(struct sm_hv_vcpu *vcpu)
{
    if (!vcpu)
        return;
    if (vcpu->run)
        munmap(vcpu->run, vcpu->hv->run_bytes);
    if (vcpu->fd >= 0)
        close(vcpu->fd);
    kicks_drain(); /* the thread may outlive its vCPU */
    free(vcpu);
}

static void immediate_exit_set(struct sm_hv_vcpu *vcpu, uint8_t value)
{
    __atomic_store_n(&vcpu->run->immediate_exit, value, __ATOMIC_RELEASE);
}

void sm_hv_vcpu_kick(struct sm_hv_vcpu *vcpu)
{
    immediate_exit_set(vcpu, 1);
    pthread_kill(vcpu->thread, kick_signal());
}

/* Start handing out what KVM_RUN left in kvm_run. */
static void access_begin(struct sm_hv_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    struct sm_kvm_access *a = &vcpu->access;

    vcpu->half_done = true;
    if (run->exit_reason == KVM_EXIT_IO) {
        a->addr = run->io.port;
        a->data = (uint8_t *)run + run->io.data_offset;
        a->len = run->io.size;
        a->step = 0;
        a->left = run->io.count;
        a->write = run->io.direction == KVM_EXIT_IO_OUT;
        a->mmio = false;
        return;
    }
    a->addr = run->mmio.phys_addr;
    a->data = run->mmio.data;
    a->write = run->mmio.is_write;
    a->mmio = true;
    switch (run->mmio.len) {
    case 1:
    case 2:
    case 4:
    case 8:
        a->len = a->step = (uint8_t)run->mmio.len;
        a->left = 1;
        break;
    default: /* an access that crosses a page */
        a->len = a->step = 1;
        a->left = run->mmio.len;
    }
}

static struct sm_exit access_next(struct sm_hv_vcpu *vcpu)
{
    struct sm_kvm_access *a = &vcpu->access;
    struct sm_exit exit = { .kind = a->mmio ? SM_EXIT_MMIO : SM_EXIT_PIO };

    exit.u.io.addr = a->addr;
    exit.u.io.len = a->len;
    exit.u.io.write = a->write;
    if (a->write)
        memcpy(&exit.u.io.data, a->data, a->len);
    a->wants_data = !a->write;
    a->left--;
    if (a->write) {
        a->data += a->len;
        a->addr += a->step;
    }
    return exit;
}

void sm_hv_vcpu_complete(struct sm_hv_vcpu *vcpu, uint64_t data)
{
    struct sm_kvm_access *a = &vcpu->access;

    if (!a->wants_data)
        return;
    memcpy(a->data, &data, a->len);
    a->data += a->len;
    a->addr += a->step;
    a->wants_data = false;
}

/* A read nobody completed gets all ones. */
static void access_default(struct sm_hv_vcpu *vcpu)
{
    sm_hv_vcpu_complete(vcpu, ~0ull);
}

/*
 * KVM_RUN. The first one may fail with ENOMEM when a signal is pending while
 * the kernel makes its huge-page recovery thread; once is enough to try again.
 * EAGAIN: an application processor was woken by INIT; go in again.
 */
static int kvm_run(struct sm_hv_vcpu *vcpu)
{
    bool retried = false;

    for (;;) {
        if (ioctl(vcpu->fd, KVM_RUN, 0) == 0) {
            vcpu->entered = true;
            return 0;
        }
        if (errno == EAGAIN)
            continue;
        if (errno == ENOMEM && !vcpu->entered && !retried) {
            retried = true;
            continue;
        }
        return -errno;
    }
}

static struct sm_exit fault(uint32_t reason, uint64_t detail, const char *what)
{
    struct sm_exit exit = { .kind = SM_EXIT_FAULT };

    exit.u.fault.reason = reason;
    exit.u.fault.detail = detail;
    exit.u.fault.what = what;
    return exit;
}

static const char *internal_error_name(uint32_t suberror)
{
    switch (suberror) {
    case KVM_INTERNAL_ERROR_EMULATION:
        return "KVM cannot emulate an instruction";
    case KVM_INTERNAL_ERROR_SIMUL_EX:
        return "KVM met simultaneous exceptions";
    case KVM_INTERNAL_ERROR_DELIVERY_EV:
        return "KVM failed to deliver an event";
    default:
        return "KVM internal error";
    }
}

static struct sm_exit system_event(const struct kvm_run *run)
{
    struct sm_exit exit = { .kind = SM_EXIT_SHUTDOWN };

    if (run->system_event.type == KVM_SYSTEM_EVENT_SHUTDOWN)
        exit.kind = SM_EXIT_POWEROFF;
    else if (run->system_event.type == KVM_SYSTEM_EVENT_RESET)
        exit.kind = SM_EXIT_RESET;
    return exit;
}

/* Every exit KVM documents, and what becomes of it. */
static struct sm_exit exit_from_kvm(struct sm_hv_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    struct sm_exit exit = { .kind = SM_EXIT_KICKED };

    switch (run->exit_reason) {
    case KVM_EXIT_IO:
    case KVM_EXIT_MMIO:
        access_begin(vcpu);
        if (vcpu->access.left == 0)
            return exit; /* empty REP: nothing to do, go in again */
        return access_next(vcpu);
    case KVM_EXIT_INTR:
    case KVM_EXIT_IRQ_WINDOW_OPEN: /* never asked for */
        return exit;
    case KVM_EXIT_HLT:
        exit.kind = SM_EXIT_HALT;
        return exit;
    case KVM_EXIT_SHUTDOWN:
        exit.kind = SM_EXIT_SHUTDOWN;
        return exit;
    case KVM_EXIT_SYSTEM_EVENT:
        return system_event(run);
    case KVM_EXIT_FAIL_ENTRY:
        return fault(run->exit_reason, run->fail_entry.hardware_entry_failure_reason,
                     "the processor refused to enter the guest");
    case KVM_EXIT_INTERNAL_ERROR:
        return fault(run->exit_reason, run->internal.suberror,
                     internal_error_name(run->internal.suberror));
    case KVM_EXIT_UNKNOWN:
        return fault(run->exit_reason, run->hw.hardware_exit_reason, "unknown hardware exit");
    case KVM_EXIT_EXCEPTION:
        return fault(run->exit_reason, run->ex.exception, "unhandled exception exit");
    default:
        if (sm_kvm_arch_exit(vcpu, &exit))
            return exit;
        return fault(run->exit_reason, 0, "an exit that was never asked for");
    }
}

struct sm_exit sm_hv_vcpu_run(struct sm_hv_vcpu *vcpu)
{
    struct sm_exit kicked = { .kind = SM_EXIT_KICKED };
    int err;

    access_default(vcpu);
    if (vcpu->access.left)
        return access_next(vcpu);
    if (vcpu->paused) {
        vcpu->paused = false;
        sm_kvm_arch_vcpu_resume(vcpu);
    }
    err = kvm_run(vcpu);
    vcpu->half_done = false;
    if (!err)
        return exit_from_kvm(vcpu);
    if (err == -EINTR) {
        immediate_exit_set(vcpu, 0);
        kicks_drain();
        return kicked;
    }
    return fault(0, (uint64_t)-err, "KVM_RUN failed");
}

/*
 * KVM retires the access of the last exit at the start of KVM_RUN, before it
 * looks at immediate_exit; if that uncovers the next fragment of the same
 * instruction, KVM_RUN returns with it and the caller has to serve it. Kicks
 * are left pending for the next run: draining one here would lose it.
 */
int sm_hv_vcpu_settle(struct sm_hv_vcpu *vcpu)
{
    int err;

    access_default(vcpu);
    if (vcpu->access.left)
        return -EAGAIN;
    vcpu->paused = true;
    if (!vcpu->half_done)
        return 0;
    immediate_exit_set(vcpu, 1);
    err = kvm_run(vcpu);
    immediate_exit_set(vcpu, 0);
    vcpu->half_done = false;
    if (err)
        return err == -EINTR ? 0 : err;
    if (vcpu->run->exit_reason == KVM_EXIT_IO || vcpu->run->exit_reason == KVM_EXIT_MMIO)
        access_begin(vcpu);
    return vcpu->access.left ? -EAGAIN : 0;
}
