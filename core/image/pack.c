/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A folder as the tar of a layer; see archive.h. fts gives the entries sorted
 * and without following links, libarchive their metadata and the pax format.
 */
#include <errno.h>
#include <fcntl.h>
#include <fts.h>
#include <locale.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <archive.h>
#include <archive_entry.h>

#include "archive.h"

#define BUF_BYTES (256u << 10)

struct pack {
    struct archive *disk, *tar;
    struct archive_entry_linkresolver *links;
    struct sm_digest digest;
    struct sm_pack_result *r;
    struct sm_image_progress *p;
    int fd;
    int err; /* of a failed write */
    size_t prefix; /* length of the folder's own path */
    uint8_t buf[BUF_BYTES];
};

static la_ssize_t write_out(struct archive *a, void *arg, const void *buf, size_t len)
{
    struct pack *k = arg;
    int ret = sm_image_write_all(k->fd, buf, len, k->r->bytes);

    if (ret == 0 && sm_digest_update(&k->digest, buf, len) < 0)
        ret = -EIO;
    if (ret < 0) {
        k->err = ret;
        archive_set_error(a, -ret, "%s", strerror(-ret));
        return -1;
    }
    k->r->bytes += len;
    if (k->p)
        atomic_store(&k->p->now_bytes, k->r->bytes);
    return (la_ssize_t)len;
}

static int tar_failed(struct pack *k, const char *path, struct sm_image_error *e)
{
    const char *text = archive_error_string(k->tar);

    if (k->err)
        return sm_image_fail(e, -k->err, "writing: %s", strerror(-k->err));
    return sm_image_fail(e, EINVAL, "%s: %s", sm_image_quote(path, strlen(path)).text,
                         text ? text : "cannot be packed");
}

static int at_path(const char *path, int err, struct sm_image_error *e)
{
    return sm_image_fail(e, err, "%s: %s", sm_image_quote(path, strlen(path)).text,
                         strerror(err));
}

/* A file that shrinks is filled up, one that grows is cut: it is what its
 * header says. */
static int put_data(struct pack *k, const char *path, uint64_t left, struct sm_image_error *e)
{
    int ret = 0, fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);

    if (fd < 0)
        return at_path(path, errno, e);
    while (ret == 0 && left) {
        size_t want = left < BUF_BYTES ? (size_t)left : BUF_BYTES;
        ssize_t n = read(fd, k->buf, want);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            ret = at_path(path, errno, e);
        else if (k->p && atomic_load(&k->p->cancel))
            ret = sm_image_fail(e, ECANCELED, "cancelled");
        if (ret == 0 && n == 0) {
            memset(k->buf, 0, want);
            n = (ssize_t)want;
        }
        if (ret == 0 && archive_write_data(k->tar, k->buf, (size_t)n) < n)
            ret = tar_failed(k, path, e);
        left -= ret == 0 ? (uint64_t)n : 0;
    }
    close(fd);
    return ret;
}

static int put_entry(struct pack *k, const FTSENT *f, struct archive_entry *ae,
                     struct sm_image_error *e)
{
    const char *path = f->fts_path, *name = path + k->prefix;
    struct archive_entry *spare = NULL;
    int ret;

    while (*name == '/')
        name++;
    archive_entry_copy_sourcepath(ae, path);
    archive_entry_copy_pathname(ae, *name ? name : ".");
    ret = archive_read_disk_entry_from_file(k->disk, ae, -1, f->fts_statp);
    if (ret < ARCHIVE_WARN)
        return sm_image_fail(e, EIO, "%s: %s", sm_image_quote(path, strlen(path)).text,
                             archive_error_string(k->disk));
    /* Layers have numbers, not names; flags and access times mean nothing. */
    archive_entry_copy_uname(ae, NULL);
    archive_entry_copy_gname(ae, NULL);
    archive_entry_set_fflags(ae, 0, 0);
    archive_entry_unset_atime(ae);
    archive_entry_unset_ctime(ae);
    archive_entry_unset_birthtime(ae);
    archive_entry_sparse_clear(ae);
    archive_entry_linkify(k->links, &ae, &spare);
    if (!ae)
        return 0;
    if (archive_write_header(k->tar, ae) < ARCHIVE_WARN)
        return tar_failed(k, path, e);
    k->r->entries++;
    if (archive_entry_filetype(ae) == AE_IFREG && !archive_entry_hardlink(ae))
        return put_data(k, path, (uint64_t)archive_entry_size(ae), e);
    return 0;
}

