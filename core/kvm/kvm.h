/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Inside the KVM backend: what its files share, and nobody else includes.
 *
 *   vm.c       probe, VM, memory slots, irqfd, ioeventfd (any architecture)
 *   vcpu.c     run, complete, settle, kick (any architecture)
 *   x86_*.c    the x86_64 part, behind the sm_kvm_arch_* calls below; arm64
 *              brings its own set of the same calls
 */
#ifndef SM_KVM_H
#define SM_KVM_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "../backend.h"

#define SM_KVM_SLOTS 64

struct sm_kvm_slot {
    bool used;
    uint64_t gpa, len_bytes;
    void *hva;
    uint32_t flags; /* KVM_MEM_* */
};

struct sm_hv {
    int kvm_fd, vm_fd;
    size_t run_bytes; /* of a struct kvm_run mapping */
    struct sm_kvm_slot slots[SM_KVM_SLOTS]; /* serialised by core/mem.c */
    /* Read-only after create. */
    struct kvm_cpuid2 *cpuid; /* what KVM supports; x86 */
    bool has_deadline_timer;  /* x86 */
    uint64_t loaded_tsc;      /* x86: what vCPU 0 was loaded with */
};

/*
 * An access that left the guest, handed out in pieces: a REP port access one
 * item at a time, a memory access of an odd length one byte at a time.
 */
struct sm_kvm_access {
    uint64_t addr;
    uint8_t *data; /* the current piece, inside the kvm_run mapping */
    uint8_t len;   /* of a piece */
    uint8_t step;  /* added to addr for the next piece */
    uint32_t left; /* pieces not yet handed out */
    bool write, mmio;
    bool wants_data; /* the piece handed out last is a read */
};

/* Everything but `kicked`, `run->immediate_exit` and `thread` belongs to the
 * vCPU's thread. */
struct sm_hv_vcpu {
    struct sm_hv *hv;
    unsigned index;
    int fd;
    struct kvm_run *run;
    pthread_t thread; /* the one that created it; target of kicks */
    bool entered;     /* KVM_RUN has worked once */
    bool paused;      /* settled since the last run: tell kvmclock */
    bool half_done;   /* the last exit's access waits to be retired */
    uint8_t watch;    /* x86: debug registers that watch data, a bit each */
    struct sm_kvm_access access;
};

/* ioctl that restarts after a signal; -errno on failure. */
int sm_kvm_ioctl(int fd, unsigned long request, void *arg);
int sm_kvm_check(int fd, int cap);

/* The architecture's part. */
int sm_kvm_arch_probe(int kvm_fd, struct sm_hv_info *info);
int sm_kvm_arch_create(struct sm_hv *hv);
void sm_kvm_arch_destroy(struct sm_hv *hv);
int sm_kvm_arch_vcpu_create(struct sm_hv_vcpu *vcpu, unsigned cpus);
/* The guest was stopped for a while; called before it runs again. */
void sm_kvm_arch_vcpu_resume(struct sm_hv_vcpu *vcpu);
/* An exit the common part does not know; false when neither does this. */
bool sm_kvm_arch_exit(struct sm_hv_vcpu *vcpu, struct sm_exit *exit);

/* x86: core/kvm/x86_cpuid.c */
int sm_kvm_cpuid_supported(int kvm_fd, struct kvm_cpuid2 **out);
int sm_kvm_cpuid_set(struct sm_hv_vcpu *vcpu, unsigned cpus);

#endif
