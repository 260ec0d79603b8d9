/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest agent's parsers: frames, fields, requests, users. They are
 * included, not linked: the agent is a program of its own.
 */
#include "test.h"

#include "frame.c"
#include "request.c"
#include "users.c"

static void test_frames(void)
{
    uint8_t b[64];
    struct sm_frame f;
    sm_frame_header(b, 5, SM_STDOUT, SM_FLAG_EOF, 513);
    memcpy(b + 8, "hello", 5);
    for (size_t n = 0; n < 13; n++)
        CHECK_EQ(sm_frame_next(b, n, &f), 0);
    CHECK_EQ(sm_frame_next(b, 13, &f), 13);
    CHECK_EQ(sm_frame_next(b, 64, &f), 13);
    CHECK_EQ(f.type, SM_STDOUT);
    CHECK_EQ(f.flags, SM_FLAG_EOF);
    CHECK_EQ(f.chan, 513);
    CHECK_EQ(f.len, 5);
    CHECK(!memcmp(f.payload, "hello", 5));
    /* The limit is judged by the header alone, before anything is stored. */
    sm_frame_header(b, SM_FRAME_PAYLOAD_MAX, SM_STDIN, 0, 1);
    CHECK_EQ(sm_frame_next(b, 8, &f), 0);
    sm_frame_header(b, SM_FRAME_PAYLOAD_MAX + 1, SM_STDIN, 0, 1);
    CHECK_EQ(sm_frame_next(b, 8, &f), -EPROTO);
    sm_frame_header(b, UINT32_MAX, SM_STDIN, 0, 1);
    CHECK_EQ(sm_frame_next(b, 64, &f), -EPROTO);
}

static void test_fields(void)
{
    struct sm_buf b = { 0 };
    struct sm_field f;
    size_t at = 0;
    uint32_t v;
    sm_field_put(&b, 7, "abc", 3);
    sm_field_put_u32(&b, 8, 0xdeadbeef);
    sm_field_put(&b, 9, "", 0);
    CHECK_EQ(sm_field_next(b.bytes, b.len, &at, &f), 1);
    CHECK_EQ(f.tag, 7);
    char *s = sm_field_text(&f);
    CHECK(s && !strcmp(s, "abc"));
    free(s);
    CHECK(!sm_field_u32(&f, &v));
    CHECK_EQ(sm_field_next(b.bytes, b.len, &at, &f), 1);
    CHECK(sm_field_u32(&f, &v) && v == 0xdeadbeef);
    CHECK_EQ(sm_field_next(b.bytes, b.len, &at, &f), 1);
    CHECK_EQ(f.len, 0);
    CHECK_EQ(sm_field_next(b.bytes, b.len, &at, &f), 0);
    /* Cut anywhere but between fields, it is refused. */
    for (size_t n = 0; n < b.len; n++) {
        int rc;
        at = 0;
        while ((rc = sm_field_next(b.bytes, n, &at, &f)) > 0)
            ;
        bool between = n == 0 || n == 9 || n == 19;
        CHECK_EQ(rc, between ? 0 : -EPROTO);
    }
    /* A length that wraps. */
    uint8_t evil[8] = { 1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0 };
    at = 0;
    CHECK_EQ(sm_field_next(evil, sizeof(evil), &at, &f), -EPROTO);
    sm_buf_free(&b);
}

static void test_buffer(void)
{
    struct sm_buf b = { 0 };
    uint8_t next_in = 0, next_out = 0;
    /* Uneven steps in and out keep the order, across growth and compaction. */
    for (int round = 0; round < 2000; round++) {
        for (int i = 0; i < round % 61; i++, next_in++)
            CHECK_EQ(sm_buf_append(&b, &next_in, 1), 0);
        for (int i = 0; i < round % 59 && b.len; i++, next_out++) {
            CHECK_EQ(*sm_buf_head(&b), next_out);
            sm_buf_consume(&b, 1);
        }
    }
    CHECK_EQ((uint8_t)(next_out + b.len), next_in);
    CHECK_EQ(sm_buf_reserve(&b, SIZE_MAX / 2), -ENOMEM);
    sm_buf_free(&b);
    CHECK_EQ(b.cap, 0);
}

