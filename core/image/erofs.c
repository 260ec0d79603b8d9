/* SPDX-License-Identifier: Apache-2.0 */
/*
 * EROFS metadata writer; see erofs.h. Two passes over the same order: the first
 * gives every inode its place (nid = byte offset / 32) and every large directory
 * its blocks, the second writes them front to back through one buffer.
 */
#include "erofs.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "xattr.h"

#define BLOCK SM_IMAGE_BLOCK
#define SUPER_OFFSET 1024u
#define SUPER_BYTES 128u
#define SUPER_MAGIC 0xe0f5e1e2u
#define COMPAT_SB_CHKSUM 1u
#define COMPAT_MTIME 2u
#define SLOT_BYTES 32u
#define INODE_BYTES 64u
#define XATTR_HEADER_BYTES 12u
#define DIRENT_BYTES 12u
#define LAYOUT_PLAIN 0u
#define LAYOUT_INLINE 2u
#define OUT_BYTES (1u << 20)

/* What the first pass decides for one inode. */
struct place {
    uint64_t offset; /* of the inode; 0: not placed yet */
    uint64_t size;   /* i_size */
    uint32_t block;  /* first block of a directory's or long link's own blocks */
    uint32_t nlink;
    uint32_t xattr_bytes; /* on disk, header included */
    uint32_t tail;        /* inline bytes */
    uint32_t node;        /* directories: their one name */
};

struct image {
    const struct sm_tree *t;
    struct place *places; /* by inode */
    uint32_t *order;      /* inodes by place */
    uint32_t n_order;
    uint32_t *sorted; /* nodes, grouped by directory */
    uint32_t *first;  /* by node: where its children begin in sorted */
    uint32_t *count;  /* by node */
    uint32_t *dirs;   /* directory nodes, breadth first */
    uint32_t n_dirs, n_sorted;
    uint64_t inodes_end; /* bytes */
    uint64_t meta_bytes, total_blocks;
    const uint64_t *layer_bytes;
    uint32_t layers;
    int fd;
    uint8_t *buf;
    uint64_t written; /* bytes flushed */
    size_t used;
};

static const struct sm_inode *inode_of(const struct image *m, uint32_t node)
{
    return &m->t->inodes[m->t->nodes[node].inode];
}

static bool is_dir(const struct image *m, uint32_t node)
{
    return S_ISDIR(inode_of(m, node)->mode);
}

/* Directory entries in order: the children with "." and ".." among them. */

struct dir_cursor {
    uint32_t next, end; /* in sorted */
    unsigned dots;      /* given out so far */
};

struct dir_entry {
    const char *name;
    uint32_t len;
    uint32_t node;
};

static void dir_begin(const struct image *m, uint32_t dir, struct dir_cursor *c)
{
    c->next = m->first[dir];
    c->end = c->next + m->count[dir];
    c->dots = 0;
}

static int compare(const char *a, size_t an, const char *b, size_t bn)
{
    int c = memcmp(a, b, an < bn ? an : bn);

    return c ? c : (int)an - (int)bn;
}

static bool dir_next(const struct image *m, uint32_t dir, struct dir_cursor *c,
                     struct dir_entry *d)
{
    const struct sm_node *n = NULL;

    if (c->next < c->end)
        n = &m->t->nodes[m->sorted[c->next]];
    if (c->dots < 2 && (!n || compare("..", c->dots + 1, n->name, n->name_len) < 0)) {
        d->node = c->dots ? m->t->nodes[dir].parent : dir;
        d->name = "..";
        d->len = ++c->dots;
        return true;
    }
    if (!n)
        return false;
    d->node = m->sorted[c->next++];
    d->name = n->name;
    d->len = n->name_len;
    return true;
}

static uint64_t dir_size(const struct image *m, uint32_t dir)
{
    struct dir_cursor c;
    struct dir_entry d;
    uint64_t full = 0;
    uint32_t used = 0;

    dir_begin(m, dir, &c);
    while (dir_next(m, dir, &c, &d)) {
        if (used + DIRENT_BYTES + d.len > BLOCK) {
            full += BLOCK;
            used = 0;
        }
        used += DIRENT_BYTES + d.len;
    }
    return full + used;
}

/* First pass. */

static uint32_t xattr_disk_bytes(const struct sm_inode *n)
{
    uint32_t bytes = XATTR_HEADER_BYTES;
    struct sm_xattr x;
    size_t pos = 0;

    if (!n->xattr_bytes)
        return 0;
    while (sm_xattr_next(n->xattrs, n->xattr_bytes, &pos, &x) == 1) {
        size_t prefix = 0;

        sm_xattr_index(x.name, x.name_len, &prefix);
        bytes += (uint32_t)sm_image_align(4 + x.name_len - prefix + x.value_len, 4);
    }
    return bytes;
}

