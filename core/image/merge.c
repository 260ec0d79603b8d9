/* SPDX-License-Identifier: Apache-2.0 */
/* Layer indexes into one image; see merge.h. */
#include "merge.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "erofs.h"
#include "index.h"

struct merge {
    const struct sm_merge_config *cfg;
    struct sm_merge_result *r;
    struct sm_tree tree;
    struct sm_index *indexes; /* kept: the tree borrows their strings */
    struct sm_walk walk;
};

/* One layer on its way into the tree. */
struct apply {
    struct merge *m;
    const struct sm_index *ix;
    uint32_t layer;
    uint32_t *nodes;  /* tree node of each index node, or NONE */
    uint32_t *inodes; /* tree inode of each index inode, or NONE */
    uint32_t *links;  /* tree inode of each LINK node */
};

static int corrupt(struct sm_image_error *e, const char *what)
{
    return sm_image_fail(e, EBADMSG, "layer index is corrupt (%s)", what);
}

/* Hard links into lower layers, before this layer changes anything. */
static int resolve_link(struct apply *a, uint32_t i, const struct sm_node *n,
                        struct sm_image_error *e)
{
    char raw[SM_IMAGE_PATH_MAX + 1];
    struct sm_walk *w = &a->m->walk;
    struct sm_tree *t = &a->m->tree;
    int ret;

    memcpy(raw, n->link, n->link_len);
    raw[n->link_len] = 0;
    ret = sm_tree_walk(t, raw, SM_WALK_FIND, w, e);
    if (ret == -ENOENT || ret == -ENOTDIR || (ret == 0 && w->node == SM_TREE_NONE))
        return sm_image_fail(e, ENOENT, "hard link '%s' has no target '%s'",
                             sm_image_quote(n->name, n->name_len).text,
                             sm_image_quote(raw, n->link_len).text);
    if (ret < 0)
        return ret;
    if (sm_tree_is_dir(t, w->node))
        return sm_image_fail(e, EPERM, "hard link '%s' to a directory",
                             sm_image_quote(n->name, n->name_len).text);
    a->links[i] = t->nodes[w->node].inode;
    return 0;
}

static int copy_inode(struct apply *a, uint32_t i, uint32_t *id, struct sm_image_error *e)
{
    int ret;

    if (a->inodes[i] == SM_TREE_NONE) {
        ret = sm_tree_add_inode(&a->m->tree, &a->inodes[i], e);
        if (ret < 0)
            return ret;
        sm_index_inode(a->ix, i, &a->m->tree.inodes[a->inodes[i]]);
        a->m->tree.inodes[a->inodes[i]].layer = a->layer;
    }
    *id = a->inodes[i];
    return 0;
}

/* A directory nobody described: root's, 0755, no time. */
static int default_dir(struct apply *a, uint32_t *id, struct sm_image_error *e)
{
    int ret = sm_tree_add_inode(&a->m->tree, id, e);

    if (ret == 0)
        a->m->tree.inodes[*id].mode = 0040755;
    return ret;
}

static int inode_for(struct apply *a, uint32_t i, const struct sm_node *n, uint32_t *id,
                     struct sm_image_error *e)
{
    if (n->kind == SM_NODE_LINK) {
        *id = a->links[i];
        return 0;
    }
    if (n->kind == SM_NODE_INODE)
        return copy_inode(a, n->inode, id, e);
    return default_dir(a, id, e);
}

static bool index_node_is_dir(const struct apply *a, const struct sm_node *n)
{
    struct sm_inode inode;

    if (n->kind != SM_NODE_INODE)
        return n->kind == SM_NODE_IMPLICIT || n->kind == SM_NODE_PHANTOM;
    sm_index_inode(a->ix, n->inode, &inode);
    return S_ISDIR(inode.mode);
}

/* A directory of this layer over a directory of the lower ones. */
static int merge_dir(struct apply *a, const struct sm_node *n, uint32_t at,
                     struct sm_image_error *e)
{
    struct sm_tree *t = &a->m->tree;

