/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Paths inside a tree: cleaning what a tar says, and walking with symbolic
 * links resolved within the root; see tree.h. A hard bound on link expansions
 * and on the text still to walk keeps hostile link mazes short.
 */
#include "tree.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#define LINKS_MAX 40

int sm_path_clean(const char *in, char out[SM_IMAGE_PATH_MAX + 1], struct sm_image_error *e)
{
    size_t used = 0;

    while (*in) {
        size_t n = strcspn(in, "/");

        if (n == 2 && in[0] == '.' && in[1] == '.') {
            while (used && out[used - 1] != '/')
                used--;
            if (used)
                used--;
        } else if (n && !(n == 1 && in[0] == '.')) {
            if (n > SM_IMAGE_NAME_MAX)
                return sm_image_fail(e, ENAMETOOLONG, "name '%s' is longer than %u bytes",
                                     sm_image_quote(in, n).text, SM_IMAGE_NAME_MAX);
            if (used + n + 1 > SM_IMAGE_PATH_MAX)
                return sm_image_fail(e, ENAMETOOLONG, "path is longer than %u bytes",
                                     SM_IMAGE_PATH_MAX);
            if (used)
                out[used++] = '/';
            memcpy(out + used, in, n);
            used += n;
        }
        in += n;
        in += strspn(in, "/");
    }
    out[used] = 0;
    return 0;
}

/* Puts a link's target before what is still to walk. */
static int expand(struct sm_walk *w, const char *rest, const struct sm_inode *link,
                  struct sm_image_error *e)
{
    size_t n = strlen(rest);

    if (link->target_len + 1 + n >= sizeof(w->rest))
        return sm_image_fail(e, ENAMETOOLONG, "symbolic links make a path too long");
    memmove(w->rest + link->target_len + 1, rest, n + 1);
    memcpy(w->rest, link->target, link->target_len);
    w->rest[link->target_len] = '/';
    return 0;
}

/* Enters the parent component `name`; 1 if it is a link to expand. */
static int enter(struct sm_tree *t, enum sm_walk_mode mode, uint32_t *dir, const char *name,
                 size_t len, uint32_t *found, struct sm_image_error *e)
{
    uint32_t id = sm_tree_lookup(t, *dir, name, len);
    struct sm_node *n;

    *found = id;
    if (id == SM_TREE_NONE) {
        char *copy;
        int ret;

        if (mode == SM_WALK_FIND)
            return -ENOENT;
        copy = sm_tree_copy(t, name, len);
        if (!copy)
            return sm_image_fail(e, ENOMEM, "out of memory");
        ret = sm_tree_add(t, *dir, copy, len,
                          mode == SM_WALK_CREATE ? SM_NODE_IMPLICIT : SM_NODE_PHANTOM, dir, e);
        return ret;
    }
    n = &t->nodes[id];
    if (mode == SM_WALK_CREATE && n->kind == SM_NODE_PHANTOM)
        n->kind = SM_NODE_IMPLICIT;
    if (mode == SM_WALK_CREATE && n->kind == SM_NODE_WHITEOUT) {
        n->kind = SM_NODE_IMPLICIT;
        n->flags |= SM_NODE_HIDES;
    }
    if (n->kind == SM_NODE_INODE && S_ISLNK(t->inodes[n->inode].mode))
        return 1;
    if (!sm_tree_is_dir(t, id))
        return -ENOTDIR;
    *dir = id;
    return 0;
}

int sm_tree_walk(struct sm_tree *t, const char *path, enum sm_walk_mode mode,
                 struct sm_walk *w, struct sm_image_error *e)
{
    unsigned links = 0;
    char *p = w->rest;

    w->parent = SM_TREE_ROOT;
    w->node = SM_TREE_NONE;
    strcpy(w->rest, path);
    for (;;) {
        size_t n;
        uint32_t id;
        int ret;

        p += strspn(p, "/");
        n = strcspn(p, "/");
        if (n > SM_IMAGE_NAME_MAX)
            return sm_image_fail(e, ENAMETOOLONG, "a name is longer than %u bytes",
                                 SM_IMAGE_NAME_MAX);
        if (!p[n]) {
            memcpy(w->name, p, n + 1);
            w->name_len = n;
            w->node = sm_tree_lookup(t, w->parent, p, n);
            return 0;
        }
        if (n == 1 && p[0] == '.') {
            p += n;
            continue;
        }
        if (n == 2 && p[0] == '.' && p[1] == '.') {
            w->parent = t->nodes[w->parent].parent;
            p += n;
            continue;
        }
        ret = enter(t, mode, &w->parent, p, n, &id, e);
        if (ret < 0) {
            memmove(w->rest, p, strlen(p) + 1);
            return ret;
        }
        if (ret == 1) {
            const struct sm_inode *link = &t->inodes[t->nodes[id].inode];

            if (++links > LINKS_MAX)
                return sm_image_fail(e, ELOOP, "too many levels of symbolic links");
            if (link->target[0] == '/')
                w->parent = SM_TREE_ROOT;
            ret = expand(w, p + n, link, e);
            if (ret < 0)
                return ret;
            p = w->rest;
            continue;
        }
        p += n;
    }
}
