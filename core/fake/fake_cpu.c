/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fake vCPU: registers, and an interpreter for a small subset of x86
 * (Intel SDM vol. 2), enough for the bare-metal programs of our specs:
 *
 *   mov r,imm  mov r,r/m  mov r/m,r  mov acc,[moffs]  mov [moffs],acc
 *   mov sreg,r  xor r/m,r  add/cmp acc,imm  inc/dec r16  in/out imm8|dx
 *   jmp short|near|far  jz jnz loop  nop cli sti hlt  lidt [disp16]  int3
 *
 * with the 0x66 prefix, 16-bit addressing and DS as the only data segment; in
 * a program entered in protected mode, operands are 32 bit and so is moffs.
 * An access to what is not RAM leaves as an MMIO exit, one to a doorbell
 * signals it. int3 with no IDT is the triple fault of specs. Anything else is
 * a fault that says so: a spec that strays fails loudly.
 */
#include "fake.h"

#include <errno.h>
#include <string.h>

static const char *const reg_names[SM_X86_END] = {
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    "rip", "rflags",
    "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base",
    "cs", "cs_base", "cs_attr", "ds", "ds_base", "ds_attr",
    "es", "es_base", "es_attr", "fs", "fs_base", "fs_attr",
    "gs", "gs_base", "gs_attr", "ss", "ss_base", "ss_attr",
    "tr", "tr_base", "tr_attr", "ldt", "ldt_base", "ldt_attr",
    "gdt_base", "gdt_limit", "idt_base", "idt_limit",
    [SM_X86_FCW] = "fcw", "fsw", "ftw", "fop", "fip", "fdp", "mxcsr",
    [SM_X86_ST] = "st0", "st0_high", "st1", "st1_high", "st2", "st2_high", "st3", "st3_high",
    "st4", "st4_high", "st5", "st5_high", "st6", "st6_high", "st7", "st7_high",
    [SM_X86_XMM] = "xmm0", "xmm0_high", "xmm1", "xmm1_high", "xmm2", "xmm2_high",
    "xmm3", "xmm3_high", "xmm4", "xmm4_high", "xmm5", "xmm5_high", "xmm6", "xmm6_high",
    "xmm7", "xmm7_high", "xmm8", "xmm8_high", "xmm9", "xmm9_high", "xmm10", "xmm10_high",
    "xmm11", "xmm11_high", "xmm12", "xmm12_high", "xmm13", "xmm13_high", "xmm14", "xmm14_high",
    "xmm15", "xmm15_high",
};

const char *sm_hv_reg_name(uint64_t reg)
{
    return reg < SM_X86_END ? reg_names[reg] : NULL;
}

int64_t sm_hv_reg_find(const char *name)
{
    for (int i = 0; i < SM_X86_END; i++) {
        if (reg_names[i] && strcmp(reg_names[i], name) == 0) {
            return i;
        }
    }
    return -EINVAL;
}

static uint64_t *find_msr(struct sm_hv_vcpu *vcpu, uint64_t index)
{
    for (unsigned i = 0; i < vcpu->msr_count; i++) {
        if (vcpu->msrs[i].index == index) {
            return &vcpu->msrs[i].value;
        }
    }
    return NULL;
}

/* Registers are right only at an instruction boundary: the caller settles. */
static int check_access(const struct sm_hv_vcpu *vcpu)
{
    if (!pthread_equal(vcpu->thread, pthread_self())) {
        return -EPERM;
    }
    return vcpu->pending.active ? -EBUSY : 0;
}

int sm_hv_reg_get(struct sm_hv_vcpu *vcpu, uint64_t reg, uint64_t *value)
{
    int err = check_access(vcpu);
    if (err < 0) {
        return err;
    }
    if (reg & SM_REG_MSR) {
        const uint64_t *msr = find_msr(vcpu, reg & ~SM_REG_MSR);
        *value = msr ? *msr : 0;
        return 0;
    }
    if (!sm_hv_reg_name(reg)) {
        return -EINVAL;
    }
    *value = vcpu->regs[reg];
    return 0;
}

int sm_hv_reg_set(struct sm_hv_vcpu *vcpu, uint64_t reg, uint64_t value)
{
    int err = check_access(vcpu);
    if (err < 0) {
        return err;
    }
    if (reg & SM_REG_MSR) {
        uint64_t *msr = find_msr(vcpu, reg & ~SM_REG_MSR);
        if (!msr) {
            if (vcpu->msr_count == SM_FAKE_MSRS) {
                return -ENOSPC;
            }
            vcpu->msrs[vcpu->msr_count].index = reg & ~SM_REG_MSR;
            msr = &vcpu->msrs[vcpu->msr_count++].value;
        }
        *msr = value;
        return 0;
    }
    if (!sm_hv_reg_name(reg)) {
        return -EINVAL;
    }
    vcpu->regs[reg] = value;
    return 0;
}

