/* SPDX-License-Identifier: Apache-2.0 */
/* The fake backend: VM, memory map, lines, vCPU life and kicks; see fake.h. */
#include "fake.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>

#include "state.h"

#define PAGE_BYTES 4096u

int sm_hv_probe(struct sm_hv_info *info)
{
    *info = (struct sm_hv_info){
        .backend = "fake",
        .max_vcpus = SM_MAX_VCPUS,
        .page_bytes = PAGE_BYTES,
        .hardware = true,
        .irqfd = true,
        .ioeventfd = true,
        .readonly_mem = true,
        .dirty_log = true,
        .immediate_exit = true,
    };
    return 0;
}

int sm_hv_create(struct sm_hv **out)
{
    struct sm_hv *hv = calloc(1, sizeof(*hv));
    if (!hv) {
        return -ENOMEM;
    }
    pthread_mutex_init(&hv->lock, NULL);
    for (unsigned i = 0; i < SM_FAKE_GSIS; i++) {
        hv->lines[i].irqfd = -1;
    }
    *out = hv;
    return 0;
}

void sm_hv_destroy(struct sm_hv *hv)
{
    for (unsigned i = 0; i < hv->map_count; i++) {
        free(hv->maps[i].dirty);
    }
    for (unsigned i = 0; i < SM_MAX_VCPUS; i++) {
        free(hv->scripts[i].steps);
    }
    pthread_mutex_destroy(&hv->lock);
    free(hv);
}

/* ---- memory ---- */

static struct sm_fake_map *find_map(struct sm_hv *hv, uint64_t gpa)
{
    for (unsigned i = 0; i < hv->map_count; i++) {
        if (hv->maps[i].gpa == gpa) {
            return &hv->maps[i];
        }
    }
    return NULL;
}

static size_t dirty_words(const struct sm_fake_map *map)
{
    return (size_t)((map->len_bytes / PAGE_BYTES + 63) / 64);
}

static int set_logging(struct sm_fake_map *map, bool log_dirty)
{
    if (log_dirty && !map->dirty) {
        map->dirty = calloc(dirty_words(map), sizeof(uint64_t));
        if (!map->dirty) {
            return -ENOMEM;
        }
    } else if (!log_dirty) {
        free(map->dirty);
        map->dirty = NULL;
    }
    map->log_dirty = log_dirty;
    return 0;
}

static int add_map(struct sm_hv *hv, struct sm_fake_map map, bool log_dirty)
{
    if (hv->map_count == SM_FAKE_MAPS) {
        return -ENOSPC;
    }
    for (unsigned i = 0; i < hv->map_count; i++) {
        const struct sm_fake_map *other = &hv->maps[i];
        if (map.gpa < other->gpa + other->len_bytes &&
            other->gpa < map.gpa + map.len_bytes) {
            return -EINVAL;
        }
    }
    int err = set_logging(&map, log_dirty);
    if (err < 0) {
        return err;
    }
    hv->maps[hv->map_count++] = map;
    return 0;
}

int sm_hv_map(struct sm_hv *hv, uint64_t gpa, void *hva, uint64_t len_bytes, unsigned prot,
              bool log_dirty)
{
    struct sm_fake_map map = {
        .gpa = gpa, .len_bytes = len_bytes, .hva = hva, .prot = prot
    };
    if (!len_bytes || (gpa | len_bytes | (uintptr_t)hva) % PAGE_BYTES ||
        gpa + len_bytes < gpa) {
        return -EINVAL;
    }
    pthread_mutex_lock(&hv->lock);
    int err = add_map(hv, map, log_dirty);
    pthread_mutex_unlock(&hv->lock);
    return err;
}

int sm_hv_unmap(struct sm_hv *hv, uint64_t gpa)
{
    int err = -ENOENT;
    pthread_mutex_lock(&hv->lock);
    struct sm_fake_map *map = find_map(hv, gpa);
    if (map) {
        free(map->dirty);
        *map = hv->maps[--hv->map_count];
        err = 0;
    }
    pthread_mutex_unlock(&hv->lock);
    return err;
}

