/* SPDX-License-Identifier: Apache-2.0 */
/* A layer's blob into its two files; see layer.h. */
#include "layer.h"

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

#include "entry.h"
#include "index.h"
#include "inflate.h"

#define PLAIN_BYTES (256u << 10)
#define TAR_BLOCK_BYTES 512u

/* The plain bytes on their way to libarchive, hashed as they pass. */
struct plain {
    struct sm_inflate *in;
    struct sm_digest digest;
    uint64_t bytes;
    struct sm_image_error error;
    int err; /* -errno of a failed read; libarchive only knows "failed" */
    bool pad; /* a last block cut short is filled up */
    uint8_t buf[PLAIN_BYTES];
};

struct job {
    const struct sm_layer_config *cfg;
    struct sm_layer_result *result;
    struct sm_layer_build build;
    struct plain *plain;
    int blob, data, index;
    char data_path[PATH_MAX], index_path[PATH_MAX];
};

static long plain_next(struct plain *p)
{
    long n = sm_inflate_read(p->in, p->buf, sizeof(p->buf), &p->error);

    if (n > 0 && sm_digest_update(&p->digest, p->buf, (size_t)n) < 0)
        n = sm_image_fail(&p->error, EIO, "hashing failed");
    if (n < 0)
        p->err = (int)n;
    else
        p->bytes += (uint64_t)n;
    return n;
}

/*
 * Some writers (umoci's `insert` among them) leave out the padding of the last
 * file and the archive's trailer, and Go's readers accept that. libarchive
 * does not, so the missing padding is made up. It hides no truncation: the
 * diffID is over the bytes that came.
 */
static long missing_padding(struct plain *p)
{
    size_t missing = TAR_BLOCK_BYTES - p->bytes % TAR_BLOCK_BYTES;

    if (!p->pad || missing == TAR_BLOCK_BYTES)
        return 0;
    p->pad = false;
    memset(p->buf, 0, missing);
    return (long)missing;
}

static la_ssize_t read_plain(struct archive *a, void *arg, const void **buf)
{
    struct plain *p = arg;
    long n = p->err ? p->err : plain_next(p);

    if (n == 0)
        n = missing_padding(p);
    *buf = p->buf;
    if (n < 0) {
        archive_set_error(a, (int)-n, "%s", p->error.text);
        return ARCHIVE_FATAL;
    }
    return n;
}

static int archive_failed(struct job *j, struct archive *a, struct sm_image_error *e)
{
    const char *text = archive_error_string(a);

    if (j->plain->err) {
        *e = j->plain->error;
        return j->plain->err;
    }
    return sm_image_fail(e, EBADMSG, "not a tar archive: %s", text ? text : "unreadable");
}

static int read_entries(struct job *j, struct archive *a, struct sm_image_error *e)
{
    for (;;) {
        struct archive_entry *ae;
        int ret = archive_read_next_header(a, &ae);

        if (ret == ARCHIVE_EOF)
            return 0;
        /* A warning is about a name's character set; the bytes are right. */
        if (ret < ARCHIVE_WARN)
            return archive_failed(j, a, e);
        ret = sm_entry_add(&j->build, a, ae, e);
        if (ret < 0 && j->plain->err) {
            *e = j->plain->error;
            return j->plain->err;
        }
        if (ret < 0)
            return ret;
    }
}

static int read_archive(struct job *j, struct sm_image_error *e)
{
    struct archive *a = archive_read_new();
    int ret;

    if (!a)
        return sm_image_fail(e, ENOMEM, "out of memory");
    archive_read_support_format_tar(a);
    archive_read_support_format_empty(a);
    archive_read_set_format_option(a, "tar", "mac-ext", NULL);
    if (archive_read_open(a, j->plain, NULL, read_plain, NULL) != ARCHIVE_OK)
        ret = archive_failed(j, a, e);
    else
        ret = read_entries(j, a, e);
    archive_read_free(a);
    return ret;
}

/* What follows the archive's end still belongs to the diffID. */
static int drain(struct job *j, struct sm_image_error *e)
{
    long n;

    do
        n = plain_next(j->plain);
    while (n > 0);
    if (n < 0)
        *e = j->plain->error;
    return (int)n;
}

static int check_diff_id(struct job *j, struct sm_image_error *e)
{
    struct sm_layer_result *r = j->result;
    const char *want = j->cfg->diff_id;

    if (sm_digest_text(&j->plain->digest, r->diff_id) < 0)
        return sm_image_fail(e, EIO, "hashing failed");
    if (want && strcmp(want, r->diff_id))
        return sm_image_fail(e, EBADMSG, "diffID is %s, the image says %s", r->diff_id, want);
    return 0;
}

static int sync_file(int fd, const char *what, struct sm_image_error *e)
{
    if (fsync(fd) < 0)
        return sm_image_fail(e, errno, "writing %s: %s", what, strerror(errno));
    return 0;
}