/* ---- memory as the guest sees it ---- */

/*
 * Guest RAM is shared with the host's threads without a lock, as it is on
 * hardware: the guest's side is hidden from the race detector.
 */
__attribute__((no_sanitize_thread)) static uint64_t ram_load(const uint8_t *p, unsigned len)
{
    uint64_t v = 0;
    for (unsigned i = 0; i < len; i++) {
        v |= (uint64_t)((const volatile uint8_t *)p)[i] << (8 * i);
    }
    return v;
}

__attribute__((no_sanitize_thread)) static void ram_store(uint8_t *p, unsigned len, uint64_t v)
{
    for (unsigned i = 0; i < len; i++) {
        ((volatile uint8_t *)p)[i] = (uint8_t)(v >> (8 * i));
    }
}

/* ---- the interpreter ---- */

/* One instruction being executed. */
struct insn {
    struct sm_hv_vcpu *vcpu;
    uint64_t *regs;
    uint64_t ip;      /* of the next byte */
    unsigned size;    /* operand bytes: 2 or 4 */
    bool stop;        /* .exit is the result */
    struct sm_exit exit;
};

static void leave(struct insn *in, struct sm_exit exit)
{
    in->stop = true;
    in->exit = exit;
}

static void fault(struct insn *in, const char *what)
{
    leave(in, (struct sm_exit){
        .kind = SM_EXIT_FAULT,
        .u.fault = { .detail = in->regs[SM_X86_RIP], .what = what },
    });
}

static uint64_t wrap_ip(const struct insn *in, uint64_t ip)
{
    return in->vcpu->flat32 ? (uint32_t)ip : (uint16_t)ip;
}

static uint64_t fetch(struct insn *in, unsigned len)
{
    uint64_t gpa = in->regs[SM_X86_CS_BASE] + in->ip;
    const uint8_t *p = sm_fake_ram(in->vcpu->hv, gpa, len, false);
    in->ip = wrap_ip(in, in->ip + len);
    if (!p) {
        fault(in, "the fake vCPU runs where there is no memory");
        return 0;
    }
    return ram_load(p, len);
}

static int64_t fetch_signed(struct insn *in, unsigned len)
{
    uint64_t v = fetch(in, len);
    unsigned shift = 64 - 8 * len;
    return (int64_t)(v << shift) >> shift;
}

static uint64_t mask(unsigned len)
{
    return len >= 8 ? ~0ull : (1ull << (8 * len)) - 1;
}

/* x86 numbers registers ax cx dx bx sp bp si di; 8-bit 4–7 are ah ch dh bh. */
static const uint8_t reg_order[8] = {
    SM_X86_RAX, SM_X86_RCX, SM_X86_RDX, SM_X86_RBX,
    SM_X86_RSP, SM_X86_RBP, SM_X86_RSI, SM_X86_RDI,
};

static uint64_t reg_read(const struct insn *in, unsigned n, unsigned len)
{
    if (len == 1 && n >= 4) {
        return in->regs[reg_order[n - 4]] >> 8 & 0xff;
    }
    return in->regs[reg_order[n]] & mask(len);
}

static void reg_write(uint64_t *regs, unsigned n, unsigned len, uint64_t v)
{
    unsigned shift = 0;
    if (len == 1 && n >= 4) {
        n -= 4;
        shift = 8;
    }
    uint64_t m = len == 4 ? ~0ull : mask(len) << shift;
    uint64_t *reg = &regs[reg_order[n]];
    *reg = (*reg & ~m) | (v << shift & m);
}

/* Leave for a port or for MMIO; the instruction ends when it is retired. */
static void access_exit(struct insn *in, enum sm_exit_kind kind, uint64_t addr, unsigned len,
                        bool write, unsigned reg, uint64_t data)
{
    in->vcpu->pending = (struct sm_fake_pending){
        .active = true,
        .reg = write ? -1 : (int)reg,
        .len = len,
        .next_rip = in->ip,
    };
    leave(in, (struct sm_exit){
        .kind = kind,
        .u.io = {
            .addr = addr,
            .data = write ? data & mask(len) : 0,
            .len = (uint8_t)len,
            .write = write,
        },
    });
}

