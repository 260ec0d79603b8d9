/* SPDX-License-Identifier: Apache-2.0 */
/* The command table and its dispatcher; see cmd.h. Handlers: core/cmd_*.c. */
#include "cmd_call.h"
#include "dev/fault.h"
#include "snap.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ARGS(table) .args = (table), .arg_count = sizeof(table) / sizeof((table)[0])

#define IN_CREATED SM_IN_STATE(SM_VM_CREATED)
#define IN_RUNNING SM_IN_STATE(SM_VM_RUNNING)
#define IN_PAUSED SM_IN_STATE(SM_VM_PAUSED)
#define IN_STOPPED SM_IN_STATE(SM_VM_STOPPED)

#define MAX_BYTES (1ull << 46) /* of guest memory; a mistake beyond */

static const struct sm_arg_spec vm_create_args[] = {
    { "cpus", SM_ARG_INT, .min = 1, .max = SM_MAX_VCPUS, .doc = "virtual CPUs, 1 when absent" },
    { "memory", SM_ARG_SIZE, .min = 0, .max = MAX_BYTES,
      .doc = "RAM in the platform's layout; absent or 0: none, map your own" },
};

static const struct sm_arg_spec vm_kill_args[] = {
    { "detail", SM_ARG_STRING, .max = 90, .doc = "why, for people" },
};

static const struct sm_arg_spec memory_map_args[] = {
    { "gpa", SM_ARG_U64, .required = true, .doc = "guest-physical address of the region" },
    { "size", SM_ARG_SIZE, .required = true, .min = 1, .max = MAX_BYTES,
      .doc = "bytes, whole pages" },
    { "kind", SM_ARG_CHOICE, .choices = "anon|shared|file",
      .doc = "what lies behind it; anon when absent" },
    { "path", SM_ARG_STRING, .max = 4096,
      .doc = "of a file: kind 'file' maps it privately, 'shared' so that others see each write" },
    { "offset", SM_ARG_SIZE, .max = MAX_BYTES, .doc = "into the file" },
    { "readonly", SM_ARG_BOOL, .doc = "guest writes become MMIO exits" },
    { "device", SM_ARG_BOOL, .doc = "not RAM: a window of a device" },
};

static const struct sm_arg_spec memory_read_args[] = {
    { "gpa", SM_ARG_U64, .required = true, .doc = "guest-physical address" },
    { "len", SM_ARG_INT, .required = true, .min = 1, .max = SM_CMD_MAX_DATA_BYTES,
      .doc = "how many bytes" },
};

static const struct sm_arg_spec memory_write_args[] = {
    { "gpa", SM_ARG_U64, .required = true, .doc = "guest-physical address" },
    { "data", SM_ARG_BYTES, .required = true, .max = SM_CMD_MAX_DATA_BYTES, .doc = "the bytes" },
};

static const struct sm_arg_spec memory_search_args[] = {
    { "pattern", SM_ARG_BYTES, .required = true, .max = 4096, .doc = "the bytes to look for" },
    { "gpa", SM_ARG_U64, .doc = "begin here; 0 when absent" },
    { "len", SM_ARG_SIZE, .max = MAX_BYTES, .doc = "look at so many bytes; all when absent" },
    { "max", SM_ARG_INT, .min = 1, .max = 4096, .doc = "at most so many places; 100 when absent" },
};

#define REGION { "gpa", SM_ARG_U64, .required = true, .doc = "where the region begins" }

static const struct sm_arg_spec memory_protect_args[] = {
    REGION,
    { "readonly", SM_ARG_BOOL, .required = true, .doc = "guest writes become MMIO exits" },
};

static const struct sm_arg_spec memory_region_args[] = { REGION };

static const struct sm_arg_spec memory_log_args[] = {
    REGION,
    { "on", SM_ARG_BOOL, .required = true, .doc = "whether writes are kept track of" },
};

static const struct sm_arg_spec kernel_load_args[] = {
    { "kernel", SM_ARG_STRING, .required = true, .max = 4096,
      .doc = "path of an uncompressed ELF vmlinux" },
    { "initrd", SM_ARG_STRING, .max = 4096, .doc = "path of an initial ramdisk" },
    { "cmdline", SM_ARG_STRING, .max = 2047, .doc = "the kernel's command line" },
};

