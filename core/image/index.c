/* SPDX-License-Identifier: Apache-2.0 */
/* Reading and checking a layer's index; see index.h. Writing: index_write.c. */
#include "index_format.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "xattr.h"

static int bad(struct sm_image_error *e, const char *what)
{
    return sm_image_fail(e, EBADMSG, "layer index is corrupt (%s)", what);
}

void sm_index_node(const struct sm_index *ix, uint32_t i, struct sm_node *n)
{
    const uint8_t *p = ix->nodes + (size_t)i * NODE_BYTES;

    memset(n, 0, sizeof(*n));
    n->parent = sm_get32(p + N_PARENT);
    n->inode = sm_get32(p + N_INODE);
    n->name = (const char *)ix->strings + sm_get64(p + N_NAME);
    n->name_len = sm_get16(p + N_NAME_LEN);
    n->link_len = sm_get16(p + N_LINK_LEN);
    n->link = (const char *)ix->strings + sm_get64(p + N_NAME) + n->name_len;
    n->kind = p[N_KIND];
    n->flags = p[N_FLAGS];
}

void sm_index_inode(const struct sm_index *ix, uint32_t i, struct sm_inode *n)
{
    const uint8_t *p = ix->inodes + (size_t)i * INODE_BYTES;

    memset(n, 0, sizeof(*n));
    n->mode = sm_get16(p + I_MODE);
    n->uid = sm_get32(p + I_UID);
    n->gid = sm_get32(p + I_GID);
    n->mtime_s = (int64_t)sm_get64(p + I_MTIME);
    n->mtime_ns = sm_get32(p + I_MTIME_NS);
    n->rdev_major = sm_get32(p + I_MAJOR);
    n->rdev_minor = sm_get32(p + I_MINOR);
    n->size_bytes = sm_get64(p + I_SIZE);
    n->data = sm_get64(p + I_DATA);
    n->target_len = S_ISLNK(n->mode) ? (uint32_t)n->size_bytes : 0;
    n->xattr_bytes = sm_get32(p + I_XATTR_BYTES);
    n->target = (const char *)ix->strings + sm_get64(p + I_STRINGS);
    n->xattrs = ix->strings + sm_get64(p + I_STRINGS) + n->target_len;
}

static bool in_strings(const struct sm_index *ix, uint64_t at, uint64_t len)
{
    return at <= ix->strings_bytes && len <= ix->strings_bytes - at;
}

static int check_xattrs(const struct sm_inode *n)
{
    struct sm_xattr x;
    size_t pos = 0;
    int ret;

    do
        ret = sm_xattr_next(n->xattrs, n->xattr_bytes, &pos, &x);
    while (ret == 1);
    return ret;
}

static int check_inode(const struct sm_index *ix, uint32_t i, struct sm_image_error *e)
{
    const uint8_t *p = ix->inodes + (size_t)i * INODE_BYTES;
    struct sm_inode n;
    uint64_t len;

    /* Ranges first: not even a pointer may be made from a bad offset. */
    len = S_ISLNK(sm_get16(p + I_MODE)) ? sm_get64(p + I_SIZE) : 0;
    if (len > SM_IMAGE_PATH_MAX || sm_get32(p + I_XATTR_BYTES) > SM_XATTR_LIST_MAX ||
        !in_strings(ix, sm_get64(p + I_STRINGS), len + sm_get32(p + I_XATTR_BYTES)))
        return bad(e, "strings of an inode");
    sm_index_inode(ix, i, &n);
    if (n.mtime_ns >= 1000000000u || n.rdev_major > 0xfff || n.rdev_minor > 0xfffff)
        return bad(e, "attributes of an inode");
    if (S_ISLNK(n.mode) && (!len || memchr(n.target, 0, len)))
        return bad(e, "target of a symbolic link");
    if (check_xattrs(&n) < 0)
        return bad(e, "extended attributes");
    switch (n.mode & S_IFMT) {
    case S_IFREG:
        if (n.data % SM_IMAGE_BLOCK || n.data > ix->data_bytes ||
            n.size_bytes > ix->data_bytes - n.data)
            return bad(e, "position of a file's data");
        return 0;
    case S_IFDIR:
    case S_IFCHR:
    case S_IFBLK:
    case S_IFIFO:
    case S_IFSOCK:
        return n.size_bytes ? bad(e, "size of an inode without data") : 0;
    case S_IFLNK:
        return 0;
    default:
        return bad(e, "type of an inode");
    }
}

static bool is_plain_name(const char *s, size_t len)
{
    if (!len || len > SM_IMAGE_NAME_MAX || memchr(s, 0, len) || memchr(s, '/', len))
        return false;
    return !(s[0] == '.' && (len == 1 || (len == 2 && s[1] == '.')));
}

static bool is_dir_node(const struct sm_index *ix, uint32_t i)
{
    struct sm_inode inode;
    struct sm_node n;

    sm_index_node(ix, i, &n);
    if (n.kind != SM_NODE_INODE)
        return n.kind == SM_NODE_IMPLICIT || n.kind == SM_NODE_PHANTOM;
    sm_index_inode(ix, n.inode, &inode);
    return S_ISDIR(inode.mode);
}

