/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The register page and the life of a device, on the simplest one there is
 * (virtio-rng): negotiation, set-up order, reset against a busy I/O thread,
 * faults, save and load.
 */
#include "fake_driver.h"

#include <pthread.h>

#include "dev/virtio_rng.h"

static struct fake_driver d;

static void create(void)
{
    struct sm_virtio_env env = fake_env(&d, "rng0");

    if (sm_virtio_rng_create(&env, &d.dev))
        abort();
}

/* Ask for len bytes and wait for them. */
static bool ask(uint64_t gpa, uint32_t len, uint32_t *got)
{
    struct fake_buf buf = { gpa, len, true };

    fake_send(&d, 0, &buf, 1);
    return fake_wait(&d, 0, NULL, got);
}

static void test_identity(void)
{
    create();
    CHECK_EQ(fake_read(&d, 0x00), 0x74726976);
    CHECK_EQ(fake_read(&d, 0x04), 2);
    CHECK_EQ(fake_read(&d, 0x08), 4);
    CHECK_EQ(fake_read(&d, 0x34), 64);
    fake_write(&d, 0x30, 1); /* no such queue */
    CHECK_EQ(fake_read(&d, 0x34), 0);
    fake_write(&d, 0xac, 0); /* SHMSel: no region */
    for (unsigned reg = 0xb0; reg <= 0xbc; reg += 4)
        CHECK_EQ(fake_read(&d, reg), 0xffffffff);
    CHECK_EQ(fake_read(&d, 0xfc), 0);
    CHECK_EQ(fake_read(&d, 0x100), 0); /* no configuration */
    CHECK_EQ(sm_virtio_mmio_bus_ops.read(d.dev, 0, 1), 0);
    CHECK_EQ(sm_virtio_mmio_bus_ops.read(d.dev, 0xffc, 4), 0);
    CHECK_EQ(sm_virtio_mmio_queues(d.dev), 1);
    CHECK(sm_virtio_mmio_queue_fd(d.dev, 0) >= 0);
    CHECK_EQ(sm_virtio_mmio_queue_fd(d.dev, 1), -EINVAL);
    CHECK(fake_offered(&d) == SM_VIRTIO_F_COMMON);
    fake_write(&d, 0x14, 2);
    CHECK_EQ(fake_read(&d, 0x10), 0);
    fake_destroy(&d);
}

static void test_features_are_negotiated(void)
{
    create();
    CHECK(!fake_negotiate(&d, 0));                         /* no VERSION_1 */
    CHECK(!fake_negotiate(&d, SM_VIRTIO_F_VERSION_1 | 1)); /* not ours */
    CHECK(!fake_negotiate(&d, SM_VIRTIO_F_VERSION_1 | 1ull << 34));
    fake_driver_ok(&d); /* not without FEATURES_OK */
    CHECK(!(fake_status(&d) & SM_VIRTIO_DRIVER_OK));
    CHECK(fake_negotiate(&d, SM_VIRTIO_F_VERSION_1));
    /* fixed now */
    fake_write(&d, 0x24, 0);
    fake_write(&d, 0x20, 1);
    CHECK(fake_status(&d) & SM_VIRTIO_FEATURES_OK);
    fake_queue(&d, 0, 8);
    fake_driver_ok(&d);
    CHECK_EQ(fake_status(&d), 15);
    fake_write(&d, 0x70, SM_VIRTIO_FAILED | 15);
    CHECK_EQ(fake_status(&d), 15 | SM_VIRTIO_FAILED);
    fake_write(&d, 0x70, 0);
    CHECK_EQ(fake_status(&d), 0);
    fake_destroy(&d);
}