    if (n->flags & SM_NODE_OPAQUE)
        sm_tree_drop_children(t, at);
    t->nodes[at].layer = a->layer;
    if (n->kind != SM_NODE_INODE)
        return 0;
    return copy_inode(a, n->inode, &t->nodes[at].inode, e);
}

static int apply_node(struct apply *a, uint32_t i, const struct sm_node *n,
                      struct sm_image_error *e)
{
    struct sm_tree *t = &a->m->tree;
    uint32_t dir = a->nodes[n->parent], at, inode;
    int ret;

    a->nodes[i] = SM_TREE_NONE;
    if (dir == SM_TREE_NONE)
        return 0;
    at = sm_tree_lookup(t, dir, n->name, n->name_len);
    if (at != SM_TREE_NONE && t->nodes[at].layer == a->layer)
        return corrupt(e, "a name twice");
    if (at != SM_TREE_NONE && !(n->flags & SM_NODE_HIDES) && index_node_is_dir(a, n) &&
        sm_tree_is_dir(t, at)) {
        a->nodes[i] = at;
        return merge_dir(a, n, at, e);
    }
    if (n->kind == SM_NODE_PHANTOM)
        return 0;
    if (at != SM_TREE_NONE)
        sm_tree_detach(t, at);
    if (n->kind == SM_NODE_WHITEOUT)
        return 0;
    ret = inode_for(a, i, n, &inode, e);
    if (ret == 0)
        ret = sm_tree_add(t, dir, n->name, n->name_len, SM_NODE_INODE, &at, e);
    if (ret < 0)
        return ret;
    t->nodes[at].inode = inode;
    t->nodes[at].layer = a->layer;
    a->nodes[i] = at;
    return 0;
}

static int apply_nodes(struct apply *a, struct sm_image_error *e)
{
    struct sm_node n;
    int ret = 0;

    for (uint32_t i = 1; ret == 0 && i < a->ix->n_nodes; i++) {
        sm_index_node(a->ix, i, &n);
        if (n.kind == SM_NODE_LINK)
            ret = resolve_link(a, i, &n, e);
    }
    if (ret < 0)
        return ret;
    sm_index_node(a->ix, 0, &n);
    a->nodes[0] = SM_TREE_ROOT;
    ret = merge_dir(a, &n, SM_TREE_ROOT, e);
    for (uint32_t i = 1; ret == 0 && i < a->ix->n_nodes; i++) {
        sm_index_node(a->ix, i, &n);
        ret = apply_node(a, i, &n, e);
    }
    return ret;
}

static int apply_layer(struct merge *m, uint32_t layer, struct sm_image_error *e)
{
    struct apply a = { .m = m, .ix = &m->indexes[layer], .layer = layer };
    int ret = -ENOMEM;

    a.nodes = malloc(a.ix->n_nodes * sizeof(uint32_t));
    a.links = malloc(a.ix->n_nodes * sizeof(uint32_t));
    a.inodes = malloc((a.ix->n_inodes + 1u) * sizeof(uint32_t));
    if (a.nodes && a.links && a.inodes) {
        memset(a.inodes, 0xff, (a.ix->n_inodes + 1u) * sizeof(uint32_t));
        ret = apply_nodes(&a, e);
    } else {
        sm_image_fail(e, ENOMEM, "out of memory");
    }
    free(a.nodes);
    free(a.links);
    free(a.inodes);
    return ret;
}

/* The data blob must be what its index was written for. */
static int check_data(const char *dir, uint64_t want, struct sm_image_error *e)
{
    char path[PATH_MAX];
    struct stat st;

    if (snprintf(path, sizeof(path), "%s/data", dir) >= (int)sizeof(path))
        return sm_image_fail(e, ENAMETOOLONG, "layer path is too long");
    if (stat(path, &st) < 0)
        return sm_image_fail(e, errno, "%s: %s", path, strerror(errno));
    if ((uint64_t)st.st_size != want)
        return sm_image_fail(e, EBADMSG, "%s has %llu bytes, its index says %llu", path,
                             (unsigned long long)st.st_size, (unsigned long long)want);
    return 0;
}

