/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Snapshots in steps: memory copied while it changes, captured at one moment. Where
 * the kernel tells of writes (soft-dirty bits) that is used, elsewhere pages are
 * compared; this passes either way.
 */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>

#include "snap_impl.h"
#include "snap_paused.h"

/* A machine that has not been paused yet. */
static struct sm_vm *running(void)
{
    struct sm_vm *vm = rig_paused(1, NULL);

    CHECK_EQ(sm_vm_resume(vm), 0);
    return vm;
}

static struct sm_snap_writer *begin(struct sm_vm *vm, int fd, bool diff)
{
    struct sm_snap_how how = { .live = true, .diff = diff };
    struct sm_snap_writer *w = NULL;
    char why[200] = "";

    CHECK_EQ(sm_snap_begin(vm, fcntl(fd, F_DUPFD_CLOEXEC, 0), &how, &w, why, sizeof(why)), 0);
    return w;
}

static void copy_all(struct sm_snap_writer *w)
{
    uint64_t left = 1, before = UINT64_MAX;

    while (left && w) {
        CHECK_EQ(sm_snap_copy(w, 1 << 20, &left, NULL, 0), 0);
        CHECK(left < before);
        before = left;
    }
}

static void capture_and_finish(struct sm_vm *vm, struct sm_snap_writer *w)
{
    struct sm_snap_info info;
    uint64_t stored;
    char why[200] = "";

    CHECK_EQ(sm_vm_pause(vm), 0);
    CHECK_EQ(sm_snap_capture(w, why, sizeof(why)), 0);
    CHECK_EQ(sm_vm_resume(vm), 0);
    CHECK_EQ(sm_snap_finish(w, "m", 1, false, &info, &stored, why, sizeof(why)), 0);
    if (why[0])
        fprintf(stderr, "%s\n", why);
    sm_snap_writer_close(w);
}

static struct sm_vm *load(int fd)
{
    struct sm_vm *vm = rig_machine(1, 0, -1, scratch_path("copy"), NULL);
    struct sm_snap_load how = { 0 };
    struct sm_snap *snap = NULL;

    CHECK_EQ(sm_snap_open(fcntl(fd, F_DUPFD_CLOEXEC, 0), &snap, NULL, 0), 0);
    CHECK_EQ(sm_snap_verify(snap, NULL, NULL, 0), 0);
    CHECK_EQ(sm_snap_load(snap, vm, &how, NULL, 0), 0);
    sm_snap_close(snap);
    return vm;
}

static void what_changes_meanwhile_is_as_it_was_captured(void)
{
    struct sm_vm *vm = running(), *copy;
    int fd = memfd_create("snap", MFD_CLOEXEC);
    struct sm_snap_writer *w;

    rig_fill(vm, 0x5000, 'a');
    rig_fill(vm, 0x6000, 'b');
    rig_fill(vm, 0x7000, 'c');
    w = begin(vm, fd, false);
    copy_all(w);
    rig_fill(vm, 0x6000, 'B'); /* changed */
    rig_fill(vm, 0x7000, 0);   /* zero now: the file has something there */
    rig_fill(vm, 0x8000, 'D'); /* new */
    capture_and_finish(vm, w);
    rig_fill(vm, 0x5000, '!'); /* too late */
    copy = load(fd);
    CHECK_EQ(rig_byte_at(copy, 0x5000), 'a');
    CHECK_EQ(rig_byte_at(copy, 0x6000), 'B');
    CHECK_EQ(rig_byte_at(copy, 0x7000), 0);
    CHECK_EQ(rig_byte_at(copy, 0x8000), 'D');
    CHECK_EQ(rig_byte_at(vm, 0x5000), '!');
    sm_vm_destroy(copy);
    sm_vm_destroy(vm);
    close(fd);
}

/* A guest that writes all the time: every page is numbered, the numbers of one round
 * go up, and whatever round the capture falls into, no page is of an earlier one. */