static void test_queue_setup_order(void)
{
    create();
    fake_write(&d, 0x70, 0);
    fake_queue(&d, 0, 8); /* before FEATURES_OK */
    CHECK_EQ(fake_read(&d, 0x44), 0);
    fake_queue(&d, 3, 8); /* no such queue */
    CHECK_EQ(fake_read(&d, 0x44), 0);
    CHECK(fake_negotiate(&d, SM_VIRTIO_F_VERSION_1));
    fake_queue(&d, 0, 8);
    CHECK_EQ(fake_read(&d, 0x44), 1);
    fake_write(&d, 0x80, 0xdeadbee0); /* locked while ready */
    fake_driver_ok(&d);
    CHECK(ask(fake_alloc(&d, 64), 64, NULL));
    fake_write(&d, 0x44, 0); /* stopped */
    CHECK_EQ(fake_read(&d, 0x44), 0);
    fake_write(&d, 0x44, 1); /* too late */
    CHECK_EQ(fake_read(&d, 0x44), 0);
    CHECK(!(fake_status(&d) & SM_VIRTIO_NEEDS_RESET));
    fake_destroy(&d);
}

static void test_bad_rings_need_a_reset(void)
{
    struct {
        uint32_t size;
        uint64_t desc, avail, used;
    } bad[] = {
        { 7, FAKE_RAM_GPA, FAKE_RAM_GPA + 4096, FAKE_RAM_GPA + 8192 },
        { 128, FAKE_RAM_GPA, FAKE_RAM_GPA + 4096, FAKE_RAM_GPA + 8192 },
        { 0x10008, FAKE_RAM_GPA, FAKE_RAM_GPA + 4096, FAKE_RAM_GPA + 8192 },
        { 8, 0, FAKE_RAM_GPA + 4096, FAKE_RAM_GPA + 8192 },
        { 8, FAKE_RAM_GPA, 1ull << 60, FAKE_RAM_GPA + 8192 },
        { 8, FAKE_RAM_GPA, FAKE_RAM_GPA + 4096, UINT64_MAX - 3 },
    };

    create();
    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct sm_notice notice = { 0 };

        CHECK(fake_negotiate(&d, SM_VIRTIO_F_VERSION_1));
        fake_queue_at(&d, 0, bad[i].size, bad[i].desc, bad[i].avail, bad[i].used);
        CHECK(fake_status(&d) & SM_VIRTIO_NEEDS_RESET);
        CHECK_EQ(fake_read(&d, 0x44), 0);
        CHECK(sm_events_take_notice(&d.events, &notice));
        CHECK(notice.source && !strcmp(notice.source, "rng0"));
        fake_driver_ok(&d);
        fake_write(&d, SM_VIRTIO_MMIO_NOTIFY, 0);
    }
    fake_start(&d, 0, 1, 8); /* a reset makes it well */
    CHECK(ask(fake_alloc(&d, 64), 64, NULL));
    fake_destroy(&d);
}

/* Rings that lie about their content: told once, by a configuration
 * interrupt, and dead until the reset. */
static void test_mad_driver_while_running(void)
{
    struct sm_notice notice;
    struct fake_buf buf = { 1ull << 50, 64, true };

    create();
    fake_start(&d, SM_VIRTIO_F_EVENT_IDX, 1, 8);
    fake_send(&d, 0, &buf, 1);
    CHECK_EQ(fake_interrupt(&d), SM_VIRTIO_ISR_CONFIG);
    CHECK(fake_wait_dead(&d));
    CHECK(sm_events_take_notice(&d.events, &notice));
    CHECK(strstr(notice.what, "outside"));
    buf.gpa = fake_alloc(&d, 64);
    fake_send(&d, 0, &buf, 1);
    fake_write(&d, SM_VIRTIO_MMIO_NOTIFY, 0);
    fake_settle(&d);
    CHECK_EQ(fake_used_idx(&d, 0), 0);
    CHECK(!sm_events_take_notice(&d.events, &notice));
    fake_start(&d, SM_VIRTIO_F_EVENT_IDX, 1, 8);
    CHECK(ask(buf.gpa, 64, NULL));
    fake_destroy(&d);
}

