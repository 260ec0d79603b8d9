/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a tar entry means for a layer's tree (image-spec layer.md; the odd cases
 * as containerd and umoci treat them):
 *
 *  - Names are bytes. They are cleaned lexically; ".." stops at the root.
 *  - Parents that are symbolic links of this layer are followed inside the root;
 *    missing parents become implicit directories, which inherit from the lower
 *    layers when merged. A parent that is a file is an error.
 *  - The last entry of a name wins; a directory over a directory only replaces
 *    its attributes, anything else takes the old subtree away.
 *  - ".wh.NAME" is a whiteout whatever its type, ".wh..wh..opq" an opaque mark;
 *    both are kept as marks for the merge, so they touch lower layers only, in
 *    whatever order the tar has them. Under something that is no directory they
 *    mean nothing and are ignored. ".wh.", ".wh.." and ".wh..." are errors.
 *    AUFS's own ".wh..wh.*" names are ignored with what is below them, but hard
 *    links into /.wh..wh.plnk work. Whiteout names as parents are ignored.
 *  - A hard link shares its target's inode; a target that is not in this layer
 *    is looked up in the lower ones at merge time.
 *  - xattrs that EROFS cannot hold, or that would talk to the guest's overlay,
 *    are dropped and counted.
 */
#include "entry.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <archive.h>
#include <archive_entry.h>

#include "index_format.h"
#include "xattr.h"

#define XATTRS_MAX 256
#define PLNK ".wh..wh.plnk"

enum name_class { NAME_PLAIN, NAME_WHITEOUT, NAME_OPAQUE, NAME_IGNORED, NAME_INVALID };

static bool starts(const char *s, const char *prefix)
{
    return !strncmp(s, prefix, strlen(prefix));
}

/* path is clean and not empty. */
static enum name_class classify(const char *path)
{
    const char *last = strrchr(path, '/');

    if (!strcmp(path, PLNK) || starts(path, PLNK "/"))
        return NAME_PLAIN; /* kept, hidden when the layer is finished */
    for (const char *p = path; p && p < last; p = strchr(p, '/') + 1)
        if (starts(p, ".wh."))
            return NAME_IGNORED;
    last = last ? last + 1 : path;
    if (!starts(last, ".wh."))
        return NAME_PLAIN;
    if (!strcmp(last, ".wh..wh..opq"))
        return NAME_OPAQUE;
    if (starts(last, ".wh..wh."))
        return NAME_IGNORED;
    if (!strcmp(last, ".wh.") || !strcmp(last, ".wh..") || !strcmp(last, ".wh..."))
        return NAME_INVALID;
    return NAME_WHITEOUT;
}

static int no_memory(struct sm_image_error *e)
{
    return sm_image_fail(e, ENOMEM, "out of memory");
}

/* Whiteouts and opaque marks. */
static int add_mark(struct sm_layer_build *b, bool opaque, struct sm_image_error *e)
{
    struct sm_walk *w = &b->walk;
    struct sm_tree *t = &b->tree;
    const char *name;
    uint32_t id;
    int ret;

    ret = sm_tree_walk(t, b->path, SM_WALK_PHANTOM, w, e);
    if (ret == -ENOTDIR) {
        b->ignored++;
        return 0;
    }
    if (ret < 0)
        return ret;
    if (opaque) {
        t->nodes[w->parent].flags |= SM_NODE_OPAQUE;
        return 0;
    }
    name = w->name + strlen(".wh.");
    id = sm_tree_lookup(t, w->parent, name, strlen(name));
    if (id == SM_TREE_NONE) {
        name = sm_tree_copy(t, name, strlen(name));
        if (!name)
            return no_memory(e);
        return sm_tree_add(t, w->parent, name, strlen(name), SM_NODE_WHITEOUT, &id, e);
    }
    if (t->nodes[id].kind == SM_NODE_PHANTOM) {
        sm_tree_drop_children(t, id);
        t->nodes[id].kind = SM_NODE_WHITEOUT;
    }
    if (t->nodes[id].kind != SM_NODE_WHITEOUT)
        t->nodes[id].flags |= SM_NODE_HIDES;
    return 0;
}

