/* SPDX-License-Identifier: Apache-2.0 */
/* virtio-pmem: what the guest sees, what it is refused, what files may be. */
#include "dev/virtio_pmem.h"

#include "backend.h"
#include "fake_driver.h"
#include "scratch.h"

#define MIB (1ull << 20)

static struct fake_driver d;
static char why[200];

static void file(const char *name, uint64_t bytes, char fill)
{
    char *buf = malloc(bytes);

    if (!buf)
        abort();
    memset(buf, fill, bytes);
    scratch_write(name, buf, bytes);
    free(buf);
}

static int create(const struct sm_disk_extent *extents, unsigned count)
{
    struct sm_virtio_env env = fake_env(&d, "pmem0");
    struct sm_pmem_config cfg = { .extents = extents, .extent_count = count };

    why[0] = 0;
    return sm_virtio_pmem_create(&env, &cfg, &d.dev, why, sizeof(why));
}

static int create_two(void)
{
    struct sm_disk_extent two[] = {
        { .path = scratch_path("a"), .length_bytes = MIB },
        { .path = scratch_path("b"), .offset = 4096, .length_bytes = 3 * MIB },
    };

    return create(two, 2);
}

static uint64_t config64(unsigned at)
{
    return fake_read(&d, 0x100 + at) | (uint64_t)fake_read(&d, 0x104 + at) << 32;
}

static void test_files_one_after_the_other(void)
{
    uint64_t gpa;
    uint8_t b[2];

    CHECK_EQ(create_two(), 0);
    gpa = config64(0);
    CHECK_EQ(gpa % (1ull << 30), 0);
    CHECK(gpa >= 4ull << 30);
    CHECK_EQ(config64(8), 4 * MIB);
    CHECK_EQ(sm_mem_read(&d.mem, gpa + MIB - 1, b, 2), 0);
    CHECK(b[0] == 'a' && b[1] == 'b');
    CHECK_EQ(sm_mem_read(&d.mem, gpa + 4 * MIB - 1, b, 1), 0);
    CHECK_EQ(b[0], 'b');
    CHECK_EQ(sm_mem_read(&d.mem, gpa + 4 * MIB, b, 1), -EFAULT);
    CHECK_EQ(sm_mem_ram_bytes(&d.mem), FAKE_RAM_BYTES);
    fake_destroy(&d);
    CHECK_EQ(d.mem.count, 0);
}

static void test_only_reading(void)
{
    uint64_t gpa;

    CHECK_EQ(create_two(), 0);
    gpa = config64(0);
    CHECK_EQ(sm_mem_write(&d.mem, gpa, "x", 1), -EFAULT);
    /* No queue lives there; data that is only read may. */
    CHECK(!sm_mem_ptr(&d.mem, gpa, 1));
    CHECK(sm_mem_source(&d.mem, gpa, 4 * MIB) != NULL);
    CHECK(!sm_mem_source(&d.mem, gpa, 4 * MIB + 1));
    CHECK(sm_mem_source(&d.mem, FAKE_RAM_GPA, 1) != NULL);
    for (unsigned i = 0; i < d.mem.count; i++)
        CHECK(d.mem.regions[i].device == !(d.mem.regions[i].prot & SM_PROT_WRITE));
    fake_destroy(&d);
}

static void test_flush(void)
{
    uint64_t gpa;
    uint32_t len, *words;

    CHECK_EQ(create_two(), 0);
    fake_start(&d, SM_VIRTIO_F_VERSION_1, 1, 16);
    gpa = fake_alloc(&d, 4096);
    words = fake_ptr(&d, gpa);
    words[0] = 0; /* VIRTIO_PMEM_REQ_TYPE_FLUSH */
    words[1] = 77;
    fake_send(&d, 0, (struct fake_buf[]){ { gpa, 4, false }, { gpa + 4, 4, true } }, 2);
    CHECK(fake_wait(&d, 0, NULL, &len));
    CHECK_EQ(len, 4);
    CHECK_EQ(words[1], 0);
    words[0] = 9; /* unknown */
    fake_send(&d, 0, (struct fake_buf[]){ { gpa, 4, false }, { gpa + 4, 4, true } }, 2);
    CHECK(fake_wait(&d, 0, NULL, &len));
    CHECK_EQ(words[1], 1);
    /* data from the segment itself is data; answers do not go there */
    fake_send(&d, 0, (struct fake_buf[]){ { config64(0), 4, false }, { gpa + 4, 4, true } }, 2);
    CHECK(fake_wait(&d, 0, NULL, &len));
    CHECK_EQ(words[1], 1); /* 'aaaa' is no type */
    fake_send(&d, 0, (struct fake_buf[]){ { gpa, 4, false }, { config64(0), 4, true } }, 2);
    CHECK(fake_wait_dead(&d));
    fake_destroy(&d);
}

static void test_mad_request(void)
{
    uint64_t gpa;

    CHECK_EQ(create_two(), 0);
    fake_start(&d, SM_VIRTIO_F_VERSION_1, 1, 16);
    gpa = fake_alloc(&d, 4096);
    fake_send(&d, 0, &(struct fake_buf){ gpa, 4, false }, 1);
    CHECK(fake_wait_dead(&d));
    fake_destroy(&d);
}

static void test_state(void)
{
    struct sm_state_writer w;

    CHECK_EQ(create_two(), 0);
    fake_start(&d, SM_VIRTIO_F_VERSION_1, 1, 16);
    fake_save(&d, &w);
    CHECK_EQ(fake_load(&d, w.buf, w.len), 0);
    fake_destroy(&d);
    /* another segment is another device */
    CHECK_EQ(create(&(struct sm_disk_extent){ .path = scratch_path("b"),
                                              .length_bytes = 2 * MIB }, 1), 0);
    CHECK_EQ(fake_load(&d, w.buf, w.len), -ESTALE);
    sm_state_writer_free(&w);
    fake_destroy(&d);
}

static void refuse(const struct sm_disk_extent *extents, unsigned count, int err, const char *text)
{
    CHECK_EQ(create(extents, count), err);
    CHECK(strstr(why, text) != NULL);
    CHECK_EQ(d.mem.count, 1);
    fake_destroy(&d);
}

static void test_refused_files(void)
{
    struct sm_disk_extent e = { .path = scratch_path("a"), .length_bytes = MIB };
    struct sm_disk_extent f;

    refuse(&e, 0, -EINVAL, "2 MiB");
    refuse(&e, 1, -EINVAL, "2 MiB");
    f = e, f.length_bytes = 2 * MIB;
    refuse(&f, 1, -ERANGE, "shorter");
    f = e, f.length_bytes = 2 * MIB, f.offset = UINT64_MAX & ~4095ull;
    refuse(&f, 1, -EFBIG, "too large");
    f = e, f.length_bytes = 2 * MIB, f.offset = 1;
    refuse(&f, 1, -EINVAL, "pages");
    f = e, f.length_bytes = 2 * MIB, f.path = scratch_path("none");
    refuse(&f, 1, -ENOENT, "No such file");
    f = e, f.length_bytes = 2 * MIB, f.path = scratch_dir;
    refuse(&f, 1, -EINVAL, "regular");
}

int main(void)
{
    scratch_begin();
    file("a", MIB, 'a');
    file("b", 3 * MIB + 4096, 'b');
    TEST(test_files_one_after_the_other);
    TEST(test_only_reading);
    TEST(test_flush);
    TEST(test_mad_request);
    TEST(test_state);
    TEST(test_refused_files);
    scratch_end();
    return test_report();
}
