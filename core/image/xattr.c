/* SPDX-License-Identifier: Apache-2.0 */
/* Packed lists of extended attributes; see xattr.h. */
#include "xattr.h"

#include <errno.h>
#include <string.h>

static bool has_prefix(const char *name, size_t len, const char *prefix)
{
    size_t n = strlen(prefix);

    return len >= n && !memcmp(name, prefix, n);
}

uint8_t sm_xattr_index(const char *name, size_t len, size_t *prefix_len)
{
    static const struct {
        const char *prefix;
        uint8_t index;
        bool whole; /* the prefix is the whole name */
    } known[] = {
        { "user.", 1, false },
        { "system.posix_acl_access", 2, true },
        { "system.posix_acl_default", 3, true },
        { "trusted.", 4, false },
        { "security.", 6, false },
    };

    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        size_t n = strlen(known[i].prefix);

        if (!has_prefix(name, len, known[i].prefix))
            continue;
        if (known[i].whole ? len != n : len == n || len - n > UINT8_MAX)
            continue;
        *prefix_len = n;
        return known[i].index;
    }
    return 0;
}

bool sm_xattr_forbidden(const char *name, size_t len)
{
    return has_prefix(name, len, "trusted.overlay.") || has_prefix(name, len, "user.overlay.");
}

int sm_xattr_next(const uint8_t *list, size_t len, size_t *pos, struct sm_xattr *x)
{
    size_t prefix, left = len - *pos;
    const uint8_t *p = list + *pos;

    if (!left)
        return 0;
    if (left < 4)
        return -EBADMSG;
    x->name_len = sm_get16(p);
    x->value_len = sm_get16(p + 2);
    if (left - 4 < (size_t)x->name_len + x->value_len)
        return -EBADMSG;
    x->name = (const char *)p + 4;
    x->value = p + 4 + x->name_len;
    if (!sm_xattr_index(x->name, x->name_len, &prefix))
        return -EBADMSG;
    *pos += 4u + x->name_len + x->value_len;
    return 1;
}

static int compare(const struct sm_xattr *a, const struct sm_xattr *b)
{
    size_t n = a->name_len < b->name_len ? a->name_len : b->name_len;
    int c = memcmp(a->name, b->name, n);

    return c ? c : (int)a->name_len - (int)b->name_len;
}

size_t sm_xattr_sort(struct sm_xattr *x, size_t n)
{
    size_t kept = 0;

    /* Insertion: an inode has a handful, and the caller bounds the number. */
    for (size_t i = 0; i < n; i++) {
        struct sm_xattr one = x[i];
        size_t at = kept;

        while (at && compare(&x[at - 1], &one) > 0)
            at--;
        if (at && compare(&x[at - 1], &one) == 0) {
            x[at - 1] = one;
            continue;
        }
        memmove(&x[at + 1], &x[at], (kept - at) * sizeof(*x));
        x[at] = one;
        kept++;
    }
    return kept;
}

size_t sm_xattr_packed_bytes(const struct sm_xattr *x, size_t n)
{
    size_t bytes = 0;

    for (size_t i = 0; i < n; i++)
        bytes += 4u + x[i].name_len + x[i].value_len;
    return bytes;
}

void sm_xattr_pack(const struct sm_xattr *x, size_t n, uint8_t *out)
{
    for (size_t i = 0; i < n; i++) {
        sm_put16(out, x[i].name_len);
        sm_put16(out + 2, x[i].value_len);
        memcpy(out + 4, x[i].name, x[i].name_len);
        memcpy(out + 4 + x[i].name_len, x[i].value, x[i].value_len);
        out += 4u + x[i].name_len + x[i].value_len;
    }
}
