/* SPDX-License-Identifier: Apache-2.0 */
/*
 * KVM on x86_64: what a VM and a vCPU need beyond the common part, and the
 * states in which a kernel is entered.
 *
 * The interrupt controllers (local APICs, IOAPIC, PIC) are the kernel's; there
 * is no PIT, whose channel 0 would be a second tick that costs exits. The
 * guest finds its timer in the TSC deadline mode of the local APIC.
 */
#include "kvm.h"
#include "x86_msr.h"

#include <asm/kvm_para.h>
#include <cpuid.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Three pages Intel needs for real mode; below the flash area of a PC, outside
 * any RAM this VMM maps. */
#define TSS_GPA 0xfffbd000ull
#define IDENTITY_MAP_GPA 0xfffbc000ull

#define CR0_PE (1ull << 0)
#define CR0_ET (1ull << 4)
#define CR0_PG (1ull << 31)
#define CR4_PAE (1ull << 5)
#define EFER_LME (1ull << 8)
#define EFER_LMA (1ull << 10)
#define RFLAGS_ONE 2ull /* bit 1 always reads one */

#define CPUID_VMX (1u << 5) /* leaf 1, ecx */
#define CPUID_SVM (1u << 2) /* leaf 0x80000001, ecx */

#define MSR_MTRR_DEF_TYPE 0x2ff
#define MTRR_ENABLE_WB ((1u << 11) | 6u)

/* VMX or SVM. KVM without either (kvm_pvm) interprets an ordinary kernel. */
static bool cpu_virtualises(void)
{
    unsigned a, b, c = 0, d;

    if (__get_cpuid(1, &a, &b, &c, &d) && c & CPUID_VMX)
        return true;
    return __get_cpuid(0x80000001, &a, &b, &c, &d) && c & CPUID_SVM;
}

int sm_kvm_arch_probe(int kvm_fd, struct sm_hv_info *info)
{
    info->hardware = cpu_virtualises();
    info->tsc_control = sm_kvm_check(kvm_fd, KVM_CAP_TSC_CONTROL) > 0;
    info->clock_realtime = (sm_kvm_check(kvm_fd, KVM_CAP_ADJUST_CLOCK) & KVM_CLOCK_REALTIME) != 0;
    info->xsave = sm_kvm_check(kvm_fd, KVM_CAP_XSAVE) > 0;
    if (!sm_kvm_check(kvm_fd, KVM_CAP_IRQCHIP) || !sm_kvm_check(kvm_fd, KVM_CAP_EXT_CPUID))
        return -ENOTSUP;
    return 0;
}

