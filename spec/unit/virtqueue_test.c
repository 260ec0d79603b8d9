/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The virtqueue alone, driven by hand on this thread: chains, indirection,
 * wrap-around, notification rules, and what a mad driver can write.
 */
#include "fake_driver.h"

#define SIZE 8

static struct sm_mem mem;
static struct sm_virtq vq;
static struct iovec iov[SM_VIRTQ_SEGS];
static struct sm_virtq_chain chain = { .iov = iov, .cap = SM_VIRTQ_SEGS };

#define DESC_GPA FAKE_RAM_GPA
#define AVAIL_GPA (FAKE_RAM_GPA + 0x1000)
#define USED_GPA (FAKE_RAM_GPA + 0x2000)
#define DATA_GPA (FAKE_RAM_GPA + 0x3000)
#define RAM_END (FAKE_RAM_GPA + FAKE_RAM_BYTES)

static struct sm_virtq_desc *desc(unsigned i)
{
    return (struct sm_virtq_desc *)sm_mem_ptr(&mem, DESC_GPA, 16) + i;
}

static uint16_t *avail(void)
{
    return sm_mem_ptr(&mem, AVAIL_GPA, 2);
}

static uint16_t *used(void)
{
    return sm_mem_ptr(&mem, USED_GPA, 2);
}

static void set_desc(unsigned i, uint64_t addr, uint32_t len, uint16_t flags,
                     uint16_t next)
{
    *desc(i) = (struct sm_virtq_desc){ addr, len, flags, next };
}

static void publish(uint16_t head)
{
    avail()[2 + avail()[1] % SIZE] = head;
    avail()[1]++;
}

static void setup(bool event_idx, bool indirect)
{
    memset(sm_mem_ptr(&mem, FAKE_RAM_GPA, 0x3000), 0, 0x3000);
    CHECK_EQ(sm_virtq_setup(&vq, &mem, SIZE, DESC_GPA, AVAIL_GPA, USED_GPA, event_idx,
                            indirect),
             0);
}

/* The queue is dead and says so. */
static void expect_fault(const char *word)
{
    CHECK_EQ(sm_virtq_pop(&vq, &chain), -EBADMSG);
    CHECK(vq.fault && strstr(vq.fault, word));
    CHECK_EQ(sm_virtq_pop(&vq, &chain), -EBADMSG);
    CHECK(!sm_virtq_kicks_on(&vq));
}

static void test_setup_checks_addresses(void)
{
    struct {
        uint32_t size;
        uint64_t d, a, u;
        int want;
    } t[] = {
        { 8, DESC_GPA, AVAIL_GPA, USED_GPA, 0 },
        { 256, DESC_GPA, AVAIL_GPA, USED_GPA, 0 },
        { 0, DESC_GPA, AVAIL_GPA, USED_GPA, -EINVAL },
        { 7, DESC_GPA, AVAIL_GPA, USED_GPA, -EINVAL },
        { 512, DESC_GPA, AVAIL_GPA, USED_GPA, -EINVAL },
        { 8, DESC_GPA + 8, AVAIL_GPA, USED_GPA, -EINVAL },
        { 8, DESC_GPA, AVAIL_GPA + 1, USED_GPA, -EINVAL },
        { 8, DESC_GPA, AVAIL_GPA, USED_GPA + 2, -EINVAL },
        { 8, 0, AVAIL_GPA, USED_GPA, -EFAULT },
        { 8, DESC_GPA, RAM_END, USED_GPA, -EFAULT },
        { 8, RAM_END - 112, AVAIL_GPA, USED_GPA, -EFAULT }, /* one too far */
        { 8, DESC_GPA, RAM_END - 20, USED_GPA, -EFAULT },
        { 8, DESC_GPA, AVAIL_GPA, RAM_END - 68, -EFAULT },
        { 8, RAM_END - 128, RAM_END - 22, RAM_END - 72, 0 },
        { 8, UINT64_MAX - 15, AVAIL_GPA, USED_GPA, -EFAULT },
        { 8, DESC_GPA, UINT64_MAX - 1, USED_GPA, -EFAULT },
        { 8, DESC_GPA, AVAIL_GPA, UINT64_MAX - 3, -EFAULT },
    };

    for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
        CHECK_EQ(sm_virtq_setup(&vq, &mem, (uint16_t)t[i].size, t[i].d, t[i].a, t[i].u,
                                true, true),
                 t[i].want);
        CHECK_EQ(vq.size, t[i].want ? 0 : t[i].size);
    }
}

