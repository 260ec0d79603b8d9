/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The file tree of one layer while its tar is read (layer.c), and of a whole
 * image while its layers are merged (merge.c).
 *
 * Names (nodes) and what they name (inodes) are apart, so hard links are two
 * nodes with one inode. Nodes are found through one hash table keyed by parent
 * and name, so a hostile directory of a million names costs no more than a
 * friendly one. Nodes and inodes are referred to by number; detached nodes stay
 * allocated until the tree is freed, and `max_nodes` bounds them.
 *
 * Paths are walked inside this tree only: ".." stops at the root and symbolic
 * links resolve within it, so nothing can point outside.
 *
 * Strings are borrowed: from the tree's arena (sm_tree_copy) or from a mapping
 * the owner keeps alive longer. One thread uses a tree at a time.
 */
#ifndef SM_IMAGE_TREE_H
#define SM_IMAGE_TREE_H

#include "image.h"

#define SM_TREE_NONE UINT32_MAX
#define SM_TREE_ROOT 0u

enum sm_node_kind {
    SM_NODE_INODE = 1,    /* has attributes: a directory or anything else */
    SM_NODE_IMPLICIT = 2, /* a directory no entry described: inherits */
    SM_NODE_PHANTOM = 3,  /* a directory seen only as the parent of whiteouts */
    SM_NODE_WHITEOUT = 4, /* removes the lower layers' name, puts nothing there */
    SM_NODE_LINK = 5,     /* a hard link to `link`, a path in the lower layers */
};

#define SM_NODE_HIDES 1u  /* the lower layers' name is removed first */
#define SM_NODE_OPAQUE 2u /* the lower layers' children are removed first */

struct sm_node {
    uint32_t parent, child, next, prev; /* prev of the first child: NONE */
    uint32_t hash_next, hash;
    uint32_t inode;
    uint32_t layer; /* merge: the layer that touched it last */
    const char *name;
    const char *link;
    uint16_t name_len, link_len, depth;
    uint8_t kind, flags;
};

struct sm_inode {
    uint16_t mode; /* S_IFMT and permissions, as Linux numbers them */
    uint32_t uid, gid, mtime_ns, rdev_major, rdev_minor;
    int64_t mtime_s;
    uint64_t size_bytes;
    uint64_t data;  /* regular file: byte offset in its layer's data blob */
    uint32_t layer; /* merge: whose blob */
    uint32_t target_len, xattr_bytes;
    const char *target;    /* symbolic link */
    const uint8_t *xattrs; /* packed list, see xattr.h */
};

struct sm_tree {
    struct sm_node *nodes;
    struct sm_inode *inodes;
    uint32_t n_nodes, cap_nodes, n_inodes, cap_inodes;
    uint64_t max_nodes;
    uint32_t max_depth;
    uint32_t *buckets, n_buckets;
    struct sm_tree_chunk *arena;
};

int sm_tree_open(struct sm_tree *t, uint64_t max_nodes, uint32_t max_depth);
void sm_tree_close(struct sm_tree *t);

/* len bytes and a NUL in the tree's arena; NULL without memory. */
void *sm_tree_copy(struct sm_tree *t, const void *data, size_t len);

uint32_t sm_tree_lookup(const struct sm_tree *t, uint32_t dir, const char *name, size_t len);

/* A new child (the name must be free and is borrowed); -errno with text. */
int sm_tree_add(struct sm_tree *t, uint32_t dir, const char *name, size_t len,
                enum sm_node_kind kind, uint32_t *id, struct sm_image_error *e);

/* A zeroed inode; -errno with text. */
int sm_tree_add_inode(struct sm_tree *t, uint32_t *id, struct sm_image_error *e);

void sm_tree_detach(struct sm_tree *t, uint32_t id);        /* and what is below */
void sm_tree_drop_children(struct sm_tree *t, uint32_t id);

bool sm_tree_is_dir(const struct sm_tree *t, uint32_t id);

/* The children of dir, by name in byte order, into ids (from sm_tree_count). */
uint32_t sm_tree_count_children(const struct sm_tree *t, uint32_t dir);
void sm_tree_sort_children(const struct sm_tree *t, uint32_t dir, uint32_t *ids);

/*
 * Lexically cleans a path from outside: no leading, trailing or double slash, no
 * ".", and ".." cuts the component before it, stopping at the root ("" = root).
 * -ENAMETOOLONG for a component or a whole that is too long.
 */
int sm_path_clean(const char *in, char out[SM_IMAGE_PATH_MAX + 1], struct sm_image_error *e);

enum sm_walk_mode {
    SM_WALK_FIND,    /* change nothing */
    SM_WALK_CREATE,  /* missing parents become implicit directories */
    SM_WALK_PHANTOM, /* missing parents become phantoms */
};

struct sm_walk {
    uint32_t parent; /* where the last component is looked up */
    uint32_t node;   /* the last component itself, or NONE */
    char name[SM_IMAGE_NAME_MAX + 1];
    size_t name_len;
    /* FIND that met a missing or non-directory parent: what remains. */
    char rest[2 * SM_IMAGE_PATH_MAX + 2];
};

/*
 * Follows a clean, non-empty path; symbolic links only in parents.
 * 0; -ENOENT (FIND: a parent is missing); -ENOTDIR; -ELOOP; other -errno.
 */
int sm_tree_walk(struct sm_tree *t, const char *path, enum sm_walk_mode mode,
                 struct sm_walk *w, struct sm_image_error *e);

#endif