static const struct sm_arg_spec vcpu_get_args[] = {
    { "vcpu", SM_ARG_INT, .max = SM_MAX_VCPUS - 1, .doc = "which; 0 when absent" },
    { "names", SM_ARG_ARRAY, .doc = "registers by name; all named ones when absent" },
};

static const struct sm_arg_spec vcpu_set_args[] = {
    { "vcpu", SM_ARG_INT, .max = SM_MAX_VCPUS - 1, .required = true, .doc = "which" },
    { "values", SM_ARG_MAP, .required = true, .doc = "register name = value" },
};

static const struct sm_arg_spec vcpu_enter_args[] = {
    { "vcpu", SM_ARG_INT, .max = SM_MAX_VCPUS - 1, .required = true, .doc = "which" },
    { "mode", SM_ARG_CHOICE, .required = true, .choices = "pvh|linux64|arm64|real16",
      .doc = "how it begins" },
    { "entry", SM_ARG_U64, .required = true, .doc = "guest-physical address to begin at" },
    { "info", SM_ARG_U64, .doc = "address of the start info (pvh), boot_params or FDT" },
};

static const struct sm_arg_spec console_read_args[] = {
    { "max", SM_ARG_INT, .min = 1, .max = SM_CMD_MAX_DATA_BYTES,
      .doc = "at most so many bytes; 65536 when absent" },
};

static const struct sm_arg_spec console_write_args[] = {
    { "data", SM_ARG_BYTES, .required = true, .max = SM_CMD_MAX_DATA_BYTES,
      .doc = "what is typed" },
};

static const struct sm_arg_spec irq_set_args[] = {
    { "gsi", SM_ARG_INT, .required = true, .max = 1023, .doc = "number of the line" },
    { "level", SM_ARG_BOOL, .doc = "high or low; absent: one pulse" },
};

#define VCPU { "vcpu", SM_ARG_INT, .max = SM_MAX_VCPUS - 1, .required = true, .doc = "which" }

static const struct sm_arg_spec vcpu_args[] = { VCPU };

static const struct sm_arg_spec vcpu_answer_args[] = {
    VCPU,
    { "value", SM_ARG_U64, .doc = "of a read; all ones when absent" },
    { "hold", SM_ARG_BOOL, .doc = "hold the vCPU behind that instruction" },
};

static const struct sm_arg_spec vcpu_translate_args[] = {
    VCPU,
    { "address", SM_ARG_U64, .required = true, .doc = "a linear (virtual) address" },
};

static const struct sm_arg_spec bus_claim_args[] = {
    { "space", SM_ARG_CHOICE, .required = true, .choices = "mmio|pio", .doc = "memory or ports" },
    { "base", SM_ARG_U64, .required = true, .doc = "first address or port" },
    { "size", SM_ARG_SIZE, .required = true, .min = 1, .max = MAX_BYTES, .doc = "how many" },
};

static const struct sm_arg_spec bus_release_args[] = {
    { "claim", SM_ARG_INT, .required = true, .max = 1023, .doc = "what bus.claim gave" },
};

static const struct sm_arg_spec doorbell_add_args[] = {
    { "gpa", SM_ARG_U64, .required = true, .doc = "the address that rings" },
    { "len", SM_ARG_INT, .min = 1, .max = 8, .doc = "only writes of so many bytes; goes with value" },
    { "value", SM_ARG_INT, .max = UINT32_MAX, .doc = "only writes of this value" },
};

static const struct sm_arg_spec doorbell_remove_args[] = {
    { "doorbell", SM_ARG_INT, .required = true, .max = 1023, .doc = "what doorbell.add gave" },
};

static const struct sm_arg_spec breakpoint_add_args[] = {
    { "address", SM_ARG_U64, .required = true, .doc = "linear (virtual) address" },
    { "kind", SM_ARG_CHOICE, .choices = "hardware|software|watch",
      .doc = "compared by the processor (the default), an instruction in memory, or on data" },
    { "len", SM_ARG_INT, .min = 1, .max = 8, .doc = "of a watch: bytes, 1 when absent" },
    { "read", SM_ARG_BOOL, .doc = "of a watch: reads count too" },
    { "vcpu", SM_ARG_INT, .max = SM_MAX_VCPUS - 1,
      .doc = "of a software one: whose page tables say where; 0 when absent" },
};

