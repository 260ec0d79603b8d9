/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Loading snapshots. The first byte chooses a whole one, a diff (over the whole one), or
 * a working set (of the whole one); the rest is a list of edits (where u16, how many u8, bytes) of it: of its header, or,
 * counted from there on, of its state and index; with the top bit of the count set the
 * checksums are made right again at the end, so that what lies behind them is reached.
 * Whatever loads is started, paused and taken down; a chain that passes as one is
 * flattened, too.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "crc32c.h"
#include "fake/fake.h"
#include "snap_impl.h"
#include "snap_rig.h"
#include "working_set.h"

#define MEMORY (1u << 20)

/* A real one: header, then the tail. */
struct original {
    uint8_t *bytes;
    size_t tail_at, tail_len;
    int fd;
};
static struct original whole, diff;
static uint8_t set[4096]; /* header and ranges of a real working set, and so is its file */
static int set_fd;

static struct original take(int fd)
{
    struct original o = { .fd = fd };
    struct sm_snap_header h;

    if (pread(fd, &h, sizeof(h), 0) != sizeof(h))
        abort();
    o.tail_at = (size_t)h.state.offset;
    o.tail_len = (size_t)(h.file_bytes - h.state.offset);
    o.bytes = malloc(sizeof(h) + o.tail_len);
    memcpy(o.bytes, &h, sizeof(h));
    if (pread(fd, o.bytes + sizeof(h), o.tail_len, (off_t)o.tail_at) != (ssize_t)o.tail_len)
        abort();
    return o;
}

static void make_set(void)
{
    static const struct sm_working_range ranges[] = { { 0x4000, 0x3000 }, { 0x10000, 0x1000 } };
    struct sm_snap *snap;

    set_fd = memfd_create("set", MFD_CLOEXEC);
    if (sm_snap_open(fcntl(whole.fd, F_DUPFD_CLOEXEC, 0), &snap, NULL, 0) ||
        sm_working_set_write(&snap, 1, ranges, 2, set_fd) ||
        pread(set_fd, set, sizeof(set), 0) != sizeof(set))
        abort();
    sm_snap_close(snap);
}

static void make_originals(void)
{
    char overlay[] = "/dev/shm/sm-fuzz-XXXXXX";
    struct sm_fake_step wait = { .kind = SM_FAKE_WAIT_KICK };
    struct sm_snap_how first = { .rebase = true }, second = { .diff = true };
    struct sm_snap_info info;
    struct sm_vm *vm;
    int fd = mkstemp(overlay), fds[2];

    close(fd);
    vm = rig_machine(1, MEMORY, -1, overlay, NULL);
    if (sm_fake_script(sm_vm_hv(vm), 0, &wait, 1) || sm_vm_start(vm) || sm_vm_pause(vm))
        abort();
    fds[0] = memfd_create("whole", MFD_CLOEXEC);
    fds[1] = memfd_create("diff", MFD_CLOEXEC);
    if (rig_write(vm, fds[0], &first, "{}", &info, NULL, 0))
        abort();
    memset(sm_mem_ptr(sm_vm_mem(vm), 0x5000, 8192), 'd', 8192);
    if (rig_write(vm, fds[1], &second, "{}", &info, NULL, 0))
        abort();
    sm_vm_destroy(vm);
    whole = take(fds[0]);
    diff = take(fds[1]);
    make_set();
}

/* Apply the edits; whether checksums are to be right. */
static int edit(uint8_t *copy, size_t room, const uint8_t *data, size_t size)
{
    int mend = 0;

    while (size >= 3) {
        size_t at = (size_t)data[0] | (size_t)data[1] << 8, n = data[2] & 127;

        mend |= data[2] >> 7;
        data += 3;
        size -= 3;
        for (; n && size; n--, size--)
            copy[at++ % room] = *data++;
    }
    return mend;
}

static void mend_section(const struct original *o, struct sm_snap_section *s, const uint8_t *tail)
{
    if (s->offset >= o->tail_at && s->offset - o->tail_at <= o->tail_len &&
        s->len_bytes <= o->tail_len - (s->offset - o->tail_at))
        s->crc = sm_crc32c(0, tail + (s->offset - o->tail_at), (size_t)s->len_bytes);
}

/* Where working_set.c has its checksums. */
static void mend_set(uint8_t *copy)
{
    uint32_t count, crc;

    memcpy(&count, copy + 12, sizeof(count));
    crc = sm_crc32c(0, copy + 64, count <= 252 ? count * 16 : 0);
    memcpy(copy + 40, &crc, sizeof(crc));
    crc = sm_crc32c(0, copy, 60);
    memcpy(copy + 60, &crc, sizeof(crc));
}