struct scribbler {
    struct sm_vm *vm;
    atomic_bool stop, still, pause;
};

static void *scribble(void *arg)
{
    struct scribbler *s = arg;

    for (uint64_t round = 1; !s->stop; round++) {
        for (unsigned page = 16; page < 512 && !s->stop; page++) {
            uint64_t *p = sm_mem_ptr(sm_vm_mem(s->vm), (uint64_t)page * RIG_PAGE, RIG_PAGE);

            while (s->pause && !s->stop)
                s->still = true;
            s->still = false;
            p[page % 512] = round;
        }
    }
    return NULL;
}

static uint64_t number_at(struct sm_vm *vm, unsigned page)
{
    uint64_t n = 0;

    CHECK_EQ(sm_mem_read(sm_vm_mem(vm), (uint64_t)page * RIG_PAGE + page % 512 * 8, &n, 8), 0);
    return n;
}

static void one_moment_of_a_machine_that_writes_all_the_time(void)
{
    struct scribbler s = { .vm = running() };
    int fd = memfd_create("snap", MFD_CLOEXEC);
    struct sm_snap_writer *w;
    struct sm_vm *copy;
    pthread_t thread;

    w = begin(s.vm, fd, false);
#if defined(__SANITIZE_THREAD__) /* a guest races with us by nature, and it would say so */
    copy_all(w);
#endif
    CHECK_EQ(pthread_create(&thread, NULL, scribble, &s), 0);
#if !defined(__SANITIZE_THREAD__)
    copy_all(w);
#endif
    s.pause = true; /* the fake backend's vCPUs write nothing: this thread stands for one */
    while (!s.still)
        ;
    capture_and_finish(s.vm, w);
    copy = load(fd);
    for (unsigned page = 16; page < 512; page++)
        CHECK_EQ(number_at(copy, page), number_at(s.vm, page));
    s.stop = true;
    pthread_join(thread, NULL);
    sm_vm_destroy(copy);
    sm_vm_destroy(s.vm);
    close(fd);
}

static void a_diff_may_be_live(void)
{
    struct sm_vm *vm = running(), *copy, *again;
    int base = memfd_create("base", MFD_CLOEXEC), fd = memfd_create("diff", MFD_CLOEXEC);
    struct sm_snap *snaps[2];
    struct sm_snap_writer *w;

    rig_fill(vm, 0x5000, 'a');
    rig_fill(vm, 0x6000, 'b');
    capture_and_finish(vm, begin(vm, base, false)); /* not a byte copied before */
    sm_vm_destroy(vm);
    copy = load(base);
    rig_stand_still(copy, 1);
    CHECK_EQ(sm_vm_start(copy), 0);
    rig_fill(copy, 0x6000, 'B');
    w = begin(copy, fd, true);
    copy_all(w);
    rig_fill(copy, 0x6000, 0);
    rig_fill(copy, 0x7000, 'C');
    capture_and_finish(copy, w);
    sm_vm_destroy(copy);
    CHECK_EQ(sm_snap_open(base, &snaps[0], NULL, 0), 0);
    CHECK_EQ(sm_snap_open(fd, &snaps[1], NULL, 0), 0);
    again = rig_machine(1, 0, -1, scratch_path("copy"), NULL);
    struct sm_snap_load how = { .parents = snaps, .parent_count = 1 };
    CHECK_EQ(sm_snap_load(snaps[1], again, &how, NULL, 0), 0);
    CHECK_EQ(rig_byte_at(again, 0x5000), 'a');
    CHECK_EQ(rig_byte_at(again, 0x6000), 0);
    CHECK_EQ(rig_byte_at(again, 0x7000), 'C');
    sm_snap_close(snaps[0]);
    sm_snap_close(snaps[1]);
    sm_vm_destroy(again);
}

