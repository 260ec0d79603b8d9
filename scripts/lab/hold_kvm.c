/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two virtual machines that never run, held for as long as the lab lives.
 *
 * KVM switches parts of the kernel's code with static keys: the preempt
 * notifiers in __schedule() when the first VM appears and when the last one
 * goes, and its own tests for a vCPU whose local APIC is off or missing. A
 * switch rewrites running code through an int3. Where QEMU 7.2
 * has a thread for each CPU, one may translate the int3 while the other takes
 * it out again; the stale translation stays, and both CPUs trap in __schedule()
 * for ever (memory is right, a soft lockup is all one sees). With these two the
 * keys never switch, however many CPUs the lab has (SM_LAB_CPUS).
 */
#define _GNU_SOURCE
#include "labd.h"

#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>

int hold_kvm(void)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    int off = ioctl(kvm, KVM_CREATE_VM, 0), missing = ioctl(kvm, KVM_CREATE_VM, 0);

    /* A vCPU's local APIC is software-disabled until its guest enables it. */
    if (ioctl(off, KVM_CREATE_IRQCHIP) || ioctl(off, KVM_CREATE_VCPU, 0) < 0)
        return -1;
    return ioctl(missing, KVM_CREATE_VCPU, 0) < 0 ? -1 : 0;
}