static void test_random_bytes(void)
{
    uint64_t gpa;
    uint32_t got = 0;
    unsigned zero = 0;
    uint8_t *p;

    create();
    gpa = fake_alloc(&d, 65536);
    p = fake_ptr(&d, gpa);
    fake_start(&d, SM_VIRTIO_F_COMMON, 1, 64);
    CHECK(ask(gpa, 256, &got));
    CHECK_EQ(got, 256);
    for (unsigned i = 0; i < 256; i++)
        zero += !p[i];
    CHECK(zero < 32);
    CHECK(!p[256]);
    CHECK(ask(gpa, 65536, &got)); /* bounded */
    CHECK_EQ(got, 4096);
    for (unsigned i = 0; i < 5000; i++)
        if (!ask(gpa, 8, &got) || got != 8)
            break;
    CHECK_EQ(d.queues[0].last_used, 5002);
    fake_destroy(&d);
}

/* A buffer to read from makes no sense for entropy, and harms nobody. */
static void test_request_without_room(void)
{
    struct fake_buf buf = { 0, 64, false };
    uint32_t got = 1;

    create();
    fake_start(&d, 0, 1, 8);
    buf.gpa = fake_alloc(&d, 64);
    fake_send(&d, 0, &buf, 1);
    CHECK(fake_wait(&d, 0, NULL, &got));
    CHECK_EQ(got, 0);
    fake_destroy(&d);
}

/* After a reset returns nothing of the old life touches memory, however busy
 * the I/O thread was. */
static void test_reset_is_synchronous(void)
{
    uint64_t ring, gpa;
    uint8_t *p;

    create();
    ring = d.next_gpa;
    gpa = FAKE_RAM_GPA + (8 << 20);
    p = fake_ptr(&d, gpa);
    for (unsigned i = 0; i < 500 && !test_bad; i++) {
        uint16_t used;

        d.next_gpa = ring;
        fake_start(&d, SM_VIRTIO_F_EVENT_IDX, 1, 64);
        for (unsigned k = 0; k < 40; k++) {
            struct fake_buf buf = { gpa, 4096, true };

            fake_send(&d, 0, &buf, 1);
        }
        fake_write(&d, 0x70, 0);
        used = fake_used_idx(&d, 0);
        memset(p, 0, 4096);
        fake_write(&d, SM_VIRTIO_MMIO_NOTIFY, 0);
        fake_settle(&d);
        CHECK_EQ(fake_used_idx(&d, 0), used);
        for (unsigned k = 0; k < 4096; k++)
            if (p[k])
                CHECK(!"written after the reset");
        CHECK_EQ(fake_read(&d, 0x60), 0);
    }
    fake_destroy(&d);
}

/* Registers from several vCPUs at once: nothing to see but sanitizers. */
static void *poke(void *arg)
{
    unsigned seed = (unsigned)(uintptr_t)arg;

    for (unsigned i = 0; i < 3000; i++) {
        seed = seed * 1103515245 + 12345;
        unsigned reg = (seed >> 8) % 0x110 & ~3u;

        if (seed >> 20 & 1)
            fake_read(&d, reg);
        else if (reg != 0x70)
            fake_write(&d, reg, seed >> 24 & 1 ? seed : FAKE_RAM_GPA);
        else
            fake_write(&d, reg, seed >> 22 & 0xff);
    }
    return NULL;
}