static void test_unset_queue_gives_nothing(void)
{
    sm_virtq_clear(&vq);
    CHECK_EQ(sm_virtq_pop(&vq, &chain), 0);
    CHECK(!sm_virtq_should_notify(&vq));
    CHECK(!sm_virtq_kicks_on(&vq));
    sm_virtq_push(&vq, 0, 0);
    sm_virtq_kicks_off(&vq);
}

static void test_chain_in_and_out(void)
{
    setup(false, false);
    set_desc(3, DATA_GPA, 16, SM_VIRTQ_DESC_NEXT, 5);
    set_desc(5, DATA_GPA + 100, 32, SM_VIRTQ_DESC_NEXT, 1);
    set_desc(1, DATA_GPA + 200, 64, SM_VIRTQ_DESC_WRITE, 7);
    publish(3);

    CHECK_EQ(sm_virtq_pop(&vq, &chain), 1);
    CHECK_EQ(chain.head, 3);
    CHECK_EQ(chain.out, 2);
    CHECK_EQ(chain.in, 1);
    CHECK_EQ(chain.out_bytes, 48);
    CHECK_EQ(chain.in_bytes, 64);
    CHECK(iov[1].iov_base == sm_mem_ptr(&mem, DATA_GPA + 100, 32));
    CHECK_EQ(iov[2].iov_len, 64);
    CHECK_EQ(sm_virtq_taken(&vq), 1);
    CHECK_EQ(sm_virtq_pop(&vq, &chain), 0);

    sm_virtq_push(&vq, 3, 64);
    CHECK_EQ(used()[1], 1);
    CHECK_EQ(((uint32_t *)(used() + 2))[0], 3);
    CHECK_EQ(((uint32_t *)(used() + 2))[1], 64);
    CHECK_EQ(sm_virtq_taken(&vq), 0);
}

static void test_unpop_gives_it_again(void)
{
    setup(false, false);
    set_desc(0, DATA_GPA, 1, 0, 0);
    set_desc(1, DATA_GPA, 2, 0, 0);
    publish(0);
    publish(1);
    CHECK_EQ(sm_virtq_pop(&vq, &chain), 1);
    CHECK_EQ(sm_virtq_pop(&vq, &chain), 1);
    sm_virtq_unpop(&vq, 2);
    CHECK_EQ(sm_virtq_taken(&vq), 0);
    CHECK_EQ(sm_virtq_pop(&vq, &chain), 1);
    CHECK_EQ(chain.head, 0);
}

/* idx is free running: 70000 requests pass both the ring's end and 2^16. */
static void test_indices_wrap(void)
{
    unsigned told = 0;

    setup(true, false);
    for (unsigned i = 0; i < SIZE; i++)
        set_desc(i, DATA_GPA, 4, SM_VIRTQ_DESC_WRITE, 0);
    for (unsigned i = 0; i < 70000; i++) {
        avail()[2 + SIZE] = used()[1]; /* used_event: tell me at the next */
        publish(i % SIZE);
        if (sm_virtq_pop(&vq, &chain) != 1 || chain.head != i % SIZE)
            break;
        sm_virtq_push(&vq, chain.head, 4);
        told += sm_virtq_should_notify(&vq);
    }
    CHECK_EQ(told, 70000);
    CHECK_EQ(used()[1], (uint16_t)70000);
}

