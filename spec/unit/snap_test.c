/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Snapshots on the fake backend: round trips of memory, registers, devices and
 * disks, of copies of copies, and files that were cut off, changed or come from
 * elsewhere: each is one clear error, and no machine runs from it.
 */
#include <errno.h>
#include <sys/stat.h>

#include "crc32c.h"
#include "snap_impl.h"
#include "snap_paused.h"

#define MEMORY RIG_MEMORY
#define PAGE RIG_PAGE

/* Sanitizers look at every access, so the loops over all bytes take some. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define STRIDE 61
#else
#define STRIDE 1
#endif

static void checksums_are_the_known_ones(void)
{
    uint8_t buf[32];

    /* RFC 3720, B.4 */
    memset(buf, 0, sizeof(buf));
    CHECK_EQ(sm_crc32c(0, buf, 32), 0x8a9136aau);
    memset(buf, 0xff, sizeof(buf));
    CHECK_EQ(sm_crc32c(0, buf, 32), 0x62a8ab43u);
    for (unsigned i = 0; i < 32; i++)
        buf[i] = (uint8_t)i;
    CHECK_EQ(sm_crc32c(0, buf, 32), 0x46dd794eu);
    CHECK_EQ(sm_crc32c(sm_crc32c(0, buf, 7), buf + 7, 25), 0x46dd794eu);
    CHECK_EQ(sm_crc32c(0, "123456789", 9), 0xe3069283u);
}

