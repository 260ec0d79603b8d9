/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a snapshot keeps of a VM on KVM x86_64, and the order in which it goes
 * back. Each rule is there because something breaks without it:
 *
 * Save, vCPU at an instruction boundary (settled):
 *   MP state first       reading it makes the APIC accept pending INIT/SIPI
 *   CPUID read back      the kernel changes it (OSXSAVE, APIC base); a copy
 *                        kept since creation would be stale the second time
 *   events last          the calls before may change them
 *   TSC_DEADLINE of 0    means "fired, or none": saved as "now", for a timer
 *                        that fired into a pause would never tick again, and
 *                        one interrupt too many harms nobody
 * Load, vCPU 0 first, memory mapped:
 *   CPUID first          which MSRs exist depends on it
 *   REGS before events   setting them clears pending exceptions
 *   SREGS before LAPIC   the APIC base says which mode the page is in
 *   LAPIC before MSRs    a deadline is dropped unless the timer is in that mode
 *   TSC before TSC_DEADLINE, which is last of the MSRs
 *   events last
 * Then the VM: PIC and IOAPIC, then the clock, before any vCPU runs.
 *
 * The TSC. KVM takes a TSC written within a second of where the last write (or
 * the creation) has got to for an attempt to synchronise, and ignores the
 * value. A guest saved in its first second would come back with the new VM's
 * TSC, behind its own past. So vCPU 0 writes something far off first; the
 * others write the very value of vCPU 0 and are synchronised with it.
 *
 * Which MSRs: all that KVM lists for saving, the paravirtual ones (0x4b564dxx)
 * among them, and the MTRRs, which it leaves out. One that this CPU or CPUID
 * lacks cannot be read, and is left out.
 *
 * Sources: Linux Documentation/virt/kvm/api.rst and x86/{msr,timekeeping}.rst.
 */
#include "kvm.h"
#include "x86_msr.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../state.h"

#define VCPU_VERSION 1
#define VM_VERSION 1
#define CPUID_MAX 256
#define MSRS_MAX 512
#define XSAVE_MAX (64u << 10)

#define MSR_TSC 0x10u
#define MSR_TSC_DEADLINE 0x6e0u
#define TSC_TOLERANCE_PPM 250
#define FAR_OFF (1ull << 56)

static const uint32_t mtrrs[] = {
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c,
    0x20d, 0x20e, 0x20f, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e,
    0x26f, 0x2ff,
};

struct msr_list {
    struct kvm_msrs head;
    struct kvm_msr_entry entries[MSRS_MAX];
};

/* ---- pieces of the stream: a length and the kernel's structure ---- */

static void put_blob(struct sm_state_writer *w, const void *p, size_t len)
{
    sm_state_put_u32(w, (uint32_t)len);
    sm_state_put_bytes(w, p, len);
}

/* Exactly `len` bytes. */
static int get_blob(struct sm_state_reader *r, void *p, size_t len)
{
    if (sm_state_get_u32(r) != len)
        r->error = -EBADMSG;
    sm_state_get_bytes(r, p, len);
    return r->error;
}

/* ioctl a structure of the vCPU into the stream, or out of it. */
static int save_one(struct sm_hv_vcpu *vcpu, struct sm_state_writer *w, unsigned long request,
                    void *p, size_t len)
{
    int err;

    memset(p, 0, len);
    err = sm_kvm_ioctl(vcpu->fd, request, p);
    if (err < 0)
        return err;
    put_blob(w, p, len);
    return w->error;
}

static int load_one(struct sm_hv_vcpu *vcpu, struct sm_state_reader *r, unsigned long request,
                    void *p, size_t len)
{
    int err = get_blob(r, p, len);

    if (err)
        return err;
    err = sm_kvm_ioctl(vcpu->fd, request, p);
    return err < 0 ? err : 0;
}

#define SAVE(vcpu, w, request, object) save_one(vcpu, w, request, &(object), sizeof(object))
#define LOAD(vcpu, r, request, object) load_one(vcpu, r, request, &(object), sizeof(object))

/* ---- MSRs ---- */

static bool listed(const struct msr_list *list, uint32_t index)
{
    for (unsigned i = 0; i < list->head.nmsrs; i++)
        if (list->entries[i].index == index)
            return true;
    return false;
}