int sm_hv_protect(struct sm_hv *hv, uint64_t gpa, unsigned prot, bool log_dirty)
{
    int err = -ENOENT;
    pthread_mutex_lock(&hv->lock);
    struct sm_fake_map *map = find_map(hv, gpa);
    if (map) {
        err = set_logging(map, log_dirty);
        map->prot = prot;
    }
    pthread_mutex_unlock(&hv->lock);
    return err;
}

int sm_hv_dirty_log(struct sm_hv *hv, uint64_t gpa, uint64_t *bitmap, size_t words)
{
    int err = 0;
    pthread_mutex_lock(&hv->lock);
    struct sm_fake_map *map = find_map(hv, gpa);
    if (!map || !map->dirty) {
        err = -ENOENT;
    } else if (words < dirty_words(map)) {
        err = -EINVAL;
    } else {
        memcpy(bitmap, map->dirty, dirty_words(map) * sizeof(*bitmap));
        memset(map->dirty, 0, dirty_words(map) * sizeof(*bitmap));
    }
    pthread_mutex_unlock(&hv->lock);
    return err;
}

uint8_t *sm_fake_ram(struct sm_hv *hv, uint64_t gpa, unsigned len, bool write)
{
    uint8_t *hva = NULL;
    pthread_mutex_lock(&hv->lock);
    for (unsigned i = 0; i < hv->map_count; i++) {
        struct sm_fake_map *map = &hv->maps[i];
        if (gpa < map->gpa || gpa - map->gpa > map->len_bytes - len) {
            continue;
        }
        uint64_t off = gpa - map->gpa;
        if (write && !(map->prot & SM_PROT_WRITE)) {
            break;
        }
        if (write && map->dirty) {
            for (uint64_t p = off / PAGE_BYTES; p <= (off + len - 1) / PAGE_BYTES; p++) {
                map->dirty[p / 64] |= 1ull << (p % 64);
            }
        }
        hva = map->hva + off;
        break;
    }
    pthread_mutex_unlock(&hv->lock);
    return hva;
}

/* ---- interrupts and doorbells ---- */

int sm_hv_irq_line(struct sm_hv *hv, uint32_t gsi, bool level)
{
    if (gsi >= SM_FAKE_GSIS) {
        return -EINVAL;
    }
    pthread_mutex_lock(&hv->lock);
    if (level && !hv->lines[gsi].level) {
        hv->lines[gsi].edges++;
    }
    hv->lines[gsi].level = level;
    pthread_mutex_unlock(&hv->lock);
    return 0;
}

int sm_hv_irqfd(struct sm_hv *hv, uint32_t gsi, int fd, bool assign)
{
    if (gsi >= SM_FAKE_GSIS) {
        return -EINVAL;
    }
    int err = 0;
    pthread_mutex_lock(&hv->lock);
    if (assign && hv->lines[gsi].irqfd >= 0) {
        err = -EBUSY;
    } else if (!assign && hv->lines[gsi].irqfd != fd) {
        err = -ENOENT;
    } else {
        hv->lines[gsi].irqfd = assign ? fd : -1;
    }
    pthread_mutex_unlock(&hv->lock);
    return err;
}

static bool same_doorbell(const struct sm_fake_doorbell *a, const struct sm_fake_doorbell *b)
{
    return a->gpa == b->gpa && a->len == b->len && (!a->len || a->data == b->data);
}

