/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Registers of a KVM x86_64 vCPU by number.
 *
 * One table says where each register lives in KVM's structures; a get or set
 * moves the whole structure, which is one ioctl and fast enough for what asks
 * (debuggers, loaders, specs). A segment's ATTR packs its limit in the low 32
 * bits and, above, the access rights in VMX layout: type 0–3, S 4, DPL 5–6,
 * P 7, AVL 12, L 13, D/B 14, G 15, unusable 16.
 *
 * The FPU's registers are KVM_GET_FPU's; the wide ones are two numbers each.
 */
#include "kvm.h"
#include "x86_msr.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>

enum reg_home {
    HOME_NONE, HOME_REGS, HOME_SREGS, HOME_SEG, HOME_SEG_BASE, HOME_SEG_ATTR, HOME_LIMIT,
    HOME_FPU,
};

struct reg_desc {
    const char *name;
    enum reg_home home;
    uint16_t offset;
    uint8_t bytes; /* of HOME_FPU */
};

#define REG(id, field) [SM_X86_##id] = { #field, HOME_REGS, offsetof(struct kvm_regs, field) }
#define SREG(id, field) [SM_X86_##id] = { #field, HOME_SREGS, offsetof(struct kvm_sregs, field) }
#define SEG(id, field)                                                                     \
    [SM_X86_##id] = { #field, HOME_SEG, offsetof(struct kvm_sregs, field) },               \
    [SM_X86_##id##_BASE] = { #field "_base", HOME_SEG_BASE, offsetof(struct kvm_sregs, field) }, \
    [SM_X86_##id##_ATTR] = { #field "_attr", HOME_SEG_ATTR, offsetof(struct kvm_sregs, field) }
#define TABLE(id, field)                                                                     \
    [SM_X86_##id##_BASE] = { #field "_base", HOME_SREGS,                                     \
                             offsetof(struct kvm_sregs, field.base) },                       \
    [SM_X86_##id##_LIMIT] = { #field "_limit", HOME_LIMIT,                                   \
                              offsetof(struct kvm_sregs, field.limit) }

#define FPU(id, text, field)                                                               \
    [SM_X86_##id] = { text, HOME_FPU, offsetof(struct kvm_fpu, field),                     \
                      sizeof(((struct kvm_fpu *)0)->field) }
#define ST(n)                                                                              \
    [SM_X86_ST + 2 * n] = { "st" #n, HOME_FPU, offsetof(struct kvm_fpu, fpr[n]), 8 },      \
    [SM_X86_ST + 2 * n + 1] = { "st" #n "_high", HOME_FPU,                                 \
                                offsetof(struct kvm_fpu, fpr[n]) + 8, 2 }
#define XMM(n)                                                                             \
    [SM_X86_XMM + 2 * n] = { "xmm" #n, HOME_FPU, offsetof(struct kvm_fpu, xmm[n]), 8 },    \
    [SM_X86_XMM + 2 * n + 1] = { "xmm" #n "_high", HOME_FPU,                               \
                                 offsetof(struct kvm_fpu, xmm[n]) + 8, 8 }

static const struct reg_desc regs_table[SM_X86_END] = {
    REG(RAX, rax), REG(RBX, rbx), REG(RCX, rcx), REG(RDX, rdx),
    REG(RSI, rsi), REG(RDI, rdi), REG(RSP, rsp), REG(RBP, rbp),
    REG(R8, r8), REG(R9, r9), REG(R10, r10), REG(R11, r11),
    REG(R12, r12), REG(R13, r13), REG(R14, r14), REG(R15, r15),
    REG(RIP, rip), REG(RFLAGS, rflags),
    SREG(CR0, cr0), SREG(CR2, cr2), SREG(CR3, cr3), SREG(CR4, cr4), SREG(CR8, cr8),
    SREG(EFER, efer), SREG(APIC_BASE, apic_base),
    SEG(CS, cs), SEG(DS, ds), SEG(ES, es), SEG(FS, fs), SEG(GS, gs), SEG(SS, ss),
    SEG(TR, tr), SEG(LDT, ldt),
    TABLE(GDT, gdt), TABLE(IDT, idt),
    FPU(FCW, "fcw", fcw), FPU(FSW, "fsw", fsw), FPU(FTW, "ftw", ftwx), FPU(FOP, "fop", last_opcode),
    FPU(FIP, "fip", last_ip), FPU(FDP, "fdp", last_dp), FPU(MXCSR, "mxcsr", mxcsr),
    ST(0), ST(1), ST(2), ST(3), ST(4), ST(5), ST(6), ST(7),
    XMM(0), XMM(1), XMM(2), XMM(3), XMM(4), XMM(5), XMM(6), XMM(7),
    XMM(8), XMM(9), XMM(10), XMM(11), XMM(12), XMM(13), XMM(14), XMM(15),
};

static const struct reg_desc *desc_of(uint64_t reg)
{
    if (reg >= SM_X86_END || regs_table[reg].home == HOME_NONE)
        return NULL;
    return &regs_table[reg];
}

const char *sm_hv_reg_name(uint64_t reg)
{
    const struct reg_desc *d = desc_of(reg);

    return d ? d->name : NULL;
}

int64_t sm_hv_reg_find(const char *name)
{
    for (unsigned i = 0; i < SM_X86_END; i++)
        if (regs_table[i].name && !strcmp(regs_table[i].name, name))
            return i;
    return -EINVAL;
}

static uint64_t attr_pack(const struct kvm_segment *s)
{
    uint64_t rights = (uint64_t)s->type | (uint64_t)s->s << 4 | (uint64_t)s->dpl << 5 |
                      (uint64_t)s->present << 7 | (uint64_t)s->avl << 12 | (uint64_t)s->l << 13 |
                      (uint64_t)s->db << 14 | (uint64_t)s->g << 15 | (uint64_t)s->unusable << 16;

    return s->limit | rights << 32;
}

static void attr_unpack(struct kvm_segment *s, uint64_t value)
{
    uint32_t rights = (uint32_t)(value >> 32);

    s->limit = (uint32_t)value;
    s->type = rights & 15;
    s->s = rights >> 4 & 1;
    s->dpl = rights >> 5 & 3;
    s->present = rights >> 7 & 1;
    s->avl = rights >> 12 & 1;
    s->l = rights >> 13 & 1;
    s->db = rights >> 14 & 1;
    s->g = rights >> 15 & 1;
    s->unusable = rights >> 16 & 1;
}

/* The field of a register inside `base`, read or written. */
static void field_move(const struct reg_desc *d, void *base, uint64_t *value, bool set)
{
    uint8_t *p = (uint8_t *)base + d->offset;
    struct kvm_segment *seg = (struct kvm_segment *)(void *)p;

    switch (d->home) {
    case HOME_SEG:
        if (set)
            seg->selector = (uint16_t)*value;
        else
            *value = seg->selector;
        break;
    case HOME_SEG_BASE:
        if (set)
            seg->base = *value;
        else
            *value = seg->base;
        break;
    case HOME_SEG_ATTR:
        if (set)
            attr_unpack(seg, *value);
        else
            *value = attr_pack(seg);
        break;
    case HOME_LIMIT: {
        uint16_t limit = (uint16_t)*value;

        if (set)
            memcpy(p, &limit, sizeof(limit));
        else {
            memcpy(&limit, p, sizeof(limit));
            *value = limit;
        }
        break;
    }
    case HOME_FPU: /* little endian */
        if (set)
            memcpy(p, value, d->bytes);
        else
            memcpy(value, p, d->bytes);
        break;
    default:
        if (set)
            memcpy(p, value, sizeof(*value));
        else
            memcpy(value, p, sizeof(*value));
    }
}

static int reg_access(struct sm_hv_vcpu *vcpu, uint64_t reg, uint64_t *value, bool set)
{
    const struct reg_desc *d;
    union {
        struct kvm_regs regs;
        struct kvm_sregs sregs;
        struct kvm_fpu fpu;
    } u;
    unsigned long get = KVM_GET_SREGS, put = KVM_SET_SREGS;
    int err;

    if (reg & SM_REG_MSR) {
        if (reg & ~(SM_REG_MSR | 0xffffffffull))
            return -EINVAL;
        return sm_kvm_access_msr(vcpu, set ? KVM_SET_MSRS : KVM_GET_MSRS, (uint32_t)reg, value);
    }
    d = desc_of(reg);
    if (!d)
        return -EINVAL;
    if (d->home == HOME_REGS) {
        get = KVM_GET_REGS;
        put = KVM_SET_REGS;
    } else if (d->home == HOME_FPU) {
        get = KVM_GET_FPU;
        put = KVM_SET_FPU;
    }
    err = sm_kvm_ioctl(vcpu->fd, get, &u);
    if (err)
        return err;
    field_move(d, &u, value, set);
    return set ? sm_kvm_ioctl(vcpu->fd, put, &u) : 0;
}

int sm_hv_reg_get(struct sm_hv_vcpu *vcpu, uint64_t reg, uint64_t *value)
{
    *value = 0;
    return reg_access(vcpu, reg, value, false);
}

int sm_hv_reg_set(struct sm_hv_vcpu *vcpu, uint64_t reg, uint64_t value)
{
    return reg_access(vcpu, reg, &value, true);
}
