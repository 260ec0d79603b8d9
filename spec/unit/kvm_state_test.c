/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What core/kvm/x86_state.c asks of KVM, and in which order, with the kernel played by a
 * model that has its known traps: what this machine's CPU lacks (AVX-512 and larger
 * areas, TSC scaling) and what breaks in silence when the order is wrong. Each trap is
 * named at the place where the model sets it.
 */
#if defined(__x86_64__)
#include "../../core/kvm/x86_state.c"

#include "test.h"

#define MODEL_MSRS 16
#define XSAVE_BYTES 11008 /* with AMX, as KVM_CAP_XSAVE2 says it there */
#define MSR_APIC_TIMER 0x320u /* LVTT, an offset of the APIC page */
#define MSR_TSC_AUX 0xc0000103u
#define MSR_KVMCLOCK 0x4b564d01u
#define RDTSCP_LEAF 0x80000001u
#define SECOND 1000000000ull /* of TSC, at 1 GHz */

enum { VCPU_FD = 10, VM_FD = 11, KVM_FD = 12 };

static struct model {
    struct kvm_mp_state mp;
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    uint8_t xsave[XSAVE_BYTES];
    struct kvm_xcrs xcrs;
    struct kvm_debugregs debug;
    struct kvm_lapic_state lapic;
    struct kvm_vcpu_events events;
    struct kvm_cpuid_entry2 cpuid[4];
    unsigned cpuid_count;
    struct kvm_msr_entry msrs[MODEL_MSRS];
    unsigned msr_count;
    uint64_t clock;
    unsigned khz;
    bool scales, has_xsave2, init_pending;
    struct kvm_irqchip chips[3];
} model;

static uint64_t *msr(uint32_t index)
{
    for (unsigned i = 0; i < model.msr_count; i++)
        if (model.msrs[i].index == index)
            return (uint64_t *)&model.msrs[i].data;
    return NULL;
}

static void add(uint32_t index, uint64_t data)
{
    model.msrs[model.msr_count++] = (struct kvm_msr_entry){ .index = index, .data = data };
}

static uint32_t timer_mode(void)
{
    uint32_t lvtt;

    memcpy(&lvtt, model.lapic.regs + MSR_APIC_TIMER, sizeof(lvtt));
    return lvtt >> 17 & 3;
}

static bool cpuid_has(uint32_t leaf)
{
    for (unsigned i = 0; i < model.cpuid_count; i++)
        if (model.cpuid[i].function == leaf)
            return true;
    return false;
}

static bool can_write(uint32_t index)
{
    return msr(index) && (index != MSR_TSC_AUX || cpuid_has(RDTSCP_LEAF));
}

static void write_msr(uint32_t index, uint64_t data)
{
    uint64_t *now = msr(index), apart = data > *now ? data - *now : *now - data;

    if (index == MSR_TSC && apart < SECOND)
        return; /* trap: taken for an attempt to synchronise */
    if (index == MSR_TSC_DEADLINE && timer_mode() != 2)
        return; /* trap: dropped unless the timer is in that mode */
    *now = data;
}

static int get_msrs(struct kvm_msrs *m)
{
    for (unsigned i = 0; i < m->nmsrs; i++) {
        uint64_t *data = msr(m->entries[i].index);

        if (!data)
            return (int)i;
        m->entries[i].data = *data;
    }
    return (int)m->nmsrs;
}

static int set_msrs_(const struct kvm_msrs *m)
{
    for (unsigned i = 0; i < m->nmsrs; i++) {
        if (!can_write(m->entries[i].index))
            return (int)i;
        write_msr(m->entries[i].index, m->entries[i].data);
    }
    return (int)m->nmsrs;
}

static int list_all(struct kvm_msr_list *l)
{
    for (unsigned i = 0; i < model.msr_count; i++)
        l->indices[i] = model.msrs[i].index;
    l->nmsrs = model.msr_count;
    return 0;
}

#define GET(field) (memcpy(arg, &model.field, sizeof(model.field)), 0)
#define SET(field) (memcpy(&model.field, arg, sizeof(model.field)), 0)