/* A data access the debugger watches is told after its instruction. */
static void watch(struct insn *in, uint64_t linear, unsigned len, bool write)
{
    const struct sm_hv_debug *debug = &in->vcpu->debug;
    for (unsigned i = 0; i < debug->count; i++) {
        if (debug->points[i].watch && (write || debug->points[i].read) &&
            linear < debug->points[i].addr + debug->points[i].len &&
            debug->points[i].addr < linear + len) {
            in->vcpu->watched = (int)i;
        }
    }
}

static void mem_to_reg(struct insn *in, uint64_t addr, unsigned len, unsigned reg)
{
    uint64_t gpa = in->regs[SM_X86_DS_BASE] + addr;
    const uint8_t *p = sm_fake_ram(in->vcpu->hv, gpa, len, false);
    watch(in, gpa, len, false);
    if (p) {
        reg_write(in->regs, reg, len, ram_load(p, len));
    } else {
        access_exit(in, SM_EXIT_MMIO, gpa, len, false, reg, 0);
    }
}

static void reg_to_mem(struct insn *in, uint64_t addr, unsigned len, unsigned reg)
{
    uint64_t gpa = in->regs[SM_X86_DS_BASE] + addr;
    uint64_t v = reg_read(in, reg, len);
    uint8_t *p = sm_fake_ram(in->vcpu->hv, gpa, len, true);
    watch(in, gpa, len, true);
    if (p) {
        ram_store(p, len, v);
    } else if (!sm_fake_ring(in->vcpu->hv, gpa, len, v)) {
        access_exit(in, SM_EXIT_MMIO, gpa, len, true, reg, v);
    }
}

struct operand {
    bool is_reg;
    unsigned reg; /* the r/m register */
    unsigned other; /* the reg field */
    uint64_t addr;
};

/* ModRM with 16-bit addressing (SDM vol. 2, table 2-1), without BP forms. */
static struct operand modrm(struct insn *in)
{
    uint8_t byte = (uint8_t)fetch(in, 1);
    unsigned mod = byte >> 6, rm = byte & 7;
    struct operand op = { .is_reg = mod == 3, .reg = rm, .other = byte >> 3 & 7 };
    if (op.is_reg || in->stop) {
        return op;
    }
    uint64_t base = 0;
    if (in->vcpu->flat32 || (rm < 4) || (rm == 6 && mod != 0)) {
        fault(in, "addressing form the fake vCPU does not know");
        return op;
    }
    if (rm == 6) {
        op.addr = fetch(in, 2);
        return op;
    }
    base = reg_read(in, rm == 4 ? 6 : rm == 5 ? 7 : 3, 2);
    int64_t disp = mod == 1 ? fetch_signed(in, 1) : mod == 2 ? fetch_signed(in, 2) : 0;
    op.addr = (uint16_t)(base + (uint64_t)disp);
    return op;
}

static void set_zero_flag(struct insn *in, uint64_t v)
{
    uint64_t zf = 1ull << 6;
    in->regs[SM_X86_RFLAGS] = (in->regs[SM_X86_RFLAGS] & ~zf) | (v == 0 ? zf : 0);
}

static bool zero_flag(const struct insn *in)
{
    return in->regs[SM_X86_RFLAGS] >> 6 & 1;
}

static void jump(struct insn *in, int64_t by)
{
    in->ip = wrap_ip(in, in->ip + (uint64_t)by);
}

static void load_segment(struct insn *in)
{
    struct operand op = modrm(in);
    static const int segs[8] = { SM_X86_ES, -1, SM_X86_SS, SM_X86_DS,
                                 SM_X86_FS, SM_X86_GS, -1, -1 };
    if (!op.is_reg || segs[op.other] < 0 || in->vcpu->flat32) {
        fault(in, "segment load the fake vCPU does not know");
        return;
    }
    uint64_t sel = reg_read(in, op.reg, 2);
    in->regs[segs[op.other]] = sel;
    in->regs[segs[op.other] + 1] = sel << 4; /* base follows the selector */
}

static void far_jump(struct insn *in)
{
    uint64_t ip = fetch(in, 2), sel = fetch(in, 2);
    in->ip = ip;
    in->regs[SM_X86_CS] = sel;
    in->regs[SM_X86_CS_BASE] = sel << 4;
}

