/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The block backend against a model in memory: extents, copy-on-write, holes,
 * durability of a named overlay across crashes at any point of its log, locks,
 * limits and errors.
 */
#include <errno.h>
#include <sys/stat.h>

#include "dev/disk.h"
#include "scratch.h"
#include "state.h"
#include "test.h"

#define BASE_BYTES (96 * 1024 + 1024) /* not a multiple of a cluster */
#define SIZE_BYTES (128 * 1024)

static uint8_t model[SIZE_BYTES];
static unsigned seed;

static unsigned rnd(unsigned below)
{
    seed = seed * 1103515245 + 12345;
    return (seed >> 8) % below;
}

/* A base of three files and a gap, whose content is the model's. */
static struct sm_disk_extent extents[4];
static unsigned make_base(void)
{
    static const struct {
        const char *name;
        uint32_t skip, len;
    } parts[4] = {
        { "a", 512, 20000 }, { NULL, 0, 9000 }, { "b", 0, 40008 }, { "c", 7, 30320 }
    };
    uint32_t at = 0;

    memset(model, 0, sizeof(model));
    for (unsigned i = 0; i < 4; i++) {
        uint8_t *file = calloc(1, parts[i].skip + parts[i].len);

        extents[i] = (struct sm_disk_extent){ .fd = -1,
                                              .offset = parts[i].skip,
                                              .length_bytes = parts[i].len };
        if (parts[i].name) {
            for (uint32_t k = 0; k < parts[i].len; k++)
                file[parts[i].skip + k] = model[at + k] = (uint8_t)rnd(256);
            scratch_write(parts[i].name, file, parts[i].skip + parts[i].len);
            extents[i].path = strdup(scratch_path(parts[i].name));
        }
        free(file);
        at += parts[i].len;
    }
    CHECK_EQ(at, BASE_BYTES);
    return 4;
}

static void free_base(void)
{
    for (unsigned i = 0; i < 4; i++)
        free((char *)extents[i].path);
}

static struct sm_disk *open_disk(enum sm_disk_mode mode, bool ephemeral)
{
    struct sm_disk_config cfg = {
        .mode = mode,
        .extents = extents,
        .extent_count = 4,
        .size_bytes = SIZE_BYTES,
        .overlay = mode == SM_DISK_OVERLAY ? scratch_path("delta") : NULL,
        .ephemeral = ephemeral,
        .base_id = "sha256:base",
    };
    struct sm_disk *disk = NULL;
    char err[256] = "";
    int r = sm_disk_open(&cfg, &disk, err, sizeof(err));

    if (r)
        fprintf(stderr, "open: %s\n", err);
    CHECK_EQ(r, 0);
    return disk;
}

/* Cut a buffer into up to five iovecs at odd places. */
static unsigned slice(uint8_t *buf, size_t len, struct iovec *iov)
{
    unsigned n = 0;

    while (len && n < 4) {
        size_t part = 1 + rnd((unsigned)len);

        iov[n++] = (struct iovec){ buf, part };
        buf += part;
        len -= part;
    }
    if (len)
        iov[n++] = (struct iovec){ buf, len };
    return n;
}

static int read_at(struct sm_disk *disk, uint64_t at, uint8_t *buf, size_t len)
{
    struct iovec iov[5];
    unsigned n = slice(buf, len, iov);

    return sm_disk_read(disk, at, iov, n);
}

static int write_at(struct sm_disk *disk, uint64_t at, uint8_t *buf, size_t len)
{
    struct iovec iov[5];
    unsigned n = slice(buf, len, iov);

    return sm_disk_write(disk, at, iov, n);
}

static bool same(struct sm_disk *disk, const uint8_t *want)
{
    static uint8_t got[SIZE_BYTES];

    memset(got, 0xaa, sizeof(got));
    return read_at(disk, 0, got, sizeof(got)) == 0 && !memcmp(got, want, sizeof(got));
}

