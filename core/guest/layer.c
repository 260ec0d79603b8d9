/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the root's writable layer holds, as the tar of an image layer: the
 * upper folder of the overlay, its marks told in the words of image-spec
 * (layer.md): a character device 0/0 is a whiteout `.wh.NAME`, an opaque folder
 * holds `.wh..wh..opq`. Written to standard output by a child of the agent,
 * which has gone back to the initramfs, where the upper folder can be seen.
 *
 * ustar with pax records for what does not fit: long names, large numbers,
 * fractions of seconds, extended attributes. Entries in the order of their
 * names. Left out: sockets, the overlay's own attributes, and the files of /etc
 * that the agent writes into every guest. A file that changes while it is
 * read is cut or filled up to the size in its header.
 */
#include "agent.h"
#include "kabi.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#define UPPER "/.sm/upper/upper"
#define TAR_BLOCK 512u
#define BUF_BYTES 65536u
#define PAX_BYTES (256u << 10)
#define DEPTH_MAX 1000

struct link {
    dev_t dev;
    ino_t ino;
    char *path;
};

struct layer {
    uint8_t buf[BUF_BYTES];
    size_t used;
    char path[PATH_MAX]; /* of the entry at hand, without a leading slash */
    size_t path_len;
    char pax[PAX_BYTES];
    size_t pax_len;
    struct link *links; /* files with more than one name, seen so far */
    size_t link_count;
};

static int flush(struct layer *l)
{
    size_t at = 0;
    while (at < l->used) {
        ssize_t n = write(1, l->buf + at, l->used - at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        at += (size_t)n;
    }
    l->used = 0;
    return 0;
}

static int put(struct layer *l, const void *data, size_t len)
{
    const uint8_t *p = data;
    while (len > 0) {
        size_t n = BUF_BYTES - l->used;
        if (n > len)
            n = len;
        memcpy(l->buf + l->used, p, n);
        l->used += n;
        p += n;
        len -= n;
        int rc = l->used == BUF_BYTES ? flush(l) : 0;
        if (rc)
            return rc;
    }
    return 0;
}

static int put_padding(struct layer *l, uint64_t bytes)
{
    static const uint8_t zeros[TAR_BLOCK];
    return put(l, zeros, (size_t)(-bytes & (TAR_BLOCK - 1)));
}

/* "LEN KEY=VALUE\n", where LEN counts itself. */
static int pax_add(struct layer *l, const char *key, const void *value, size_t len)
{
    size_t rest = strlen(key) + len + 3, total = rest + 1;
    char digits[24];
    while (total != rest + (size_t)snprintf(digits, sizeof(digits), "%zu", total))
        total = rest + strlen(digits);
    if (l->pax_len + total > PAX_BYTES)
        return -E2BIG;
    char *p = l->pax + l->pax_len;
    p += sprintf(p, "%s %s=", digits, key);
    memcpy(p, value, len);
    p[len] = '\n';
    l->pax_len += total;
    return 0;
}

static int pax_text(struct layer *l, const char *key, const char *text)
{
    return pax_add(l, key, text, strlen(text));
}

/* In octal where it fits, else 0 and a pax record. */
static int number(struct layer *l, char *field, size_t width, uint64_t value, const char *key)
{
    char text[24];
    if (value >> (3 * (width - 1)) == 0) {
        snprintf(text, sizeof(text), "%0*llo", (int)width - 1, (unsigned long long)value);
        memcpy(field, text, width);
        return 0;
    }
    memset(field, '0', width - 1);
    field[width - 1] = 0;
    if (!key)
        return -EOVERFLOW;
    snprintf(text, sizeof(text), "%llu", (unsigned long long)value);
    return pax_text(l, key, text);
}

static int name(struct layer *l, char *field, size_t width, const char *text, const char *key)
{
    size_t len = strlen(text);
    memcpy(field, text, len < width ? len : width);
    return len <= width ? 0 : pax_text(l, key, text);
}

struct header {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], sum[8], type, link[100];
    char magic[8], uname[32], gname[32], major[8], minor[8], prefix[155], pad[12];
};

