/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The hypervisor contract: the seam between the VMM and what it runs on.
 *
 * Drawn high on purpose. Guest memory, vCPU registers and the run/exit
 * primitive are here; how a backend injects interrupts or serves doorbells is
 * its own business, so each platform uses its fastest native mechanism. One
 * backend is linked per build (core/kvm, core/hvf, or core/fake for specs):
 * calls are direct, there is no function pointer on the run/exit path, exits
 * are returned by value and nothing allocates there.
 *
 * Threads. A vCPU belongs to the thread that created it (HVF demands it, KVM
 * recommends it): every sm_hv_vcpu_* call but sm_hv_vcpu_kick is made there.
 * sm_hv_* calls on the VM may come from any thread; map, unmap and protect are
 * serialised by the caller (core/mem.c), with no vCPU touching the range.
 *
 * Errors: 0 or -errno. -ENOTSUP means "this backend has no such mechanism" and
 * always has a documented way round it.
 *
 * How each call maps (kvm86 = KVM x86_64, kvma64 = KVM arm64, hvf = macOS):
 *
 *   probe        kvm86, kvma64: open /dev/kvm, KVM_GET_API_VERSION, KVM_CHECK_
 *                EXTENSION; hvf: sysctl kern.hv_support
 *   create       kvm86: KVM_CREATE_VM, SET_TSS_ADDR, SET_IDENTITY_MAP_ADDR,
 *                CREATE_IRQCHIP (no PIT); kvma64: KVM_CREATE_VM with the IPA
 *                size, GICv3 device after the vCPUs exist; hvf: hv_vm_create
 *                (one per process, HV_BUSY after), hv_gic_create before vCPUs
 *   map…protect  KVM: KVM_SET_USER_MEMORY_REGION, a slot per range; protect is
 *                a READONLY slot; hvf: hv_vm_map/unmap/protect, 16 KiB granule
 *   dirty_log    KVM: KVM_GET_DIRTY_LOG; hvf: write-protect and data aborts
 *   vcpu_create  KVM: KVM_CREATE_VCPU, mmap kvm_run; kvma64: + VCPU_INIT;
 *                hvf: hv_vcpu_create on the calling thread
 *   run          KVM: KVM_RUN; hvf: hv_vcpu_run
 *   complete     KVM: fill kvm_run; hvf: write the transfer register, PC += 4
 *   settle       KVM: KVM_RUN with immediate_exit, which retires the access
 *                just completed; hvf: nothing to do
 *   kick         KVM: immediate_exit + a signal that is blocked but inside
 *                KVM_RUN (KVM_SET_SIGNAL_MASK); hvf: hv_vcpus_exit
 *   irq_line     kvm86: KVM_IRQ_LINE, GSI; kvma64: the same, SPI; hvf:
 *                hv_gic_set_spi
 *   irqfd        KVM: KVM_IRQFD; hvf: -ENOTSUP, sm_irq falls back to irq_line
 *   ioeventfd    KVM: KVM_IOEVENTFD; hvf: -ENOTSUP, the write exits to the bus
 *   reg get/set  kvm86: {GET,SET}_REGS/SREGS/MSRS; kvma64: ONE_REG; hvf:
 *                hv_vcpu_{get,set}_{reg,sys_reg}
 *   translate    kvm86: KVM_TRANSLATE; kvma64, hvf: -ENOTSUP (walk the tables)
 *   debug        KVM: KVM_SET_GUEST_DEBUG; hvf: MDSCR_EL1, DBGB/DBGW registers
 *   save/load    kvm86: CPUID, MSRs, XSAVE, LAPIC, MP state, events …; kvma64:
 *                ONE_REG list + GIC redistributor; hvf: registers + hv_gic_state
 *   clock        kvm86: KVM_{GET,SET}_CLOCK; kvma64: CNTVCT offset; hvf:
 *                hv_vcpu_set_vtimer_offset
 *
 * DAX (virtio-fs, pmem) needs no call of its own: a mapper maps and unmaps
 * windows with sm_hv_map/sm_hv_unmap through core/mem.c, which keeps the slots.
 */