/* Whatever it says, what is loaded with it can be read to its end. */
static void run_set(const uint8_t *data, size_t size)
{
    struct sm_snap_load how = { 0 };
    struct sm_working_set *open;
    uint8_t copy[sizeof(set)], page[4096];
    char overlay[64];
    struct sm_snap *snap;
    struct sm_vm *vm;

    memcpy(copy, set, sizeof(set));
    if (edit(copy, sizeof(copy), data, size))
        mend_set(copy);
    if (pwrite(set_fd, copy, sizeof(copy), 0) != sizeof(copy))
        abort();
    if (sm_working_set_open(fcntl(set_fd, F_DUPFD_CLOEXEC, 0), &open))
        return;
    sm_working_set_verify(open);
    snprintf(overlay, sizeof(overlay), "/dev/shm/sm-fuzz-%d", (int)getpid());
    vm = rig_machine(1, 0, -1, overlay, NULL);
    how.set = open;
    if (sm_snap_open(fcntl(whole.fd, F_DUPFD_CLOEXEC, 0), &snap, NULL, 0) ||
        sm_snap_load(snap, vm, &how, NULL, 0))
        abort();
    for (uint64_t at = 0; at < MEMORY; at += sizeof(page))
        if (sm_mem_read(sm_vm_mem(vm), at, page, sizeof(page)))
            abort();
    sm_working_set_close(open);
    sm_snap_close(snap);
    sm_vm_destroy(vm);
}

static void flatten(struct sm_snap *parent, struct sm_snap *snap)
{
    struct sm_snap *links[2] = { parent, snap }, *flat;
    char why[400] = "";
    int fd = memfd_create("flat", MFD_CLOEXEC);

    if (sm_snap_flatten(links, 2, fd, NULL, why, sizeof(why))) {
        if (!why[0] || strchr(why, '\n'))
            abort();
        close(fd);
        return;
    }
    if (sm_snap_open(fd, &flat, why, sizeof(why)) || sm_snap_verify(flat, NULL, why, sizeof(why)))
        abort();
    sm_snap_close(flat);
}

static void run(int fd, bool with_parent)
{
    char overlay[64], why[400] = "";
    struct sm_snap *snap, *parent;
    struct sm_snap_load how = { .parents = &parent, .parent_count = with_parent };
    struct sm_vm *vm;

    if (sm_snap_open(fd, &snap, why, sizeof(why))) {
        if (!why[0] || strchr(why, '\n'))
            abort();
        return;
    }
    if (sm_snap_open(fcntl(whole.fd, F_DUPFD_CLOEXEC, 0), &parent, NULL, 0))
        abort();
    snprintf(overlay, sizeof(overlay), "/dev/shm/sm-fuzz-%d", (int)getpid());
    vm = rig_machine(1, 0, -1, overlay, NULL);
    if (sm_snap_load(snap, vm, &how, why, sizeof(why))) {
        if (!why[0] || strchr(why, '\n') || sm_vm_start(vm) == 0)
            abort();
    } else if (sm_vm_start(vm) == 0) {
        sm_vm_pause(vm);
    }
    if (with_parent)
        flatten(parent, snap);
    sm_snap_close(parent);
    sm_snap_close(snap);
    sm_vm_destroy(vm);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const struct original *o;
    size_t room = sizeof(struct sm_snap_header);
    struct sm_snap_header *h;
    uint8_t *copy;
    int fd;

    if (!size)
        return 0;
    if (!whole.bytes)
        make_originals();
    if (data[0] & 2) {
        run_set(data + 1, size - 1);
        return 0;
    }
    o = data[0] & 1 ? &diff : &whole;
    room += o->tail_len;
    copy = malloc(room);
    memcpy(copy, o->bytes, room);
    h = (struct sm_snap_header *)(void *)copy;
    if (edit(copy, room, data + 1, size - 1)) {
        mend_section(o, &h->state, copy + sizeof(*h));
        mend_section(o, &h->meta, copy + sizeof(*h));
        mend_section(o, &h->index, copy + sizeof(*h));
        mend_section(o, &h->pages, copy + sizeof(*h));
        h->crc = sm_crc32c(0, h, offsetof(struct sm_snap_header, crc));
    }
    fd = memfd_create("snap", MFD_CLOEXEC);
    if (ftruncate(fd, (off_t)o->tail_at) || pwrite(fd, copy, sizeof(*h), 0) != sizeof(*h) ||
        pwrite(fd, copy + sizeof(*h), o->tail_len, (off_t)o->tail_at) != (ssize_t)o->tail_len)
        abort();
    run(fd, o == &diff);
    free(copy);
    return 0;
}