int sm_hv_ioeventfd(struct sm_hv *hv, uint64_t gpa, unsigned len, uint32_t data, int fd,
                    bool assign)
{
    struct sm_fake_doorbell bell = { gpa, len, data, fd };
    int err = assign ? 0 : -ENOENT;
    pthread_mutex_lock(&hv->lock);
    for (unsigned i = 0; i < hv->doorbell_count; i++) {
        if (same_doorbell(&hv->doorbells[i], &bell)) {
            if (assign) {
                err = -EEXIST;
            } else {
                hv->doorbells[i] = hv->doorbells[--hv->doorbell_count];
                err = 0;
            }
            break;
        }
    }
    if (assign && err == 0) {
        if (hv->doorbell_count == SM_FAKE_DOORBELLS) {
            err = -ENOSPC;
        } else {
            hv->doorbells[hv->doorbell_count++] = bell;
        }
    }
    pthread_mutex_unlock(&hv->lock);
    return err;
}

bool sm_fake_ring(struct sm_hv *hv, uint64_t gpa, unsigned len, uint64_t data)
{
    bool rung = false;
    pthread_mutex_lock(&hv->lock);
    for (unsigned i = 0; i < hv->doorbell_count && !rung; i++) {
        const struct sm_fake_doorbell *bell = &hv->doorbells[i];
        if (bell->gpa == gpa && (!bell->len || (bell->len == len && bell->data == data))) {
            eventfd_write(bell->fd, 1);
            rung = true;
        }
    }
    pthread_mutex_unlock(&hv->lock);
    return rung;
}

/* ---- vCPUs ---- */

int sm_hv_vcpu_create(struct sm_hv *hv, unsigned index, unsigned cpus,
                      struct sm_hv_vcpu **out)
{
    if (index >= cpus || cpus > SM_MAX_VCPUS) {
        return -EINVAL;
    }
    struct sm_hv_vcpu *vcpu = calloc(1, sizeof(*vcpu));
    if (!vcpu) {
        return -ENOMEM;
    }
    vcpu->hv = hv;
    vcpu->index = index;
    vcpu->thread = pthread_self();
    vcpu->regs[SM_X86_RFLAGS] = 2;
    vcpu->regs[SM_X86_FCW] = 0x37f;
    vcpu->regs[SM_X86_MXCSR] = 0x1f80;
    vcpu->halted = index != 0; /* as on a PC: the others wait to be entered */
    pthread_cond_init(&vcpu->wake, NULL);
    pthread_mutex_lock(&hv->lock);
    int err = hv->vcpus[index] ? -EEXIST : 0;
    if (!err) {
        hv->vcpus[index] = vcpu;
    }
    pthread_mutex_unlock(&hv->lock);
    if (err) {
        pthread_cond_destroy(&vcpu->wake);
        free(vcpu);
        return err;
    }
    *out = vcpu;
    return 0;
}

void sm_hv_vcpu_destroy(struct sm_hv_vcpu *vcpu)
{
    struct sm_hv *hv = vcpu->hv;
    pthread_mutex_lock(&hv->lock);
    hv->vcpus[vcpu->index] = NULL;
    pthread_mutex_unlock(&hv->lock);
    pthread_cond_destroy(&vcpu->wake);
    free(vcpu);
}

static bool on_own_thread(const struct sm_hv_vcpu *vcpu)
{
    return pthread_equal(vcpu->thread, pthread_self());
}

void sm_hv_vcpu_kick(struct sm_hv_vcpu *vcpu)
{
    pthread_mutex_lock(&vcpu->hv->lock);
    atomic_store(&vcpu->kicked, true);
    pthread_cond_broadcast(&vcpu->wake);
    pthread_mutex_unlock(&vcpu->hv->lock);
}

static struct sm_exit fault(const char *what)
{
    return (struct sm_exit){ .kind = SM_EXIT_FAULT, .u.fault = { .what = what } };
}