static void load_idt(struct insn *in)
{
    if (fetch(in, 1) != 0x01) {
        fault(in, "instruction the fake vCPU does not know");
        return;
    }
    struct operand op = modrm(in);
    const uint8_t *p = sm_fake_ram(in->vcpu->hv, in->regs[SM_X86_DS_BASE] + op.addr, 6, false);
    if (in->stop || op.is_reg || op.other != 3 || !p) {
        fault(in, "instruction the fake vCPU does not know");
        return;
    }
    in->regs[SM_X86_IDT_LIMIT] = ram_load(p, 2);
    in->regs[SM_X86_IDT_BASE] = ram_load(p + 2, 4);
}

static void breakpoint_trap(struct insn *in)
{
    if (in->vcpu->debug.soft && !in->vcpu->debug.inject) {
        leave(in, sm_fake_debug_exit(in->vcpu, SM_DEBUG_SOFT, 0));
        return;
    }
    if (in->regs[SM_X86_IDT_LIMIT] >= 4 * 3 + 3) {
        fault(in, "the fake vCPU takes no traps");
        return;
    }
    leave(in, (struct sm_exit){ .kind = SM_EXIT_SHUTDOWN });
}

/* One opcode. rip has not moved yet; in->ip is behind the opcode byte. */
static void execute(struct insn *in, uint8_t opcode)
{
    struct operand op;
    unsigned size = opcode & 1 ? in->size : 1; /* bit 0 is the width bit of most */
    uint64_t v;
    switch (opcode) {
    case 0x04: case 0x05: /* add acc, imm */
        v = (reg_read(in, 0, size) + fetch(in, size)) & mask(size);
        reg_write(in->regs, 0, size, v);
        set_zero_flag(in, v);
        return;
    case 0x0f: load_idt(in); return;
    case 0x30: case 0x31: /* xor r/m, r */
        op = modrm(in);
        if (!op.is_reg) {
            fault(in, "instruction the fake vCPU does not know");
            return;
        }
        v = reg_read(in, op.reg, size) ^ reg_read(in, op.other, size);
        reg_write(in->regs, op.reg, size, v);
        set_zero_flag(in, v);
        return;
    case 0x3c: case 0x3d: /* cmp acc, imm */
        set_zero_flag(in, (reg_read(in, 0, size) - fetch(in, size)) & mask(size));
        return;
    case 0x74: case 0x75: { /* jz, jnz */
        int64_t by = fetch_signed(in, 1);
        if (zero_flag(in) == (opcode == 0x74)) {
            jump(in, by);
        }
        return;
    }
    case 0x88: case 0x89: /* mov r/m, r */
        op = modrm(in);
        if (op.is_reg) {
            reg_write(in->regs, op.reg, size, reg_read(in, op.other, size));
        } else if (!in->stop) {
            reg_to_mem(in, op.addr, size, op.other);
        }
        return;
    case 0x8a: case 0x8b: /* mov r, r/m */
        op = modrm(in);
        if (op.is_reg) {
            reg_write(in->regs, op.other, size, reg_read(in, op.reg, size));
        } else if (!in->stop) {
            mem_to_reg(in, op.addr, size, op.other);
        }
        return;
    case 0x8e: load_segment(in); return;
    case 0x90: case 0xfa: case 0xfb: return; /* nop, cli, sti */
    case 0xa0: case 0xa1: mem_to_reg(in, fetch(in, in->vcpu->flat32 ? 4 : 2), size, 0); return;
    case 0xa2: case 0xa3: reg_to_mem(in, fetch(in, in->vcpu->flat32 ? 4 : 2), size, 0); return;
    case 0xcc: breakpoint_trap(in); return;
    case 0xe2: { /* loop */
        int64_t by = fetch_signed(in, 1);
        v = (reg_read(in, 1, 2) - 1) & 0xffff;
        reg_write(in->regs, 1, 2, v);
        if (v) {
            jump(in, by);
        }
        return;
    }
    case 0xe4: case 0xe5: access_exit(in, SM_EXIT_PIO, fetch(in, 1), size, false, 0, 0); return;
    case 0xe6: case 0xe7:
        access_exit(in, SM_EXIT_PIO, fetch(in, 1), size, true, 0, reg_read(in, 0, size));
        return;
    case 0xe9: jump(in, fetch_signed(in, in->vcpu->flat32 ? 4 : 2)); return;
    case 0xea: far_jump(in); return;
    case 0xeb: jump(in, fetch_signed(in, 1)); return;
    case 0xec: case 0xed:
        access_exit(in, SM_EXIT_PIO, reg_read(in, 2, 2), size, false, 0, 0);
        return;
    case 0xee: case 0xef:
        access_exit(in, SM_EXIT_PIO, reg_read(in, 2, 2), size, true, 0, reg_read(in, 0, size));
        return;
    case 0xf4: leave(in, (struct sm_exit){ .kind = SM_EXIT_HALT }); return;
    default: break;
    }
    unsigned n = opcode & 7;
    if (opcode >= 0x40 && opcode <= 0x4f && !in->vcpu->flat32) { /* inc, dec r16 */
        v = (reg_read(in, n, 2) + (opcode < 0x48 ? 1u : 0xffffu)) & 0xffff;
        reg_write(in->regs, n, 2, v);
        set_zero_flag(in, v);
    } else if (opcode >= 0xb0 && opcode <= 0xb7) {
        reg_write(in->regs, n, 1, fetch(in, 1));
    } else if (opcode >= 0xb8 && opcode <= 0xbf) {
        reg_write(in->regs, n, in->size, fetch(in, in->size));
    } else {
        fault(in, "instruction the fake vCPU does not know");
    }
}