static void add_msr(struct msr_list *list, uint32_t index)
{
    if (list->head.nmsrs < MSRS_MAX && !listed(list, index))
        list->entries[list->head.nmsrs++].index = index;
}

static int list_msrs(int kvm_fd, struct msr_list *list)
{
    struct {
        struct kvm_msr_list head;
        uint32_t indices[MSRS_MAX];
    } *known = calloc(1, sizeof(*known));
    int err;

    if (!known)
        return -ENOMEM;
    known->head.nmsrs = MSRS_MAX;
    err = sm_kvm_ioctl(kvm_fd, KVM_GET_MSR_INDEX_LIST, known);
    if (!err) {
        add_msr(list, MSR_TSC);
        for (unsigned i = 0; i < known->head.nmsrs; i++)
            add_msr(list, known->indices[i]);
        for (size_t i = 0; i < sizeof(mtrrs) / sizeof(mtrrs[0]); i++)
            add_msr(list, mtrrs[i]);
    }
    free(known);
    return err;
}

/* Read what can be read; the rest leaves the list. KVM stops at the first that
 * it cannot and says how far it came. */
static int read_msrs(struct sm_hv_vcpu *vcpu, struct msr_list *list)
{
    unsigned kept = 0, at = 0, count = list->head.nmsrs;
    struct msr_list *part = malloc(sizeof(*part));
    int done = 0;

    if (!part)
        return -ENOMEM;
    while (at < count) {
        memset(&part->head, 0, sizeof(part->head));
        part->head.nmsrs = count - at;
        memcpy(part->entries, list->entries + at, (count - at) * sizeof(part->entries[0]));
        done = sm_kvm_ioctl(vcpu->fd, KVM_GET_MSRS, part);
        if (done < 0)
            break;
        memcpy(list->entries + kept, part->entries, (unsigned)done * sizeof(part->entries[0]));
        kept += (unsigned)done;
        at += (unsigned)done + 1;
    }
    free(part);
    list->head.nmsrs = kept;
    return done < 0 ? done : 0;
}

static int save_msrs(struct sm_hv_vcpu *vcpu, struct sm_state_writer *w)
{
    struct msr_list *list = calloc(1, sizeof(*list));
    uint64_t tsc = 0;
    int err;

    if (!list)
        return -ENOMEM;
    err = list_msrs(vcpu->hv->kvm_fd, list);
    if (!err)
        err = read_msrs(vcpu, list);
    sm_state_put_u32(w, list->head.nmsrs);
    for (unsigned i = 0; !err && i < list->head.nmsrs; i++) {
        struct kvm_msr_entry *e = &list->entries[i];

        if (e->index == MSR_TSC)
            tsc = e->data;
        if (e->index == MSR_TSC_DEADLINE && e->data == 0)
            e->data = tsc; /* TSC is first of the list */
        sm_state_put_u32(w, e->index);
        sm_state_put_u64(w, e->data);
    }
    free(list);
    return err ? err : w->error;
}

/* Some can be read but not written; fine while they are what they should be. */
static bool has_value(struct sm_hv_vcpu *vcpu, uint32_t index, uint64_t data)
{
    uint64_t now = 0;

    return sm_kvm_access_msr(vcpu, KVM_GET_MSRS, index, &now) == 0 && now == data;
}

static int set_tsc(struct sm_hv_vcpu *vcpu, uint64_t tsc)
{
    int err;

    if (vcpu->index != 0)
        return sm_kvm_set_msr(vcpu, MSR_TSC, vcpu->hv->loaded_tsc);
    vcpu->hv->loaded_tsc = tsc;
    err = sm_kvm_set_msr(vcpu, MSR_TSC, tsc ^ FAR_OFF);
    return err ? err : sm_kvm_set_msr(vcpu, MSR_TSC, tsc);
}

/* All but TSC and TSC_DEADLINE, which have their own places. */
static int set_msrs(struct sm_hv_vcpu *vcpu, const struct msr_list *list)
{
    unsigned at = 0, count = list->head.nmsrs;
    struct msr_list *part = malloc(sizeof(*part));
    int err = 0, done;

    if (!part)
        return -ENOMEM;
    while (!err && at < count) {
        memset(&part->head, 0, sizeof(part->head));
        part->head.nmsrs = count - at;
        memcpy(part->entries, list->entries + at, (count - at) * sizeof(part->entries[0]));
        done = sm_kvm_ioctl(vcpu->fd, KVM_SET_MSRS, part);
        if (done < 0) {
            err = done;
        } else {
            at += (unsigned)done;
            if (at < count && !has_value(vcpu, list->entries[at].index, list->entries[at].data))
                err = -EINVAL;
            at++;
        }
    }
    free(part);
    return err;
}

