/* SPDX-License-Identifier: Apache-2.0 */
/* The message codec: what is written is read back, lies are refused. */
#include "test.h"

#include <errno.h>
#include <stdlib.h>

#include "msg.h"

static void scalars_come_back(void)
{
    static const int64_t ints[] = {
        0, 1, 127, 128, 255, 256, 65535, 65536, 4294967295, 4294967296, INT64_MAX,
        -1, -32, -33, -128, -129, -32768, -32769, -2147483648LL, -2147483649LL, INT64_MIN,
    };
    struct sm_msg_writer w;
    sm_msg_writer_init(&w, 4096);
    for (size_t i = 0; i < sizeof(ints) / sizeof(ints[0]); i++) {
        sm_msg_put_int(&w, ints[i]);
    }
    sm_msg_put_uint(&w, UINT64_MAX);
    sm_msg_put_bool(&w, true);
    sm_msg_put_bool(&w, false);
    sm_msg_put_nil(&w);
    sm_msg_put_double(&w, -0.125);
    CHECK_EQ(w.error, 0);

    struct sm_msg_reader r;
    struct sm_msg_value v;
    sm_msg_reader_init(&r, w.buf, w.len);
    for (size_t i = 0; i < sizeof(ints) / sizeof(ints[0]); i++) {
        CHECK_EQ(sm_msg_next(&r, &v), 0);
        CHECK_EQ(v.type, SM_MSG_INT);
        CHECK_EQ(v.u.i, ints[i]);
    }
    CHECK(sm_msg_next(&r, &v) == 0 && v.type == SM_MSG_UINT && v.u.u == UINT64_MAX);
    CHECK(sm_msg_next(&r, &v) == 0 && v.type == SM_MSG_BOOL && v.u.b);
    CHECK(sm_msg_next(&r, &v) == 0 && v.type == SM_MSG_BOOL && !v.u.b);
    CHECK(sm_msg_next(&r, &v) == 0 && v.type == SM_MSG_NIL);
    CHECK(sm_msg_next(&r, &v) == 0 && v.type == SM_MSG_DOUBLE && v.u.d == -0.125);
    CHECK_EQ(sm_msg_next(&r, &v), -EBADMSG);
    sm_msg_writer_free(&w);
}

static void strings_of_every_length_class_come_back(void)
{
    static const size_t sizes[] = { 0, 1, 31, 32, 255, 256, 65535, 65536 };
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        struct sm_msg_writer w;
        sm_msg_writer_init(&w, 1 << 20);
        char *text = malloc(sizes[i] + 1);
        memset(text, 'x', sizes[i]);
        sm_msg_put_strn(&w, text, sizes[i]);
        CHECK_EQ(w.error, 0);
        CHECK_EQ(sm_msg_check(w.buf, w.len), 0);
        struct sm_msg_reader r;
        struct sm_msg_value v;
        sm_msg_reader_init(&r, w.buf, w.len);
        CHECK_EQ(sm_msg_next(&r, &v), 0);
        CHECK(v.type == SM_MSG_BYTES && v.u.bytes.len == sizes[i]);
        CHECK(memcmp(v.u.bytes.p, text, sizes[i]) == 0);
        /* each shorter buffer is refused */
        CHECK_EQ(sm_msg_check(w.buf, w.len - 1), -EBADMSG);
        free(text);
        sm_msg_writer_free(&w);
    }
}

static void a_map_is_searched_by_key(void)
{
    struct sm_msg_writer w;
    sm_msg_writer_init(&w, 4096);
    sm_msg_put_map(&w, 3);
    sm_msg_put_array(&w, 1); /* a container as key is stepped over */
    sm_msg_put_str(&w, "b");
    sm_msg_put_int(&w, 1);
    sm_msg_put_str(&w, "a");
    sm_msg_put_array(&w, 2);
    sm_msg_put_str(&w, "b");
    sm_msg_put_int(&w, 2);
    sm_msg_put_str(&w, "b");
    sm_msg_put_int(&w, 3);
    struct sm_msg_reader r, at;
    struct sm_msg_value v;
    sm_msg_reader_init(&r, w.buf, w.len);
    CHECK_EQ(sm_msg_check(w.buf, w.len), 0);
    CHECK_EQ(sm_msg_find(&r, "b", &at), 0);
    CHECK(sm_msg_next(&at, &v) == 0 && v.type == SM_MSG_INT && v.u.i == 3);
    CHECK_EQ(sm_msg_find(&r, "c", &at), -ENOENT);
    CHECK_EQ(r.pos, 0);
    sm_msg_writer_free(&w);
}

static void lies_are_refused(void)
{
    static const struct {
        const char *bytes;
        size_t len;
    } bad[] = {
        { "", 0 },
        { "\xc1", 1 },                     /* never used */
        { "\xc7\x01\x00\x00", 4 },         /* ext */
        { "\xdb\xff\xff\xff\xff", 5 },     /* 4 GiB of string */
        { "\xdd\xff\xff\xff\xff\x00", 6 }, /* 4 Gi elements */
        { "\xdf\x80\x00\x00\x00\x00", 6 }, /* 2 Gi pairs: twice that wraps in 32 bit */
        { "\x92\x01", 2 },                 /* one of two */
        { "\x01\x01", 2 },                 /* two values */
        { "\xcf\x00", 2 },                 /* half an integer */
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        CHECK_EQ(sm_msg_check(bad[i].bytes, bad[i].len), -EBADMSG);
    }
}

static void nesting_is_bounded(void)
{
    uint8_t buf[SM_MSG_MAX_DEPTH + 2];
    memset(buf, 0x91, sizeof(buf));
    buf[SM_MSG_MAX_DEPTH] = 0xc0;
    CHECK_EQ(sm_msg_check(buf, SM_MSG_MAX_DEPTH + 1), 0);
    buf[SM_MSG_MAX_DEPTH] = 0x91;
    buf[SM_MSG_MAX_DEPTH + 1] = 0xc0;
    CHECK_EQ(sm_msg_check(buf, SM_MSG_MAX_DEPTH + 2), -EBADMSG);
}

static void the_writer_stops_at_its_limit(void)
{
    struct sm_msg_writer w;
    sm_msg_writer_init(&w, 10);
    sm_msg_put_str(&w, "12345");
    CHECK_EQ(w.error, 0);
    sm_msg_put_str(&w, "67890");
    CHECK_EQ(w.error, -EMSGSIZE);
    sm_msg_put_nil(&w); /* stays failed */
    CHECK_EQ(w.error, -EMSGSIZE);
    sm_msg_writer_rewind(&w, 6);
    sm_msg_put_nil(&w);
    CHECK_EQ(w.error, 0);
    CHECK_EQ(w.len, 7);
    sm_msg_writer_free(&w);
}

int main(void)
{
    TEST(scalars_come_back);
    TEST(strings_of_every_length_class_come_back);
    TEST(a_map_is_searched_by_key);
    TEST(lies_are_refused);
    TEST(nesting_is_bounded);
    TEST(the_writer_stops_at_its_limit);
    return test_report();
}
