/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Commands that save a VM into a file and load one from it. Where a descriptor
 * came along with the command (sm_machine_pass_fd), it is the file and `path`
 * only its name in errors: a confined worker opens nothing itself.
 */
#include "cmd_call.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "snap.h"

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

int sm_cmd_snapshot_save(struct sm_call *call)
{
    const struct sm_arg *meta = sm_call_arg(call, "meta");
    struct sm_snap_save how = { .sync = sm_call_bool(call, "sync", true) };
    struct sm_snap_info info;
    char why[200] = "";
    uint64_t stored = 0;
    bool made;
    int fd, err;

    if (meta->given) {
        how.meta = meta->v.bytes.p;
        how.meta_len = meta->v.bytes.len;
    }
    fd = take_file(call, O_RDWR | O_CREAT, &made);
    if (fd < 0) {
        return refuse(call, fd, "");
    }
    err = sm_snap_save(call->m->vm, fd, &how, &info, &stored, why, sizeof(why));
    close(fd);
    if (err) {
        if (made) {
            unlink(sm_call_str(call, "path"));
        }
        return refuse(call, err, why);
    }
    sm_msg_put_map(call->out, 4);
    put_id(call->out, "id", info.id);
    put_number(call->out, "ram_bytes", info.ram_bytes);
    put_number(call->out, "file_bytes", info.file_bytes);
    put_number(call->out, "stored_bytes", stored);
    return 0;
}

int sm_cmd_snapshot_load(struct sm_call *call)
{
    struct sm_snap_load how = {
        .eager = sm_call_bool(call, "eager", false),
        .advance = sm_call_uint(call, "clock", 0) == 1,
    };
    struct sm_snap *snap;
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
    err = sm_snap_load(snap, call->m->vm, &how, why, sizeof(why));
    if (!err) {
        sm_msg_put_map(call->out, 2);
        put_id(call->out, "id", sm_snap_info(snap)->id);
        put_id(call->out, "parent", sm_snap_info(snap)->parent);
    }
    sm_snap_close(snap);
    return err ? refuse(call, err, why) : 0;
}