static const struct sm_arg_spec breakpoint_remove_args[] = {
    { "breakpoint", SM_ARG_INT, .required = true, .max = 1023, .doc = "what breakpoint.add gave" },
};

#define DISK { "disk", SM_ARG_INT, .max = SM_CMD_FAULTY_DISKS - 1, .required = true, \
               .doc = "number of the disk, in the order they were added" }

static const struct sm_arg_spec fault_add_args[] = {
    DISK,
    { "action", SM_ARG_CHOICE, .required = true, .choices = "fail|delay|tear|corrupt",
      .doc = "what happens to the request" },
    { "operation", SM_ARG_CHOICE, .choices = "any|read|write|flush|zero",
      .doc = "which requests; any when absent" },
    { "first", SM_ARG_U64, .doc = "first sector (512 bytes); 0 when absent" },
    { "last", SM_ARG_U64, .doc = "last sector; the end when absent" },
    { "skip", SM_ARG_U64, .doc = "let so many matching requests pass" },
    { "count", SM_ARG_INT, .min = 1, .max = UINT32_MAX, .doc = "strike so often; for ever when absent" },
    { "probability", SM_ARG_NUMBER, .doc = "of a strike, 0 to 1; 1 when absent" },
    { "seed", SM_ARG_U64, .doc = "of what is drawn; 0 when absent" },
    { "delay_ms", SM_ARG_INT, .min = 1, .max = 10000, .doc = "of a delay" },
    { "silent", SM_ARG_BOOL, .doc = "of a tear: the guest is told that all went well" },
};

static const struct sm_arg_spec fault_remove_args[] = {
    DISK,
    { "fault", SM_ARG_INT, .required = true, .max = 1023, .doc = "what fault.add gave" },
};

static const struct sm_arg_spec vsock_fault_args[] = {
    { "action", SM_ARG_CHOICE, .required = true, .choices = "reset|stall|go",
      .doc = "end streams, stop all of them, or let them go on" },
    { "port", SM_ARG_INT, .max = UINT32_MAX, .doc = "of a reset: only streams with this port" },
};

static const struct sm_arg_spec clock_fault_args[] = {
    { "action", SM_ARG_CHOICE, .required = true, .choices = "stop|go",
      .doc = "let the guest's clock stand still, or go on from there" },
};

static const struct sm_arg_spec trace_set_args[] = {
    { "exits", SM_ARG_BOOL, .doc = "what a vCPU left the guest for" },
    { "requests", SM_ARG_BOOL, .doc = "what devices were asked" },
    { "interrupts", SM_ARG_BOOL, .doc = "what devices raised" },
    { "first", SM_ARG_U64, .doc = "of exits: only from this address or port on" },
    { "last", SM_ARG_U64, .doc = "of exits: only up to this address or port" },
};

#define SNAPSHOT_HOW                                                                     \
    { "diff", SM_ARG_BOOL,                                                               \
      .doc = "only what was written since the VM was loaded (not eagerly) or rebased" }, \
    { "rebase", SM_ARG_BOOL,                                                             \
      .doc = "lay the VM's memory over the file, as a copy's is, so that the next can be a diff" }

static const struct sm_arg_spec snapshot_save_args[] = {
    { "path", SM_ARG_STRING, .required = true, .max = 4096,
      .doc = "file to make; it must not be there, or be empty" },
    { "meta", SM_ARG_BYTES, .max = 1u << 20, .doc = "what its owner wants to find in it again" },
    { "sync", SM_ARG_BOOL, .doc = "force it to the disk before returning; true when absent" },
    SNAPSHOT_HOW,
};

static const struct sm_arg_spec snapshot_begin_args[] = {
    { "path", SM_ARG_STRING, .required = true, .max = 4096,
      .doc = "file to make; it must not be there, or be empty" },
    SNAPSHOT_HOW,
    { "live", SM_ARG_BOOL, .doc = "memory is copied by snapshot.copy while the VM runs" },
};

static const struct sm_arg_spec snapshot_copy_args[] = {
    { "size", SM_ARG_SIZE, .max = MAX_BYTES, .doc = "look at so many bytes; 16M when absent" },
};

static const struct sm_arg_spec snapshot_finish_args[] = {
    { "meta", SM_ARG_BYTES, .max = 1u << 20, .doc = "what its owner wants to find in it again" },
    { "sync", SM_ARG_BOOL, .doc = "force it to the disk before returning; true when absent" },
};