int sm_kvm_ioctl(int fd, unsigned long request, void *arg)
{
    struct kvm_cpuid2 *c = arg;
    struct kvm_clock_data *clock = arg;
    struct kvm_irqchip *chip = arg;

    (void)fd;
    switch (request) {
    case KVM_GET_MP_STATE:
        if (model.init_pending) { /* trap: reading it takes the INIT in */
            model.mp.mp_state = KVM_MP_STATE_INIT_RECEIVED;
            model.regs.rip = 0xfff0;
            model.init_pending = false;
        }
        return GET(mp);
    case KVM_SET_MP_STATE: return SET(mp);
    case KVM_GET_REGS: return GET(regs);
    case KVM_SET_REGS:
        model.events.exception.injected = 0; /* trap: what was pending is gone */
        return SET(regs);
    case KVM_GET_SREGS: return GET(sregs);
    case KVM_SET_SREGS: return SET(sregs);
    case KVM_GET_XSAVE2: return GET(xsave);
    case KVM_GET_XSAVE: memcpy(arg, model.xsave, sizeof(struct kvm_xsave)); return 0;
    case KVM_SET_XSAVE:
        memcpy(model.xsave, arg, model.has_xsave2 ? XSAVE_BYTES : sizeof(struct kvm_xsave));
        return 0;
    case KVM_GET_XCRS: return GET(xcrs);
    case KVM_SET_XCRS: return SET(xcrs);
    case KVM_GET_DEBUGREGS: return GET(debug);
    case KVM_SET_DEBUGREGS: return SET(debug);
    case KVM_GET_LAPIC: return GET(lapic);
    case KVM_SET_LAPIC:
        if (!(model.sregs.apic_base & 1 << 11))
            return 0; /* trap: no APIC, no page */
        return SET(lapic);
    case KVM_GET_VCPU_EVENTS: return GET(events);
    case KVM_SET_VCPU_EVENTS: return SET(events);
    case KVM_GET_CPUID2:
        memcpy(c->entries, model.cpuid, sizeof(model.cpuid));
        c->nent = model.cpuid_count;
        return 0;
    case KVM_SET_CPUID2:
        memcpy(model.cpuid, c->entries, c->nent * sizeof(model.cpuid[0]));
        model.cpuid_count = c->nent;
        return 0;
    case KVM_GET_TSC_KHZ: return (int)model.khz;
    case KVM_SET_TSC_KHZ:
        model.khz = (unsigned)(uintptr_t)arg;
        return 0;
    case KVM_GET_MSR_INDEX_LIST: return list_all(arg);
    case KVM_GET_MSRS: return get_msrs(arg);
    case KVM_SET_MSRS: return set_msrs_(arg);
    case KVM_GET_CLOCK: clock->clock = model.clock; return 0;
    case KVM_SET_CLOCK: model.clock = clock->clock; return 0;
    case KVM_GET_IRQCHIP: *chip = model.chips[chip->chip_id]; return 0;
    case KVM_SET_IRQCHIP: model.chips[chip->chip_id] = *chip; return 0;
    default: return -EINVAL;
    }
}

int sm_kvm_check(int fd, int cap)
{
    (void)fd;
    switch (cap) {
    case KVM_CAP_XSAVE: return 1;
    case KVM_CAP_XSAVE2: return model.has_xsave2 ? XSAVE_BYTES : 0;
    case KVM_CAP_XCRS: return 1;
    case KVM_CAP_TSC_CONTROL: return model.scales;
    default: return 0;
    }
}

/* ---- a vCPU of a machine that runs, and of a new one ---- */

static void power_on(void)
{
    memset(&model, 0, sizeof(model));
    model.khz = 1000000;
    model.has_xsave2 = true;
    add(MSR_KVMCLOCK, 0);
    add(MSR_TSC_DEADLINE, 0);
    add(MSR_TSC_AUX, 0);
    add(MSR_TSC, 0);
}

static void run_for_a_while(void)
{
    static const uint32_t deadline_mode = 2u << 17 | 0xec;

    power_on();
    memset(&model.regs, 0x11, sizeof(model.regs));
    memset(&model.sregs, 0x22, sizeof(model.sregs));
    model.sregs.apic_base = 0xfee00000 | 1 << 11;
    for (size_t i = 0; i < XSAVE_BYTES; i++)
        model.xsave[i] = (uint8_t)(i * 7 + i / 256);
    memset(&model.xcrs, 0x33, sizeof(model.xcrs));
    memset(&model.debug, 0x44, sizeof(model.debug));
    memcpy(model.lapic.regs + MSR_APIC_TIMER, &deadline_mode, sizeof(deadline_mode));
    model.events.exception.injected = 1;
    model.events.exception.nr = 14;
    model.cpuid[0] = (struct kvm_cpuid_entry2){ .function = 1, .ecx = 1u << 27 };
    model.cpuid[1] = (struct kvm_cpuid_entry2){ .function = RDTSCP_LEAF };
    model.cpuid_count = 2;
    *msr(MSR_TSC) = 5000 * SECOND;
    *msr(MSR_TSC_DEADLINE) = 5001 * SECOND;
    *msr(MSR_TSC_AUX) = 3;
    *msr(MSR_KVMCLOCK) = 0x1234001;
}