static void test_event_idx_interrupts_only_when_crossed(void)
{
    setup(true, false);
    for (unsigned i = 0; i < SIZE; i++)
        set_desc(i, DATA_GPA, 4, SM_VIRTQ_DESC_WRITE, 0);
    for (unsigned i = 0; i < 4; i++)
        publish(i);
    avail()[2 + SIZE] = 2; /* interrupt when the third is used */
    for (unsigned i = 0; i < 4; i++) {
        CHECK_EQ(sm_virtq_pop(&vq, &chain), 1);
        sm_virtq_push(&vq, chain.head, 0);
        CHECK_EQ(sm_virtq_should_notify(&vq), i == 2);
        CHECK(!sm_virtq_should_notify(&vq)); /* nothing new */
    }
}

static void test_flags_without_event_idx(void)
{
    setup(false, false);
    set_desc(0, DATA_GPA, 4, 0, 0);
    avail()[0] = SM_VIRTQ_AVAIL_NO_INTERRUPT;
    publish(0);
    CHECK_EQ(sm_virtq_pop(&vq, &chain), 1);
    sm_virtq_push(&vq, 0, 0);
    CHECK(!sm_virtq_should_notify(&vq));
    avail()[0] = 0;
    publish(0);
    CHECK_EQ(sm_virtq_pop(&vq, &chain), 1);
    sm_virtq_push(&vq, 0, 0);
    CHECK(sm_virtq_should_notify(&vq));

    sm_virtq_kicks_off(&vq);
    CHECK_EQ(used()[0], SM_VIRTQ_USED_NO_NOTIFY);
    publish(0);
    CHECK(sm_virtq_kicks_on(&vq)); /* it came while kicks were off */
    CHECK_EQ(used()[0], 0);
    CHECK_EQ(sm_virtq_pop(&vq, &chain), 1);
    CHECK(!sm_virtq_kicks_on(&vq));
}

static void test_event_idx_kicks(void)
{
    uint16_t *avail_event;

    setup(true, false);
    avail_event = used() + 2 + 4 * SIZE;
    set_desc(0, DATA_GPA, 4, 0, 0);
    publish(0);
    CHECK(sm_virtq_kicks_on(&vq));
    CHECK_EQ(sm_virtq_pop(&vq, &chain), 1);
    CHECK(!sm_virtq_kicks_on(&vq));
    CHECK_EQ(*avail_event, 1);
    publish(0);
    CHECK_EQ(sm_virtq_seen(&vq), 2);
    CHECK(!sm_virtq_kicks_on_after(&vq, 2));
    CHECK_EQ(*avail_event, 2);
    publish(0);
    CHECK(sm_virtq_kicks_on_after(&vq, 2));
}

static void test_indirect_table(void)
{
    struct sm_virtq_desc *table;

    setup(false, true);
    table = sm_mem_ptr(&mem, DATA_GPA, 4096);
    table[0] = (struct sm_virtq_desc){ DATA_GPA + 0x1000, 8, SM_VIRTQ_DESC_NEXT, 2 };
    table[2] = (struct sm_virtq_desc){ DATA_GPA + 0x2000, 9, SM_VIRTQ_DESC_WRITE, 0 };
    set_desc(4, DATA_GPA, 48, SM_VIRTQ_DESC_INDIRECT, 0);
    publish(4);
    CHECK_EQ(sm_virtq_pop(&vq, &chain), 1);
    CHECK_EQ(chain.head, 4);
    CHECK_EQ(chain.out_bytes, 8);
    CHECK_EQ(chain.in_bytes, 9);
}

/* A table may stand behind direct descriptors, and hold more than the ring. */
static void test_indirect_after_direct_and_long(void)
{
    struct sm_virtq_desc *table;

    setup(false, true);
    table = sm_mem_ptr(&mem, DATA_GPA, 4096);
    for (unsigned i = 0; i < 200; i++)
        table[i] =
            (struct sm_virtq_desc){ DATA_GPA + 0x1000, 1,
                                    i < 199 ? SM_VIRTQ_DESC_NEXT : 0, (uint16_t)(i + 1) };
    set_desc(0, DATA_GPA + 0x1000, 5, SM_VIRTQ_DESC_NEXT, 1);
    set_desc(1, DATA_GPA, 200 * 16, SM_VIRTQ_DESC_INDIRECT, 0);
    publish(0);
    CHECK_EQ(sm_virtq_pop(&vq, &chain), 1);
    CHECK_EQ(chain.out, 201);
    CHECK_EQ(chain.out_bytes, 205);
}

