/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Working sets on the fake backend: a copy over one is the snapshot, page for page, and
 * its diffs are as small; one that is damaged, or another's, is left alone.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "snap_impl.h"
#include "snap_paused.h"
#include "working_set.h"

struct chain {
    int fd[2];
    struct sm_snap *links[2];
    unsigned count;
};

static struct sm_working_range pages(uint64_t gpa, unsigned n)
{
    return (struct sm_working_range){ gpa, n * RIG_PAGE };
}

static void save(struct chain *c, struct sm_vm *vm, bool diff)
{
    struct sm_snap_how how = { .diff = diff };
    struct sm_snap_info info;
    unsigned i = c->count++;

    c->fd[i] = memfd_create("snap", MFD_CLOEXEC);
    CHECK_EQ(rig_write(vm, c->fd[i], &how, NULL, &info, NULL, 0), 0);
    CHECK_EQ(sm_snap_open(fcntl(c->fd[i], F_DUPFD_CLOEXEC, 0), &c->links[i], NULL, 0), 0);
}

static struct sm_vm *load(const struct chain *c, const struct sm_working_set *set, uint64_t *laid)
{
    struct sm_vm *vm = rig_machine(1, 0, -1, scratch_path("copy"), NULL);
    struct sm_snap_load how = { .parents = c->links, .parent_count = c->count - 1, .set = set };

    CHECK_EQ(sm_snap_load(c->links[c->count - 1], vm, &how, NULL, 0), 0);
    rig_stand_still(vm, 1);
    CHECK_EQ(sm_vm_start(vm), 0);
    CHECK_EQ(sm_vm_pause(vm), 0);
    *laid = how.set_bytes;
    return vm;
}

/* 'a' to 'd' in pages 5 to 8; a diff over it with 'C' in 7 and zeros in 8. */
static struct chain chain(void)
{
    struct chain c = { .count = 0 };
    struct sm_vm *vm = rig_paused(1, NULL);
    uint64_t laid;

    for (unsigned i = 0; i < 4; i++)
        rig_fill(vm, 0x5000 + i * RIG_PAGE, (uint8_t)('a' + i));
    rig_fill(vm, 0x100000, 'z');
    save(&c, vm, false);
    sm_vm_destroy(vm);
    vm = load(&c, NULL, &laid);
    CHECK_EQ(laid, 0);
    rig_fill(vm, 0x7000, 'C');
    rig_fill(vm, 0x8000, 0);
    save(&c, vm, true);
    sm_vm_destroy(vm);
    return c;
}

static void forget(struct chain *c)
{
    while (c->count) {
        close(c->fd[--c->count]);
        sm_snap_close(c->links[c->count]);
    }
}

/* A file of these ranges; *err: whether it could be written. */
static int write_set(const struct chain *c, const struct sm_working_range *r, unsigned n, int *err)
{
    int fd = memfd_create("set", MFD_CLOEXEC);

    *err = sm_working_set_write(c->links, c->count, r, n, fd);
    return fd;
}

static void check_copy(struct sm_vm *vm)
{
    const char *want = "abC0";

    for (unsigned i = 0; i < 4; i++)
        CHECK_EQ(rig_byte_at(vm, 0x5000 + i * RIG_PAGE), want[i] == '0' ? 0 : want[i]);
    CHECK_EQ(rig_byte_at(vm, 0x100000), 'z');
    CHECK_EQ(rig_byte_at(vm, 0x101000), 0);
}

static void a_copy_over_it_is_the_snapshot(void)
{
    struct chain c = chain(), again = { .count = 0 };
    struct sm_working_range r[] = { pages(0x6000, 3), pages(0x100000, 2) };
    struct sm_working_set *set;
    struct sm_vm *vm;
    uint64_t laid;
    unsigned own = 0;
    int err, fd = write_set(&c, r, 2, &err);

    CHECK_EQ(err, 0);
    CHECK_EQ(sm_working_set_open(fd, &set), 0);
    CHECK_EQ(sm_working_set_verify(set), 0);
    sm_working_set_prefetch(set);
    vm = load(&c, set, &laid);
    CHECK_EQ(laid, 5 * RIG_PAGE);
    check_copy(vm);
    /* What a copy writes is its own, and nothing else goes into its diff. */
    rig_fill(vm, 0x6000, 'X');
    again = c;
    again.count = 1;
    save(&again, vm, true); /* over links[1], in its place here */
    for (unsigned page = 0; page < RIG_MEMORY / RIG_PAGE; page++)
        own += sm_snap_bit(again.links[1]->area_pages[0], page);
    CHECK(own >= 1 && own <= 8);
    CHECK(sm_snap_bit(again.links[1]->area_pages[0], 6));
    sm_vm_destroy(vm);
    close(again.fd[1]);
    sm_snap_close(again.links[1]);
    vm = load(&c, set, &laid);
    check_copy(vm);
    sm_vm_destroy(vm);
    sm_working_set_close(set);
    forget(&c);
}

