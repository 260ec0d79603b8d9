/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Captures on demand: what arrives is a whole pcap file however slow its reader is, the
 * network waits for nobody, and one that ends or breaks leaves the others alone.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "net/capture.h"
#include "test.h"

#define FRAME 1514

static uint8_t frame[FRAME];

static int add(struct sm_captures *c, int fd, uint32_t *id)
{
    struct sm_pcap *p;

    CHECK_EQ(sm_pcap_new(fd, &p), 0);
    return sm_captures_add(c, p, id);
}

/* Whole records after a head, numbered upwards; how many. */
static unsigned parse(const uint8_t *p, size_t len)
{
    unsigned n = 0;
    uint32_t last = 0, number, size;
    size_t at = 24;

    CHECK(len >= at);
    for (; at + 16 <= len; n++) {
        memcpy(&size, p + at + 8, sizeof(size));
        CHECK_EQ(size, FRAME);
        at += 16;
        if (at + size > len)
            break;
        memcpy(&number, p + at, sizeof(number));
        CHECK(number > last);
        last = number;
        at += size;
    }
    CHECK_EQ(at, len);
    return n;
}

static void send_frames(struct sm_captures *c, uint32_t from, uint32_t n)
{
    for (uint32_t i = from; i < from + n; i++) {
        memcpy(frame, &i, sizeof(i));
        sm_captures_frame(c, frame, FRAME);
        if (i % 10 == 0)
            sm_captures_flush(c);
    }
    sm_captures_flush(c);
}

static void a_slow_reader_loses_frames_and_no_more(void)
{
    static uint8_t got[8 << 20];
    struct sm_captures c = { 0 };
    struct sm_poll poll_ = { 0 };
    size_t len = 0;
    uint32_t id;
    ssize_t n;
    int pair[2];
    int64_t lost;

    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    CHECK_EQ(add(&c, pair[0], &id), 0);
    send_frames(&c, 1, 4000); /* 6 MB that nobody takes */
    sm_captures_fill(&c, &poll_);
    CHECK_EQ(poll_.count, 1); /* it waits for room */
    for (unsigned round = 0; round < 100; round++) {
        while ((n = recv(pair[1], got + len, sizeof(got) - len, MSG_DONTWAIT)) > 0)
            len += (size_t)n;
        sm_captures_flush(&c);
    }
    send_frames(&c, 5000, 10); /* and goes on */
    while ((n = recv(pair[1], got + len, sizeof(got) - len, MSG_DONTWAIT)) > 0)
        len += (size_t)n;
    lost = sm_captures_end(&c, id);
    CHECK(lost > 0);
    CHECK_EQ(parse(got, len) + lost, 4010);
    CHECK_EQ(c.count, 0);
    CHECK_EQ(sm_captures_end(&c, id), -ENOENT);
    free(poll_.fds);
    close(pair[1]);
}

static void who_has_gone_is_let_go_of(void)
{
    struct sm_captures c = { 0 };
    int pair[2], file = memfd_create("pcap", MFD_CLOEXEC), kept = dup(file);
    uint32_t id, full, gone;
    static uint8_t got[1 << 20];
    ssize_t len;

    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    CHECK_EQ(add(&c, file, &id), 0);
    CHECK_EQ(add(&c, open("/dev/full", O_WRONLY), &full), 0);
    CHECK_EQ(add(&c, pair[0], &gone), 0);
    close(pair[1]);
    send_frames(&c, 1, 100);
    CHECK_EQ(c.count, 1);
    send_frames(&c, 101, 100);
    CHECK_EQ(sm_captures_end(&c, gone), -ENOENT);
    CHECK_EQ(sm_captures_end(&c, id), 0);
    len = pread(kept, got, sizeof(got), 0);
    CHECK_EQ(parse(got, (size_t)len), 200);
    close(kept);
}

static void there_is_an_end_to_their_number(void)
{
    struct sm_captures c = { 0 };
    uint32_t id;

    for (unsigned i = 0; i < SM_CAPTURES; i++)
        CHECK_EQ(add(&c, memfd_create("pcap", MFD_CLOEXEC), &id), 0);
    CHECK_EQ(add(&c, memfd_create("pcap", MFD_CLOEXEC), &id), -ENOSPC);
    CHECK_EQ(sm_captures_end(&c, 1), 0);
    CHECK_EQ(add(&c, memfd_create("pcap", MFD_CLOEXEC), &id), 0);
    CHECK(id > SM_CAPTURES); /* never one that was another's */
    sm_captures_close(&c);
    CHECK_EQ(c.count, 0);
}

int main(void)
{
    TEST(a_slow_reader_loses_frames_and_no_more);
    TEST(who_has_gone_is_let_go_of);
    TEST(there_is_an_end_to_their_number);
    return test_report();
}