static int load_msrs(struct sm_hv_vcpu *vcpu, struct sm_state_reader *r, uint64_t advance_ns)
{
    struct msr_list *list = calloc(1, sizeof(*list));
    uint32_t count = sm_state_get_u32(r);
    uint64_t tsc = 0, deadline = 0;
    bool has_tsc = false, has_deadline = false;
    int err = count > MSRS_MAX ? -EBADMSG : 0;

    if (!list)
        return -ENOMEM;
    for (uint32_t i = 0; !err && i < count; i++) {
        uint32_t index = sm_state_get_u32(r);
        uint64_t data = sm_state_get_u64(r);

        if (index == MSR_TSC) {
            tsc = data;
            has_tsc = true;
        } else if (index == MSR_TSC_DEADLINE) {
            deadline = data;
            has_deadline = true;
        } else {
            list->entries[list->head.nmsrs].index = index;
            list->entries[list->head.nmsrs++].data = data;
        }
        err = r->error;
    }
    if (!err && has_tsc) {
        int khz = sm_kvm_ioctl(vcpu->fd, KVM_GET_TSC_KHZ, NULL);

        if (khz > 0)
            tsc += (uint64_t)((__uint128_t)advance_ns * (unsigned)khz / 1000000u);
        err = set_tsc(vcpu, tsc);
    }
    if (!err)
        err = set_msrs(vcpu, list);
    if (!err && has_deadline)
        err = sm_kvm_set_msr(vcpu, MSR_TSC_DEADLINE, deadline);
    free(list);
    return err;
}

/* ---- CPUID, FPU, TSC frequency ---- */

static struct kvm_cpuid2 *cpuid_room(void)
{
    struct kvm_cpuid2 *c = calloc(1, sizeof(*c) + CPUID_MAX * sizeof(struct kvm_cpuid_entry2));

    if (c)
        c->nent = CPUID_MAX;
    return c;
}

static int save_cpuid(struct sm_hv_vcpu *vcpu, struct sm_state_writer *w)
{
    struct kvm_cpuid2 *c = cpuid_room();
    int err;

    if (!c)
        return -ENOMEM;
    err = sm_kvm_ioctl(vcpu->fd, KVM_GET_CPUID2, c);
    if (!err)
        put_blob(w, c->entries, c->nent * sizeof(c->entries[0]));
    free(c);
    return err ? err : w->error;
}

static int load_cpuid(struct sm_hv_vcpu *vcpu, struct sm_state_reader *r)
{
    struct kvm_cpuid2 *c = cpuid_room();
    uint32_t len = sm_state_get_u32(r);
    int err;

    if (!c)
        return -ENOMEM;
    if (len % sizeof(c->entries[0]) || len / sizeof(c->entries[0]) > CPUID_MAX)
        r->error = -EBADMSG;
    if (!r->error)
        sm_state_get_bytes(r, c->entries, len);
    c->nent = len / (uint32_t)sizeof(c->entries[0]);
    err = r->error ? r->error : sm_kvm_ioctl(vcpu->fd, KVM_SET_CPUID2, c);
    free(c);
    return err;
}

/* Bytes of the XSAVE area, 0 when there is none. */
static size_t xsave_bytes(const struct sm_hv *hv)
{
#ifdef KVM_CAP_XSAVE2
    int more = sm_kvm_check(hv->vm_fd, KVM_CAP_XSAVE2);

    if (more > (int)sizeof(struct kvm_xsave) && more <= (int)XSAVE_MAX)
        return (size_t)more;
#endif
    return sm_kvm_check(hv->vm_fd, KVM_CAP_XSAVE) > 0 ? sizeof(struct kvm_xsave) : 0;
}

static int save_fpu(struct sm_hv_vcpu *vcpu, struct sm_state_writer *w)
{
    size_t len = xsave_bytes(vcpu->hv);
    unsigned long request = KVM_GET_XSAVE;
    struct kvm_fpu fpu;
    void *area;
    int err;

    if (!len)
        return SAVE(vcpu, w, KVM_GET_FPU, fpu);
#ifdef KVM_GET_XSAVE2
    if (len > sizeof(struct kvm_xsave))
        request = KVM_GET_XSAVE2;
#endif
    area = malloc(len);
    if (!area)
        return -ENOMEM;
    err = save_one(vcpu, w, request, area, len);
    free(area);
    return err;
}

