/* SPDX-License-Identifier: Apache-2.0 */
/* `name|uid[:group|gid]` against a passwd and a group file, as images mean it. */
#ifndef SM_GUEST_USERS_H
#define SM_GUEST_USERS_H

#include <stddef.h>
#include <stdint.h>

#define SM_IDENT_GROUPS_MAX 256

struct sm_ident {
    uint32_t uid, gid;
    uint32_t groups[SM_IDENT_GROUPS_MAX]; /* supplementary, without gid */
    unsigned group_count;
    char home[256];
};

/*
 * spec NULL or "" is uid 0. The texts may be NULL (no such file); they need no
 * terminator. 0, -ENOENT (a name not listed), -EINVAL (not a user), -ERANGE.
 */
int sm_ident_resolve(const char *spec, const char *passwd, size_t passwd_len,
                     const char *group, size_t group_len, struct sm_ident *out);

/* The same with /etc/passwd and /etc/group as they stand. */
int sm_ident_lookup(const char *spec, struct sm_ident *out);

#endif