/* One random operation on disk and model. */
static void step(struct sm_disk *disk)
{
    uint32_t at = rnd(SIZE_BYTES / 512) * 512;
    uint32_t most = SIZE_BYTES - at < 24 * 1024 ? SIZE_BYTES - at : 24 * 1024;
    uint32_t len = (1 + rnd(most / 512)) * 512;
    static uint8_t buf[24 * 1024];

    switch (rnd(8)) {
    case 0:
        CHECK_EQ(sm_disk_zero(disk, at, len, rnd(2)), 0);
        memset(model + at, 0, len);
        break;
    case 1:
    case 2:
    case 3:
    case 4:
        for (uint32_t i = 0; i < len; i++)
            buf[i] = (uint8_t)rnd(256);
        CHECK_EQ(write_at(disk, at, buf, len), 0);
        memcpy(model + at, buf, len);
        break;
    case 5:
        CHECK_EQ(sm_disk_flush(disk), 0);
        break;
    default:
        CHECK_EQ(read_at(disk, at, buf, len), 0);
        CHECK(!memcmp(buf, model + at, len));
    }
}

static void test_read_only(void)
{
    struct sm_disk *disk;
    uint8_t buf[512] = { 0 };

    make_base();
    disk = open_disk(SM_DISK_READ_ONLY, false);
    CHECK_EQ(sm_disk_size_bytes(disk), SIZE_BYTES);
    CHECK(sm_disk_read_only(disk));
    CHECK(same(disk, model));
    CHECK_EQ(write_at(disk, 0, buf, 512), -EROFS);
    CHECK_EQ(sm_disk_zero(disk, 0, 512, true), -EROFS);
    CHECK_EQ(sm_disk_flush(disk), 0);
    CHECK_EQ(sm_disk_close(disk), 0);
    free_base();
}

static void test_overlay_is_the_model(void)
{
    make_base();
    for (unsigned round = 0; round < 20; round++) {
        struct sm_disk *disk = open_disk(SM_DISK_OVERLAY, false);

        for (unsigned i = 0; i < 60; i++)
            step(disk);
        CHECK(same(disk, model));
        CHECK_EQ(sm_disk_close(disk), 0);
    }
    /* the base is what it was */
    struct sm_disk *disk = open_disk(SM_DISK_READ_ONLY, false);
    CHECK(!same(disk, model));
    sm_disk_close(disk);
    free_base();
}

static void test_ephemeral_leaves_nothing(void)
{
    struct sm_disk *disk;
    unsigned files;

    make_base();
    files = scratch_count();
    disk = open_disk(SM_DISK_OVERLAY, true);
    CHECK_EQ(scratch_count(), files);
    for (unsigned i = 0; i < 500; i++)
        step(disk);
    CHECK(same(disk, model));
    CHECK_EQ(sm_disk_close(disk), 0);
    CHECK_EQ(scratch_count(), files);
    free_base();
}

static void test_direct(void)
{
    struct sm_disk_extent e = { .fd = -1 };
    struct sm_disk_config cfg = { .mode = SM_DISK_DIRECT,
                                  .extents = &e,
                                  .extent_count = 1 };
    struct sm_disk *disk, *second;
    struct stat st;

    memset(model, 0x5a, sizeof(model));
    scratch_write("direct", model, sizeof(model));
    e.path = strdup(scratch_path("direct"));
    CHECK_EQ(sm_disk_open(&cfg, &disk, NULL, 0), 0);
    CHECK_EQ(sm_disk_open(&cfg, &second, NULL, 0), -EBUSY);
    for (unsigned i = 0; i < 500; i++)
        step(disk);
    CHECK(same(disk, model));
    CHECK_EQ(sm_disk_close(disk), 0);
    CHECK_EQ(sm_disk_open(&cfg, &disk, NULL, 0), 0);
    CHECK(same(disk, model));
    sm_disk_close(disk);
    CHECK(!stat(e.path, &st) && st.st_size == SIZE_BYTES);
    free((char *)e.path);
}

static void copy_file(const char *from, const char *to, long cut)
{
    FILE *f = fopen(scratch_path(from), "rb");
    uint8_t *buf = malloc(1 << 20);
    size_t n = f ? fread(buf, 1, 1 << 20, f) : 0;

    if (f)
        fclose(f);
    if (cut >= 0 && (size_t)cut < n)
        n = (size_t)cut;
    scratch_write(to, buf, n);
    free(buf);
}