static int read_xattrs(struct sm_layer_build *b, struct archive_entry *ae, struct sm_xattr *x,
                       size_t *count, struct sm_image_error *e)
{
    const char *name;
    const void *value;
    size_t size, prefix;

    archive_entry_xattr_reset(ae);
    while (archive_entry_xattr_next(ae, &name, &value, &size) == ARCHIVE_OK) {
        size_t len = name ? strlen(name) : 0;

        if (!len || len > UINT16_MAX || sm_xattr_forbidden(name, len) ||
            !sm_xattr_index(name, len, &prefix)) {
            b->ignored++;
            continue;
        }
        if (size > SM_XATTR_VALUE_MAX)
            return sm_image_fail(e, EFBIG, "extended attribute '%s' has %zu bytes, %u allowed",
                                 sm_image_quote(name, len).text, size, SM_XATTR_VALUE_MAX);
        if (*count == XATTRS_MAX)
            return sm_image_fail(e, EFBIG, "more than %d extended attributes", XATTRS_MAX);
        x[(*count)++] = (struct sm_xattr){ name, value, (uint16_t)len, (uint16_t)size };
    }
    *count = sm_xattr_sort(x, *count);
    return 0;
}

static int set_xattrs(struct sm_layer_build *b, struct archive_entry *ae, struct sm_inode *inode,
                      struct sm_image_error *e)
{
    struct sm_xattr x[XATTRS_MAX];
    size_t n = 0, bytes;
    uint8_t *packed;
    int ret;

    if (!archive_entry_xattr_count(ae))
        return 0;
    ret = read_xattrs(b, ae, x, &n, e);
    if (ret < 0)
        return ret;
    bytes = sm_xattr_packed_bytes(x, n);
    if (bytes > SM_XATTR_LIST_MAX)
        return sm_image_fail(e, EFBIG, "extended attributes have %zu bytes, %u allowed", bytes,
                             SM_XATTR_LIST_MAX);
    b->xattr_bytes += bytes;
    if (b->xattr_bytes > b->limits.xattr_bytes)
        return sm_image_fail(e, EFBIG,
                             "more than %llu bytes of extended attributes (limit xattr_bytes)",
                             (unsigned long long)b->limits.xattr_bytes);
    if (!n)
        return 0;
    packed = malloc(bytes);
    if (!packed)
        return no_memory(e);
    sm_xattr_pack(x, n, packed);
    inode->xattrs = sm_tree_copy(&b->tree, packed, bytes);
    inode->xattr_bytes = (uint32_t)bytes;
    free(packed);
    return inode->xattrs ? 0 : no_memory(e);
}

static int set_owner(struct archive_entry *ae, struct sm_inode *inode, struct sm_image_error *e)
{
    int64_t uid = archive_entry_uid(ae), gid = archive_entry_gid(ae);

    if (uid < 0 || gid < 0 || uid >= UINT32_MAX || gid >= UINT32_MAX)
        return sm_image_fail(e, EINVAL, "owner %lld:%lld is out of range", (long long)uid,
                             (long long)gid);
    inode->uid = (uint32_t)uid;
    inode->gid = (uint32_t)gid;
    if (archive_entry_mtime_is_set(ae)) {
        long ns = archive_entry_mtime_nsec(ae);

        inode->mtime_s = archive_entry_mtime(ae);
        inode->mtime_ns = ns >= 0 && ns < 1000000000 ? (uint32_t)ns : 0;
    }
    return 0;
}

/* Linux's numbers, whatever this host calls them. */
static uint16_t linux_type(unsigned type)
{
    switch (type) {
    case AE_IFREG:
        return 0100000;
    case AE_IFDIR:
        return 0040000;
    case AE_IFLNK:
        return 0120000;
    case AE_IFCHR:
        return 0020000;
    case AE_IFBLK:
        return 0060000;
    case AE_IFIFO:
        return 0010000;
    case AE_IFSOCK:
        return 0140000;
    default:
        return 0;
    }
}

static int set_target(struct sm_layer_build *b, struct archive_entry *ae, struct sm_inode *inode,
                      struct sm_image_error *e)
{
    const char *target = archive_entry_symlink(ae);
    size_t len = target ? strlen(target) : 0;