/* Relies on check_inode having passed and on the nodes before i. */
static int check_node(const struct sm_index *ix, uint32_t i, uint8_t *seen,
                      struct sm_image_error *e)
{
    const uint8_t *p = ix->nodes + (size_t)i * NODE_BYTES;
    struct sm_node n;

    if (sm_get16(p + N_LINK_LEN) > SM_IMAGE_PATH_MAX ||
        !in_strings(ix, sm_get64(p + N_NAME),
                    (uint64_t)sm_get16(p + N_NAME_LEN) + sm_get16(p + N_LINK_LEN)))
        return bad(e, "strings of a name");
    sm_index_node(ix, i, &n);
    if (n.kind < SM_NODE_INODE || n.kind > SM_NODE_LINK ||
        n.flags & ~(SM_NODE_HIDES | SM_NODE_OPAQUE))
        return bad(e, "kind of a name");
    if ((n.kind == SM_NODE_INODE) != (n.inode < ix->n_inodes))
        return bad(e, "inode of a name");
    if ((n.kind == SM_NODE_LINK) != (n.link_len != 0) ||
        (n.link_len && memchr(n.link, 0, n.link_len)))
        return bad(e, "hard link");
    if (n.kind == SM_NODE_INODE && is_dir_node(ix, i) && seen[n.inode]++)
        return bad(e, "a directory with two names");
    if (i == 0)
        return n.name_len || n.parent || !is_dir_node(ix, 0) ? bad(e, "root") : 0;
    if (n.parent >= i || !is_dir_node(ix, n.parent))
        return bad(e, "parent of a name");
    return is_plain_name(n.name, n.name_len) ? 0 : bad(e, "name");
}

static int check_entries(const struct sm_index *ix, struct sm_image_error *e)
{
    uint8_t *seen = calloc(ix->n_inodes + 1u, 1);
    int ret = seen ? 0 : sm_image_fail(e, ENOMEM, "out of memory");

    for (uint32_t i = 0; ret == 0 && i < ix->n_inodes; i++)
        ret = check_inode(ix, i, e);
    for (uint32_t i = 0; ret == 0 && i < ix->n_nodes; i++)
        ret = check_node(ix, i, seen, e);
    free(seen);
    return ret;
}

static int parse(struct sm_index *ix, size_t len, bool check_sum, struct sm_image_error *e)
{
    const uint8_t *h = ix->file;
    uint64_t want;
    uint32_t id_len;

    if (len < HEADER_BYTES || memcmp(h, INDEX_MAGIC, 8))
        return sm_image_fail(e, EBADMSG, "not a layer index");
    if (sm_get32(h + H_VERSION) != INDEX_VERSION)
        return sm_image_fail(e, EPROTONOSUPPORT, "layer index has version %u, not %u",
                             sm_get32(h + H_VERSION), INDEX_VERSION);
    ix->n_nodes = sm_get32(h + H_NODES);
    ix->n_inodes = sm_get32(h + H_INODES);
    ix->strings_bytes = sm_get64(h + H_STRINGS);
    ix->data_bytes = sm_get64(h + H_DATA);
    id_len = sm_get32(h + H_ID_BYTES);
    /* Counts are 32 bits and sizes bounded by len, so nothing here wraps. */
    if (ix->strings_bytes > len || id_len >= SM_DIGEST_TEXT || !ix->n_nodes ||
        ix->n_inodes == SM_TREE_NONE)
        return bad(e, "header");
    want = HEADER_BYTES + ID_BYTES + (uint64_t)ix->n_nodes * NODE_BYTES +
           (uint64_t)ix->n_inodes * INODE_BYTES + ix->strings_bytes;
    if (want != len)
        return bad(e, "length");
    if (ix->data_bytes % SM_IMAGE_PAD || ix->data_bytes >> 44)
        return bad(e, "data length");
    if (check_sum && sm_index_sum(h, len) != sm_get32(h + H_SUM))
        return bad(e, "checksum");
    memcpy(ix->diff_id, h + HEADER_BYTES, id_len);
    if (sm_digest_parse(ix->diff_id) == SM_DIGEST_NONE)
        return bad(e, "diffID");
    ix->nodes = h + HEADER_BYTES + ID_BYTES;
    ix->inodes = ix->nodes + (size_t)ix->n_nodes * NODE_BYTES;
    ix->strings = ix->inodes + (size_t)ix->n_inodes * INODE_BYTES;
    return check_entries(ix, e);
}

int sm_index_parse(struct sm_index *ix, uint8_t *file, size_t len, bool check_sum,
                   struct sm_image_error *e)
{
    int ret;

    memset(ix, 0, sizeof(*ix));
    ix->file = file;
    ret = parse(ix, len, check_sum, e);
    if (ret < 0)
        sm_index_close(ix);
    return ret;
}

int sm_index_load(struct sm_index *ix, const char *path, struct sm_image_error *e)
{
    uint8_t *file;
    size_t len;
    int ret = sm_image_read_file(path, INDEX_BYTES_MAX, &file, &len, e);

    memset(ix, 0, sizeof(*ix));
    if (ret == 0)
        ret = sm_index_parse(ix, file, len, true, e);
    return ret < 0 ? sm_image_wrap(e, ret, "%s", path) : 0;
}

void sm_index_close(struct sm_index *ix)
{
    free(ix->file);
    memset(ix, 0, sizeof(*ix));
}
