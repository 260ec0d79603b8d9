/* SPDX-License-Identifier: Apache-2.0 */
/* Events of a machine as messages, in the order their owner should hear of them; see
 * cmd.h. */
#include "cmd_call.h"

#include <sys/eventfd.h>

static void put_state_event(struct sm_machine *m, struct sm_msg_writer *w)
{
    struct sm_vm_status status;
    sm_vm_state(m->vm, &status);
    bool stopped = status.state == SM_VM_STOPPED;
    sm_msg_put_map(w, stopped ? 4 : 2);
    sm_msg_put_str(w, "type");
    sm_msg_put_str(w, "state");
    sm_msg_put_str(w, "state");
    sm_msg_put_str(w, sm_run_state_name(status.state));
    if (stopped) {
        sm_msg_put_str(w, "reason");
        sm_msg_put_str(w, sm_stop_name(status.reason));
        sm_msg_put_str(w, "detail");
        sm_msg_put_str(w, status.detail);
    }
}

static void put_console_event(struct sm_msg_writer *w)
{
    sm_msg_put_map(w, 1);
    sm_msg_put_str(w, "type");
    sm_msg_put_str(w, "console");
}

static void put_lost_event(struct sm_msg_writer *w, const char *source, uint64_t count)
{
    sm_msg_put_map(w, 3);
    sm_msg_put_str(w, "type");
    sm_msg_put_str(w, "lost");
    sm_msg_put_str(w, "source");
    sm_msg_put_str(w, source);
    sm_msg_put_str(w, "count");
    sm_msg_put_uint(w, count);
}

static void put_notice_event(struct sm_msg_writer *w, const struct sm_notice *n)
{
    sm_msg_put_map(w, 5);
    sm_msg_put_str(w, "type");
    sm_msg_put_str(w, "notice");
    sm_msg_put_str(w, "source");
    sm_msg_put_str(w, n->source);
    sm_msg_put_str(w, "what");
    sm_msg_put_str(w, n->what);
    sm_msg_put_str(w, "value");
    sm_msg_put_uint(w, n->value);
    sm_msg_put_str(w, "time_ns");
    sm_msg_put_uint(w, n->time_ns);
}

/* A vCPU that waits before all else; losses before anything later; the last
 * words of a console before the end. */
static bool put_event(struct sm_machine *m, struct sm_msg_writer *w)
{
    struct sm_events *ev = sm_vm_events(m->vm);
    struct sm_notice notice;
    if (sm_cmd_put_exit(m, w)) {
        return true;
    }
    uint64_t lost = sm_events_take_lost(ev);
    if (lost) {
        put_lost_event(w, "notices", lost);
        return true;
    }
    if (m->console_lost > m->console_lost_told) {
        put_lost_event(w, "console", m->console_lost - m->console_lost_told);
        m->console_lost_told = m->console_lost;
        return true;
    }
    if (sm_events_take_notice(ev, &notice)) {
        put_notice_event(w, &notice);
        return true;
    }
    m->event_bits |= sm_events_take_bits(ev);
    if (m->event_bits & SM_EVENT_TRACE) {
        if (sm_cmd_put_trace(m, w)) {
            return true;
        }
        m->event_bits &= ~(unsigned)SM_EVENT_TRACE;
    }
    if (m->event_bits & SM_EVENT_DOORBELL) {
        if (sm_cmd_put_doorbell(m, w)) {
            return true;
        }
        m->event_bits &= ~(unsigned)SM_EVENT_DOORBELL;
    }
    if (m->event_bits & SM_EVENT_CONSOLE) {
        m->event_bits &= ~(unsigned)SM_EVENT_CONSOLE;
        put_console_event(w);
        return true;
    }
    if (m->event_bits & SM_EVENT_STATE) {
        m->event_bits &= ~(unsigned)SM_EVENT_STATE;
        put_state_event(m, w);
        return true;
    }
    return false;
}

int sm_machine_next_event(struct sm_machine *m, struct sm_msg_writer *out)
{
    if (!m->vm) {
        return 0;
    }
    size_t mark = out->len;
    bool some = put_event(m, out);
    if (!some) {
        /* Clear, then look once more: what came between the two is seen here,
         * what comes after wakes the fd anew. */
        struct sm_events *ev = sm_vm_events(m->vm);
        sm_events_clear(ev);
        some = put_event(m, out);
        if (some) {
            eventfd_write(ev->fd, 1); /* there may be more */
        }
    }
    if (some && out->error) {
        int err = out->error;
        sm_msg_writer_rewind(out, mark);
        return err;
    }
    return some;
}

int sm_machine_next_exit(struct sm_machine *m, struct sm_msg_writer *out)
{
    return m->vm && sm_cmd_put_exit(m, out);
}

int sm_machine_event_fd(const struct sm_machine *m)
{
    return m->vm ? sm_vm_events(m->vm)->fd : -1;
}
