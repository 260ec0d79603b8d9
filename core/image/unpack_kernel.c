/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Unpack the vmlinux inside an x86 bzImage, on the host.
 *
 * A bzImage is real-mode set-up code, a decompressor, and the compressed
 * kernel. The set-up header says where the latter lies (Linux
 * Documentation/x86/boot.rst, "payload_offset", since protocol 2.08):
 *
 *   0          0x1f1          (setup_sects + 1) * 512        end of file
 *   | boot sector | header … | decompressor … | payload | … |
 *                             <-payload_offset-> <-payload_length->
 *
 * Unpacking it here spares every guest the decompressor. All payloads but gzip
 * end in the length of the unpacked kernel, 4 bytes little endian; gzip's own
 * trailer ends in the same 4 bytes. So the exact length is known beforehand:
 * it bounds the output, and anything but that length is damage.
 *
 * The input is a file a user names: hostile. Every field is checked against
 * the file's length in 64 bits, only plain compressors are enabled in
 * libarchive, and both sides are bounded. Reads are pread, not a mapping, so a
 * file cut while we read is an error and not a SIGBUS.
 *
 * Threads: no state; callable from any thread.
 */
#include "unpack_kernel.h"

#include <archive.h>
#include <archive_entry.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    SECTOR_BYTES = 512,
    HDR_SETUP_SECTS = 0x1f1,
    HDR_BOOT_FLAG = 0x1fe,
    HDR_MAGIC = 0x202,
    HDR_VERSION = 0x206,
    HDR_PAYLOAD_OFFSET = 0x248,
    HDR_PAYLOAD_LENGTH = 0x24c,
    HDR_END = 0x250,
    VERSION_WITH_PAYLOAD = 0x0208,
    LENGTH_TRAILER_BYTES = 4,
};

/* Debian's stock kernel unpacks to 60 MB, one with everything to under 200. */
#define MAX_KERNEL_BYTES (512u << 20)

/* The payload as libarchive's input, and where reports go. */
struct unpack {
    int in;
    const char *path;
    uint64_t payload_offset; /* in the file */
    uint64_t payload_bytes;  /* what libarchive gets to see */
    uint64_t read_bytes;     /* how much of it it has seen */
    uint32_t kernel_bytes;   /* the unpacked length the file promises */
    char *err;
    size_t errlen;
    unsigned char buf[64 << 10];
};

__attribute__((format(printf, 3, 4))) static int
fail(struct unpack *u, int code, const char *fmt, ...)
{
    char text[256];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    if (u->errlen)
        snprintf(u->err, u->errlen, "%s: %s", u->path, text);
    return code;
}

