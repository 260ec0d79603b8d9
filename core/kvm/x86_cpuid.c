/* SPDX-License-Identifier: Apache-2.0 */
/*
 * CPUID on KVM x86_64: what KVM supports, minus what cannot work here, plus
 * the topology of this VM.
 *
 * Topology: one package of `cpus` cores, one thread each; the APIC id is the
 * vCPU's index. It is told in every leaf a kernel may ask: 1 and 4 (Intel,
 * old), 0xb and 0x1f (x2APIC), 0x80000008, 0x8000001d and 0x8000001e (AMD).
 *
 * Hidden, with reasons:
 *   nested virtualisation   its state is not part of our snapshots
 *   performance counters    neither is theirs, and their MSRs do not move
 *                           between hosts
 *   asynchronous page fault tasks that wait for a page over a snapshot never
 *                           wake; on some AMD hosts it is an exit storm
 * Shown though KVM_GET_SUPPORTED_CPUID leaves it out: the TSC deadline timer,
 * which depends on the in-kernel APIC. Without it Linux calibrates the APIC
 * timer for 100 ms at each boot.
 *
 * Sources: Intel SDM vol. 2 CPUID, AMD APM vol. 3 appendix E, Linux
 * Documentation/virt/kvm/{api,x86/cpuid}.rst.
 */
#include "kvm.h"

#include <asm/kvm_para.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../crc32c.h"

#define CPUID_MAX 256
#define LEAF_KVM_FEATURES (KVM_CPUID_SIGNATURE | 1)

static struct kvm_cpuid2 *cpuid_new(unsigned entries)
{
    struct kvm_cpuid2 *cpuid =
        calloc(1, sizeof(*cpuid) + entries * sizeof(struct kvm_cpuid_entry2));

    if (cpuid)
        cpuid->nent = entries;
    return cpuid;
}

int sm_kvm_cpuid_supported(int kvm_fd, struct kvm_cpuid2 **out)
{
    struct kvm_cpuid2 *cpuid = cpuid_new(CPUID_MAX);
    int err;

    if (!cpuid)
        return -ENOMEM;
    err = sm_kvm_ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid);
    if (err) {
        free(cpuid);
        return err;
    }
    *out = cpuid;
    return 0;
}

static struct kvm_cpuid_entry2 *find(struct kvm_cpuid2 *cpuid, uint32_t function,
                                     uint32_t index)
{
    for (unsigned i = 0; i < cpuid->nent; i++) {
        struct kvm_cpuid_entry2 *e = &cpuid->entries[i];

        if (e->function == function &&
            (!(e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) || e->index == index))
            return e;
    }
    return NULL;
}

/* The entry of a leaf with subleaves, made when missing; the table has room
 * for the few we add (CPUID_MAX). */
static struct kvm_cpuid_entry2 *obtain(struct kvm_cpuid2 *cpuid, uint32_t function,
                                       uint32_t index)
{
    struct kvm_cpuid_entry2 *e = find(cpuid, function, index);

    if (e || cpuid->nent == CPUID_MAX)
        return e;
    e = &cpuid->entries[cpuid->nent++];
    memset(e, 0, sizeof(*e));
    e->function = function;
    e->index = index;
    e->flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    return e;
}

/* Bits an APIC id needs: ceil(log2(cpus)). */
static unsigned id_bits(unsigned cpus)
{
    unsigned bits = 0;

    while (1u << bits < cpus)
        bits++;
    return bits;
}

static bool is_amd(struct kvm_cpuid2 *cpuid)
{
    const struct kvm_cpuid_entry2 *e = find(cpuid, 0, 0);

    /* "Auth" of AuthenticAMD, "Hygo" of HygonGenuine */
    return e && (e->ebx == 0x68747541 || e->ebx == 0x6f677948);
}

static void features(struct kvm_cpuid2 *cpuid, bool deadline_timer)
{
    struct kvm_cpuid_entry2 *e = find(cpuid, 1, 0);

    if (e) {
        e->ecx |= 1u << 31; /* a hypervisor is present */
        if (deadline_timer)
            e->ecx |= 1u << 24;
        e->ecx &= ~(1u << 5 | 1u << 15); /* VMX, PDCM */
    }
    e = find(cpuid, 0xa, 0);
    if (e)
        e->eax = e->ebx = e->ecx = e->edx = 0;
    e = find(cpuid, 0x80000001, 0);
    if (e)
        e->ecx &= ~(1u << 2 | 1u << 23 | 1u << 24 | 1u << 28); /* SVM, PERFCTR_* */
    e = find(cpuid, 0x8000000a, 0); /* SVM features */
    if (e)
        e->eax = e->ebx = e->ecx = e->edx = 0;
    e = find(cpuid, 0x80000022, 0); /* PerfMonV2 */
    if (e)
        e->eax = e->ebx = e->ecx = e->edx = 0;
    e = find(cpuid, LEAF_KVM_FEATURES, 0);
    if (e)
        e->eax &= ~(1u << KVM_FEATURE_ASYNC_PF | 1u << KVM_FEATURE_ASYNC_PF_VMEXIT |
                    1u << KVM_FEATURE_ASYNC_PF_INT);
}