static void place_inode(struct image *m, uint32_t node, uint64_t *at)
{
    uint32_t id = m->t->nodes[node].inode;
    const struct sm_inode *n = &m->t->inodes[id];
    struct place *p = &m->places[id];
    uint64_t bytes;

    p->nlink += !S_ISDIR(n->mode);
    if (p->offset)
        return;
    p->xattr_bytes = xattr_disk_bytes(n);
    p->size = n->size_bytes;
    if (S_ISDIR(n->mode)) {
        p->node = node;
        p->size = dir_size(m, node);
        p->tail = (uint32_t)(p->size % BLOCK);
        p->nlink += 2;
    } else if (S_ISLNK(n->mode)) {
        p->tail = n->target_len;
    }
    /* Inline data must share a block with its inode, or it is not inline. */
    if (INODE_BYTES + p->xattr_bytes + p->tail > BLOCK)
        p->tail = 0;
    bytes = INODE_BYTES + p->xattr_bytes + p->tail;
    *at = sm_image_align(*at, SLOT_BYTES);
    if (*at % BLOCK + bytes > BLOCK)
        *at = sm_image_align(*at, BLOCK);
    p->offset = *at;
    *at += bytes;
    m->order[m->n_order++] = id;
}

/* Children grouped and sorted, directories breadth first. */
static void sort_tree(struct image *m)
{
    m->dirs[m->n_dirs++] = SM_TREE_ROOT;
    for (uint32_t i = 0; i < m->n_dirs; i++) {
        uint32_t dir = m->dirs[i], n = sm_tree_count_children(m->t, dir);

        m->first[dir] = m->n_sorted;
        m->count[dir] = n;
        sm_tree_sort_children(m->t, dir, m->sorted + m->n_sorted);
        for (uint32_t k = 0; k < n; k++)
            if (is_dir(m, m->sorted[m->n_sorted + k]))
                m->dirs[m->n_dirs++] = m->sorted[m->n_sorted + k];
        m->n_sorted += n;
    }
}

/* Blocks for what is not inline, after the inodes. */
static void place_blocks(struct image *m, uint64_t *at)
{
    for (uint32_t i = 0; i < m->n_order; i++) {
        struct place *p = &m->places[m->order[i]];

        if (S_ISREG(m->t->inodes[m->order[i]].mode) || p->size == p->tail)
            continue;
        p->block = (uint32_t)(*at / BLOCK);
        *at += sm_image_align(p->size - p->tail, BLOCK);
    }
}

static int lay_out(struct image *m, struct sm_image_error *e)
{
    uint64_t at = SUPER_OFFSET + SUPER_BYTES, blocks;

    sort_tree(m);
    place_inode(m, SM_TREE_ROOT, &at);
    for (uint32_t i = 0; i < m->n_dirs; i++) {
        uint32_t dir = m->dirs[i], up = m->t->nodes[dir].parent;

        for (uint32_t k = 0; k < m->count[dir]; k++)
            place_inode(m, m->sorted[m->first[dir] + k], &at);
        if (dir != SM_TREE_ROOT)
            m->places[m->t->nodes[up].inode].nlink++;
    }
    m->inodes_end = at;
    at = sm_image_align(at, BLOCK);
    place_blocks(m, &at);
    m->meta_bytes = sm_image_align(at, SM_IMAGE_PAD);
    blocks = m->meta_bytes / BLOCK;
    for (uint32_t i = 0; i < m->layers; i++)
        blocks += m->layer_bytes[i] / BLOCK;
    m->total_blocks = blocks;
    if (blocks > UINT32_MAX)
        return sm_image_fail(e, EFBIG, "the image is larger than 16 TiB");
    return 0;
}

/* Second pass: output in order, gaps are zeros. */

static int flush(struct image *m)
{
    int ret = sm_image_write_all(m->fd, m->buf, m->used, m->written);

    m->written += m->used;
    m->used = 0;
    return ret;
}

static int emit(struct image *m, const void *data, size_t len)
{
    const uint8_t *p = data;

    while (len) {
        size_t n = OUT_BYTES - m->used < len ? OUT_BYTES - m->used : len;
        int ret;

        if (p)
            memcpy(m->buf + m->used, p, n);
        else
            memset(m->buf + m->used, 0, n);
        m->used += n;
        p = p ? p + n : NULL;
        len -= n;
        if (m->used == OUT_BYTES && (ret = flush(m)) < 0)
            return ret;
    }
    return 0;
}

static int emit_until(struct image *m, uint64_t offset)
{
    return emit(m, NULL, offset - m->written - m->used);
}