static void test_empty_buffers_are_skipped(void)
{
    setup(false, false);
    set_desc(0, 0, 0, SM_VIRTQ_DESC_NEXT, 1);
    set_desc(1, DATA_GPA, 4, 0, 0);
    publish(0);
    CHECK_EQ(sm_virtq_pop(&vq, &chain), 1);
    CHECK_EQ(chain.out, 1);
}

static void test_chain_longer_than_the_array_stays(void)
{
    struct sm_virtq_chain small = { .iov = iov, .cap = 1 };

    setup(false, false);
    set_desc(0, DATA_GPA, 4, SM_VIRTQ_DESC_NEXT, 1);
    set_desc(1, DATA_GPA, 4, 0, 0);
    publish(0);
    CHECK_EQ(sm_virtq_pop(&vq, &small), -ENOBUFS);
    CHECK_EQ(sm_virtq_pop(&vq, &chain), 1);
}

static void test_nonsense_kills_the_queue(void)
{
    static const uint16_t next = SM_VIRTQ_DESC_NEXT, write = SM_VIRTQ_DESC_WRITE;
    static const uint16_t indirect = SM_VIRTQ_DESC_INDIRECT;
    struct sm_virtq_desc *table = sm_mem_ptr(&mem, DATA_GPA, 4096);

    setup(false, false); /* head beyond the table */
    publish(SIZE);
    expect_fault("out of range");

    setup(false, false); /* next beyond the table */
    set_desc(0, DATA_GPA, 4, next, SIZE);
    publish(0);
    expect_fault("out of range");

    setup(false, false); /* a loop */
    set_desc(0, DATA_GPA, 4, next, 1);
    set_desc(1, DATA_GPA, 4, next, 0);
    publish(0);
    expect_fault("loop");

    setup(false, false); /* idx runs ahead */
    avail()[1] = SIZE + 1;
    expect_fault("runs ahead");

    setup(false, false); /* more popped than the ring holds */
    for (unsigned i = 0; i < SIZE; i++) {
        set_desc(i, DATA_GPA, 4, 0, 0);
        publish(i);
        CHECK_EQ(sm_virtq_pop(&vq, &chain), 1);
    }
    publish(0);
    expect_fault("runs ahead");

    setup(false, false); /* readable after writable */
    set_desc(0, DATA_GPA, 4, write | next, 1);
    set_desc(1, DATA_GPA, 4, 0, 0);
    publish(0);
    expect_fault("after a writable");

    struct {
        uint64_t addr;
        uint32_t len;
    } outside[] = {
        { 0, 4 },           { RAM_END, 1 },
        { RAM_END - 4, 5 }, { FAKE_RAM_GPA, UINT32_MAX },
        { UINT64_MAX, 1 },  { UINT64_MAX - 3, UINT32_MAX },
    };
    for (unsigned i = 0; i < sizeof(outside) / sizeof(outside[0]); i++) {
        setup(false, false);
        set_desc(0, outside[i].addr, outside[i].len, i & 1 ? write : 0, 0);
        publish(0);
        expect_fault("outside");
    }

    setup(false, false); /* indirect without the feature */
    set_desc(0, DATA_GPA, 16, indirect, 0);
    publish(0);
    expect_fault("without the feature");

    uint32_t lengths[] = { 0, 8, 24, 16 * 257, UINT32_MAX, UINT32_MAX - 15 };
    for (unsigned i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        setup(false, true);
        set_desc(0, DATA_GPA, lengths[i], indirect, 0);
        publish(0);
        expect_fault("bad length");
    }

    setup(false, true); /* the table is not in memory */
    set_desc(0, RAM_END - 16, 32, indirect, 0);
    publish(0);
    expect_fault("table outside");

    setup(false, true); /* indirect and next */
    set_desc(0, DATA_GPA, 16, indirect | next, 1);
    publish(0);
    expect_fault("with a next");

    setup(false, true); /* nested */
    table[0] = (struct sm_virtq_desc){ DATA_GPA, 16, indirect, 0 };
    set_desc(0, DATA_GPA, 16, indirect, 0);
    publish(0);
    expect_fault("nested");

    setup(false, true); /* nested in itself: the ring's own table is the indirect one */
    set_desc(0, DESC_GPA, 16, indirect, 0);
    publish(0);
    expect_fault("nested");

    setup(false, true); /* a loop in a table */
    table[0] = (struct sm_virtq_desc){ DATA_GPA, 16, next, 0 };
    set_desc(0, DATA_GPA, 16, indirect, 0);
    publish(0);
    expect_fault("loop");
}