static uint8_t *slurp(int fd, size_t *len)
{
    struct stat st;
    uint8_t *p;

    CHECK_EQ(fstat(fd, &st), 0);
    *len = (size_t)st.st_size;
    p = mmap(NULL, *len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(p != MAP_FAILED);
    return p;
}

/* ---- round trips ---- */

static int get_rip(struct sm_hv_vcpu *vcpu, void *arg)
{
    return sm_hv_reg_get(vcpu, SM_X86_RIP, arg);
}

/* A new machine from the file; NULL with the reason when it is refused. */
static struct sm_vm *load(int fd, unsigned cpus, bool eager, char *why, size_t len,
                          struct sm_disk **disk)
{
    struct sm_vm *vm = rig_machine(cpus, 0, -1, scratch_path("copy"), disk);
    struct sm_snap_load how = { .eager = eager };
    struct sm_snap *snap;
    int err = sm_snap_open(fcntl(fd, F_DUPFD_CLOEXEC, 0), &snap, why, len);

    rig_stand_still(vm, cpus);
    if (!err) {
        err = sm_snap_load(snap, vm, &how, why, len);
        sm_snap_close(snap);
        if (err) { /* and it can never be started */
            CHECK_EQ(sm_vm_start(vm), -EINVAL);
        }
    }
    if (!err)
        return vm;
    sm_vm_destroy(vm);
    return NULL;
}

static void round_trip(bool eager)
{
    struct sm_disk *disk, *copy_disk;
    struct sm_vm *vm = rig_paused(4, &disk), *copy;
    char why[400] = "";
    int fd;

    rig_fill(vm, 0x5000, 'm');
    rig_fill(vm, MEMORY - PAGE, 'e');
    rig_disk_fill(disk, 10 * PAGE, 'd', PAGE);
    rig_disk_fill(disk, 20 * PAGE + 512, 'p', 512); /* a part of a cluster */
    CHECK_EQ(sm_disk_zero(disk, PAGE, PAGE, true), 0); /* of the base */
    fd = rig_save(vm, "words");
    copy = load(fd, 4, eager, why, sizeof(why), &copy_disk);
    CHECK(copy != NULL);
    if (copy) {
        CHECK_EQ(rig_byte_at(copy, 0x5000), 'm');
        CHECK_EQ(rig_byte_at(copy, 0x6000), 0);
        CHECK_EQ(rig_byte_at(copy, MEMORY - 1), 'e');
        for (unsigned i = 0; i < 4; i++) {
            uint64_t rip = 0;

            CHECK_EQ(sm_vm_vcpu_call(copy, i, get_rip, &rip), 0);
            CHECK_EQ(rip, 0x1000 + i);
        }
        CHECK_EQ(rig_disk_byte(copy_disk, 10 * PAGE), 'd');
        CHECK_EQ(rig_disk_byte(copy_disk, 20 * PAGE + 600), 'p');
        CHECK_EQ(rig_disk_byte(copy_disk, 20 * PAGE), 0);
        CHECK_EQ(rig_disk_byte(copy_disk, PAGE), 0);
        CHECK_EQ(rig_disk_byte(copy_disk, RIG_DISK_BYTES - 1), 'b');
        /* what the copy writes is its own, what the source writes too */
        rig_fill(copy, 0x5000, 'c');
        rig_disk_fill(copy_disk, 10 * PAGE, 'c', 512);
        CHECK_EQ(rig_disk_byte(copy_disk, 10 * PAGE + 512), 'd');
        rig_fill(vm, 0x7000, 's');
        CHECK_EQ(rig_byte_at(copy, 0x7000), 0);
        CHECK_EQ(rig_byte_at(vm, 0x5000), 'm');
        CHECK_EQ(rig_disk_byte(disk, 10 * PAGE), 'd');
        CHECK_EQ(sm_vm_start(copy), 0);
        sm_vm_destroy(copy);
    } else {
        fprintf(stderr, "%s\n", why);
    }
    CHECK_EQ(sm_vm_resume(vm), 0);
    sm_vm_destroy(vm);
    close(fd);
}

static void a_machine_comes_back_lazily(void)
{
    round_trip(false);
}

static void a_machine_comes_back_eagerly(void)
{
    round_trip(true);
}

/* What was never touched after a lazy load is in the second snapshot too. */
static void a_copy_of_a_copy_is_whole(void)
{
    struct sm_disk *disk;
    struct sm_vm *vm = rig_paused(1, &disk), *copy, *second;
    char why[400] = "";
    int fd, again;

    rig_fill(vm, 0x5000, 'm');
    rig_fill(vm, 0x300000, 'n');
    rig_disk_fill(disk, 30 * PAGE, 'd', PAGE);
    fd = rig_save(vm, NULL);
    sm_vm_destroy(vm);
    copy = load(fd, 1, false, why, sizeof(why), NULL);
    close(fd);
    CHECK(copy != NULL);
    if (!copy)
        return;
    CHECK_EQ(sm_vm_start(copy), 0);
    CHECK_EQ(sm_vm_pause(copy), 0);
    rig_fill(copy, 0x300000, 0); /* zero again: a hole */
    rig_fill(copy, 0x400000, 'o');
    again = rig_save(copy, NULL);
    sm_vm_destroy(copy);
    second = load(again, 1, false, why, sizeof(why), &disk);
    CHECK(second != NULL);
    if (second) {
        CHECK_EQ(rig_byte_at(second, 0x5000), 'm');
        CHECK_EQ(rig_byte_at(second, 0x300000), 0);
        CHECK_EQ(rig_byte_at(second, 0x400000), 'o');
        CHECK_EQ(rig_disk_byte(disk, 30 * PAGE), 'd');
        CHECK_EQ(rig_disk_byte(disk, PAGE), 'b');
        sm_vm_destroy(second);
    }
    close(again);
}

static void untouched_memory_costs_nothing(void)
{
    struct sm_vm *vm = rig_paused(1, NULL);
    struct stat st;
    int fd = rig_save(vm, NULL);

    CHECK_EQ(fstat(fd, &st), 0);
    CHECK(st.st_size > (off_t)MEMORY);
    CHECK(st.st_blocks * 512 < 200 * 1024);
    sm_vm_destroy(vm);
    close(fd);
}

static void it_says_what_it_is(void)
{
    struct sm_vm *vm = rig_paused(2, NULL);
    int fd = rig_save(vm, "{\"a\":1}");
    struct sm_snap *snap;
    size_t len;

    CHECK_EQ(sm_snap_open(fd, &snap, NULL, 0), 0);
    CHECK_EQ(sm_snap_info(snap)->cpus, 2);
    CHECK_EQ(sm_snap_info(snap)->ram_bytes, MEMORY);
    CHECK_EQ(strcmp(sm_snap_info(snap)->fingerprint, "fake"), 0);
    CHECK(memcmp(sm_snap_meta(snap, &len), "{\"a\":1}", 7) == 0 && len == 7);
    CHECK_EQ(sm_snap_verify(snap, NULL, NULL, 0), 0);
    sm_snap_close(snap);
    sm_vm_destroy(vm);
}

/* ---- clocks ---- */

/* The saved wall clock an hour back, checksum made right. */
static void an_hour_ago(int fd)
{
    size_t len;
    uint8_t *p = slurp(fd, &len);
    struct sm_snap_header *h = (struct sm_snap_header *)(void *)p;
    uint8_t *clock = memmem(p + h->state.offset, (size_t)h->state.len_bytes, "clock\0\0\0", 8);
    uint64_t wall;

    CHECK(clock != NULL);
    memcpy(&wall, clock + 32, 8); /* name, version, length, ticks, host */
    wall -= 3600ull * 1000000000u;
    memcpy(clock + 32, &wall, 8);
    h->state.crc = sm_crc32c(0, p + h->state.offset, (size_t)h->state.len_bytes);
    h->crc = sm_crc32c(0, h, offsetof(struct sm_snap_header, crc));
    munmap(p, len);
}

static uint64_t ticks_of(struct sm_vm *vm)
{
    struct sm_clock clock = { 0 };

    CHECK_EQ(sm_hv_clock_get(sm_vm_hv(vm), &clock), 0);
    return clock.guest_ticks;
}

/* How far a copy's clock is beyond its source's at the save, in seconds. */
static uint64_t seconds_gone(bool advance)
{
    struct sm_vm *vm = rig_paused(1, NULL), *copy = rig_machine(1, 0, -1, scratch_path("copy"), NULL);
    struct sm_snap_load how = { .advance = advance };
    struct sm_snap *snap;
    uint64_t before = ticks_of(vm), gone;
    int fd = rig_save(vm, NULL);

    an_hour_ago(fd);
    CHECK_EQ(sm_snap_open(fd, &snap, NULL, 0), 0);
    CHECK_EQ(sm_snap_load(snap, copy, &how, NULL, 0), 0);
    gone = (ticks_of(copy) - before) / 1000000000u;
    sm_snap_close(snap);
    sm_vm_destroy(copy);
    sm_vm_destroy(vm);
    return gone;
}

static void clocks_stand_still_or_advance_as_asked(void)
{
    uint64_t frozen = seconds_gone(false), advanced = seconds_gone(true);

    CHECK(frozen < 600); /* this machine may be slow */
    CHECK(advanced >= 3600 && advanced < 4200);
}

/* ---- refusals ---- */

static void only_a_paused_machine_into_an_empty_file(void)
{
    struct sm_vm *vm = rig_paused(1, NULL);
    struct sm_snap_how how = { 0 };
    struct sm_snap_info info;
    char why[200] = "";
    int fd = rig_save(vm, NULL), empty = memfd_create("e", MFD_CLOEXEC);

    CHECK_EQ(rig_write(vm, fd, &how, NULL, &info, why, sizeof(why)), -EEXIST);
    CHECK_EQ(sm_vm_resume(vm), 0);
    CHECK_EQ(rig_write(vm, empty, &how, NULL, &info, why, sizeof(why)), -EINVAL);
    sm_vm_destroy(vm);
    close(fd);
    close(empty);
}

static void the_machine_has_to_fit(void)
{
    struct sm_vm *vm = rig_paused(2, NULL), *other;
    struct sm_snap_load how = { 0 };
    struct sm_snap *snap;
    char why[400] = "";
    int fd = rig_save(vm, NULL);

    CHECK(load(fd, 1, false, why, sizeof(why), NULL) == NULL);
    CHECK(strstr(why, "2 vCPUs, this machine 1") != NULL);
    /* memory of its own */
    other = rig_machine(2, MEMORY, -1, scratch_path("copy"), NULL);
    CHECK_EQ(sm_snap_open(fcntl(fd, F_DUPFD_CLOEXEC, 0), &snap, why, sizeof(why)), 0);
    CHECK_EQ(sm_snap_load(snap, other, &how, why, sizeof(why)), -EBUSY);
    sm_snap_close(snap);
    sm_vm_destroy(other);
    sm_vm_destroy(vm);
    close(fd);
}

/* ---- damage ---- */

static int try_open(int fd, char *why, size_t len)
{
    struct sm_snap *snap;
    int err = sm_snap_open(fcntl(fd, F_DUPFD_CLOEXEC, 0), &snap, why, len);

    if (!err)
        sm_snap_close(snap);
    return err;
}

/* Every bit of [from, to), one at a time. */
static unsigned flips_unnoticed(int fd, uint8_t *p, size_t from, size_t to)
{
    unsigned unnoticed = 0;
    char why[200];

    for (size_t i = from; i < to; i += STRIDE)
        for (unsigned bit = 0; bit < 8; bit++) {
            p[i] ^= (uint8_t)(1u << bit);
            why[0] = 0;
            unnoticed += try_open(fd, why, sizeof(why)) >= 0 || !why[0];
            p[i] ^= (uint8_t)(1u << bit);
        }
    return unnoticed;
}

static void every_flipped_bit_is_noticed(void)
{
    struct sm_vm *vm = rig_paused(1, NULL);
    struct sm_snap_header h;
    size_t len;
    uint8_t *p;
    int fd;

    rig_fill(vm, 0x5000, 'm');
    fd = rig_save(vm, "words of its owner");
    p = slurp(fd, &len);
    memcpy(&h, p, sizeof(h));
    CHECK_EQ(h.index.offset + h.index.len_bytes, len);
    CHECK_EQ(h.state.offset + h.state.len_bytes, h.meta.offset);
    CHECK_EQ(h.meta.offset + h.meta.len_bytes, h.index.offset);
    CHECK_EQ(flips_unnoticed(fd, p, 0, sizeof(h)), 0);
    CHECK_EQ(flips_unnoticed(fd, p, (size_t)h.state.offset, len), 0);
    CHECK_EQ(try_open(fd, NULL, 0), 0);
    munmap(p, len);
    sm_vm_destroy(vm);
    close(fd);
}

static void every_truncation_is_noticed(void)
{
    struct sm_vm *vm = rig_paused(1, NULL);
    int fd = rig_save(vm, "words"), cut = memfd_create("cut", MFD_CLOEXEC);
    unsigned unnoticed = 0;
    char why[200];
    size_t len;
    uint8_t *p = slurp(fd, &len);

    /* Byte by byte where there is something, page by page where holes are. */
    for (size_t n = 0; n < len; n += n < 8192 || len - n <= 65536 ? STRIDE : PAGE) {
        CHECK_EQ(ftruncate(cut, 0), 0);
        CHECK_EQ(ftruncate(cut, (off_t)n), 0);
        CHECK_EQ(pwrite(cut, p, n < 4096 ? n : 4096, 0), n < 4096 ? (ssize_t)n : 4096);
        why[0] = 0;
        unnoticed += try_open(cut, why, sizeof(why)) >= 0 || !why[0];
    }
    CHECK_EQ(unnoticed, 0);
    munmap(p, len);
    CHECK_EQ(ftruncate(fd, (off_t)len + 1), 0);
    CHECK_EQ(try_open(fd, NULL, 0), -EBADMSG);
    sm_vm_destroy(vm);
    close(fd);
    close(cut);
}

static void damaged_memory_is_found_by_verify(void)
{
    struct sm_disk *disk;
    struct sm_vm *vm = rig_paused(1, &disk);
    struct sm_snap_header h;
    struct sm_snap *snap;
    char why[200] = "";
    size_t len, at[3];
    uint8_t *p;
    int fd;

    rig_fill(vm, 0x5000, 'm');
    fd = rig_save(vm, NULL);
    p = slurp(fd, &len);
    memcpy(&h, p, sizeof(h));
    at[0] = SM_SNAP_ALIGN + 0x5000; /* memory that holds something */
    at[1] = SM_SNAP_ALIGN + 0x9000; /* a hole */
    at[2] = 0;                      /* the base's page on the disk */
    for (size_t i = SM_SNAP_ALIGN + MEMORY; i < h.state.offset && !at[2]; i += PAGE)
        at[2] = p[i] == 'b' ? i : 0;
    CHECK(at[2]);
    CHECK_EQ(sm_snap_open(fcntl(fd, F_DUPFD_CLOEXEC, 0), &snap, NULL, 0), 0);
    for (unsigned i = 0; i < 3; i++) {
        p[at[i]] ^= 1;
        CHECK_EQ(sm_snap_verify(snap, NULL, why, sizeof(why)), -EBADMSG);
        CHECK(strstr(why, i == 2 ? "a disk in it" : "its memory") != NULL);
        p[at[i]] ^= 1;
    }
    CHECK_EQ(sm_snap_verify(snap, NULL, NULL, 0), 0);
    sm_snap_close(snap);
    munmap(p, len);
    sm_vm_destroy(vm);
    close(fd);
}

/* The same file with one thing changed in the header, checksum made right. */
static void with_header(void (*change)(struct sm_snap_header *h), const char *words)
{
    struct sm_vm *vm = rig_paused(1, NULL), *copy;
    int fd = rig_save(vm, NULL);
    struct sm_snap_header *h;
    char why[400] = "";
    size_t len;
    uint8_t *p = slurp(fd, &len);

    h = (struct sm_snap_header *)(void *)p;
    change(h);
    h->crc = sm_crc32c(0, h, offsetof(struct sm_snap_header, crc));
    copy = load(fd, 1, false, why, sizeof(why), NULL);
    CHECK(copy == NULL);
    CHECK(strstr(why, words) != NULL);
    if (!strstr(why, words))
        fprintf(stderr, "'%s' is not about '%s'\n", why, words);
    CHECK(strchr(why, '\n') == NULL);
    munmap(p, len);
    sm_vm_destroy(vm);
    close(fd);
}

static void newer(struct sm_snap_header *h)
{
    h->version = 7;
}

static void elsewhere(struct sm_snap_header *h)
{
    strcpy(h->fingerprint, "kvm GenuineIntel family 6 model 1 stepping 1 cpuid 00000000");
}

static void of_arm(struct sm_snap_header *h)
{
    strcpy(h->arch, "aarch64");
}

static void big_pages(struct sm_snap_header *h)
{
    h->page_bytes = 16384;
}

static void state_beyond(struct sm_snap_header *h)
{
    h->state.offset = h->file_bytes + 1;
}

static void state_too_long(struct sm_snap_header *h)
{
    h->state.len_bytes = UINT64_MAX;
}

static void ram_of_another_size(struct sm_snap_header *h)
{
    h->ram_bytes += PAGE;
}

static void state_that_is_another(struct sm_snap_header *h)
{
    h->state = h->meta; /* an empty section: right checksum, wrong thing */
}

static void what_is_from_elsewhere_is_refused(void)
{
    with_header(newer, "of format 7, this sm reads up to 2");
    with_header(elsewhere, "another CPU (kvm GenuineIntel");
    with_header(of_arm, "it is of aarch64, this machine is");
    with_header(big_pages, "pages of 16384 bytes");
    with_header(state_beyond, "its state is not where it should be");
    with_header(state_too_long, "its state is not where it should be");
    with_header(ram_of_another_size, "its index makes no sense");
    with_header(state_that_is_another, "damaged state: no machine");
}

static void what_is_no_snapshot_is_refused(void)
{
    char why[200] = "";
    int fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);

    CHECK_EQ(try_open(fd, why, sizeof(why)), -EBADMSG);
    CHECK_EQ(strcmp(why, "this is no snapshot"), 0);
    close(fd);
    scratch_write("text", "hello", 5);
    fd = open(scratch_path("text"), O_RDONLY | O_CLOEXEC);
    CHECK_EQ(try_open(fd, why, sizeof(why)), -EBADMSG);
    close(fd);
}

int main(void)
{
    scratch_begin();
    TEST(checksums_are_the_known_ones);
    TEST(a_machine_comes_back_lazily);
    TEST(a_machine_comes_back_eagerly);
    TEST(a_copy_of_a_copy_is_whole);
    TEST(untouched_memory_costs_nothing);
    TEST(it_says_what_it_is);
    TEST(clocks_stand_still_or_advance_as_asked);
    TEST(only_a_paused_machine_into_an_empty_file);
    TEST(the_machine_has_to_fit);
    TEST(every_flipped_bit_is_noticed);
    TEST(every_truncation_is_noticed);
    TEST(damaged_memory_is_found_by_verify);
    TEST(what_is_from_elsewhere_is_refused);
    TEST(what_is_no_snapshot_is_refused);
    scratch_end();
    return test_report();
}