static int emit_super(struct image *m)
{
    uint8_t block[BLOCK - SUPER_OFFSET] = { 0 };

    sm_put32(block, SUPER_MAGIC);
    sm_put32(block + 8, COMPAT_SB_CHKSUM | COMPAT_MTIME);
    block[12] = 12; /* blkszbits */
    sm_put16(block + 14,
             (uint16_t)(m->places[m->t->nodes[SM_TREE_ROOT].inode].offset / SLOT_BYTES));
    sm_put64(block + 16, m->n_order);
    sm_put32(block + 36, (uint32_t)m->total_blocks);
    return emit(m, block, SUPER_BYTES);
}

/* The checksum covers the rest of the first block, known only at the end. */
static int seal_super(struct image *m)
{
    uint8_t block[BLOCK - SUPER_OFFSET];
    size_t got = 0;

    while (got < sizeof(block)) {
        ssize_t n = pread(m->fd, block + got, sizeof(block) - got, (off_t)(SUPER_OFFSET + got));

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        got += (size_t)n;
    }
    sm_put32(block + 4, sm_image_crc32c(~0u, block, sizeof(block)));
    return sm_image_write_all(m->fd, block + 4, 4, SUPER_OFFSET + 4);
}

static uint32_t device_number(const struct sm_inode *n)
{
    return (n->rdev_minor & 0xff) | n->rdev_major << 8 | (n->rdev_minor & ~0xffu) << 12;
}

static uint32_t data_block(const struct image *m, const struct sm_inode *n)
{
    uint64_t base = m->meta_bytes;

    for (uint32_t i = 0; i < n->layer; i++)
        base += m->layer_bytes[i];
    return (uint32_t)((base + n->data) / BLOCK);
}

static int emit_inode(struct image *m, uint32_t id, uint32_t number)
{
    const struct sm_inode *n = &m->t->inodes[id];
    const struct place *p = &m->places[id];
    uint8_t b[INODE_BYTES] = { 0 };
    uint32_t u = p->block;

    if (S_ISREG(n->mode) && n->size_bytes)
        u = data_block(m, n);
    else if (S_ISCHR(n->mode) || S_ISBLK(n->mode))
        u = device_number(n);
    sm_put16(b, (uint16_t)(1 | (p->tail ? LAYOUT_INLINE : LAYOUT_PLAIN) << 1));
    if (p->xattr_bytes)
        sm_put16(b + 2, (uint16_t)((p->xattr_bytes - XATTR_HEADER_BYTES) / 4 + 1));
    sm_put16(b + 4, n->mode);
    sm_put64(b + 8, p->size);
    sm_put32(b + 16, u);
    sm_put32(b + 20, number);
    sm_put32(b + 24, n->uid);
    sm_put32(b + 28, n->gid);
    sm_put64(b + 32, (uint64_t)n->mtime_s);
    sm_put32(b + 40, n->mtime_ns);
    sm_put32(b + 44, p->nlink);
    return emit(m, b, sizeof(b));
}

static int emit_xattrs(struct image *m, const struct sm_inode *n)
{
    static const uint8_t header[XATTR_HEADER_BYTES];
    struct sm_xattr x;
    size_t pos = 0;
    int ret;

    if (!n->xattr_bytes)
        return 0;
    ret = emit(m, header, sizeof(header));
    while (ret == 0 && sm_xattr_next(n->xattrs, n->xattr_bytes, &pos, &x) == 1) {
        size_t prefix = 0, bytes;
        uint8_t entry[4];

        entry[1] = sm_xattr_index(x.name, x.name_len, &prefix);
        entry[0] = (uint8_t)(x.name_len - prefix);
        sm_put16(entry + 2, x.value_len);
        bytes = sizeof(entry) + entry[0] + x.value_len;
        ret = emit(m, entry, sizeof(entry));
        if (ret == 0)
            ret = emit(m, x.name + prefix, entry[0]);
        if (ret == 0)
            ret = emit(m, x.value, x.value_len);
        if (ret == 0)
            ret = emit(m, NULL, sm_image_align(bytes, 4) - bytes);
    }
    return ret;
}

static uint8_t dirent_type(uint16_t mode)
{
    switch (mode & S_IFMT) {
    case S_IFREG:
        return 1;
    case S_IFDIR:
        return 2;
    case S_IFCHR:
        return 3;
    case S_IFBLK:
        return 4;
    case S_IFIFO:
        return 5;
    case S_IFSOCK:
        return 6;
    default:
        return 7;
    }
}

/* One block of a directory from cursor c on; returns the bytes used. */
static uint32_t dir_block(const struct image *m, uint32_t dir, struct dir_cursor *c,
                          uint8_t block[BLOCK])
{
    struct dir_cursor ahead = *c;
    struct dir_entry d;
    uint32_t count = 0, used = 0, name_at;

    while (dir_next(m, dir, &ahead, &d) && used + DIRENT_BYTES + d.len <= BLOCK) {
        used += DIRENT_BYTES + d.len;
        count++;
    }
    memset(block, 0, BLOCK);
    name_at = count * DIRENT_BYTES;
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *p = block + i * DIRENT_BYTES;
        const struct sm_inode *n;

        dir_next(m, dir, c, &d);
        n = inode_of(m, d.node);
        sm_put64(p, m->places[m->t->nodes[d.node].inode].offset / SLOT_BYTES);
        sm_put16(p + 8, (uint16_t)name_at);
        p[10] = dirent_type(n->mode);
        memcpy(block + name_at, d.name, d.len);
        name_at += d.len;
    }
    return used;
}