static struct sm_hv hv = { .kvm_fd = KVM_FD, .vm_fd = VM_FD };

static struct sm_state_writer save(void)
{
    struct sm_hv_vcpu vcpu = { .hv = &hv, .fd = VCPU_FD };
    struct sm_state_writer w;

    sm_state_writer_init(&w);
    CHECK_EQ(sm_hv_vcpu_save(&vcpu, &w), 0);
    return w;
}

static int load(const struct sm_state_writer *w, size_t len, uint64_t advance_ns)
{
    struct sm_hv_vcpu vcpu = { .hv = &hv, .fd = VCPU_FD };
    struct sm_state_reader r;

    sm_state_reader_init(&r, w->buf, len);
    return sm_hv_vcpu_load(&vcpu, &r, advance_ns);
}

/* ---- tests ---- */

static void everything_comes_back(void)
{
    struct sm_state_writer w;
    struct model before;

    run_for_a_while();
    before = model;
    w = save();
    power_on();
    CHECK_EQ(load(&w, w.len, 0), 0);
    CHECK(memcmp(&model.regs, &before.regs, sizeof(before.regs)) == 0);
    CHECK(memcmp(&model.sregs, &before.sregs, sizeof(before.sregs)) == 0);
    CHECK(memcmp(model.xsave, before.xsave, sizeof(before.xsave)) == 0);
    CHECK(memcmp(&model.xcrs, &before.xcrs, sizeof(before.xcrs)) == 0);
    CHECK(memcmp(&model.debug, &before.debug, sizeof(before.debug)) == 0);
    CHECK(memcmp(&model.lapic, &before.lapic, sizeof(before.lapic)) == 0);
    CHECK(memcmp(&model.events, &before.events, sizeof(before.events)) == 0);
    CHECK_EQ(model.cpuid[0].ecx, 1u << 27); /* as the kernel has it now, not as it was created */
    CHECK_EQ(*msr(MSR_TSC), 5000 * SECOND);
    CHECK_EQ(*msr(MSR_TSC_DEADLINE), 5001 * SECOND);
    CHECK_EQ(*msr(MSR_TSC_AUX), 3);
    CHECK_EQ(*msr(MSR_KVMCLOCK), 0x1234001);
    sm_state_writer_free(&w);
}

/* The same without KVM_CAP_XSAVE2: 4 KiB of it. */
static void a_small_area_too(void)
{
    struct sm_state_writer w;
    struct model before;

    run_for_a_while();
    model.has_xsave2 = false;
    before = model;
    w = save();
    power_on();
    model.has_xsave2 = false;
    CHECK_EQ(load(&w, w.len, 0), 0);
    CHECK(memcmp(model.xsave, before.xsave, sizeof(struct kvm_xsave)) == 0);
    /* But not where the area has another size. */
    power_on();
    CHECK_EQ(load(&w, w.len, 0), -EBADMSG);
    sm_state_writer_free(&w);
}

static void a_timer_that_fired_into_the_save_fires_once_more(void)
{
    struct sm_state_writer w;

    run_for_a_while();
    *msr(MSR_TSC_DEADLINE) = 0;
    w = save();
    power_on();
    CHECK_EQ(load(&w, w.len, 0), 0);
    CHECK_EQ(*msr(MSR_TSC_DEADLINE), 5000 * SECOND);
    sm_state_writer_free(&w);
}

/* It is near the new machine's own, where KVM ignores what is written. */
static void a_tsc_of_the_first_second_comes_back(void)
{
    struct sm_state_writer w;

    run_for_a_while();
    *msr(MSR_TSC) = SECOND / 2;
    *msr(MSR_TSC_DEADLINE) = SECOND;
    w = save();
    power_on();
    CHECK_EQ(load(&w, w.len, 0), 0);
    CHECK_EQ(*msr(MSR_TSC), SECOND / 2);
    sm_state_writer_free(&w);
}

static void what_reading_changes_is_read_first(void)
{
    struct sm_state_writer w;

    run_for_a_while();
    model.init_pending = true;
    w = save();
    power_on();
    CHECK_EQ(load(&w, w.len, 0), 0);
    CHECK_EQ(model.mp.mp_state, KVM_MP_STATE_INIT_RECEIVED);
    CHECK_EQ(model.regs.rip, 0xfff0);
    sm_state_writer_free(&w);
}