static int visit(struct pack *k, const FTSENT *f, struct sm_image_error *e)
{
    struct archive_entry *ae;
    int ret;

    switch (f->fts_info) {
    case FTS_DP:
        return 0;
    case FTS_DNR:
    case FTS_ERR:
    case FTS_NS:
        return at_path(f->fts_path, f->fts_errno, e);
    case FTS_DC:
        return at_path(f->fts_path, ELOOP, e);
    }
    if (S_ISSOCK(f->fts_statp->st_mode)) {
        k->r->skipped++;
        return 0;
    }
    ae = archive_entry_new();
    if (!ae)
        return sm_image_fail(e, ENOMEM, "out of memory");
    ret = put_entry(k, f, ae, e);
    archive_entry_free(ae);
    return ret;
}

static int by_name(const FTSENT **a, const FTSENT **b)
{
    return strcmp((*a)->fts_name, (*b)->fts_name);
}

static int walk(struct pack *k, const char *dir, struct sm_image_error *e)
{
    char *paths[] = { (char *)dir, NULL };
    FTS *fts = fts_open(paths, FTS_PHYSICAL | FTS_XDEV | FTS_NOCHDIR | FTS_COMFOLLOW, by_name);
    FTSENT *f;
    int ret = 0;

    if (!fts)
        return at_path(dir, errno, e);
    while (ret == 0 && (errno = 0, f = fts_read(fts)))
        ret = visit(k, f, e);
    if (ret == 0 && errno)
        ret = at_path(dir, errno, e);
    fts_close(fts);
    return ret;
}

static int run(struct pack *k, const char *dir, struct sm_image_error *e)
{
    int ret;

    k->disk = archive_read_disk_new();
    k->tar = archive_write_new();
    k->links = archive_entry_linkresolver_new();
    if (!k->disk || !k->tar || !k->links || sm_digest_open(&k->digest, SM_DIGEST_SHA256) < 0)
        return sm_image_fail(e, ENOMEM, "out of memory");
    archive_read_disk_set_symlink_physical(k->disk);
    archive_write_set_format_pax(k->tar);
    archive_write_set_options(k->tar, "xattrheader=SCHILY"); /* as everybody else */
    archive_write_set_bytes_per_block(k->tar, (int)BUF_BYTES);
    archive_write_set_bytes_in_last_block(k->tar, 512);
    archive_entry_linkresolver_set_strategy(k->links, ARCHIVE_FORMAT_TAR);
    if (archive_write_open(k->tar, k, NULL, write_out, NULL) != ARCHIVE_OK)
        return tar_failed(k, dir, e);
    ret = walk(k, dir, e);
    if (ret == 0 && archive_write_close(k->tar) != ARCHIVE_OK)
        ret = tar_failed(k, dir, e);
    if (ret == 0 && sm_digest_text(&k->digest, k->r->digest) < 0)
        ret = sm_image_fail(e, EIO, "hashing failed");
    return ret;
}

static int pack(const char *dir, const char *out, struct pack *k, struct sm_image_error *e)
{
    struct stat st;
    int ret;

    k->prefix = strlen(dir);
    if (stat(dir, &st) < 0)
        return at_path(dir, errno, e);
    if (!S_ISDIR(st.st_mode))
        return at_path(dir, ENOTDIR, e);
    k->fd = open(out, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (k->fd < 0)
        return at_path(out, errno, e);
    ret = run(k, dir, e);
    if (k->tar)
        archive_write_free(k->tar);
    if (k->disk)
        archive_read_free(k->disk);
    if (k->links)
        archive_entry_linkresolver_free(k->links);
    sm_digest_close(&k->digest);
    close(k->fd);
    if (ret < 0)
        unlink(out);
    return ret;
}

int sm_archive_pack(const char *dir, const char *out, struct sm_pack_result *r,
                    struct sm_image_progress *p, struct sm_image_error *e)
{
    locale_t c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0), old;
    struct pack *k = calloc(1, sizeof(*k));
    int ret;

    memset(r, 0, sizeof(*r));
    if (!k || !c_locale) {
        free(k);
        if (c_locale)
            freelocale(c_locale);
        return sm_image_fail(e, ENOMEM, "out of memory");
    }
    k->r = r;
    k->p = p;
    old = uselocale(c_locale);
    ret = pack(dir, out, k, e);
    uselocale(old);
    freelocale(c_locale);
    free(k);
    return ret;
}