static const struct sm_arg_spec snapshot_load_args[] = {
    { "path", SM_ARG_STRING, .required = true, .max = 4096, .doc = "a snapshot" },
    { "parents", SM_ARG_ARRAY, .max = 15,
      .doc = "of a diff: paths of those it needs, from the one that is none on" },
    { "eager", SM_ARG_BOOL, .doc = "read all memory now, not when the guest asks for it" },
    { "working_set", SM_ARG_STRING, .max = 4096,
      .doc = "what sm.core.working_set made of it; left alone when it is of another one, or damaged" },
    { "clock", SM_ARG_CHOICE, .choices = "freeze|advance",
      .doc = "whether the guest's clocks stand still over the gap, as when absent" },
};

static const struct sm_cmd table[] = {
    { "vm.create", NULL, "Create the VM. Part of the constructor.", ARGS(vm_create_args),
      .states = SM_IN_EMPTY, .run = sm_cmd_vm_create },
    { "vm.start", "start", "Start every vCPU.", .states = IN_CREATED, .run = sm_cmd_vm_start },
    { "vm.pause", "pause", "Hold every vCPU at an instruction boundary, and every device.",
      .states = IN_RUNNING, .run = sm_cmd_vm_pause },
    { "vm.resume", "resume", "Go on after a pause.", .states = IN_PAUSED,
      .run = sm_cmd_vm_resume },
    { "vm.kill", "kill", "Stop for good; memory and registers stay readable.",
      ARGS(vm_kill_args), .states = SM_IN_ANY, .run = sm_cmd_vm_kill },
    { "vm.state", "state", "The run state, and why it stopped: {state, reason, detail}.",
      .states = SM_IN_ANY, .run = sm_cmd_vm_state },
    { "vm.stats", "stats", "Counters of every vCPU, memory, and how the process is confined.",
      .states = SM_IN_ANY, .run = sm_cmd_vm_stats },
    { "memory.map", "map", "Put memory at a guest-physical address.", ARGS(memory_map_args),
      .states = IN_CREATED | IN_PAUSED, .run = sm_cmd_memory_map },
    { "memory.read", "read", "Bytes of guest memory.", ARGS(memory_read_args),
      .states = SM_IN_ANY, .run = sm_cmd_memory_read },
    { "memory.write", "write", "Write bytes into guest memory.", ARGS(memory_write_args),
      .states = SM_IN_ANY, .run = sm_cmd_memory_write },
    { "memory.regions", "regions", "The memory map: a list of {gpa, size, kind, readonly, device}.",
      .states = SM_IN_ANY, .run = sm_cmd_memory_regions },
    { "memory.search", "search", "Where a pattern lies in guest memory: a list of addresses.",
      ARGS(memory_search_args), .states = SM_IN_ANY, .run = sm_cmd_memory_search },
    { "memory.protect", "protect", "Make a region read-only for the guest, or writable.",
      ARGS(memory_protect_args), .states = IN_CREATED | IN_PAUSED, .run = sm_cmd_memory_protect },
    { "memory.unmap", "unmap", "Take a region away.", ARGS(memory_region_args),
      .states = IN_CREATED, .run = sm_cmd_memory_unmap }, /* later, devices point into it */
    { "memory.log", "log_dirty", "Keep track of the pages of a region that the vCPUs write.",
      ARGS(memory_log_args), .states = IN_CREATED | IN_PAUSED, .run = sm_cmd_memory_log },
    { "memory.dirty", "dirty",
      "What the vCPUs wrote in a logged region since the last call: a list of {gpa, size}. "
      "What devices and memory.write put there is not in it.",
      ARGS(memory_region_args), .states = SM_IN_ANY, .run = sm_cmd_memory_dirty },
    { "kernel.load", "load_kernel", "Load a Linux kernel and set the boot vCPU to enter it.",
      ARGS(kernel_load_args), .states = IN_CREATED, .run = sm_cmd_kernel_load },
    { "device.add", "add_device", "Add a device; its keys depend on `type`.",
      .variants = sm_cmd_devices, .states = IN_CREATED },
    { "vcpu.get", "regs", "Registers of a vCPU by name.", ARGS(vcpu_get_args),
      .states = SM_IN_ANY, .run = sm_cmd_vcpu_get },
    { "vcpu.set", "set_regs", "Set registers of a vCPU.", ARGS(vcpu_set_args),
      .states = IN_CREATED | IN_RUNNING | IN_PAUSED, .run = sm_cmd_vcpu_set },
    { "vcpu.enter", "enter", "Set a vCPU up to begin at an address in a given mode.",
      ARGS(vcpu_enter_args), .states = IN_CREATED | IN_PAUSED, .run = sm_cmd_vcpu_enter },
    { "console.read", "read_console", "What the guest printed since the last read; may be empty.",
      ARGS(console_read_args), .states = SM_IN_ANY, .run = sm_cmd_console_read },
    { "console.write", "write_console",
      "Type into the console; how many bytes it took (a console event says when to go on).",
      ARGS(console_write_args), .states = SM_IN_ANY, .run = sm_cmd_console_write },
    { "irq.set", "irq", "Drive an interrupt line.", ARGS(irq_set_args),
      .states = IN_CREATED | IN_RUNNING | IN_PAUSED, .run = sm_cmd_irq_set },
    { "vcpu.hold", "hold", "Stop one vCPU at an instruction boundary; the others go on.",
      ARGS(vcpu_args), .states = SM_IN_ANY, .run = sm_cmd_vcpu_hold },
    { "vcpu.continue", "continue", "Let a held vCPU go on.", ARGS(vcpu_args),
      .states = IN_RUNNING | IN_PAUSED, .run = sm_cmd_vcpu_continue },
    { "vcpu.step", "step",
      "Let a held vCPU execute one instruction; an exit event with reason 'step' follows.",
      ARGS(vcpu_args), .states = IN_RUNNING | IN_PAUSED, .run = sm_cmd_vcpu_step },
    { "vcpu.answer", "answer",
      "Finish the access that an exit event with reason 'mmio' or 'pio' told of.",
      ARGS(vcpu_answer_args), .states = SM_IN_ANY, .run = sm_cmd_vcpu_answer },
    { "vcpu.translate", "translate",
      "The guest-physical address behind a linear one, as this vCPU's page tables have it.",
      ARGS(vcpu_translate_args), .states = SM_IN_ANY, .run = sm_cmd_vcpu_translate },
    { "breakpoint.add", "add_breakpoint",
      "Hold any vCPU that comes to an address, or touches data; its number.",
      ARGS(breakpoint_add_args), .states = IN_CREATED | IN_RUNNING | IN_PAUSED,
      .run = sm_cmd_breakpoint_add },
    { "breakpoint.remove", "remove_breakpoint", "Take a breakpoint away.",
      ARGS(breakpoint_remove_args), .states = SM_IN_ANY, .run = sm_cmd_breakpoint_remove },
    { "fault.add", "add_fault",
      "Make requests of a disk fail, wait, tear or be corrupted; the rule's number.",
      ARGS(fault_add_args), .states = SM_IN_ANY, .run = sm_cmd_fault_add },
    { "fault.remove", "remove_fault", "Take a rule away.", ARGS(fault_remove_args),
      .states = SM_IN_ANY, .run = sm_cmd_fault_remove },
    { "fault.list", "faults",
      "The rules: a list of {disk, fault, operation, action, matched, hits}.",
      .states = SM_IN_ANY, .run = sm_cmd_fault_list },
    { "vsock.fault", "vsock_fault", "Reset or stall vsock streams; how many were reset.",
      ARGS(vsock_fault_args), .states = SM_IN_ANY, .run = sm_cmd_vsock_fault },
    { "clock.fault", "clock_fault",
      "Stop the guest's clock: it is turned back to here each 10 ms, so its time goes to and fro by as "
      "much, and its timers do not come due. "
      "It is the paravirtual clock that stops; a guest with clocksource=tsc does not notice.",
      ARGS(clock_fault_args), .states = IN_RUNNING | IN_PAUSED, .run = sm_cmd_clock_fault },
    { "device.list", "devices",
      "The virtio devices: a list of {name, gpa, gsi, requests, interrupts, status, features, queues}.",
      .states = SM_IN_ANY, .run = sm_cmd_device_list },
    { "trace.set", "trace", "Switch tracing on or off; trace events follow.",
      ARGS(trace_set_args), .states = SM_IN_ANY, .run = sm_cmd_trace_set },
    { "bus.claim", "claim",
      "Own a range of addresses: an access becomes an exit event and waits for vcpu.answer.",
      ARGS(bus_claim_args), .states = IN_CREATED | IN_PAUSED, .run = sm_cmd_bus_claim },
    { "bus.release", "release",
      "Give a claimed range up; an access that waits gets all ones.",
      ARGS(bus_release_args), .states = SM_IN_ANY, .run = sm_cmd_bus_release },
    { "doorbell.add", "add_doorbell",
      "Turn guest writes to an address into doorbell events, without an exit; its number.",
      ARGS(doorbell_add_args), .states = IN_CREATED | IN_PAUSED, .run = sm_cmd_doorbell_add },
    { "doorbell.remove", "remove_doorbell", "Take a doorbell away.",
      ARGS(doorbell_remove_args), .states = SM_IN_ANY, .run = sm_cmd_doorbell_remove },
    { "snapshot.save", "save",
      "Write the paused VM into a file: {id, parent, ram_bytes, file_bytes, stored_bytes, rebased}.",
      ARGS(snapshot_save_args), .states = IN_PAUSED, .run = sm_cmd_snapshot_save },
    { "snapshot.begin", "begin_save", "Begin to write a snapshot in steps; the VM may run.",
      ARGS(snapshot_begin_args), .states = IN_RUNNING | IN_PAUSED, .run = sm_cmd_snapshot_begin },
    { "snapshot.copy", "copy_memory",
      "Copy the next piece of memory into it; how many bytes are still to be looked at.",
      ARGS(snapshot_copy_args), .states = IN_RUNNING | IN_PAUSED, .run = sm_cmd_snapshot_copy },
    { "snapshot.capture", "capture",
      "Put into it what has changed since, or all memory, and the state of vCPUs and devices.",
      .states = IN_PAUSED, .run = sm_cmd_snapshot_capture },
    { "snapshot.finish", "finish_save",
      "Make it a snapshot: {id, parent, ram_bytes, file_bytes, stored_bytes, rebased}.",
      ARGS(snapshot_finish_args), .states = SM_IN_ANY, .run = sm_cmd_snapshot_finish },
    { "snapshot.abandon", "abandon_save", "Write no further.", .states = SM_IN_ANY,
      .run = sm_cmd_snapshot_abandon },
    { "snapshot.touched", "touched",
      "What of its memory this copy has needed since it was loaded, for sm.core.working_set.",
      .states = IN_RUNNING | IN_PAUSED, .run = sm_cmd_snapshot_touched },
    { "snapshot.load", "load",
      "Make this new VM, which has the devices but no memory, the saved one: {id, parent, working_set}.",
      ARGS(snapshot_load_args), .states = IN_CREATED, .run = sm_cmd_snapshot_load },
    { .name = NULL },
};