    if (!len || len > SM_IMAGE_PATH_MAX)
        return sm_image_fail(e, EINVAL, "symbolic link has a target of %zu bytes", len);
    inode->target = sm_tree_copy(&b->tree, target, len);
    inode->target_len = (uint32_t)len;
    inode->size_bytes = len;
    return inode->target ? 0 : no_memory(e);
}

static int set_device(struct archive_entry *ae, struct sm_inode *inode, struct sm_image_error *e)
{
    uint64_t major = (uint64_t)archive_entry_rdevmajor(ae);
    uint64_t minor = (uint64_t)archive_entry_rdevminor(ae);

    if (major > 0xfff || minor > 0xfffff)
        return sm_image_fail(e, EINVAL, "device %llu:%llu is out of range",
                             (unsigned long long)major, (unsigned long long)minor);
    inode->rdev_major = (uint32_t)major;
    inode->rdev_minor = (uint32_t)minor;
    return 0;
}

static int read_data(struct sm_layer_build *b, struct archive *a, struct sm_inode *inode,
                     struct sm_image_error *e)
{
    for (;;) {
        const void *data;
        size_t len;
        int64_t offset;
        int ret = archive_read_data_block(a, &data, &len, &offset);

        if (ret == ARCHIVE_EOF)
            return 0;
        if (ret < ARCHIVE_WARN)
            return sm_image_fail(e, EBADMSG, "%s", archive_error_string(a));
        if (!len)
            continue;
        if (offset < 0 || (uint64_t)offset > inode->size_bytes ||
            len > inode->size_bytes - (uint64_t)offset)
            return sm_image_fail(e, EBADMSG, "data lies outside its file");
        ret = sm_blob_write(&b->blob, inode->data + (uint64_t)offset, data, len);
        if (ret == -EINVAL)
            return sm_image_fail(e, EBADMSG, "data blocks overlap");
        if (ret < 0)
            return sm_image_fail(e, -ret, "writing data: %s", strerror(-ret));
    }
}

static int set_data(struct sm_layer_build *b, struct archive *a, struct archive_entry *ae,
                    struct sm_inode *inode, struct sm_image_error *e)
{
    int64_t size = archive_entry_size(ae);

    if (size < 0)
        return sm_image_fail(e, EBADMSG, "negative size");
    if ((uint64_t)size > b->limits.bytes - b->bytes)
        return sm_image_fail(e, EFBIG, "files have more than %llu bytes (limit bytes)",
                             (unsigned long long)b->limits.bytes);
    b->bytes += (uint64_t)size;
    inode->size_bytes = (uint64_t)size;
    inode->data = size ? sm_blob_reserve(&b->blob, (uint64_t)size) : 0;
    return size ? read_data(b, a, inode, e) : 0;
}

/* A new inode with everything the entry says. */
static int make_inode(struct sm_layer_build *b, struct archive *a, struct archive_entry *ae,
                      uint32_t *id, struct sm_image_error *e)
{
    struct sm_inode n = { 0 };
    int ret;

    n.mode = (uint16_t)(linux_type(archive_entry_filetype(ae)) |
                        (archive_entry_perm(ae) & 07777));
    ret = set_owner(ae, &n, e);
    if (ret == 0)
        ret = set_xattrs(b, ae, &n, e);
    if (ret < 0)
        return ret;
    switch (archive_entry_filetype(ae)) {
    case AE_IFREG:
        ret = set_data(b, a, ae, &n, e);
        break;
    case AE_IFLNK:
        ret = set_target(b, ae, &n, e);
        break;
    case AE_IFCHR:
    case AE_IFBLK:
        ret = set_device(ae, &n, e);
        break;
    case AE_IFDIR:
    case AE_IFIFO:
    case AE_IFSOCK:
        break;
    default:
        return sm_image_fail(e, EINVAL, "unknown type of file");
    }
    if (ret == 0)
        ret = sm_tree_add_inode(&b->tree, id, e);
    if (ret == 0)
        b->tree.inodes[*id] = n;
    return ret;
}