#ifndef SM_BACKEND_H
#define SM_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SM_MAX_VCPUS 64

enum sm_prot {
    SM_PROT_READ = 1,
    SM_PROT_WRITE = 2,
    SM_PROT_EXEC = 4,
    SM_PROT_RWX = 7,
};

/* Why a vCPU came back. Every backend exit is one of these. */
enum sm_exit_kind {
    SM_EXIT_KICKED,   /* sm_hv_vcpu_kick, or a signal: look at the mailbox */
    SM_EXIT_MMIO,     /* u.io; a read wants sm_hv_vcpu_complete */
    SM_EXIT_PIO,      /* u.io; x86 only; REP is delivered one item at a time */
    SM_EXIT_HALT,     /* the guest halted and nothing in the kernel waits for it */
    SM_EXIT_SHUTDOWN, /* triple fault, or a system event the guest asked for */
    SM_EXIT_POWEROFF, /* PSCI SYSTEM_OFF and alike */
    SM_EXIT_RESET,    /* PSCI SYSTEM_RESET and alike */
    SM_EXIT_DEBUG,    /* u.debug; what sm_hv_vcpu_debug asked for */
    SM_EXIT_FAULT,    /* the backend cannot go on; u.fault says why */
};

enum sm_debug_why {
    SM_DEBUG_STEP,  /* one instruction was executed */
    SM_DEBUG_BREAK, /* before the instruction at pc; point: which */
    SM_DEBUG_WATCH, /* after the access; point: which */
    SM_DEBUG_SOFT,  /* a breakpoint instruction at pc, not executed */
};

struct sm_exit {
    enum sm_exit_kind kind;
    union {
        struct {
            uint64_t addr; /* gpa, or port */
            uint64_t data; /* little-endian value of a write; 0 for a read */
            uint8_t len;   /* 1, 2, 4 or 8 bytes */
            bool write;
        } io;
        struct {
            uint64_t pc;    /* linear */
            uint64_t cause; /* dr6 on x86, ESR on arm64 */
            enum sm_debug_why why;
            unsigned point; /* index into sm_hv_debug.points */
        } debug;
        struct {
            uint32_t reason;   /* backend code, e.g. KVM exit reason */
            uint64_t detail;   /* suberror, hardware entry failure reason … */
            const char *what;  /* static string */
        } fault;
    } u;
};

/* What this machine offers; for `sm doctor` and for limits. */
struct sm_hv_info {
    const char *backend;      /* "kvm", "hvf", "fake" */
    unsigned max_vcpus;       /* recommended maximum */
    unsigned page_bytes;      /* granule of sm_hv_map */
    bool irqfd, ioeventfd, readonly_mem, dirty_log, immediate_exit;
    bool hardware; /* false: the CPU does not virtualise; guests are interpreted */
    bool xsave, tsc_control, clock_realtime;
};

struct sm_hv;      /* a VM */
struct sm_hv_vcpu; /* a vCPU */

/*
 * -ENOENT: no such device here; -EACCES: there, but not for this user;
 * -ENOTSUP: too old (info says what is missing by its false fields).
 */
int sm_hv_probe(struct sm_hv_info *info);

int sm_hv_create(struct sm_hv **out);
/* All vCPUs are destroyed before. */
void sm_hv_destroy(struct sm_hv *hv);

/* Map host memory at a guest-physical address. The memory stays the caller's
 * and stays valid until unmapped. -EINVAL: alignment or overlap; -ENOSPC: out
 * of slots. */
int sm_hv_map(struct sm_hv *hv, uint64_t gpa, void *hva, uint64_t len_bytes,
              unsigned prot, bool log_dirty);
int sm_hv_unmap(struct sm_hv *hv, uint64_t gpa);
/* Whole mapping only. Prot without WRITE makes guest writes exit as MMIO. */
int sm_hv_protect(struct sm_hv *hv, uint64_t gpa, unsigned prot, bool log_dirty);
/* One bit a page of the mapping at gpa, set when written since the last call. */
int sm_hv_dirty_log(struct sm_hv *hv, uint64_t gpa, uint64_t *bitmap, size_t words);

