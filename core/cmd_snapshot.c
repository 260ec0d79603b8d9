/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Commands that save a VM into a file and load one from it. Where a descriptor
 * came along with the command (sm_machine_pass_fd), it is the file and `path`
 * only its name in errors: a confined worker opens nothing itself.
 */
#include "cmd_call.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "snap.h"
#include "snap_base.h"
#include "working_set.h"

/* The file of this command; the caller closes it. *made: it was not there. */
static int take_file(struct sm_call *call, int flags, bool *made)
{
    const char *path = sm_call_str(call, "path");
    int fd = call->m->passed_fd;

    *made = false;
    if (fd >= 0) {
        call->m->passed_fd = -1;
        return fd;
    }
    flags |= O_CLOEXEC | O_NONBLOCK;
    if (flags & O_CREAT) {
        fd = open(path, flags | O_EXCL, 0600);
        *made = fd >= 0;
        if (*made || errno != EEXIST) {
            return fd < 0 ? -errno : fd;
        }
    }
    fd = open(path, flags & ~O_CREAT);
    return fd < 0 ? -errno : fd;
}

static int refuse(struct sm_call *call, int err, const char *why)
{
    return sm_call_fail(call, err, "%s: %s", sm_call_str(call, "path"),
                        why[0] ? why : strerror(-err));
}

static void put_id(struct sm_msg_writer *out, const char *key, const uint8_t *id)
{
    char hex[2 * SM_SNAP_ID_BYTES];

    for (unsigned i = 0; i < SM_SNAP_ID_BYTES; i++) {
        hex[2 * i] = "0123456789abcdef"[id[i] >> 4];
        hex[2 * i + 1] = "0123456789abcdef"[id[i] & 15];
    }
    sm_msg_put_str(out, key);
    sm_msg_put_strn(out, hex, sizeof(hex));
}

static void put_number(struct sm_msg_writer *out, const char *key, uint64_t value)
{
    sm_msg_put_str(out, key);
    sm_msg_put_uint(out, value);
}

static bool lies_over(const struct sm_vm *vm, const uint8_t *id)
{
    const struct sm_snap_base *base = sm_vm_base(vm);

    return base && memcmp(sm_snap_base_id(base), id, SM_SNAP_ID_BYTES) == 0;
}

/* Begin to write into the file of this command; *made: remove it on failure. */
static int begin(struct sm_call *call, const struct sm_snap_how *how, struct sm_snap_writer **out,
                 bool *made)
{
    char why[200] = "";
    int fd = take_file(call, O_RDWR | O_CREAT, made), err;

    if (fd < 0) {
        return refuse(call, fd, "");
    }
    err = sm_snap_begin(call->m->vm, fd, how, out, why, sizeof(why));
    return err ? refuse(call, err, why) : 0;
}

static int capture(struct sm_call *call, struct sm_snap_writer *w, const char *name)
{
    char why[200] = "";
    int err = sm_snap_capture(w, why, sizeof(why));

    return err ? sm_call_fail(call, err, "%s: %s", name, why) : 0;
}

static int finish(struct sm_call *call, struct sm_snap_writer *w, const char *name)
{
    const struct sm_arg *meta = sm_call_arg(call, "meta");
    struct sm_snap_info info;
    uint64_t stored = 0;
    char why[200] = "";
    int err = sm_snap_finish(w, meta->given ? meta->v.bytes.p : NULL,
                             meta->given ? meta->v.bytes.len : 0, sm_call_bool(call, "sync", true),
                             &info, &stored, why, sizeof(why));

    if (err) {
        return sm_call_fail(call, err, "%s: %s", name, why);
    }
    sm_msg_put_map(call->out, 6);
    put_id(call->out, "id", info.id);
    put_id(call->out, "parent", info.parent);
    put_number(call->out, "ram_bytes", info.ram_bytes);
    put_number(call->out, "file_bytes", info.file_bytes);
    put_number(call->out, "stored_bytes", stored);
    sm_msg_put_str(call->out, "rebased");
    sm_msg_put_bool(call->out, lies_over(call->m->vm, info.id));
    return 0;
}

int sm_cmd_snapshot_save(struct sm_call *call)
{
    struct sm_snap_how how = { .diff = sm_call_bool(call, "diff", false),
                               .rebase = sm_call_bool(call, "rebase", false) };
    const char *path = sm_call_str(call, "path");
    struct sm_snap_writer *w = NULL;
    bool made;
    int err = begin(call, &how, &w, &made);

    if (!err) {
        err = capture(call, w, path);
    }
    if (!err) {
        err = finish(call, w, path);
    }
    sm_snap_writer_close(w);
    if (err && made) {
        unlink(path);
    }
    return err;
}

/* ---- the same in steps, for a VM that goes on meanwhile ---- */

static void set_writer(struct sm_machine *m, struct sm_snap_writer *w)
{
    sm_snap_writer_close(m->writer);
    m->writer = w;
}

static int no_writer(struct sm_call *call)
{
    return sm_call_fail(call, -EINVAL, "there is none being written: snapshot.begin");
}

int sm_cmd_snapshot_begin(struct sm_call *call)
{
    struct sm_snap_how how = { .diff = sm_call_bool(call, "diff", false),
                               .rebase = sm_call_bool(call, "rebase", false),
                               .live = sm_call_bool(call, "live", false) };
    struct sm_snap_writer *w;
    bool made;
    int err = begin(call, &how, &w, &made);

    if (!err) {
        set_writer(call->m, w);
    } else if (made) {
        unlink(sm_call_str(call, "path"));
    }
    return err;
}

