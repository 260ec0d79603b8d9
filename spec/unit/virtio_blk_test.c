/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The block device through its queue: requests in every framing, limits,
 * errors as the guest sees them, and a driver that sends rubbish.
 */
#include "dev/fault.h"
#include "dev/virtio_blk.h"
#include "fake_driver.h"
#include "scratch.h"

#define DISK_BYTES (1 << 20)
#define T_IN 0
#define T_OUT 1
#define T_FLUSH 4
#define T_GET_ID 8
#define T_DISCARD 11
#define T_WRITE_ZEROES 13
#define S_OK 0
#define S_IOERR 1
#define S_UNSUPP 2

#define F_SEG_MAX (1ull << 2)
#define F_RO (1ull << 5)
#define F_BLK_SIZE (1ull << 6)
#define F_FLUSH (1ull << 9)
#define F_DISCARD (1ull << 13)
#define F_WRITE_ZEROES (1ull << 14)

static struct fake_driver d;
static struct sm_disk *disk; /* the device's */
static struct sm_faults ordered; /* on demand */
static uint64_t head_gpa, data_gpa, status_gpa;

struct head {
    uint32_t type, reserved;
    uint64_t sector;
};

static void create_on(enum sm_disk_mode mode)
{
    struct sm_virtio_env env = fake_env(&d, "blk0");
    struct sm_disk_extent e = { .path = scratch_path("base"), .fd = -1 };
    struct sm_disk_config cfg = { .mode = mode,
                                  .extents = &e,
                                  .extent_count = 1,
                                  .overlay = scratch_path("delta"),
                                  .ephemeral = true };
    struct sm_blk_config blk = { .serial = "scratch", .faults = &ordered };
    static uint8_t base[DISK_BYTES];

    for (unsigned i = 0; i < sizeof(base); i++)
        base[i] = (uint8_t)(i / 512 * 7 + i);
    scratch_write("base", base, sizeof(base));
    CHECK_EQ(sm_disk_open(&cfg, &disk, NULL, 0), 0);
    blk.disk = disk;
    CHECK_EQ(sm_virtio_blk_create(&env, &blk, &d.dev), 0);
    head_gpa = fake_alloc(&d, 4096);
    status_gpa = fake_alloc(&d, 4096);
    data_gpa = fake_alloc(&d, DISK_BYTES);
}

static void create(uint64_t features)
{
    create_on(SM_DISK_OVERLAY);
    fake_start(&d, features, 1, 256);
}

static void set_head(uint32_t type, uint64_t sector)
{
    struct head h = { type, 0, sector };

    memcpy(fake_ptr(&d, head_gpa), &h, sizeof(h));
}

/* One request; the status byte, or -1 when nothing came back. */
static int request(uint32_t type, uint64_t sector, uint32_t len, bool device_writes,
                   uint32_t *used)
{
    struct fake_buf bufs[3] = { { head_gpa, 16, false },
                                { data_gpa, len, device_writes },
                                { status_gpa, 1, true } };
    uint8_t *status = fake_ptr(&d, status_gpa);

    set_head(type, sector);
    *status = 0xff;
    if (!len)
        bufs[1] = bufs[2];
    fake_send(&d, 0, bufs, len ? 3 : 2);
    return fake_wait(&d, 0, NULL, used) ? *status : -1;
}

static uint8_t base_byte(uint32_t i)
{
    return (uint8_t)(i / 512 * 7 + i);
}

static bool data_is_base(uint32_t at, uint32_t len)
{
    const uint8_t *p = fake_ptr(&d, data_gpa);

    for (uint32_t i = 0; i < len; i++)
        if (p[i] != base_byte(at + i))
            return false;
    return true;
}

static void test_configuration(void)
{
    uint64_t offered;

    create_on(SM_DISK_OVERLAY);
    offered = fake_offered(&d);
    CHECK_EQ(fake_read(&d, 0x08), 2);
    CHECK((offered & (F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_DISCARD | F_WRITE_ZEROES)) ==
          (F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_DISCARD | F_WRITE_ZEROES));
    CHECK(!(offered & F_RO));
    CHECK_EQ(sm_virtio_mmio_bus_ops.read(d.dev, 0x100, 8), DISK_BYTES / 512);
    CHECK_EQ(fake_read(&d, 0x100 + 12), 254);                       /* seg_max */
    CHECK_EQ(fake_read(&d, 0x100 + 20), 512);                       /* blk_size */
    CHECK_EQ(sm_virtio_mmio_bus_ops.read(d.dev, 0x100 + 24, 1), 3); /* 4 KiB */
    CHECK_EQ(sm_virtio_mmio_bus_ops.read(d.dev, 0x100 + 26, 2), 8);
    CHECK(fake_read(&d, 0x100 + 36) > 0);                           /* discard */
    CHECK_EQ(sm_virtio_mmio_bus_ops.read(d.dev, 0x100 + 56, 1), 1); /* may unmap */
    CHECK_EQ(fake_read(&d, 0x100 + 64), 0);
    fake_destroy(&d);

    create_on(SM_DISK_READ_ONLY);
    CHECK((fake_offered(&d) & (F_RO | F_DISCARD | F_WRITE_ZEROES)) == F_RO);
    fake_destroy(&d);
}