/* The node a plain entry goes to: the old one emptied as far as it must be. */
static int take_node(struct sm_layer_build *b, bool dir, uint32_t *id, struct sm_image_error *e)
{
    struct sm_walk *w = &b->walk;
    struct sm_tree *t = &b->tree;
    struct sm_node *n;
    char *name;

    if (w->node == SM_TREE_NONE) {
        name = sm_tree_copy(t, w->name, w->name_len);
        if (!name)
            return no_memory(e);
        return sm_tree_add(t, w->parent, name, w->name_len, SM_NODE_IMPLICIT, id, e);
    }
    *id = w->node;
    n = &t->nodes[*id];
    if (n->kind == SM_NODE_WHITEOUT)
        n->flags |= SM_NODE_HIDES;
    if (!dir || !sm_tree_is_dir(t, *id)) {
        sm_tree_drop_children(t, *id);
        n->flags &= (uint8_t)~SM_NODE_OPAQUE;
    }
    if (n->kind == SM_NODE_LINK)
        b->links--;
    n->link = NULL;
    n->link_len = 0;
    return 0;
}

static int add_plain(struct sm_layer_build *b, struct archive *a, struct archive_entry *ae,
                     struct sm_image_error *e)
{
    bool dir = archive_entry_filetype(ae) == AE_IFDIR;
    uint32_t inode, id = SM_TREE_ROOT;
    int ret = make_inode(b, a, ae, &inode, e);

    if (ret < 0)
        return ret;
    if (!b->path[0]) {
        if (!dir)
            return sm_image_fail(e, EINVAL, "the root is not a directory");
    } else {
        ret = sm_tree_walk(&b->tree, b->path, SM_WALK_CREATE, &b->walk, e);
        if (ret == -ENOTDIR)
            return sm_image_fail(e, ENOTDIR, "a parent is not a directory");
        if (ret == 0)
            ret = take_node(b, dir, &id, e);
        if (ret < 0)
            return ret;
    }
    b->tree.nodes[id].kind = SM_NODE_INODE;
    b->tree.nodes[id].inode = inode;
    return 0;
}

/* "parent of the walk/rest", the part of a link's path that is not in this layer. */
static int lower_path(struct sm_layer_build *b, const char *rest, char *out,
                      struct sm_image_error *e)
{
    size_t at = SM_IMAGE_PATH_MAX, n = strlen(rest);
    uint32_t id = b->walk.parent;

    rest += strspn(rest, "/");
    n = strlen(rest);
    if (n > at)
        return sm_image_fail(e, ENAMETOOLONG, "hard link's path is too long");
    at -= n;
    memcpy(out + at, rest, n + 1);
    for (; id != SM_TREE_ROOT; id = b->tree.nodes[id].parent) {
        const struct sm_node *p = &b->tree.nodes[id];

        if (p->name_len + 1u > at)
            return sm_image_fail(e, ENAMETOOLONG, "hard link's path is too long");
        out[--at] = '/';
        at -= p->name_len;
        memcpy(out + at, p->name, p->name_len);
    }
    memmove(out, out + at, SM_IMAGE_PATH_MAX - at + 1);
    return 0;
}

/*
 * Finds a hard link's target, a clean path. 1 and an inode when it is in this
 * layer; 0 and the path for the lower layers in out when it is not.
 */
static int find_target(struct sm_layer_build *b, const char *path, uint32_t *inode, char *out,
                       struct sm_image_error *e)
{
    struct sm_walk *w = &b->walk;
    int ret = sm_tree_walk(&b->tree, path, SM_WALK_FIND, w, e);
    const struct sm_node *n;

    if (ret == -ENOENT)
        return lower_path(b, w->rest, out, e);
    if (ret == -ENOTDIR)
        return sm_image_fail(e, ENOTDIR, "hard link's target has a parent that is no directory");
    if (ret < 0)
        return ret;
    if (w->node == SM_TREE_NONE)
        return lower_path(b, w->name, out, e);
    n = &b->tree.nodes[w->node];
    if (sm_tree_is_dir(&b->tree, w->node) && n->kind != SM_NODE_PHANTOM)
        return sm_image_fail(e, EPERM, "hard link to a directory");
    if (n->kind != SM_NODE_INODE)
        return lower_path(b, w->name, out, e);
    *inode = n->inode;
    return 1;
}

