/* SPDX-License-Identifier: Apache-2.0 */
/*
 * KVM: the device, a VM, its memory slots and its eventfds.
 *
 * Order matters to the host kernel: slots and vCPUs come before any ioeventfd.
 * Each slot or vCPU waits for readers of the slot array, and a registration on
 * the I/O bus before it makes that wait as long as a full grace period on
 * recent kernels (25 ms instead of 0.1). core/vm.c keeps the order.
 *
 * Threads. VM ioctls may come from any thread; the slot table is serialised by
 * the caller (core/mem.c).
 */
#include "kvm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

int sm_kvm_ioctl(int fd, unsigned long request, void *arg)
{
    int r;

    do
        r = ioctl(fd, request, arg);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : r;
}

int sm_kvm_check(int fd, int cap)
{
    int r = ioctl(fd, KVM_CHECK_EXTENSION, cap);

    return r < 0 ? 0 : r;
}

static int kvm_open(void)
{
    int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);

    if (fd < 0)
        return errno == ENXIO || errno == ENODEV ? -ENOENT : -errno;
    if (ioctl(fd, KVM_GET_API_VERSION, 0) != KVM_API_VERSION) {
        close(fd);
        return -ENOTSUP;
    }
    return fd;
}

int sm_hv_probe(struct sm_hv_info *info)
{
    int fd, err, cpus;

    memset(info, 0, sizeof(*info));
    info->backend = "kvm";
    info->page_bytes = (unsigned)sysconf(_SC_PAGESIZE);
    fd = kvm_open();
    if (fd < 0)
        return fd;
    cpus = sm_kvm_check(fd, KVM_CAP_NR_VCPUS);
    info->max_vcpus = cpus > 0 ? (unsigned)cpus : 4; /* 4: KVM API, 4.4 */
    if (info->max_vcpus > SM_MAX_VCPUS)
        info->max_vcpus = SM_MAX_VCPUS;
    info->irqfd = sm_kvm_check(fd, KVM_CAP_IRQFD);
    info->ioeventfd = sm_kvm_check(fd, KVM_CAP_IOEVENTFD);
    info->readonly_mem = sm_kvm_check(fd, KVM_CAP_READONLY_MEM);
    info->dirty_log = true; /* as old as memory slots */
    info->immediate_exit = sm_kvm_check(fd, KVM_CAP_IMMEDIATE_EXIT);
    err = sm_kvm_arch_probe(fd, info);
    close(fd);
    if (!err && (!info->irqfd || !info->ioeventfd || !info->immediate_exit))
        err = -ENOTSUP;
    return err;
}