static void test_serial_too_long(void)
{
    struct sm_virtio_env env = fake_env(&d, "blk0");
    struct sm_blk_config cfg = { .serial = "123456789012345678901" };

    CHECK_EQ(sm_virtio_blk_create(&env, &cfg, &d.dev), -EINVAL);
    fake_destroy(&d);
}

static void read_write_all(uint64_t features)
{
    uint32_t used;
    uint8_t *p;

    create(features);
    p = fake_ptr(&d, data_gpa);
    CHECK_EQ(request(T_IN, 3, 8192, true, &used), S_OK);
    CHECK_EQ(used, 8193);
    CHECK(data_is_base(3 * 512, 8192));
    memset(p, 0x42, 1024);
    CHECK_EQ(request(T_OUT, 5, 1024, false, &used), S_OK);
    CHECK_EQ(used, 1);
    memset(p, 0, 8192);
    CHECK_EQ(request(T_IN, 5, 8192, true, &used), S_OK);
    CHECK(p[0] == 0x42 && p[1023] == 0x42 && p[1024] == base_byte(7 * 512));
    CHECK_EQ(request(T_FLUSH, 0, 0, false, &used), S_OK);
    CHECK_EQ(used, 1);
    CHECK_EQ(request(T_GET_ID, 0, 20, true, &used), S_OK);
    CHECK_EQ(used, 21);
    CHECK(!memcmp(p, "scratch\0\0\0\0\0\0\0\0\0\0\0\0\0", 20));
    CHECK_EQ(request(T_IN, 0, DISK_BYTES, true, &used), S_OK); /* all at once */
    CHECK_EQ(used, DISK_BYTES + 1);
    fake_destroy(&d);
}

static void test_read_write_plain(void)
{
    read_write_all(F_FLUSH);
}

static void test_read_write_event_idx_indirect(void)
{
    read_write_all(F_FLUSH | SM_VIRTIO_F_COMMON);
}

/* The framing is the driver's business: a header in bytes, a status behind
 * the data in one buffer. */
static void test_odd_framing(void)
{
    struct fake_buf bufs[40];
    uint32_t used;
    unsigned n = 0;

    create(SM_VIRTIO_F_COMMON);
    set_head(T_IN, 2);
    for (; n < 16; n++)
        bufs[n] = (struct fake_buf){ head_gpa + n, 1, false };
    bufs[n++] = (struct fake_buf){ data_gpa, 3, true };
    bufs[n++] = (struct fake_buf){ data_gpa + 3, 508, true };
    bufs[n++] = (struct fake_buf){ data_gpa + 511, 514, true }; /* with the status */
    fake_send(&d, 0, bufs, n);
    CHECK(fake_wait(&d, 0, NULL, &used));
    CHECK_EQ(used, 1025);
    CHECK(data_is_base(1024, 1024));
    CHECK_EQ(*(uint8_t *)fake_ptr(&d, data_gpa + 1024), S_OK);

    /* write data in the header's buffer */
    memcpy(fake_ptr(&d, head_gpa + 16), "hello", 5);
    set_head(T_OUT, 0);
    bufs[0] = (struct fake_buf){ head_gpa, 16 + 512, false };
    bufs[1] = (struct fake_buf){ status_gpa, 1, true };
    fake_send(&d, 0, bufs, 2);
    CHECK(fake_wait(&d, 0, NULL, &used));
    CHECK_EQ(*(uint8_t *)fake_ptr(&d, status_gpa), S_OK);
    CHECK_EQ(request(T_IN, 0, 512, true, NULL), S_OK);
    CHECK(!memcmp(fake_ptr(&d, data_gpa), "hello", 5));
    fake_destroy(&d);
}