static void test_exec(void)
{
    struct sm_buf b = { 0 };
    struct sm_exec_req r;
    char text[16];
    uint8_t window[8] = { 0, 0, 1, 0, 0, 0, 2, 0 }, size[4] = { 24, 0, 80, 0 };
    CHECK_EQ(sm_exec_parse(NULL, 0, &r), -EINVAL); /* nothing to run */
    sm_exec_free(&r);
    for (int i = 0; i < 100; i++) {
        int len = snprintf(text, sizeof(text), "arg%d", i);
        sm_field_put(&b, SM_EXEC_ARG, text, (uint32_t)len);
        sm_field_put(&b, SM_EXEC_ENV, text, (uint32_t)len);
    }
    sm_field_put(&b, SM_EXEC_CWD, "/x", 2);
    sm_field_put(&b, SM_EXEC_CWD, "/yy", 3); /* the last one counts */
    sm_field_put(&b, SM_EXEC_USER, "u", 1);
    sm_field_put_u32(&b, SM_EXEC_FLAGS, SM_EXECF_TTY);
    sm_field_put(&b, SM_EXEC_WINDOW, window, 8);
    sm_field_put(&b, SM_EXEC_SIZE, size, 4);
    sm_field_put(&b, SM_EXEC_CHAIN, "\5\0", 2);
    CHECK_EQ(sm_exec_parse(b.bytes, b.len, &r), 0);
    CHECK_EQ(r.argc, 100);
    CHECK_EQ(r.envc, 100);
    CHECK(!strcmp(r.argv[99], "arg99") && !r.argv[100]);
    CHECK(!strcmp(r.env[0], "arg0") && !r.env[100]);
    CHECK(!strcmp(r.cwd, "/yy") && !strcmp(r.user, "u"));
    CHECK_EQ(r.window[0], 65536);
    CHECK_EQ(r.window[1], 131072);
    CHECK_EQ(r.rows, 24);
    CHECK_EQ(r.columns, 80);
    CHECK_EQ(r.chain.count, 1);
    CHECK_EQ(r.chain.ids[0], 5);
    sm_exec_free(&r);
    size_t good = b.len;
    static const struct {
        uint16_t tag;
        const char *value;
        uint32_t len;
        int rc;
    } bad[] = {
        { 99, "", 0, -EPROTO },                       /* unknown field */
        { SM_EXEC_ARG, "a\0b", 3, -EPROTO },          /* NUL inside */
        { SM_EXEC_CWD, "\0", 1, -EPROTO },
        { SM_EXEC_FLAGS, "\x80\0\0\0", 4, -EINVAL },  /* unknown flag */
        { SM_EXEC_FLAGS, "\1", 1, -EPROTO },          /* wrong width */
        { SM_EXEC_STOP, "\x41\0\0\0", 4, -EINVAL },   /* signal 65 */
        { SM_EXEC_CHAIN, "\0\0", 2, -EINVAL },        /* the control channel */
        { SM_EXEC_RLIMIT, "xxxx", 4, -EPROTO },
        { SM_EXEC_WINDOW, "xxxx", 4, -EPROTO },
        { SM_EXEC_SIZE, "xx", 2, -EPROTO },
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        b.len = good;
        sm_field_put(&b, bad[i].tag, bad[i].value, bad[i].len);
        CHECK_EQ(sm_exec_parse(b.bytes, b.len, &r), bad[i].rc);
        sm_exec_free(&r);
    }
    for (int i = 0; i < 3; i++) { /* limits of lists */
        static const uint16_t tags[] = { SM_EXEC_CHAIN, SM_EXEC_GROUP, SM_EXEC_RLIMIT };
        static const uint32_t lens[] = { 2, 4, 20 }, limits[] = { SM_CHAIN_MAX, SM_GROUPS_MAX,
                                                                  SM_RLIMITS_MAX };
        static const uint8_t ones[20] = { 1, 1 };
        b.len = 0;
        sm_field_put(&b, SM_EXEC_ARG, "a", 1);
        for (uint32_t n = 0; n < limits[i]; n++)
            sm_field_put(&b, tags[i], ones, lens[i]);
        CHECK_EQ(sm_exec_parse(b.bytes, b.len, &r), 0);
        sm_exec_free(&r);
        sm_field_put(&b, tags[i], ones, lens[i]);
        CHECK_EQ(sm_exec_parse(b.bytes, b.len, &r), -EPROTO);
        sm_exec_free(&r);
    }
    sm_buf_free(&b);
}

