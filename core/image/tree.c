/* SPDX-License-Identifier: Apache-2.0 */
/* Nodes, inodes, names and the arena of a tree; see tree.h. */
#include "tree.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define CHUNK_BYTES (256u << 10)

struct sm_tree_chunk {
    struct sm_tree_chunk *next;
    size_t used, size;
    uint8_t data[];
};

int sm_tree_open(struct sm_tree *t, uint64_t max_nodes, uint32_t max_depth)
{
    struct sm_node *root;

    memset(t, 0, sizeof(*t));
    t->max_nodes = max_nodes < SM_TREE_NONE - 1 ? max_nodes : SM_TREE_NONE - 1;
    t->max_depth = max_depth < UINT16_MAX ? max_depth : UINT16_MAX;
    t->cap_nodes = 256;
    t->n_buckets = 256;
    t->nodes = malloc(t->cap_nodes * sizeof(*t->nodes));
    t->buckets = malloc(t->n_buckets * sizeof(*t->buckets));
    if (!t->nodes || !t->buckets) {
        sm_tree_close(t);
        return -ENOMEM;
    }
    memset(t->buckets, 0xff, t->n_buckets * sizeof(*t->buckets));
    root = &t->nodes[0];
    *root = (struct sm_node){ .child = SM_TREE_NONE, .next = SM_TREE_NONE,
                              .prev = SM_TREE_NONE, .hash_next = SM_TREE_NONE,
                              .inode = SM_TREE_NONE, .name = "",
                              .layer = SM_TREE_NONE, .kind = SM_NODE_PHANTOM };
    t->n_nodes = 1;
    return 0;
}

void sm_tree_close(struct sm_tree *t)
{
    while (t->arena) {
        struct sm_tree_chunk *c = t->arena;

        t->arena = c->next;
        free(c);
    }
    free(t->nodes);
    free(t->inodes);
    free(t->buckets);
    memset(t, 0, sizeof(*t));
}

void *sm_tree_copy(struct sm_tree *t, const void *data, size_t len)
{
    struct sm_tree_chunk *c = t->arena;
    uint8_t *p;

    if (!c || c->size - c->used < len + 1) {
        size_t size = len + 1 > CHUNK_BYTES / 4 ? len + 1 : CHUNK_BYTES;

        c = malloc(sizeof(*c) + size);
        if (!c)
            return NULL;
        c->used = 0;
        c->size = size;
        if (t->arena && size != CHUNK_BYTES) {
            /* A big string of its own: keep filling the current chunk. */
            c->next = t->arena->next;
            t->arena->next = c;
        } else {
            c->next = t->arena;
            t->arena = c;
        }
    }
    p = c->data + c->used;
    memcpy(p, data, len);
    p[len] = 0;
    c->used += len + 1;
    return p;
}

/* FNV-1a over the parent and the name; collisions only cost time: max_nodes. */
static uint32_t hash_name(uint32_t dir, const char *name, size_t len)
{
    uint64_t h = 0xcbf29ce484222325ull ^ dir * 0x9e3779b97f4a7c15ull;

    for (size_t i = 0; i < len; i++)
        h = (h ^ (uint8_t)name[i]) * 0x100000001b3ull;
    return (uint32_t)(h ^ h >> 32);
}

uint32_t sm_tree_lookup(const struct sm_tree *t, uint32_t dir, const char *name, size_t len)
{
    uint32_t h = hash_name(dir, name, len);
    uint32_t id = t->buckets[h & (t->n_buckets - 1)];

    while (id != SM_TREE_NONE) {
        const struct sm_node *n = &t->nodes[id];

        if (n->hash == h && n->parent == dir && n->name_len == len &&
            !memcmp(n->name, name, len))
            break;
        id = n->hash_next;
    }
    return id;
}

static void rehash(struct sm_tree *t)
{
    uint32_t n = t->n_buckets * 2;
    uint32_t *b = malloc(n * sizeof(*b));

    if (!b)
        return; /* longer chains, still right */
    memset(b, 0xff, n * sizeof(*b));
    for (uint32_t i = 0; i < t->n_buckets; i++) {
        uint32_t id = t->buckets[i];

        while (id != SM_TREE_NONE) {
            struct sm_node *node = &t->nodes[id];
            uint32_t next = node->hash_next;

            node->hash_next = b[node->hash & (n - 1)];
            b[node->hash & (n - 1)] = id;
            id = next;
        }
    }
    free(t->buckets);
    t->buckets = b;
    t->n_buckets = n;
}

static int grow(void **p, uint32_t *cap, size_t each)
{
    uint32_t n = *cap ? *cap + *cap / 2 : 256;
    void *q = realloc(*p, (size_t)n * each);

    if (!q)
        return -ENOMEM;
    *p = q;
    *cap = n;
    return 0;
}

int sm_tree_add(struct sm_tree *t, uint32_t dir, const char *name, size_t len,
                enum sm_node_kind kind, uint32_t *id, struct sm_image_error *e)
{
    struct sm_node *n, *p;
    uint32_t *bucket;