static long file_size(const char *name)
{
    struct stat st;

    return stat(scratch_path(name), &st) ? -1 : (long)st.st_size;
}

/* What was flushed is there after a crash, wherever the log was torn in the
 * batch that followed. */
static void test_crash_keeps_what_was_flushed(void)
{
    static uint8_t flushed[SIZE_BYTES], buf[4096];
    struct sm_disk *disk;
    long before, after;

    make_base();
    disk = open_disk(SM_DISK_OVERLAY, false);
    for (unsigned i = 0; i < 6; i++) {
        memset(buf, (int)i + 1, sizeof(buf));
        CHECK_EQ(write_at(disk, i * 8192, buf, sizeof(buf)), 0);
        memcpy(model + i * 8192, buf, sizeof(buf));
        CHECK_EQ(sm_disk_flush(disk), 0);
    }
    memcpy(flushed, model, sizeof(model));
    before = file_size("delta.map");
    /* clusters the flush did not cover, and then a flush that is torn */
    for (unsigned i = 0; i < 3; i++) {
        memset(buf, 0xee, sizeof(buf));
        CHECK_EQ(write_at(disk, 65536 + i * 8192, buf, sizeof(buf)), 0);
    }
    CHECK_EQ(sm_disk_flush(disk), 0);
    after = file_size("delta.map");
    CHECK_EQ(after - before, 3 * 24);
    copy_file("delta", "saved", -1);
    copy_file("delta.map", "saved.map", -1);
    CHECK_EQ(sm_disk_close(disk), 0);

    for (long cut = before; cut < after; cut++) {
        unsigned whole = (unsigned)(cut - before) / 24;

        copy_file("saved", "delta", -1);
        copy_file("saved.map", "delta.map", cut);
        disk = open_disk(SM_DISK_OVERLAY, false);
        memcpy(model, flushed, sizeof(model));
        for (unsigned i = 0; i < whole; i++)
            memset(model + 65536 + i * 8192, 0xee, 4096);
        CHECK(same(disk, model));
        /* and it goes on from there */
        memset(buf, 0x77, sizeof(buf));
        CHECK_EQ(write_at(disk, 100 * 1024, buf, 512), 0);
        memset(model + 100 * 1024, 0x77, 512);
        CHECK_EQ(sm_disk_close(disk), 0);
        disk = open_disk(SM_DISK_OVERLAY, false);
        CHECK(same(disk, model));
        CHECK_EQ(sm_disk_close(disk), 0);
    }
    free_base();
}

static void flip(const char *name, long at)
{
    int fd = open(scratch_path(name), O_RDWR);
    uint8_t b;

    if (fd < 0 || pread(fd, &b, 1, at) != 1)
        abort();
    b ^= 0x10;
    if (pwrite(fd, &b, 1, at) != 1)
        abort();
    close(fd);
}

static int try_open(const char *overlay, uint64_t size, const char *base_id,
                    bool ephemeral)
{
    struct sm_disk_config cfg = {
        .mode = SM_DISK_OVERLAY,
        .extents = extents,
        .extent_count = 4,
        .size_bytes = size,
        .overlay = overlay,
        .base_id = base_id,
        .ephemeral = ephemeral,
    };
    struct sm_disk *disk;
    char err[256] = "";
    int r = sm_disk_open(&cfg, &disk, err, sizeof(err));

    if (!r)
        sm_disk_close(disk);
    else
        CHECK(err[0] && !strchr(err, '\n'));
    return r;
}

static void test_damage_is_refused(void)
{
    uint8_t buf[512] = { 1 };
    struct sm_disk *disk;
    long header = 160, end;

    make_base();
    disk = open_disk(SM_DISK_OVERLAY, false);
    for (unsigned i = 0; i < 10; i++) {
        CHECK_EQ(write_at(disk, i * 8192, buf, 512), 0);
        CHECK_EQ(sm_disk_flush(disk), 0);
    }
    CHECK_EQ(sm_disk_close(disk), 0);
    end = file_size("delta.map");
    CHECK_EQ(end, header + 10 * 24);
    for (long at = 0; at < end; at++) {
        int r;

        flip("delta.map", at);
        r = try_open(scratch_path("delta"), SIZE_BYTES, "sha256:base", false);
        /* A spoilt record is damage when later batches prove that it had been
         * durable; the last two might be a torn flush. */
        if (at < header + 8 * 24)
            CHECK_EQ(r, -EBADMSG);
        else
            break; /* opening rewrote the log */
        flip("delta.map", at);
    }
    unlink(scratch_path("delta.map"));
    CHECK_EQ(try_open(scratch_path("delta"), SIZE_BYTES, "sha256:base", false), -ENOENT);
    free_base();
}