static int add_layer(struct merge *m, uint32_t i, struct sm_image_error *e)
{
    const char *dir = m->cfg->layers[i];
    char path[PATH_MAX];
    int ret;

    if (snprintf(path, sizeof(path), "%s/index", dir) >= (int)sizeof(path))
        return sm_image_fail(e, ENAMETOOLONG, "layer path is too long");
    ret = sm_index_load(&m->indexes[i], path, e);
    if (ret == 0)
        ret = check_data(dir, m->indexes[i].data_bytes, e);
    if (ret < 0)
        return ret;
    m->r->layer_bytes[i] = m->indexes[i].data_bytes;
    m->r->device_bytes += m->indexes[i].data_bytes;
    ret = apply_layer(m, i, e);
    return ret < 0 ? sm_image_wrap(e, ret, "layer %u", i + 1) : 0;
}

static int build(struct merge *m, struct sm_image_error *e)
{
    struct apply a = { .m = m };
    struct sm_node *root;
    uint32_t inode;
    int ret = default_dir(&a, &inode, e);

    if (ret < 0)
        return ret;
    root = &m->tree.nodes[SM_TREE_ROOT];
    root->kind = SM_NODE_INODE;
    root->inode = inode;
    if (m->cfg->progress)
        atomic_store(&m->cfg->progress->total_bytes, m->cfg->n_layers);
    for (uint32_t i = 0; ret == 0 && i < m->cfg->n_layers; i++) {
        if (m->cfg->progress && atomic_load(&m->cfg->progress->cancel))
            return sm_image_fail(e, ECANCELED, "cancelled");
        ret = add_layer(m, i, e);
        if (m->cfg->progress)
            atomic_store(&m->cfg->progress->now_bytes, i + 1u);
    }
    return ret;
}

static int write_out(struct merge *m, struct sm_image_error *e)
{
    const char *out = m->cfg->out;
    int fd = open(out, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0644);
    int ret;

    if (fd < 0)
        return sm_image_fail(e, errno, "%s: %s", out, strerror(errno));
    ret = sm_erofs_write(&m->tree, m->r->layer_bytes, m->cfg->n_layers, fd, &m->r->meta_bytes,
                         &m->r->inodes, e);
    if (ret == 0 && fsync(fd) < 0)
        ret = sm_image_fail(e, errno, "%s: %s", out, strerror(errno));
    close(fd);
    if (ret < 0)
        unlink(out);
    m->r->device_bytes += m->r->meta_bytes;
    return ret;
}

int sm_merge(const struct sm_merge_config *cfg, struct sm_merge_result *r,
             struct sm_image_error *e)
{
    struct sm_image_limits limits = cfg->limits;
    struct merge *m = calloc(1, sizeof(*m));
    int ret = -ENOMEM;

    memset(r, 0, sizeof(*r));
    sm_image_limits_default(&limits);
    r->layer_bytes = calloc(cfg->n_layers + 1u, sizeof(*r->layer_bytes));
    if (m)
        m->indexes = calloc(cfg->n_layers + 1u, sizeof(*m->indexes));
    if (m && m->indexes && r->layer_bytes)
        ret = sm_tree_open(&m->tree, limits.entries, limits.depth);
    if (ret < 0) {
        sm_image_fail(e, ENOMEM, "out of memory");
    } else {
        m->cfg = cfg;
        m->r = r;
        ret = build(m, e);
        if (ret == 0)
            ret = write_out(m, e);
        sm_tree_close(&m->tree);
        for (uint32_t i = 0; i < cfg->n_layers; i++)
            sm_index_close(&m->indexes[i]);
    }
    if (ret < 0) {
        free(r->layer_bytes);
        r->layer_bytes = NULL;
    }
    if (m)
        free(m->indexes);
    free(m);
    return ret;
}