static void another_frequency_is_scaled_or_refused(void)
{
    struct sm_state_writer w;

    run_for_a_while();
    w = save();
    power_on();
    model.khz = 2000000;
    CHECK_EQ(load(&w, w.len, 0), -ENOTSUP);
    CHECK_EQ(model.khz, 2000000);
    power_on();
    model.khz = 2000000;
    model.scales = true;
    CHECK_EQ(load(&w, w.len, 0), 0);
    CHECK_EQ(model.khz, 1000000);
    power_on();
    model.khz = 1000200; /* what two measurements of one clock may differ in */
    CHECK_EQ(load(&w, w.len, 0), 0);
    CHECK_EQ(model.khz, 1000200);
    sm_state_writer_free(&w);
}

/* TSC and kvmclock move on together, by the time that went by. */
static void clocks_advance_together(void)
{
    struct sm_clock clock;
    struct sm_state_writer w;
    const uint64_t gap_ns = 3600 * 1000000000ull;
    uint64_t kvmclock;

    run_for_a_while();
    model.clock = 77;
    CHECK_EQ(sm_hv_clock_get(&hv, &clock), 0);
    w = save();
    power_on();
    CHECK_EQ(load(&w, w.len, gap_ns), 0);
    CHECK_EQ(*msr(MSR_TSC), 5000 * SECOND + 3600 * SECOND); /* 1 GHz: a tick a ns */
    CHECK_EQ(sm_hv_clock_set(&hv, &clock, false), 0);
    CHECK_EQ(model.clock, 77);
    clock.wall_ns -= gap_ns;
    CHECK_EQ(sm_hv_clock_set(&hv, &clock, true), 0);
    kvmclock = model.clock - 77;
    CHECK(kvmclock >= gap_ns && kvmclock < gap_ns + 60 * 1000000000ull);
    clock.wall_ns += 2 * gap_ns; /* the host's clock was set back: nothing goes back */
    CHECK_EQ(sm_hv_clock_set(&hv, &clock, true), 0);
    CHECK_EQ(model.clock, 77);
    sm_state_writer_free(&w);
}

/* vCPU 0 sets the time, the others say the very same. */
static void vcpus_share_one_tsc(void)
{
    struct sm_hv_vcpu second = { .hv = &hv, .fd = VCPU_FD, .index = 1 };
    struct sm_state_writer w, later;
    struct sm_state_reader r;

    run_for_a_while();
    w = save();
    *msr(MSR_TSC) += 12345; /* it was read a moment after */
    later = save();
    power_on();
    CHECK_EQ(load(&w, w.len, 0), 0);
    power_on();
    sm_state_reader_init(&r, later.buf, later.len);
    CHECK_EQ(sm_hv_vcpu_load(&second, &r, 0), 0);
    CHECK_EQ(*msr(MSR_TSC), 5000 * SECOND);
    sm_state_writer_free(&w);
    sm_state_writer_free(&later);
}

static void what_is_cut_off_is_refused(void)
{
    struct sm_state_writer w;

    run_for_a_while();
    w = save();
    for (size_t len = 0; len < w.len; len += len < 2000 ? 1 : 97) {
        power_on();
        CHECK_EQ(load(&w, len, 0), -EBADMSG);
    }
    sm_state_writer_free(&w);
}

static void an_access_in_the_middle_is_not_saved(void)
{
    struct sm_hv_vcpu vcpu = { .hv = &hv, .fd = VCPU_FD, .half_done = true };
    struct sm_state_writer w;

    run_for_a_while();
    sm_state_writer_init(&w);
    CHECK_EQ(sm_hv_vcpu_save(&vcpu, &w), -EBUSY);
    sm_state_writer_free(&w);
}

int main(void)
{
    TEST(everything_comes_back);
    TEST(a_small_area_too);
    TEST(a_timer_that_fired_into_the_save_fires_once_more);
    TEST(a_tsc_of_the_first_second_comes_back);
    TEST(what_reading_changes_is_read_first);
    TEST(another_frequency_is_scaled_or_refused);
    TEST(clocks_advance_together);
    TEST(vcpus_share_one_tsc);
    TEST(what_is_cut_off_is_refused);
    TEST(an_access_in_the_middle_is_not_saved);
    return test_report();
}
#else /* arm64 has no KVM state of ours yet */
#include "test.h"

int main(void)
{
    return test_report();
}
#endif