/* What waiting in the guest ends with. */
static struct sm_exit wait_for_kick(struct sm_hv_vcpu *vcpu)
{
    pthread_mutex_lock(&vcpu->hv->lock);
    while (!atomic_load(&vcpu->kicked)) {
        pthread_cond_wait(&vcpu->wake, &vcpu->hv->lock);
    }
    atomic_store(&vcpu->kicked, false);
    pthread_mutex_unlock(&vcpu->hv->lock);
    return (struct sm_exit){ .kind = SM_EXIT_KICKED };
}

/* The next step of the vCPU's script; false when it has none at all. Past its
 * end a script waits. */
static bool next_step(struct sm_hv_vcpu *vcpu, struct sm_fake_step *step)
{
    pthread_mutex_lock(&vcpu->hv->lock);
    struct sm_fake_script *script = &vcpu->hv->scripts[vcpu->index];
    bool has = script->steps != NULL;
    if (has && script->done < script->count) {
        *step = script->steps[script->done++];
    } else {
        step->kind = SM_FAKE_WAIT_KICK;
    }
    pthread_mutex_unlock(&vcpu->hv->lock);
    return has;
}

struct sm_exit sm_hv_vcpu_run(struct sm_hv_vcpu *vcpu)
{
    if (!on_own_thread(vcpu)) {
        return fault("vCPU run from a thread that does not own it");
    }
    if (sm_fake_retire(vcpu) && vcpu->debug.step) {
        return sm_fake_debug_exit(vcpu, SM_DEBUG_STEP, 0);
    }
    if (atomic_exchange(&vcpu->kicked, false)) {
        return (struct sm_exit){ .kind = SM_EXIT_KICKED };
    }
    struct sm_fake_step step;
    if (!next_step(vcpu, &step)) {
        if (!vcpu->halted) {
            struct sm_exit exit = sm_fake_interpret(vcpu);
            if (exit.kind != SM_EXIT_HALT) {
                return exit;
            }
            vcpu->halted = true;
        }
        /* as with an interrupt controller in the kernel: a halt waits there */
        return wait_for_kick(vcpu);
    }
    if (step.kind == SM_FAKE_WAIT_KICK) {
        return wait_for_kick(vcpu);
    }
    if (step.exit.kind == SM_EXIT_MMIO || step.exit.kind == SM_EXIT_PIO) {
        vcpu->pending = (struct sm_fake_pending){
            .active = true, .reg = -1, .len = step.exit.u.io.len,
            .next_rip = vcpu->regs[SM_X86_RIP],
        };
    }
    return step.exit;
}

void sm_hv_vcpu_complete(struct sm_hv_vcpu *vcpu, uint64_t data)
{
    vcpu->pending.completed = true;
    vcpu->pending.data = data;
    pthread_mutex_lock(&vcpu->hv->lock);
    unsigned n = vcpu->hv->read_count[vcpu->index]++;
    if (n < SM_FAKE_READS) {
        vcpu->hv->reads[vcpu->index][n] = data;
    }
    pthread_mutex_unlock(&vcpu->hv->lock);
}

int sm_hv_vcpu_settle(struct sm_hv_vcpu *vcpu)
{
    if (!on_own_thread(vcpu)) {
        return -EPERM;
    }
    sm_fake_retire(vcpu);
    return 0;
}

int sm_hv_vcpu_enter(struct sm_hv_vcpu *vcpu, enum sm_entry_mode mode, uint64_t entry_gpa,
                     uint64_t info_gpa)
{
    if (!on_own_thread(vcpu)) {
        return -EPERM;
    }
    memset(vcpu->regs, 0, SM_X86_REGS * sizeof(vcpu->regs[0])); /* not the FPU's */
    vcpu->regs[SM_X86_RFLAGS] = 2;
    vcpu->halted = false;
    switch (mode) {
    case SM_ENTRY_REAL16:
        if (entry_gpa > 0xfffff) {
            return -EINVAL;
        }
        vcpu->flat32 = false;
        vcpu->regs[SM_X86_RIP] = entry_gpa & 0xffff;
        vcpu->regs[SM_X86_CS] = (entry_gpa & 0xf0000) >> 4;
        vcpu->regs[SM_X86_CS_BASE] = entry_gpa & 0xf0000;
        vcpu->regs[SM_X86_IDT_LIMIT] = 0x3ff;
        return 0;
    case SM_ENTRY_PVH:
    case SM_ENTRY_LINUX64:
        vcpu->flat32 = true;
        vcpu->regs[SM_X86_RIP] = entry_gpa;
        vcpu->regs[mode == SM_ENTRY_PVH ? SM_X86_RBX : SM_X86_RSI] = info_gpa;
        return 0;
    default:
        return -ENOTSUP;
    }
}

