/* SPDX-License-Identifier: Apache-2.0 */
/* Unpacking archives of images; see archive.h. */
#include "archive.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <archive.h>
#include <archive_entry.h>

#include "inflate.h"

#define PLAIN_BYTES (256u << 10)

struct unpack {
    const struct sm_archive_config *cfg;
    struct sm_archive_result *r;
    struct sm_image_limits limits;
    struct sm_inflate *in;
    struct sm_image_error error; /* of a failed read */
    int err;
    int fd;
    uint32_t capacity;
    uint64_t bytes;
    uint8_t buf[PLAIN_BYTES];
};

static la_ssize_t read_plain(struct archive *a, void *arg, const void **buf)
{
    struct unpack *u = arg;
    long n = u->err ? u->err : sm_inflate_read(u->in, u->buf, sizeof(u->buf), &u->error);

    *buf = u->buf;
    if (n < 0) {
        u->err = (int)n;
        archive_set_error(a, (int)-n, "%s", u->error.text);
        return ARCHIVE_FATAL;
    }
    return n;
}

static int archive_failed(struct unpack *u, struct archive *a, struct sm_image_error *e)
{
    const char *text = archive_error_string(a);

    if (u->err) {
        *e = u->error;
        return u->err;
    }
    return sm_image_fail(e, EBADMSG, "not a tar archive: %s", text ? text : "unreadable");
}

static int new_entry(struct unpack *u, struct sm_archive_entry **out, struct sm_image_error *e)
{
    struct sm_archive_result *r = u->r;

    if (r->count == SM_ARCHIVE_ENTRIES_MAX)
        return sm_image_fail(e, EFBIG, "more than %u entries", SM_ARCHIVE_ENTRIES_MAX);
    if (r->count == u->capacity) {
        uint32_t cap = u->capacity ? u->capacity * 2 : 64;
        struct sm_archive_entry *grown = realloc(r->entries, cap * sizeof(*grown));

        if (!grown)
            return sm_image_fail(e, ENOMEM, "out of memory");
        r->entries = grown;
        u->capacity = cap;
    }
    *out = &r->entries[r->count];
    memset(*out, 0, sizeof(**out));
    (*out)->file = r->count++;
    return 0;
}

static int copy_name(char **to, const char *from, struct sm_image_error *e)
{
    if (strlen(from) > SM_IMAGE_PATH_MAX)
        return sm_image_fail(e, ENAMETOOLONG, "a name of more than %u bytes", SM_IMAGE_PATH_MAX);
    *to = strdup(from);
    return *to ? 0 : sm_image_fail(e, ENOMEM, "out of memory");
}

/* A sparse entry's holes are hashed as the zeros they stand for. */
static int hash_hole(struct sm_digest *d, uint64_t bytes)
{
    static const uint8_t zeros[4096];
    int ret = 0;

    while (ret == 0 && bytes) {
        size_t n = bytes < sizeof(zeros) ? (size_t)bytes : sizeof(zeros);

        ret = sm_digest_update(d, zeros, n);
        bytes -= n;
    }
    return ret;
}

static int copy_data(struct unpack *u, struct archive *a, int fd, struct sm_archive_entry *entry,
                     struct sm_digest *d, struct sm_image_error *e)
{
    uint64_t at = 0;

    for (;;) {
        const void *data;
        size_t len;
        la_int64_t offset;
        int ret = archive_read_data_block(a, &data, &len, &offset);

        if (ret == ARCHIVE_EOF)
            break;
        if (ret < ARCHIVE_WARN)
            return archive_failed(u, a, e);
        if (offset < 0 || (uint64_t)offset < at)
            return sm_image_fail(e, EBADMSG, "not a tar archive: its data overlaps");
        u->bytes += (uint64_t)offset - at + len;
        if (u->bytes > u->limits.bytes)
            return sm_image_fail(e, EFBIG, "more than %llu bytes in files (limit bytes)",
                                 (unsigned long long)u->limits.bytes);
        if (hash_hole(d, (uint64_t)offset - at) < 0 || sm_digest_update(d, data, len) < 0)
            return sm_image_fail(e, EIO, "hashing failed");
        ret = sm_image_write_all(fd, data, len, (uint64_t)offset);
        if (ret < 0)
            return sm_image_fail(e, -ret, "writing: %s", strerror(-ret));
        at = (uint64_t)offset + len;
    }
    entry->bytes = at;
    if (ftruncate(fd, (off_t)at) < 0)
        return sm_image_fail(e, errno, "writing: %s", strerror(errno));
    return 0;
}

static int take_file(struct unpack *u, struct archive *a, struct sm_archive_entry *entry,
                     struct sm_image_error *e)
{
    struct sm_digest d = { 0 };
    char path[PATH_MAX];
    int fd, ret;

