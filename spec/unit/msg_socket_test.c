/* SPDX-License-Identifier: Apache-2.0 */
/* Frames in pieces, descriptors that come along, a peer that talks nonsense or does not
 * read. */
#include "msg_socket.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "test.h"

#define IN_MAX 4096
#define OUT_MAX (1u << 20)

static struct sm_msg_socket sock;
static int peer;

static void begin(void)
{
    int sv[2];

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv) == 0);
    peer = sv[0];
    sm_msg_socket_init(&sock, sv[1], IN_MAX, OUT_MAX);
}

static void end(void)
{
    close(sock.fd);
    close(peer);
    sm_msg_socket_free(&sock);
}

/* A request's bytes: [id, name, arg], behind their length. */
static size_t request(uint8_t *buf, int64_t id, const char *name, int64_t arg)
{
    struct sm_msg_writer w;
    size_t len;

    sm_msg_writer_init(&w, 1024);
    sm_msg_put_array(&w, 3);
    sm_msg_put_int(&w, id);
    sm_msg_put_str(&w, name);
    sm_msg_put_int(&w, arg);
    len = w.len;
    memcpy(buf + 4, w.buf, len);
    sm_msg_writer_free(&w);
    for (unsigned i = 0; i < 4; i++)
        buf[i] = (uint8_t)(len >> (8 * i));
    return len + 4;
}

static void send_fds(const void *buf, size_t len, const int *fds, unsigned count)
{
    union {
        struct cmsghdr head;
        char space[CMSG_SPACE(2 * sizeof(int))];
    } control = { 0 };
    struct iovec iov = { (void *)(uintptr_t)buf, len };
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control,
                          .msg_controllen = CMSG_SPACE(count * sizeof(int)) };
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(c), fds, count * sizeof(int));
    CHECK(sendmsg(peer, &msg, 0) == (ssize_t)len);
}

static struct {
    unsigned count;
    int64_t id, arg;
    char name[16];
    int fd;
} last;

static int serve(void *arg, const struct sm_msg_request *r)
{
    struct sm_msg_reader reader;
    struct sm_msg_value v;

    CHECK(arg == &last);
    last.count++;
    last.id = r->id;
    CHECK(r->name.u.bytes.len < sizeof(last.name));
    memcpy(last.name, r->name.u.bytes.p, r->name.u.bytes.len);
    last.name[r->name.u.bytes.len] = 0;
    sm_msg_reader_init(&reader, r->args, r->args_len);
    CHECK(sm_msg_next(&reader, &v) == 0 && v.type == SM_MSG_INT);
    last.arg = v.u.i;
    last.fd = sock.passed_fd;
    sock.passed_fd = -1;
    return 0;
}

static int receive(void)
{
    return sm_msg_socket_receive(&sock, serve, &last);
}

/* Until the frames that are there are read. */
static int receive_all(unsigned count)
{
    int err = 0;

    for (unsigned i = 0; i < 16 && last.count < count && !err; i++)
        err = receive();
    return err;
}

static void a_request_comes_in_pieces(void)
{
    uint8_t buf[128];
    size_t len = request(buf, 7, "vm.pause", -5);

    begin();
    memset(&last, 0, sizeof(last));
    for (size_t i = 0; i < len; i++) {
        CHECK(last.count == 0);
        CHECK(write(peer, buf + i, 1) == 1);
        CHECK(receive() == 0);
        CHECK(receive() == 0); /* nothing has come since */
    }
    CHECK(last.count == 1 && last.id == 7 && last.arg == -5 && !strcmp(last.name, "vm.pause"));
    close(peer);
    CHECK(receive() == -EPIPE);
    peer = -1;
    end();
}

