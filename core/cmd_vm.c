/* SPDX-License-Identifier: Apache-2.0 */
/* Commands on the VM itself, its console and its interrupt lines. */
#include "cmd_call.h"

#include <errno.h>
#include <string.h>

#include "console_log.h"

static int failed(struct sm_call *call, int err)
{
    return sm_call_fail(call, err, "%s", strerror(-err));
}

int sm_cmd_vm_create(struct sm_call *call)
{
    struct sm_vm_config cfg = {
        .cpus = (unsigned)sm_call_uint(call, "cpus", 1),
        .memory_bytes = sm_call_uint(call, "memory", 0),
    };
    char why[160] = "";
    int err = sm_vm_create(&cfg, &call->m->vm, why, sizeof(why));
    if (err < 0) {
        call->m->vm = NULL;
        return sm_call_fail(call, err, "%s", why[0] ? why : strerror(-err));
    }
    return 0;
}

int sm_cmd_vm_start(struct sm_call *call)
{
    int err = sm_vm_start(call->m->vm);
    return err < 0 ? failed(call, err) : 0;
}

int sm_cmd_vm_pause(struct sm_call *call)
{
    int err = sm_vm_pause(call->m->vm);
    return err < 0 ? failed(call, err) : 0;
}

int sm_cmd_vm_resume(struct sm_call *call)
{
    int err = sm_vm_resume(call->m->vm);
    return err < 0 ? failed(call, err) : 0;
}

int sm_cmd_vm_kill(struct sm_call *call)
{
    const char *detail = sm_call_str(call, "detail");
    sm_vm_stop(call->m->vm, SM_STOP_KILLED, detail ? detail : "killed by its owner");
    return 0;
}

int sm_cmd_vm_state(struct sm_call *call)
{
    struct sm_vm_status status;
    sm_vm_state(call->m->vm, &status);
    bool stopped = status.state == SM_VM_STOPPED;
    sm_msg_put_map(call->out, stopped ? 3 : 1);
    sm_msg_put_str(call->out, "state");
    sm_msg_put_str(call->out, sm_run_state_name(status.state));
    if (stopped) {
        sm_msg_put_str(call->out, "reason");
        sm_msg_put_str(call->out, sm_stop_name(status.reason));
        sm_msg_put_str(call->out, "detail");
        sm_msg_put_str(call->out, status.detail);
    }
    return 0;
}

static void put_counter(struct sm_msg_writer *w, const char *name, uint64_t value)
{
    sm_msg_put_str(w, name);
    sm_msg_put_uint(w, value);
}

static void put_flag(struct sm_msg_writer *w, const char *name, bool value)
{
    sm_msg_put_str(w, name);
    sm_msg_put_bool(w, value);
}

static void put_confinement(struct sm_msg_writer *w, const struct sm_confinement *c)
{
    sm_msg_put_str(w, "confinement");
    sm_msg_put_map(w, 4);
    put_flag(w, "no_new_privs", c->no_new_privs);
    put_flag(w, "limits", c->limits);
    put_flag(w, "seccomp", c->seccomp);
    put_counter(w, "landlock", (uint64_t)c->landlock);
}

int sm_cmd_vm_stats(struct sm_call *call)
{
    struct sm_vm *vm = call->m->vm;
    struct sm_msg_writer *w = call->out;
    sm_msg_put_map(w, call->m->confined ? 4 : 3);
    sm_msg_put_str(w, "ram_bytes");
    sm_msg_put_uint(w, sm_mem_ram_bytes(sm_vm_mem(vm)));
    sm_msg_put_str(w, "vcpus");
    sm_msg_put_array(w, sm_vm_cpus(vm));
    for (unsigned i = 0; i < sm_vm_cpus(vm); i++) {
        struct sm_vcpu_stats stats;
        sm_vm_vcpu_stats(vm, i, &stats);
        sm_msg_put_map(w, 8);
        put_counter(w, "exits", stats.exits);
        put_counter(w, "mmio", stats.mmio);
        put_counter(w, "pio", stats.pio);
        put_counter(w, "halts", stats.halts);
        put_counter(w, "kicks", stats.kicks);
        put_counter(w, "unclaimed", stats.unclaimed);
        put_counter(w, "parked", stats.parked);
        put_counter(w, "debugs", stats.debugs);
    }
    sm_msg_put_str(w, "devices");
    sm_cmd_put_devices(call->m, w);
    if (call->m->confined) {
        put_confinement(w, &call->m->confinement);
    }
    return 0;
}

int sm_cmd_kernel_load(struct sm_call *call)
{
    const char *cmdline = sm_call_str(call, "cmdline");
    struct sm_boot_config cfg = {
        .kernel = sm_call_str(call, "kernel"),
        .initrd = sm_call_str(call, "initrd"),
        .cmdline = cmdline ? cmdline : "",
    };
    char why[200] = "";
    int err = sm_vm_load_kernel(call->m->vm, &cfg, why, sizeof(why));
    return err < 0 ? sm_call_fail(call, err, "%s", why[0] ? why : strerror(-err)) : 0;
}

/* What was dropped is told as an event, before anything later. */
int sm_cmd_console_read(struct sm_call *call)
{
    struct sm_console_log *log = sm_vm_console(call->m->vm);
    size_t max = (size_t)sm_call_uint(call, "max", SM_CONSOLE_LOG_BYTES);
    if (max > SM_CONSOLE_LOG_BYTES) {
        max = SM_CONSOLE_LOG_BYTES;
    }
    char buf[4096];
    uint64_t lost = 0;
    struct sm_msg_writer text;
    sm_msg_writer_init(&text, max);
    while (text.len < max && !text.error) {
        size_t want = max - text.len < sizeof(buf) ? max - text.len : sizeof(buf);
        uint64_t gone = 0;
        size_t n = sm_console_log_read(log, buf, want, &gone);
        lost += gone;
        sm_msg_put_raw(&text, buf, n);
        if (n < want) {
            break;
        }
    }
    if (lost) {
        call->m->console_lost += lost;
        sm_events_set(sm_vm_events(call->m->vm), SM_EVENT_CONSOLE);
    }
    sm_msg_put_strn(call->out, text.buf, text.len);
    int err = text.error;
    sm_msg_writer_free(&text);
    return err ? failed(call, err) : 0;
}

int sm_cmd_console_write(struct sm_call *call)
{
    const struct sm_arg *data = sm_call_arg(call, "data");
    size_t n = sm_console_log_input(sm_vm_console(call->m->vm), data->v.bytes.p,
                                    data->v.bytes.len);
    sm_msg_put_uint(call->out, n);
    return 0;
}

int sm_cmd_irq_set(struct sm_call *call)
{
    struct sm_hv *hv = sm_vm_hv(call->m->vm);
    uint32_t gsi = (uint32_t)sm_call_uint(call, "gsi", 0);
    int err;
    if (sm_call_arg(call, "level")->given) {
        err = sm_hv_irq_line(hv, gsi, sm_call_bool(call, "level", false));
    } else {
        err = sm_hv_irq_line(hv, gsi, true);
        if (!err) {
            err = sm_hv_irq_line(hv, gsi, false);
        }
    }
    return err < 0 ? sm_call_fail(call, err, "gsi %u: %s", gsi, strerror(-err)) : 0;
}