static int load_fpu(struct sm_hv_vcpu *vcpu, struct sm_state_reader *r)
{
    size_t len = xsave_bytes(vcpu->hv);
    struct kvm_fpu fpu;
    void *area;
    int err;

    if (!len)
        return LOAD(vcpu, r, KVM_SET_FPU, fpu);
    area = malloc(len);
    if (!area)
        return -ENOMEM;
    err = load_one(vcpu, r, KVM_SET_XSAVE, area, len);
    free(area);
    return err;
}

static int load_tsc_khz(struct sm_hv_vcpu *vcpu, uint32_t saved)
{
    int now = sm_kvm_ioctl(vcpu->fd, KVM_GET_TSC_KHZ, NULL);
    uint64_t difference;

    if (!saved || now <= 0)
        return 0;
    difference = saved > (uint32_t)now ? saved - (uint32_t)now : (uint32_t)now - saved;
    if (difference * 1000000u <= (uint64_t)saved * TSC_TOLERANCE_PPM)
        return 0;
    if (sm_kvm_check(vcpu->hv->kvm_fd, KVM_CAP_TSC_CONTROL) <= 0)
        return -ENOTSUP;
    return sm_kvm_ioctl(vcpu->fd, KVM_SET_TSC_KHZ, (void *)(uintptr_t)saved);
}

/* ---- a vCPU ---- */

int sm_hv_vcpu_save(struct sm_hv_vcpu *vcpu, struct sm_state_writer *w)
{
    struct kvm_mp_state mp;
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_xcrs xcrs;
    struct kvm_debugregs debug;
    struct kvm_lapic_state lapic;
    struct kvm_vcpu_events events;
    bool has_xcrs = sm_kvm_check(vcpu->hv->kvm_fd, KVM_CAP_XCRS) > 0;
    int err, khz;

    if (vcpu->half_done || vcpu->access.left)
        return -EBUSY;
    sm_state_begin(w, "kvmvcpu", VCPU_VERSION);
    err = SAVE(vcpu, w, KVM_GET_MP_STATE, mp);
    if (!err)
        err = SAVE(vcpu, w, KVM_GET_REGS, regs);
    if (!err)
        err = SAVE(vcpu, w, KVM_GET_SREGS, sregs);
    if (!err)
        err = save_fpu(vcpu, w);
    sm_state_put_u8(w, has_xcrs);
    if (!err && has_xcrs)
        err = SAVE(vcpu, w, KVM_GET_XCRS, xcrs);
    if (!err)
        err = SAVE(vcpu, w, KVM_GET_DEBUGREGS, debug);
    if (!err)
        err = SAVE(vcpu, w, KVM_GET_LAPIC, lapic);
    khz = sm_kvm_ioctl(vcpu->fd, KVM_GET_TSC_KHZ, NULL);
    sm_state_put_u32(w, khz > 0 ? (uint32_t)khz : 0);
    if (!err)
        err = save_cpuid(vcpu, w);
    if (!err)
        err = save_msrs(vcpu, w);
    if (!err)
        err = SAVE(vcpu, w, KVM_GET_VCPU_EVENTS, events);
    sm_state_end(w);
    return err ? err : w->error;
}

/* The stream is in the order of saving, the kernel wants another one: parts
 * that come later are found first, by a reader of their own. */