static void test_wrong_use_is_refused(void)
{
    struct sm_disk *disk;

    make_base();
    disk = open_disk(SM_DISK_OVERLAY, false);
    CHECK_EQ(try_open(scratch_path("delta"), SIZE_BYTES, "sha256:base", false), -EBUSY);
    CHECK_EQ(sm_disk_close(disk), 0);
    CHECK_EQ(try_open(scratch_path("delta"), SIZE_BYTES, "sha256:base", false), 0);
    CHECK_EQ(try_open(scratch_path("delta"), SIZE_BYTES, "sha256:other", false), -ESTALE);
    CHECK_EQ(try_open(scratch_path("delta"), SIZE_BYTES, NULL, false), -ESTALE);
    CHECK_EQ(try_open(scratch_path("delta"), SIZE_BYTES + 4096, "sha256:base", false),
             -ESTALE);
    CHECK_EQ(try_open(scratch_path("delta"), SIZE_BYTES, "sha256:base", true), -EEXIST);
    CHECK_EQ(try_open(scratch_path("none/delta"), SIZE_BYTES, NULL, false), -ENOENT);
    CHECK_EQ(try_open(scratch_dir, SIZE_BYTES, NULL, false), -EISDIR);
    CHECK_EQ(try_open(NULL, SIZE_BYTES, NULL, false), -EINVAL);
    CHECK_EQ(try_open(scratch_path("odd"), 1000, NULL, false), -EINVAL);
    CHECK_EQ(try_open(scratch_path("huge"), (1ull << 46) + 512, NULL, false), -EINVAL);
    extents[0].length_bytes = 20001; /* longer than the file */
    CHECK_EQ(try_open(scratch_path("long"), SIZE_BYTES, NULL, false), -ERANGE);
    extents[0].length_bytes = UINT64_MAX;
    CHECK_EQ(try_open(scratch_path("long"), SIZE_BYTES, NULL, false), -ERANGE);
    extents[0].length_bytes = 20000;
    extents[0].offset = UINT64_MAX - 10;
    CHECK_EQ(try_open(scratch_path("long"), SIZE_BYTES, NULL, false), -ERANGE);
    extents[0].offset = 512;
    extents[1].length_bytes = 1ull << 60;
    CHECK_EQ(try_open(scratch_path("long"), SIZE_BYTES, NULL, false), -EFBIG);
    extents[1].length_bytes = 0;
    CHECK_EQ(try_open(scratch_path("long"), SIZE_BYTES, NULL, false), -EINVAL);
    CHECK(access(scratch_path("odd"), F_OK) && access(scratch_path("huge"), F_OK) &&
          access(scratch_path("long"), F_OK)); /* nothing half-made */
    free_base();
}

static void test_ranges_are_checked(void)
{
    static const struct {
        uint64_t at, len;
    } bad[] = {
        { SIZE_BYTES, 1 },         { SIZE_BYTES - 511, 512 }, { UINT64_MAX, 1 },
        { UINT64_MAX - 511, 512 }, { 1ull << 63, 512 },       { 0, SIZE_BYTES + 1 },
    };
    static uint8_t buf[SIZE_BYTES + 512];
    struct sm_disk *disk;

    make_base();
    disk = open_disk(SM_DISK_OVERLAY, true);
    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        CHECK_EQ(read_at(disk, bad[i].at, buf, bad[i].len), -EINVAL);
        CHECK_EQ(write_at(disk, bad[i].at, buf, bad[i].len), -EINVAL);
        CHECK_EQ(sm_disk_zero(disk, bad[i].at, bad[i].len, true), -EINVAL);
    }
    CHECK_EQ(sm_disk_zero(disk, 0, UINT64_MAX, true), -EINVAL);
    CHECK_EQ(sm_disk_zero(disk, 4096, UINT64_MAX - 4095, true), -EINVAL);
    CHECK_EQ(read_at(disk, SIZE_BYTES, buf, 0), 0);
    CHECK_EQ(sm_disk_zero(disk, SIZE_BYTES, 0, true), 0);
    CHECK(same(disk, model));
    sm_disk_close(disk);
    free_base();
}