static int put_header(struct layer *l, struct header *h)
{
    unsigned sum = 0;
    memcpy(h->magic, "ustar\00000", 8);
    memset(h->sum, ' ', sizeof(h->sum));
    for (size_t i = 0; i < sizeof(*h); i++)
        sum += ((const uint8_t *)h)[i];
    snprintf(h->sum, sizeof(h->sum), "%06o", sum);
    return put(l, h, sizeof(*h));
}

/* The records gathered for the entry that follows. */
static int put_pax(struct layer *l)
{
    struct header h = { .type = 'x' };
    int rc = 0;
    if (!l->pax_len)
        return 0;
    strcpy(h.name, "pax");
    number(l, h.mode, sizeof(h.mode), 0644, NULL);
    number(l, h.uid, sizeof(h.uid), 0, NULL);
    number(l, h.gid, sizeof(h.gid), 0, NULL);
    number(l, h.mtime, sizeof(h.mtime), 0, NULL);
    number(l, h.size, sizeof(h.size), l->pax_len, NULL);
    rc = put_header(l, &h);
    if (rc == 0)
        rc = put(l, l->pax, l->pax_len);
    if (rc == 0)
        rc = put_padding(l, l->pax_len);
    return rc;
}

static int add_xattrs(struct layer *l, const char *at)
{
    char list[65536], value[65536], key[300];
    ssize_t n = llistxattr(at, list, sizeof(list));
    if (n < 0)
        return errno == ENOTSUP ? 0 : -errno;
    for (char *p = list; p < list + n; p += strlen(p) + 1) {
        if (!strncmp(p, "trusted.overlay.", 16))
            continue;
        ssize_t len = lgetxattr(at, p, value, sizeof(value));
        if (len < 0)
            return -errno;
        snprintf(key, sizeof(key), "SCHILY.xattr.%.255s", p);
        int rc = pax_add(l, key, value, (size_t)len);
        if (rc)
            return rc;
    }
    return 0;
}

static bool is_opaque(const char *at)
{
    char value[4];
    return lgetxattr(at, "trusted.overlay.opaque", value, sizeof(value)) == 1 && value[0] == 'y';
}

static bool is_whiteout(const struct stat *st)
{
    return S_ISCHR(st->st_mode) && st->st_rdev == 0;
}

/* An empty file that is a mark for the layers below. */
static int put_mark(struct layer *l, const char *prefix, const char *mark)
{
    struct header h = { .type = '0' };
    char path[PATH_MAX + 16];
    snprintf(path, sizeof(path), "%s%s", prefix, mark);
    l->pax_len = 0;
    int rc = name(l, h.name, sizeof(h.name), path, "path");
    number(l, h.mode, sizeof(h.mode), 0644, NULL);
    number(l, h.uid, sizeof(h.uid), 0, NULL);
    number(l, h.gid, sizeof(h.gid), 0, NULL);
    number(l, h.mtime, sizeof(h.mtime), 0, NULL);
    number(l, h.size, sizeof(h.size), 0, NULL);
    if (rc == 0)
        rc = put_pax(l);
    return rc ? rc : put_header(l, &h);
}

/* The name this file went by before, or NULL; then it is remembered. */
static int known_link(struct layer *l, const struct stat *st, const char **out)
{
    *out = NULL;
    if (st->st_nlink < 2 || S_ISDIR(st->st_mode))
        return 0;
    for (size_t i = 0; i < l->link_count; i++)
        if (l->links[i].ino == st->st_ino && l->links[i].dev == st->st_dev) {
            *out = l->links[i].path;
            return 0;
        }
    if ((l->link_count & (l->link_count - 1)) == 0) {
        size_t cap = l->link_count ? l->link_count * 2 : 1;
        struct link *grown = realloc(l->links, cap * sizeof(*grown));
        if (!grown)
            return -ENOMEM;
        l->links = grown;
    }
    char *path = strdup(l->path);
    if (!path)
        return -ENOMEM;
    l->links[l->link_count++] = (struct link){ st->st_dev, st->st_ino, path };
    return 0;
}