static int add_hardlink(struct sm_layer_build *b, const char *target, struct sm_image_error *e)
{
    char clean[SM_IMAGE_PATH_MAX + 1], lower[SM_IMAGE_PATH_MAX + 1];
    uint32_t inode = SM_TREE_NONE, id;
    struct sm_node *n;
    char *copy = NULL;
    int found, ret;

    ret = sm_path_clean(target, clean, e);
    if (ret < 0)
        return ret;
    if (!clean[0] || !b->path[0])
        return sm_image_fail(e, EPERM, "hard link to or as the root");
    found = find_target(b, clean, &inode, lower, e);
    if (found < 0)
        return found;
    ret = sm_tree_walk(&b->tree, b->path, SM_WALK_CREATE, &b->walk, e);
    if (ret == -ENOTDIR)
        return sm_image_fail(e, ENOTDIR, "a parent is not a directory");
    if (ret < 0)
        return ret;
    if (!found && !(copy = sm_tree_copy(&b->tree, lower, strlen(lower))))
        return no_memory(e);
    ret = take_node(b, false, &id, e);
    if (ret < 0)
        return ret;
    n = &b->tree.nodes[id];
    n->kind = found ? SM_NODE_INODE : SM_NODE_LINK;
    n->inode = inode;
    n->link = copy;
    n->link_len = (uint16_t)(copy ? strlen(copy) : 0);
    b->links += !found;
    return 0;
}

static int add_entry(struct sm_layer_build *b, struct archive *a, struct archive_entry *ae,
                     struct sm_image_error *e)
{
    const char *link = archive_entry_hardlink(ae);

    switch (b->path[0] ? classify(b->path) : NAME_PLAIN) {
    case NAME_WHITEOUT:
        return add_mark(b, false, e);
    case NAME_OPAQUE:
        return add_mark(b, true, e);
    case NAME_IGNORED:
        b->ignored++;
        return 0;
    case NAME_INVALID:
        return sm_image_fail(e, EINVAL, "invalid whiteout");
    case NAME_PLAIN:
        break;
    }
    return link ? add_hardlink(b, link, e) : add_plain(b, a, ae, e);
}

int sm_entry_add(struct sm_layer_build *b, struct archive *a, struct archive_entry *ae,
                 struct sm_image_error *e)
{
    const char *name = archive_entry_pathname(ae);
    int ret;

    if (!name)
        return sm_image_fail(e, EBADMSG, "entry without a name");
    if (++b->entries > b->limits.entries)
        return sm_image_fail(e, EFBIG, "more than %llu entries (limit entries)",
                             (unsigned long long)b->limits.entries);
    ret = sm_path_clean(name, b->path, e);
    if (ret == 0)
        ret = add_entry(b, a, ae, e);
    if (ret < 0)
        return sm_image_wrap(e, ret, "entry '%s'", sm_image_quote(name, strlen(name)).text);
    return 0;
}

/* One pass over unresolved links; returns how many found their target. */
static int resolve_links(struct sm_layer_build *b, uint32_t *resolved, struct sm_image_error *e)
{
    char path[SM_IMAGE_PATH_MAX + 1], lower[SM_IMAGE_PATH_MAX + 1];
    struct sm_tree *t = &b->tree;

    *resolved = 0;
    for (uint32_t i = 1; i < t->n_nodes && b->links; i++) {
        struct sm_node *n = &t->nodes[i];
        uint32_t inode;
        int ret;

        if (n->kind != SM_NODE_LINK)
            continue;
        memcpy(path, n->link, n->link_len + 1u);
        ret = sm_path_clean(n->link, path, e);
        if (ret == 0)
            ret = find_target(b, path, &inode, lower, e);
        if (ret < 0)
            return ret;
        if (!ret)
            continue;
        n->kind = SM_NODE_INODE;
        n->inode = inode;
        n->link = NULL;
        n->link_len = 0;
        b->links--;
        ++*resolved;
    }
    return 0;
}

int sm_entry_finish(struct sm_layer_build *b, struct sm_image_error *e)
{
    uint32_t plnk, resolved = b->links;
    int ret = 0;

    /* Links to links need a pass each; eight is more than any tar has. */
    for (int pass = 0; pass < 8 && ret == 0 && b->links && resolved; pass++)
        ret = resolve_links(b, &resolved, e);
    plnk = sm_tree_lookup(&b->tree, SM_TREE_ROOT, PLNK, strlen(PLNK));
    if (plnk != SM_TREE_NONE)
        sm_tree_detach(&b->tree, plnk);
    return ret;
}