static void test_registers_from_many_threads(void)
{
    pthread_t t[4];

    create();
    fake_start(&d, 0, 1, 8);
    for (uintptr_t i = 0; i < 4; i++)
        pthread_create(&t[i], NULL, poke, (void *)(i + 1));
    for (unsigned i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    fake_start(&d, 0, 1, 8);
    CHECK(ask(fake_alloc(&d, 64), 64, NULL));
    fake_destroy(&d);
}

/* What was made available before the save and never kicked for is served
 * after the load, and the interrupt that was on its way is raised again. */
static void test_save_and_load(void)
{
    struct sm_state_writer w;
    uint64_t gpa, n;
    uint32_t got = 0;
    struct fake_queue before;
    uint16_t *avail;

    create();
    gpa = fake_alloc(&d, 4096);
    fake_start(&d, SM_VIRTIO_F_COMMON, 1, 16);
    for (unsigned i = 0; i < 37; i++)
        CHECK(ask(gpa, 16, &got));
    sm_io_hold(d.io);
    *fake_desc(&d, 0, 9) = (struct sm_virtq_desc){ gpa, 100, SM_VIRTQ_DESC_WRITE, 0 };
    fake_publish(&d, 0, 9);
    sm_io_release(d.io);
    fake_save(&d, &w);
    before = d.queues[0];

    fake_write(&d, 0x70, 0); /* another life in between */
    CHECK_EQ(fake_load(&d, w.buf, w.len), 0);
    d.queues[0] = before;
    CHECK_EQ(fake_status(&d), 15);
    CHECK_EQ(fake_read(&d, 0x44), 1);
    CHECK(fake_wait(&d, 0, NULL, &got));
    CHECK_EQ(got, 100);
    CHECK(ask(gpa, 16, &got));
    sm_state_writer_free(&w);

    /* an interrupt that the guest has not seen */
    while (poll(&(struct pollfd){ .fd = d.irq.fd, .events = POLLIN }, 1, 0) == 1)
        CHECK(fake_interrupt(&d));
    avail = fake_avail(&d, 0);
    __atomic_store_n(&avail[2 + 16], d.queues[0].last_used, __ATOMIC_SEQ_CST);
    fake_send(&d, 0, &(struct fake_buf){ gpa, 16, true }, 1);
    CHECK_EQ(poll(&(struct pollfd){ .fd = d.irq.fd, .events = POLLIN }, 1, FAKE_WAIT_MS),
             1);
    fake_save(&d, &w);
    CHECK(read(d.irq.fd, &n, sizeof(n)) == sizeof(n)); /* lost with the machine */
    CHECK_EQ(fake_load(&d, w.buf, w.len), 0);
    CHECK_EQ(fake_interrupt(&d), SM_VIRTIO_ISR_QUEUE);
    sm_state_writer_free(&w);
    fake_destroy(&d);
}

/* Any damaged state is refused or harmless, and leaves a device that works. */
static void test_load_of_damaged_state(void)
{
    struct sm_state_writer w;
    uint8_t *copy;

    create();
    fake_start(&d, SM_VIRTIO_F_COMMON, 1, 16);
    fake_save(&d, &w);
    copy = malloc(w.len);
    for (size_t i = 0; i < w.len; i++) {
        for (unsigned bit = 0; bit < 8; bit++) {
            memcpy(copy, w.buf, w.len);
            copy[i] ^= (uint8_t)(1u << bit);
            if (fake_load(&d, copy, w.len))
                CHECK_EQ(fake_status(&d), 0);
        }
        CHECK(fake_load(&d, w.buf, i) < 0); /* cut off */
    }
    CHECK_EQ(fake_load(&d, w.buf, w.len), 0);
    free(copy);
    sm_state_writer_free(&w);
    d.next_gpa = FAKE_RAM_GPA;
    fake_start(&d, 0, 1, 8);
    CHECK(ask(fake_alloc(&d, 64), 64, NULL));
    fake_destroy(&d);
}

int main(void)
{
    TEST(test_identity);
    TEST(test_features_are_negotiated);
    TEST(test_queue_setup_order);
    TEST(test_bad_rings_need_a_reset);
    TEST(test_mad_driver_while_running);
    TEST(test_random_bytes);
    TEST(test_request_without_room);
    TEST(test_reset_is_synchronous);
    TEST(test_registers_from_many_threads);
    TEST(test_save_and_load);
    TEST(test_load_of_damaged_state);
    return test_report();
}