static int put_data(struct layer *l, const char *at, uint64_t size)
{
    uint64_t left = size;
    int rc = 0, fd = open(at, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NOATIME);
    if (fd < 0)
        return -errno;
    while (rc == 0 && left > 0) {
        uint8_t piece[16384];
        size_t want = left < sizeof(piece) ? (size_t)left : sizeof(piece);
        ssize_t n = read(fd, piece, want);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            rc = -errno;
            break;
        }
        if (n == 0) {
            memset(piece, 0, want);
            n = (ssize_t)want;
        }
        rc = put(l, piece, (size_t)n);
        left -= (uint64_t)n;
    }
    close(fd);
    return rc ? rc : put_padding(l, size);
}

static char typeflag(mode_t mode)
{
    switch (mode & S_IFMT) {
    case S_IFDIR: return '5';
    case S_IFLNK: return '2';
    case S_IFCHR: return '3';
    case S_IFBLK: return '4';
    case S_IFIFO: return '6';
    default: return '0';
    }
}

static int fill(struct layer *l, struct header *h, const char *at, const struct stat *st,
                const char *link)
{
    char target[PATH_MAX] = "", time[48];
    bool data = h->type == '0';
    int rc = number(l, h->mode, sizeof(h->mode), st->st_mode & 07777, NULL);
    if (rc == 0)
        rc = number(l, h->uid, sizeof(h->uid), st->st_uid, "uid");
    if (rc == 0)
        rc = number(l, h->gid, sizeof(h->gid), st->st_gid, "gid");
    if (rc == 0)
        rc = number(l, h->size, sizeof(h->size), data ? (uint64_t)st->st_size : 0, "size");
    if (rc == 0)
        rc = number(l, h->major, sizeof(h->major), major(st->st_rdev), NULL);
    if (rc == 0)
        rc = number(l, h->minor, sizeof(h->minor), minor(st->st_rdev), NULL);
    number(l, h->mtime, sizeof(h->mtime), 0, NULL);
    snprintf(time, sizeof(time), "%lld.%09ld", (long long)st->st_mtim.tv_sec, st->st_mtim.tv_nsec);
    if (rc == 0)
        rc = pax_text(l, "mtime", time);
    if (rc == 0 && h->type == '2') {
        ssize_t n = readlink(at, target, sizeof(target) - 1);
        if (n < 0)
            return -errno;
        target[n] = 0;
        link = target;
    }
    if (rc == 0 && link)
        rc = name(l, h->link, sizeof(h->link), link, "linkpath");
    if (rc == 0 && h->type != '1')
        rc = add_xattrs(l, at);
    return rc;
}

static int put_entry(struct layer *l, const char *at, const struct stat *st)
{
    const char *link;
    struct header h = { .type = typeflag(st->st_mode) };
    char path[PATH_MAX + 2];
    int rc = known_link(l, st, &link);
    if (rc)
        return rc;
    if (link)
        h.type = '1';
    snprintf(path, sizeof(path), "%s%s", l->path_len ? l->path : ".", S_ISDIR(st->st_mode) ? "/" : "");
    l->pax_len = 0;
    rc = name(l, h.name, sizeof(h.name), path, "path");
    if (rc == 0)
        rc = fill(l, &h, at, st, link);
    if (rc == 0)
        rc = put_pax(l);
    if (rc == 0)
        rc = put_header(l, &h);
    if (rc == 0 && h.type == '0')
        rc = put_data(l, at, (uint64_t)st->st_size);
    if (rc == 0 && S_ISDIR(st->st_mode) && is_opaque(at))
        rc = put_mark(l, l->path_len ? path : "", ".wh..wh..opq");
    return rc;
}

