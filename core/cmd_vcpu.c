/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Commands on vCPUs. Registers are read and set on the vCPU's own thread, all
 * of one command in one visit, so that they belong together.
 */
#include "cmd_call.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define MAX_REGS 128 /* of one command */

struct reg {
    uint64_t number, value;
    char name[24];
};

struct visit {
    unsigned count;
    struct reg regs[MAX_REGS];
    unsigned failed; /* the register that stopped it */
};

/* x86's, by the kernel's names in lower case (arch/x86 msr-index.h). */
static const struct {
    const char *name;
    uint32_t index;
} msr_names[] = {
    { "tsc", 0x10 },
    { "apic_base", 0x1b },
    { "mtrr_cap", 0xfe },
    { "sysenter_cs", 0x174 },
    { "sysenter_esp", 0x175 },
    { "sysenter_eip", 0x176 },
    { "misc_enable", 0x1a0 },
    { "pat", 0x277 },
    { "mtrr_def_type", 0x2ff },
    { "tsc_deadline", 0x6e0 },
    { "efer", 0xc0000080 },
    { "star", 0xc0000081 },
    { "lstar", 0xc0000082 },
    { "cstar", 0xc0000083 },
    { "sfmask", 0xc0000084 },
    { "fs_base", 0xc0000100 },
    { "gs_base", 0xc0000101 },
    { "kernel_gs_base", 0xc0000102 },
    { "tsc_aux", 0xc0000103 },
};

static int find_msr(const char *name, uint64_t *number)
{
    for (size_t i = 0; i < sizeof(msr_names) / sizeof(msr_names[0]); i++) {
        if (strcmp(msr_names[i].name, name) == 0) {
            *number = SM_REG_MSR | msr_names[i].index;
            return 0;
        }
    }
    char *end;
    unsigned long index = strtoul(name, &end, 16);
    if (end == name || *end || index > UINT32_MAX) {
        return -EINVAL;
    }
    *number = SM_REG_MSR | index;
    return 0;
}

/* "rax", "msr:lstar", or "msr:c0000080" with the index in hexadecimal. */
static int find_reg(const struct sm_msg_value *name, struct reg *reg)
{
    if (name->type != SM_MSG_BYTES || name->u.bytes.len >= sizeof(reg->name) ||
        memchr(name->u.bytes.p, 0, name->u.bytes.len)) {
        return -EINVAL;
    }
    memcpy(reg->name, name->u.bytes.p, name->u.bytes.len);
    reg->name[name->u.bytes.len] = 0;
    if (strncmp(reg->name, "msr:", 4) == 0) {
        return find_msr(reg->name + 4, &reg->number);
    }
    int64_t number = sm_hv_reg_find(reg->name);
    if (number < 0) {
        return -EINVAL;
    }
    reg->number = (uint64_t)number;
    return 0;
}

static int unknown_reg(struct sm_call *call, const char *key, const struct sm_msg_value *name)
{
    if (name->type == SM_MSG_BYTES && name->u.bytes.len <= 40) {
        return sm_call_misuse(call, "%s: no register named '%.*s'", key,
                              (int)name->u.bytes.len, name->u.bytes.p);
    }
    return sm_call_misuse(call, "%s: expected names of registers", key);
}

static int check_index(struct sm_call *call, unsigned *index)
{
    *index = (unsigned)sm_call_uint(call, "vcpu", 0);
    if (*index >= sm_vm_cpus(call->m->vm)) {
        return sm_call_misuse(call, "vcpu: expected less than %u, got %u",
                              sm_vm_cpus(call->m->vm), *index);
    }
    return 0;
}

static int visit_failed(struct sm_call *call, int err, const struct visit *visit)
{
    if (visit->failed < visit->count) {
        return sm_call_fail(call, err, "%s: %s", visit->regs[visit->failed].name,
                            strerror(-err));
    }
    return sm_call_fail(call, err, "%s", strerror(-err));
}

/* ---- get ---- */

static int read_regs(struct sm_hv_vcpu *vcpu, void *arg)
{
    struct visit *visit = arg;
    for (visit->failed = 0; visit->failed < visit->count; visit->failed++) {
        struct reg *reg = &visit->regs[visit->failed];
        int err = sm_hv_reg_get(vcpu, reg->number, &reg->value);
        if (err < 0) {
            return err;
        }
    }
    return 0;
}