static void steps_are_taken_in_order(void)
{
    struct sm_vm *vm = running();
    int fd = memfd_create("snap", MFD_CLOEXEC);
    struct sm_snap_writer *w = begin(vm, fd, false);
    struct sm_snap_info info;
    struct sm_snap *snap;
    uint64_t n;
    char why[200] = "";

    CHECK_EQ(sm_snap_finish(w, NULL, 0, false, &info, &n, why, sizeof(why)), -EINVAL);
    CHECK(strstr(why, "nothing captured") != NULL);
    CHECK_EQ(sm_snap_capture(w, why, sizeof(why)), -EINVAL);
    CHECK(strstr(why, "not paused") != NULL);
    CHECK_EQ(sm_vm_pause(vm), 0);
    CHECK_EQ(sm_snap_capture(w, why, sizeof(why)), 0);
    CHECK_EQ(sm_snap_capture(w, why, sizeof(why)), -EALREADY);
    CHECK_EQ(sm_snap_copy(w, 1, &n, why, sizeof(why)), -EINVAL);
    sm_snap_writer_close(w); /* abandoned: what there is is no snapshot */
    CHECK_EQ(sm_snap_open(fd, &snap, why, sizeof(why)), -EBADMSG);
    sm_vm_destroy(vm);
}

/* What happens to the VM between two steps is noticed. */
static void another_save_in_between(void)
{
    struct sm_vm *vm = running(), *copy;
    int fd = memfd_create("a", MFD_CLOEXEC), other = memfd_create("b", MFD_CLOEXEC);
    int diff = memfd_create("c", MFD_CLOEXEC);
    struct sm_snap_how rebase = { .rebase = true };
    struct sm_snap_info info;
    struct sm_snap_writer *w;
    char why[200] = "";
    uint64_t left;

    rig_fill(vm, 0x5000, 'a');
    w = begin(vm, fd, false);
    copy_all(w);
    CHECK_EQ(sm_vm_pause(vm), 0);
    CHECK_EQ(rig_write(vm, other, &rebase, NULL, &info, why, sizeof(why)), 0);
    CHECK_EQ(sm_vm_resume(vm), 0);
    rig_fill(vm, 0x6000, 'b');
    capture_and_finish(vm, w);
    copy = load(fd);
    CHECK_EQ(rig_byte_at(copy, 0x5000), 'a');
    CHECK_EQ(rig_byte_at(copy, 0x6000), 'b');
    sm_vm_destroy(copy);

    w = begin(vm, diff, true); /* over `other` */
    CHECK_EQ(sm_vm_pause(vm), 0);
    CHECK_EQ(ftruncate(fd, 0), 0);
    CHECK_EQ(rig_write(vm, fd, &rebase, NULL, &info, why, sizeof(why)), 0);
    CHECK_EQ(sm_snap_copy(w, 1, &left, why, sizeof(why)), -ESTALE);
    CHECK_EQ(sm_snap_capture(w, why, sizeof(why)), -ESTALE);
    CHECK(strstr(why, "its parent has changed") != NULL);
    sm_snap_writer_close(w);

    w = begin(vm, memfd_create("d", MFD_CLOEXEC), false);
    struct sm_mem_desc more = { .gpa = 1ull << 32, .len_bytes = 4096, .kind = SM_MEM_ANON };
    CHECK_EQ(sm_mem_map(sm_vm_mem(vm), &more), 0);
    CHECK_EQ(sm_snap_capture(w, why, sizeof(why)), -ESTALE);
    CHECK(strstr(why, "memory map has changed") != NULL);
    sm_snap_writer_close(w);
    sm_vm_destroy(vm);
    close(fd);
    close(other);
    close(diff);
}

int main(void)
{
    scratch_begin();
    TEST(what_changes_meanwhile_is_as_it_was_captured);
    TEST(one_moment_of_a_machine_that_writes_all_the_time);
    TEST(a_diff_may_be_live);
    TEST(steps_are_taken_in_order);
    TEST(another_save_in_between);
    scratch_end();
    return test_report();
}