    if (t->nodes[dir].depth >= t->max_depth)
        return sm_image_fail(e, ENAMETOOLONG, "more than %u nested directories (limit depth)",
                             t->max_depth);
    if (t->n_nodes > t->max_nodes)
        return sm_image_fail(e, EFBIG, "more than %llu names (limit entries)",
                             (unsigned long long)t->max_nodes);
    if (t->n_nodes == t->cap_nodes &&
        grow((void **)&t->nodes, &t->cap_nodes, sizeof(*t->nodes)) < 0)
        return sm_image_fail(e, ENOMEM, "out of memory");
    if (t->n_nodes > t->n_buckets)
        rehash(t);
    *id = t->n_nodes++;
    n = &t->nodes[*id];
    p = &t->nodes[dir];
    *n = (struct sm_node){ .parent = dir, .child = SM_TREE_NONE, .prev = SM_TREE_NONE,
                           .next = p->child, .inode = SM_TREE_NONE, .name = name,
                           .name_len = (uint16_t)len, .layer = SM_TREE_NONE,
                           .hash = hash_name(dir, name, len), .kind = (uint8_t)kind,
                           .depth = (uint16_t)(p->depth + 1) };
    if (p->child != SM_TREE_NONE)
        t->nodes[p->child].prev = *id;
    p->child = *id;
    bucket = &t->buckets[n->hash & (t->n_buckets - 1)];
    n->hash_next = *bucket;
    *bucket = *id;
    return 0;
}

int sm_tree_add_inode(struct sm_tree *t, uint32_t *id, struct sm_image_error *e)
{
    if (t->n_inodes >= t->max_nodes)
        return sm_image_fail(e, EFBIG, "more than %llu inodes (limit entries)",
                             (unsigned long long)t->max_nodes);
    if (t->n_inodes == t->cap_inodes &&
        grow((void **)&t->inodes, &t->cap_inodes, sizeof(*t->inodes)) < 0)
        return sm_image_fail(e, ENOMEM, "out of memory");
    *id = t->n_inodes++;
    memset(&t->inodes[*id], 0, sizeof(*t->inodes));
    return 0;
}

static void unhash(struct sm_tree *t, uint32_t id)
{
    uint32_t *p = &t->buckets[t->nodes[id].hash & (t->n_buckets - 1)];

    while (*p != id && *p != SM_TREE_NONE)
        p = &t->nodes[*p].hash_next;
    if (*p == id)
        *p = t->nodes[id].hash_next;
}

/* Takes a childless node out of its directory. */
static void unlink_leaf(struct sm_tree *t, uint32_t id)
{
    struct sm_node *n = &t->nodes[id];

    unhash(t, id);
    if (n->prev != SM_TREE_NONE)
        t->nodes[n->prev].next = n->next;
    else
        t->nodes[n->parent].child = n->next;
    if (n->next != SM_TREE_NONE)
        t->nodes[n->next].prev = n->prev;
}

void sm_tree_drop_children(struct sm_tree *t, uint32_t top)
{
    uint32_t id = top;

    /* Depth first without recursion: down to a leaf, take it, go up. */
    for (;;) {
        while (t->nodes[id].child != SM_TREE_NONE)
            id = t->nodes[id].child;
        if (id == top)
            return;
        unlink_leaf(t, id);
        id = t->nodes[id].parent;
    }
}

void sm_tree_detach(struct sm_tree *t, uint32_t id)
{
    sm_tree_drop_children(t, id);
    unlink_leaf(t, id);
}

bool sm_tree_is_dir(const struct sm_tree *t, uint32_t id)
{
    const struct sm_node *n = &t->nodes[id];

    if (n->kind == SM_NODE_INODE)
        return S_ISDIR(t->inodes[n->inode].mode);
    return n->kind == SM_NODE_IMPLICIT || n->kind == SM_NODE_PHANTOM;
}

uint32_t sm_tree_count_children(const struct sm_tree *t, uint32_t dir)
{
    uint32_t n = 0;

    for (uint32_t id = t->nodes[dir].child; id != SM_TREE_NONE; id = t->nodes[id].next)
        n++;
    return n;
}

static int compare_names(const struct sm_tree *t, uint32_t x, uint32_t y)
{
    const struct sm_node *a = &t->nodes[x], *b = &t->nodes[y];
    size_t n = a->name_len < b->name_len ? a->name_len : b->name_len;
    int c = memcmp(a->name, b->name, n);

    return c ? c : (int)a->name_len - (int)b->name_len;
}

/* Heap sort: no allocation, no recursion, no worst case, no global for qsort. */
static void sift(const struct sm_tree *t, uint32_t *ids, uint32_t i, uint32_t n)
{
    uint32_t id = ids[i];

    for (;;) {
        uint32_t c = 2 * i + 1;

        if (c >= n)
            break;
        if (c + 1 < n && compare_names(t, ids[c + 1], ids[c]) > 0)
            c++;
        if (compare_names(t, ids[c], id) <= 0)
            break;
        ids[i] = ids[c];
        i = c;
    }
    ids[i] = id;
}

void sm_tree_sort_children(const struct sm_tree *t, uint32_t dir, uint32_t *ids)
{
    uint32_t n = 0;

    for (uint32_t id = t->nodes[dir].child; id != SM_TREE_NONE; id = t->nodes[id].next)
        ids[n++] = id;
    for (uint32_t i = n / 2; i-- > 0;)
        sift(t, ids, i, n);
    for (uint32_t i = n; i-- > 1;) {
        uint32_t top = ids[0];

        ids[0] = ids[i];
        ids[i] = top;
        sift(t, ids, 0, i);
    }
}