/* Level of a line; edge users raise then lower. */
int sm_hv_irq_line(struct sm_hv *hv, uint32_t gsi, bool level);
/* A write to the eventfd `fd` pulses the line, without a thread of ours. */
int sm_hv_irqfd(struct sm_hv *hv, uint32_t gsi, int fd, bool assign);
/* A guest write of `data` (len 4; any value if len 0) at `gpa` signals `fd`
 * without an exit. */
int sm_hv_ioeventfd(struct sm_hv *hv, uint64_t gpa, unsigned len, uint32_t data,
                    int fd, bool assign);

/* Created on the thread that will run it. index: 0 is the boot vCPU. cpus is
 * the number of vCPUs of the VM (topology in CPUID). */
int sm_hv_vcpu_create(struct sm_hv *hv, unsigned index, unsigned cpus,
                      struct sm_hv_vcpu **out);
void sm_hv_vcpu_destroy(struct sm_hv_vcpu *vcpu);

/* Run until the next exit. */
struct sm_exit sm_hv_vcpu_run(struct sm_hv_vcpu *vcpu);
/* Give the value of the read that the last exit asked for; retired by the
 * next run or settle. */
void sm_hv_vcpu_complete(struct sm_hv_vcpu *vcpu, uint64_t data);
/* Retire what is half done, so that registers and state are at an instruction
 * boundary. Called before any register is read or state is saved. */
int sm_hv_vcpu_settle(struct sm_hv_vcpu *vcpu);
/* From any thread, at any time: the vCPU leaves sm_hv_vcpu_run, or leaves the
 * next one at once. Never lost; several kicks may merge into one. */
void sm_hv_vcpu_kick(struct sm_hv_vcpu *vcpu);

/*
 * Registers by number. x86_64: enum sm_x86_reg below, plus MSRs as
 * SM_REG_MSR | index. arm64 (later): X0–X30, SP, PC, PSTATE, and system
 * registers as SM_REG_SYS | encoding. -EINVAL: no such register here.
 */
enum sm_x86_reg {
    SM_X86_RAX, SM_X86_RBX, SM_X86_RCX, SM_X86_RDX,
    SM_X86_RSI, SM_X86_RDI, SM_X86_RSP, SM_X86_RBP,
    SM_X86_R8, SM_X86_R9, SM_X86_R10, SM_X86_R11,
    SM_X86_R12, SM_X86_R13, SM_X86_R14, SM_X86_R15,
    SM_X86_RIP, SM_X86_RFLAGS,
    SM_X86_CR0, SM_X86_CR2, SM_X86_CR3, SM_X86_CR4, SM_X86_CR8,
    SM_X86_EFER, SM_X86_APIC_BASE,
    /* selector | base | limit and attributes: three registers a segment */
    SM_X86_CS, SM_X86_CS_BASE, SM_X86_CS_ATTR,
    SM_X86_DS, SM_X86_DS_BASE, SM_X86_DS_ATTR,
    SM_X86_ES, SM_X86_ES_BASE, SM_X86_ES_ATTR,
    SM_X86_FS, SM_X86_FS_BASE, SM_X86_FS_ATTR,
    SM_X86_GS, SM_X86_GS_BASE, SM_X86_GS_ATTR,
    SM_X86_SS, SM_X86_SS_BASE, SM_X86_SS_ATTR,
    SM_X86_TR, SM_X86_TR_BASE, SM_X86_TR_ATTR,
    SM_X86_LDT, SM_X86_LDT_BASE, SM_X86_LDT_ATTR,
    SM_X86_GDT_BASE, SM_X86_GDT_LIMIT,
    SM_X86_IDT_BASE, SM_X86_IDT_LIMIT,
    SM_X86_REGS, /* how many of these; the FPU's follow */
    SM_X86_FCW = 64, SM_X86_FSW, SM_X86_FTW, SM_X86_FOP, SM_X86_FIP, SM_X86_FDP, SM_X86_MXCSR,
    SM_X86_ST = 80,   /* 8 × {significand, sign and exponent}: "st0", "st0_high" … */
    SM_X86_XMM = 96,  /* 16 × {low, high}: "xmm0", "xmm0_high" … */
    SM_X86_END = 128, /* no number is that high; there are gaps below */
};
#define SM_REG_MSR (1ull << 32)
#define SM_REG_SYS (1ull << 33)