bool sm_fake_retire(struct sm_hv_vcpu *vcpu)
{
    struct sm_fake_pending *p = &vcpu->pending;
    if (!p->active) {
        return false;
    }
    if (p->reg >= 0 && p->completed) {
        reg_write(vcpu->regs, (unsigned)p->reg, p->len, p->data & mask(p->len));
    }
    vcpu->regs[SM_X86_RIP] = p->next_rip;
    p->active = false;
    return true;
}

/* The breakpoint at RIP, or -1. */
static int at_breakpoint(struct sm_hv_vcpu *vcpu)
{
    uint64_t pc = vcpu->regs[SM_X86_CS_BASE] + vcpu->regs[SM_X86_RIP];
    for (unsigned i = 0; i < vcpu->debug.count; i++) {
        if (!vcpu->debug.points[i].watch && vcpu->debug.points[i].addr == pc && !vcpu->skip_break) {
            return (int)i;
        }
    }
    return -1;
}

struct sm_exit sm_fake_debug_exit(const struct sm_hv_vcpu *vcpu, enum sm_debug_why why,
                                  unsigned point)
{
    return (struct sm_exit){
        .kind = SM_EXIT_DEBUG,
        .u.debug = {
            .pc = vcpu->regs[SM_X86_CS_BASE] + vcpu->regs[SM_X86_RIP],
            .cause = why == SM_DEBUG_STEP ? 1u << 14 : 1u << point, /* as DR6 */
            .why = why,
            .point = point,
        },
    };
}

static struct insn decode_start(struct sm_hv_vcpu *vcpu, uint8_t *opcode)
{
    struct insn in = {
        .vcpu = vcpu,
        .regs = vcpu->regs,
        .ip = vcpu->regs[SM_X86_RIP],
        .size = vcpu->flat32 ? 4 : 2,
    };
    *opcode = (uint8_t)fetch(&in, 1);
    if (*opcode == 0x66) {
        in.size = vcpu->flat32 ? 2 : 4;
        *opcode = (uint8_t)fetch(&in, 1);
    }
    return in;
}

struct sm_exit sm_fake_interpret(struct sm_hv_vcpu *vcpu)
{
    for (;;) {
        if (atomic_exchange(&vcpu->kicked, false)) {
            return (struct sm_exit){ .kind = SM_EXIT_KICKED };
        }
        int point = at_breakpoint(vcpu);
        if (point >= 0) {
            vcpu->skip_break = true; /* so that running on passes it */
            return sm_fake_debug_exit(vcpu, SM_DEBUG_BREAK, (unsigned)point);
        }
        vcpu->watched = -1;
        vcpu->skip_break = false;
        uint8_t opcode;
        struct insn in = decode_start(vcpu, &opcode);
        if (!in.stop) {
            execute(&in, opcode);
        }
        if (in.stop) {
            /* an access retires later, a fault stays where it is */
            if (in.exit.kind == SM_EXIT_HALT) {
                vcpu->regs[SM_X86_RIP] = in.ip;
            }
            return in.exit;
        }
        vcpu->regs[SM_X86_RIP] = in.ip;
        if (vcpu->watched >= 0) {
            return sm_fake_debug_exit(vcpu, SM_DEBUG_WATCH, (unsigned)vcpu->watched);
        }
        if (vcpu->debug.step) {
            return sm_fake_debug_exit(vcpu, SM_DEBUG_STEP, 0);
        }
    }
}
