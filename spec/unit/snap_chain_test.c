/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Diffs: what they hold, chains of them on the fake backend, and one file made of a
 * chain. A chain that is not the one a diff was made over is refused.
 */
#include <errno.h>
#include <sys/stat.h>

#include "crc32c.h"
#include "snap_base.h"
#include "snap_impl.h"
#include "snap_paused.h"

#define LINKS 4

struct files {
    int fd[LINKS];
    unsigned count;
};

static void forget(struct files *f)
{
    while (f->count)
        close(f->fd[--f->count]);
}

/* Save a paused machine as the next file. */
static void add(struct files *f, struct sm_vm *vm, bool diff, bool rebase)
{
    struct sm_snap_how how = { .diff = diff, .rebase = rebase };
    struct sm_snap_info info;
    char why[200] = "";

    f->fd[f->count] = memfd_create("snap", MFD_CLOEXEC);
    CHECK_EQ(rig_write(vm, f->fd[f->count], &how, NULL, &info, why, sizeof(why)), 0);
    if (why[0])
        fprintf(stderr, "save: %s\n", why);
    CHECK_EQ(info.diff, diff);
    f->count++;
}

static unsigned open_all(const struct files *f, struct sm_snap **snaps)
{
    for (unsigned i = 0; i < f->count; i++)
        CHECK_EQ(sm_snap_open(fcntl(f->fd[i], F_DUPFD_CLOEXEC, 0), &snaps[i], NULL, 0), 0);
    return f->count;
}

static void close_all(struct sm_snap **snaps, unsigned n)
{
    while (n)
        sm_snap_close(snaps[--n]);
}

/* A machine from the chain of these files; NULL: refused. */
static struct sm_vm *load(const struct files *f, bool eager, char *why, size_t len)
{
    struct sm_vm *vm = rig_machine(1, 0, -1, scratch_path("copy"), NULL);
    struct sm_snap *snaps[LINKS];
    unsigned n = open_all(f, snaps);
    struct sm_snap_load how = { .eager = eager, .parents = snaps, .parent_count = n - 1 };
    int err = sm_snap_load(snaps[n - 1], vm, &how, why, len);

    close_all(snaps, n);
    rig_stand_still(vm, 1);
    if (err) {
        CHECK_EQ(sm_vm_start(vm), -EINVAL);
        sm_vm_destroy(vm);
        return NULL;
    }
    CHECK_EQ(sm_vm_start(vm), 0);
    CHECK_EQ(sm_vm_pause(vm), 0);
    return vm;
}

/* A whole one with 'a' in page 5, 'b' in 6, 'c' in 7; over it a diff with 'B' in 6
 * and zeros in 7; over that one with 'D' in 8. */
static struct files chain(void)
{
    struct files f = { .count = 0 };
    struct sm_vm *vm = rig_paused(1, NULL);
    char why[200] = "";

    rig_fill(vm, 0x5000, 'a');
    rig_fill(vm, 0x6000, 'b');
    rig_fill(vm, 0x7000, 'c');
    add(&f, vm, false, false);
    sm_vm_destroy(vm);
    vm = load(&f, false, why, sizeof(why));
    rig_fill(vm, 0x6000, 'B');
    rig_fill(vm, 0x7000, 0);
    add(&f, vm, true, false);
    sm_vm_destroy(vm);
    vm = load(&f, false, why, sizeof(why));
    rig_fill(vm, 0x8000, 'D');
    add(&f, vm, true, false);
    sm_vm_destroy(vm);
    return f;
}

static void check_pages(struct sm_vm *vm, const char *want)
{
    for (unsigned i = 0; i < 4; i++)
        CHECK_EQ(rig_byte_at(vm, 0x5000 + i * RIG_PAGE), want[i] == '0' ? 0 : want[i]);
}