const struct sm_cmd *sm_cmd_table(void)
{
    return table;
}

const struct sm_cmd *sm_cmd_find(const char *name, size_t len)
{
    for (const struct sm_cmd *cmd = table; cmd->name; cmd++) {
        if (strlen(cmd->name) == len && memcmp(cmd->name, name, len) == 0) {
            return cmd;
        }
    }
    return NULL;
}

int sm_machine_create(struct sm_machine **out)
{
    *out = calloc(1, sizeof(**out));
    if (!*out) {
        return -ENOMEM;
    }
    (*out)->passed_fd = -1;
    return 0;
}

void sm_machine_destroy(struct sm_machine *m)
{
    if (!m) {
        return;
    }
    for (unsigned i = 0; i < SM_DOORBELLS; i++) {
        sm_doorbell_close(&m->doorbells[i]);
    }
    sm_snap_writer_close(m->writer);
    if (m->vm) {
        sm_vm_destroy(m->vm);
    }
    for (unsigned i = 0; i < SM_CMD_FAULTY_DISKS; i++) {
        if (m->faults[i]) {
            sm_faults_destroy(m->faults[i]);
            free(m->faults[i]);
        }
    }
    sm_machine_pass_fd(m, -1);
    free(m);
}

void sm_machine_pass_fd(struct sm_machine *m, int fd)
{
    if (m->passed_fd >= 0) {
        close(m->passed_fd);
    }
    m->passed_fd = fd;
}