int sm_cmd_snapshot_copy(struct sm_call *call)
{
    char why[200] = "";
    uint64_t left;
    int err;

    if (!call->m->writer) {
        return no_writer(call);
    }
    err = sm_snap_copy(call->m->writer, sm_call_uint(call, "size", 16u << 20), &left, why,
                       sizeof(why));
    if (err) {
        return sm_call_fail(call, err, "%s", why);
    }
    sm_msg_put_uint(call->out, left);
    return 0;
}

int sm_cmd_snapshot_capture(struct sm_call *call)
{
    return call->m->writer ? capture(call, call->m->writer, "capture") : no_writer(call);
}

int sm_cmd_snapshot_finish(struct sm_call *call)
{
    int err;

    if (!call->m->writer) {
        return no_writer(call);
    }
    err = finish(call, call->m->writer, "finish");
    set_writer(call->m, NULL);
    return err;
}

int sm_cmd_snapshot_abandon(struct sm_call *call)
{
    set_writer(call->m, NULL);
    return 0;
}

/* The snapshots a diff needs; *count are open afterwards, also on failure. */
static int open_parents(struct sm_call *call, struct sm_snap **parents, unsigned *count)
{
    const struct sm_arg *list = sm_call_arg(call, "parents");
    struct sm_msg_reader r = list->v.value;
    struct sm_msg_value head, item;

    *count = 0;
    if (!list->given) {
        return 0;
    }
    sm_msg_next(&r, &head);
    if (head.u.count >= SM_SNAP_CHAIN_MAX) {
        return sm_call_misuse(call, "parents: expected at most %d", SM_SNAP_CHAIN_MAX - 1);
    }
    for (uint32_t i = 0; i < head.u.count; i++) {
        char path[4096], why[300] = "";
        int fd, err;

        sm_msg_next(&r, &item);
        if (item.type != SM_MSG_BYTES || item.u.bytes.len >= sizeof(path) ||
            memchr(item.u.bytes.p, 0, item.u.bytes.len)) {
            return sm_call_misuse(call, "parents: expected paths");
        }
        memcpy(path, item.u.bytes.p, item.u.bytes.len);
        path[item.u.bytes.len] = 0;
        fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        err = fd < 0 ? -errno : sm_snap_open(fd, &parents[i], why, sizeof(why));
        if (err) {
            return sm_call_fail(call, err, "%s: %s", path, why[0] ? why : strerror(-err));
        }
        ++*count;
    }
    return 0;
}

/* Pairs of 64 bits: an address and how many bytes from there on. */
int sm_cmd_snapshot_touched(struct sm_call *call)
{
    struct sm_working_range *ranges = calloc(SM_WORKING_SET_RANGES, sizeof(*ranges));
    int n = ranges ? sm_working_set_touched(call->m->vm, ranges, SM_WORKING_SET_RANGES) : -ENOMEM;

    if (n >= 0) {
        sm_msg_put_strn(call->out, (const char *)ranges, (size_t)n * sizeof(*ranges));
    }
    free(ranges);
    return n < 0 ? sm_call_fail(call, n, "%s", n == -ESRCH ? "it was not loaded, or read whole"
                                                           : strerror(-n))
                 : 0;
}

/* The set of this command, or NULL: a restore does without. */
static struct sm_working_set *open_set(struct sm_call *call)
{
    const char *path = sm_call_str(call, "working_set");
    struct sm_working_set *set = NULL;
    int fd = path && path[0] ? open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK) : -1;

    if (fd < 0 || sm_working_set_open(fd, &set) < 0) {
        return NULL;
    }
    sm_working_set_prefetch(set);
    return set;
}

int sm_cmd_snapshot_load(struct sm_call *call)
{
    struct sm_snap *parents[SM_SNAP_CHAIN_MAX], *snap;
    struct sm_snap_load how = {
        .eager = sm_call_bool(call, "eager", false),
        .advance = sm_call_uint(call, "clock", 0) == 1,
        .parents = parents,
    };
    struct sm_working_set *set;
    char why[400] = "";
    bool made;
    int fd = take_file(call, O_RDONLY, &made), err;

    if (fd < 0) {
        return refuse(call, fd, "");
    }
    err = sm_snap_open(fd, &snap, why, sizeof(why));
    if (err) {
        sm_vm_stop(call->m->vm, SM_STOP_KILLED, "its snapshot could not be loaded");
        return refuse(call, err, why);
    }
    set = open_set(call);
    how.set = set;
    err = open_parents(call, parents, &how.parent_count);
    if (!err) {
        err = sm_snap_load(snap, call->m->vm, &how, why, sizeof(why));
        if (err) {
            refuse(call, err, why);
        } else {
            sm_msg_put_map(call->out, 3);
            put_id(call->out, "id", sm_snap_info(snap)->id);
            put_id(call->out, "parent", sm_snap_info(snap)->parent);
            put_number(call->out, "working_set", how.set_bytes);
        }
    }
    for (unsigned i = 0; i < how.parent_count; i++) {
        sm_snap_close(parents[i]);
    }
    sm_snap_close(snap);
    sm_working_set_close(set);
    return err;
}
