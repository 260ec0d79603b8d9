/* SPDX-License-Identifier: Apache-2.0 */
/* Writing a layer's index; see index.h. */
#include "index_format.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

struct writer {
    const struct sm_tree *t;
    uint32_t *nodes;     /* tree node of each index node, in order */
    uint32_t *node_no;   /* index number of each tree node */
    uint32_t *inodes;    /* tree inode of each index inode */
    uint32_t *inode_no;  /* index number of each tree inode, or NONE */
    uint32_t n_nodes, n_inodes;
    uint64_t strings_bytes;
};

uint32_t sm_index_sum(const uint8_t *file, size_t len)
{
    static const uint8_t zero[4];
    uint32_t crc = sm_image_crc32c(~0u, file, H_SUM);

    crc = sm_image_crc32c(crc, zero, 4);
    return ~sm_image_crc32c(crc, file + H_SUM + 4, len - H_SUM - 4);
}

static int writer_open(struct writer *w, const struct sm_tree *t)
{
    memset(w, 0, sizeof(*w));
    w->t = t;
    w->nodes = malloc(t->n_nodes * sizeof(uint32_t));
    w->node_no = malloc(t->n_nodes * sizeof(uint32_t));
    w->inodes = malloc((t->n_inodes + 1u) * sizeof(uint32_t));
    w->inode_no = malloc((t->n_inodes + 1u) * sizeof(uint32_t));
    if (!w->nodes || !w->node_no || !w->inodes || !w->inode_no)
        return -ENOMEM;
    memset(w->inode_no, 0xff, (t->n_inodes + 1u) * sizeof(uint32_t));
    return 0;
}

static void writer_close(struct writer *w)
{
    free(w->nodes);
    free(w->node_no);
    free(w->inodes);
    free(w->inode_no);
}

/* Breadth first: parents before children, siblings sorted, no recursion. */
static void number_nodes(struct writer *w)
{
    w->nodes[w->n_nodes++] = SM_TREE_ROOT;
    for (uint32_t i = 0; i < w->n_nodes; i++) {
        const struct sm_node *n = &w->t->nodes[w->nodes[i]];

        w->node_no[w->nodes[i]] = i;
        w->strings_bytes += (uint64_t)n->name_len + n->link_len;
        if (n->kind == SM_NODE_INODE && w->inode_no[n->inode] == SM_TREE_NONE) {
            const struct sm_inode *inode = &w->t->inodes[n->inode];

            w->inode_no[n->inode] = w->n_inodes;
            w->inodes[w->n_inodes++] = n->inode;
            w->strings_bytes += (uint64_t)inode->target_len + inode->xattr_bytes;
        }
        sm_tree_sort_children(w->t, w->nodes[i], w->nodes + w->n_nodes);
        w->n_nodes += sm_tree_count_children(w->t, w->nodes[i]);
    }
}

static uint64_t add_string(uint8_t *strings, uint64_t at, const void *s, size_t len)
{
    if (len)
        memcpy(strings + at, s, len);
    return at + len;
}

static void put_node(uint8_t *p, const struct writer *w, const struct sm_node *n, uint64_t at)
{
    sm_put32(p + N_PARENT, w->node_no[n->parent]);
    sm_put32(p + N_INODE, n->kind == SM_NODE_INODE ? w->inode_no[n->inode] : SM_TREE_NONE);
    sm_put64(p + N_NAME, at);
    sm_put16(p + N_NAME_LEN, n->name_len);
    sm_put16(p + N_LINK_LEN, n->link_len);
    p[N_KIND] = n->kind;
    p[N_FLAGS] = n->flags;
}

static void put_inode(uint8_t *p, const struct sm_inode *n, uint64_t at)
{
    sm_put16(p + I_MODE, n->mode);
    sm_put32(p + I_UID, n->uid);
    sm_put32(p + I_GID, n->gid);
    sm_put32(p + I_MTIME_NS, n->mtime_ns);
    sm_put64(p + I_MTIME, (uint64_t)n->mtime_s);
    sm_put64(p + I_SIZE, n->size_bytes);
    sm_put64(p + I_DATA, n->data);
    sm_put64(p + I_STRINGS, at);
    sm_put32(p + I_XATTR_BYTES, n->xattr_bytes);
    sm_put32(p + I_MAJOR, n->rdev_major);
    sm_put32(p + I_MINOR, n->rdev_minor);
}

static void put_entries(const struct writer *w, uint8_t *nodes)
{
    uint8_t *inodes = nodes + (size_t)w->n_nodes * NODE_BYTES;
    uint8_t *strings = inodes + (size_t)w->n_inodes * INODE_BYTES;
    uint64_t at = 0;

    for (uint32_t i = 0; i < w->n_nodes; i++) {
        const struct sm_node *n = &w->t->nodes[w->nodes[i]];

        put_node(nodes + (size_t)i * NODE_BYTES, w, n, at);
        at = add_string(strings, at, n->name, n->name_len);
        at = add_string(strings, at, n->link, n->link_len);
    }
    for (uint32_t i = 0; i < w->n_inodes; i++) {
        const struct sm_inode *n = &w->t->inodes[w->inodes[i]];

        put_inode(inodes + (size_t)i * INODE_BYTES, n, at);
        at = add_string(strings, at, n->target, n->target_len);
        at = add_string(strings, at, n->xattrs, n->xattr_bytes);
    }
}

static int write_file(const struct writer *w, const char *diff_id, uint64_t data_bytes, int fd,
                      struct sm_image_error *e)
{
    size_t head = HEADER_BYTES + ID_BYTES;
    size_t len = head + (size_t)w->n_nodes * NODE_BYTES + (size_t)w->n_inodes * INODE_BYTES +
                 w->strings_bytes;
    uint8_t *f;
    int ret;

    if (len > INDEX_BYTES_MAX)
        return sm_image_fail(e, EFBIG, "the layer's index would be too large");
    f = calloc(1, len);
    if (!f)
        return sm_image_fail(e, ENOMEM, "out of memory");
    memcpy(f, INDEX_MAGIC, 8);
    sm_put32(f + H_VERSION, INDEX_VERSION);
    sm_put32(f + H_NODES, w->n_nodes);
    sm_put32(f + H_INODES, w->n_inodes);
    sm_put64(f + H_STRINGS, w->strings_bytes);
    sm_put64(f + H_DATA, data_bytes);
    sm_put32(f + H_ID_BYTES, (uint32_t)strlen(diff_id));
    memcpy(f + HEADER_BYTES, diff_id, strlen(diff_id));
    put_entries(w, f + head);
    sm_put32(f + H_SUM, sm_index_sum(f, len));
    ret = sm_image_write_all(fd, f, len, 0);
    free(f);
    return ret < 0 ? sm_image_fail(e, -ret, "writing the index: %s", strerror(-ret)) : 0;
}

int sm_index_write(const struct sm_tree *t, const char *diff_id, uint64_t data_bytes, int fd,
                   uint32_t *inodes, struct sm_image_error *e)
{
    struct writer w;
    int ret = writer_open(&w, t);

    if (ret < 0) {
        sm_image_fail(e, ENOMEM, "out of memory");
    } else {
        number_nodes(&w);
        *inodes = w.n_inodes;
        ret = write_file(&w, diff_id, data_bytes, fd, e);
    }
    writer_close(&w);
    return ret;
}