static void a_chain_comes_back(bool eager)
{
    struct files f = chain();
    char why[200] = "";
    struct sm_vm *vm = load(&f, eager, why, sizeof(why));

    CHECK(vm != NULL);
    if (vm) {
        check_pages(vm, "aB0D");
        sm_vm_destroy(vm);
    }
    f.count = 2; /* the one in the middle stands for itself, too */
    vm = load(&f, eager, why, sizeof(why));
    CHECK(vm != NULL);
    if (vm) {
        check_pages(vm, "aB00");
        sm_vm_destroy(vm);
    }
    f.count = 3;
    forget(&f);
}

static void a_chain_comes_back_lazily(void)
{
    a_chain_comes_back(false);
}

static void a_chain_comes_back_eagerly(void)
{
    a_chain_comes_back(true);
}

static uint64_t stored(int fd)
{
    struct stat st;

    CHECK_EQ(fstat(fd, &st), 0);
    return (uint64_t)st.st_blocks * 512;
}

static void a_diff_holds_what_was_written_and_no_more(void)
{
    struct sm_vm *vm = rig_paused(1, NULL);
    struct files f = { .count = 0 };
    struct sm_snap *snaps[LINKS];
    unsigned own = 0, n;

    for (unsigned i = 0; i < 512; i++)
        rig_fill(vm, 0x100000 + i * RIG_PAGE, (uint8_t)(i + 1));
    add(&f, vm, false, false);
    sm_vm_destroy(vm);
    vm = load(&f, false, NULL, 0);
    for (unsigned i = 0; i < 512; i++) /* reading costs nothing */
        CHECK_EQ(rig_byte_at(vm, 0x100000 + i * RIG_PAGE), (uint8_t)(i + 1));
    rig_fill(vm, 0x200000, 'w');
    rig_fill(vm, 0x300000, 'w');
    add(&f, vm, true, false);
    sm_vm_destroy(vm);
    CHECK(stored(f.fd[0]) > 512 * RIG_PAGE);
    CHECK(stored(f.fd[1]) < 100 * RIG_PAGE);
    n = open_all(&f, snaps);
    for (unsigned page = 0; page < RIG_MEMORY / RIG_PAGE; page++)
        own += sm_snap_bit(snaps[1]->area_pages[0], page);
    CHECK(own >= 2 && own <= 8); /* and what the machine itself wrote, its generation id */
    CHECK(sm_snap_bit(snaps[1]->area_pages[0], 0x200000 / RIG_PAGE));
    CHECK_EQ(sm_snap_verify(snaps[1], NULL, NULL, 0), 0);
    close_all(snaps, n);
    forget(&f);
}

/* A machine that was laid over its own snapshot goes on, and its diffs are small. */
static void a_source_goes_on_over_its_snapshot(void)
{
    struct sm_vm *vm = rig_paused(1, NULL), *copy;
    struct files f = { .count = 0 };
    char why[200] = "";

    for (unsigned i = 0; i < 512; i++)
        rig_fill(vm, 0x100000 + i * RIG_PAGE, 'x');
    rig_fill(vm, 0x5000, 'a');
    add(&f, vm, false, true);
    check_pages(vm, "a000");
    rig_fill(vm, 0x6000, 'b');
    add(&f, vm, true, true);
    check_pages(vm, "ab00");
    rig_fill(vm, 0x7000, 'c');
    add(&f, vm, true, true);
    check_pages(vm, "abc0");
    CHECK(stored(f.fd[1]) < 100 * RIG_PAGE);
    CHECK(stored(f.fd[2]) <= stored(f.fd[1])); /* nothing is stored twice */
    /* A whole one of it has everything, also what lies in files alone. */
    add(&f, vm, false, false);
    sm_vm_destroy(vm);
    f.count = 3;
    copy = load(&f, false, why, sizeof(why));
    CHECK(copy != NULL);
    if (copy) {
        check_pages(copy, "abc0");
        CHECK_EQ(rig_byte_at(copy, 0x1ff000), 'x');
        sm_vm_destroy(copy);
    }
    copy = load(&(struct files){ .fd = { f.fd[3] }, .count = 1 }, false, why, sizeof(why));
    CHECK(copy != NULL);
    if (copy) {
        check_pages(copy, "abc0");
        CHECK_EQ(rig_byte_at(copy, 0x1ff000), 'x');
        sm_vm_destroy(copy);
    }
    f.count = 4;
    forget(&f);
}