static int parse_file(uint16_t tag, const void *value, uint32_t len, struct sm_file_req *r)
{
    struct sm_buf b = { 0 };
    sm_field_put(&b, SM_FILE_PATH, "/etc/motd", 9);
    sm_field_put(&b, tag, value, len);
    int rc = sm_file_parse(b.bytes, b.len, r);
    sm_buf_free(&b);
    return rc;
}

static void test_file(void)
{
    struct sm_file_req r;
    CHECK_EQ(sm_file_parse(NULL, 0, &r), -EINVAL);
    sm_file_free(&r);
    CHECK_EQ(parse_file(SM_FILE_MODE, "\xed\x01\0\0", 4, &r), 0);
    CHECK(r.has_mode && r.mode == 0755 && !r.has_uid && !strcmp(r.path, "/etc/motd"));
    sm_file_free(&r);
    CHECK_EQ(parse_file(SM_FILE_MODE, "\xff\xff\xff\xff", 4, &r), -EINVAL);
    sm_file_free(&r);
    CHECK_EQ(parse_file(SM_FILE_FLAGS, "\x08\0\0\0", 4, &r), -EINVAL);
    sm_file_free(&r);
    CHECK_EQ(parse_file(SM_FILE_PATH, "relative", 8, &r), -EINVAL);
    sm_file_free(&r);
    CHECK_EQ(parse_file(SM_FILE_PATH, "/a\0b", 4, &r), -EPROTO);
    sm_file_free(&r);
    CHECK_EQ(parse_file(77, "", 0, &r), -EPROTO);
    sm_file_free(&r);
}

static int parse_boot(uint16_t tag, const void *value, uint32_t len, struct sm_boot_req *r)
{
    struct sm_buf b = { 0 };
    sm_field_put(&b, tag, value, len);
    int rc = sm_boot_parse(b.bytes, b.len, r);
    sm_buf_free(&b);
    return rc;
}

static void test_boot(void)
{
    struct sm_boot_req r;
    CHECK_EQ(sm_boot_parse(NULL, 0, &r), 0);
    sm_boot_free(&r);
    static const char mount[] = "tmpfs\0none\0/mnt\0size=1m,ro";
    CHECK_EQ(parse_boot(SM_BOOT_MOUNT, mount, sizeof(mount) - 1, &r), 0);
    CHECK(r.mount_count == 1 && !strcmp(r.mounts[0].target, "/mnt") &&
          !strcmp(r.mounts[0].options, "size=1m,ro"));
    sm_boot_free(&r);
    CHECK_EQ(parse_boot(SM_BOOT_MOUNT, "a\0b\0/c\0", 7, &r), 0); /* no options */
    CHECK_EQ(r.mounts[0].options[0], 0);
    sm_boot_free(&r);
    CHECK_EQ(parse_boot(SM_BOOT_MOUNT, "a\0b\0/c", 6, &r), -EPROTO);
    sm_boot_free(&r);
    CHECK_EQ(parse_boot(SM_BOOT_MOUNT, "a\0b\0/c\0d\0e", 10, &r), -EPROTO);
    sm_boot_free(&r);
    CHECK_EQ(parse_boot(SM_BOOT_MOUNT, "a\0b\0c\0", 6, &r), -EINVAL);
    sm_boot_free(&r);
    CHECK_EQ(parse_boot(SM_BOOT_MOUNT, "", 0, &r), -EPROTO);
    sm_boot_free(&r);
    CHECK_EQ(parse_boot(SM_BOOT_ROOT, "\x05\0\0\0", 4, &r), -EINVAL);
    sm_boot_free(&r);
    CHECK_EQ(parse_boot(SM_BOOT_CLOCK, "\x05\0\0\0", 4, &r), -EPROTO);
    sm_boot_free(&r);
    static char long_name[66];
    memset(long_name, 'x', sizeof(long_name));
    CHECK_EQ(parse_boot(SM_BOOT_HOSTNAME, long_name, 64, &r), 0);
    sm_boot_free(&r);
    CHECK_EQ(parse_boot(SM_BOOT_HOSTNAME, long_name, 65, &r), -EINVAL);
    sm_boot_free(&r);
    static char much[4097];
    CHECK_EQ(parse_boot(SM_BOOT_ENTROPY, much, 4096, &r), 0);
    sm_boot_free(&r);
    CHECK_EQ(parse_boot(SM_BOOT_ENTROPY, much, 4097, &r), -EPROTO);
    sm_boot_free(&r);
}