/* A base cut off behind our back is an error, not zeros. */
static void test_truncated_base(void)
{
    uint8_t buf[8192];
    struct sm_disk *disk;

    make_base();
    disk = open_disk(SM_DISK_READ_ONLY, false);
    CHECK_EQ(truncate(extents[2].path, 100), 0);
    CHECK_EQ(read_at(disk, 29000, buf, 50), 0);
    CHECK_EQ(read_at(disk, 29000, buf, 4096), -EIO);
    CHECK_EQ(read_at(disk, 0, buf, 4096), 0);
    sm_disk_close(disk);
    free_base();
}

static int fault_op = -1, fault_code;
static int fault(void *arg, enum sm_disk_op op, uint64_t offset, uint64_t len)
{
    (void)arg;
    (void)offset;
    (void)len;
    return (int)op == fault_op ? fault_code : 0;
}

static void test_faults_reach_the_caller(void)
{
    uint8_t buf[512] = { 0 };
    struct sm_disk *disk;

    make_base();
    disk = open_disk(SM_DISK_OVERLAY, false);
    sm_disk_set_fault(disk, fault, NULL);
    fault_code = -ENOSPC;
    fault_op = SM_DISK_OP_WRITE;
    CHECK_EQ(write_at(disk, 0, buf, 512), -ENOSPC);
    CHECK(same(disk, model));
    fault_op = SM_DISK_OP_ZERO;
    CHECK_EQ(sm_disk_zero(disk, 0, 512, true), -ENOSPC);
    fault_op = SM_DISK_OP_READ;
    CHECK_EQ(read_at(disk, 0, buf, 512), -ENOSPC);
    fault_op = SM_DISK_OP_FLUSH;
    CHECK_EQ(sm_disk_flush(disk), -ENOSPC);
    CHECK_EQ(sm_disk_close(disk), -ENOSPC);
    fault_op = -1;
    free_base();
}

/* Many scattered writes: the log is rewritten when it has grown, and nothing
 * is lost when more ranges are set than one batch can name. */
static void test_long_log(void)
{
    uint64_t clusters = 200000;
    struct sm_disk_config cfg = { .mode = SM_DISK_OVERLAY,
                                  .size_bytes = clusters * 4096 };
    struct sm_disk *disk;
    uint8_t buf[512];
    long size;

    cfg.overlay = strdup(scratch_path("long"));
    CHECK_EQ(sm_disk_open(&cfg, &disk, NULL, 0), 0);
    for (uint64_t i = 0; i < 40000 && !test_bad; i++) {
        uint64_t at = i * 7919 % clusters;

        memset(buf, (int)(at % 251) + 1, sizeof(buf));
        CHECK_EQ(write_at(disk, at * 4096, buf, sizeof(buf)), 0);
        if (i % 1000 == 999)
            CHECK_EQ(sm_disk_flush(disk), 0);
    }
    CHECK_EQ(sm_disk_close(disk), 0);
    size = file_size("long.map");
    CHECK(size > 0 && size < 160 + 24 * 90000);
    CHECK_EQ(sm_disk_open(&cfg, &disk, NULL, 0), 0);
    for (uint64_t i = 0; i < 40000 && !test_bad; i++) {
        uint64_t at = i * 7919 % clusters;

        CHECK_EQ(read_at(disk, at * 4096, buf, sizeof(buf)), 0);
        CHECK_EQ(buf[0], at % 251 + 1);
        CHECK_EQ(buf[511], at % 251 + 1);
    }
    sm_disk_close(disk);
    free((char *)cfg.overlay);
}