static void test_errors_are_statuses(void)
{
    uint64_t last = DISK_BYTES / 512;

    create(SM_VIRTIO_F_COMMON);
    CHECK_EQ(request(T_IN, last, 512, true, NULL), S_IOERR);
    CHECK_EQ(request(T_IN, last - 1, 1024, true, NULL), S_IOERR);
    CHECK_EQ(request(T_IN, UINT64_MAX, 512, true, NULL), S_IOERR);
    CHECK_EQ(request(T_IN, UINT64_MAX / 512, 1024, true, NULL), S_IOERR);
    CHECK_EQ(request(T_IN, (1ull << 55) + 1, 512, true, NULL), S_IOERR); /* would wrap */
    CHECK_EQ(request(T_OUT, last, 512, false, NULL), S_IOERR);
    CHECK_EQ(request(T_IN, 0, 513, true, NULL), S_IOERR);
    CHECK_EQ(request(T_OUT, 0, 100, false, NULL), S_IOERR);
    CHECK_EQ(request(2, 0, 512, true, NULL), S_UNSUPP);
    CHECK_EQ(request(0xffffffff, 0, 512, true, NULL), S_UNSUPP);
    CHECK_EQ(request(T_IN, last - 1, 512, true, NULL), S_OK);
    CHECK(!(fake_status(&d) & SM_VIRTIO_NEEDS_RESET));
    fake_destroy(&d);
}

static int faults(void *arg, enum sm_disk_op op, uint64_t offset, uint64_t len)
{
    (void)offset;
    (void)len;
    return *(int *)arg == (int)op ? -EIO : 0;
}

static void test_disk_errors(void)
{
    int op = SM_DISK_OP_FLUSH;

    create(SM_VIRTIO_F_COMMON);
    sm_io_hold(d.io);
    sm_disk_set_fault(disk, faults, &op);
    sm_io_release(d.io);
    CHECK_EQ(request(T_FLUSH, 0, 0, false, NULL), S_IOERR);
    CHECK_EQ(request(T_OUT, 0, 512, false, NULL), S_OK);
    sm_io_hold(d.io);
    op = SM_DISK_OP_WRITE;
    sm_io_release(d.io);
    CHECK_EQ(request(T_OUT, 0, 512, false, NULL), S_IOERR);
    CHECK_EQ(request(T_IN, 0, 512, true, NULL), S_OK);
    sm_io_hold(d.io);
    op = -1;
    sm_io_release(d.io);
    fake_destroy(&d);
}

static int zero(uint32_t type, uint64_t sector, uint32_t sectors, uint32_t flags,
                unsigned n)
{
    struct {
        uint64_t sector;
        uint32_t sectors, flags;
    } range = { sector, sectors, flags };
    uint8_t *p = fake_ptr(&d, data_gpa);

    for (unsigned i = 0; i < n; i++)
        memcpy(p + i * sizeof(range), &range, sizeof(range));
    return request(type, 0, n * (uint32_t)sizeof(range), false, NULL);
}

static bool reads_zero(uint64_t sector, uint32_t len)
{
    const uint8_t *p = fake_ptr(&d, data_gpa);

    CHECK_EQ(request(T_IN, sector, len, true, NULL), S_OK);
    for (uint32_t i = 0; i < len; i++)
        if (p[i])
            return false;
    return true;
}

static void test_discard_and_write_zeroes(void)
{
    create(SM_VIRTIO_F_COMMON | F_DISCARD | F_WRITE_ZEROES);
    CHECK_EQ(zero(T_DISCARD, 8, 16, 0, 1), S_OK);
    CHECK(reads_zero(8, 8192));
    CHECK_EQ(zero(T_WRITE_ZEROES, 101, 3, 0, 1), S_OK);
    CHECK(reads_zero(101, 1536));
    CHECK_EQ(request(T_IN, 100, 512, true, NULL), S_OK);
    CHECK(data_is_base(100 * 512, 512));
    CHECK_EQ(zero(T_WRITE_ZEROES, 200, 1, 1, 64), S_OK);
    CHECK(reads_zero(200, 512));
    CHECK_EQ(zero(T_DISCARD, 8, 16, 1, 1), S_UNSUPP);
    CHECK_EQ(zero(T_WRITE_ZEROES, 8, 16, 2, 1), S_UNSUPP);
    CHECK_EQ(zero(T_WRITE_ZEROES, 8, 16, 0, 65), S_IOERR);
    CHECK_EQ(zero(T_WRITE_ZEROES, DISK_BYTES / 512, 1, 0, 1), S_IOERR);
    CHECK_EQ(zero(T_WRITE_ZEROES, UINT64_MAX, 1, 0, 1), S_IOERR);
    CHECK_EQ(zero(T_DISCARD, 0, UINT32_MAX, 0, 1), S_IOERR);
    CHECK_EQ(request(T_DISCARD, 0, 15, false, NULL), S_IOERR);
    CHECK_EQ(request(T_DISCARD, 0, 0, false, NULL), S_IOERR);
    fake_destroy(&d);
}