static void what_was_touched_is_told(void)
{
    struct chain c = chain();
    uint64_t laid;
    struct sm_vm *vm = load(&c, NULL, &laid);
    struct sm_working_range *r = calloc(SM_WORKING_SET_RANGES, sizeof(*r));
    bool at5 = false, at100 = false, far = false;
    int n;

    CHECK_EQ(rig_byte_at(vm, 0x5000), 'a');
    rig_fill(vm, 0x100000, 'Z');
    n = sm_working_set_touched(vm, r, SM_WORKING_SET_RANGES);
    CHECK(n > 0);
    for (int i = 0; i < n; i++) {
        at5 |= r[i].gpa <= 0x5000 && r[i].gpa + r[i].len_bytes > 0x5000;
        at100 |= r[i].gpa <= 0x100000 && r[i].gpa + r[i].len_bytes > 0x100000;
        far |= r[i].gpa + r[i].len_bytes > 0x180000;
    }
    CHECK(at5);
    CHECK(at100);
    CHECK(!far);
    CHECK_EQ(sm_working_set_touched(vm, r, 0), -E2BIG);
    sm_vm_destroy(vm);
    vm = rig_paused(1, NULL);
    CHECK_EQ(sm_working_set_touched(vm, r, SM_WORKING_SET_RANGES), -ESRCH);
    sm_vm_destroy(vm);
    free(r);
    forget(&c);
}

static void another_snapshots_is_left_alone(void)
{
    struct chain c = chain(), other = chain();
    struct sm_working_range r = pages(0x5000, 4);
    struct sm_working_set *set;
    struct sm_vm *vm;
    uint64_t laid;
    int err, fd = write_set(&other, &r, 1, &err);

    CHECK_EQ(err, 0);
    CHECK_EQ(sm_working_set_open(fd, &set), 0);
    vm = load(&c, set, &laid);
    CHECK_EQ(laid, 0);
    check_copy(vm);
    sm_vm_destroy(vm);
    sm_working_set_close(set);
    forget(&c);
    forget(&other);
}

static void only_ranges_of_its_memory_are_written(void)
{
    struct chain c = chain();
    struct sm_working_range bad[][2] = {
        { pages(0x6000, 1), pages(0x5000, 1) },       /* not ascending */
        { pages(0x5000, 2), pages(0x6000, 1) },       /* one in the other */
        { pages(0x5000, 1), pages(RIG_MEMORY, 1) },   /* beyond */
        { pages(0x5000, 1), pages(RIG_MEMORY - RIG_PAGE, 2) },
        { pages(0x5000, 1), { 0x6000, 100 } },        /* no whole page */
        { pages(0x5000, 1), { UINT64_MAX - 0xfff, 0x2000 } },
        { pages(0x5000, 1), { 0x7000, 0 } },
    };
    int err;

    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        close(write_set(&c, bad[i], 2, &err));
        CHECK_EQ(err, -EINVAL);
    }
    close(write_set(&c, bad[0], 0, &err));
    CHECK_EQ(err, -EINVAL);
    forget(&c);
}

static int copy_of(int from, off_t len)
{
    int fd = memfd_create("damaged", MFD_CLOEXEC);
    uint8_t *buf = malloc((size_t)len);

    CHECK_EQ(pread(from, buf, (size_t)len, 0), len);
    CHECK_EQ(pwrite(fd, buf, (size_t)len, 0), len);
    free(buf);
    return fd;
}

/* Every bit of header and ranges, every length: none opens. In its pages: verify. */
static void damage_is_noticed(void)
{
    struct chain c = chain();
    struct sm_working_range r[] = { pages(0x5000, 2), pages(0x7000, 1) };
    struct sm_working_set *set;
    uint8_t byte;
    int err, fd = write_set(&c, r, 2, &err), copy;
    const off_t described = 64 + sizeof(r), whole = 4096 + 3 * RIG_PAGE;

    CHECK_EQ(lseek(fd, 0, SEEK_END), whole);
    for (off_t bit = 0; bit < described * 8; bit++) {
        copy = copy_of(fd, whole);
        CHECK_EQ(pread(copy, &byte, 1, bit / 8), 1);
        byte ^= (uint8_t)(1 << bit % 8);
        CHECK_EQ(pwrite(copy, &byte, 1, bit / 8), 1);
        CHECK_EQ(sm_working_set_open(copy, &set), -EBADMSG);
    }
    for (off_t len = 0; len < whole; len += len < described ? 1 : 512)
        CHECK_EQ(sm_working_set_open(copy_of(fd, len), &set), -EBADMSG);
    copy = copy_of(fd, whole);
    CHECK_EQ(pwrite(copy, "!", 1, 4096 + RIG_PAGE + 17), 1);
    CHECK_EQ(sm_working_set_open(copy, &set), 0);
    CHECK_EQ(sm_working_set_verify(set), -EBADMSG);
    sm_working_set_close(set);
    close(fd);
    forget(&c);
}

int main(void)
{
    scratch_begin();
    TEST(a_copy_over_it_is_the_snapshot);
    TEST(what_was_touched_is_told);
    TEST(another_snapshots_is_left_alone);
    TEST(only_ranges_of_its_memory_are_written);
    TEST(damage_is_noticed);
    scratch_end();
    return test_report();
}