int sm_hv_vcpu_load(struct sm_hv_vcpu *vcpu, struct sm_state_reader *r, uint64_t advance_ns)
{
    struct kvm_mp_state mp;
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_xcrs xcrs;
    struct kvm_debugregs debug;
    struct kvm_lapic_state lapic;
    struct kvm_vcpu_events events;
    struct sm_state_reader early;
    uint32_t len, khz;
    int err;

    if (sm_state_open(r, "kvmvcpu") != VCPU_VERSION)
        return r->error ? r->error : -EBADMSG;
    /* skip to what has to go first: frequency and CPUID */
    early = *r;
    for (unsigned i = 0; i < 4; i++) { /* MP state, regs, sregs, FPU */
        len = sm_state_get_u32(&early);
        sm_state_skip(&early, len);
    }
    for (unsigned i = sm_state_get_u8(&early) ? 0 : 1; i < 3; i++) { /* XCRs, debug, LAPIC */
        len = sm_state_get_u32(&early);
        sm_state_skip(&early, len);
    }
    khz = sm_state_get_u32(&early);
    err = early.error ? early.error : load_cpuid(vcpu, &early);
    if (!err)
        err = load_tsc_khz(vcpu, khz);

    if (!err)
        err = LOAD(vcpu, r, KVM_SET_MP_STATE, mp);
    if (!err)
        err = LOAD(vcpu, r, KVM_SET_REGS, regs);
    if (!err)
        err = LOAD(vcpu, r, KVM_SET_SREGS, sregs);
    if (!err)
        err = load_fpu(vcpu, r);
    if (!err && sm_state_get_u8(r))
        err = LOAD(vcpu, r, KVM_SET_XCRS, xcrs);
    if (!err)
        err = LOAD(vcpu, r, KVM_SET_DEBUGREGS, debug);
    if (!err)
        err = LOAD(vcpu, r, KVM_SET_LAPIC, lapic);
    if (!err)
        err = load_msrs(vcpu, &early, advance_ns);
    if (!err)
        err = LOAD(vcpu, &early, KVM_SET_VCPU_EVENTS, events);
    sm_state_close(r);
    vcpu->half_done = false;
    vcpu->access.left = 0;
    vcpu->paused = true; /* the kernel hears of the gap before the guest runs */
    return err ? err : r->error ? r->error : early.error;
}

/* ---- the VM ---- */

static const uint32_t chips[] = { KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
                                  KVM_IRQCHIP_IOAPIC };

int sm_hv_save(struct sm_hv *hv, struct sm_state_writer *w)
{
    int err = 0;

    sm_state_begin(w, "kvmvm", VM_VERSION);
    for (unsigned i = 0; !err && i < 3; i++) {
        struct kvm_irqchip chip;

        memset(&chip, 0, sizeof(chip));
        chip.chip_id = chips[i];
        err = sm_kvm_ioctl(hv->vm_fd, KVM_GET_IRQCHIP, &chip);
        put_blob(w, &chip, sizeof(chip));
    }
    sm_state_end(w);
    return err ? err : w->error;
}

int sm_hv_load(struct sm_hv *hv, struct sm_state_reader *r)
{
    int err = 0;

    if (sm_state_open(r, "kvmvm") != VM_VERSION)
        return r->error ? r->error : -EBADMSG;
    for (unsigned i = 0; !err && i < 3; i++) {
        struct kvm_irqchip chip;

        err = get_blob(r, &chip, sizeof(chip));
        if (!err && chip.chip_id != chips[i])
            err = -EBADMSG;
        if (!err)
            err = sm_kvm_ioctl(hv->vm_fd, KVM_SET_IRQCHIP, &chip);
    }
    sm_state_close(r);
    return err ? err : r->error;
}

/* ---- the clock ---- */

static uint64_t host_clock_ns(clockid_t id)
{
    struct timespec ts;

    clock_gettime(id, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

int sm_hv_clock_get(struct sm_hv *hv, struct sm_clock *clock)
{
    struct kvm_clock_data data;
    int err;

    memset(&data, 0, sizeof(data));
    err = sm_kvm_ioctl(hv->vm_fd, KVM_GET_CLOCK, &data);
    if (err)
        return err;
    clock->guest_ticks = data.clock;
    clock->host_ns = host_clock_ns(CLOCK_BOOTTIME);
    clock->wall_ns = host_clock_ns(CLOCK_REALTIME);
    return 0;
}

/* The gap is added here, not by KVM_CLOCK_REALTIME: kvmclock must move exactly
 * as far as the TSC was moved, whether the kernel knows that flag or not. */
int sm_hv_clock_set(struct sm_hv *hv, const struct sm_clock *clock, bool advance)
{
    uint64_t now = host_clock_ns(CLOCK_REALTIME);
    struct kvm_clock_data data;

    memset(&data, 0, sizeof(data));
    data.clock = clock->guest_ticks;
    if (advance && now > clock->wall_ns)
        data.clock += now - clock->wall_ns;
    return sm_kvm_ioctl(hv->vm_fd, KVM_SET_CLOCK, &data);
}