static int resolve(const char *spec, const char *passwd, const char *group, struct sm_ident *who)
{
    return sm_ident_resolve(spec, passwd, passwd ? strlen(passwd) : 0, group,
                            group ? strlen(group) : 0, who);
}

static void test_users(void)
{
    static const char passwd[] = "root:x:0:0::/root:\n\n:::::\nx\nu:x:5:6::/home/u:/sh\n"
                                 "long:x:7:7::/";
    static const char group[] = "g:x:9:u,v\nh:x:10:v\nu:x:6:u\ni:x:11:v,u";
    struct sm_ident who;
    CHECK_EQ(resolve(NULL, NULL, NULL, &who), 0);
    CHECK(who.uid == 0 && who.gid == 0 && who.group_count == 0 && !strcmp(who.home, "/"));
    CHECK_EQ(resolve("u", passwd, group, &who), 0);
    CHECK(who.uid == 5 && who.gid == 6 && !strcmp(who.home, "/home/u"));
    CHECK(who.group_count == 2 && who.groups[0] == 9 && who.groups[1] == 11);
    CHECK_EQ(resolve("u:h", passwd, group, &who), 0);
    CHECK(who.uid == 5 && who.gid == 10 && who.group_count == 0);
    CHECK_EQ(resolve("long", passwd, group, &who), 0);
    CHECK(!strcmp(who.home, "/"));
    CHECK_EQ(resolve("u", NULL, group, &who), -ENOENT);
    CHECK_EQ(resolve("u:none", passwd, group, &who), -ENOENT);
    CHECK_EQ(resolve("5:7:8", passwd, group, &who), -EINVAL);
    CHECK_EQ(resolve("4294967294", passwd, group, &who), 0);
    CHECK_EQ(resolve("4294967295", passwd, group, &who), -ERANGE);
    CHECK_EQ(resolve("99999999999999999999", passwd, group, &who), -ERANGE);
    CHECK_EQ(resolve("0:4294967295", passwd, group, &who), -ERANGE);
    /* More groups than fit are cut, not overrun. */
    struct sm_buf many = { 0 };
    for (int i = 0; i < 400; i++) {
        char line[32];
        int n = snprintf(line, sizeof(line), "g%d:x:%d:u\n", i, 1000 + i);
        sm_buf_append(&many, line, (size_t)n);
    }
    CHECK_EQ(sm_ident_resolve("u", passwd, strlen(passwd), (char *)many.bytes, many.len, &who), 0);
    CHECK_EQ(who.group_count, SM_IDENT_GROUPS_MAX);
    /* A home too long to keep is none. */
    many.len = 0;
    sm_buf_append(&many, "u:x:5:6::/", 10);
    for (int i = 0; i < 300; i++)
        sm_buf_append(&many, "h", 1);
    CHECK_EQ(sm_ident_resolve("u", (char *)many.bytes, many.len, NULL, 0, &who), 0);
    CHECK(!strcmp(who.home, "/"));
    sm_buf_free(&many);
}

int main(void)
{
    TEST(test_frames);
    TEST(test_fields);
    TEST(test_buffer);
    TEST(test_exec);
    TEST(test_file);
    TEST(test_boot);
    TEST(test_users);
    return test_report();
}