    if (snprintf(path, sizeof(path), "%s/%u", u->cfg->out, entry->file) >= (int)sizeof(path))
        return sm_image_fail(e, ENAMETOOLONG, "output path is too long");
    fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return sm_image_fail(e, errno, "%s: %s", path, strerror(errno));
    if (sm_digest_open(&d, SM_DIGEST_SHA256) < 0)
        ret = sm_image_fail(e, ENOMEM, "hashing is not available");
    else
        ret = copy_data(u, a, fd, entry, &d, e);
    if (ret == 0 && sm_digest_text(&d, entry->digest) < 0)
        ret = sm_image_fail(e, EIO, "hashing failed");
    sm_digest_close(&d);
    close(fd);
    return ret;
}

static int take_entry(struct unpack *u, struct archive *a, struct archive_entry *ae,
                      struct sm_image_error *e)
{
    const char *name = archive_entry_pathname(ae), *link = archive_entry_hardlink(ae);
    struct sm_archive_entry *entry = NULL;
    int ret;

    if (!link && archive_entry_filetype(ae) == AE_IFLNK)
        link = archive_entry_symlink(ae);
    if (!name || !name[0] || (!link && archive_entry_filetype(ae) != AE_IFREG))
        return 0; /* folders, and what no image archive holds */
    ret = new_entry(u, &entry, e);
    if (ret == 0)
        ret = copy_name(&entry->name, name, e);
    if (ret == 0 && link)
        ret = copy_name(&entry->link, link, e);
    else if (ret == 0)
        ret = take_file(u, a, entry, e);
    return ret;
}

static int read_entries(struct unpack *u, struct archive *a, struct sm_image_error *e)
{
    for (;;) {
        struct archive_entry *ae;
        int ret = archive_read_next_header(a, &ae);

        if (ret == ARCHIVE_EOF)
            return 0;
        if (ret < ARCHIVE_WARN)
            return archive_failed(u, a, e);
        ret = take_entry(u, a, ae, e);
        if (ret < 0)
            return ret;
    }
}

/* A checksum at the end of a gzip or zstd stream counts as well. */
static int drain(struct unpack *u, struct sm_image_error *e)
{
    long n;

    do
        n = sm_inflate_read(u->in, u->buf, sizeof(u->buf), e);
    while (n > 0);
    return (int)n;
}

static int read_archive(struct unpack *u, struct sm_image_error *e)
{
    struct archive *a = archive_read_new();
    int ret;

    if (!a)
        return sm_image_fail(e, ENOMEM, "out of memory");
    archive_read_support_format_tar(a);
    if (archive_read_open(a, u, NULL, read_plain, NULL) != ARCHIVE_OK)
        ret = archive_failed(u, a, e);
    else
        ret = read_entries(u, a, e);
    archive_read_free(a);
    return ret < 0 ? ret : drain(u, e);
}

static int open_input(struct unpack *u, struct sm_image_error *e)
{
    const char *path = u->cfg->path;
    struct stat st;

    u->fd = strcmp(path, "-") ? open(path, O_RDONLY | O_CLOEXEC)
                              : fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 0);
    if (u->fd < 0 || fstat(u->fd, &st) < 0)
        return sm_image_fail(e, errno, "%s", strerror(errno));
    if (S_ISDIR(st.st_mode))
        return sm_image_fail(e, EISDIR, "a folder, not an archive");
    if (u->cfg->progress && S_ISREG(st.st_mode))
        atomic_store(&u->cfg->progress->total_bytes, (uint64_t)st.st_size);
    return sm_inflate_open(&u->in, u->fd, u->limits.ratio, u->cfg->progress, e);
}

void sm_archive_result_free(struct sm_archive_result *r)
{
    for (uint32_t i = 0; i < r->count; i++) {
        free(r->entries[i].name);
        free(r->entries[i].link);
    }
    free(r->entries);
    memset(r, 0, sizeof(*r));
}

static int run(struct unpack *u, struct sm_image_error *e)
{
    int ret = open_input(u, e);

    if (ret == 0)
        ret = read_archive(u, e);
    sm_inflate_close(u->in);
    if (u->fd >= 0)
        close(u->fd);
    return ret;
}

int sm_archive_unpack(const struct sm_archive_config *cfg, struct sm_archive_result *r,
                      struct sm_image_error *e)
{
    locale_t c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0), old;
    struct unpack *u = calloc(1, sizeof(*u));
    int ret;

    memset(r, 0, sizeof(*r));
    if (!u || !c_locale) {
        free(u);
        if (c_locale)
            freelocale(c_locale);
        return sm_image_fail(e, ENOMEM, "out of memory");
    }
    u->cfg = cfg;
    u->r = r;
    u->fd = -1;
    u->limits = cfg->limits;
    sm_image_limits_default(&u->limits);
    old = uselocale(c_locale);
    ret = run(u, e);
    uselocale(old);
    freelocale(c_locale);
    free(u);
    if (ret < 0)
        sm_archive_result_free(r);
    return ret;
}
