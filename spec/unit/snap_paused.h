/* SPDX-License-Identifier: Apache-2.0 */
/* A paused machine of snap_rig.h, and what is in its memory and on its disk. */
#ifndef SNAP_PAUSED_H
#define SNAP_PAUSED_H

#include "fake/fake.h"
#include "scratch.h"
#include "snap_rig.h"
#include "test.h"

static inline int rig_set_rip(struct sm_hv_vcpu *vcpu, void *arg)
{
    return sm_hv_reg_set(vcpu, SM_X86_RIP, *(uint64_t *)arg);
}

static inline void rig_fill(struct sm_vm *vm, uint64_t gpa, uint8_t byte)
{
    memset(sm_mem_ptr(sm_vm_mem(vm), gpa, RIG_PAGE), byte, RIG_PAGE);
}

static inline uint8_t rig_byte_at(struct sm_vm *vm, uint64_t gpa)
{
    uint8_t byte = 0xee;

    CHECK_EQ(sm_mem_read(sm_vm_mem(vm), gpa, &byte, 1), 0);
    return byte;
}

static inline void rig_disk_fill(struct sm_disk *disk, uint64_t at, uint8_t byte, size_t len)
{
    uint8_t buf[RIG_PAGE * 2];
    struct iovec v = { buf, len };

    memset(buf, byte, sizeof(buf));
    CHECK_EQ(sm_disk_write(disk, at, &v, 1), 0);
}

static inline uint8_t rig_disk_byte(struct sm_disk *disk, uint64_t at)
{
    uint8_t byte = 0xee;
    struct iovec v = { &byte, 1 };

    CHECK_EQ(sm_disk_read(disk, at, &v, 1), 0);
    return byte;
}

/* A base with bytes 'b' in its second and last page. */
static inline int rig_base_file(void)
{
    int fd = memfd_create("base", MFD_CLOEXEC);
    char page[RIG_PAGE];

    memset(page, 'b', sizeof(page));
    CHECK_EQ(ftruncate(fd, RIG_DISK_BYTES), 0);
    CHECK_EQ(pwrite(fd, page, RIG_PAGE, RIG_PAGE), RIG_PAGE);
    CHECK_EQ(pwrite(fd, page, RIG_PAGE, RIG_DISK_BYTES - RIG_PAGE), RIG_PAGE);
    return fd;
}

/* Nothing runs in these machines: their vCPUs wait for kicks. */
static inline void rig_stand_still(struct sm_vm *vm, unsigned cpus)
{
    struct sm_fake_step wait = { .kind = SM_FAKE_WAIT_KICK };

    for (unsigned i = 0; i < cpus; i++)
        CHECK_EQ(sm_fake_script(sm_vm_hv(vm), i, &wait, 1), 0);
}

/* A paused machine whose vCPUs stand at 0x1000 + index, for they wait there. */
static inline struct sm_vm *rig_paused(unsigned cpus, struct sm_disk **disk)
{
    int base = rig_base_file();
    struct sm_vm *vm = rig_machine(cpus, RIG_MEMORY, base, scratch_path("overlay"), disk);

    close(base);
    rig_stand_still(vm, cpus);
    for (unsigned i = 0; i < cpus; i++) {
        uint64_t rip = 0x1000 + i;

        CHECK_EQ(sm_vm_vcpu_call(vm, i, rig_set_rip, &rip), 0);
    }
    CHECK_EQ(sm_vm_start(vm), 0);
    CHECK_EQ(sm_vm_pause(vm), 0);
    return vm;
}

#endif