/* A device must not store to what is read-only here too. */
static void test_read_only_memory(void)
{
    struct sm_mem_desc rom = {
        .gpa = 0x8000000, .len_bytes = 4096, .kind = SM_MEM_ANON, .prot = SM_PROT_READ
    };

    CHECK_EQ(sm_mem_map(&mem, &rom), 0);
    CHECK_EQ(
        sm_virtq_setup(&vq, &mem, SIZE, DESC_GPA, AVAIL_GPA, 0x8000000, false, false),
        -EFAULT);
    setup(false, false);
    set_desc(0, 0x8000000, 16, 0, 0);
    set_desc(1, 0x8000000, 16, SM_VIRTQ_DESC_WRITE, 0);
    publish(0);
    publish(1);
    CHECK_EQ(sm_virtq_pop(&vq, &chain), 1);
    expect_fault("outside");
    sm_mem_unmap(&mem, 0x8000000);
}

static void test_iov_helpers(void)
{
    char a[3] = "abc", b[4] = "defg", out[8] = { 0 };
    struct iovec v[2] = { { a, 3 }, { b, 4 } }, *p = v;

    CHECK_EQ(sm_iov_read(v, 2, out, 5), 5);
    CHECK(!memcmp(out, "abcde", 5));
    CHECK_EQ(sm_iov_read(v, 2, out, 8), 7);
    CHECK_EQ(sm_iov_write(v, 2, "12345678", 8), 7);
    CHECK(!memcmp(a, "123", 3) && !memcmp(b, "4567", 4));
    CHECK_EQ(sm_iov_skip(&p, 2, 4), 1);
    CHECK(p->iov_base == b + 1 && p->iov_len == 3);
    CHECK_EQ(sm_iov_skip(&p, 1, 3), 0);
}

int main(void)
{
    struct sm_mem_desc ram = { .gpa = FAKE_RAM_GPA,
                               .len_bytes = FAKE_RAM_BYTES,
                               .kind = SM_MEM_ANON };

    sm_mem_init(&mem, NULL);
    if (sm_mem_map(&mem, &ram))
        return 1;
    TEST(test_setup_checks_addresses);
    TEST(test_unset_queue_gives_nothing);
    TEST(test_chain_in_and_out);
    TEST(test_unpop_gives_it_again);
    TEST(test_indices_wrap);
    TEST(test_event_idx_interrupts_only_when_crossed);
    TEST(test_flags_without_event_idx);
    TEST(test_event_idx_kicks);
    TEST(test_indirect_table);
    TEST(test_indirect_after_direct_and_long);
    TEST(test_empty_buffers_are_skipped);
    TEST(test_chain_longer_than_the_array_stays);
    TEST(test_nonsense_kills_the_queue);
    TEST(test_read_only_memory);
    TEST(test_iov_helpers);
    sm_mem_destroy(&mem);
    return test_report();
}