static void test_read_only_disk(void)
{
    create_on(SM_DISK_READ_ONLY);
    fake_start(&d, F_RO, 1, 16);
    CHECK_EQ(request(T_IN, 0, 512, true, NULL), S_OK);
    CHECK_EQ(request(T_OUT, 0, 512, false, NULL), S_IOERR);
    CHECK_EQ(zero(T_DISCARD, 0, 8, 0, 1), S_IOERR);
    CHECK_EQ(request(T_FLUSH, 0, 0, false, NULL), S_OK);
    fake_destroy(&d);
}

/* Chains that are no request: the device asks for a reset, and one brings it
 * back. */
static void test_rubbish(void)
{
    static const struct {
        uint32_t out, in;
    } shapes[] = { { 15, 1 }, { 0, 1 }, { 16, 0 }, { 0, 512 } };

    create(0);
    for (unsigned i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        struct fake_buf bufs[2] = { { head_gpa, shapes[i].out, false },
                                    { data_gpa, shapes[i].in, true } };

        fake_send(&d, 0, bufs, 2);
        CHECK(fake_wait_dead(&d));
        fake_start(&d, 0, 1, 16);
        CHECK_EQ(request(T_IN, 0, 512, true, NULL), S_OK);
    }
    fake_destroy(&d);
}

/* A full ring at once, many times round; more than one batch of the device. */
static void test_many_requests(void)
{
    uint32_t id;

    create(SM_VIRTIO_F_EVENT_IDX);
    for (unsigned round = 0; round < 300 && !test_bad; round++) {
        struct fake_buf bufs[3] = { { head_gpa, 16, false },
                                    { data_gpa, 512, true },
                                    { status_gpa, 1, true } };

        set_head(T_IN, round % 100);
        for (unsigned i = 0; i < 80; i++)
            fake_send(&d, 0, bufs, 3);
        for (unsigned i = 0; i < 80; i++)
            CHECK(fake_wait(&d, 0, &id, NULL));
        CHECK(data_is_base(round % 100 * 512, 512));
    }
    fake_destroy(&d);
}

static void test_save_and_load(void)
{
    struct fake_queue before;
    struct sm_state_writer w;
    uint8_t *p;

    create(SM_VIRTIO_F_COMMON);
    p = fake_ptr(&d, data_gpa);
    memset(p, 0x31, 512);
    CHECK_EQ(request(T_OUT, 9, 512, false, NULL), S_OK);
    fake_save(&d, &w);
    before = d.queues[0];
    CHECK_EQ(fake_load(&d, w.buf, w.len), 0);
    d.queues[0] = before;
    memset(p, 0, 512);
    CHECK_EQ(request(T_IN, 9, 512, true, NULL), S_OK);
    CHECK_EQ(p[17], 0x31);
    sm_state_writer_free(&w);
    fake_destroy(&d);
}

static unsigned rule(enum sm_fault_action action, unsigned ops, double probability, uint64_t seed)
{
    struct sm_fault_rule r = { .ops = ops, .action = action, .last = UINT64_MAX,
                               .probability = probability, .random = seed };
    unsigned id = 99;

    CHECK_EQ(sm_faults_add(&ordered, &r, &id), 0);
    return id;
}

/* Which of 64 reads fail, a bit each. */
static uint64_t failures(uint64_t seed)
{
    uint64_t failed = 0;
    unsigned id;

    sm_faults_init(&ordered);
    create(0);
    id = rule(SM_FAULT_FAIL, SM_FAULT_READ, 0.3, seed);
    for (unsigned i = 0; i < 64; i++)
        failed |= (uint64_t)(request(T_IN, i, 512, true, NULL) == S_IOERR) << i;
    CHECK_EQ(sm_faults_remove(&ordered, id), 0);
    CHECK_EQ(sm_faults_remove(&ordered, id), -ENOENT);
    CHECK_EQ(request(T_IN, 0, 512, true, NULL), S_OK);
    fake_destroy(&d);
    return failed;
}

static void test_faults_come_from_their_seed(void)
{
    uint64_t seven = failures(7);

    CHECK_EQ(failures(7), seven);
    CHECK(failures(8) != seven);
    CHECK(seven != 0 && ~seven != 0);
}