static bool same_file(int a, int b)
{
    struct stat x, y;

    return fstat(a, &x) == 0 && fstat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

static int highest_fd(void)
{
    int fd = dup(0);

    close(fd);
    return fd;
}

/* Each descriptor is its own request's, though both were sent before either is read; of
 * two in one request the last counts, and none stays open. */
static void a_descriptor_belongs_to_its_request(void)
{
    uint8_t buf[256];
    int pipes[2], null = open("/dev/null", O_RDONLY | O_CLOEXEC), lowest;
    size_t len;

    CHECK(pipe2(pipes, O_CLOEXEC) == 0);
    begin();
    lowest = highest_fd();
    memset(&last, 0, sizeof(last));
    len = request(buf, 1, "one", 1);
    send_fds(buf, len, &pipes[0], 1);
    len = request(buf, 2, "two", 2);
    send_fds(buf, len, &null, 1);
    CHECK(receive_all(1) == 0 && last.id == 1 && same_file(last.fd, pipes[0]));
    close(last.fd);
    CHECK(receive_all(2) == 0 && last.id == 2 && same_file(last.fd, null));
    close(last.fd);
    len = request(buf, 3, "three", 3);
    CHECK(write(peer, buf, len) == (ssize_t)len);
    CHECK(receive_all(3) == 0 && last.id == 3 && last.fd == -1);

    len = request(buf, 4, "four", 4);
    send_fds(buf, len, (int[]){ null, pipes[1] }, 2);
    CHECK(receive_all(4) == 0 && last.id == 4 && same_file(last.fd, pipes[1]));
    close(last.fd);
    CHECK(highest_fd() == lowest);

    /* One that nobody takes ends with the socket. */
    send_fds(buf, 1, &null, 1);
    CHECK(receive() == 0 && sock.passed_fd >= 0);
    end();
    CHECK(highest_fd() <= lowest);
    close(null);
    close(pipes[0]);
    close(pipes[1]);
}

static void nonsense_is_refused(void)
{
    static const struct {
        const char *bytes;
        size_t len;
        int err;
    } cases[] = {
        { "\xff\xff\xff\xff", 4, -EMSGSIZE },
        { "\x01\x10\0\0", 4, -EMSGSIZE }, /* a byte more than IN_MAX */
        { "\0\0\0\0", 4, -EBADMSG },
        { "\1\0\0\0\xc0", 5, -EBADMSG },                   /* nil */
        { "\2\0\0\0\x91\1", 6, -EBADMSG },                 /* [1] */
        { "\5\0\0\0\x93\xa1""a\xa1""b\xc0", 10, -EBADMSG }, /* ["a", "b", nil] */
        { "\4\0\0\0\x93\1\2\xc0", 8, -EBADMSG },           /* [1, 2, nil] */
        { "\3\0\0\0\x93\1\xa9", 7, -EBADMSG },             /* a name of 9 bytes, of which none come */
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        int err = 0;

        begin();
        memset(&last, 0, sizeof(last));
        CHECK(write(peer, cases[i].bytes, cases[i].len) == (ssize_t)cases[i].len);
        for (unsigned k = 0; k < 4 && !err; k++)
            err = receive();
        if (err != cases[i].err)
            printf("case %zu: %d\n", i, err);
        CHECK(err == cases[i].err && last.count == 0);
        end();
    }
}

/* What the peer does not read is kept, whole, and beyond the limit it is an error. */
static void what_is_not_read_is_kept(void)
{
    static char text[4096], got[OUT_MAX];
    unsigned frames = 0;
    size_t at, have = 0, pos = 0;

    begin();
    memset(text, 'x', sizeof(text));
    while (!sock.out.error) {
        at = sm_msg_socket_begin(&sock);
        sm_msg_put_strn(&sock.out, text, sizeof(text));
        sm_msg_socket_end(&sock, at);
        if (sock.out.error) {
            sm_msg_writer_rewind(&sock.out, at);
            break;
        }
        frames++;
        CHECK(sm_msg_socket_flush(&sock) == 0);
    }
    CHECK(sm_msg_socket_unsent(&sock));
    fcntl(peer, F_SETFL, O_NONBLOCK);
    for (unsigned seen = 0; seen < frames;) {
        ssize_t n = read(peer, got + have, sizeof(got) - have);
        uint32_t len;

        CHECK(sm_msg_socket_flush(&sock) == 0);
        if (n > 0)
            have += (size_t)n;
        for (pos = 0; have - pos >= 4; pos += 4 + len, seen++) {
            len = (uint8_t)got[pos] | (uint32_t)(uint8_t)got[pos + 1] << 8;
            if (have - pos < 4 + len)
                break;
            CHECK(len == sizeof(text) + 3); /* str 16 */
            CHECK(!memcmp(got + pos + 7, text, sizeof(text)));
        }
        memmove(got, got + pos, have - pos);
        have -= pos;
    }
    CHECK(!sm_msg_socket_unsent(&sock) && have == 0);
    close(peer);
    at = sm_msg_socket_begin(&sock);
    sm_msg_put_nil(&sock.out);
    sm_msg_socket_end(&sock, at);
    CHECK(sm_msg_socket_flush(&sock) == -EPIPE);
    peer = -1;
    end();
}

int main(void)
{
    TEST(a_request_comes_in_pieces);
    TEST(a_descriptor_belongs_to_its_request);
    TEST(nonsense_is_refused);
    TEST(what_is_not_read_is_kept);
    return test_report();
}