static void without_a_base_there_is_no_diff(void)
{
    struct sm_vm *vm = rig_paused(1, NULL);
    struct sm_snap_how how = { .diff = true };
    struct sm_snap_info info;
    struct files f = { .count = 0 };
    int fd = memfd_create("snap", MFD_CLOEXEC);

    CHECK_EQ(rig_write(vm, fd, &how, NULL, &info, NULL, 0), -ESRCH);
    add(&f, vm, false, false);
    sm_vm_destroy(vm);
    vm = load(&f, true, NULL, 0); /* read, so it lies over nothing */
    CHECK_EQ(rig_write(vm, fd, &how, NULL, &info, NULL, 0), -ESRCH);
    sm_vm_destroy(vm);
    close(fd);
    forget(&f);
}

static void refused(const struct files *f, int err, const char *what)
{
    struct sm_vm *vm = rig_machine(1, 0, -1, scratch_path("copy"), NULL);
    struct sm_snap *snaps[LINKS];
    unsigned n = open_all(f, snaps);
    struct sm_snap_load how = { .parents = snaps, .parent_count = n - 1 };
    char why[200] = "";

    CHECK_EQ(sm_snap_load(snaps[n - 1], vm, &how, why, sizeof(why)), err);
    if (!strstr(why, what))
        fprintf(stderr, "\"%s\"\n", why);
    CHECK(strstr(why, what) != NULL);
    CHECK_EQ(sm_vm_start(vm), -EINVAL);
    close_all(snaps, n);
    sm_vm_destroy(vm);
}

static void only_its_own_chain_will_do(void)
{
    struct files f = chain(), other = chain();

    refused(&(struct files){ .fd = { f.fd[2] }, .count = 1 }, -EINVAL, "needs its parent");
    refused(&(struct files){ .fd = { f.fd[0], f.fd[2] }, .count = 2 }, -ESTALE,
            "its parent is another");
    refused(&(struct files){ .fd = { other.fd[0], f.fd[1] }, .count = 2 }, -ESTALE,
            "its parent is another");
    refused(&(struct files){ .fd = { f.fd[1], f.fd[2] }, .count = 2 }, -ESTALE,
            "does not begin with a whole one");
    refused(&(struct files){ .fd = { f.fd[0], other.fd[0] }, .count = 2 }, -EINVAL, "has no parent");
    forget(&f);
    forget(&other);
}

/* Every bit of the pages' section counts. */
static void its_pages_are_checked(void)
{
    struct files f = chain();
    struct sm_snap *snap;
    struct sm_snap_header h;
    char why[200] = "";
    uint8_t byte;

    CHECK_EQ(pread(f.fd[1], &h, sizeof(h), 0), sizeof(h));
    for (uint64_t i = 0; i < h.pages.len_bytes; i += 7) {
        off_t at = (off_t)(h.pages.offset + i);

        CHECK_EQ(pread(f.fd[1], &byte, 1, at), 1);
        byte ^= 0x10;
        CHECK_EQ(pwrite(f.fd[1], &byte, 1, at), 1);
        CHECK_EQ(sm_snap_open(fcntl(f.fd[1], F_DUPFD_CLOEXEC, 0), &snap, why, sizeof(why)), -EBADMSG);
        CHECK(strstr(why, "pages does not match") != NULL);
        byte ^= 0x10;
        CHECK_EQ(pwrite(f.fd[1], &byte, 1, at), 1);
    }
    h.pages.len_bytes--; /* shorter than its memory, the header's checksum right */
    h.crc = sm_crc32c(0, &h, offsetof(struct sm_snap_header, crc));
    CHECK_EQ(pwrite(f.fd[1], &h, sizeof(h), 0), sizeof(h));
    CHECK_EQ(sm_snap_open(fcntl(f.fd[1], F_DUPFD_CLOEXEC, 0), &snap, why, sizeof(why)), -EBADMSG);
    CHECK(strstr(why, "its pages make no sense") != NULL);
    forget(&f);
}