static int finish(struct job *j, struct sm_image_error *e)
{
    struct sm_layer_build *b = &j->build;
    struct sm_layer_result *r = j->result;
    int ret = sm_entry_finish(b, e);

    if (ret < 0)
        return ret;
    ret = sm_blob_finish(&b->blob, &r->data_bytes);
    if (ret < 0)
        return sm_image_fail(e, -ret, "writing data: %s", strerror(-ret));
    ret = sm_index_write(&b->tree, r->diff_id, r->data_bytes, j->index, &r->inodes, e);
    if (ret == 0)
        ret = sync_file(j->data, "data", e);
    if (ret == 0)
        ret = sync_file(j->index, "the index", e);
    r->format = sm_inflate_format(j->plain->in);
    r->tar_bytes = j->plain->bytes;
    r->entries = b->entries;
    r->ignored = b->ignored;
    return ret;
}

static int ingest(struct job *j, struct sm_image_error *e)
{
    int ret = read_archive(j, e);

    if (ret == 0)
        ret = drain(j, e);
    if (ret == 0)
        ret = check_diff_id(j, e);
    if (ret == 0)
        ret = finish(j, e);
    return ret;
}

static int create(const char *path, int *fd, struct sm_image_error *e)
{
    *fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (*fd < 0)
        return sm_image_fail(e, errno, "%s: %s", path, strerror(errno));
    return 0;
}

static int open_files(struct job *j, struct sm_image_error *e)
{
    const char *out = j->cfg->out;
    struct stat st;
    int ret;

    if (snprintf(j->data_path, PATH_MAX, "%s/data", out) >= PATH_MAX ||
        snprintf(j->index_path, PATH_MAX, "%s/index", out) >= PATH_MAX)
        return sm_image_fail(e, ENAMETOOLONG, "output path is too long");
    j->blob = open(j->cfg->blob, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (j->blob < 0 || fstat(j->blob, &st) < 0)
        return sm_image_fail(e, errno, "%s: %s", j->cfg->blob, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return sm_image_fail(e, EINVAL, "%s: not a regular file", j->cfg->blob);
    if (j->cfg->progress)
        atomic_store(&j->cfg->progress->total_bytes, (uint64_t)st.st_size);
    ret = create(j->data_path, &j->data, e);
    if (ret == 0)
        ret = create(j->index_path, &j->index, e);
    return ret;
}

static int open_plain(struct job *j, struct sm_image_error *e)
{
    const char *want = j->cfg->diff_id;
    enum sm_digest_kind kind = want ? sm_digest_parse(want) : SM_DIGEST_SHA256;
    int ret;

    if (kind == SM_DIGEST_NONE)
        return sm_image_fail(e, EINVAL, "malformed diffID");
    j->plain = calloc(1, sizeof(*j->plain));
    if (!j->plain)
        return sm_image_fail(e, ENOMEM, "out of memory");
    j->plain->pad = j->cfg->diff_id != NULL;
    if (sm_digest_open(&j->plain->digest, kind) < 0)
        return sm_image_fail(e, ENOMEM, "hashing is not available");
    ret = sm_inflate_open(&j->plain->in, j->blob, j->build.limits.ratio, j->cfg->progress, e);
    return ret;
}

static void close_all(struct job *j, bool failed)
{
    if (j->plain) {
        sm_inflate_close(j->plain->in);
        sm_digest_close(&j->plain->digest);
        free(j->plain);
    }
    if (j->index >= 0) {
        close(j->index);
        if (failed)
            unlink(j->index_path);
    }
    if (j->data >= 0) {
        close(j->data);
        if (failed)
            unlink(j->data_path);
    }
    if (j->blob >= 0)
        close(j->blob);
    sm_blob_close(&j->build.blob);
    sm_tree_close(&j->build.tree);
}

static int run(struct job *j, struct sm_image_error *e)
{
    struct sm_layer_build *b = &j->build;
    int ret = open_files(j, e);

    if (ret == 0)
        ret = open_plain(j, e);
    if (ret < 0)
        return ret;
    if (sm_tree_open(&b->tree, b->limits.entries, b->limits.depth) < 0 ||
        sm_blob_open(&b->blob, j->data) < 0)
        return sm_image_fail(e, ENOMEM, "out of memory");
    return ingest(j, e);
}

int sm_layer_ingest(const struct sm_layer_config *cfg, struct sm_layer_result *r,
                    struct sm_image_error *e)
{
    locale_t c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0), old;
    struct job *j = calloc(1, sizeof(*j));
    int ret;

    memset(r, 0, sizeof(*r));
    if (!j || !c_locale) {
        free(j);
        if (c_locale)
            freelocale(c_locale);
        return sm_image_fail(e, ENOMEM, "out of memory");
    }
    j->cfg = cfg;
    j->result = r;
    j->blob = j->data = j->index = -1;
    j->build.limits = cfg->limits;
    sm_image_limits_default(&j->build.limits);
    /* In any other locale libarchive converts and normalises UTF-8 names. */
    old = uselocale(c_locale);
    ret = run(j, e);
    uselocale(old);
    freelocale(c_locale);
    close_all(j, ret < 0);
    free(j);
    return ret;
}