static void take_all_names(struct visit *visit)
{
    for (uint64_t number = 0; number < SM_X86_END && visit->count < MAX_REGS; number++) {
        const char *name = sm_hv_reg_name(number);
        if (name) {
            struct reg *reg = &visit->regs[visit->count++];
            reg->number = number;
            strncpy(reg->name, name, sizeof(reg->name) - 1);
        }
    }
}

static int take_names(struct sm_call *call, struct sm_msg_reader r, struct visit *visit)
{
    struct sm_msg_value head, name;
    sm_msg_next(&r, &head);
    if (head.u.count > MAX_REGS) {
        return sm_call_misuse(call, "names: expected at most %d registers", MAX_REGS);
    }
    for (uint32_t i = 0; i < head.u.count; i++) {
        if (sm_msg_next(&r, &name) < 0 || find_reg(&name, &visit->regs[visit->count]) < 0) {
            return unknown_reg(call, "names", &name);
        }
        visit->count++;
    }
    return 0;
}

int sm_cmd_vcpu_get(struct sm_call *call)
{
    const struct sm_arg *names = sm_call_arg(call, "names");
    struct visit visit = { 0 };
    unsigned index;
    int err = check_index(call, &index);
    if (!err && names->given) {
        err = take_names(call, names->v.value, &visit);
    } else if (!err) {
        take_all_names(&visit);
    }
    if (err) {
        return err;
    }
    err = sm_vm_vcpu_call(call->m->vm, index, read_regs, &visit);
    if (err < 0) {
        return visit_failed(call, err, &visit);
    }
    sm_msg_put_map(call->out, visit.count);
    for (unsigned i = 0; i < visit.count; i++) {
        sm_msg_put_str(call->out, visit.regs[i].name);
        sm_msg_put_uint(call->out, visit.regs[i].value);
    }
    return 0;
}

/* ---- set ---- */

static int write_regs(struct sm_hv_vcpu *vcpu, void *arg)
{
    struct visit *visit = arg;
    for (visit->failed = 0; visit->failed < visit->count; visit->failed++) {
        const struct reg *reg = &visit->regs[visit->failed];
        int err = sm_hv_reg_set(vcpu, reg->number, reg->value);
        if (err < 0) {
            return err;
        }
    }
    return 0;
}

static int take_values(struct sm_call *call, struct sm_msg_reader r, struct visit *visit)
{
    struct sm_msg_value head, name, v;
    sm_msg_next(&r, &head);
    if (head.u.count > MAX_REGS) {
        return sm_call_misuse(call, "values: expected at most %d registers", MAX_REGS);
    }
    for (uint32_t i = 0; i < head.u.count; i++) {
        struct reg *reg = &visit->regs[visit->count];
        if (sm_msg_next(&r, &name) < 0 || find_reg(&name, reg) < 0) {
            return unknown_reg(call, "values", &name);
        }
        if (sm_msg_next(&r, &v) < 0 || (v.type != SM_MSG_INT && v.type != SM_MSG_UINT)) {
            return sm_call_misuse(call, "values.%s: expected an integer", reg->name);
        }
        reg->value = v.u.u; /* INT: its two's complement */
        visit->count++;
    }
    return 0;
}

int sm_cmd_vcpu_set(struct sm_call *call)
{
    struct visit visit = { 0 };
    unsigned index;
    int err = check_index(call, &index);
    if (!err) {
        err = take_values(call, sm_call_arg(call, "values")->v.value, &visit);
    }
    if (err) {
        return err;
    }
    err = sm_vm_vcpu_call(call->m->vm, index, write_regs, &visit);
    return err < 0 ? visit_failed(call, err, &visit) : 0;
}

/* ---- enter ---- */

struct entry {
    enum sm_entry_mode mode;
    uint64_t gpa, info;
};

static int enter(struct sm_hv_vcpu *vcpu, void *arg)
{
    const struct entry *entry = arg;
    return sm_hv_vcpu_enter(vcpu, entry->mode, entry->gpa, entry->info);
}

int sm_cmd_vcpu_enter(struct sm_call *call)
{
    struct entry entry = {
        .mode = (enum sm_entry_mode)sm_call_uint(call, "mode", 0),
        .gpa = sm_call_uint(call, "entry", 0),
        .info = sm_call_uint(call, "info", 0),
    };
    unsigned index;
    int err = check_index(call, &index);
    if (err) {
        return err;
    }
    err = sm_vm_vcpu_call(call->m->vm, index, enter, &entry);
    return err < 0 ? sm_call_fail(call, err, "%s", strerror(-err)) : 0;
}