/* Terabytes: only what is touched costs anything. */
static void test_huge_sparse_disk(void)
{
    struct sm_disk_config cfg = { .mode = SM_DISK_OVERLAY,
                                  .size_bytes = 8ull << 40,
                                  .ephemeral = true };
    struct sm_disk *disk;
    uint8_t buf[512], got[512];

    cfg.overlay = strdup(scratch_path("huge"));
    if (sm_disk_open(&cfg, &disk, NULL, 0) == 0) {
        memset(buf, 9, sizeof(buf));
        for (uint64_t at = 0; at < cfg.size_bytes; at += 1ull << 39) {
            CHECK_EQ(write_at(disk, at + (1ull << 38), buf, sizeof(buf)), 0);
            CHECK_EQ(read_at(disk, at + (1ull << 38), got, sizeof(got)), 0);
            CHECK(!memcmp(buf, got, sizeof(buf)));
        }
        CHECK_EQ(write_at(disk, cfg.size_bytes - 512, buf, 512), 0);
        CHECK_EQ(sm_disk_zero(disk, 0, cfg.size_bytes, true), 0);
        CHECK_EQ(read_at(disk, cfg.size_bytes - 512, got, 512), 0);
        CHECK_EQ(got[0], 0);
        sm_disk_close(disk);
    } else {
        /* the file system has no files of that size */
        cfg.size_bytes = 1ull << 40;
        CHECK_EQ(sm_disk_open(&cfg, &disk, NULL, 0), 0);
        sm_disk_close(disk);
    }
    free((char *)cfg.overlay);
}

static void test_save_and_load(void)
{
    static uint8_t saved[SIZE_BYTES];
    struct sm_state_writer w;
    struct sm_state_reader r;
    struct sm_disk *disk;

    make_base();
    disk = open_disk(SM_DISK_OVERLAY, false);
    for (unsigned i = 0; i < 40; i++)
        step(disk);
    sm_state_writer_init(&w);
    sm_disk_save(disk, &w);
    CHECK_EQ(w.error, 0);
    memcpy(saved, model, sizeof(saved));
    CHECK_EQ(sm_disk_flush(disk), 0);
    copy_file("delta", "snap", -1);
    for (unsigned i = 0; i < 40; i++)
        step(disk);
    CHECK_EQ(sm_disk_close(disk), 0);

    /* the delta of then, with the map of then */
    disk = open_disk(SM_DISK_OVERLAY, false);
    copy_file("snap", "delta", -1);
    sm_state_reader_init(&r, w.buf, w.len);
    CHECK_EQ(sm_disk_load(disk, &r), 0);
    CHECK(same(disk, saved));
    CHECK_EQ(sm_disk_close(disk), 0);
    disk = open_disk(SM_DISK_OVERLAY, false); /* and the log says so too */
    CHECK(same(disk, saved));
    for (size_t i = 0; i < w.len; i++) {
        sm_state_reader_init(&r, w.buf, i);
        CHECK(sm_disk_load(disk, &r) < 0);
    }
    sm_disk_close(disk);
    disk = open_disk(SM_DISK_READ_ONLY, false);
    sm_state_reader_init(&r, w.buf, w.len);
    CHECK_EQ(sm_disk_load(disk, &r), -ESTALE);
    sm_disk_close(disk);
    sm_state_writer_free(&w);
    free_base();
}

/* Each test in an empty folder. */
static void fresh(unsigned n)
{
    scratch_clear();
    seed = n;
}

int main(void)
{
    scratch_begin();
    fresh(1);
    TEST(test_read_only);
    fresh(2);
    TEST(test_overlay_is_the_model);
    fresh(3);
    TEST(test_ephemeral_leaves_nothing);
    fresh(4);
    TEST(test_direct);
    fresh(5);
    TEST(test_crash_keeps_what_was_flushed);
    fresh(6);
    TEST(test_damage_is_refused);
    fresh(7);
    TEST(test_wrong_use_is_refused);
    fresh(8);
    TEST(test_ranges_are_checked);
    fresh(9);
    TEST(test_truncated_base);
    fresh(10);
    TEST(test_faults_reach_the_caller);
    fresh(11);
    TEST(test_long_log);
    fresh(12);
    TEST(test_huge_sparse_disk);
    fresh(13);
    TEST(test_save_and_load);
    scratch_end();
    return test_report();
}