static uint32_t le32(const unsigned char *p)
{
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* Read exactly len bytes at off; -ENODATA when the file ends first. */
static int read_at(int fd, void *buf, size_t len, uint64_t off)
{
    size_t done = 0;

    while (done < len) {
        ssize_t n = pread(fd, (char *)buf + done, len - done, (off_t)(off + done));

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            return -ENODATA;
        done += (size_t)n;
    }
    return 0;
}

/* Find the payload by the set-up header. */
static int parse_header(struct unpack *u, uint64_t file_bytes)
{
    unsigned char hdr[HDR_END], first[2], last[LENGTH_TRAILER_BYTES];
    unsigned int sects, version;
    uint64_t offset, length;
    int ret;

    ret = read_at(u->in, hdr, sizeof(hdr), 0);
    if (ret == -ENODATA)
        return fail(u, -ENOEXEC, "not a kernel: shorter than a bzImage's header");
    if (ret)
        return fail(u, ret, "%s", strerror(-ret));
    if (hdr[HDR_BOOT_FLAG] != 0x55 || hdr[HDR_BOOT_FLAG + 1] != 0xaa ||
        memcmp(hdr + HDR_MAGIC, "HdrS", 4))
        return fail(u, -ENOEXEC, "not a kernel: neither an ELF file nor a bzImage");
    version = hdr[HDR_VERSION] | (unsigned int)hdr[HDR_VERSION + 1] << 8;
    if (version < VERSION_WITH_PAYLOAD)
        return fail(u, -ENOEXEC, "not a kernel we can unpack: boot protocol %u.%02u, need 2.08",
                    version >> 8, version & 0xff);

    sects = hdr[HDR_SETUP_SECTS] ? hdr[HDR_SETUP_SECTS] : 4;
    offset = (uint64_t)(sects + 1) * SECTOR_BYTES + le32(hdr + HDR_PAYLOAD_OFFSET);
    length = le32(hdr + HDR_PAYLOAD_LENGTH);
    if (length <= LENGTH_TRAILER_BYTES + sizeof(first))
        return fail(u, -ENOEXEC, "not a kernel we can unpack: no compressed payload");
    if (offset + length > file_bytes)
        return fail(u, -EBADMSG,
                    "damaged kernel: its payload ends at byte %llu, the file at %llu",
                    (unsigned long long)(offset + length), (unsigned long long)file_bytes);

    ret = read_at(u->in, first, sizeof(first), offset);
    if (!ret)
        ret = read_at(u->in, last, sizeof(last), offset + length - sizeof(last));
    if (ret)
        return fail(u, ret, "%s", ret == -ENODATA ? "cut while it was read" : strerror(-ret));
    u->kernel_bytes = le32(last);
    if (u->kernel_bytes > MAX_KERNEL_BYTES)
        return fail(u, -EFBIG, "damaged kernel: it claims to unpack to %u bytes",
                    u->kernel_bytes);
    u->payload_offset = offset;
    u->payload_bytes = length;
    /* A length appended to any other format is not part of the stream. */
    if (first[0] != 0x1f || first[1] != 0x8b)
        u->payload_bytes -= LENGTH_TRAILER_BYTES;
    return 0;
}

static la_ssize_t feed(struct archive *a, void *arg, const void **buf)
{
    struct unpack *u = arg;
    uint64_t left = u->payload_bytes - u->read_bytes;
    size_t n = left < sizeof(u->buf) ? (size_t)left : sizeof(u->buf);
    int ret = read_at(u->in, u->buf, n, u->payload_offset + u->read_bytes);

    if (ret) {
        archive_set_error(a, -ret, "%s", strerror(ret == -ENODATA ? EIO : -ret));
        return -1;
    }
    u->read_bytes += n;
    *buf = u->buf;
    return (la_ssize_t)n;
}

static int write_all(int fd, const void *buf, size_t len)
{
    size_t done = 0;

    while (done < len) {
        ssize_t n = write(fd, (const char *)buf + done, len - done);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        done += (size_t)n;
    }
    return 0;
}

/* Copy the unpacked bytes to fd: exactly u->kernel_bytes of an ELF file. */
static int copy_out(struct unpack *u, struct archive *a, int fd)
{
    static const unsigned char elf[4] = {0x7f, 'E', 'L', 'F'};
    unsigned char *buf = malloc(sizeof(u->buf));
    uint64_t total = 0;
    la_ssize_t n;
    int ret = 0;

    if (!buf)
        return fail(u, -ENOMEM, "%s", strerror(ENOMEM));
    while ((n = archive_read_data(a, buf, sizeof(u->buf))) > 0) {
        if (!total && ((size_t)n < sizeof(elf) || memcmp(buf, elf, sizeof(elf)))) {
            ret = fail(u, -ENOEXEC, "not a kernel we can unpack: its payload is no ELF file");
            goto out;
        }
        total += (uint64_t)n;
        if (total > u->kernel_bytes)
            break;
        ret = write_all(fd, buf, (size_t)n);
        if (ret) {
            fail(u, ret, "cannot write the unpacked kernel: %s", strerror(-ret));
            goto out;
        }
    }
    if (n < 0)
        ret = fail(u, -EBADMSG, "damaged kernel: %s",
                   archive_error_string(a) ? archive_error_string(a) : "bad payload");
    else if (total != u->kernel_bytes)
        ret = fail(u, -EBADMSG, "damaged kernel: it unpacks to %s than the %u bytes it claims",
                   total > u->kernel_bytes ? "more" : "less", u->kernel_bytes);
out:
    free(buf);
    return ret;
}

static int decompress(struct unpack *u, int fd)
{
    struct archive *a = archive_read_new();
    struct archive_entry *entry;
    int ret;

    if (!a)
        return fail(u, -ENOMEM, "%s", strerror(ENOMEM));
    if (archive_read_support_format_raw(a) != ARCHIVE_OK ||
        archive_read_support_filter_gzip(a) != ARCHIVE_OK ||
        archive_read_support_filter_xz(a) != ARCHIVE_OK ||
        archive_read_support_filter_lzma(a) != ARCHIVE_OK ||
        archive_read_support_filter_bzip2(a) != ARCHIVE_OK ||
        archive_read_support_filter_lz4(a) != ARCHIVE_OK ||
        archive_read_support_filter_zstd(a) != ARCHIVE_OK) {
        /* A library built without one of them would run a program instead. */
        ret = fail(u, -ENOSYS, "libarchive lacks a compressor: %s", archive_error_string(a));
    } else if (archive_read_open(a, u, NULL, feed, NULL) != ARCHIVE_OK ||
               archive_read_next_header(a, &entry) != ARCHIVE_OK) {
        ret = fail(u, -EBADMSG, "damaged kernel: %s",
                   archive_error_string(a) ? archive_error_string(a) : "unknown compression");
    } else {
        ret = copy_out(u, a, fd);
    }
    archive_read_free(a);
    return ret;
}

/* Unpack into a temporary file beside `out` and rename it into place. */
static int unpack_to(struct unpack *u, const char *out)
{
    size_t len = strlen(out);
    char *tmp = malloc(len + sizeof(".XXXXXX"));
    int fd, ret;

    if (!tmp)
        return fail(u, -ENOMEM, "%s", strerror(ENOMEM));
    memcpy(tmp, out, len);
    memcpy(tmp + len, ".XXXXXX", sizeof(".XXXXXX"));
    fd = mkostemp(tmp, O_CLOEXEC);
    if (fd < 0) {
        ret = fail(u, -errno, "cannot create %s: %s", tmp, strerror(errno));
        free(tmp);
        return ret;
    }
    ret = decompress(u, fd);
    if (!ret && (fchmod(fd, 0644) || rename(tmp, out)))
        ret = fail(u, -errno, "cannot create %s: %s", out, strerror(errno));
    if (ret)
        unlink(tmp);
    close(fd);
    free(tmp);
    return ret;
}

int sm_unpack_kernel(const char *bzimage, const char *out, char *err, size_t errlen)
{
    struct unpack *u = calloc(1, sizeof(*u));
    struct stat st;
    int ret;

    if (errlen)
        err[0] = '\0';
    if (!u)
        return -ENOMEM;
    u->path = bzimage;
    u->err = err;
    u->errlen = errlen;
    u->in = open(bzimage, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (u->in < 0 || fstat(u->in, &st)) {
        ret = fail(u, -errno, "%s", strerror(errno));
    } else if (!S_ISREG(st.st_mode)) {
        ret = fail(u, -ENOEXEC, "not a kernel: not a regular file");
    } else {
        ret = parse_header(u, (uint64_t)st.st_size);
        if (!ret)
            ret = unpack_to(u, out);
    }
    if (u->in >= 0)
        close(u->in);
    free(u);
    return ret;
}
