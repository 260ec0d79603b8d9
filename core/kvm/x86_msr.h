/* SPDX-License-Identifier: Apache-2.0 */
/* One model specific register of a vCPU, read or written (KVM_GET_MSRS, KVM_SET_MSRS of
 * Documentation/virt/kvm/api.rst). Threads: the vCPU's own, or any while it does not run. */
#ifndef SM_KVM_X86_MSR_H
#define SM_KVM_X86_MSR_H

#include <errno.h>
#include <string.h>

#include "kvm.h"

/* 0; -EINVAL: KVM does not know it, or refuses the value; -errno. */
static inline int sm_kvm_access_msr(struct sm_hv_vcpu *vcpu, unsigned long request,
                                    uint32_t index, uint64_t *value)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } one;
    int done;

    memset(&one, 0, sizeof(one));
    one.head.nmsrs = 1;
    one.entry.index = index;
    one.entry.data = *value;
    done = sm_kvm_ioctl(vcpu->fd, request, &one);
    if (done != 1)
        return done < 0 ? done : -EINVAL;
    *value = one.entry.data;
    return 0;
}

static inline int sm_kvm_set_msr(struct sm_hv_vcpu *vcpu, uint32_t index, uint64_t value)
{
    return sm_kvm_access_msr(vcpu, KVM_SET_MSRS, index, &value);
}

#endif