struct sm_vm *sm_machine_vm(struct sm_machine *m)
{
    return m->vm;
}

void sm_machine_set_confinement(struct sm_machine *m, const struct sm_confinement *c)
{
    m->confinement = *c;
    m->confined = true;
}

/* ---- dispatch ---- */

/* A VM that stopped by itself is no mistake of the caller's. */
static int check_state(struct sm_call *call)
{
    if (!call->m->vm) {
        return call->cmd->states & SM_IN_EMPTY ? 0 : sm_call_misuse(call, "there is no VM yet");
    }
    struct sm_vm_status status;
    sm_vm_state(call->m->vm, &status);
    if (call->cmd->states & SM_IN_STATE(status.state)) {
        return 0;
    }
    if (status.state == SM_VM_STOPPED) {
        return sm_call_fail(call, -ESRCH, "the VM has stopped (%s)",
                            sm_stop_name(status.reason));
    }
    return sm_call_misuse(call, "not while the VM is %s", sm_run_state_name(status.state));
}

static int unknown_type(struct sm_call *call, const struct sm_msg_value *type)
{
    char known[128] = "";
    size_t n = 0;
    for (const struct sm_cmd_variant *v = call->cmd->variants; v->type && n < sizeof(known); v++) {
        n += (size_t)snprintf(known + n, sizeof(known) - n, "%s%s", n ? ", " : "", v->type);
    }
    if (type->type == SM_MSG_BYTES && type->u.bytes.len <= 40) {
        return sm_call_misuse(call, "type: expected one of %s, got '%.*s'", known,
                              (int)type->u.bytes.len, type->u.bytes.p);
    }
    return sm_call_misuse(call, "type: expected one of %s", known);
}

