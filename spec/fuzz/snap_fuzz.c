/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Loading snapshots. The input is a list of edits (where u16, how many u8,
 * bytes) of a real one: of its header, or, counted from there on, of its state
 * and index; with the top bit of the count set the checksums are made right
 * again at the end, so that what lies behind them is reached. Whatever loads is
 * started, paused and taken down.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "crc32c.h"
#include "fake/fake.h"
#include "snap_impl.h"
#include "snap_rig.h"

#define MEMORY (1u << 20)

static uint8_t *original; /* header, then the tail */
static size_t tail_at, tail_len;

static void make_original(void)
{
    char overlay[] = "/dev/shm/sm-fuzz-XXXXXX";
    struct sm_snap_header h;
    struct sm_fake_step wait = { .kind = SM_FAKE_WAIT_KICK };
    struct sm_vm *vm;
    int fd = mkstemp(overlay);

    close(fd);
    vm = rig_machine(1, MEMORY, -1, overlay, NULL);
    if (sm_fake_script(sm_vm_hv(vm), 0, &wait, 1) || sm_vm_start(vm) || sm_vm_pause(vm))
        abort();
    fd = rig_save(vm, "{}");
    sm_vm_destroy(vm);
    if (pread(fd, &h, sizeof(h), 0) != sizeof(h))
        abort();
    tail_at = (size_t)h.state.offset;
    tail_len = (size_t)(h.file_bytes - h.state.offset);
    original = malloc(sizeof(h) + tail_len);
    memcpy(original, &h, sizeof(h));
    if (pread(fd, original + sizeof(h), tail_len, (off_t)tail_at) != (ssize_t)tail_len)
        abort();
    close(fd);
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

static void mend_section(struct sm_snap_section *s, const uint8_t *tail)
{
    if (s->offset >= tail_at && s->offset - tail_at <= tail_len &&
        s->len_bytes <= tail_len - (s->offset - tail_at))
        s->crc = sm_crc32c(0, tail + (s->offset - tail_at), (size_t)s->len_bytes);
}

static void run(int fd)
{
    char overlay[64], why[400] = "";
    struct sm_snap_load how = { 0 };
    struct sm_snap *snap;
    struct sm_vm *vm;

    if (sm_snap_open(fd, &snap, why, sizeof(why))) {
        if (!why[0] || strchr(why, '\n'))
            abort();
        return;
    }
    snprintf(overlay, sizeof(overlay), "/dev/shm/sm-fuzz-%d", (int)getpid());
    vm = rig_machine(1, 0, -1, overlay, NULL);
    if (sm_snap_load(snap, vm, &how, why, sizeof(why))) {
        if (!why[0] || strchr(why, '\n') || sm_vm_start(vm) == 0)
            abort();
    } else if (sm_vm_start(vm) == 0) {
        sm_vm_pause(vm);
    }
    sm_snap_close(snap);
    sm_vm_destroy(vm);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    size_t room = sizeof(struct sm_snap_header);
    struct sm_snap_header *h;
    uint8_t *copy;
    int fd;

    if (!original)
        make_original();
    room += tail_len;
    copy = malloc(room);
    memcpy(copy, original, room);
    h = (struct sm_snap_header *)(void *)copy;
    if (edit(copy, room, data, size)) {
        mend_section(&h->state, copy + sizeof(*h));
        mend_section(&h->meta, copy + sizeof(*h));
        mend_section(&h->index, copy + sizeof(*h));
        h->crc = sm_crc32c(0, h, offsetof(struct sm_snap_header, crc));
    }
    fd = memfd_create("snap", MFD_CLOEXEC);
    if (ftruncate(fd, (off_t)tail_at) || pwrite(fd, copy, sizeof(*h), 0) != sizeof(*h) ||
        pwrite(fd, copy + sizeof(*h), tail_len, (off_t)tail_at) != (ssize_t)tail_len)
        abort();
    run(fd);
    free(copy);
    return 0;
}