int sm_hv_vcpu_debug(struct sm_hv_vcpu *vcpu, const struct sm_hv_debug *debug)
{
    if (!on_own_thread(vcpu)) {
        return -EPERM;
    }
    if (debug->count > SM_HV_DEBUG_POINTS) {
        return -EINVAL;
    }
    vcpu->debug = *debug;
    return 0;
}

/* No paging here. */
int sm_hv_translate(struct sm_hv_vcpu *vcpu, uint64_t linear, uint64_t *gpa)
{
    if (!sm_fake_ram(vcpu->hv, linear, 1, false)) {
        return -EFAULT;
    }
    *gpa = linear;
    return 0;
}

/* ---- clock ---- */

static uint64_t clock_ns(clockid_t id)
{
    struct timespec ts;
    clock_gettime(id, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

int sm_hv_clock_get(struct sm_hv *hv, struct sm_clock *clock)
{
    pthread_mutex_lock(&hv->lock);
    clock->host_ns = clock_ns(CLOCK_BOOTTIME);
    clock->wall_ns = clock_ns(CLOCK_REALTIME);
    clock->guest_ticks = clock->host_ns + (uint64_t)hv->clock_offset;
    pthread_mutex_unlock(&hv->lock);
    return 0;
}

int sm_hv_clock_set(struct sm_hv *hv, const struct sm_clock *clock, bool advance)
{
    uint64_t wall = clock_ns(CLOCK_REALTIME);
    uint64_t gone = advance && wall > clock->wall_ns ? wall - clock->wall_ns : 0;
    pthread_mutex_lock(&hv->lock);
    hv->clock_offset = (int64_t)(clock->guest_ticks + gone - clock_ns(CLOCK_BOOTTIME));
    pthread_mutex_unlock(&hv->lock);
    return 0;
}

/* ---- state ---- */

int sm_hv_vcpu_save(struct sm_hv_vcpu *vcpu, struct sm_state_writer *w)
{
    if (!on_own_thread(vcpu)) {
        return -EPERM;
    }
    if (vcpu->pending.active) {
        return -EBUSY;
    }
    sm_state_begin(w, "fakevcpu", 1);
    for (unsigned i = 0; i < SM_X86_REGS; i++) {
        sm_state_put_u64(w, vcpu->regs[i]);
    }
    sm_state_put_u8(w, vcpu->flat32);
    sm_state_put_u8(w, vcpu->halted);
    sm_state_put_u32(w, vcpu->msr_count);
    for (unsigned i = 0; i < vcpu->msr_count; i++) {
        sm_state_put_u64(w, vcpu->msrs[i].index);
        sm_state_put_u64(w, vcpu->msrs[i].value);
    }
    sm_state_end(w);
    return w->error;
}

/* advance_ns: the fake CPU has no cycle counter. */
int sm_hv_vcpu_load(struct sm_hv_vcpu *vcpu, struct sm_state_reader *r, uint64_t advance_ns)
{
    (void)advance_ns;
    if (!on_own_thread(vcpu)) {
        return -EPERM;
    }
    if (sm_state_open(r, "fakevcpu") != 1) {
        return r->error ? r->error : -EBADMSG;
    }
    for (unsigned i = 0; i < SM_X86_REGS; i++) {
        vcpu->regs[i] = sm_state_get_u64(r);
    }
    vcpu->flat32 = sm_state_get_u8(r);
    vcpu->halted = sm_state_get_u8(r);
    uint32_t msrs = sm_state_get_u32(r);
    if (msrs > SM_FAKE_MSRS) {
        return -EBADMSG;
    }
    vcpu->msr_count = msrs;
    for (unsigned i = 0; i < msrs; i++) {
        vcpu->msrs[i].index = sm_state_get_u64(r);
        vcpu->msrs[i].value = sm_state_get_u64(r);
    }
    sm_state_close(r);
    vcpu->pending.active = false;
    return r->error;
}

/* The interrupt lines are all the controller there is. */
int sm_hv_save(struct sm_hv *hv, struct sm_state_writer *w)
{
    sm_state_begin(w, "fakevm", 1);
    pthread_mutex_lock(&hv->lock);
    for (unsigned i = 0; i < SM_FAKE_GSIS; i++) {
        sm_state_put_u8(w, hv->lines[i].level);
    }
    pthread_mutex_unlock(&hv->lock);
    sm_state_end(w);
    return w->error;
}

int sm_hv_load(struct sm_hv *hv, struct sm_state_reader *r)
{
    if (sm_state_open(r, "fakevm") != 1) {
        return r->error ? r->error : -EBADMSG;
    }
    pthread_mutex_lock(&hv->lock);
    for (unsigned i = 0; i < SM_FAKE_GSIS; i++) {
        hv->lines[i].level = sm_state_get_u8(r);
    }
    pthread_mutex_unlock(&hv->lock);
    sm_state_close(r);
    return r->error;
}

int sm_hv_fingerprint(struct sm_hv *hv, char *buf, size_t len)
{
    (void)hv;
    snprintf(buf, len, "fake");
    return 0;
}

/* ---- hooks ---- */

int sm_fake_script(struct sm_hv *hv, unsigned index, const struct sm_fake_step *steps,
                   unsigned count)
{
    if (index >= SM_MAX_VCPUS) {
        return -EINVAL;
    }
    struct sm_fake_step *copy = calloc(count + 1, sizeof(*copy));
    if (!copy) {
        return -ENOMEM;
    }
    memcpy(copy, steps, count * sizeof(*copy));
    pthread_mutex_lock(&hv->lock);
    free(hv->scripts[index].steps);
    hv->scripts[index] = (struct sm_fake_script){ copy, count, 0 };
    pthread_mutex_unlock(&hv->lock);
    return 0;
}

unsigned sm_fake_steps_done(struct sm_hv *hv, unsigned index)
{
    pthread_mutex_lock(&hv->lock);
    unsigned done = hv->scripts[index].done;
    pthread_mutex_unlock(&hv->lock);
    return done;
}

bool sm_fake_read_value(struct sm_hv *hv, unsigned index, unsigned n, uint64_t *value)
{
    pthread_mutex_lock(&hv->lock);
    bool has = n < SM_FAKE_READS && n < hv->read_count[index];
    if (has) {
        *value = hv->reads[index][n];
    }
    pthread_mutex_unlock(&hv->lock);
    return has;
}

struct sm_fake_line sm_fake_irq(struct sm_hv *hv, uint32_t gsi)
{
    struct sm_fake_line line = { .irqfd = -1 };
    pthread_mutex_lock(&hv->lock);
    if (gsi < SM_FAKE_GSIS) {
        line = hv->lines[gsi];
    }
    pthread_mutex_unlock(&hv->lock);
    return line;
}

bool sm_fake_mapping(struct sm_hv *hv, unsigned n, struct sm_fake_map *out)
{
    pthread_mutex_lock(&hv->lock);
    bool has = n < hv->map_count;
    if (has) {
        *out = hv->maps[n];
    }
    pthread_mutex_unlock(&hv->lock);
    return has;
}