/* ---- flattening ---- */

static int flatten(const struct files *f, char *why, size_t len, int *err)
{
    struct sm_snap *snaps[LINKS];
    unsigned n = open_all(f, snaps);
    int fd = memfd_create("flat", MFD_CLOEXEC);

    *err = sm_snap_flatten(snaps, n, fd, NULL, why, len);
    close_all(snaps, n);
    return fd;
}

static void one_file_stands_for_the_chain(void)
{
    struct files f = chain(), flat = { .count = 1 };
    struct sm_snap *snap, *leaf;
    char why[200] = "";
    struct sm_vm *vm;
    int err;

    flat.fd[0] = flatten(&f, why, sizeof(why), &err);
    CHECK_EQ(err, 0);
    CHECK_EQ(sm_snap_open(fcntl(flat.fd[0], F_DUPFD_CLOEXEC, 0), &snap, why, sizeof(why)), 0);
    CHECK_EQ(sm_snap_open(fcntl(f.fd[2], F_DUPFD_CLOEXEC, 0), &leaf, why, sizeof(why)), 0);
    CHECK(!snap->info.diff);
    CHECK_EQ(snap->info.version, 1);
    CHECK(memcmp(snap->info.id, leaf->info.id, SM_SNAP_ID_BYTES) == 0);
    CHECK_EQ(sm_snap_verify(snap, NULL, why, sizeof(why)), 0);
    sm_snap_close(snap);
    sm_snap_close(leaf);
    vm = load(&flat, false, why, sizeof(why));
    CHECK(vm != NULL);
    if (vm) {
        check_pages(vm, "aB0D");
        sm_vm_destroy(vm);
    }
    forget(&flat);

    /* A diff over one that was flattened finds it by its id. */
    f.count = 2;
    flat = (struct files){ .fd = { flatten(&f, why, sizeof(why), &err), f.fd[2] }, .count = 2 };
    vm = load(&flat, false, why, sizeof(why));
    CHECK(vm != NULL);
    if (vm) {
        check_pages(vm, "aB0D");
        sm_vm_destroy(vm);
    }
    f.count = 3;
    close(flat.fd[0]);
    forget(&f);
}

static void damage_does_not_go_into_the_flat_one(void)
{
    struct files f = chain();
    char why[200] = "";
    struct sm_snap *snap;
    int err, fd;

    CHECK_EQ(sm_snap_open(fcntl(f.fd[0], F_DUPFD_CLOEXEC, 0), &snap, why, sizeof(why)), 0);
    CHECK_EQ(pwrite(f.fd[0], "!", 1, (off_t)snap->areas[0].offset + 0x5000), 1);
    sm_snap_close(snap);
    fd = flatten(&f, why, sizeof(why), &err);
    CHECK_EQ(err, -EBADMSG);
    CHECK(strstr(why, "its memory does not match its checksum") != NULL);
    close(fd);
    forget(&f);
}

int main(void)
{
    scratch_begin();
    TEST(a_chain_comes_back_lazily);
    TEST(a_chain_comes_back_eagerly);
    TEST(a_diff_holds_what_was_written_and_no_more);
    TEST(a_source_goes_on_over_its_snapshot);
    TEST(without_a_base_there_is_no_diff);
    TEST(only_its_own_chain_will_do);
    TEST(its_pages_are_checked);
    TEST(one_file_stands_for_the_chain);
    TEST(damage_does_not_go_into_the_flat_one);
    scratch_end();
    return test_report();
}
