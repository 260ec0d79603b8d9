/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a command handler (core/cmd_*.c) works with: its checked arguments, the
 * writer for its result, and the ways to fail.
 */
#ifndef SM_CMD_CALL_H
#define SM_CMD_CALL_H

#include "cmd.h"
#include "doorbell.h"
#include "vm.h"

#define SM_CMD_MAX_ARGS 12

#define SM_CMD_FAULTY_DISKS 8 /* of which faults can be asked */

struct sm_faults;

struct sm_machine {
    struct sm_vm *vm; /* NULL: empty */
    struct sm_confinement confinement;
    bool confined;       /* confinement has been set: we live in a worker */
    unsigned event_bits; /* taken from the VM, not yet told */
    uint64_t console_lost, console_lost_told;
    unsigned disks; /* added so far, for their names */
    unsigned nets;
    struct sm_doorbell doorbells[SM_DOORBELLS];
    struct sm_faults *faults[SM_CMD_FAULTY_DISKS]; /* of blk0 …; NULL: no such disk */
    struct sm_snap_writer *writer; /* of a snapshot that is being written in steps */
    int passed_fd;  /* came with the command being run; -1: none */
};

struct sm_arg {
    bool given;
    union {
        bool b;
        double d;     /* NUMBER */
        uint64_t u;   /* INT, U64, SIZE; CHOICE: its place in the list */
        char *s;      /* STRING; freed by the dispatcher */
        struct {
            const char *p;
            size_t len;
        } bytes;
        struct sm_msg_reader value; /* ARRAY, MAP: stands at the container */
    } v;
};

struct sm_call {
    struct sm_machine *m;
    const struct sm_cmd *cmd;
    const struct sm_arg_spec *specs;
    unsigned count;
    struct sm_arg args[SM_CMD_MAX_ARGS];
    struct sm_msg_writer *out;
    struct sm_cmd_error *err;
};

/* The argument of that key; it must be in the table. */
const struct sm_arg *sm_call_arg(const struct sm_call *call, const char *key);
uint64_t sm_call_uint(const struct sm_call *call, const char *key, uint64_t absent);
bool sm_call_bool(const struct sm_call *call, const char *key, bool absent);
const char *sm_call_str(const struct sm_call *call, const char *key); /* NULL: absent */

/* Give up: the world refuses. The text is put behind "command: ". Returns code. */
__attribute__((format(printf, 3, 4))) int sm_call_fail(struct sm_call *call, int code,
                                                       const char *fmt, ...);
/* Give up: the caller's mistake. Returns -EINVAL. */
__attribute__((format(printf, 2, 3))) int sm_call_misuse(struct sm_call *call,
                                                         const char *fmt, ...);

/* Check the pairs of a map against specs and fill args (SM_CMD_MAX_ARGS of
 * them); `where` is put before keys in errors: "" or "extents[1].". */
int sm_call_parse(struct sm_call *call, struct sm_msg_reader map, const char *where,
                  const struct sm_arg_spec *specs, unsigned count, struct sm_arg *args);
void sm_call_free_args(const struct sm_arg_spec *specs, unsigned count, struct sm_arg *args);

/* Tables by noun. */
extern const struct sm_cmd_variant sm_cmd_devices[];

int sm_cmd_vm_create(struct sm_call *call);
int sm_cmd_vm_start(struct sm_call *call);
int sm_cmd_vm_pause(struct sm_call *call);
int sm_cmd_vm_resume(struct sm_call *call);
int sm_cmd_vm_kill(struct sm_call *call);
int sm_cmd_vm_state(struct sm_call *call);
int sm_cmd_vm_stats(struct sm_call *call);
int sm_cmd_kernel_load(struct sm_call *call);
int sm_cmd_memory_map(struct sm_call *call);
int sm_cmd_memory_read(struct sm_call *call);
int sm_cmd_memory_write(struct sm_call *call);
int sm_cmd_memory_regions(struct sm_call *call);
int sm_cmd_vcpu_get(struct sm_call *call);
int sm_cmd_vcpu_set(struct sm_call *call);
int sm_cmd_vcpu_enter(struct sm_call *call);
int sm_cmd_console_read(struct sm_call *call);
int sm_cmd_console_write(struct sm_call *call);
int sm_cmd_irq_set(struct sm_call *call);
int sm_cmd_memory_search(struct sm_call *call);
int sm_cmd_memory_protect(struct sm_call *call);
int sm_cmd_memory_unmap(struct sm_call *call);
int sm_cmd_memory_log(struct sm_call *call);
int sm_cmd_memory_dirty(struct sm_call *call);
int sm_cmd_bus_claim(struct sm_call *call);
int sm_cmd_bus_release(struct sm_call *call);
int sm_cmd_doorbell_add(struct sm_call *call);
int sm_cmd_doorbell_remove(struct sm_call *call);
int sm_cmd_vcpu_answer(struct sm_call *call);
int sm_cmd_vcpu_hold(struct sm_call *call);
int sm_cmd_vcpu_continue(struct sm_call *call);
int sm_cmd_vcpu_step(struct sm_call *call);
int sm_cmd_vcpu_translate(struct sm_call *call);
int sm_cmd_breakpoint_add(struct sm_call *call);
int sm_cmd_breakpoint_remove(struct sm_call *call);
int sm_cmd_fault_add(struct sm_call *call);
int sm_cmd_fault_remove(struct sm_call *call);
int sm_cmd_fault_list(struct sm_call *call);
int sm_cmd_vsock_fault(struct sm_call *call);
int sm_cmd_clock_fault(struct sm_call *call);
int sm_cmd_device_list(struct sm_call *call);
int sm_cmd_trace_set(struct sm_call *call);

/* Events of core/cmd_control.c: whether there was one. */
bool sm_cmd_put_exit(struct sm_machine *m, struct sm_msg_writer *w);
bool sm_cmd_put_doorbell(struct sm_machine *m, struct sm_msg_writer *w);
bool sm_cmd_put_trace(struct sm_machine *m, struct sm_msg_writer *w); /* cmd_fault.c */
void sm_cmd_put_devices(struct sm_machine *m, struct sm_msg_writer *w); /* a list */
int sm_cmd_snapshot_save(struct sm_call *call);
int sm_cmd_snapshot_begin(struct sm_call *call);
int sm_cmd_snapshot_copy(struct sm_call *call);
int sm_cmd_snapshot_capture(struct sm_call *call);
int sm_cmd_snapshot_finish(struct sm_call *call);
int sm_cmd_snapshot_abandon(struct sm_call *call);
int sm_cmd_snapshot_touched(struct sm_call *call);
int sm_cmd_snapshot_load(struct sm_call *call);

#endif