int sm_hv_create(struct sm_hv **out)
{
    struct sm_hv *hv = calloc(1, sizeof(*hv));
    int err, bytes;

    if (!hv)
        return -ENOMEM;
    hv->vm_fd = -1;
    hv->kvm_fd = kvm_open();
    if (hv->kvm_fd < 0) {
        err = hv->kvm_fd;
        goto fail;
    }
    bytes = ioctl(hv->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (bytes < (int)sizeof(struct kvm_run)) {
        err = -ENOTSUP;
        goto fail;
    }
    hv->run_bytes = (size_t)bytes;
    hv->vm_fd = sm_kvm_ioctl(hv->kvm_fd, KVM_CREATE_VM, NULL);
    if (hv->vm_fd < 0) {
        err = hv->vm_fd;
        goto fail;
    }
    fcntl(hv->vm_fd, F_SETFD, FD_CLOEXEC);
    err = sm_kvm_arch_create(hv);
    if (err)
        goto fail;
    *out = hv;
    return 0;
fail:
    sm_hv_destroy(hv);
    return err;
}

void sm_hv_destroy(struct sm_hv *hv)
{
    if (!hv)
        return;
    sm_kvm_arch_destroy(hv);
    if (hv->vm_fd >= 0)
        close(hv->vm_fd);
    if (hv->kvm_fd >= 0)
        close(hv->kvm_fd);
    free(hv);
}

static struct sm_kvm_slot *slot_at(struct sm_hv *hv, uint64_t gpa)
{
    for (unsigned i = 0; i < SM_KVM_SLOTS; i++)
        if (hv->slots[i].used && hv->slots[i].gpa == gpa)
            return &hv->slots[i];
    return NULL;
}

/* Tell KVM about a slot; length 0 removes it. */
static int slot_set(struct sm_hv *hv, const struct sm_kvm_slot *slot, uint64_t len_bytes)
{
    struct kvm_userspace_memory_region region = {
        .slot = (uint32_t)(slot - hv->slots),
        .flags = len_bytes ? slot->flags : 0,
        .guest_phys_addr = slot->gpa,
        .memory_size = len_bytes,
        .userspace_addr = (uintptr_t)slot->hva,
    };

    return sm_kvm_ioctl(hv->vm_fd, KVM_SET_USER_MEMORY_REGION, &region);
}

static uint32_t slot_flags(unsigned prot, bool log_dirty)
{
    return (prot & SM_PROT_WRITE ? 0 : KVM_MEM_READONLY) |
           (log_dirty ? KVM_MEM_LOG_DIRTY_PAGES : 0);
}

int sm_hv_map(struct sm_hv *hv, uint64_t gpa, void *hva, uint64_t len_bytes, unsigned prot,
              bool log_dirty)
{
    struct sm_kvm_slot *slot = NULL;
    int err;

    if (!(prot & SM_PROT_READ))
        return -EINVAL;
    for (unsigned i = 0; i < SM_KVM_SLOTS && !slot; i++)
        if (!hv->slots[i].used)
            slot = &hv->slots[i];
    if (!slot)
        return -ENOSPC;
    slot->gpa = gpa;
    slot->hva = hva;
    slot->len_bytes = len_bytes;
    slot->flags = slot_flags(prot, log_dirty);
    err = slot_set(hv, slot, len_bytes);
    if (err)
        return err == -EEXIST ? -EINVAL : err;
    slot->used = true;
    return 0;
}

int sm_hv_unmap(struct sm_hv *hv, uint64_t gpa)
{
    struct sm_kvm_slot *slot = slot_at(hv, gpa);
    int err;

    if (!slot)
        return -EINVAL;
    err = slot_set(hv, slot, 0);
    if (!err)
        slot->used = false;
    return err;
}

int sm_hv_protect(struct sm_hv *hv, uint64_t gpa, unsigned prot, bool log_dirty)
{
    struct sm_kvm_slot *slot = slot_at(hv, gpa);
    uint32_t flags = slot_flags(prot, log_dirty), old;
    int err;

    if (!slot || !(prot & SM_PROT_READ))
        return -EINVAL;
    old = slot->flags;
    /* KVM changes the log flag of a live slot, but not READONLY. */
    if ((old ^ flags) & KVM_MEM_READONLY) {
        err = slot_set(hv, slot, 0);
        if (err)
            return err;
    }
    slot->flags = flags;
    err = slot_set(hv, slot, slot->len_bytes);
    if (err) {
        slot->flags = old;
        slot_set(hv, slot, slot->len_bytes);
    }
    return err;
}

int sm_hv_dirty_log(struct sm_hv *hv, uint64_t gpa, uint64_t *bitmap, size_t words)
{
    struct sm_kvm_slot *slot = slot_at(hv, gpa);
    uint64_t pages;
    struct kvm_dirty_log log;

    if (!slot || !(slot->flags & KVM_MEM_LOG_DIRTY_PAGES))
        return -EINVAL;
    pages = slot->len_bytes / (uint64_t)sysconf(_SC_PAGESIZE);
    if (words < (pages + 63) / 64)
        return -EINVAL;
    memset(&log, 0, sizeof(log));
    log.slot = (uint32_t)(slot - hv->slots);
    log.dirty_bitmap = bitmap;
    return sm_kvm_ioctl(hv->vm_fd, KVM_GET_DIRTY_LOG, &log);
}

int sm_hv_irq_line(struct sm_hv *hv, uint32_t gsi, bool level)
{
    struct kvm_irq_level line = { .irq = gsi, .level = level };

    return sm_kvm_ioctl(hv->vm_fd, KVM_IRQ_LINE, &line);
}

int sm_hv_irqfd(struct sm_hv *hv, uint32_t gsi, int fd, bool assign)
{
    struct kvm_irqfd irqfd = {
        .fd = (uint32_t)fd,
        .gsi = gsi,
        .flags = assign ? 0 : KVM_IRQFD_FLAG_DEASSIGN,
    };

    return sm_kvm_ioctl(hv->vm_fd, KVM_IRQFD, &irqfd);
}

int sm_hv_ioeventfd(struct sm_hv *hv, uint64_t gpa, unsigned len, uint32_t data, int fd,
                    bool assign)
{
    struct kvm_ioeventfd ioev = {
        .datamatch = data,
        .addr = gpa,
        .len = len,
        .fd = fd,
        .flags = (assign ? 0 : KVM_IOEVENTFD_FLAG_DEASSIGN) |
                 (len ? KVM_IOEVENTFD_FLAG_DATAMATCH : 0),
    };

    return sm_kvm_ioctl(hv->vm_fd, KVM_IOEVENTFD, &ioev);
}