/* Leaf 0xb/0x1f: a level of one thread, a level of all cores, the end. */
static void topology_x2apic(struct kvm_cpuid2 *cpuid, uint32_t leaf, unsigned cpus,
                            unsigned index)
{
    static const uint32_t type[] = { 1u << 8, 2u << 8, 0 };
    const uint32_t shift[] = { 0, id_bits(cpus), 0 };
    const uint32_t count[] = { 1, cpus, 0 };

    for (uint32_t level = 0; level < 3; level++) {
        struct kvm_cpuid_entry2 *e = obtain(cpuid, leaf, level);

        if (!e)
            return;
        e->flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        e->eax = shift[level];
        e->ebx = count[level];
        e->ecx = type[level] | level;
        e->edx = index;
    }
}

/* Caches: the first two levels belong to a core, what lies above to all. */
static void topology_caches(struct kvm_cpuid2 *cpuid, uint32_t leaf, unsigned cpus)
{
    unsigned all = (1u << id_bits(cpus)) - 1;

    for (unsigned i = 0; i < cpuid->nent; i++) {
        struct kvm_cpuid_entry2 *e = &cpuid->entries[i];
        unsigned level = e->eax >> 5 & 7;

        if (e->function != leaf || (e->eax & 31) == 0)
            continue;
        e->eax &= ~(0xfffu << 14);
        if (level > 2)
            e->eax |= all << 14;
        if (leaf == 4) {
            e->eax &= ~(0x3fu << 26);
            e->eax |= (all > 0x3f ? 0x3f : all) << 26;
        }
    }
}

static void topology(struct kvm_cpuid2 *cpuid, unsigned cpus, unsigned index)
{
    struct kvm_cpuid_entry2 *e = find(cpuid, 1, 0);
    bool amd = is_amd(cpuid);

    if (e) {
        e->ebx = (e->ebx & 0xffff) | (cpus << 16) | (index << 24);
        e->edx &= ~(1u << 28);
        e->edx |= (cpus > 1) ? 1u << 28 : 0; /* HTT: more than one logical CPU */
    }
    e = find(cpuid, 0, 0);
    if (e && e->eax < 0xb)
        e->eax = 0xb;
    topology_x2apic(cpuid, 0xb, cpus, index);
    if (find(cpuid, 0x1f, 0))
        topology_x2apic(cpuid, 0x1f, cpus, index);
    topology_caches(cpuid, 4, cpus);
    topology_caches(cpuid, 0x8000001d, cpus);
    if (!amd)
        return;
    e = find(cpuid, 0x80000001, 0);
    if (e) {
        e->ecx &= ~(1u << 1);
        e->ecx |= (cpus > 1) ? 1u << 1 : 0; /* CmpLegacy */
    }
    e = find(cpuid, 0x80000008, 0);
    if (e)
        e->ecx = (cpus - 1) | (id_bits(cpus) << 12);
    e = find(cpuid, 0x8000001e, 0);
    if (e) {
        e->eax = index; /* extended APIC id */
        e->ebx = index; /* core id, one thread */
        e->ecx = 0;     /* node 0 of 1 */
    }
}

int sm_kvm_cpuid_set(struct sm_hv_vcpu *vcpu, unsigned cpus)
{
    const struct kvm_cpuid2 *supported = vcpu->hv->cpuid;
    struct kvm_cpuid2 *cpuid = cpuid_new(CPUID_MAX);
    int err;

    if (!cpuid)
        return -ENOMEM;
    cpuid->nent = supported->nent;
    memcpy(cpuid->entries, supported->entries,
           supported->nent * sizeof(struct kvm_cpuid_entry2));
    features(cpuid, vcpu->hv->has_deadline_timer);
    topology(cpuid, cpus, vcpu->index);
    err = sm_kvm_ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid);
    free(cpuid);
    return err;
}

/* ---- the fingerprint ---- */

/* Fields that say which CPU answered, not what CPUs there are. */
static void mask_identity(struct kvm_cpuid_entry2 *e)
{
    switch (e->function) {
    case 1:
        e->ebx &= 0xffff; /* APIC id, logical CPUs */
        e->ecx &= ~(1u << 27); /* OSXSAVE: of the host's control register */
        break;
    case 7:
        e->ecx &= ~(1u << 4); /* OSPKE, likewise */
        break;
    case 0xb:
    case 0x1f:
    case 0x8000001e:
        e->eax = e->ebx = e->ecx = e->edx = 0;
        break;
    case 0xd:
        if (e->index <= 1)
            e->ebx = 0; /* size for what is enabled now */
        break;
    default:
        break;
    }
}

int sm_hv_fingerprint(struct sm_hv *hv, char *buf, size_t len)
{
    uint32_t sum = 0, signature = 0, family, model;
    char vendor[13] = "unknown";

    for (unsigned i = 0; i < hv->cpuid->nent; i++) {
        struct kvm_cpuid_entry2 e = hv->cpuid->entries[i];

        if (e.function == 0) {
            memcpy(vendor, &e.ebx, 4);
            memcpy(vendor + 4, &e.edx, 4);
            memcpy(vendor + 8, &e.ecx, 4);
        }
        if (e.function == 1)
            signature = e.eax;
        mask_identity(&e);
        sum = sm_sum_add(sum, (uint64_t)e.function << 32 | e.index, &e.eax, 16);
    }
    family = signature >> 8 & 15;
    model = (signature >> 4 & 15) | (signature >> 12 & 0xf0);
    if (family == 15)
        family += signature >> 20 & 0xff;
    snprintf(buf, len, "kvm %s family %u model %u stepping %u cpuid %08x", vendor, family, model,
             signature & 15, sum);
    return 0;
}