/* Which handler, with which arguments. */
static int choose(struct sm_call *call, const struct sm_msg_reader *args,
                  int (**run)(struct sm_call *))
{
    const struct sm_cmd *cmd = call->cmd;
    call->specs = cmd->args;
    call->count = cmd->arg_count;
    *run = cmd->run;
    if (!cmd->variants) {
        return 0;
    }
    struct sm_msg_reader at;
    struct sm_msg_value type = { .type = SM_MSG_NIL };
    if (sm_msg_find(args, "type", &at) == 0) {
        sm_msg_next(&at, &type);
    }
    for (const struct sm_cmd_variant *v = cmd->variants; v->type; v++) {
        if (sm_msg_is(&type, v->type)) {
            call->specs = v->args;
            call->count = v->arg_count;
            *run = v->run;
            return 0;
        }
    }
    return unknown_type(call, &type);
}

static int finish(struct sm_call *call, size_t mark, int err)
{
    struct sm_msg_writer *out = call->out;
    if (!err && out->len == mark) {
        sm_msg_put_nil(out);
    }
    if (!err && out->error) {
        err = sm_call_fail(call, out->error, "%s",
                           out->error == -ENOMEM ? "out of memory" : "the result is too large");
    }
    if (err) {
        sm_msg_writer_rewind(out, mark);
    }
    return err;
}

int sm_machine_call(struct sm_machine *m, const char *name, size_t name_len,
                    const void *args, size_t args_len, struct sm_msg_writer *out,
                    struct sm_cmd_error *err)
{
    *err = (struct sm_cmd_error){ 0 };
    const struct sm_cmd *cmd = sm_cmd_find(name, name_len);
    if (!cmd) {
        err->code = -EINVAL;
        err->misuse = true;
        snprintf(err->text, sizeof(err->text), "no command named '%.*s'",
                 name_len > 40 ? 40 : (int)name_len, name);
        return err->code;
    }
    struct sm_call call = { .m = m, .cmd = cmd, .out = out, .err = err };
    struct sm_msg_reader map;
    int (*run)(struct sm_call *);
    sm_msg_reader_init(&map, args, args_len);
    size_t mark = out->len;
    int code = choose(&call, &map, &run);
    if (!code) {
        code = sm_call_parse(&call, map, "", call.specs, call.count, call.args);
    }
    if (!code) {
        code = check_state(&call);
        if (!code) {
            code = run(&call);
        }
        sm_call_free_args(call.specs, call.count, call.args);
    }
    sm_machine_pass_fd(m, -1);
    return finish(&call, mark, code);
}