static void test_faults_choose(void)
{
    struct sm_fault_rule r = { .ops = SM_FAULT_WRITE, .action = SM_FAULT_FAIL, .first = 10,
                               .last = 19, .skip = 1, .count = 2, .ends = true, .probability = 1 };
    struct sm_fault_rule seen;
    unsigned id;

    sm_faults_init(&ordered);
    create(0);
    CHECK_EQ(sm_faults_add(&ordered, &r, &id), 0);
    CHECK_EQ(request(T_OUT, 9, 512, false, NULL), S_OK);
    CHECK_EQ(request(T_OUT, 20, 512, false, NULL), S_OK);
    CHECK_EQ(request(T_IN, 15, 512, true, NULL), S_OK);
    CHECK_EQ(request(T_OUT, 8, 2048, false, NULL), S_OK); /* 8 to 11: the one to skip */
    CHECK_EQ(request(T_OUT, 19, 512, false, NULL), S_IOERR);
    CHECK_EQ(request(T_OUT, 10, 512, false, NULL), S_IOERR);
    CHECK_EQ(request(T_OUT, 10, 512, false, NULL), S_OK);
    CHECK(sm_faults_get(&ordered, id, &seen));
    CHECK_EQ(seen.matched, 4);
    CHECK_EQ(seen.hits, 2);
    fake_destroy(&d);
}

static void test_faults_tear_and_corrupt(void)
{
    uint8_t *data;
    unsigned torn = 0, flipped = 0, id;

    sm_faults_init(&ordered);
    create(0);
    data = fake_ptr(&d, data_gpa);
    id = rule(SM_FAULT_TEAR, SM_FAULT_WRITE, 1, 3);
    memset(data, 0xee, 8 * 512);
    CHECK_EQ(request(T_OUT, 0, 8 * 512, false, NULL), S_IOERR);
    CHECK_EQ(request(T_IN, 0, 8 * 512, true, NULL), S_OK);
    while (torn < 8 && data[torn * 512] == 0xee)
        torn++;
    CHECK(torn < 8);
    for (unsigned i = torn * 512; i < 8 * 512; i++)
        CHECK_EQ(data[i], base_byte(i));
    sm_faults_remove(&ordered, id);

    id = rule(SM_FAULT_CORRUPT, SM_FAULT_READ, 1, 4);
    CHECK_EQ(request(T_IN, 100, 4 * 512, true, NULL), S_OK);
    for (unsigned i = 0; i < 4 * 512; i++)
        flipped += (unsigned)__builtin_popcount(data[i] ^ base_byte(100 * 512 + i));
    CHECK_EQ(flipped, 1);
    sm_faults_remove(&ordered, id);

    id = rule(SM_FAULT_CORRUPT, SM_FAULT_WRITE, 1, 5);
    memset(data, 0, 4 * 512);
    CHECK_EQ(request(T_OUT, 200, 4 * 512, false, NULL), S_OK);
    sm_faults_remove(&ordered, id);
    CHECK_EQ(request(T_IN, 200, 4 * 512, true, NULL), S_OK);
    flipped = 0;
    for (unsigned i = 0; i < 4 * 512; i++)
        flipped += (unsigned)__builtin_popcount(data[i]);
    CHECK_EQ(flipped, 1);
    fake_destroy(&d);
}

static void test_faults_delay(void)
{
    struct sm_fault_rule r = { .ops = SM_FAULT_FLUSH, .action = SM_FAULT_DELAY, .last = UINT64_MAX,
                               .probability = 1, .delay_ns = 20000000 };
    uint64_t start = sm_io_now_ns();
    unsigned id;

    sm_faults_init(&ordered);
    create(0);
    CHECK_EQ(sm_faults_add(&ordered, &r, &id), 0);
    CHECK_EQ(request(T_FLUSH, 0, 0, false, NULL), S_OK);
    CHECK(sm_io_now_ns() - start >= 20000000);
    fake_destroy(&d);
}

int main(void)
{
    sm_faults_init(&ordered);
    scratch_begin();
    TEST(test_configuration);
    TEST(test_serial_too_long);
    TEST(test_read_write_plain);
    TEST(test_read_write_event_idx_indirect);
    TEST(test_odd_framing);
    TEST(test_errors_are_statuses);
    TEST(test_disk_errors);
    TEST(test_discard_and_write_zeroes);
    TEST(test_read_only_disk);
    TEST(test_rubbish);
    TEST(test_many_requests);
    TEST(test_save_and_load);
    TEST(test_faults_come_from_their_seed);
    TEST(test_faults_choose);
    TEST(test_faults_tear_and_corrupt);
    TEST(test_faults_delay);
    scratch_end();
    return test_report();
}