/* Files of /etc that each guest gets from its agent (setup.c). */
static bool is_ours(const char *path)
{
    static const char *const ours[] = { "etc/hostname", "etc/hosts", "etc/resolv.conf", "etc/mtab" };
    for (size_t i = 0; i < sizeof(ours) / sizeof(ours[0]); i++)
        if (!strcmp(path, ours[i]))
            return true;
    return false;
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

static int is_entry(const struct dirent *e)
{
    return strcmp(e->d_name, ".") && strcmp(e->d_name, "..");
}

static int put_folder(struct layer *l, unsigned depth);

/* The entry that l->path names; the working directory is its parent. */
static int put_child(struct layer *l, const char *at, unsigned depth)
{
    struct stat st;
    if (is_ours(l->path))
        return 0;
    if (lstat(at, &st) < 0)
        return errno == ENOENT ? 0 : -errno; /* gone meanwhile */
    if (is_whiteout(&st)) {
        char parent[PATH_MAX];
        size_t len = l->path_len - strlen(at);
        memcpy(parent, l->path, len);
        parent[len] = 0;
        char mark[NAME_MAX + 8];
        snprintf(mark, sizeof(mark), ".wh.%s", at);
        return put_mark(l, parent, mark);
    }
    if (S_ISSOCK(st.st_mode))
        return 0;
    int rc = put_entry(l, at, &st);
    if (rc || !S_ISDIR(st.st_mode))
        return rc;
    if (depth == DEPTH_MAX)
        return -ELOOP;
    if (chdir(at) < 0)
        return -errno;
    rc = put_folder(l, depth + 1);
    return rc ? rc : chdir("..") < 0 ? -errno : 0;
}

static int put_folder(struct layer *l, unsigned depth)
{
    struct dirent **list;
    size_t base = l->path_len;
    int rc = 0, n = scandir(".", &list, is_entry, by_name);
    if (n < 0)
        return -errno;
    for (int i = 0; i < n; i++) {
        size_t len = strlen(list[i]->d_name);
        if (rc == 0 && base + len + 2 > sizeof(l->path)) {
            rc = -ENAMETOOLONG;
        } else if (rc == 0) {
            l->path_len = base;
            if (base)
                l->path[l->path_len++] = '/';
            memcpy(l->path + l->path_len, list[i]->d_name, len + 1);
            l->path_len += len;
            rc = put_child(l, list[i]->d_name, depth);
        }
        free(list[i]);
    }
    free(list);
    if (rc == 0) {
        l->path_len = base;
        l->path[base] = 0;
    }
    return rc;
}

/* chroot(".") on the descriptor of the initramfs's root leads below the overlay
 * that was moved over it. */
static int enter_upper(struct sm_agent *a, const char *folder)
{
    if (!a->vm)
        return folder && chdir(folder) == 0 ? 0 : -errno;
    if (!a->lower)
        return -EINVAL;
    if (a->old_root < 0 || fchdir(a->old_root) < 0 || chroot(".") < 0 || chdir(UPPER) < 0)
        return -errno;
    return 0;
}

int sm_layer_write(struct sm_agent *a, const char *folder)
{
    static const uint8_t end[2 * TAR_BLOCK];
    struct layer *l = calloc(1, sizeof(*l));
    struct stat st;
    int rc = l ? enter_upper(a, folder) : -ENOMEM;
    /* The root's own mode and owner may be part of the change. */
    if (rc == 0)
        rc = lstat(".", &st) < 0 ? -errno : put_entry(l, ".", &st);
    if (rc == 0)
        rc = put_folder(l, 0);
    if (rc == 0)
        rc = put(l, end, sizeof(end));
    if (rc == 0)
        rc = flush(l);
    if (rc)
        dprintf(2, "%s: %s\n", l && l->path_len ? l->path : "the writable layer", strerror(-rc));
    return rc;
}