int sm_kvm_arch_create(struct sm_hv *hv)
{
    uint64_t identity_map = IDENTITY_MAP_GPA;
    int err;

    err = sm_kvm_ioctl(hv->vm_fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
    if (!err)
        err = sm_kvm_ioctl(hv->vm_fd, KVM_SET_TSS_ADDR, (void *)(uintptr_t)TSS_GPA);
    if (!err)
        err = sm_kvm_ioctl(hv->vm_fd, KVM_CREATE_IRQCHIP, NULL);
    if (!err)
        err = sm_kvm_cpuid_supported(hv->kvm_fd, &hv->cpuid);
    hv->has_deadline_timer = sm_kvm_check(hv->kvm_fd, KVM_CAP_TSC_DEADLINE_TIMER) > 0;
    return err;
}

void sm_kvm_arch_destroy(struct sm_hv *hv)
{
    free(hv->cpuid);
}

int sm_kvm_arch_vcpu_create(struct sm_hv_vcpu *vcpu, unsigned cpus)
{
    /* CPUID before any MSR: which MSRs exist depends on it. */
    int err = sm_kvm_cpuid_set(vcpu, cpus);

    if (err)
        return err;
    /* As firmware leaves it: with MTRRs off, Linux gives up on PAT too. A
     * processor without MTRRs refuses, and has nothing to set. */
    sm_kvm_set_msr(vcpu, MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WB);
    return 0;
}

void sm_kvm_arch_vcpu_resume(struct sm_hv_vcpu *vcpu)
{
    /* Fails when the guest has no kvmclock, which then needs no telling. */
    sm_kvm_ioctl(vcpu->fd, KVM_KVMCLOCK_CTRL, NULL);
}

#define VECTOR_BP 3
#define DR6_POINTS 15u

static void classify_debug(const struct sm_hv_vcpu *vcpu, struct sm_exit *exit, uint32_t vector)
{
    unsigned hit = (unsigned)exit->u.debug.cause & DR6_POINTS;

    if (vector == VECTOR_BP) {
        exit->u.debug.why = SM_DEBUG_SOFT;
    } else if (hit) {
        exit->u.debug.point = (unsigned)__builtin_ctz(hit);
        exit->u.debug.why = vcpu->watch >> exit->u.debug.point & 1 ? SM_DEBUG_WATCH : SM_DEBUG_BREAK;
    } else {
        exit->u.debug.why = SM_DEBUG_STEP;
    }
}

bool sm_kvm_arch_exit(struct sm_hv_vcpu *vcpu, struct sm_exit *exit)
{
    const struct kvm_run *run = vcpu->run;

    if (run->exit_reason != KVM_EXIT_DEBUG)
        return false;
    exit->kind = SM_EXIT_DEBUG;
    exit->u.debug.pc = run->debug.arch.pc;
    exit->u.debug.cause = run->debug.arch.dr6;
    classify_debug(vcpu, exit, run->debug.arch.exception);
    return true;
}

/* --- entry states ------------------------------------------------------- */

static struct kvm_segment flat_segment(uint16_t selector, uint8_t type, bool l, bool db)
{
    struct kvm_segment seg = {
        .base = 0,
        .limit = 0xffffffff,
        .selector = selector,
        .type = type,
        .present = 1,
        .s = 1,
        .l = l,
        .db = db,
        .g = 1,
    };

    return seg;
}

static void data_segments(struct kvm_sregs *sregs, struct kvm_segment seg)
{
    sregs->ds = sregs->es = sregs->fs = sregs->gs = sregs->ss = seg;
}

/* A busy TSS and an unusable LDT: what the processor insists on. */
static void system_segments(struct kvm_sregs *sregs)
{
    memset(&sregs->tr, 0, sizeof(sregs->tr));
    sregs->tr.limit = 0x67;
    sregs->tr.type = 11;
    sregs->tr.present = 1;
    memset(&sregs->ldt, 0, sizeof(sregs->ldt));
    sregs->ldt.unusable = 1;
}

/* 32-bit protected mode, flat, paging off (the Xen PVH boot ABI). */
static void enter_pvh(struct kvm_sregs *sregs)
{
    sregs->cs = flat_segment(0x08, 11, false, true);
    data_segments(sregs, flat_segment(0x10, 3, false, true));
    system_segments(sregs);
    sregs->cr0 = CR0_PE | CR0_ET;
    sregs->cr4 = 0;
    sregs->efer = 0;
}

/* Long mode; the selectors are Linux's __BOOT_CS and __BOOT_DS. CR3 and the
 * GDT are the caller's, who owns the memory they lie in. */
static void enter_linux64(struct kvm_sregs *sregs)
{
    sregs->cs = flat_segment(0x10, 11, true, false);
    data_segments(sregs, flat_segment(0x18, 3, false, true));
    system_segments(sregs);
    sregs->cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs->cr4 = CR4_PAE;
    sregs->efer = EFER_LME | EFER_LMA;
}

static void enter_real16(struct kvm_sregs *sregs, uint64_t entry)
{
    sregs->cs.selector = (uint16_t)((entry >> 4) & 0xf000);
    sregs->cs.base = (uint64_t)sregs->cs.selector << 4;
}

int sm_hv_vcpu_enter(struct sm_hv_vcpu *vcpu, enum sm_entry_mode mode, uint64_t entry_gpa,
                     uint64_t info_gpa)
{
    struct kvm_sregs sregs;
    struct kvm_regs regs;
    int err;

    err = sm_kvm_ioctl(vcpu->fd, KVM_GET_SREGS, &sregs);
    if (err)
        return err;
    memset(&regs, 0, sizeof(regs));
    regs.rip = entry_gpa;
    regs.rflags = RFLAGS_ONE;
    switch (mode) {
    case SM_ENTRY_PVH:
        enter_pvh(&sregs);
        regs.rbx = info_gpa;
        break;
    case SM_ENTRY_LINUX64:
        enter_linux64(&sregs);
        regs.rsi = info_gpa;
        break;
    case SM_ENTRY_REAL16:
        if (entry_gpa >= 1 << 20)
            return -EINVAL;
        enter_real16(&sregs, entry_gpa);
        regs.rip = entry_gpa - sregs.cs.base;
        break;
    default:
        return -ENOTSUP;
    }
    err = sm_kvm_ioctl(vcpu->fd, KVM_SET_SREGS, &sregs);
    return err ? err : sm_kvm_ioctl(vcpu->fd, KVM_SET_REGS, &regs);
}

/* --- debugging ---------------------------------------------------------- */

#define DR7_GLOBAL_EXACT (1ull << 9)
#define DR7_FIXED (1ull << 10)

/* SDM vol. 3, 17.2.4: R/W and LEN of a debug register. */
static uint64_t dr7_bits(unsigned i, uint8_t len, bool watch, bool read)
{
    static const uint64_t lens[9] = { [1] = 0, [2] = 1, [4] = 3, [8] = 2 };
    uint64_t rw = !watch ? 0 : read ? 3 : 1;

    return 2ull << (i * 2) | (rw | lens[len] << 2) << (16 + i * 4); /* global enable */
}

int sm_hv_vcpu_debug(struct sm_hv_vcpu *vcpu, const struct sm_hv_debug *debug)
{
    struct kvm_guest_debug dbg;

    if (debug->count > SM_HV_DEBUG_POINTS)
        return -EINVAL;
    memset(&dbg, 0, sizeof(dbg));
    if (debug->step || debug->soft || debug->inject || debug->count)
        dbg.control = KVM_GUESTDBG_ENABLE;
    if (debug->step)
        dbg.control |= KVM_GUESTDBG_SINGLESTEP;
    if (debug->soft)
        dbg.control |= KVM_GUESTDBG_USE_SW_BP;
    if (debug->inject)
        dbg.control |= KVM_GUESTDBG_INJECT_BP;
    if (debug->count)
        dbg.control |= KVM_GUESTDBG_USE_HW_BP;
    dbg.arch.debugreg[7] = debug->count ? DR7_FIXED | DR7_GLOBAL_EXACT : DR7_FIXED;
    vcpu->watch = 0;
    for (unsigned i = 0; i < debug->count; i++) {
        uint8_t len = debug->points[i].len;

        if (len != 1 && len != 2 && len != 4 && len != 8)
            return -EINVAL;
        dbg.arch.debugreg[i] = debug->points[i].addr;
        dbg.arch.debugreg[7] |= dr7_bits(i, len, debug->points[i].watch, debug->points[i].read);
        vcpu->watch |= (uint8_t)(debug->points[i].watch << i);
    }
    return sm_kvm_ioctl(vcpu->fd, KVM_SET_GUEST_DEBUG, &dbg);
}

int sm_hv_translate(struct sm_hv_vcpu *vcpu, uint64_t linear, uint64_t *gpa)
{
    struct kvm_translation tr = { .linear_address = linear };
    int err = sm_kvm_ioctl(vcpu->fd, KVM_TRANSLATE, &tr);

    if (err)
        return err;
    if (!tr.valid)
        return -EFAULT;
    *gpa = tr.physical_address;
    return 0;
}
