/* SPDX-License-Identifier: Apache-2.0 */
/* The shared layer with no hypervisor: memory map, bus, state streams, irq. */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#include "bus.h"
#include "irq.h"
#include "mem.h"
#include "state.h"
#include "test.h"

static int map(struct sm_mem *mem, uint64_t gpa, uint64_t len)
{
    struct sm_mem_desc d = { .gpa = gpa, .len_bytes = len, .kind = SM_MEM_ANON };

    return sm_mem_map(mem, &d);
}

static void mem_refuses_overlap_and_misalignment(void)
{
    struct sm_mem mem;

    sm_mem_init(&mem, NULL);
    CHECK_EQ(map(&mem, 0x10000, 0x4000), 0);
    CHECK_EQ(map(&mem, 0x13000, 0x4000), -EEXIST);
    CHECK_EQ(map(&mem, 0xf000, 0x2000), -EEXIST);
    CHECK_EQ(map(&mem, 0x10000, 0x1000), -EEXIST);
    CHECK_EQ(map(&mem, 0x14000, 0x1000), 0);
    CHECK_EQ(map(&mem, 0xf000, 0x1000), 0);
    CHECK_EQ(map(&mem, 0x20001, 0x1000), -EINVAL);
    CHECK_EQ(map(&mem, 0x20000, 0), -EINVAL);
    CHECK_EQ(map(&mem, UINT64_MAX - 0xfff, 0x2000), -EINVAL);
    CHECK_EQ(mem.count, 3);
    sm_mem_destroy(&mem);
    CHECK_EQ(mem.count, 0);
}

static void mem_ptr_wants_the_whole_range(void)
{
    struct sm_mem mem;
    uint8_t *p;

    sm_mem_init(&mem, NULL);
    map(&mem, 0x10000, 0x1000);
    map(&mem, 0x11000, 0x1000);
    p = sm_mem_ptr(&mem, 0x10000, 0x1000);
    CHECK(p != NULL);
    CHECK(sm_mem_ptr(&mem, 0x10fff, 1) == p + 0xfff);
    CHECK(sm_mem_ptr(&mem, 0x10fff, 2) == NULL); /* two regions */
    CHECK(sm_mem_ptr(&mem, 0xffff, 1) == NULL);
    CHECK(sm_mem_ptr(&mem, 0x10000, 0) == NULL);
    CHECK(sm_mem_ptr(&mem, 0x10001, UINT64_MAX) == NULL); /* wraps */
    CHECK(sm_mem_ptr(&mem, UINT64_MAX, 2) == NULL);
    sm_mem_destroy(&mem);
}

static void mem_is_where_huge_pages_fit(void)
{
    static const uint64_t at[] = { 0, 3 << 20, 1ull << 32, 5ull << 30 };
    struct sm_mem mem;

    sm_mem_init(&mem, NULL);
    for (unsigned i = 0; i < 4; i++) {
        CHECK_EQ(map(&mem, at[i], 2u << 20), 0);
        CHECK_EQ(((uintptr_t)sm_mem_ptr(&mem, at[i], 1) - at[i]) % (2u << 20), 0);
    }
    sm_mem_destroy(&mem);
}

static void mem_copies_across_regions_or_not_at_all(void)
{
    struct sm_mem mem;
    char in[] = "across", out[sizeof(in)] = { 0 };

    sm_mem_init(&mem, NULL);
    map(&mem, 0x10000, 0x1000);
    map(&mem, 0x11000, 0x1000);
    CHECK_EQ(sm_mem_write(&mem, 0x10ffd, in, sizeof(in)), 0);
    CHECK_EQ(sm_mem_read(&mem, 0x10ffd, out, sizeof(out)), 0);
    CHECK(memcmp(in, out, sizeof(in)) == 0);
    CHECK_EQ(sm_mem_write(&mem, 0x11ffe, in, sizeof(in)), -EFAULT);
    CHECK_EQ(*(uint8_t *)sm_mem_ptr(&mem, 0x11ffe, 1), 0);
    CHECK_EQ(sm_mem_read(&mem, UINT64_MAX - 1, out, sizeof(out)), -EFAULT);
    CHECK_EQ(sm_mem_ram_bytes(&mem), 0x2000);
    sm_mem_destroy(&mem);
}

static uint64_t reg_read(void *dev, uint64_t off, unsigned len)
{
    (void)len;
    return *(uint64_t *)dev + off;
}

static void reg_write(void *dev, uint64_t off, unsigned len, uint64_t value)
{
    (void)off;
    (void)len;
    *(uint64_t *)dev = value;
}