/* The inline part of a directory, or its blocks. */
static int emit_dir(struct image *m, const struct place *p, bool tail)
{
    uint8_t block[BLOCK];
    struct dir_cursor c;

    dir_begin(m, p->node, &c);
    for (uint64_t at = 0; at < p->size; at += BLOCK) {
        uint32_t used = dir_block(m, p->node, &c, block);
        bool last = at + BLOCK > p->size && p->tail;
        int ret;

        if (last != tail)
            continue;
        ret = emit(m, block, tail ? used : BLOCK);
        if (ret < 0)
            return ret;
    }
    return 0;
}

static int emit_inodes(struct image *m)
{
    for (uint32_t i = 0; i < m->n_order; i++) {
        const struct sm_inode *n = &m->t->inodes[m->order[i]];
        const struct place *p = &m->places[m->order[i]];
        int ret = emit_until(m, p->offset);

        if (ret == 0)
            ret = emit_inode(m, m->order[i], i + 1);
        if (ret == 0)
            ret = emit_xattrs(m, n);
        if (ret == 0 && p->tail && S_ISDIR(n->mode))
            ret = emit_dir(m, p, true);
        else if (ret == 0 && p->tail)
            ret = emit(m, n->target, n->target_len);
        if (ret < 0)
            return ret;
    }
    return emit_until(m, sm_image_align(m->inodes_end, BLOCK));
}

static int emit_blocks(struct image *m)
{
    for (uint32_t i = 0; i < m->n_order; i++) {
        const struct sm_inode *n = &m->t->inodes[m->order[i]];
        const struct place *p = &m->places[m->order[i]];
        int ret;

        if (!p->block)
            continue;
        ret = emit_until(m, (uint64_t)p->block * BLOCK);
        if (ret == 0 && S_ISDIR(n->mode))
            ret = emit_dir(m, p, false);
        else if (ret == 0)
            ret = emit(m, n->target, n->target_len);
        if (ret < 0)
            return ret;
    }
    return 0;
}

static int emit_all(struct image *m)
{
    int ret = emit_until(m, SUPER_OFFSET);

    if (ret == 0)
        ret = emit_super(m);
    if (ret == 0)
        ret = emit_inodes(m);
    if (ret == 0)
        ret = emit_blocks(m);
    if (ret == 0)
        ret = emit_until(m, sm_image_align(m->written + m->used, BLOCK));
    if (ret == 0)
        ret = flush(m);
    if (ret == 0 && ftruncate(m->fd, (off_t)m->meta_bytes) < 0)
        ret = -errno;
    return ret < 0 ? ret : seal_super(m);
}

static int image_open(struct image *m, const struct sm_tree *t)
{
    m->t = t;
    m->places = calloc(t->n_inodes + 1u, sizeof(*m->places));
    m->order = malloc((t->n_inodes + 1u) * sizeof(uint32_t));
    m->sorted = malloc(t->n_nodes * sizeof(uint32_t));
    m->first = malloc(t->n_nodes * sizeof(uint32_t));
    m->count = malloc(t->n_nodes * sizeof(uint32_t));
    m->dirs = malloc(t->n_nodes * sizeof(uint32_t));
    m->buf = malloc(OUT_BYTES);
    if (!m->places || !m->order || !m->sorted || !m->first || !m->count || !m->dirs || !m->buf)
        return -ENOMEM;
    return 0;
}

static void image_close(struct image *m)
{
    free(m->places);
    free(m->order);
    free(m->sorted);
    free(m->first);
    free(m->count);
    free(m->dirs);
    free(m->buf);
}

int sm_erofs_write(const struct sm_tree *t, const uint64_t *layer_bytes, uint32_t layers,
                   int fd, uint64_t *meta_bytes, uint32_t *inodes, struct sm_image_error *e)
{
    struct image m = { .layer_bytes = layer_bytes, .layers = layers, .fd = fd };
    int ret = image_open(&m, t);

    if (ret < 0) {
        sm_image_fail(e, ENOMEM, "out of memory");
    } else {
        ret = lay_out(&m, e);
        if (ret == 0) {
            ret = emit_all(&m);
            if (ret < 0)
                sm_image_fail(e, -ret, "writing the image: %s", strerror(-ret));
        }
    }
    *meta_bytes = m.meta_bytes;
    *inodes = m.n_order;
    image_close(&m);
    return ret;
}
