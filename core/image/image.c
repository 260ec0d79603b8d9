/* SPDX-License-Identifier: Apache-2.0 */
/* Helpers shared by core/image; see image.h. Pure functions, any thread. */
#include "image.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int sm_image_fail(struct sm_image_error *e, int err, const char *fmt, ...)
{
    va_list ap;

    if (e) {
        va_start(ap, fmt);
        vsnprintf(e->text, sizeof(e->text), fmt, ap);
        va_end(ap);
    }
    return -err;
}

int sm_image_wrap(struct sm_image_error *e, int ret, const char *fmt, ...)
{
    char head[sizeof(e->text)];
    char tail[sizeof(e->text)];
    va_list ap;

    if (!e)
        return ret;
    va_start(ap, fmt);
    vsnprintf(head, sizeof(head), fmt, ap);
    va_end(ap);
    memcpy(tail, e->text, sizeof(tail));
    head[200] = 0;
    if (snprintf(e->text, sizeof(e->text), "%s: %s", head, tail) < 0)
        e->text[0] = 0;
    return ret;
}

struct sm_image_quoted sm_image_quote(const char *s, size_t len)
{
    struct sm_image_quoted q;
    size_t n = len < 80 ? len : 80;

    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];

        q.text[i] = c < 0x20 || c == 0x7f ? '?' : (char)c;
    }
    memcpy(q.text + n, "...", 4);
    if (n == len)
        q.text[n] = 0;
    return q;
}

void sm_image_limits_default(struct sm_image_limits *l)
{
    if (!l->bytes)
        l->bytes = 128ull << 30;
    if (!l->entries)
        l->entries = 4u << 20;
    if (!l->xattr_bytes)
        l->xattr_bytes = 256u << 20;
    if (!l->depth)
        l->depth = 1024;
    if (!l->ratio)
        l->ratio = 2000; /* gzip cannot exceed 1032, so this is for zstd */
}

uint32_t sm_image_crc32c(uint32_t crc, const void *data, size_t len)
{
    const uint8_t *p = data;
    uint32_t table[16];

    /* A nibble table costs 16 steps to make and needs no global. */
    for (uint32_t i = 0; i < 16; i++) {
        uint32_t v = i;

        for (int k = 0; k < 4; k++)
            v = v & 1 ? v >> 1 ^ 0x82f63b78u : v >> 1;
        table[i] = v;
    }
    while (len--) {
        crc ^= *p++;
        crc = crc >> 4 ^ table[crc & 15];
        crc = crc >> 4 ^ table[crc & 15];
    }
    return crc;
}

int sm_image_write_all(int fd, const void *data, size_t len, uint64_t offset)
{
    const char *p = data;

    while (len) {
        ssize_t n = pwrite(fd, p, len, (off_t)offset);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        p += n;
        len -= (size_t)n;
        offset += (uint64_t)n;
    }
    return 0;
}

static int read_open_file(int fd, uint64_t max, uint8_t **out, size_t *len,
                          struct sm_image_error *e)
{
    struct stat st;
    size_t got = 0;
    uint8_t *buf;

    if (fstat(fd, &st) < 0)
        return sm_image_fail(e, errno, "%s", strerror(errno));
    if (!S_ISREG(st.st_mode))
        return sm_image_fail(e, EINVAL, "not a regular file");
    if ((uint64_t)st.st_size > max)
        return sm_image_fail(e, EFBIG, "larger than %llu bytes", (unsigned long long)max);
    buf = malloc((size_t)st.st_size + 1);
    if (!buf)
        return sm_image_fail(e, ENOMEM, "out of memory");
    while (got < (size_t)st.st_size) {
        ssize_t n = read(fd, buf + got, (size_t)st.st_size - got);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            int err = n < 0 ? errno : EIO;

            free(buf);
            return sm_image_fail(e, err, "%s", n < 0 ? strerror(err) : "file shrank");
        }
        got += (size_t)n;
    }
    *out = buf;
    *len = got;
    return 0;
}

int sm_image_read_file(const char *path, uint64_t max, uint8_t **out, size_t *len,
                       struct sm_image_error *e)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    int ret;

    if (fd < 0)
        return sm_image_fail(e, errno, "%s", strerror(errno));
    ret = read_open_file(fd, max, out, len, e);
    close(fd);
    return ret;
}
