/* SPDX-License-Identifier: Apache-2.0 */
/* The console device: output into the log, input out of its bounded ring. */
#include "dev/virtio_console.h"
#include "fake_driver.h"

#define RX 0
#define TX 1

static struct fake_driver d;
static struct sm_console_log console; /* not `log`: libm has one */
static uint64_t gpa;

static void create(void)
{
    struct sm_virtio_env env = fake_env(&d, "console0");

    CHECK_EQ(sm_console_log_init(&console, &d.events, SM_CONSOLE_LOG_BYTES), 0);
    CHECK_EQ(sm_virtio_console_create(&env, &console, &d.dev), 0);
    gpa = fake_alloc(&d, 65536);
    fake_start(&d, SM_VIRTIO_F_EVENT_IDX, 2, 64);
}

static void destroy(void)
{
    fake_destroy(&d);
    CHECK_EQ(sm_console_log_input(&console, "x", 1), 0);
    sm_console_log_destroy(&console);
}

/* Offer a buffer of len bytes and wait for what was typed. */
static uint32_t receive(uint64_t at, uint32_t len)
{
    uint32_t used = 0;

    fake_send(&d, RX, &(struct fake_buf){ at, len, true }, 1);
    CHECK(fake_wait(&d, RX, NULL, &used));
    return used;
}

static void test_output(void)
{
    struct fake_buf bufs[2];
    char got[32] = { 0 };
    uint64_t lost;

    create();
    CHECK_EQ(fake_read(&d, 0x08), 3);
    memcpy(fake_ptr(&d, gpa), "hello, ", 7);
    memcpy(fake_ptr(&d, gpa + 100), "world\n", 6);
    bufs[0] = (struct fake_buf){ gpa, 7, false };
    bufs[1] = (struct fake_buf){ gpa + 100, 6, false };
    fake_send(&d, TX, bufs, 2);
    CHECK(fake_wait(&d, TX, NULL, NULL));
    CHECK(sm_events_take_bits(&d.events) & SM_EVENT_CONSOLE);
    CHECK_EQ(sm_console_log_read(&console, got, sizeof(got), &lost), 13);
    CHECK(!strcmp(got, "hello, world\n") && !lost);
    destroy();
}

/* More than the log holds: the newest stay, and the loss is counted. */
static void test_output_flood(void)
{
    static char got[SM_CONSOLE_LOG_BYTES];
    uint64_t lost;

    create();
    for (unsigned i = 0; i < 100; i++) {
        memset(fake_ptr(&d, gpa), 'a' + i % 26, 4096);
        fake_send(&d, TX, &(struct fake_buf){ gpa, 4096, false }, 1);
        CHECK(fake_wait(&d, TX, NULL, NULL));
    }
    CHECK_EQ(sm_console_log_read(&console, got, sizeof(got), &lost), sizeof(got));
    CHECK_EQ(lost, 100 * 4096 - sizeof(got));
    CHECK_EQ(got[sizeof(got) - 1], 'a' + 99 % 26);
    destroy();
}

static void test_input(void)
{
    create();
    CHECK_EQ(sm_console_log_input(&console, "before", 6), 6); /* it waits */
    CHECK_EQ(receive(gpa, 4), 4);
    CHECK(!memcmp(fake_ptr(&d, gpa), "befo", 4));
    CHECK_EQ(receive(gpa, 100), 2);
    fake_send(&d, RX, &(struct fake_buf){ gpa, 100, true }, 1); /* and the buffer does */
    fake_settle(&d);
    CHECK_EQ(sm_virtio_console_input(d.dev, "after", 5), 5);
    CHECK(fake_wait(&d, RX, NULL, NULL));
    CHECK(!memcmp(fake_ptr(&d, gpa), "after", 5));
    destroy();
}

/* The ring is bounded, what it refuses is told, and room is told again. */
static void test_input_is_bounded(void)
{
    static char block[40000];
    size_t taken;
    uint32_t got = 0;

    create();
    for (size_t i = 0; i < sizeof(block); i++)
        block[i] = (char)(i % 127);
    taken = sm_console_log_input(&console, block, sizeof(block));
    CHECK(taken > 0 && taken < sizeof(block));
    CHECK_EQ(sm_console_log_input(&console, block, 1), 0);
    sm_events_take_bits(&d.events);
    while (got < taken) {
        uint32_t n = receive(gpa + got, 4096);

        CHECK(n > 0);
        if (!n)
            break;
        got += n;
    }
    CHECK_EQ(got, taken);
    CHECK(!memcmp(fake_ptr(&d, gpa), block, taken));
    CHECK(sm_events_take_bits(&d.events) & SM_EVENT_CONSOLE);
    CHECK_EQ(sm_console_log_input(&console, block, 10), 10);
    destroy();
}

static void test_save_keeps_typed_bytes(void)
{
    struct sm_state_writer w;

    create();
    CHECK_EQ(sm_console_log_input(&console, "typed", 5), 5);
    fake_settle(&d);
    fake_save(&d, &w);
    CHECK_EQ(receive(gpa, 100), 5);
    memset(fake_ptr(&d, gpa), 0, 100);
    /* back to then: the buffer given since is there for the load too */
    CHECK_EQ(fake_load(&d, w.buf, w.len), 0);
    CHECK(fake_interrupt(&d) >= 0);
    fake_settle(&d);
    CHECK(!memcmp(fake_ptr(&d, gpa), "typed", 5));
    sm_state_writer_free(&w);
    destroy();
}

static void test_mad_buffers(void)
{
    create();
    CHECK_EQ(sm_console_log_input(&console, "x", 1), 1);
    fake_send(&d, RX, &(struct fake_buf){ gpa, 8, false }, 1); /* nothing to write to */
    CHECK(fake_wait(&d, RX, NULL, NULL));
    CHECK_EQ(receive(gpa, 8), 1);
    fake_send(&d, TX, &(struct fake_buf){ gpa, 8, true }, 1); /* nothing to read */
    CHECK(fake_wait(&d, TX, NULL, NULL));
    fake_send(&d, TX, &(struct fake_buf){ UINT64_MAX, 8, false }, 1);
    CHECK(fake_wait_dead(&d));
    CHECK_EQ(sm_console_log_input(&console, "x", 1), 1); /* harmless */
    fake_settle(&d);
    destroy();
}

int main(void)
{
    TEST(test_output);
    TEST(test_output_flood);
    TEST(test_input);
    TEST(test_input_is_bounded);
    TEST(test_save_keeps_typed_bytes);
    TEST(test_mad_buffers);
    return test_report();
}