int sm_hv_reg_get(struct sm_hv_vcpu *vcpu, uint64_t reg, uint64_t *value);
int sm_hv_reg_set(struct sm_hv_vcpu *vcpu, uint64_t reg, uint64_t value);
/* "rax" → SM_X86_RAX …; NULL or -EINVAL when there is none. Numbers have gaps. */
const char *sm_hv_reg_name(uint64_t reg);
int64_t sm_hv_reg_find(const char *name);

/* Enter a kernel: x86 PVH (32-bit protected mode, flat, paging off, EBX =
 * start_info) or 64-bit; arm64: PC = entry, X0 = FDT. */
enum sm_entry_mode { SM_ENTRY_PVH, SM_ENTRY_LINUX64, SM_ENTRY_ARM64, SM_ENTRY_REAL16 };
int sm_hv_vcpu_enter(struct sm_hv_vcpu *vcpu, enum sm_entry_mode mode,
                     uint64_t entry_gpa, uint64_t info_gpa);

#define SM_HV_DEBUG_POINTS 4

/* What of a vCPU becomes a debug exit; replaces what was set before. */
struct sm_hv_debug {
    bool step;       /* every instruction */
    bool soft;       /* breakpoint instructions, the guest's own included */
    bool inject;     /* deliver a breakpoint trap to the guest: it was its own */
    unsigned count;  /* of points, in hardware */
    struct {
        uint64_t addr;   /* linear */
        uint8_t len;     /* 1, 2, 4 or 8, aligned; a breakpoint: 1 */
        bool watch, read; /* data: written, or with read also read */
    } points[SM_HV_DEBUG_POINTS];
};
int sm_hv_vcpu_debug(struct sm_hv_vcpu *vcpu, const struct sm_hv_debug *debug);
/* Where a linear address lies, as this vCPU sees it now. -EFAULT: nowhere. */
int sm_hv_translate(struct sm_hv_vcpu *vcpu, uint64_t linear, uint64_t *gpa);

/*
 * State for snapshots, opaque to callers: a stream into `w`/from `r` whose
 * layout is the backend's, headed by the backend's name and version, so that
 * the wrong one is refused. settle first. vcpu: per vCPU, with its interrupt
 * controller part. vm: interrupt controller and clock.
 */
struct sm_state_writer;
struct sm_state_reader;
int sm_hv_vcpu_save(struct sm_hv_vcpu *vcpu, struct sm_state_writer *w);
/* Into a vCPU that has not run, vCPU 0 first, memory mapped before. The
 * guest's cycle counter goes on advance_ns after where it was saved. */
int sm_hv_vcpu_load(struct sm_hv_vcpu *vcpu, struct sm_state_reader *r, uint64_t advance_ns);
int sm_hv_save(struct sm_hv *hv, struct sm_state_writer *w);
/* After every vCPU, before sm_hv_clock_set. */
int sm_hv_load(struct sm_hv *hv, struct sm_state_reader *r);
/* One line that is the same where a saved vCPU can go on, and only there:
 * backend, CPU, and a hash of what the CPU offers to guests. */
int sm_hv_fingerprint(struct sm_hv *hv, char *buf, size_t len);

/* The three readings whose differences define freeze and advance. */
struct sm_clock {
    uint64_t guest_ticks; /* kvmclock ns, or CNTVCT */
    uint64_t host_ns;     /* CLOCK_BOOTTIME of the host */
    uint64_t wall_ns;     /* CLOCK_REALTIME of the host */
};
int sm_hv_clock_get(struct sm_hv *hv, struct sm_clock *clock);
/* The guest's clock goes on where it was (freeze), or is moved on by the host's
 * wall time that went by since (advance). Before any vCPU runs; for a fault
 * (sm_vm_clock_stop) also while they do, from any thread. */
int sm_hv_clock_set(struct sm_hv *hv, const struct sm_clock *clock, bool advance);

#endif