static void bus_finds_the_owner_or_nobody(void)
{
    static const struct sm_bus_ops ops = { reg_read, reg_write };
    struct sm_bus *bus = calloc(1, sizeof(*bus));
    uint64_t a = 0x100, b = 0x200, v;

    CHECK_EQ(sm_bus_add(bus, SM_SPACE_MMIO, 0x2000, 0x100, &ops, &b), 0);
    CHECK_EQ(sm_bus_add(bus, SM_SPACE_MMIO, 0x1000, 0x100, &ops, &a), 0);
    CHECK_EQ(sm_bus_add(bus, SM_SPACE_MMIO, 0x10ff, 2, &ops, &a), -EEXIST);
    CHECK_EQ(sm_bus_add(bus, SM_SPACE_MMIO, UINT64_MAX, 2, &ops, &a), -EINVAL);
    CHECK_EQ(sm_bus_read(bus, SM_SPACE_MMIO, 0x1004, 4, &v), 1);
    CHECK_EQ(v, 0x104);
    CHECK_EQ(sm_bus_read(bus, SM_SPACE_MMIO, 0x2000, 4, &v), 1);
    CHECK_EQ(v, 0x200);
    CHECK_EQ(sm_bus_read(bus, SM_SPACE_MMIO, 0x10fe, 4, &v), 0); /* crosses the end */
    CHECK_EQ(v, 0xffffffff);
    CHECK_EQ(sm_bus_read(bus, SM_SPACE_PIO, 0x1000, 1, &v), 0);
    CHECK_EQ(v, 0xff);
    CHECK_EQ(sm_bus_write(bus, SM_SPACE_MMIO, 0x1000, 2, 0x12345), 1);
    CHECK_EQ(a, 0x2345);
    CHECK_EQ(sm_bus_remove(bus, SM_SPACE_MMIO, 0x1000), 0);
    CHECK_EQ(sm_bus_write(bus, SM_SPACE_MMIO, 0x1000, 2, 1), 0);
    free(bus);
}

static void state_round_trips_and_refuses_the_wrong_section(void)
{
    struct sm_state_writer w;
    struct sm_state_reader r;
    char text[4];

    sm_state_writer_init(&w);
    sm_state_begin(&w, "first", 3);
    sm_state_put_u8(&w, 0xab);
    sm_state_put_u64(&w, 0x1122334455667788);
    sm_state_put_bytes(&w, "abcd", 4);
    sm_state_end(&w);
    sm_state_begin(&w, "second", 1);
    sm_state_put_u32(&w, 7);
    sm_state_end(&w);
    CHECK_EQ(w.error, 0);

    sm_state_reader_init(&r, w.buf, w.len);
    CHECK_EQ(sm_state_open(&r, "first"), 3);
    CHECK_EQ(sm_state_get_u8(&r), 0xab);
    CHECK_EQ(sm_state_get_u64(&r), 0x1122334455667788);
    sm_state_get_bytes(&r, text, 4);
    CHECK(memcmp(text, "abcd", 4) == 0);
    CHECK_EQ(sm_state_left(&r), 0);
    sm_state_close(&r);
    CHECK_EQ(sm_state_open(&r, "second"), 1);
    CHECK_EQ(sm_state_get_u32(&r), 7);
    CHECK_EQ(sm_state_get_u32(&r), 0); /* past the end: fails for good */
    CHECK_EQ(r.error, -EBADMSG);

    sm_state_reader_init(&r, w.buf, w.len);
    CHECK_EQ(sm_state_open(&r, "second"), 0);
    CHECK_EQ(r.error, -EBADMSG);
    /* Every truncation is refused, none is read past. */
    for (size_t len = 0; len < w.len; len++) {
        uint8_t *cut = malloc(len ? len : 1);

        memcpy(cut, w.buf, len);
        sm_state_reader_init(&r, cut, len);
        sm_state_open(&r, "first");
        sm_state_close(&r);
        sm_state_open(&r, "second");
        CHECK_EQ(r.error, -EBADMSG);
        free(cut);
    }
    sm_state_writer_free(&w);
}

static void irq_counts_edges_with_no_hypervisor(void)
{
    struct sm_irq irq;
    uint64_t n = 0;

    CHECK_EQ(sm_irq_open(&irq, NULL, 5), 0);
    sm_irq_raise(&irq);
    sm_irq_raise(&irq);
    CHECK_EQ(read(irq.fd, &n, sizeof(n)), 8);
    CHECK_EQ(n, 2);
    sm_irq_close(&irq);
    CHECK_EQ(irq.fd, -1);
}

int main(void)
{
    TEST(mem_refuses_overlap_and_misalignment);
    TEST(mem_ptr_wants_the_whole_range);
    TEST(mem_is_where_huge_pages_fit);
    TEST(mem_copies_across_regions_or_not_at_all);
    TEST(bus_finds_the_owner_or_nobody);
    TEST(state_round_trips_and_refuses_the_wrong_section);
    TEST(irq_counts_edges_with_no_hypervisor);
    return test_report();
}
